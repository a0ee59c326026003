"""The pictures of `xtrimogene bench`, each as PNG and SVG, drawn from the rows of a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xtrimogene.bench import costs
from xtrimogene.bench.cells import Cells
from xtrimogene.bench.report import DIRECTION_NAMES, MODEL_NAMES, PART_NAMES, Report, exponent, full_seconds, per_cell
from xtrimogene.bench.tasks import BOTH, FORWARD
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.flops import dense_flops, encoder_flops

COLORS = {"xtg": "#0072b2", "plain": "#7f8790", "padded": "#e69f00", "dense": "#c1440e"}
NAMES = {"xtg": "ours", "plain": "packed plain PyTorch", "padded": "padded", "dense": "dense"}
MODEL_COLORS = {
    "dense auto-encoder": "#8c2d04", "dense": "#c1440e", "performer": "#b07aa1", "padded": "#e69f00",
    "auto-encoder, plain": "#56b4e9", "auto-encoder": "#0072b2", "encoder": "#003f66",
}  # fmt: skip
PART_COLORS = ("#b3b3b3", "#0072b2", "#56b4e9", "#003f66", "#f0e442", "#e69f00", "#d55e00", "#333333")
DASHES = {"float32": "-", "bfloat16": "--"}


def check_matplotlib() -> None:
    """Raises ImportError, saying what to install, without matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("the pictures need matplotlib: pip install 'xtrimogene[bench]'") from error


