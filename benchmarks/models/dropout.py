"""What dropout costs in training: the same encoder, and the same pre-training step, with dropout 0 and 0.1 in turns.

A row with dropout is judged by the loss, or the encoder's output, in float64 on the reference backend with the same
random seed: its masks are the same in every dtype and on every backend. Times are CPU time, which other work on the
machine does not lengthen.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtg_kernels import use_backend
from xtrimogene import XTrimoGene
from xtrimogene.bench.measured import digits
from xtrimogene.bench.pretraining import LIMITS, in_float64, mean_loss, prepared
from xtrimogene.bench.tasks import DTYPES, offsets
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.encoder import RaggedTransformerEncoder
from xtrimogene.network.masked_batch import MaskedBatch

# Genes that cells express.
LENGTHS = (1200, 1500, 900, 2100)
# Preset and layers of the encoder; cells of a step.
ENCODERS = (("3m", 2), ("10m", 2), ("100m", 1))
STEP = ("3m", 2)
SHARES = (0.0, 0.1)
LIMIT = {"float32": 1e-5, "bfloat16": 3e-2}


def dropout(quick: bool) -> Iterator[dict[str, Any]]:
    """Forward and backward of an encoder, and a step with AdamW, without dropout and with the default's 0.1."""
    for preset, layers in ENCODERS[:1] if quick else ENCODERS:
        for dtype in DTYPES:
            yield from _rows_of(f"encoder, {preset}", dtype, *_encoders(preset, layers, dtype, quick), quick)
    for dtype in DTYPES:
        yield from _rows_of(f"step, {STEP[0]}, {STEP[1]} cells", dtype, *_steps(dtype, quick), quick)


def _encoders(
    preset: str, layers: int, dtype: str, quick: bool
) -> tuple[dict[float, Callable[[], object]], dict[float, float], int]:
    """Dropout -> a forward and backward; dropout -> its error; tokens."""
    config = XTrimoGeneConfig.preset(preset, num_genes=1)
    lengths = (40, 60) if quick else LENGTHS
    cu_seqlens, longest, total = offsets(lengths), max(lengths), sum(lengths)
    torch.manual_seed(0)
    x, grad_out = (torch.randn(total, config.dim).to(DTYPES[dtype]) for _ in range(2))
    x.requires_grad_()
    ways: dict[float, Callable[[], object]] = {}
    errors = {}
    for share in SHARES:
        torch.manual_seed(0)
        encoder = RaggedTransformerEncoder(
            config.dim, config.num_heads, layers, ffn_dim=config.ffn_dim, dropout=share
        ).to(DTYPES[dtype])
        # The first cell judges; its own batch has its masks.
        first, alone = x[: lengths[0]].detach(), offsets(lengths[:1])
        exactly = RaggedTransformerEncoder(
            config.dim, config.num_heads, layers, ffn_dim=config.ffn_dim, dropout=share
        ).double()
        exactly.load_state_dict(encoder.state_dict())
        outs = []
        for backend, module, rows in (("auto", encoder, first), ("reference", exactly, first.double())):
            torch.manual_seed(1)
            with use_backend(backend), torch.no_grad():
                outs.append(module(rows, alone, lengths[0]).double())
        errors[share] = float((outs[0] - outs[1]).norm() / outs[1].norm())

        ways[share] = functools.partial(_pass, encoder, x, cu_seqlens, longest, grad_out)
    return ways, errors, total


def _pass(encoder: RaggedTransformerEncoder, x: Tensor, cu_seqlens: Tensor, longest: int, grad_out: Tensor) -> None:
    encoder.zero_grad()
    encoder(x, cu_seqlens, longest).backward(grad_out)


def _step(model: XTrimoGene, masked: MaskedBatch, optimizer: torch.optim.Optimizer, dtype: str) -> None:
    mean_loss(model, masked, dtype).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _steps(dtype: str, quick: bool) -> tuple[dict[float, Callable[[], object]], dict[float, float], int]:
    """Dropout -> a step; dropout -> error of its loss; tokens."""
    ways: dict[float, Callable[[], object]] = {}
    errors = {}
    for share in SHARES:
        plain, masked = prepared(STEP[0], 1 if quick else STEP[1], **({"expressed": 200} if quick else {}))
        model = XTrimoGene.from_preset(STEP[0], plain.vocabulary, depth_tokens=True, dropout=share).train()
        losses = []
        for backend, (one, batch), name in (
            ("auto", (model, masked), dtype),
            ("reference", in_float64(model, masked), "float64"),
        ):
            torch.manual_seed(1)
            with use_backend(backend), torch.no_grad():
                losses.append(float(mean_loss(one, batch, name)))
        errors[share] = abs(losses[0] / losses[1] - 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        ways[share] = functools.partial(_step, model, masked, optimizer, dtype)
    return ways, errors, masked.batch.total_nnz


def _rows_of(
    case: str,
    dtype: str,
    ways: Mapping[float, Callable[[], object]],
    errors: Mapping[float, float],
    tokens: int,
    quick: bool,
) -> Iterator[dict[str, Any]]:
    limit = LIMITS[dtype]["loss"] if case.startswith("step") else LIMIT[dtype]
    times: dict[float, list[float]] = {share: [] for share in ways}
    for number in range(2 if quick else 8):
        # Each goes first in every other round.
        for share in list(ways)[:: 1 if number % 2 else -1]:
            clock = time.process_time()
            ways[share]()
            # The first round warms caches, allocators and oneDNN's kernels.
            if number:
                times[share].append(time.process_time() - clock)
    cost = 100 * (np.array(times[SHARES[1]]) / np.array(times[SHARES[0]]) - 1)
    for share in SHARES:
        low, median, high = np.quantile(times[share], [0.25, 0.5, 0.75])
        row: dict[str, Any] = {
            "benchmark": "dropout", "case": case, "tokens": tokens, "dtype": dtype, "direction": "forward and backward",
            "provider": f"dropout {share:g}", "correct": errors[share] <= limit, "error": f"{errors[share]:.2e}",
            "error_limit": limit, "runs": len(times[share]), "median_ms": digits(1e3 * median),
            "q25_ms": digits(1e3 * low), "q75_ms": digits(1e3 * high),
        }  # fmt: skip
        if share:
            low, median, high = (round(float(q), 1) for q in np.quantile(cost, [0.25, 0.5, 0.75]))
            row |= {"cost_percent": median, "cost_q25_percent": low, "cost_q75_percent": high}
        yield row
