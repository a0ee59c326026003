"""Cells per second of other people's models as they are, accelerated, and packed all the way.

Embeddings and encoder in the published width, with few layers and without heads, on batches of the lengths of real
cells, each cut where the model cuts. A way whose rows are not right against float64 gets no time.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.models import others
from xtrimogene.bench.baselines import without_fastpath
from xtrimogene.bench.measured import digits
from xtrimogene.bench.rows import Row
from xtrimogene.bench.tasks import BOTH, CELL_LENGTHS, DTYPES, FORWARD, umi_counts
from xtrimogene.interop.accelerate import accelerate
from xtrimogene.interop.dropin import packed_embeddings, ragged_encoder
from xtrimogene.interop.packed import Packed

ROUNDS = 5
AS_IT_IS, UNFUSED, ACCELERATED, FILLED, PACKED = (
    "as it is", "as it is, fused path off", "accelerate", "accelerate, padded_rows=False", "packed",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One model and how it is called.

    longest  tokens after which it cuts a cell
    make     layers -> the model
    padded   model, batch, places in use (batch, length) -> (batch, length, dim), as its own code calls the encoder
    packed   model, batch -> (total_nnz, dim) without padding anywhere; None where padding is part of the result
    fused    torch's fused path is taken in inference
    """

    longest: int
    make: Callable[[int], Any]
    padded: Callable[[Any, Packed, Tensor], Tensor]
    packed: Callable[[Any, Packed], Tensor] | None
    fused: bool = False


def _slots(rows: Tensor, used: Tensor, empty: int = 0) -> Tensor:
    """(total_nnz, ...) -> (batch, length, ...), empty at padding."""
    out = rows.new_full((*used.shape, *rows.shape[1:]), empty)
    out[used] = rows
    return out


def _scgpt(model: Any, batch: Packed, used: Tensor) -> Tensor:
    x = model.embed(_slots(batch.gene_ids, used), _slots(batch.values, used))
    return model.transformer_encoder(x, src_key_padding_mask=~used)


def _uce(model: Any, batch: Packed, used: Tensor) -> Tensor:
    # Proteins as UCE has them: one vector a gene, here drawn for every token.
    proteins = batch.values[:, None] * torch.linspace(-1, 1, model.encoder[0].in_features, dtype=batch.values.dtype)
    mask = used.to(batch.values.dtype)
    x = model.embed(_slots(proteins, used).transpose(0, 1))
    return model.transformer_encoder(x, src_key_padding_mask=1 - mask).transpose(0, 1)


def _nicheformer(model: Any, batch: Packed, used: Tensor) -> Tensor:
    x = model.embed(_slots(batch.gene_ids, used, 1), torch.arange(used.shape[1]))
    return model.encoder(x, is_causal=False, src_key_padding_mask=~used)


def _geneformer(model: Any, batch: Packed, used: Tensor) -> Tensor:
    return model(_slots(batch.gene_ids, used), attention_mask=used.long()).last_hidden_state


def _encoded(encoder: nn.Module, rows: Tensor, batch: Packed) -> Tensor:
    return ragged_encoder(encoder)(rows, batch.cu_seqlens, batch.max_seqlen)


MODELS: dict[str, Model] = {
    "scGPT": Model(
        1200,
        lambda layers: others.ScGPT(layers=layers, dropout=0.0),
        _scgpt,
        lambda m, b: _encoded(m.transformer_encoder, m.embed(b.gene_ids, b.values), b),
        fused=True,
    ),
    "Geneformer V2 104M": Model(
        2048,
        lambda layers: others.geneformer("BertModel", layers=layers, dropout=0.0),
        _geneformer,
        lambda m, b: _encoded(m, packed_embeddings(m, b.gene_ids, b.cu_seqlens), b),
    ),
    "Nicheformer": Model(
        1500,
        lambda layers: others.Nicheformer(layers=layers),
        _nicheformer,
        lambda m, b: _encoded(m.encoder, m.embed(b.gene_ids, b.positions()), b),
        fused=True,
    ),
    "UCE": Model(1536, lambda layers: others.UCE(layers=layers, dropout=0.0), _uce, None),
}
# Model, layers, cells, dtype and direction of what is measured: in a few minutes on one thread.
RUNS = [
    ("scGPT", 1, 8, "float32", FORWARD),
    ("scGPT", 1, 8, "float32", BOTH),
    ("scGPT", 1, 8, "bfloat16", FORWARD),
    ("Geneformer V2 104M", 1, 4, "float32", FORWARD),
    ("Geneformer V2 104M", 1, 2, "float32", BOTH),
    ("Geneformer V2 104M", 1, 2, "bfloat16", FORWARD),
    ("Nicheformer", 1, 8, "float32", FORWARD),
    ("UCE", 1, 2, "float32", FORWARD),
]


def accelerated(quick: bool) -> Iterator[Row]:
    """Every model in inference, and training steps of two."""
    for name, layers, cells, dtype, direction in RUNS:
        model = MODELS[name]
        batch = _batch(cells, 40 if quick else model.longest, DTYPES[dtype])
        yield from _measured(name, model, batch, dtype, direction, layers, 2 if quick else ROUNDS)


