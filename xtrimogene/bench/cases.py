"""What is measured: ragged shapes from real cell lengths, and the tasks made of them. A task is data, not a class tree.

Cell lengths are those of cell_lengths.json (genes of the 19,264-gene vocabulary with a count, in 906 real cells); which
of them make a case is drawn with a fixed seed. Weights and inputs are random with a fixed seed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xtg_kernels import (
    RaggedBatch,
    distinct_index,
    expression_embedding,
    favor_attention,
    masked_decoder_gather,
    masked_head,
    ragged_attention,
    use_backend,
)
from xtrimogene.bench import baselines
from xtrimogene.config import XTrimoGeneConfig
from xtrimogene.embedding import ExpressionEmbedding
from xtrimogene.encoder import RaggedTransformerEncoder
from xtrimogene.flops import encoder_backward_flops, encoder_flops
from xtrimogene.masking import MaskedBatch, MaskingConfig, mask_cells

NUM_HEADS, HEAD_DIM = 12, 64  # attention of the 100m model
NUM_GENES = 19_264
# Attention of its decoder: 8 heads, 266 features, and queries and keys at all genes and both depth tokens.
DECODER_HEADS, FEATURES, POSITIONS, FAVOR_EPS = 8, 266, NUM_GENES + 2, 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Provider:
    """One way to do a task: ``run()`` makes the output from tensors that ``inputs`` (those with gradients) are of."""

    run: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """One case in one dtype, done by several providers on the same numbers.

    providers     name -> Provider; "plain" is the baseline of every ratio and error
    grad_out      gradient of the output
    exact         the output and gradients in float64: () -> (out rows, gradients in the order of inputs)
    checked_rows  how many first rows ``exact`` computes; each cell is right or wrong by itself
    flops         closed-form FLOPs of each direction
    plain_again   the plain provider with its sums in other orders: how far rounding alone takes it. Where a rounding
                  moves a row across the kink of a ReLU its gradient changes by the whole, so one run says little
    moves         whether it moves memory and little else: rows then say its share of the rate of a copy of the output
    """

    benchmark: str
    case: str
    lengths: Lengths
    dtype: str
    providers: dict[str, Provider]
    grad_out: Tensor
    exact: Callable[[], tuple[Tensor, list[Tensor]]]
    checked_rows: int
    flops: dict[str, int]
    plain_again: tuple[Provider, ...] = ()
    moves: bool = False


def real_lengths(count: int, seed: int = 0) -> Lengths:
    """Lengths of ``count`` different real cells."""
    known = json.loads((Path(__file__).parent / "cell_lengths.json").read_text(encoding="utf-8"))["lengths"]
    return tuple(int(n) for n in np.random.default_rng(seed).choice(known, count, replace=False))


def short_lengths(count: int, seed: int = 0) -> Lengths:
    """Cells of 20 to 120 genes, as targeted panels and very shallow sequencing give."""
    return tuple(int(n) for n in np.random.default_rng(seed).integers(20, 121, count))


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


def offsets(lengths: Lengths) -> Tensor:
    """cu_seqlens (batch + 1,) int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def attention_task(case: str, lengths: Lengths, dtype: str) -> Task:
    """ragged_attention on q, k and v that are strided views of one packed tensor, as an encoder has them."""
    generator = torch.Generator().manual_seed(0)
    total, cu_seqlens, longest = sum(lengths), offsets(lengths), max(lengths)
    qkv = torch.randn(total, 3, NUM_HEADS, HEAD_DIM, generator=generator).to(DTYPES[dtype]).requires_grad_()
    q, k, v = qkv.unbind(1)
    grad_out = torch.randn(total, NUM_HEADS, HEAD_DIM, generator=generator).to(DTYPES[dtype])
    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: baselines.attention_split(q, k, v, lengths),
        "xtg": lambda: ragged_attention(q, k, v, cu_seqlens, longest),
    }
    # Where padding makes the work many times as much, it only costs the patience of whoever runs this.
    if len(lengths) > 1 and len(lengths) * longest <= 4 * total:
        ways["padded"] = lambda: baselines.attention_padded(q, k, v, lengths)
    products = NUM_HEADS * HEAD_DIM * sum(n * n for n in lengths)
    return Task(
        "attention", case, lengths, dtype,
        {name: Provider(run, (q, k, v)) for name, run in ways.items()}, grad_out,
        lambda: baselines.exact_attention(q, k, v, grad_out, lengths), total, _with_both(4 * products, 10 * products),
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
        sum(queries), _with_both(4 * products, 8 * products),
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
        grad_out, exact, len(values), _with_both(forward, backward),
    )  # fmt: skip


