"""What predicts drug pairs without a network, and the figures by which all are judged."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xtrimogene.tasks.synergy_triples import BETWEEN, SYNERGY, Mask

Array = npt.NDArray[Any]

LINEAR, BOOSTING, FOREST = "one-hot linear", "one-hot boosting", "fingerprint forest"
BASELINES = (LINEAR, BOOSTING, FOREST)
AUROC, PRECISION, BALANCED, KAPPA, PEARSON, RMSE = (
    "AUROC", "average precision", "balanced accuracy", "kappa", "Pearson", "RMSE",
)  # fmt: skip
METRICS = (AUROC, PRECISION, BALANCED, KAPPA, PEARSON, RMSE)
_ROUNDS, _TREES = 300, 100


@dataclass(frozen=True)
class Guess:
    """Of n triples: (n,) scores, None where only classes are learned, and (n,) probabilities of synergy."""

    scores: Array | None
    probabilities: Array


def guesses(
    codes: Array, scores: Array | None, classes: Array, train: Mask, test: Mask, keys: Array, lines: Array, seed: int
) -> dict[str, Guess]:
    """Of the test triples, by each way that is fitted to all that may be trained on.

    codes            (n, 3) two molecules and a line
    scores, classes  (n,) what was measured of them
    keys             (molecules, K) fingerprints
    lines            (lines, L) vectors of the cell lines

    "one-hot linear": logistic regression and a ridge on one-hot drugs, of which two are 1, and lines; "one-hot
    boosting": gradient boosting on the same; "fingerprint forest": random forests on the sum of both drugs'
    fingerprints and the line's vector. All take a pair in either order for the same.
    """
    from sklearn.ensemble import (
        HistGradientBoostingClassifier,
        HistGradientBoostingRegressor,
        RandomForestClassifier,
        RandomForestRegressor,
    )
    from sklearn.linear_model import LogisticRegression, Ridge

    hot = one_hot(codes, len(keys), len(lines))
    prints = np.concatenate([keys[codes[:, 0]] + keys[codes[:, 1]], lines[codes[:, 2]]], 1)
    boosted = {"max_iter": _ROUNDS, "early_stopping": False, "random_state": seed}
    grown = {"n_estimators": _TREES, "max_features": "sqrt", "random_state": seed}
    ways: dict[str, tuple[Array, Any, Any]] = {
        LINEAR: (hot, LogisticRegression(max_iter=1000), Ridge()),
        BOOSTING: (hot, HistGradientBoostingClassifier(**boosted), HistGradientBoostingRegressor(**boosted)),
        FOREST: (prints, RandomForestClassifier(**grown), RandomForestRegressor(**grown)),
    }
    classed = train & (classes != BETWEEN)
    found = {}
    for name, (rows, classifier, regressor) in ways.items():
        probabilities = classifier.fit(rows[classed], classes[classed]).predict_proba(rows[test])[:, 1]
        scored = None if scores is None else regressor.fit(rows[train], scores[train]).predict(rows[test])
        found[name] = Guess(scored, probabilities)
    return found


def one_hot(codes: Array, molecules: int, lines: int) -> Array:
    """(n, molecules + lines) float32: 1 at both drugs and at the line."""
    found = np.zeros((len(codes), molecules + lines), np.float32)
    rows = np.arange(len(codes))
    for column, start in ((0, 0), (1, 0), (2, molecules)):
        found[rows, start + codes[:, column]] = 1.0
    return found


def judge(guess: Guess, scores: Array | None, classes: Array) -> dict[str, float]:
    """The figures of a guess: those of classes over triples that have one, those of scores over all.

    AUROC and average precision rank by the probability; balanced accuracy and Cohen's kappa take it for synergy above
    one half. NaN where they say nothing: of one class alone, or of scores that are all the same.
    """
    from sklearn.metrics import (
        average_precision_score,
        balanced_accuracy_score,
        cohen_kappa_score,
        roc_auc_score,
    )

    own = classes != BETWEEN
    truth, probabilities = classes[own] == SYNERGY, guess.probabilities[own]
    found = dict.fromkeys(METRICS, float("nan"))
    if truth.any() and not truth.all():
        called = probabilities > 0.5
        found[AUROC] = float(roc_auc_score(truth, probabilities))
        found[PRECISION] = float(average_precision_score(truth, probabilities))
        found[BALANCED] = float(balanced_accuracy_score(truth, called))
        found[KAPPA] = float(cohen_kappa_score(truth, called))
    if scores is not None and guess.scores is not None and len(scores):
        found[RMSE] = float(np.sqrt(np.mean((guess.scores - scores) ** 2)))
        if np.ptp(scores) > 0 and np.ptp(guess.scores) > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[PEARSON] = float(np.corrcoef(guess.scores, scores)[0, 1])
    return found
