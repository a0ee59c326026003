"""The report on a model of drug pairs: what was compared in folds, the model itself, in words, tables and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xtrimogene.document import Picture, Section, Table
from xtrimogene.tasks import report
from xtrimogene.tasks.synergy_baselines import AUROC, BASELINES, BOOSTING, FOREST, LINEAR, METRICS, PEARSON, RMSE
from xtrimogene.tasks.synergy_lines import OURS, RAW, SHUFFLED, UNTRAINED, VERSIONS
from xtrimogene.tasks.synergy_triples import KINDS, TRIPLE

Array = npt.NDArray[Any]

TITLE = "Drug pairs"
NETWORK = {
    OURS: "network",
    RAW: "network, raw expression",
    SHUFFLED: "network, shuffled lines",
    UNTRAINED: "network, untrained encoder",
}
# Figures that differ by less are told to be the same.
_AS_GOOD = 0.0005
_DIGITS = {RMSE: 2}


@dataclass(frozen=True)
class Compared:
    """Ways of learning, each fitted in every fold to what is not held out.

    kind     what the folds hold out
    told     of the folds, in words
    tested   triples that are judged in each fold, and those of them that have a class
    figures  guess -> metric -> a number for each fold
    """

    kind: str
    told: str
    tested: list[tuple[int, int]]
    figures: dict[str, dict[str, list[float]]]

    def mean(self, guess: str, metric: str) -> float:
        """Over the folds that have the figure, NaN where none has."""
        values = self._finite(guess, metric)
        return float(np.mean(values)) if values else float("nan")

    def spread(self, guess: str, metric: str) -> float:
        """The standard deviation over the folds."""
        values = self._finite(guess, metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")

    def _finite(self, guess: str, metric: str) -> list[float]:
        return [value for value in self.figures[guess][metric] if np.isfinite(value)]

    def differences(self, guess: str, metric: str) -> Array:
        """Of the network from a guess, in the folds that have the figure for both."""
        found = np.array(self.figures[NETWORK[OURS]][metric]) - np.array(self.figures[guess][metric])
        return found[np.isfinite(found)]


@dataclass(frozen=True)
class SynergyEvaluation:
    """How good a model of drug pairs is.

    target    what is learned, in words
    compared  split -> figures of all ways in its folds
    model     figures of the model itself on triples that it was not fitted to, beside those of ways that were fitted to
              the same: what is unseen of them -> guess -> metric -> number; and how many triples these are
    fitted    triples that the model was fitted to
    told      what was done with rows
    truth     scores and predictions of those triples, for the picture; None where only classes are learned
    """

    target: str
    compared: dict[str, Compared]
    model: dict[str, dict[str, dict[str, float]]]
    counts: dict[str, int]
    fitted: int
    told: list[str]
    truth: tuple[Array, Array] | None = field(repr=False)

    def numbers(self) -> dict[str, Any]:
        """For report.json."""
        folds = {
            split: {
                **{name: value for name, value in dataclasses.asdict(each).items() if name != "figures"},
                "figures": {
                    guess: {
                        metric: {
                            "mean": each.mean(guess, metric),
                            "spread": each.spread(guess, metric),
                            "folds": values,
                        }
                        for metric, values in metrics.items()
                    }
                    for guess, metrics in each.figures.items()
                },
            }
            for split, each in self.compared.items()
        }
        return {
            "target": self.target,
            "folds": folds,
            "model": self.model,
            "triples": self.counts,
            "fitted": self.fitted,
            "told": self.told,
        }


def verdict(evaluation: SynergyEvaluation) -> str:
    """Whether the network beats ways that need none, and what its embedding of lines adds, in words: a line of Markdown
    for each split."""
    lines = []
    ours = NETWORK[OURS]
    for split, compared in evaluation.compared.items():
        best = max(BASELINES, key=lambda name: _or_nothing(compared.mean(name, AUROC)))
        words = [f"`{name}` {_figure(compared.mean(name, AUROC))}" for name in BASELINES]
        gap = compared.mean(ours, AUROC) - compared.mean(best, AUROC)
        if not np.isfinite(gap):
            place = f"neither the network nor `{best}` can be judged, for want of a class"
        elif abs(gap) < _AS_GOOD:
            place = f"the network is as good as `{best}`, the best way without one"
        elif gap < 0:
            place = f"`{best}` is better than the network"
        else:
            place = f"the network is better than `{best}`, the best way without one"
        others = "; ".join(_added(compared, version) for version in VERSIONS[1:])
        lines.append(
            f"- Leaving {_named(split)} out, {place}: AUROC of the network {_figure(compared.mean(ours, AUROC))}, "
            f"{', '.join(words)}. The line's embedding adds {others}."
        )
    for kind, figures in evaluation.model.items():
        words = [f"`{name}` {_figure(figures[name][AUROC])}" for name in (ours, *BASELINES)]
        what = "it was not fitted to, of pairs that it was" if kind == TRIPLE else f"whose {kind} it was not fitted to"
        lines.append(f"- The model itself, on {evaluation.counts[kind]:,} triples {what}: AUROC of {', '.join(words)}.")
    return "\n".join(lines)


_WORDS = {
    RAW: "the raw expression",
    SHUFFLED: "the embedding of another line",
    UNTRAINED: "that of an untrained encoder",
}


def _added(compared: Compared, version: str) -> str:
    """What the embedding adds over another version of the lines, in words."""
    gaps = compared.differences(NETWORK[version], AUROC)
    if not len(gaps):
        return f"nothing that can be judged over {_WORDS[version]}"
    better = f"better in {int((gaps > 0).sum())} of {len(gaps)} folds"
    return f"{gaps.mean():+.3f} over {_WORDS[version]} ({better})"


def _figure(value: float) -> str:
    return report.shown(value) or "none"


def _or_nothing(value: float) -> float:
    return value if np.isfinite(value) else -1.0


def _named(split: str) -> str:
    return f"{split}s" if split in KINDS else f"what {Path(split).name} says"


def write(evaluation: SynergyEvaluation, folder: Path) -> None:
    """Write report.html, report.md, report.json and pictures into a folder."""
    report.write(folder, TITLE, sections(evaluation), evaluation.numbers(), _pictures(evaluation))


def sections(evaluation: SynergyEvaluation) -> list[Section]:
    """The report."""
    intro = f"Learned: {evaluation.target}. The model was fitted to {evaluation.fitted:,} triples."
    parts: list[str | Table | Picture] = [verdict(evaluation), intro, *evaluation.told]
    if evaluation.compared:
        parts.append(Picture("auroc", "AUROC of synergy against antagonism, a point for each fold"))
    found = [Section("In short", parts)]
    for split, compared in evaluation.compared.items():
        body = [
            [name, *(_shown(compared.mean(name, metric), compared.spread(name, metric), metric) for metric in METRICS)]
            for name in compared.figures
        ]
        tested = ", ".join(f"{count:,} ({classed:,})" for count, classed in compared.tested)
        how = (
            f"{compared.told}. Mean over the folds ± their standard deviation; tested in each: {tested} triples (with "
            "a class)."
        )
        found.append(
            Section(
                f"Leaving {_named(split)} out",
                [Table([f"by {split if split in KINDS else Path(split).name}", *METRICS], body, how), _gaps(compared)],
            )
        )
    if evaluation.model:
        body = [
            [
                f"{kind} ({evaluation.counts[kind]:,})",
                name,
                *(report.shown(metrics[m], _DIGITS.get(m, 3)) for m in METRICS),
            ]
            for kind, figures in evaluation.model.items()
            for name, metrics in figures.items()
        ]
        how = (
            "The weights of the model, on triples that it was not fitted to, by what of them is unseen, beside ways "
            "that are fitted to the same triples as it."
        )
        own: list[str | Table | Picture] = [Table(["unseen (triples)", "guess", *METRICS], body, how)]
        if evaluation.truth is not None:
            own.append(Picture("scores", "Measured and predicted scores of these triples"))
        found.append(Section("The model itself", own))
    found.append(Section("What the rows and columns are", [_ROWS, _COLUMNS]))
    return found


_ROWS = (
    f"`{NETWORK[OURS]}`: fitted anew in each fold, as the model was. `{NETWORK[RAW]}`: the same, with as many "
    "principal components of the training lines' log expression in place of the embedding; `shuffled lines`: each line "
    "with the embedding of another one, so that it is a name and no more; `untrained encoder`: embeddings by an "
    f"encoder of the same shape that has learned nothing. All are as wide. `{LINEAR}` and `{BOOSTING}`: logistic "
    f"regression, ridge, and gradient boosting on which drugs and which line it is. `{FOREST}`: random forests on "
    "MACCS keys of both drugs and the principal components of expression. These three are fitted to the network's "
    "training and validation part."
)
_COLUMNS = (
    "AUROC, average precision, balanced accuracy and Cohen's kappa are of synergy against antagonism, over triples "
    "that are one of them; the latter two call synergy what has a probability above one half. Pearson and RMSE are of "
    "the score, over all triples. A line, drug or pair that is held out is in no triple that anything was fitted to, "
    "and in none that decides when a fit stops; of drugs, one of both."
)


def _shown(mean: float, spread: float, metric: str) -> str:
    digits = _DIGITS.get(metric, 3)
    text, around = report.shown(mean, digits), report.shown(spread, digits)
    return f"{text} ± {around}" if around else text


def _gaps(compared: Compared) -> Table:
    metrics = [metric for metric in (AUROC, PEARSON) if np.isfinite(compared.mean(NETWORK[OURS], metric))]
    body = []
    for name in compared.figures:
        if name == NETWORK[OURS]:
            continue
        cells = []
        for metric in metrics:
            gaps = compared.differences(name, metric)
            spread = f" ± {gaps.std(ddof=1):.3f}" if len(gaps) > 1 else ""
            cells.append(f"{gaps.mean():+.3f}{spread} ({int((gaps > 0).sum())} of {len(gaps)})" if len(gaps) else "")
        body.append([name, *cells])
    how = "The network less each guess, fold by fold: mean ± standard deviation, and in how many folds it is better."
    return Table(["the network less", *metrics], body, how)


def _pictures(evaluation: SynergyEvaluation) -> Mapping[str, Callable[[Any], None]]:
    found: dict[str, Callable[[Any], None]] = {}
    if evaluation.compared:
        found["auroc"] = lambda figure: _draw_auroc(figure, evaluation)
    if (truth := evaluation.truth) is not None:
        found["scores"] = lambda figure: _draw_scores(figure, *truth)
    return found


def _draw_auroc(figure: Any, evaluation: SynergyEvaluation) -> None:
    names = list(next(iter(evaluation.compared.values())).figures)
    count = len(evaluation.compared)
    figure.set_size_inches(2.6 + 2.4 * count, 0.8 + 0.3 * len(names))
    for axes, (split, compared) in zip(
        figure.subplots(1, count, sharey=True, squeeze=False)[0], evaluation.compared.items(), strict=True
    ):
        for row, name in enumerate(names):
            color = "C1" if name in NETWORK.values() else "C0"
            values = compared.figures[name][AUROC]
            axes.plot(values, [row] * len(values), "o", ms=3, color=color, alpha=0.4)
            axes.plot(compared.mean(name, AUROC), row, "|", ms=14, mew=2, color=color)
        axes.set(title=f"leaving {_named(split)} out", xlabel=AUROC)
        axes.grid(axis="x", color="0.9")
        axes.set_yticks(range(len(names)), names)
    figure.axes[0].set_ylim(len(names) - 0.4, -0.6)


def _draw_scores(figure: Any, truth: Array, found: Array) -> None:
    figure.set_size_inches(4.8, 4.4)
    axes = figure.subplots()
    axes.plot(truth, found, ".", ms=3, alpha=0.3, rasterized=True)
    limits = np.percentile(truth, [0.5, 99.5])
    axes.plot(limits, limits, color="0.7", lw=1, zorder=0)
    axes.set(xlabel="measured score", ylabel="predicted score", xlim=limits)