def encoder_task(
    preset: str,
    lengths: Lengths,
    dtype: str,
    *,
    dense: bool = False,
    check_cells: int = 8,
    orders: tuple[int, ...] = (2, 3, 4),
    layers: int | None = None,
    device: str = "cpu",
) -> Task:
    """The Transformer layers of a preset, or the first so many. dense adds the form that runs all genes, masked.

    orders are the several ways to sum in which the plain form is judged again.
    """
    config = _config(preset, NUM_GENES, layers)
    torch.manual_seed(0)
    encoder = (
        RaggedTransformerEncoder(config.dim, config.num_heads, config.num_layers, ffn_dim=config.ffn_dim, dropout=0.0)
        .to(device, DTYPES[dtype])
        .eval()
    )
    total, cu_seqlens, longest = sum(lengths), offsets(lengths).to(device), max(lengths)
    x = torch.randn(total, config.dim).to(device, DTYPES[dtype]).requires_grad_()
    grad_out = torch.randn(total, config.dim).to(device, DTYPES[dtype])
    weights = (x, *encoder.parameters())
    twin = baselines.torch_encoder(encoder)
    providers = {
        "plain": Provider(lambda: baselines.encoder_packed(encoder, x, lengths), weights),
        "xtg": Provider(lambda: encoder(x, cu_seqlens, longest), weights),
    }
    # Padding does the same harm at every size; at 100m it would take minutes to say so.
    widths = {"padded": longest} if len(lengths) > 1 and preset != "100m" else {}
    widths |= {"dense": NUM_GENES} if dense else {}
    # Both have the names of ours, in torch's order: gradients line up.
    named = dict(twin.named_parameters())
    twins = (x, *(named[name] for name, _ in encoder.named_parameters()))
    for name, width in widths.items():
        run = functools.partial(baselines.encoder_padded, twin, x, lengths, width)
        providers[name] = Provider(run, twins)
    checked = lengths[:check_cells]

    def exact() -> tuple[Tensor, list[Tensor]]:
        exactly = RaggedTransformerEncoder(
            config.dim, config.num_heads, config.num_layers, ffn_dim=config.ffn_dim, dropout=0.0
        ).to(device, torch.float64)
        exactly.load_state_dict(encoder.state_dict())
        rows = x[: sum(checked)].detach().double().requires_grad_()
        out = baselines.encoder_packed(exactly, rows, checked)
        grads = torch.autograd.grad(out, (rows, *exactly.parameters()), grad_out[: sum(checked)].double())
        return out.detach(), list(grads)

    forward, backward = encoder_flops(config, lengths), encoder_backward_flops(config, lengths)
    name = f"{preset}, {len(lengths)} cell{'s' if len(lengths) > 1 else ''}"
    return Task(
        "encoder", name, lengths, dtype, providers, grad_out, exact, sum(checked),
        _with_both(forward.linear + forward.attention, backward.linear + backward.attention),
        tuple(
            Provider(functools.partial(baselines.encoder_packed, encoder, x, lengths, parts), weights)
            for parts in orders
        ),
    )  # fmt: skip


