"""How long `xtrimogene bench` is expected to take: what a recorded run took, by the rates of matrix products."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from xtrimogene.bench import runner
from xtrimogene.bench.costs import SIZES
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.flops import encoder_flops

# Seconds of the recorded run of all sizes (benchmarks/results/report), by what they went to, checks included: the size
# itself; the series over lengths, unevenness and threads, which take the first size alone, there 3m; the drop-in.
RECORDED = {"3m": 842, "10m": 735, "100m": 1524, "series": 389, "drop-in": 342}
# Of a quick run of 3m, brought to the same rate; most of it is counting, which is not scaled by the size.
QUICK = 81
# float32 GFLOP/s of torch.mm in that run, the median.
RECORDED_RATE = 178.7


def expected_seconds(presets: Sequence[str], *, quick: bool, rate: float) -> float:
    """Seconds that a run on a CPU is expected to take, where torch.mm does ``rate`` float32 GFLOP/s.

    Cells hardly matter: measured batches are cut to a number of FLOPs.
    """
    if quick:
        return QUICK * RECORDED_RATE / rate
    first, smallest = (_layer_flops(preset) for preset in (presets[0], SIZES[0]))
    series = RECORDED["series"] * first / smallest
    return (sum(RECORDED[preset] for preset in presets) + series + RECORDED["drop-in"]) * RECORDED_RATE / rate


def _layer_flops(preset: str) -> int:
    return encoder_flops(XTrimoGeneConfig.preset(preset, num_genes=1), [2000]).total


def product_rate() -> float:
    """float32 GFLOP/s of torch.mm on the CPU now, the best of three."""
    square = torch.randn(runner.GEMM_SIZE, runner.GEMM_SIZE)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(square, square)
        times.append(time.perf_counter() - started)
    return 2 * runner.GEMM_SIZE**3 / 1e9 / min(times)


def in_words(seconds: float) -> str:
    """A duration as one would say it: to ten seconds, to a minute, or to a tenth of an hour."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
