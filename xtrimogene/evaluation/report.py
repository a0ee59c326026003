"""The report of an evaluation: report.json, report.md and two pictures in a folder, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtrimogene.evaluation.bars import BARS, RIDGE
from xtrimogene.evaluation.evaluate import MODEL, Evaluation
from xtrimogene.evaluation.scib import SCIB

REPORT_FILE, TEXT_FILE = "report.json", "report.md"
MASKED_PICTURE, SPACES_PICTURE = "masked.png", "spaces.png"
_FILES = {REPORT_FILE, TEXT_FILE, MASKED_PICTURE, SPACES_PICTURE}
_MASKED_FIGURES = ("mean squared error", "correlation", "beyond the mean", "within genes")
_SPACE_FIGURES = ("neighbours", "probe", "silhouette")


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuses, before any work, a folder that could not be written at the end."""
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"output {folder}: expected an existing folder to make it in, got {folder.parent}")
    if not os.access(folder.absolute().parent, os.W_OK | os.X_OK):
        raise PermissionError(f"output {folder}: the folder {folder.parent} cannot be written to; choose another one")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"output {folder}: expected the name of a folder, got a file")
    present = {entry.name for entry in folder.iterdir()}
    if present - _FILES:
        raise FileExistsError(
            f"output {folder}: {', '.join(sorted(present - _FILES)[:3])} in it is of no evaluation; name another folder"
        )
    if present and not overwrite:
        raise FileExistsError(f"output {folder}: exists; name another folder, or pass --overwrite")


def write(evaluation: Evaluation, folder: Path, *, pictures: bool = True) -> None:
    """Write the report's files; pictures need matplotlib, and without it there are none."""
    written = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    written.mkdir()
    try:
        (written / REPORT_FILE).write_text(
            json.dumps(dataclasses.asdict(evaluation), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        drawn = pictures and _draw(evaluation, written)
        (written / TEXT_FILE).write_text(text(evaluation, pictures=drawn), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        written.rename(folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def text(evaluation: Evaluation, *, pictures: bool = False) -> str:
    """The report as Markdown."""
    cells, genes = evaluation.cells, evaluation.genes
    known = "other cells of the same data" if evaluation.known == "data" else "training cells"
    lines = [
        f"{cells['judged']:,} held-out cells are judged; the data have {genes['found']:,} of the model's "
        f"{genes['vocabulary']:,} genes. What needs fitting is fitted to {cells['known']:,} {known}.",
        "",
        "## Masked prediction",
        "",
        masked_table(evaluation),
        "",
        verdict(evaluation),
        "",
    ]
    if pictures:
        lines += [f"![Error and correlation by prediction]({MASKED_PICTURE})", ""]
    lines += [
        "Hidden genes of the held-out cells, all of them and those that are not zero. `beyond the mean`: correlation",
        "of prediction and truth after each gene's mean where it is chosen (over the known cells) is taken off both;",
        "`within genes`: after both are centred within each gene over the very positions that count. `gene mean` is",
        "that mean; `depth` adds a ridge on three numbers of a cell's depth, `PCA` the gene rebuilt of 20 components",
        "of what is seen, `kNN` its mean over the 100 nearest known cells, `depth + PCA` a ridge on both, the one to",
        "pass.",
    ]
    if evaluation.spaces is not None:
        lines += ["", f"## Labels: {evaluation.label}", "", spaces_table(evaluation), ""]
        if pictures:
            lines += [f"![Labels by space]({SPACES_PICTURE})", ""]
        lines += [
            "Share of the held-out cells whose label is read off their place by the 15 nearest known cells",
            "(`neighbours`) and by a logistic regression (`probe`); `silhouette` is the mean width by label. PCA was",
            "fitted to the known cells; no space was shown a label.",
        ]
        if evaluation.batch is not None:
            lines += [
                f"`batch mixing`: how little batches (`{evaluation.batch}`) are told apart within a label, 1 where",
                "they lie alike.",
            ]
        if figures := [key for key in evaluation.spaces[MODEL] if key.startswith(SCIB)]:
            rows = [
                [key.removeprefix(SCIB), *(_shown(space[key], 3) for space in evaluation.spaces.values())]
                for key in figures
            ]
            lines += ["", "By scib-metrics, from 0 to 1, of which 1 is the best:", ""]
            lines += [table(["figure", *evaluation.spaces], rows)]
    return "\n".join(lines) + "\n"


def masked_table(evaluation: Evaluation) -> str:
    """The figures of masked prediction."""
    rows = [
        [name, part, *(_shown(figures[key], 4 if key == "mean squared error" else 3) for key in _MASKED_FIGURES)]
        for name in (MODEL, *BARS)
        for part, figures in evaluation.masked[name].items()
    ]
    return table(["prediction", "hidden genes", *_MASKED_FIGURES], rows)


def spaces_table(evaluation: Evaluation) -> str:
    """The figures of the spaces."""
    assert evaluation.spaces is not None
    keys = [*_SPACE_FIGURES, *(["batch mixing"] if evaluation.batch is not None else [])]
    rows = [[name, *(_shown(figures[key], 3) for key in keys)] for name, figures in evaluation.spaces.items()]
    guess = _shown(evaluation.largest_label, 3)
    return table(["space", *keys], [*rows, ["always the largest label", guess, guess, *[""] * (len(keys) - 2)]])


def verdict(evaluation: Evaluation) -> str:
    """Whether the model passes the bars, in words."""
    errors = {name: figures["all"]["mean squared error"] for name, figures in evaluation.masked.items()}
    ours = errors[MODEL]
    assert ours is not None
    beaten = [name for name in BARS if (other := errors[name]) is not None and ours < other]
    missed = [name for name in BARS if name not in beaten]
    if evaluation.passes_ridge and not missed:
        return "The model predicts hidden genes with less error than every guess that needs no network."
    words = [f"The model's error is above that of {', '.join(missed)}"]
    words.append(f"and below that of {', '.join(beaten)}." if beaten else "and below that of none.")
    if RIDGE in missed:
        words.append("A ridge on depth and principal components knows more of these cells.")
    return " ".join(words)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the columns padded, so that it reads well on a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _draw(evaluation: Evaluation, folder: Path) -> bool:
    """The pictures; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    names = [MODEL, *BARS]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("mean squared error", "within genes"), strict=True):
        parts = ("all",) if key == "mean squared error" else ("all", "non-zero")
        _bars(axes, names, {part: [evaluation.masked[name][part][key] for name in names] for part in parts})
        axes.set_title(f"{key}, hidden genes")
        if key == "mean squared error":
            values = [evaluation.masked[name]["all"][key] or 0.0 for name in names]
            axes.set_ylim(0.9 * min(values), 1.02 * max(values))
    figure.savefig(folder / MASKED_PICTURE, dpi=120)
    if evaluation.spaces is not None:
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        spaces = list(evaluation.spaces)
        _bars(axes, spaces, {key: [evaluation.spaces[name][key] for name in spaces] for key in ("neighbours", "probe")})
        axes.set(title=f"{evaluation.label} read off held-out cells", ylabel="share of right labels", ylim=(0, 1))
        axes.axhline(evaluation.largest_label or 0.0, color="0.5", ls=":", label="largest label")
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(folder / SPACES_PICTURE, dpi=120)
    return True


def _bars(axes: Any, names: Sequence[str], series: dict[str, list[float | None]]) -> None:
    """Grouped bars; what there is no figure of stays empty."""
    width = 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, [math.nan if value is None else value for value in values], width, label=label)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
