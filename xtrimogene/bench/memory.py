"""Peak memory of `xtrimogene bench`: of a process of its own, above its weights and input.

python -m xtrimogene.bench.memory JSON is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from xtrimogene.bench.baselines import FULL_LENGTH
from xtrimogene.bench.cases import encoder_task, full_length_task
from xtrimogene.bench.cells import Cells
from xtrimogene.bench.measured import digits, status_mib
from xtrimogene.bench.rows import Row
from xtrimogene.bench.sizes import Size, measured_lengths
from xtrimogene.bench.tasks import BOTH, FORWARD, Lengths


def memory(
    presets: Sequence[str],
    cells: Cells,
    size: Size,
    device: str,
    full_length: Mapping[tuple[str, str], float],
    wrong: Collection[tuple[str, str]],
) -> Iterator[Row]:
    """Peak memory of forward and of forward and backward in float32, above weights and input.

    full_length has for each right full-length model, (preset, model), the seconds of a forward and backward over all
    genes. Where these are few it is run, which here takes one run and no check; otherwise a line through an eighth and
    a quarter of the genes says what all take, since fused attention stores no scores. Nothing is said of what is in
    wrong: (preset, provider) whose numbers were not right.
    """
    genes = max(1, cells.num_genes // size.shorter)
    for preset in presets:
        lengths = measured_lengths(cells, preset, size)
        # One cell has no padding, and encoder_task pads no 100m.
        forms = ["xtg"] if len(lengths) == 1 or preset == "100m" else ["xtg", "padded"]
        for form in forms:
            if (preset, form) not in wrong:
                for direction, peak in _memory_of(preset, lengths, form, device).items():
                    yield _memory_row(preset, lengths, form, direction, peak)
        for model in FULL_LENGTH:
            if (preset, model) not in full_length:
                continue
            if full_length[preset, model] <= 4 * size.full_seconds:
                for direction, peak in _memory_of(preset, (genes,), model, device).items():
                    yield _memory_row(preset, (genes,), model, direction, peak)
                continue
            few, many = genes // 8, genes // 4
            below, above = (_memory_of(preset, (n,), model, device) for n in (few, many))
            for direction, peak in above.items():
                slope = (peak - below[direction]) / (many - few)
                row = _memory_row(preset, (genes,), model, direction, peak + slope * (genes - many))
                yield row | {"extrapolated": True, "fit_up_to": many}


def _memory_row(preset: str, lengths: Lengths, provider: str, direction: str, peak: float) -> Row:
    return {
        "benchmark": "peak", "case": f"{preset}, {len(lengths)} cell{'s' * (len(lengths) > 1)}", "cells": len(lengths),
        "tokens": sum(lengths), "dtype": "float32", "direction": direction, "provider": provider, "correct": True,
        "preset": preset, "peak_mib": digits(peak),
    }  # fmt: skip


def _memory_of(preset: str, lengths: Lengths, provider: str, device: str) -> dict[str, float]:
    """Direction -> MiB; nothing where the system does not tell."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return {}
    case = json.dumps([preset, lengths, provider, device])
    # What is freed goes back to the system at once: glibc would keep some of it, and the peak would tell less than
    # what is in use where a run finds such memory, and more where it leaves some.
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "MALLOC_MMAP_THRESHOLD_": str(1 << 16)
    }  # fmt: skip
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "xtrimogene.bench.memory", case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _run_and_tell_memory(preset: str, lengths: list[int], provider: str, device: str) -> None:
    """In a process of its own: one forward, then one forward and backward, and the memory of each at its peak."""
    task = (
        full_length_task(provider, preset, lengths[0], "float32", device=device)
        if provider in FULL_LENGTH
        else encoder_task(preset, tuple(lengths), "float32", orders=(), device=device)
    )
    way = task.providers[provider]
    before = status_mib("VmRSS") if device == "cpu" else torch.cuda.memory_allocated() / 2**20
    peaks = {}
    for direction in (FORWARD, BOTH):
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats()
        if direction == FORWARD:
            with torch.no_grad():
                way.run()
        else:
            torch.autograd.grad(way.run(), way.inputs, task.grad_out)
        peak = status_mib("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
        peaks[direction] = peak - before
    print(json.dumps(peaks))


if __name__ == "__main__":
    _run_and_tell_memory(*json.loads(sys.argv[1]))
