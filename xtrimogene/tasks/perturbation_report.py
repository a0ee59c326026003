"""Judges a model of perturbation effects by perturbations that it was not fitted to, and writes the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from anndata import AnnData

from xtrimogene.document import Picture, Section, Table
from xtrimogene.tasks import report
from xtrimogene.tasks.conditions import Perturbation, name_of
from xtrimogene.tasks.effects import (
    ADDITIVE,
    ADDITIVE_MEAN,
    BASELINES,
    LINEAR_MODEL,
    LINEAR_OWN,
    MEAN,
    METRICS,
    MSE_ALL,
    MSE_TOP,
    NO_CHANGE,
    RANK_SCORE,
    TOP_GENES,
    interval,
    judge,
)
from xtrimogene.tasks.perturbation_model import LEARNED, OURS, SHUFFLED, PerturbationModel, perturbed_genes
from xtrimogene.tasks.screen import open_screen
from xtrimogene.tasks.splits import listed, need

Array = npt.NDArray[Any]

NETWORK = {OURS: "network", LEARNED: "network, learned embeddings", SHUFFLED: "network, shuffled embeddings"}
REPLICATE = "other half of the cells"
ALL = "all"
# Errors that differ by less, relative to each other, are told to be the same.
_AS_GOOD = 0.005
_LEAST_GENES = 2 * TOP_GENES
_DIGITS = {MSE_TOP: 4, MSE_ALL: 5}


@dataclass(frozen=True)
class PerturbationEvaluation:
    """What a model was found to predict.

    perturbations  names of those that are judged
    kinds          the kind of each: "single, unseen" or "pair, 1 seen", by genes in what the model was fitted to
    metrics        guess -> metric -> (perturbations,) one number each, see effects.judge
    genes          measured genes of the model, and those of them that the data have: "model", "judged"
    unknown        perturbed genes of which the model knows nothing
    fitted         perturbations that it was fitted to
    changes        measured, and predicted by the network, (perturbations, genes)
    """

    perturbations: list[str]
    kinds: list[str]
    metrics: dict[str, dict[str, Array]]
    genes: dict[str, int]
    unknown: list[str]
    fitted: int
    cells: int
    changes: tuple[Array, Array]

    def groups(self) -> dict[str, Array]:
        """Kind -> (perturbations,) which are of it; all of them first where there are several kinds."""
        kinds = np.array(self.kinds)
        found = {kind: kinds == kind for kind in sorted(set(self.kinds), reverse=True)}
        return {ALL: np.ones(len(kinds), bool), **found} if len(found) > 1 else found

    def mean(self, guess: str, metric: str, group: str) -> float:
        """The mean of a metric over a group."""
        return float(self.metrics[guess][metric][self.groups()[group]].mean())

    def numbers(self) -> dict[str, Any]:
        """For report.json: means with their intervals, and each perturbation's numbers."""
        groups = {
            group: {
                guess: {
                    metric: {"mean": float(values[own].mean()), "interval": interval(values[own])}
                    for metric, values in metrics.items()
                }
                for guess, metrics in self.metrics.items()
            }
            for group, own in self.groups().items()
        }
        each = {
            name: {
                "kind": self.kinds[number],
                **{
                    guess: {metric: float(values[number]) for metric, values in metrics.items()}
                    for guess, metrics in self.metrics.items()
                },
            }
            for number, name in enumerate(self.perturbations)
        }
        return {
            "fitted": self.fitted,
            "cells": self.cells,
            "genes": self.genes,
            "unknown": self.unknown,
            "groups": groups,
            "perturbations": each,
        }


