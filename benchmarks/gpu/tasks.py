"""The ops on a GPU: each as a task that can be checked against float64 and timed beside what others offer for it.

A task's "plain" provider is PyTorch without us; "xtg" is the op on its Triton kernels (in Triton's interpreter where
the tensors are on a CPU, for rehearsals). Attention has all its rivals: torch.nn.attention.varlen, SDPA on the padded
batch, FlexAttention and flash-attn. A rival that is missing or declines is named with its reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import baselines
from benchmarks.ops.baselines import FAVOR_EPS
from xtg_kernels import (
    dropout,
    expression_embedding,
    favor_attention,
    masked_decoder_gather,
    masked_mse,
    ragged_attention,
    use_backend,
)
from xtg_kernels.ops.dropout.reference import kept, threshold_and_scale
from xtg_kernels.ops.ragged_attention import varlen
from xtrimogene.bench.plain import attention_split
from xtrimogene.bench.tasks import BACKWARD, BOTH, FORWARD, Lengths, Provider, Task, offsets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Exact = Callable[[], tuple[Tensor, list[Tensor]]]


class Maker:
    """Random tensors on one device with a fixed seed, the same on every device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gaussian numbers."""
        return torch.randn(shape, generator=self._generator).to(self.device, dtype)

    def ids(self, lengths: Lengths, num_genes: int) -> Tensor:
        """Ascending gene ids of each cell."""
        picked = [torch.randperm(num_genes, generator=self._generator)[:n].sort().values for n in lengths]
        return torch.cat([*picked, torch.zeros(0, dtype=torch.long)]).int().to(self.device)


def on_triton(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The op on its Triton kernels, whatever device the tensors are on."""
    with use_backend("triton"):
        return op(*args, **kwargs)


def reference_in_float64(
    op: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor, rest: Sequence[Any], **kwargs: Any
) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of the op's reference in float64; inputs come first among its arguments."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    with use_backend("reference"):
        out = op(*leaves, *rest, **kwargs)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad_out.double()))


def _task(
    benchmark: str,
    case: str,
    lengths: Lengths,
    dtype: str,
    ways: dict[str, Callable[[], Tensor]],
    inputs: tuple[Tensor, ...],
    grad_out: Tensor,
    exact: Exact,
    flops: tuple[int, int],
) -> Task:
    providers = {name: Provider(run, inputs) for name, run in ways.items()}
    by_direction = {FORWARD: flops[0], BACKWARD: flops[1], BOTH: sum(flops)}
    return Task(benchmark, case, lengths, dtype, providers, grad_out, exact, len(grad_out), by_direction)


def attention(
    case: str, lengths: Lengths, dtype: str, device: torch.device, *, heads: int = 12, head_dim: int = 64
) -> tuple[Task, dict[str, str]]:
    """ragged_attention on views of a packed tensor, and why some of its rivals are not in the task."""
    make, longest = Maker(device), max(lengths)
    cu_seqlens, total = offsets(lengths).to(device), sum(lengths)
    q, k, v = make.randn(total, 3, heads, head_dim, dtype=DTYPES[dtype]).requires_grad_().unbind(1)
    grad_out = make.randn(total, heads, head_dim, dtype=DTYPES[dtype])
    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: attention_split(q, k, v, lengths),
        "xtg": lambda: on_triton(ragged_attention, q, k, v, cu_seqlens, longest),
        "padded": functools.partial(_padded_attention, q, k, v, _slots(lengths, device), len(lengths), longest),
    }
    absent: dict[str, str] = {}
    rivals: dict[str, Callable[..., Callable[[], Tensor] | str]] = {
        "varlen": _varlen,
        "flex": _flex,
        "flash-attn": _flash_attn,
    }
    for name, rival in rivals.items():
        way = rival(q, k, v, cu_seqlens, longest)
        if isinstance(way, str):
            absent[name] = way
        else:
            ways[name] = way
    products = heads * head_dim * sum(n * n for n in lengths)
    task = _task(
        "attention", case, lengths, dtype, ways, (q, k, v), grad_out,
        lambda: baselines.exact_attention(q, k, v, grad_out, lengths), (4 * products, 10 * products),
    )  # fmt: skip
    return task, absent


def _slots(lengths: Lengths, device: torch.device) -> Tensor:
    """(total_nnz,) position of each token in the padded batch."""
    longest = max(lengths)
    return torch.cat([torch.arange(n) + cell * longest for cell, n in enumerate(lengths)]).to(device)


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, cells: int, longest: int) -> Tensor:
    """SDPA on the batch padded to its longest cell, with a mask; packing and unpacking are one indexing each."""
    used = torch.zeros(cells * longest, dtype=torch.bool, device=q.device).index_fill(0, slots, True)

    def pad(x: Tensor) -> Tensor:
        empty = x.new_zeros((cells * longest, *x.shape[1:]))
        return empty.index_copy(0, slots, x).view(cells, longest, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=used.view(cells, 1, 1, longest))
    return out.transpose(1, 2).flatten(0, 1)[slots]


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Callable[[], Tensor] | str:
    """torch's own function, without what the backend "varlen" adds for slack rows."""
    if reasons := varlen.not_supported_reasons(q, k, v):
        return "; ".join(reasons)
    varlen_attn: Any = varlen.torch_varlen().varlen_attn
    return lambda: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=q.shape[2] ** -0.5)