def draw(report: Report, cells: Cells, folder: Path) -> dict[str, str]:
    """Writes NAME.png and NAME.svg of every picture that the rows give; returns name -> caption."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    captions = {}
    style: Any = {
        "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5,
        "legend.frameon": False, "svg.hashsalt": "xtrimogene", "axes.axisbelow": True,
    }  # fmt: skip
    with mpl.rc_context(style):
        for name, way in PICTURES.items():
            figure = Figure(layout="constrained")
            caption = way(report, cells, figure)
            if caption is None:
                continue
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            captions[name] = caption
    return captions


def _flops(report: Report, cells: Cells, figure: Any) -> str | None:
    presets = report.values("flops", "case")
    figure.set_size_inches(3.1 * len(presets) + 2.2, 3.2)
    for i, axes in enumerate(np.atleast_1d(figure.subplots(1, len(presets), sharey=True))):
        rows = [report.one("flops", case=presets[i], provider=model) for model in reversed(costs.MODELS)]
        values = [row["gflop_per_cell"] for row in rows if row is not None]
        colors = [MODEL_COLORS[model] for model in reversed(costs.MODELS)]
        bars = axes.barh([MODEL_NAMES[model] for model in reversed(costs.MODELS)], values, color=colors)
        axes.bar_label(bars, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values], padding=3)
        axes.set(xscale="log", title=presets[i], xlabel="GFLOP per cell, forward")
        _plain_numbers(axes.xaxis)
        axes.set_xlim(min(values) / 3, max(values) * 12)
    return "Forward GFLOP per cell of every model, mean over the cells, logarithmic."


def _parts(report: Report, cells: Cells, figure: Any) -> str | None:
    presets = report.values("flops", "case")
    models = ("auto-encoder, plain", "auto-encoder", "encoder")
    figure.set_size_inches(9, 0.42 * len(presets) * len(models) + 1.4)
    axes = figure.subplots()
    labels = [f"{preset}, {MODEL_NAMES[model]}" for preset in presets for model in models][::-1]
    rows = [report.one("flops", case=preset, provider=model) for preset in presets for model in models][::-1]
    left = np.zeros(len(rows))
    for part, color in zip(costs.PARTS, PART_COLORS, strict=True):
        shares = np.asarray([100 * row[f"gflop_{part}"] / row["gflop_per_cell"] if row else 0.0 for row in rows])
        axes.barh(labels, shares, left=left, color=color, label=PART_NAMES.get(part, part))
        left += shares
    axes.set(xlabel="% of the model's forward FLOPs", xlim=(0, 100))
    figure.legend(loc="outside upper center", ncols=4)
    most = {part: max(row[f"gflop_{part}"] / row["gflop_per_cell"] for row in rows if row) for part in costs.PARTS}
    small = [f"{PART_NAMES.get(part, part)} ({_share(share)})" for part, share in most.items() if share < _SEEN]
    unseen = f" Too small to be seen, with their largest share: {', '.join(small)}." if small else ""
    return f"Where the forward FLOPs go, in per cent of each model.{unseen}"


# Share of a bar below which a part of it is not seen.
_SEEN = 0.005


def _share(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 5e-5 else "under 0.01 %"


def _lengths(report: Report, cells: Cells, figure: Any) -> str | None:
    figure.set_size_inches(9, 3.3)
    left, right = figure.subplots(1, 2)
    left.hist(cells.lengths, bins=40, color=COLORS["xtg"])
    left.set(xlabel="expressed genes", ylabel="cells", title=f"{len(cells.lengths):,} cells")
    genes = np.unique(np.geomspace(min(100, cells.num_genes), cells.num_genes, 60).astype(int))
    for preset, color in zip(report.values("flops", "case"), ("#56b4e9", "#0072b2", "#003f66"), strict=False):
        config = XTrimoGeneConfig.preset(preset, num_genes=cells.num_genes)
        costs_of = [encoder_flops(config, [int(n)]).total / 1e9 for n in genes]
        right.plot(genes, costs_of, color=color, label=f"{preset}, ours")
        right.axhline(dense_flops(config, 1).total / 1e9, color=color, linestyle=":", label=f"{preset}, dense")
    right.set(xscale="log", yscale="log", xlabel="expressed genes", ylabel="GFLOP per cell, forward")
    _plain_numbers(right.xaxis)
    _plain_numbers(right.yaxis)
    right.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.25))
    return "Left: expressed genes of the cells. Right: closed-form cost of the encoder; dotted: dense over all genes."


def _time_by_length(report: Report, cells: Cells, figure: Any) -> str | None:
    if not report.of("length"):
        return None
    figure.set_size_inches(9, 4.4)
    for axes, direction in zip(figure.subplots(1, 2, sharey=True), (FORWARD, BOTH), strict=True):
        _curves(axes, report, "length", direction, _x_and_milliseconds)
        preset = report.of("length")[0]["preset"]
        for model in ("dense", "performer"):
            against = full_seconds(report, model, preset, "float32", direction)
            if against is not None:
                label = f"{MODEL_NAMES[model]}, float32{', extrapolated' if against[1] else ''}"
                axes.axhline(1e3 * against[0], color=MODEL_COLORS[model], linestyle=":", label=label)
        axes.set(xscale="log", yscale="log", xlabel="expressed genes", title=f"{preset}, {DIRECTION_NAMES[direction]}")
        _finish(axes)
    figure.axes[0].set_ylabel("ms per cell")
    return (
        "Measured time per cell against expressed genes, with fitted exponents; dotted: encoders that run over all "
        "genes of a cell, whatever it expresses."
    )


def _finish(axes: Any) -> None:
    """Grid, plain numbers at a logarithmic scale, and the legend below, where it hides no curve."""
    axes.grid(alpha=0.3)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    low, high = axes.get_ylim()
    # Within two decades the ticks between powers of ten need their numbers; beyond, they have no room for them.
    axes.yaxis.set_minor_formatter(lambda x, _: f"{x:,.4g}" if high < 100 * low and f"{x:.0e}"[0] in "25" else "")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _plain_numbers(axis: Any) -> None:
    """Numbers of a logarithmic axis as people write them: 10,000 in every picture, not a power of ten in some."""
    axis.set_major_formatter(lambda x, _: f"{x:,.4g}" if x < 10_000 else f"{x:,.0f}")


def _curves(
    axes: Any, report: Report, benchmark: str, direction: str, point: Callable[[dict[str, Any]], tuple[float, float]]
) -> None:
    """A line through the points of every way and dtype, with its exponent."""
    for provider in ("xtg", "plain"):
        for dtype, dash in DASHES.items():
            points = [point(row) for row in report.of(benchmark, provider=provider, dtype=dtype, direction=direction)]
            if len(points) > 1:
                label = f"{NAMES[provider]}, {dtype} (exponent {exponent(points):.2f})"
                axes.plot(
                    *zip(*points, strict=True), dash, marker="o", markersize=4, color=COLORS[provider], label=label
                )


def _x_and_milliseconds(row: dict[str, Any]) -> tuple[float, float]:
    return row["x"], row["median_ms"] / row["cells"]


def _unevenness(report: Report, cells: Cells, figure: Any) -> str | None:
    if not report.of("unevenness"):
        return None
    figure.set_size_inches(5.5, 4.2)
    axes = figure.subplots()
    for provider in ("padded", "plain", "xtg"):
        rows = report.of("unevenness", provider=provider, direction=FORWARD)
        if len(rows) > 1:
            points = [(row["x"], row["median_ms"]) for row in rows]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLORS[provider],
                      label=f"{NAMES[provider]} (exponent {exponent(points):.2f})")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="longest cell, in mean cells", ylabel="ms per batch, forward, float32")
    ticks = report.values("unevenness", "x")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.minorticks_off()
    _finish(axes)
    return (
        "Measured time of a batch of 16 cells with always the same number of genes, more and more unevenly spread over "
        "the cells, with fitted exponents."
    )


def _threads(report: Report, cells: Cells, figure: Any) -> str | None:
    numbers = report.values("threads", "x")
    if len(numbers) < 2:
        return None
    figure.set_size_inches(5.5, 4.2)
    axes = figure.subplots()
    _curves(axes, report, "threads", FORWARD, _x_and_milliseconds)
    axes.set(xscale="log", yscale="log", xlabel="threads", ylabel="ms per cell, forward")
    axes.set_xticks(numbers, map(str, numbers))
    axes.xaxis.minorticks_off()
    _finish(axes)
    return "Measured time per cell by number of threads; an exponent of -1 would be ideal."


def _sizes(report: Report, cells: Cells, figure: Any) -> str | None:
    if len(report.values("encoder", "preset")) < 2:
        return None
    figure.set_size_inches(5.5, 4.2)
    axes = figure.subplots()
    _curves(axes, report, "encoder", FORWARD, per_cell)
    for row in report.of("encoder", provider="xtg", dtype="float32", direction=FORWARD):
        axes.annotate(row["preset"], per_cell(row), textcoords="offset points", xytext=(4, 6))
    axes.set(xscale="log", yscale="log", xlabel="GFLOP per cell, forward", ylabel="ms per cell, forward")
    _finish(axes)
    return "Measured time per cell by size of the model, with fitted exponents; cells of real lengths."


def _dropin(report: Report, cells: Cells, figure: Any) -> str | None:
    rows = report.timed("drop-in", "xtg")
    if not rows:
        return None
    figure.set_size_inches(9, 0.5 * len(rows) + 1.3)
    axes = figure.subplots()
    labels, height = [], 0.38
    for i, row in enumerate(reversed(rows)):
        labels.append(f"{row['case']}\n{row['dtype']}, {DIRECTION_NAMES[row['direction']]}")
        for shift, provider in ((0.5, "padded"), (-0.5, "plain")):
            other = report.beside(row, provider)
            if other is not None:
                ratio, name = other["median_ms"] / row["median_ms"], {"plain": "one by one"}.get(provider, provider)
                bar = axes.barh(i + shift * height, ratio, height, color=COLORS[provider], label="" if i else name)
                axes.bar_label(bar, [f"{ratio:.2f}x"], padding=3, fontsize=8)
    axes.axvline(1, color=COLORS["xtg"], linewidth=1.2, label="ragged")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlabel="time, in times that of the ragged encoder with the same weights")
    axes.margins(x=0.12)
    figure.legend(loc="outside upper center", ncols=3)
    return "Encoders of other models: how many times as long their own ways take as the ragged one."


PICTURES: dict[str, Callable[[Report, Cells, Any], str | None]] = {
    "flops": _flops,
    "parts": _parts,
    "lengths": _lengths,
    "time_by_length": _time_by_length,
    "unevenness": _unevenness,
    "threads": _threads,
    "sizes": _sizes,
    "dropin": _dropin,
}