def full_length_task(
    model: str, preset: str, genes: int, dtype: str, *, layers: int | None = None, device: str = "cpu"
) -> Task:
    """A model of baselines.FULL_LENGTH, or its first so many layers, on one cell whose every gene is a token.

    It is a baseline itself: there is nothing plainer to hold it against than float64.
    """
    config, kind = _config(preset, genes, layers), baselines.FULL_LENGTH[model]
    torch.manual_seed(0)
    module = kind.build(config).to(device, DTYPES[dtype]).eval()
    x = torch.randn(1, genes, config.dim).to(device, DTYPES[dtype]).requires_grad_()

    # In bfloat16 PyTorch sums the gradients of a LayerNorm over all rows in bfloat16 on a CPU. After some thousand rows
    # they are wrong by half, which is no number to compare.
    norms = [f"{name}." for name, part in module.named_modules() if isinstance(part, nn.LayerNorm)]
    left_out = tuple(norms) if dtype == "bfloat16" else ()

    def leaves(module: nn.Module) -> list[Tensor]:
        return [weight for name, weight in module.named_parameters() if not name.startswith(left_out)]

    def rows(module: nn.Module, x: Tensor) -> Tensor:
        with baselines.without_fastpath():
            return module(x)[0]

    with torch.no_grad():
        width = rows(module, x[:, :1]).shape[1]
    grad_out = torch.randn(genes, width).to(device, DTYPES[dtype])

    def exact() -> tuple[Tensor, list[Tensor]]:
        exactly, exact_x = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
        with use_backend("reference"):
            out = rows(exactly, exact_x)
            grads = torch.autograd.grad(out, (exact_x, *leaves(exactly)), grad_out.double())
        return out.detach(), list(grads)

    forward = kind.flops(config, 1)
    backward = 2 * forward.linear + round(kind.backward * forward.attention)
    return Task(
        "dense", f"{preset}, {genes:,} genes", (genes,), dtype,
        {model: Provider(functools.partial(rows, module, x), (x, *leaves(module)))}, grad_out,
        exact, genes, _with_both(forward.total, backward),
    )  # fmt: skip


def _config(preset: str, genes: int, layers: int | None) -> XTrimoGeneConfig:
    """The preset without dropout; of encoder and decoder at most so many layers."""
    config = XTrimoGeneConfig.preset(preset, num_genes=genes, dropout=0.0)
    if layers is None:
        return config
    return dataclasses.replace(config, num_layers=layers, decoder_layers=min(layers, config.decoder_layers))


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
        exact, len(lengths), _with_both(0, 0), moves=True,
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
        exact, len(rows), _with_both(2 * dim * len(rows), 4 * dim * len(rows)),
    )  # fmt: skip


def masked_cells(lengths: Lengths) -> MaskedBatch:
    """UMI-like cells of these lengths, masked with the published rates."""
    counts, ids = umi_counts(lengths)
    values = torch.from_numpy(np.log1p(counts).astype(np.float32))
    batch = RaggedBatch(values, torch.from_numpy(ids), offsets(lengths), max(lengths))
    return mask_cells(batch, np.arange(len(lengths)), MaskingConfig(), epoch=0, num_genes=NUM_GENES)


def umi_counts(lengths: Lengths, num_genes: int = NUM_GENES) -> tuple[np.ndarray, np.ndarray]:
    """Counts and gene ids (both (total_nnz,) int32) of cells of these lengths; ids ascend within a cell.

    Counts follow a heavy-tailed law (Zipf, exponent 2): six in ten are 1, a few are hundreds, as in UMI data.
    """
    rng = np.random.default_rng(0)
    counts = np.minimum(rng.zipf(2.0, sum(lengths)), 5000).astype(np.int32)
    gene_ids = [np.sort(rng.choice(num_genes, length, replace=False)) for length in lengths]
    return counts, np.concatenate(gene_ids).astype(np.int32)


def _with_both(forward: int, backward: int) -> dict[str, int]:
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


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
