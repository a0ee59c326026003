"""Bar charts of committed results: python -m benchmarks.ops.plot [--out FOLDER] [CSV ...]

One picture for each benchmark of ops: the ratio of every provider to plain PyTorch, by case, dtype and direction.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.ops.cases import TASKS
from xtrimogene.bench.rows import Rows, read_rows
from xtrimogene.bench.tasks import BACKWARD, FORWARD

COLORS = {"plain": "0.6", "xtg": "tab:blue", "padded": "tab:orange", "dense": "tab:red"}


def draw(rows: Rows, path: Path) -> None:
    """Write one picture: a panel for each dtype and direction, a group of bars for each case."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["correct"] == "True" and row["direction"] in (FORWARD, BACKWARD)]
    panels = list(dict.fromkeys((row["dtype"], row["direction"]) for row in rows))
    figure = Figure(figsize=(4.2 * len(panels), 4), layout="constrained")
    for axes, (dtype, direction) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        shown = [row for row in rows if (row["dtype"], row["direction"]) == (dtype, direction)]
        cases = list(dict.fromkeys(row["case"] for row in shown))
        for index, provider in enumerate(COLORS):
            bars = [(cases.index(row["case"]), float(row["speedup"])) for row in shown if row["provider"] == provider]
            if bars:
                places, heights = zip(*bars, strict=True)
                axes.bar([p + 0.2 * index for p in places], heights, 0.2, color=COLORS[provider], label=provider)
        axes.set(title=f"{dtype}, {direction}", ylabel="speed against plain PyTorch")
        axes.set_xticks([p + 0.3 for p in range(len(cases))], cases, rotation=30, ha="right")
        axes.axhline(1, color="0.6", linewidth=0.8)
    axes.legend(frameon=False)
    figure.suptitle(f"{rows[0]['machine']}, {rows[0]['isa']}, {rows[0]['threads']} threads, {rows[0]['commit']}")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the CSV files given, or all of benchmarks/results/ that have ratios."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops.plot", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("csv", type=Path, nargs="*", help="default: those of benchmarks/results/")
    parser.add_argument("--out", type=Path, default=Path("build/plots"), metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.csv or [RESULTS / f"{name}.csv" for name in TASKS if (RESULTS / f"{name}.csv").is_file()]:
        target = options.out / f"{path.stem}.png"
        draw(read_rows(path), target)
        print(target)


if __name__ == "__main__":
    main()
