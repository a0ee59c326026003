"""The cases of the differentiable ops, as tasks on ragged shapes; weights and inputs are random with a fixed seed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ops import baselines
from benchmarks.ops.baselines import FAVOR_EPS
from xtg_kernels import (
    RaggedBatch,
    distinct_index,
    expression_embedding,
    favor_attention,
    masked_decoder_gather,
    masked_head,
    ragged_attention,
)
from xtrimogene.bench.cases import encoder_task
from xtrimogene.bench.plain import attention_split
from xtrimogene.bench.tasks import (
    DTYPES,
    NUM_GENES,
    Lengths,
    Provider,
    Task,
    offsets,
    real_lengths,
    short_lengths,
    umi_counts,
    with_both,
)
from xtrimogene.cells.masking import MaskingConfig, mask_cells
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.embedding import ExpressionEmbedding
from xtrimogene.network.flops import encoder_backward_flops, encoder_flops
from xtrimogene.network.masked_batch import MaskedBatch

NUM_HEADS, HEAD_DIM = 12, 64  # attention of the 100m model
# Attention of its decoder: 8 heads, 266 features, and queries and keys at all genes and both depth tokens.
DECODER_HEADS, FEATURES, POSITIONS = 8, 266, NUM_GENES + 2


def cells(quick: bool) -> dict[str, Lengths]:
    """Name -> lengths of the attention cases; quick: every cell an eighth as long, and the name says so."""
    short = short_lengths(64)
    lengths = {
        "8 cells": real_lengths(8),
        "1 x 2048": (2048,),
        "64 short cells": short,
        "15,000 genes among short cells": (*short[:32], 15_000, *short[32:]),
    }
    if quick:
        return {f"{name} / 8": tuple(max(1, n // 8) for n in case) for name, case in lengths.items()}
    return lengths


def attention_task(case: str, lengths: Lengths, dtype: str) -> Task:
    """ragged_attention on q, k and v that are strided views of one packed tensor, as an encoder has them."""
    generator = torch.Generator().manual_seed(0)
    total, cu_seqlens, longest = sum(lengths), offsets(lengths), max(lengths)
    qkv = torch.randn(total, 3, NUM_HEADS, HEAD_DIM, generator=generator).to(DTYPES[dtype]).requires_grad_()
    q, k, v = qkv.unbind(1)
    grad_out = torch.randn(total, NUM_HEADS, HEAD_DIM, generator=generator).to(DTYPES[dtype])
    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: attention_split(q, k, v, lengths),
        "xtg": lambda: ragged_attention(q, k, v, cu_seqlens, longest),
    }
    # Where padding makes the work many times as much, it only costs the patience of whoever runs this.
    if len(lengths) > 1 and len(lengths) * longest <= 4 * total:
        ways["padded"] = lambda: baselines.attention_padded(q, k, v, lengths)
    products = NUM_HEADS * HEAD_DIM * sum(n * n for n in lengths)
    return Task(
        "attention", case, lengths, dtype,
        {name: Provider(run, (q, k, v)) for name, run in ways.items()}, grad_out,
        lambda: baselines.exact_attention(q, k, v, grad_out, lengths), total, with_both(4 * products, 10 * products),
    )  # fmt: skip


def favor_task(case: str, lengths: Lengths, queries: Lengths, dtype: str) -> Task:
    """favor_attention on rows of one packed tensor, as a decoder has them; each cell has its own number of queries."""
    generator = torch.Generator().manual_seed(0)
    cu_seqlens, cu_seqlens_q = offsets(lengths), offsets(queries)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, DECODER_HEADS, HEAD_DIM, generator=generator).to(DTYPES[dtype])

    q = rows(sum(queries)).requires_grad_()
    k, v = rows(sum(lengths), 2).requires_grad_().unbind(1)
    grad_out = rows(sum(queries))
    projection = torch.randn(FEATURES, HEAD_DIM, generator=generator)
    rounded = projection.to(DTYPES[dtype])

    def fused() -> Tensor:
        return favor_attention(
            q, k, v, projection, cu_seqlens, max(lengths),
            cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max(queries), eps=FAVOR_EPS,
        )  # fmt: skip

    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: baselines.favor_einsum(q, k, v, rounded, lengths, queries, FAVOR_EPS),
        "xtg": fused,
    }
    products = DECODER_HEADS * FEATURES * HEAD_DIM * (sum(lengths) + sum(queries))
    return Task(
        "favor", case, lengths, dtype,
        {name: Provider(run, (q, k, v)) for name, run in ways.items()}, grad_out,
        lambda: baselines.exact_favor(q, k, v, projection, grad_out, lengths, queries, FAVOR_EPS),
        sum(queries), with_both(4 * products, 8 * products),
    )  # fmt: skip


def embedding_task(case: str, lengths: Lengths, dtype: str, preset: str = "100m") -> Task:
    """expression_embedding of a preset on UMI cells; the index of equal values comes with the batch (packer)."""
    generator = torch.Generator().manual_seed(0)
    config = XTrimoGeneConfig.preset(preset, num_genes=NUM_GENES)
    counts, ids = umi_counts(lengths)
    cell_of = np.repeat(np.arange(len(lengths)), lengths)
    totals = np.bincount(cell_of, weights=counts)
    values = torch.from_numpy(np.log1p(counts / totals[cell_of] * 1e4).astype(np.float32))
    gene_ids = torch.from_numpy(ids)
    torch.manual_seed(0)
    module = ExpressionEmbedding(config.num_genes, config.dim).to(DTYPES[dtype])
    index = distinct_index(values, offsets(lengths))
    weights = (module.w1, module.b1, module.w2, module.b2, module.bin_table)
    inputs = (*weights, module.gene_table)
    grad_out = torch.randn(len(values), config.dim, generator=generator).to(DTYPES[dtype])

    def fused() -> Tensor:
        return expression_embedding(
            values, *weights, gene_ids=gene_ids, gene_table=module.gene_table, distinct_index=index
        )

    def unfused() -> Tensor:
        return baselines.embedding_unfused(values, gene_ids, *inputs)

    def exact() -> tuple[Tensor, list[Tensor]]:
        exactly = [x.detach().double().requires_grad_() for x in inputs]
        out = baselines.embedding_unfused(values.double(), gene_ids, *exactly)
        return out.detach(), list(torch.autograd.grad(out, exactly, grad_out.double()))

    distinct = [int((index == torch.arange(len(index))).sum())]
    forward = encoder_flops(config, [len(values)], distinct).embedding
    backward = encoder_backward_flops(config, [len(values)], distinct).embedding
    return Task(
        "embedding", case, lengths, dtype, {"plain": Provider(unfused, inputs), "xtg": Provider(fused, inputs)},
        grad_out, exact, len(values), with_both(forward, backward),
    )  # fmt: skip


def gather_task(case: str, lengths: Lengths, dtype: str, dim: int = 512) -> Task:
    """masked_decoder_gather on cells masked as in pre-training; the rows of all genes of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    masked = masked_cells(lengths)
    ids, cu_seqlens = masked.batch.gene_ids, masked.batch.cu_seqlens
    shapes = ((NUM_GENES, dim), (dim,), (dim,), (len(ids), dim))
    inputs: tuple[Any, ...] = tuple(
        torch.randn(shape, generator=generator).to(DTYPES[dtype]).requires_grad_() for shape in shapes
    )
    grad_out = torch.randn(len(lengths), NUM_GENES, dim, generator=generator).to(DTYPES[dtype])
    indices: tuple[Any, ...] = (cu_seqlens, ids, masked.masked_ids, masked.masked_cu_seqlens)

    def exact() -> tuple[Tensor, list[Tensor]]:
        exactly: list[Any] = [x.detach().double().requires_grad_() for x in inputs]
        out = baselines.gather_indexed(*exactly, *indices)
        return out.detach(), list(torch.autograd.grad(out, exactly, grad_out.double()))

    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: baselines.gather_indexed(*inputs, *indices),
        "xtg": lambda: masked_decoder_gather(*inputs, *indices),
    }
    return Task(
        "gather", case, lengths, dtype, {name: Provider(run, inputs) for name, run in ways.items()}, grad_out,
        exact, len(lengths), with_both(0, 0), moves=True,
    )  # fmt: skip


