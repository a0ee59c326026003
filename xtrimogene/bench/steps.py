"""Times of a pre-training step: ours, and the network as it is written down."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from xtrimogene.bench.cells import Cells
from xtrimogene.bench.counting import AUTO_ENCODERS, counts_of
from xtrimogene.bench.measured import digits
from xtrimogene.bench.pretraining import error_columns, exact_step, mean_loss, step_errors, step_is_right
from xtrimogene.bench.rows import Row
from xtrimogene.bench.sizes import Size, with_rates
from xtrimogene.bench.tasks import DTYPES
from xtrimogene.cells.masking import MaskingConfig, mask_cells
from xtrimogene.model import XTrimoGene
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.flops import step_flops
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.vocabulary import Vocabulary


def step(presets: Sequence[str], cells: Cells, size: Size, device: str) -> Iterator[Row]:
    """A pre-training step of the whole auto-encoder: forward, backward and AdamW, on masked real cells.

    Ours, and the network as it is written down with the same weights, which take turns. Before, the loss of the first
    cell is checked against the model in float64 on the reference backend, and its gradient where size.exact_gflop
    allows a whole step in float64.
    """
    vocabulary = Vocabulary(f"gene{gene}" for gene in range(cells.num_genes))
    for preset in presets:
        config = XTrimoGeneConfig.preset(preset, num_genes=cells.num_genes)
        chosen, masked, flops = _step_cells(config, cells, size)
        if flops[True] > 1e9 * size.step_gflop:
            continue
        model = XTrimoGene.from_preset(preset, vocabulary, dropout=0.0).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        first = mask_cells(cells.batch(chosen[:1]), np.asarray(chosen[:1]), MaskingConfig(), epoch=0,
                           num_genes=cells.num_genes)  # fmt: skip
        whole = _masked_flops(config, first)[True] <= 1e9 * size.exact_gflop
        exact, first = exact_step(model, first.to(device), gradient=whole), first.to(device)
        on_device = masked.to(device)
        ways = {(dtype, name): loss for dtype in DTYPES for name, (loss, _) in AUTO_ENCODERS.items()}
        errors = {(dtype, name): step_errors(model, first, dtype, exact, loss) for (dtype, name), loss in ways.items()}
        right_ways = [way for way in ways if step_is_right(errors[way], way[0])]
        steps = {way: functools.partial(_step, model, on_device, optimizer, way[0], ways[way]) for way in right_ways}
        times = _in_turns(steps, size.rounds if flops[True] < 1e12 else 2, device)
        for dtype, name in ways:
            way, savings = (dtype, name), AUTO_ENCODERS[name][1]
            row: Row = {
                "benchmark": "step", "case": f"{preset}, {len(chosen)} cell{'s' * (len(chosen) > 1)}",
                "cells": len(chosen), "tokens": masked.batch.total_nnz, "dtype": dtype, "direction": "training step",
                "provider": name, "correct": way in steps, "preset": preset, **error_columns(errors[way], dtype),
            }  # fmt: skip
            if way in steps:
                low, median, high = np.quantile(times[way], [0.2, 0.5, 0.8])
                gemm = 2 * 2048**3 / float(np.median(times["gemm", dtype])) / 1e9
                rate = flops[savings] / median / 1e9
                row |= {
                    "runs": len(times[way]), "median_ms": digits(1e3 * median), "q20_ms": digits(1e3 * low),
                    "q80_ms": digits(1e3 * high), "gflops": digits(rate), "gemm_gflops": digits(gemm),
                    "share_of_gemm": digits(rate / gemm),
                }  # fmt: skip
            yield with_rates(row)


def _step_cells(config: XTrimoGeneConfig, cells: Cells, size: Size) -> tuple[list[int], MaskedBatch, dict[bool, int]]:
    """As many of the shuffled cells as size.step_gflop allows, one at least; their masked batch and its FLOPs."""
    found: tuple[list[int], MaskedBatch, dict[bool, int]] | None = None
    for count in range(1, size.cells + 1):
        chosen = cells.shuffled()[:count]
        masked = mask_cells(
            cells.batch(chosen), np.asarray(chosen), MaskingConfig(), epoch=0, num_genes=cells.num_genes
        )
        flops = _masked_flops(config, masked)
        if found is not None and flops[True] > 1e9 * size.step_gflop / 2:
            break
        found = chosen, masked, flops
    assert found is not None
    return found


def _masked_flops(config: XTrimoGeneConfig, masked: MaskedBatch) -> dict[bool, int]:
    """FLOPs of a step, with the exact savings (True) and without."""
    tokens, distinct, hidden, asked = counts_of(masked)
    return {
        savings: step_flops(config, tokens, distinct=distinct, masked=hidden, asked=asked, savings=savings)
        for savings in (True, False)
    }


def _step(
    model: XTrimoGene,
    masked: MaskedBatch,
    optimizer: torch.optim.Optimizer,
    dtype: str,
    loss: Callable[[XTrimoGene, MaskedBatch], Tensor],
) -> None:
    mean_loss(model, masked, dtype, loss).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _in_turns(
    ways: Mapping[tuple[str, str], Callable[[], object]], rounds: int, device: str
) -> dict[tuple[str, str], list[float]]:
    """(dtype, name) -> seconds; ("gemm", dtype) is the matrix product of runner.measure."""
    times: dict[tuple[str, str], list[float]] = {}
    squares = {dtype: torch.randn(2048, 2048, device=device).to(DTYPES[dtype]) for dtype, _ in ways}
    products = {("gemm", dtype): functools.partial(torch.mm, square, square) for dtype, square in squares.items()}
    every: dict[tuple[str, str], Callable[[], object]] = {**ways, **products}
    for number in range(rounds + 1):
        for name, way in every.items():
            clock = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            # The first round warms caches, allocators and oneDNN's kernels.
            if number:
                times.setdefault(name, []).append(time.perf_counter() - clock)
    return times