def evaluate(
    model: PerturbationModel | str | os.PathLike[str],
    data: AnnData | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> PerturbationEvaluation:
    """Judge a model by the perturbations of a screen that it was not fitted to, those of its test part for instance.

    Args:
        model: a model or its folder.
        data: the screen, with control cells; the one that the model was fitted to, or another one.
        output: folder for report.html, report.md, report.json and pictures; None for none.
        overwrite: replace an earlier report there.
        options: condition, control, group, min_cells, layer, gene_symbols, normalized, values, fractional_counts and
            total_counts where they are others than in the fit.

    Raises ValueError, OSError: what is wrong with the data in a line, or that the model was fitted to all of it.
    """
    if output is not None:
        need("matplotlib", "the report", "perturb")
        report.check_output(Path(output), overwrite)
    model = model if isinstance(model, PerturbationModel) else PerturbationModel.load(model)
    reading = {**model.settings["reading"], **options}
    with open_screen(data, known=model.known_names, **reading) as screen:
        test = [number for number, each in enumerate(screen.perturbations) if each not in model.fitted]
        if not test:
            raise ValueError(
                f"{screen.source.name}: expected perturbations that the model was not fitted to, got none among "
                f"{len(screen.perturbations):,}; fit with a split that leaves some out (--split), or give another "
                "screen"
            )
        place = {gene: number for number, gene in enumerate(screen.genes)}
        shared = [gene for gene in model.genes if gene in place]
        if len(shared) < min(_LEAST_GENES, len(model.genes)):
            raise ValueError(
                f"{screen.source.name}: expected the genes that the model predicts, such as "
                f"{', '.join(model.genes[:3])}, got {len(shared):,} of {len(model.genes):,}; name the var column "
                "that has them (--gene-symbols), or give the screen that the model was made for"
            )
        sums = screen.sums(screen.drawn(2, (0,)), 2, progress=progress)
        cells = int(sums.counts[[number + 1 for number in test]].sum())
        own = np.array([place[gene] for gene in shared])
        truth, first, second = (sums.changes(which)[test][:, own] for which in ((0, 1), (0,), (1,)))
    perturbations = [screen.perturbations[number] for number in test]
    where = np.array([model.genes.index(gene) for gene in shared])
    versions = {NETWORK[version]: model.mean_changes(perturbations, version) for version in model.versions}
    guesses = {**versions, **model.guesses(perturbations)}
    common = model.changes.mean(0)[where]
    metrics = {name: judge(guess[:, where], truth, common) for name, guess in guesses.items()}
    metrics[REPLICATE] = judge(first, second, common)
    evaluation = PerturbationEvaluation(
        [name_of(each) for each in perturbations],
        [_kind(model, each) for each in perturbations],
        metrics,
        {"model": len(model.genes), "judged": len(shared)},
        model.unknown(perturbed_genes(perturbations)),
        len(model.fitted),
        cells,
        (truth, versions[NETWORK[OURS]][:, where]),
    )
    if output is not None:
        pictures = _pictures(evaluation)
        report.write(Path(output), "Perturbation effects", sections(evaluation), evaluation.numbers(), pictures)
    return evaluation


def _kind(model: PerturbationModel, perturbation: Perturbation) -> str:
    seen = model.seen(perturbation)
    if len(perturbation) == 1:
        return "single, seen in pairs" if seen else "single, unseen"
    return f"{'pair' if len(perturbation) == 2 else f'{len(perturbation)} genes'}, {seen} seen"


def verdict(evaluation: PerturbationEvaluation) -> str:
    """Whether the network beats guesses that need none, in words: a line of Markdown for each kind."""
    lines = []
    for group, own in evaluation.groups().items():
        ours = evaluation.mean(NETWORK[OURS], MSE_TOP, group)
        found: dict[str, list[str]] = {"above": [], "as": [], "below": []}
        for name in BASELINES:
            error = evaluation.mean(name, MSE_TOP, group)
            place = "as" if abs(ours - error) <= _AS_GOOD * error else "above" if ours > error else "below"
            found[place].append(f"`{name}` ({error:.4f})")
        words = [
            f"{'the same as' if place == 'as' else place} that of {', '.join(names)}"
            for place, names in found.items()
            if names
        ]
        lines.append(
            f"- {group} ({int(own.sum())}): the network's error on the {TOP_GENES} most changed genes, {ours:.4f}, is "
            f"{'; '.join(words)}."
        )
    return "\n".join(lines)


def sections(evaluation: PerturbationEvaluation) -> list[Section]:
    """The report."""
    groups = evaluation.groups()
    genes = evaluation.genes
    intro = (
        f"{len(evaluation.perturbations):,} perturbations of {evaluation.cells:,} cells, to none of which the model "
        f"was fitted; it was fitted to {evaluation.fitted:,} others. {genes['judged']:,} of its {genes['model']:,} "
        "genes are judged."
    )
    parts: list[str | Table | Picture] = [verdict(evaluation), intro]
    if evaluation.unknown:
        parts.append(
            f"Nothing is known of {listed(evaluation.unknown)}: for them the network can only predict what an "
            "average gene does, and `perturb predict` refuses them."
        )
    parts.append(Picture("errors", f"Error on the {TOP_GENES} most changed genes, with intervals"))
    found = [Section("In short", parts)]
    for group, own in groups.items():
        rows = [_row(evaluation, name, own) for name in (*_names(evaluation), REPLICATE)]
        header = [f"{group} ({int(own.sum())})", *METRICS]
        found.append(Section(f"Perturbations: {group}", [Table(header, rows, _HOW)]))
    found.append(Section("Against the guesses", [_differences(evaluation)]))
    found.append(
        Section("Changes", [Picture("changes", f"Change of the {TOP_GENES} most changed genes of each perturbation")])
    )
    found.append(Section("Each perturbation", [_each(evaluation)]))
    found.append(Section("What the rows and columns are", [_ROWS, _COLUMNS]))
    return found


_HOW = (
    "Means over perturbations, in brackets 95 % bootstrap intervals over them, for three and more. Best: mse 0, r 1, "
    "centroid accuracy 1."
)
_ROWS = (
    f"`{NO_CHANGE}`: control. `{MEAN}`: the mean change of the perturbations that were fitted to. `{ADDITIVE}`: the "
    f"sum of the changes of the genes that were fitted to alone, nothing for others; `{ADDITIVE_MEAN}`: the mean "
    f"change for others. `{LINEAR_OWN}`, `{LINEAR_MODEL}`: a low-rank linear map between embeddings of the perturbed "
    "and of the measured genes, by principal components of the training cells (measured genes only) and by the "
    f"checkpoint's rows in control cells, beside the mean. `{REPLICATE}`: half of a perturbation's cells as the "
    "prediction for its other half, the noise of a half. `learned` and `shuffled embeddings`: the same network, as "
    "wide, with a table that it learns in place of the checkpoint's rows, and with the rows of other genes."
)
_COLUMNS = (
    "Changes are differences of mean log-normalised expression from control cells. `top 20`: the genes that truly "
    "change most. `beyond mean`: from the mean of the fitted perturbations instead of from control, so that what "
    "all perturbations share earns nothing. `centroid accuracy`: of the predictions for the other perturbations "
    "judged here, the share further from the truth than the right one; 0.5 is chance. Seen: genes perturbed, alone "
    "or with others, in what the model was fitted to."
)


def _names(evaluation: PerturbationEvaluation) -> list[str]:
    return [name for name in evaluation.metrics if name != REPLICATE]


def _row(evaluation: PerturbationEvaluation, name: str, own: Array) -> list[str]:
    cells = [name]
    for metric in METRICS:
        values = evaluation.metrics[name][metric][own]
        digits = _DIGITS.get(metric, 3)
        bounds = interval(values)
        text = report.shown(float(values.mean()), digits)
        cells.append(
            text if bounds is None or not text else f"{text} ({bounds[0]:.{digits}f} to {bounds[1]:.{digits}f})"
        )
    return cells


def _differences(evaluation: PerturbationEvaluation) -> Table:
    ours = evaluation.metrics[NETWORK[OURS]][MSE_TOP]
    groups = evaluation.groups()
    body = []
    for name in _names(evaluation):
        if name == NETWORK[OURS]:
            continue
        line = [name]
        for own in groups.values():
            values = (ours - evaluation.metrics[name][MSE_TOP])[own]
            bounds = interval(values)
            line.append(
                f"{values.mean():+.4f}" + ("" if bounds is None else f" ({bounds[0]:+.4f} to {bounds[1]:+.4f})")
            )
        body.append(line)
    how = (
        "Squared error of the network on the 20 most changed genes less that of the guess, pair by pair: below 0 the "
        "network is better. In brackets 95 % bootstrap intervals."
    )
    return Table([MSE_TOP, *groups], body, how)


def _each(evaluation: PerturbationEvaluation) -> Table:
    names = [NETWORK[OURS], NO_CHANGE, MEAN, ADDITIVE_MEAN, REPLICATE]
    body = [
        [name, evaluation.kinds[number], *(f"{evaluation.metrics[each][MSE_TOP][number]:.4f}" for each in names),
         report.shown(float(evaluation.metrics[NETWORK[OURS]][RANK_SCORE][number]), 2)]
        for number, name in enumerate(evaluation.perturbations)
    ]  # fmt: skip
    return Table(["perturbation", "kind", *names, RANK_SCORE], body, f"{MSE_TOP}, and the network's {RANK_SCORE}.")


def _pictures(evaluation: PerturbationEvaluation) -> Mapping[str, Callable[[Any], None]]:
    return {
        "errors": lambda figure: _draw_errors(figure, evaluation),
        "changes": lambda figure: _draw_changes(figure, evaluation),
    }


def _draw_errors(figure: Any, evaluation: PerturbationEvaluation) -> None:
    groups = evaluation.groups()
    names: Sequence[str] = [*_names(evaluation), REPLICATE]
    figure.set_size_inches(3.2 + 2.4 * len(groups), 0.6 + 0.32 * len(names))
    for axes, (group, own) in zip(
        figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups.items(), strict=True
    ):
        for row, name in enumerate(names):
            values = evaluation.metrics[name][MSE_TOP][own]
            color = "C1" if name in NETWORK.values() else "0.6" if name == REPLICATE else "C0"
            bounds = interval(values)
            if bounds is not None:
                axes.plot(bounds, [row, row], color=color, lw=2, alpha=0.4)
            axes.plot(values.mean(), row, "o", color=color)
        axes.set(title=f"{group} ({int(own.sum())})", xlabel=MSE_TOP)
        axes.set_xlim(left=0)
        axes.grid(axis="x", color="0.9")
        axes.set_yticks(range(len(names)), names)
    figure.axes[0].invert_yaxis()


def _draw_changes(figure: Any, evaluation: PerturbationEvaluation) -> None:
    figure.set_size_inches(5, 4.6)
    axes = figure.subplots()
    truth, predicted = evaluation.changes
    kinds = np.array(evaluation.kinds)
    for kind in sorted(set(evaluation.kinds), reverse=True):
        rows = np.flatnonzero(kinds == kind)[:, None]
        top = np.argsort(-np.abs(truth[rows[:, 0]]), axis=1, kind="stable")[:, :TOP_GENES]
        axes.plot(truth[rows, top].ravel(), predicted[rows, top].ravel(), ".", ms=4, alpha=0.6, label=kind)
    limits = float(np.abs(truth).max()) * 1.05
    axes.plot([-limits, limits], [-limits, limits], color="0.7", lw=1, zorder=0)
    axes.set(xlabel="measured change", ylabel="predicted change", title=f"{TOP_GENES} most changed genes of each")
    axes.legend(fontsize=8)