def head_task(case: str, lengths: Lengths, dtype: str, dim: int = 512) -> Task:
    """masked_head at the chosen genes of cells masked as in pre-training, out of the rows of all genes."""
    generator = torch.Generator().manual_seed(0)
    masked = masked_cells(lengths)
    cell_of = torch.arange(len(lengths)).repeat_interleave(masked.chosen_cu_seqlens.diff())
    rows = cell_of * NUM_GENES + masked.chosen_ids
    shapes = ((len(lengths) * NUM_GENES, dim), (dim,), (dim,), (dim,), (dim,), (dim,), (1,))
    inputs = tuple(torch.randn(shape, generator=generator).to(DTYPES[dtype]).requires_grad_() for shape in shapes)
    grad_out = torch.randn(len(rows), generator=generator)

    def exact() -> tuple[Tensor, list[Tensor]]:
        exactly = [x.detach().double().requires_grad_() for x in inputs]
        out = baselines.head_indexed(rows, *exactly)
        return out.detach(), list(torch.autograd.grad(out, exactly, grad_out.double()))

    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: baselines.head_indexed(rows, *inputs).float(),
        "xtg": lambda: masked_head(inputs[0], rows, *inputs[1:]),
    }
    return Task(
        "head", case, lengths, dtype, {name: Provider(run, inputs) for name, run in ways.items()}, grad_out,
        exact, len(rows), with_both(2 * dim * len(rows), 4 * dim * len(rows)),
    )  # fmt: skip


