"""The benchmark of favor_attention's memory: the peak above its inputs, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import BOTH, DTYPES, FORWARD, POSITIONS, favor_task
from benchmarks.end_to_end import _digits, _status


def favor_memory(quick: bool) -> Iterator[dict[str, Any]]:
    """MiB at the peak of favor_attention over all genes of one cell, output included, and of the same by einsum."""
    length = POSITIONS // 16 if quick else POSITIONS
    for dtype in DTYPES:
        for direction in (FORWARD, BOTH):
            peaks = {provider: _peak(length, dtype, direction, provider) for provider in ("plain", "xtg")}
            for provider, peak in peaks.items():
                yield {
                    "benchmark": "favor_memory", "case": f"1 cell of {length:,} positions", "cells": 1,
                    "tokens": length, "dtype": dtype, "direction": direction, "provider": provider, "correct": True,
                    "runs": 1, "peak_mib": _digits(peak), "share_of_plain": _digits(peak / peaks["plain"]),
                }  # fmt: skip


def _peak(length: int, dtype: str, direction: str, provider: str) -> float:
    case = json.dumps([length, dtype, direction, provider])
    command = [sys.executable, "-m", "benchmarks.favor_memory", case]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _tell_peak(length: int, dtype: str, direction: str, provider: str) -> None:
    # Threads, code and the buffers of oneDNN are there before anything is counted.
    _run(64, dtype, direction, provider)
    task = favor_task("", (length,), (length,), dtype)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    with torch.set_grad_enabled(direction == BOTH):
        out = task.providers[provider].run()
        if direction == BOTH:
            torch.autograd.grad(out, task.providers[provider].inputs, task.grad_out)
    print(_status("VmHWM") - before)


def _run(length: int, dtype: str, direction: str, provider: str) -> None:
    task = favor_task("", (length,), (length,), dtype)
    out = task.providers[provider].run()
    if direction == BOTH:
        torch.autograd.grad(out, task.providers[provider].inputs, task.grad_out)


if __name__ == "__main__":
    _tell_peak(*json.loads(sys.argv[1]))