def _batch(cells: int, longest: int, dtype: torch.dtype) -> Packed:
    """Cells at evenly spaced ranks of the real lengths: a few with about the padding of many."""
    known = np.sort(json.loads(CELL_LENGTHS.read_text(encoding="utf-8"))["lengths"])
    lengths = known[(2 * np.arange(cells) + 1) * len(known) // (2 * cells)].tolist()
    counts, gene_ids = umi_counts(tuple(lengths))
    values = torch.from_numpy(np.log1p(counts)).to(dtype)
    pairs = zip(values.split(lengths), torch.from_numpy(gene_ids).split(lengths), strict=True)
    return Packed.collate(pairs, max_length=longest)


def _measured(
    name: str, model: Model, batch: Packed, dtype: str, direction: str, layers: int, rounds: int
) -> Iterator[Row]:
    torch.manual_seed(0)
    lengths = batch.cu_seqlens.diff()
    used = torch.arange(batch.max_seqlen) < lengths[:, None]
    plain = model.make(layers).to(DTYPES[dtype]).train(direction == BOTH)
    taken, filled = copy.deepcopy(plain), copy.deepcopy(plain)
    accelerate(taken)
    accelerate(filled, padded_rows=False)
    ways: dict[str, tuple[Any, Callable[[], Tensor]]] = {
        AS_IT_IS: (plain, lambda: model.padded(plain, batch, used)[used]),
        ACCELERATED: (taken, lambda: model.padded(taken, batch, used)[used]),
        FILLED: (filled, lambda: model.padded(filled, batch, used)[used]),
    }
    if model.fused and direction == FORWARD:
        ways[UNFUSED] = (plain, lambda: _unfused(lambda: model.padded(plain, batch, used)[used]))
    if model.packed is None:
        del ways[FILLED]  # padding is attended to, and has to be computed
    else:
        packed = model.packed
        ways[PACKED] = (plain, lambda: packed(plain, batch))

    errors = _errors(model, batch, used, {way: run for way, (_, run) in ways.items()}, plain, direction)
    limit = 2 * max(error for way, error in errors.items() if way.startswith(AS_IT_IS))
    limit = max(limit, 2e-6 if dtype == "float32" else 0.0)
    right = [way for way in ways if errors[way] <= limit]
    times: dict[str, list[float]] = {way: [] for way in right}
    for turn in range(rounds + 1):
        for way in (*right[turn % len(right) :], *right[: turn % len(right)]):
            spent = _timed(*ways[way], direction)
            # The first turn warms caches, allocators and oneDNN's kernels.
            if turn:
                times[way].append(spent)
    case = f"{name}, {layers} layer{'s' * (layers > 1)}, {len(lengths)} cells"
    case = f"{case}, {1 - float(lengths.sum()) / used.numel():.0%} padding"
    for way in ways:
        row: Row = {
            "benchmark": "accelerated", "case": case, "cells": len(lengths), "tokens": int(lengths.sum()),
            "dtype": dtype, "direction": direction,
            "provider": way, "correct": way in right, "error": digits(errors[way]), "error_limit": digits(limit),
        }  # fmt: skip
        if way in right:
            row |= _rates(times, way, len(lengths))
        yield row


def _rates(times: dict[str, list[float]], way: str, cells: int) -> Row:
    """Of a way beside the model as it is with PyTorch's best setting."""
    median = statistics.median(times[way])
    best = min(statistics.median(spent) for other, spent in times.items() if other.startswith(AS_IT_IS))
    ordered = sorted(times[way])
    return {
        "runs": len(ordered), "median_ms": digits(1e3 * median), "min_ms": digits(1e3 * ordered[0]),
        "max_ms": digits(1e3 * ordered[-1]), "cells_per_second": digits(cells / median),
        "speedup": digits(best / median),
    }  # fmt: skip


def _unfused(run: Callable[[], Tensor]) -> Tensor:
    with without_fastpath():
        return run()


def _errors(
    model: Model, batch: Packed, used: Tensor, ways: dict[str, Callable[[], Tensor]], plain: Any, direction: str
) -> dict[str, float]:
    """||rows - exact|| / ||exact|| of each way, on the first cell, at all of its places."""
    first = int(batch.cu_seqlens[1])
    cut = Packed(batch.values[:first].double(), batch.gene_ids[:first], batch.cu_seqlens[:2], batch.max_seqlen)
    with torch.no_grad():
        exact = model.padded(copy.deepcopy(plain).double(), cut, used[:1])[used[:1]]
    found = {}
    for way, run in ways.items():
        with torch.set_grad_enabled(direction == BOTH):
            rows = run()[:first].detach().double()
        found[way] = float((rows - exact).norm() / exact.norm())
    return found


def _timed(model: Any, run: Callable[[], Tensor], direction: str) -> float:
    started = time.perf_counter()
    if direction == FORWARD:
        with torch.no_grad():
            run()
    else:
        run().square().mean().backward()
    spent = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return spent
