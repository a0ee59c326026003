"""The runner: python -m benchmarks.run BENCHMARK [--quick] [--out FILE]

Each benchmark yields rows for a CSV file. A provider whose result is not right against float64 gets a row that says so
and no time, and the run ends with status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.models import accelerated, dropout, end_to_end, pretraining
from benchmarks.ops import favor_memory
from benchmarks.ops.cases import TASKS
from xtrimogene.bench import counting
from xtrimogene.bench.rows import Row, machine, write_csv
from xtrimogene.bench.runner import task_rows

# Columns in which no two rows of a table need agree, and those that a person wants to see while a run is on.
SHOWN = (
    "case", "cells", "dtype", "direction", "provider", "correct", "median_ms", "cost_percent", "speedup",
    "share_of_gemm", "share_of_copy", "cells_per_second", "encoder_share", "peak_mib",
)  # fmt: skip


def _rows(name: str, quick: bool, seconds: float, only: str) -> Iterator[Row]:
    if name in TASKS:
        for task in TASKS[name](quick):
            if only in f"{task.case}, {task.dtype}":
                yield from task_rows(task, seconds)
    else:
        yield from OTHERS[name](quick)


OTHERS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "pack": end_to_end.pack,
    "loader": end_to_end.loader,
    "embed": end_to_end.embed_share,
    "memory": end_to_end.memory,
    "favor_memory": favor_memory.favor_memory,
    "dropout": dropout.dropout,
    "step": pretraining.step,
    "ranks": pretraining.ranks,
    "accelerated": accelerated.accelerated,
    "savings": counting.savings,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark; returns 1 when a provider was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("benchmark", choices=[*TASKS, *OTHERS])
    parser.add_argument("--quick", action="store_true", help="small shapes and few runs: does it work, not how fast")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV file to write")
    parser.add_argument("--seconds", type=float, help="time for each case (default: 20, quick: 0)")
    parser.add_argument("--only", default="", metavar="TEXT", help='cases with this in "case, dtype", for ops')
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    seconds = options.seconds if options.seconds is not None else 0.0 if options.quick else 20.0
    here = machine()
    print(", ".join(f"{name} {value}" for name, value in here.items()), flush=True)
    rows = []
    for row in _rows(options.benchmark, options.quick, seconds, options.only):
        rows.append({**row, "quick": options.quick, **here})
        print("  ".join(f"{row[name]}" for name in SHOWN if name in row), flush=True)
    if options.out is not None:
        write_csv(options.out, rows)
    wrong = [row for row in rows if not row["correct"]]
    for row in wrong:
        print(f"WRONG: {row}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