def _flex(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Callable[[], Tensor] | str:
    """FlexAttention with a document mask over the packed tokens; the mask is made once, ahead."""
    if q.device.type != "cuda":
        return "FlexAttention is compiled for a GPU"
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    total = q.shape[0]
    cell = torch.searchsorted(cu_seqlens[1:], torch.arange(total, device=q.device, dtype=torch.int32), right=True)

    def same_cell(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cell[query] == cell[key]

    mask = flex.create_block_mask(same_cell, None, None, total, total, device=q.device, _compile=True)
    attend = torch.compile(flex.flex_attention, dynamic=False)

    def run() -> Tensor:
        return attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask)[0].transpose(0, 1)

    return run


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Callable[[], Tensor] | str:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if q.device.type != "cuda" or q.dtype == torch.float32:
        return f"flash-attn takes half precision on a GPU, got {q.dtype} on {q.device}"
    function: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    return lambda: function(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


def embedding(case: str, lengths: Lengths, dtype: str, device: torch.device, *, dim: int = 768) -> Task:
    """expression_embedding with a gene table; gradients to all weights."""
    make, total, bins, genes = Maker(device), sum(lengths), 100, max(lengths)
    values, gene_ids = make.randn(total).abs(), make.ids(lengths, genes)
    shapes = ((bins,), (bins,), (bins, bins), (bins,), (bins, dim), (genes, dim))
    # Of the size that the model's initialisation gives them.
    sizes = (1.0, 1.0, bins**-0.5, bins**-0.5, 1.0, 1.0)
    weights = tuple(
        (size * make.randn(*shape)).to(DTYPES[dtype]).requires_grad_()
        for size, shape in zip(sizes, shapes, strict=True)
    )
    grad_out = make.randn(total, dim, dtype=DTYPES[dtype])

    def fused(values: Tensor, *weights: Tensor) -> Tensor:
        return expression_embedding(values, *weights[:5], gene_ids=gene_ids, gene_table=weights[5])

    def plain(values: Tensor, *weights: Tensor) -> Tensor:
        return baselines.embedding_unfused(values, gene_ids, *weights)

    def exact() -> tuple[Tensor, list[Tensor]]:
        leaves = [x.detach().double().requires_grad_() for x in weights]
        out = plain(values.double(), *leaves)
        return out.detach(), list(torch.autograd.grad(out, leaves, grad_out.double()))

    forward, backward = (factor * total for factor in _embedding_flops(bins, dim))
    ways = {"plain": lambda: plain(values, *weights), "xtg": lambda: on_triton(fused, values, *weights)}
    return _task("embedding", case, lengths, dtype, ways, weights, grad_out, exact, (forward, backward))


def _embedding_flops(bins: int, dim: int) -> tuple[int, int]:
    """Of one token, forward and backward; on a GPU equal values are not looked for."""
    return 2 * (bins + bins * bins + bins * dim), 2 * (2 * bins + 3 * bins * bins + 2 * bins * dim)


def favor(case: str, lengths: Lengths, dtype: str, device: torch.device, *, heads: int = 8, head_dim: int = 64) -> Task:
    """favor_attention with as many features as the 100m decoder has."""
    make, longest, features = Maker(device), max(lengths), 266 if head_dim == 64 else 2 * head_dim
    cu_seqlens, total = offsets(lengths).to(device), sum(lengths)
    q, k, v = make.randn(total, 3, heads, head_dim, dtype=DTYPES[dtype]).requires_grad_().unbind(1)
    projection = make.randn(features, head_dim)
    grad_out = make.randn(total, heads, head_dim, dtype=DTYPES[dtype])
    rest = (projection, cu_seqlens, longest)

    product = 2 * heads * features * head_dim * total
    ways = {
        "plain": lambda: baselines.favor_einsum(q, k, v, projection.to(q.dtype), lengths, lengths, FAVOR_EPS),
        "xtg": lambda: on_triton(favor_attention, q, k, v, *rest),
    }
    return _task(
        "favor", case, lengths, dtype, ways, (q, k, v), grad_out,
        lambda: baselines.exact_favor(q, k, v, projection, grad_out, lengths, lengths, FAVOR_EPS),
        (4 * product, 8 * product),
    )  # fmt: skip


def gather(case: str, lengths: Lengths, dtype: str, device: torch.device, *, num_genes: int, dim: int = 512) -> Task:
    """masked_decoder_gather of all genes of every cell, a tenth of the expressed ones masked."""
    make = Maker(device)
    expressed = make.ids(lengths, num_genes)
    masked = torch.zeros(len(expressed), dtype=torch.bool, device=device)
    masked[::10] = True
    cell = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def ragged(chosen: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.bincount(cell[chosen], minlength=len(lengths))
        return F.pad(counts.cumsum(0), (1, 0)).int(), expressed[chosen]

    (cu_seqlens, gene_ids), (masked_cu_seqlens, masked_ids) = ragged(~masked), ragged(masked)
    shapes = ((num_genes, dim), (dim,), (dim,), (len(gene_ids), dim))
    inputs = tuple(make.randn(*shape, dtype=DTYPES[dtype]).requires_grad_() for shape in shapes)
    rest = (cu_seqlens, gene_ids, masked_ids, masked_cu_seqlens)
    grad_out = make.randn(len(lengths), num_genes, dim, dtype=DTYPES[dtype])

    def plain() -> Tensor:
        table, zero_row, mask_row, encoded = inputs
        known = zero_row.expand(len(lengths) * num_genes, dim).clone()
        known[cell[masked] * num_genes + masked_ids] = mask_row
        known[cell[~masked] * num_genes + gene_ids] = encoded
        return table + known.view(len(lengths), num_genes, dim)

    def exact() -> tuple[Tensor, list[Tensor]]:
        return reference_in_float64(masked_decoder_gather, inputs, grad_out, rest)

    ways = {"plain": plain, "xtg": lambda: on_triton(masked_decoder_gather, *inputs, *rest)}
    return _task("gather", case, lengths, dtype, ways, inputs, grad_out, exact, (0, 0))


def dropped(case: str, lengths: Lengths, dtype: str, device: torch.device, *, dim: int = 768) -> Task:
    """dropout of a tenth, added to a residual; PyTorch's draws another mask, so that plain has that of the op."""
    make, total = Maker(device), sum(lengths)
    inputs = tuple(make.randn(total, dim, dtype=DTYPES[dtype]).requires_grad_() for _ in range(2))
    grad_out = make.randn(total, dim, dtype=DTYPES[dtype])
    row_ids, seed = torch.arange(total, device=device), torch.tensor(1, device=device)
    mask, scale = kept(row_ids, seed, 0, 0.1, dim), threshold_and_scale(0.1)[1]

    def masked(x: Tensor, residual: Tensor) -> Tensor:
        return residual + torch.where(mask, x * scale, 0.0)

    def exact() -> tuple[Tensor, list[Tensor]]:
        leaves = [leaf.detach().double().requires_grad_() for leaf in inputs]
        out = masked(*leaves)
        return out.detach(), list(torch.autograd.grad(out, leaves, grad_out.double()))

    def fused(x: Tensor, residual: Tensor) -> Tensor:
        return dropout(x, 0.1, row_ids, seed, residual=residual)

    ways = {"plain": lambda: masked(*inputs), "xtg": lambda: on_triton(fused, *inputs)}
    return _task("dropout", case, lengths, dtype, ways, inputs, grad_out, exact, (0, 0))


def head(case: str, lengths: Lengths, dtype: str, device: torch.device, *, dim: int = 512) -> Task:
    """masked_mse at every third row."""
    make, total = Maker(device), sum(lengths)
    x = make.randn(total, dim, dtype=DTYPES[dtype]).requires_grad_()
    rows = torch.arange(0, total, 3, device=device)
    target = make.randn(len(rows))
    params = tuple(make.randn(size).requires_grad_() for size in (dim, dim, dim, dim, dim, 1))
    inputs, grad_out = (x, *params), torch.ones(1, device=device)

    def squared_error(x: Tensor, params: Sequence[Tensor], target: Tensor) -> Tensor:
        norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias = params
        middle = F.layer_norm(x[rows].to(weight.dtype), (dim,), norm1_weight, norm1_bias)
        predictions = F.linear(F.layer_norm(middle, (dim,), norm2_weight, norm2_bias), weight[None], bias)[:, 0]
        return F.mse_loss(predictions, target, reduction="sum")[None]

    def exact() -> tuple[Tensor, list[Tensor]]:
        leaves = [leaf.detach().double().requires_grad_() for leaf in inputs]
        out = squared_error(leaves[0], leaves[1:], target.double())
        return out.detach(), list(torch.autograd.grad(out, leaves, grad_out.double()))

    ways = {
        "plain": lambda: squared_error(x, params, target),
        "xtg": lambda: on_triton(masked_mse, x, rows, target, *params)[None],
    }
    flops = 2 * len(rows) * dim
    return _task("head", case, lengths, dtype, ways, inputs, grad_out, exact, (flops, 3 * flops))
