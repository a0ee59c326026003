"""Benchmarks of pre-training: a step of the masked auto-encoder on cells of 2,000 expressed genes, time and memory.

A step is forward, backward and AdamW over all positions of the vocabulary, with read-depth tokens, as scFoundation is
trained: 19,266 positions. "reference" is the same model with every op of xtg_kernels on its plain PyTorch reference.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
import torch

from xtg_kernels import use_backend
from xtrimogene import XTrimoGene
from xtrimogene.bench.measured import digits, status_mib
from xtrimogene.bench.pretraining import (
    EXPRESSED,
    Step,
    error_columns,
    exact_step,
    loss_and_gradient,
    mean_loss,
    prepared,
    step_errors,
    step_is_right,
)
from xtrimogene.bench.tasks import DTYPES, NUM_GENES, umi_counts
from xtrimogene.network.masked_batch import MaskedBatch

# Preset, cells of a step, whether the reference is timed too and float64 judges: at 100m neither fits in patience.
CASES = (("3m", 4, True), ("100m", 1, False))


def step(quick: bool) -> Iterator[dict[str, Any]]:
    """Time of a training step by backend and dtype, and its peak memory above that of weights and optimizer."""
    for preset, cells, judged in CASES[:1] if quick else CASES:
        for dtype in DTYPES:
            providers = ("reference", "xtg") if judged else ("xtg",)
            model, masked = prepared(preset, 1 if quick else cells, expressed=200 if quick else EXPRESSED)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            exact = _exact(model, masked, judged)
            errors = {}
            for name in providers:
                with use_backend(_backend(name)):
                    errors[name] = step_errors(model, masked, dtype, exact)
            steps = {name: functools.partial(_step, model, masked, optimizer, dtype, name) for name in providers}
            times = _in_turns(steps, 1 if quick else 3)
            for name in providers:
                row: dict[str, Any] = {
                    "benchmark": "step",
                    "case": f"{preset}, {masked.batch_size} cell{'s' * (masked.batch_size > 1)}",
                    "cells": masked.batch_size, "tokens": masked.batch.total_nnz, "dtype": dtype,
                    "direction": "training step", "provider": name,
                    "correct": step_is_right(errors[name], dtype), **error_columns(errors[name], dtype),
                }  # fmt: skip
                if row["correct"]:
                    low, median, high = np.quantile(times[name], [0.2, 0.5, 0.8])
                    row |= {"runs": len(times[name]), "median_ms": digits(1e3 * median), "q20_ms": digits(1e3 * low)}
                    row |= {"q80_ms": digits(1e3 * high), "cells_per_second": digits(masked.batch_size / median)}
                    if "reference" in times:
                        row["speedup"] = digits(float(np.median(times["reference"])) / median)
                    row["peak_mib"] = digits(_memory_of(preset, masked.batch_size, dtype, name, quick) / cells)
                yield row


def ranks(quick: bool) -> Iterator[dict[str, Any]]:
    """Steps of `xtrimogene pretrain` on 3m: one process of two threads, two of one thread (DDP), same batches."""
    cells, steps = 16, 2 if quick else 8
    counts, gene_ids = umi_counts((EXPRESSED,) * cells)
    matrix = sp.csr_matrix(
        (counts.astype(np.float32), gene_ids, np.arange(cells + 1) * EXPRESSED), shape=(cells, NUM_GENES)
    )
    adata = anndata.AnnData(matrix)
    adata.var_names = [f"gene{gene}" for gene in range(NUM_GENES)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adata.write_h5ad(folder / "cells.h5ad")
        logs = {
            name: _pretrained(folder, name, processes, steps)
            for name, processes in (("1 process, 2 threads", 1), ("2 processes, 1 thread", 2))
        }
    curves = {name: np.array([line["loss"] for line in log]) for name, log in logs.items()}
    first = next(iter(curves.values()))
    for name, log in logs.items():
        error = float(np.abs(curves[name] / first - 1).max())
        row: dict[str, Any] = {
            "benchmark": "ranks", "case": f"3m, 4 cells a step, {steps} steps", "cells": 4, "tokens": 4 * EXPRESSED,
            "dtype": "float32", "direction": "training step", "provider": name, "correct": error <= 1e-5,
            "error": f"{error:.2e}", "error_limit": 1e-5,
        }  # fmt: skip
        if row["correct"]:
            # The first step warms caches and oneDNN's kernels.
            times = np.diff([line["seconds"] for line in log])
            low, median, high = np.quantile(times, [0.2, 0.5, 0.8])
            row |= {"runs": len(times), "median_ms": digits(1e3 * median), "q20_ms": digits(1e3 * low)}
            row |= {"q80_ms": digits(1e3 * high), "cells_per_second": digits(4 / median)}
        yield row


def _pretrained(folder: Path, name: str, processes: int, steps: int) -> list[dict[str, Any]]:
    """The training lines of a run's log."""
    launch = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    command = [
        sys.executable, "-m", *launch, "xtrimogene", "pretrain", "--data", str(folder / "cells.h5ad"),
        "--output", str(folder / name), "--device", "cpu", "--threads", str(2 // processes), "--no-progress",
        "model.preset=3m", "model.dropout=0", "batch_cells=2", f"accumulate={2 // processes}", f"max_steps={steps}",
        "warmup_steps=0", "validation_share=0", "tensorboard=false",
    ]  # fmt: skip
    subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=True)
    lines = (folder / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "train"]


def _step(model: XTrimoGene, masked: MaskedBatch, optimizer: torch.optim.Optimizer, dtype: str, provider: str) -> None:
    with use_backend(_backend(provider)):
        mean_loss(model, masked, dtype).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _backend(provider: str) -> str:
    return "reference" if provider == "reference" else "auto"


def _exact(model: XTrimoGene, masked: MaskedBatch, judged: bool) -> Step:
    """Loss and gradient in float64; where that is too slow, the loss of the reference in float32."""
    if judged:
        return exact_step(model, masked)
    with use_backend("reference"):
        return loss_and_gradient(model, masked, "float32", XTrimoGene.loss, gradient=False)


def _in_turns(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            clock = time.perf_counter()
            way()
            # The first round warms caches, allocators and oneDNN's kernels.
            if number:
                times[name].append(time.perf_counter() - clock)
    return times


def _memory_of(preset: str, cells: int, dtype: str, provider: str, quick: bool) -> float:
    """MiB at the peak of a first step above weights, gradients and optimizer, in a process of its own."""
    case = json.dumps([preset, cells, dtype, provider, 200 if quick else EXPRESSED])
    command = [sys.executable, "-m", "benchmarks.models.pretraining", case]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def _step_and_tell_memory(preset: str, cells: int, dtype: str, provider: str, expressed: int) -> None:
    model, masked = prepared(preset, cells, expressed=expressed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    # The gradients and AdamW's two moments, which the first step will make.
    kept = 3 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    _step(model, masked, optimizer, dtype, provider)
    print(status_mib("VmHWM") - before - kept)


if __name__ == "__main__":
    _step_and_tell_memory(*json.loads(sys.argv[1]))
