"""What names cell types without a network, and the figures by which all are judged."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse

from xtrimogene.cells.data_sets import Data
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.evaluation.bars import Components
from xtrimogene.network.vocabulary import Vocabulary

COMPONENTS = 50
NEIGHBOURS = 15
# Most varying genes that the L1 regression reads, which takes minutes on all of them.
L1_GENES = 3000
# Inverse strengths of the penalties, of 1 and 0.1 the better one on sorted blood cells, for each.
L2_C, L1_C = 0.1, 1.0
BINS = 15
_CLUSTER_CELLS, _MOST_CLUSTERS = 30, 500
Codes = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


def log_normalised(
    data: Data | Sequence[Data], vocabulary: Vocabulary, reading: dict[str, Any], cells: Codes
) -> sparse.csr_matrix:
    """(n, genes) log1p(count / total * 10,000) of cells by their numbers, over all genes of a vocabulary."""
    options = {name: value for name, value in reading.items() if value is not None}
    # What there is to say of the genes was said when the model's were read.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stream = TrainingCells(
            data,
            vocabulary,
            **options,
            validation_share=0.0,
            min_genes=0,
            batch_tokens=1 << 30,
            prefetch=0,
            progress=False,
        )
    with stream:
        batch = stream.read(cells)
    return sparse.csr_matrix(
        (batch.values.numpy(), batch.gene_ids.numpy(), batch.cu_seqlens.numpy()), shape=(len(cells), len(vocabulary))
    )


def guesses(known: sparse.csr_matrix, asked: sparse.csr_matrix, codes: Codes, ours: Codes) -> dict[str, Codes]:
    """(n,) the types of asked cells, by each way that is fitted to known cells (m, genes) of these types.

    ours  (n,) a model's types of the asked cells, which are voted on too
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.neighbors import KNeighborsClassifier

    found = {}
    l2 = LogisticRegression(C=L2_C, max_iter=500).fit(known, codes)
    found["logistic regression, L2"] = l2.predict(asked)
    varying = np.sort(np.argsort(-_variances(known), kind="stable")[:L1_GENES])
    l1 = OneVsRestClassifier(LogisticRegression(l1_ratio=1.0, C=L1_C, solver="liblinear", random_state=0))
    found["logistic regression, L1"] = l1.fit(known[:, varying], codes).predict(asked[:, varying])
    components = Components.of(known, COMPONENTS)
    points = [components.coordinates(cells) for cells in (known, asked)]
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(codes))).fit(points[0], codes)
    found[f"{NEIGHBOURS} neighbours on {COMPONENTS} components"] = neighbours.predict(points[1])
    clusters = small_clusters(Components.of(asked, COMPONENTS).coordinates(asked))
    found["logistic regression, L2, majority vote"] = majority(found["logistic regression, L2"], clusters)
    found["this model, majority vote"] = majority(ours, clusters)
    return found


def _variances(cells: sparse.csr_matrix) -> Values:
    mean = np.asarray(cells.mean(axis=0), np.float64).ravel()
    return np.asarray(cells.multiply(cells).mean(axis=0), np.float64).ravel() - mean**2


def small_clusters(points: npt.NDArray[Any]) -> Codes:
    """(n,) cluster of each of n points (n, k): k-means on at most 50 components, one cluster for about 30 points,
    500 at most.

    CellTypist takes Leiden clusters at a high resolution for its vote: many small groups of like cells, and so are
    these, without a graph.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import PCA

    if len(points) < 2:
        return np.zeros(len(points), np.int64)
    count = min(max(1, len(points) // _CLUSTER_CELLS), _MOST_CLUSTERS)
    if points.shape[1] > COMPONENTS and len(points) > COMPONENTS:
        points = PCA(COMPONENTS, random_state=0).fit_transform(points)
    found = MiniBatchKMeans(count, random_state=0, n_init=1).fit_predict(points.astype(np.float64))
    return np.asarray(found, np.int64)


def majority(codes: Codes, groups: npt.NDArray[Any]) -> Codes:
    """(n,) the type, -1 among them, that most cells of each cell's group have; the first one of several."""
    _, group = np.unique(groups, return_inverse=True)
    types = int(codes.max(initial=-1)) + 2
    votes = np.bincount(group * types + codes + 1, minlength=(int(group.max(initial=-1)) + 1) * types)
    return votes.reshape(-1, types).argmax(axis=1)[group] - 1


def figures(truth: Codes, guess: Codes, types: Sequence[int]) -> dict[str, float]:
    """Accuracy, and the mean F1 over these types."""
    from sklearn.metrics import accuracy_score, f1_score

    macro = f1_score(truth, guess, labels=list(types), average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(truth, guess)), "macro_f1": float(macro)}


def softmax(scores: Values) -> Values:
    """(n, types) probabilities of scores."""
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def temperature_of(scores: Values, truth: Codes) -> float:
    """What scores (n, types) are to be divided by so that the likelihood of the true types (n,) is largest."""

    def loss(log_temperature: float) -> float:
        probabilities = softmax(scores / np.exp(log_temperature))
        return -float(np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-12)).mean())

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x))


def reliability(probabilities: npt.NDArray[Any], truth: Codes) -> list[dict[str, float]]:
    """Cells by their largest probability, in 15 equal bins: mean confidence, share of right types, number of cells."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidence[bins == each].mean()),
            "accuracy": float(right[bins == each].mean()),
            "cells": int((bins == each).sum()),
        }
        for each in range(BINS)
        if (bins == each).any()
    ]


def calibration_error(probabilities: npt.NDArray[Any], truth: Codes) -> float:
    """Expected calibration error (Guo et al. 2017): mean distance of confidence and accuracy over cells, by bins."""
    bins = reliability(probabilities, truth)
    return sum(abs(each["confidence"] - each["accuracy"]) * each["cells"] for each in bins) / len(truth)
