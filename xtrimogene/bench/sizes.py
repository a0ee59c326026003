"""How large the work is that `xtrimogene bench` measures, and rates of what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xtrimogene.bench.cells import Cells
from xtrimogene.bench.measured import digits
from xtrimogene.bench.rows import Row
from xtrimogene.bench.tasks import Lengths
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.flops import encoder_flops


@dataclass(frozen=True)
class Size:
    """How large the measured work is.

    cells           most cells of a batch
    shorter         every measured cell has this many times fewer genes than the real one
    task_gflop      most forward GFLOP of a batch, unless one cell has more
    full_seconds    longest run of a full-length model (forward and backward); beyond, one of its layers is run
    expressed       expressed genes of the scaling series
    rounds          runs of each that count, at least
    step_gflop      most GFLOP of a pre-training step
    exact_gflop     most GFLOP of a check of long cells against float64, see timings.check_layers
    """

    cells: int
    shorter: int
    task_gflop: float
    full_seconds: float
    expressed: tuple[int, ...]
    rounds: int
    step_gflop: float
    exact_gflop: float


FULL = Size(4, 1, 100.0, 30.0, (200, 500, 1000, 2000, 4000, 8000, 15000), 3, 4e3, 400.0)
QUICK = Size(4, 8, 20.0, 1.0, (100, 250, 500, 1000), 2, 300.0, 20.0)


def measured_lengths(cells: Cells, preset: str, size: Size) -> Lengths:
    """Lengths of the cells that are measured with a preset: as many of the shuffled ones as the size allows."""
    config = XTrimoGeneConfig.preset(preset, num_genes=cells.num_genes)
    lengths = [max(1, int(cells.lengths[i]) // size.shorter) for i in cells.shuffled()[: size.cells]]
    return tuple(within(lengths, lambda n: encoder_flops(config, [n]).total, size.task_gflop))


def within(lengths: Sequence[int], flops: Callable[[int], int], gflop: float) -> list[int]:
    """The first lengths, as many as the GFLOP allow, one at least."""
    sums = itertools.accumulate(flops(length) for length in lengths)
    return [n for i, (n, total) in enumerate(zip(lengths, sums, strict=True)) if i == 0 or total <= 1e9 * gflop]


def shorter(size: Size) -> str:
    """What the name of a case says of cells that were made shorter."""
    return f" / {size.shorter}" if size.shorter > 1 else ""


def with_rates(row: Row) -> Row:
    """The row with cells and tokens per second, where it has a time."""
    if "median_ms" in row:
        seconds = row["median_ms"] / 1e3
        row |= {
            "cells_per_second": digits(row["cells"] / seconds),
            "tokens_per_second": digits(row["tokens"] / seconds),
        }
    return row
