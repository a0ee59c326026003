"""The benchmark of favor_attention's memory: the peak above its inputs and results, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.cases import POSITIONS, favor_task
from xtrimogene.bench.measured import digits, status_mib
from xtrimogene.bench.tasks import BOTH, DTYPES, FORWARD, Provider


def favor_memory(quick: bool) -> Iterator[dict[str, Any]]:
    """MiB at the peak of favor_attention over all genes of one cell, and of the same by einsum.

    results_mib: output and gradients, which both have to make; share_of_plain: what comes on top by that of einsum.
    """
    length = POSITIONS // 16 if quick else POSITIONS
    for dtype in DTYPES:
        for direction in (FORWARD, BOTH):
            peaks = {provider: _peak(length, dtype, direction, provider) for provider in ("plain", "xtg")}
            on_top = {provider: peak - results for provider, (peak, results) in peaks.items()}
            for provider, (peak, results) in peaks.items():
                yield {
                    "benchmark": "favor_memory", "case": f"1 cell of {length:,} positions", "cells": 1,
                    "tokens": length, "dtype": dtype, "direction": direction, "provider": provider, "correct": True,
                    "runs": 1, "peak_mib": digits(peak), "results_mib": digits(results),
                    "share_of_plain": digits(on_top[provider] / on_top["plain"]),
                }  # fmt: skip


def _peak(length: int, dtype: str, direction: str, provider: str) -> tuple[float, float]:
    case = json.dumps([length, dtype, direction, provider])
    command = [sys.executable, "-m", "benchmarks.ops.favor_memory", case]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    peak, results = done.stdout.split()[-2:]
    return float(peak), float(results)


def _tell_peak(length: int, dtype: str, direction: str, provider: str) -> None:
    # Threads, code and the buffers of oneDNN are there before anything is counted.
    small, task = (favor_task("", (n,), (n,), dtype) for n in (64, length))
    _results(small.providers[provider], small.grad_out, direction)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    results = _results(task.providers[provider], task.grad_out, direction)
    print(status_mib("VmHWM") - before, sum(x.nbytes for x in results) / 2**20)


def _results(provider: Provider, grad_out: Tensor, direction: str) -> tuple[Tensor, ...]:
    with torch.set_grad_enabled(direction == BOTH):
        out = provider.run()
        return (out, *torch.autograd.grad(out, provider.inputs, grad_out)) if direction == BOTH else (out,)


if __name__ == "__main__":
    _tell_peak(*json.loads(sys.argv[1]))