def masked_cells(lengths: Lengths) -> MaskedBatch:
    """UMI-like cells of these lengths, masked with the published rates."""
    counts, ids = umi_counts(lengths)
    values = torch.from_numpy(np.log1p(counts).astype(np.float32))
    batch = RaggedBatch(values, torch.from_numpy(ids), offsets(lengths), max(lengths))
    return mask_cells(batch, np.arange(len(lengths)), MaskingConfig(), epoch=0, num_genes=NUM_GENES)


def attention_tasks(quick: bool) -> Iterator[Task]:
    """Every attention case in both dtypes."""
    for (name, lengths), dtype in itertools.product(cells(quick).items(), DTYPES):
        yield attention_task(name, lengths, dtype)


def favor_tasks(quick: bool) -> Iterator[Task]:
    """A decoder over all genes of one cell; its last layer, which asks at chosen genes only; cells of a gene panel."""
    small = 16 if quick else 1
    suffix = f" / {small}" if quick else ""
    shapes = {
        "1 cell, all genes": ((POSITIONS // small,), (POSITIONS // small,)),
        "1 cell, all genes, asked at 1,000": ((POSITIONS // small,), (1000 // small,)),
        "8 cells of 2,000 genes": ((2000 // small,) * 8, (2000 // small,) * 8),
    }
    for (name, (lengths, queries)), dtype in itertools.product(shapes.items(), DTYPES):
        yield favor_task(name + suffix, lengths, queries, dtype)


def embedding_tasks(quick: bool) -> Iterator[Task]:
    """UMI cells of real lengths, and short ones."""
    chosen = {name: lengths for name, lengths in cells(quick).items() if "15,000" not in name and len(lengths) > 1}
    for (name, lengths), dtype in itertools.product(chosen.items(), DTYPES):
        yield embedding_task(name, lengths, dtype)


def encoder_tasks(quick: bool) -> Iterator[Task]:
    """The presets on 8 real cells, and the smallest one beside its dense form on one cell."""
    eight = next(iter(cells(quick).values()))
    for preset, dtype in itertools.product(("3m",) if quick else ("3m", "10m", "100m"), DTYPES):
        # In float64 the 100m model takes minutes on eight cells.
        yield encoder_task(preset, eight, dtype, check_cells=2 if preset == "100m" else 8)
    if not quick:
        yield encoder_task("3m", eight[:1], "float32", dense=True)


def decoder_tasks(task: Callable[[str, Lengths, str, int], Task], quick: bool) -> Iterator[Task]:
    """Cells of real lengths, as many as keep the rows of all genes within half a GiB, at the width of a preset."""
    eight = next(iter(cells(quick).values()))
    for (preset, count, dim), dtype in itertools.product((("3m", 8, 128), ("100m", 4, 512)), DTYPES):
        yield task(f"{preset}, {count} cells{' / 8' * quick}", eight[:count], dtype, dim // 8 if quick else dim)


# Benchmarks of differentiable ops; run.py adds pack, embed and memory, which are of another kind.
TASKS: dict[str, Callable[[bool], Iterator[Task]]] = {
    "attention": attention_tasks,
    "favor": favor_tasks,
    "embedding": embedding_tasks,
    "encoder": encoder_tasks,
    "gather": functools.partial(decoder_tasks, gather_task),
    "head": functools.partial(decoder_tasks, head_task),
}
