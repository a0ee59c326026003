"""The table and the picture of what benchmarks.gpu measured, from its CSV file alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from xtrimogene.bench.rows import Rows

COLORS = {
    "plain": "0.6", "xtg": "tab:blue", "varlen": "tab:green", "padded": "tab:orange", "flex": "tab:red",
    "flash-attn": "tab:purple",
}  # fmt: skip


def markdown(rows: Rows) -> str:
    """What was right, how fast it was, and what could not be had."""
    first = rows[0]
    parts = [
        f"# {first['machine']}",
        f"torch {first['torch']}, triton {first['triton']}, commit {first['commit']}"
        + (" with changes" if first["dirty"] == "True" else "")
        + f", {first['date']}.",
        "## Errors against float64",
        _table(
            ["op", "dtype", "provider", "direction", "error", "limit", ""],
            [
                [r["op"], r["dtype"], r["provider"], r["direction"], r["error"], r["error_limit"], _verdict(r)]
                for r in rows
                if r["item"].startswith("check ") and r["direction"]
            ],
        ),
        "## Times",
        _table(
            ["op", "case", "dtype", "direction", "provider", "ms", "against plain", "TFLOP/s", "share of peak"],
            [
                [
                    *(r[name] for name in ("op", "case", "dtype", "direction", "provider")),
                    r["median_ms"] or "wrong",
                    r["speedup"],
                    r["tflops"],
                    _percent(r["share_of_peak"]),
                ]
                for r in rows
                if r["item"].startswith("time ") and r["direction"]
            ],
        ),
        "## Model",
        _table(
            ["what", "case", "dtype", "direction", "ms", "cells/s", "share of peak", "peak MiB"],
            [
                [
                    *(r[name] for name in ("op", "case", "dtype", "direction", "median_ms", "cells_per_second")),
                    _percent(r["share_of_peak"]),
                    r["peak_mib"],
                ]
                for r in rows
                if r["cells_per_second"]
            ],
        ),
        "## Chosen by tuning",
        _table(
            ["op", "kernel", "precision", "width", "config", "ms"],
            [
                [r["op"], r["kernel"], r["precision"], r["width"], r["config"], r["median_ms"]]
                for r in rows
                if r["item"].startswith("tune ") and r["note"] == "chosen"
            ],
        ),
        "## Other findings",
        "\n".join(
            dict.fromkeys(
                f"- {' '.join(filter(None, (r['item'], r['provider'])))}: {_verdict(r)}{r['note']}"
                for r in rows
                if r["note"] not in ("", "chosen")
            )
        )
        or "None.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *body))


def _verdict(row: dict[str, str]) -> str:
    return "WRONG " if row["correct"] == "False" else ""


def _percent(share: str) -> str:
    return f"{100 * float(share):.0f} %" if share else ""


def draw(rows: Rows, path: Path) -> None:
    """Times of every provider: a panel for each op and direction, a group of bars for each case."""
    from matplotlib.figure import Figure

    timed = [r for r in rows if r["item"].startswith("time ") and r["median_ms"]]
    panels = list(dict.fromkeys((r["op"], r["direction"]) for r in timed))
    columns = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(4 * columns, 7), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False).T.flat
    for axes, (op, direction) in zip(grid, panels, strict=False):
        shown = [r for r in timed if (r["op"], r["direction"]) == (op, direction)]
        cases = list(dict.fromkeys(r["case"] for r in shown))
        for number, (provider, color) in enumerate(COLORS.items()):
            bars = [(cases.index(r["case"]), float(r["median_ms"])) for r in shown if r["provider"] == provider]
            if bars:
                places, heights = zip(*bars, strict=True)
                axes.bar([p + 0.13 * number for p in places], heights, 0.13, color=color, label=provider)
        axes.set(title=f"{op}\n{direction}", ylabel="ms", yscale="log")
        axes.set_xticks([p + 0.3 for p in range(len(cases))], cases, rotation=20, ha="right")
        axes.legend(frameon=False, fontsize=7)
    first = rows[0]
    figure.suptitle(f"{first['machine']}, torch {first['torch']}, triton {first['triton']}, {first['commit']}")
    figure.savefig(path, dpi=120)


def write(rows: Rows, folder: Path) -> None:
    """FOLDER/gpu.md and FOLDER/gpu.png."""
    rows = [defaultdict(str, row) for row in rows]
    (folder / "gpu.md").write_text(markdown(rows), encoding="utf-8")
    draw(rows, folder / "gpu.png")
