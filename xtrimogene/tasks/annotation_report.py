"""What is told of an annotation: the card of a model, and the report of its evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xtrimogene.document import Picture, Section, Table, markdown_table
from xtrimogene.tasks import baselines
from xtrimogene.tasks.report import shown
from xtrimogene.tasks.report import write as write_report

TITLE = "Cell types"
OURS = "this model"
UNTRAINED = "untrained network, same tuning"


@dataclass(frozen=True)
class Evaluation:
    """How well types were named.

    types              names, in the order of the figures
    cells              cells that were judged
    methods            way -> accuracy and macro_f1 (over the types that the judged cells have)
    per_type           type -> cells, precision, recall, f1 of this model
    confusion          (types, types) cells by true and by predicted type
    reliability        bins of cells by confidence, see baselines.reliability
    calibration_error  expected calibration error
    loss               mean negative log-likelihood of the true types
    fitted             of the model's fit: what it tuned, types, epochs, its validation figures
    compared           cells and genes that the other ways were fitted to; None where there are none
    """

    types: list[str]
    cells: int
    methods: dict[str, dict[str, float]]
    per_type: dict[str, dict[str, float]]
    confusion: list[list[int]]
    reliability: list[dict[str, float]]
    calibration_error: float
    loss: float
    fitted: dict[str, Any]
    compared: dict[str, int] | None

    @classmethod
    def of(
        cls,
        types: list[str],
        truth: npt.NDArray[np.int64],
        probabilities: npt.NDArray[np.float32],
        guesses: Mapping[str, npt.NDArray[np.int64]],
        settings: Mapping[str, Any],
        compared: dict[str, int] | None,
    ) -> Evaluation:
        """From the true types (n,) by number, the model's probabilities (n, types) and each way's types (n,)."""
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        present = np.unique(truth).tolist()
        ours = guesses[OURS]
        numbers = precision_recall_fscore_support(truth, ours, labels=present, zero_division=0)
        names = ("precision", "recall", "f1", "cells")
        of_truth = probabilities[np.arange(len(truth)), truth].astype(np.float64)
        return cls(
            types=types,
            cells=len(truth),
            methods={name: baselines.figures(truth, guess, present) for name, guess in guesses.items()},
            per_type={
                types[code]: {name: float(column[row]) for name, column in zip(names, numbers, strict=True)}
                for row, code in enumerate(present)
            },
            confusion=confusion_matrix(truth, ours, labels=range(len(types))).tolist(),
            reliability=baselines.reliability(probabilities, truth),
            calibration_error=baselines.calibration_error(probabilities, truth),
            loss=-float(np.log(np.maximum(of_truth, 1e-12)).mean()),
            fitted={
                "tune": settings["fit"]["tune"],
                "seed": settings["fit"]["seed"],
                "label": settings["fit"]["label"],
                "group": settings["fit"]["group"],
                "training": settings["training"],
                "epochs": len(settings["history"]),
                "best_epoch": settings["best_epoch"],
                "validation": settings["validation"],
            },
            compared=compared,
        )


def verdict(evaluation: Evaluation) -> str:
    """How this model stands beside the others, in words."""
    ours = evaluation.methods[OURS]
    others = {name: each for name, each in evaluation.methods.items() if not name.startswith(OURS)}
    told = f"macro-F1 {ours['macro_f1']:.3f}, accuracy {ours['accuracy']:.3f}, on {evaluation.cells:,} cells"
    if not others:
        return f"This model: {told}. It stands alone here: the cells that it was fitted to were not at hand."
    best = max(others, key=lambda name: others[name]["macro_f1"])
    figure = others[best]["macro_f1"]
    if figure > ours["macro_f1"]:
        return f"This model is behind: {best} has macro-F1 {figure:.3f}. This model: {told}."
    return f"This model names types as well as all others or better: {told}; next is {best} with macro-F1 {figure:.3f}."


def methods_table(evaluation: Evaluation) -> Table:
    """All ways by their macro-F1."""
    ordered = sorted(evaluation.methods.items(), key=lambda item: -item[1]["macro_f1"])
    how = "On the same held-out cells. Macro-F1 is the mean of F1 over the types that these cells have."
    if evaluation.compared is not None:
        how += (
            f" What needs fitting was fitted to the {evaluation.compared['cells']:,} cells that this model was fitted "
            f"to (its validation part too), on log1p CP10k of {evaluation.compared['genes']:,} genes, the L1 "
            f"regression on the {baselines.L1_GENES:,} that vary most; the genes that this model reads may be fewer. "
            "Majority votes are taken in small clusters of like cells, as CellTypist does."
        )
    if UNTRAINED in evaluation.methods:
        how += " The untrained network, fitted in the same way, tells what the pre-training is worth."
    columns: dict[str, Callable[[Any], str]] = {
        "way": lambda row: row[0],
        "macro-F1": lambda row: shown(row[1]["macro_f1"]),
        "accuracy": lambda row: shown(row[1]["accuracy"]),
    }
    return Table.of(ordered, columns, how)


def types_table(evaluation: Evaluation) -> Table:
    """The figures of each type, the worst first."""
    ordered = sorted(evaluation.per_type.items(), key=lambda item: item[1]["f1"])
    columns: dict[str, Callable[[Any], str]] = {
        "type": lambda row: row[0],
        "cells": lambda row: f"{row[1]['cells']:,.0f}",
        **{name: lambda row, name=name: shown(row[1][name]) for name in ("precision", "recall", "f1")},  # type: ignore[misc]
    }
    return Table.of(ordered, columns, "This model, the worst type first.")


def sections(evaluation: Evaluation) -> list[Section]:
    """The document."""
    fitted = evaluation.fitted
    validation = fitted["validation"]
    apart = (
        "It is not known whether cells of this report had a part in it: those that it was fitted to were not at hand."
        if evaluation.compared is None
        else "The cells of this report had no part in it."
    )
    group = f"by whole groups of {fitted['group']}" if fitted["group"] else "each type as often as among all"
    return [
        Section("In short", [verdict(evaluation), methods_table(evaluation), Picture("methods", "Macro-F1 by way.")]),
        Section(
            "Types",
            [
                types_table(evaluation),
                Picture("confusion", "Share of the cells of each true type (rows) that got each type (columns)."),
            ],
        ),
        Section(
            "Confidence",
            [
                f"Expected calibration error {evaluation.calibration_error:.3f} on these cells (mean distance of "
                f"confidence and share of right types, by {baselines.BINS} bins of confidence), loss "
                f"{evaluation.loss:.3f}. On the validation cells it was {validation['calibration_error_before']:.3f} "
                f"before scores were divided by the temperature {validation['temperature']:.2f}, fitted to them, and "
                f"{validation['calibration_error']:.3f} after.",
                Picture("reliability", "Right types by confidence; on the line, confidence is what it says."),
            ],
        ),
        Section(
            "The fit",
            [
                f"Tuned: {fitted['tune']}; {len(evaluation.types):,} types of obs[{fitted['label']!r}], "
                f"{fitted['training']:,} training cells, a validation part drawn {group}; the weights of epoch "
                f"{fitted['best_epoch']} of {fitted['epochs']}, seed {fitted['seed']}. Validation accuracy "
                f"{validation['accuracy']:.3f}, macro-F1 {validation['macro_f1']:.3f}. {apart}",
            ],
        ),
    ]


def write(evaluation: Evaluation, folder: Path) -> None:
    """Write report.html, report.md, report.json and pictures into a folder."""
    pictures: dict[str, Callable[[Any], None]] = {
        "methods": lambda figure: _draw_methods(figure, evaluation),
        "confusion": lambda figure: _draw_confusion(figure, evaluation),
        "reliability": lambda figure: _draw_reliability(figure, evaluation),
    }
    write_report(folder, TITLE, sections(evaluation), dataclasses.asdict(evaluation), pictures)


def _draw_methods(figure: Any, evaluation: Evaluation) -> None:
    ordered = sorted(evaluation.methods.items(), key=lambda item: item[1]["macro_f1"])
    figure.set_size_inches(7, 0.8 + 0.32 * len(ordered))
    axes = figure.subplots()
    colors = ["#0072b2" if name.startswith(OURS) else "#b3b3b3" for name, _ in ordered]
    bars = axes.barh([name for name, _ in ordered], [each["macro_f1"] for _, each in ordered], color=colors)
    axes.bar_label(bars, [f"{each['macro_f1']:.3f}" for _, each in ordered], padding=3)
    axes.set(xlabel="macro-F1", xlim=(0, 1.1))


def _draw_confusion(figure: Any, evaluation: Evaluation) -> None:
    counts = np.array(evaluation.confusion, float)
    own = np.flatnonzero(counts.sum(axis=1) + counts.sum(axis=0))
    counts = counts[np.ix_(own, own)]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [evaluation.types[code] for code in own]
    size = 2.8 + min(0.32, 9 / max(1, len(own))) * len(own)
    figure.set_size_inches(size + 0.6, size)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    font = 9 if len(own) <= 25 else 5
    axes.set_xticks(range(len(own)), names, rotation=90, fontsize=font)
    axes.set_yticks(range(len(own)), names, fontsize=font)
    axes.set(xlabel="predicted", ylabel="true")
    if len(own) <= 15:
        for row, column in np.argwhere(shares >= 0.01):
            value = shares[row, column]
            shade = "white" if value > 0.5 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=shade)
    figure.colorbar(image, ax=axes, shrink=0.7)


def _draw_reliability(figure: Any, evaluation: Evaluation) -> None:
    figure.set_size_inches(4.6, 4.4)
    axes = figure.subplots()
    bins = evaluation.reliability
    axes.plot([0, 1], [0, 1], color="#7f8790", lw=1)
    sizes = [12 + 300 * each["cells"] / evaluation.cells for each in bins]
    axes.scatter([b["confidence"] for b in bins], [b["accuracy"] for b in bins], s=sizes, color="#0072b2", alpha=0.8)
    axes.set(xlabel="confidence", ylabel="share of right types", xlim=(0, 1.03), ylim=(-0.03, 1.03))


def card(name: str, settings: Mapping[str, Any]) -> str:
    """The model card, Markdown."""
    fit, validation = settings["fit"], settings["validation"]
    lines = [
        "---",
        "library_name: xtrimogene",
        "tags: [biology, single-cell, cell-type-annotation]",
        "---",
        "",
        f"# {name}",
        "",
        f"Names {len(settings['types'])} cell types (of `{fit['label']}`), by an xTrimoGene encoder and two linear",
        "layers. `task.json` holds the names and how they were fitted, `network/` the encoder, which",
        "`xtrimogene embed` takes too.",
        "",
        "```python",
        "from xtrimogene.tasks import annotation",
        "",
        f'annotation.predict("{name}", "cells.h5ad", output="annotated.h5ad")',
        "```",
        "",
        f"Tuned `{fit['tune']}`, seed {fit['seed']}, on {settings['training']:,} cells, in which",
        f"{settings['genes_found']:,} genes of its vocabulary were measured. On the cells kept for validation, by",
        f"which epoch and temperature were chosen: accuracy {shown(validation['accuracy'])}, macro-F1",
        f"{shown(validation['macro_f1'])}, expected calibration error {shown(validation['calibration_error'])}.",
        "",
        "It names the types that it was fitted to, and no others: cells of another kind get the likeliest of these,",
        "unless their confidence is below what `unknown_below` asks for.",
        "",
        markdown_table(
            ["type", "cells"], [[type_, f"{count:,}"] for type_, count in sorted(settings["counts"].items())]
        ),
    ]
    return "\n".join(lines) + "\n"
