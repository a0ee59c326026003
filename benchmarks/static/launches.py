"""What each op launches: its kernels, the tile sizes that come into question, and calls that run them.

Shared by all that compiles, tunes or times the Triton kernels. A new op enters OPS, and every tool knows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.static import model
from benchmarks.static.model import Shape, Work
from xtg_kernels.ops.dropout import triton_kernel as dropout
from xtg_kernels.ops.expression_embedding import triton_kernel as expression_embedding
from xtg_kernels.ops.favor_attention import triton_kernel as favor_attention
from xtg_kernels.ops.masked_decoder_gather import triton_kernel as masked_decoder_gather
from xtg_kernels.ops.masked_head import triton_kernel as masked_head
from xtg_kernels.ops.ragged_attention import triton_kernel as ragged_attention
from xtg_kernels.triton_launch import Config
from xtrimogene.bench.tasks import Lengths, offsets

Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]
Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Kernel:
    """One kernel of an op.

    direction   "forward" or "backward": the call that launches it
    candidates  (precision, width) -> tile sizes, num_warps and num_stages worth compiling
    work        (config, shape) -> what its programs do, for the static model; None for a kernel with one candidate
    has_dot     whether it has a matrix product
    has_rows    whether it reads rows of channels, 16 bytes at a time
    """

    direction: str
    candidates: Callable[[str, int], list[Config]]
    work: Callable[[Config, Shape], Work] | None = None
    has_dot: bool = True
    has_rows: bool = True


@dataclass(frozen=True)
class Op:
    """One op.

    kernels  name -> Kernel
    sizes    width that configs.json is keyed by -> a size that models have and that is padded to it
    usual    the width of the 100m model
    calls    (dtype, size, lengths, device) -> forward and backward, to be called in this order; they return tensors
    """

    kernels: Mapping[str, Kernel]
    sizes: Mapping[int, int]
    usual: int
    calls: Callable[[torch.dtype, int, Lengths, torch.device], dict[str, Call]]

    def on_small_tensors(self, dtype: torch.dtype, size: int, device: str = "cpu") -> Call:
        """Forward and backward on few tokens; on the CPU for recording."""
        calls = self.calls(dtype, size, (100, 156), torch.device(device))
        return lambda: [*calls["forward"](), *calls["backward"]()]


def record_launches(call: Call) -> list[tuple[str, Launch]]:
    """Name (without _kernel) and launch of every kernel, once for each set of flags, that a call would run; none is
    run."""
    launches: dict[tuple[str, ...], tuple[str, Launch]] = {}

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = self.__name__.strip("_").removesuffix("_kernel")
        launches.setdefault((name, *flags_of(kwargs)), (name, (self, args, kwargs)))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return list(launches.values())


def flags_of(kwargs: Mapping[str, Any]) -> list[str]:
    """The conditions that a launch compiles in."""
    return [name for name, value in kwargs.items() if name.isupper() and value is True]


def _configs(*rows: tuple[int, ...], names: str) -> list[Config]:
    keys = [*names.split(), "num_warps", "num_stages"]
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _attention_forward(precision: str, width: int) -> list[Config]:
    half = ((128, 64, 8, 3), (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 3), *_if_narrow(width, (64, 128, 4, 2)))
    single = ((64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1))
    return _configs(*(half if precision == "half" else single), names="BLOCK_Q BLOCK_K")


def _attention_grad_query(precision: str, width: int) -> list[Config]:
    half = ((64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), *_if_narrow(width, (64, 128, 4, 2)))
    single = ((64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1))
    return _configs(*(half if precision == "half" else single), names="BLOCK_Q BLOCK_K")


def _attention_grad_key_value(precision: str, width: int) -> list[Config]:
    half = (
        (32, 128, 8, 2),
        (64, 128, 8, 2),
        (64, 64, 4, 2),
        (64, 64, 8, 2),
        (32, 64, 8, 2),
        (32, 64, 4, 2),
        *_if_narrow(width, (64, 32, 4, 2), (128, 64, 4, 2)),
    )
    single = ((32, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1))
    return _configs(*(half if precision == "half" else single), names="BLOCK_Q BLOCK_K")


def _if_narrow(width: int, *rows: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """A row of 16 channels is two loads of 16 bytes: of a short tile not every thread has one."""
    return rows if width == 16 else ()


def _attention_calls(dtype: torch.dtype, head_dim: int, lengths: Lengths, device: torch.device) -> dict[str, Call]:
    """Views of a packed qkv, two heads on the CPU (to be recorded) and twelve on a card."""
    heads = 2 if device.type == "cpu" else 12
    total, longest, scale = sum(lengths), max(lengths), head_dim**-0.5
    q, k, v = torch.randn((total, 3, heads, head_dim), device=device).to(dtype).unbind(1)
    grad_out = torch.randn((total, heads, head_dim), device=device).to(dtype)
    cu_seqlens = offsets(lengths).to(device)
    saved: list[Tensor] = []

    def forward() -> list[Tensor]:
        saved[:] = ragged_attention.forward(q, k, v, cu_seqlens, longest, scale)
        return saved

    def backward() -> Sequence[Tensor]:
        out, softmax_lse = saved
        return ragged_attention.backward(grad_out, softmax_lse, q, k, v, out, softmax_lse, cu_seqlens, longest, scale)

    return {"forward": forward, "backward": backward}


def _embedding_forward(precision: str, width: int) -> list[Config]:
    half = ((64, 32, 64, 4, 2), (64, 32, 64, 8, 2), (128, 32, 64, 8, 2), (32, 32, 64, 4, 2))
    single = ((32, 32, 32, 8, 1), (16, 32, 32, 8, 1), (16, 16, 32, 8, 1))
    return _configs(*(half if precision == "half" else single), names="BLOCK_T BLOCK_H BLOCK_D")


def _embedding_grad_bin_table(precision: str, width: int) -> list[Config]:
    half = ((64, 32, 64, 8, 2), (64, 32, 128, 8, 2), (32, 32, 64, 8, 2), (32, 16, 64, 8, 2))
    single = ((32, 32, 32, 8, 1), (16, 32, 32, 8, 1), (16, 16, 32, 8, 1))
    return _configs(*(half if precision == "half" else single), names="BLOCK_T BLOCK_H BLOCK_D")


def _embedding_grad_weights(precision: str, width: int) -> list[Config]:
    wide = min(width, 128)
    half = (
        (16, 32, 64, wide, 8, 2),
        (64, 32, 64, wide, 8, 2),
        (64, 32, 64, 32, 8, 2),
        (64, 32, 64, 32, 4, 2),
        (64, 32, 32, 32, 8, 2),
        (16, 32, 64, 32, 8, 2),
        (16, 32, 32, 16, 8, 2),
    )
    single = ((32, 32, 32, 32, 8, 1), (16, 32, 32, 16, 8, 1), (16, 16, 16, 16, 8, 1))
    rows = dict.fromkeys(half if precision == "half" else single)
    return _configs(*rows, names="BLOCK_T BLOCK_H BLOCK_D BLOCK_W")


def _embedding_grad_gene_table(precision: str, width: int) -> list[Config]:
    return _configs((8, 256, 4, 2), names="BLOCK_T BLOCK_D")


def _embedding_calls(dtype: torch.dtype, num_bins: int, lengths: Lengths, device: torch.device) -> dict[str, Call]:
    """With a gene table and slack rows; on a card as many genes and channels as the 100m model has."""
    total, (dim, genes) = sum(lengths), (256, 300) if device.type == "cpu" else (768, 19_265)
    values = torch.rand(total, device=device)
    gene_ids = torch.randint(0, genes, (total,), dtype=torch.int32, device=device)
    index = torch.arange(total, dtype=torch.int32, device=device)
    shapes = ((num_bins,), (num_bins,), (num_bins, num_bins), (num_bins,), (num_bins, dim))
    weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    gene_table = torch.randn((genes, dim), device=device).to(dtype)
    w1, b1, w2, b2, bin_table = weights
    arguments = (values, w1, b1, w2, b2, bin_table, 1.0, gene_ids, gene_table, index)
    grad_out = torch.randn((total, dim), device=device).to(dtype)
    return {
        "forward": lambda: [expression_embedding.forward(*arguments)],
        "backward": lambda: expression_embedding.backward(grad_out, *arguments, True),
    }


def _dropout_rows(precision: str, width: int) -> list[Config]:
    """16 channels for a thread: two loads of 16 bytes of half precision."""
    return _configs((16, 4, 1), names="BLOCK_R")


def _dropout_calls(dtype: torch.dtype, dim: int, lengths: Lengths, device: torch.device) -> dict[str, Call]:
    """Added to a residual, after ReLU, and alone, of the dtype that everything has."""
    total = sum(lengths)
    x, other = (torch.randn((total, dim), device=device).to(dtype) for _ in range(2))
    row_ids, seed = torch.arange(total, device=device), torch.ones((), dtype=torch.int64, device=device)
    mask = (row_ids, seed, 1, 0.1)

    def forward() -> Sequence[Tensor]:
        forms = ((other, False), (None, True), (None, False))
        return [dropout.forward(x, residual, *mask, relu) for residual, relu in forms]

    def backward() -> Sequence[Tensor]:
        return [dropout.backward(x, out, *mask, dtype) for out in (None, other)]

    return {"forward": forward, "backward": backward}


def _favor_sums(precision: str, width: int) -> list[Config]:
    narrow = _if_narrow(width, (64, 64, 2, 2))
    half = ((64, 64, 4, 2), (64, 128, 8, 2), (64, 32, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2), *narrow)
    single = ((32, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1))
    return _configs(*(half if precision == "half" else single), names="BLOCK_F BLOCK_T")


def _favor_rows(precision: str, width: int) -> list[Config]:
    half = (
        (128, 64, 8, 2),
        (64, 32, 4, 2),
        (64, 64, 4, 2),
        (128, 32, 8, 2),
        (64, 16, 4, 2),
        (64, 16, 8, 2),
        (32, 16, 4, 2),
        *_if_narrow(width, (64, 64, 2, 2), (32, 64, 4, 2)),
    )
    single = ((64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1))
    return _configs(*(half if precision == "half" else single), names="BLOCK_T BLOCK_F")


def _favor_sum_parts(precision: str, width: int) -> list[Config]:
    """16 bytes of float32, whatever the precision, for each of 256 threads."""
    return _configs((max(1024 // width, 32), 4, 1), names="BLOCK_F")


def _favor_key_max(precision: str, width: int) -> list[Config]:
    return _favor_sum_parts("float32", width)


def _favor_calls(dtype: torch.dtype, head_dim: int, lengths: Lengths, device: torch.device) -> dict[str, Call]:
    """As in a decoder, queries at all genes, with as many features as FAVOR+ takes, int(w ln w)."""
    heads = 2 if device.type == "cpu" else 8
    total, longest, eps = sum(lengths), max(lengths), 1e-4
    q, k, v = torch.randn((total, 3, heads, head_dim), device=device).to(dtype).unbind(1)
    grad_out = torch.randn((total, heads, head_dim), device=device).to(dtype)
    projection = torch.randn((int(head_dim * math.log(head_dim)), head_dim), device=device)
    cu_seqlens = offsets(lengths).to(device)
    segments = (cu_seqlens, longest, cu_seqlens, longest, eps, False)
    saved: list[Tensor] = []

    def forward() -> list[Tensor]:
        saved[:] = favor_attention.forward(q, k, v, projection, *segments)
        return saved

    def backward() -> Sequence[Tensor]:
        out, context, key_sum, key_max, row_max, row_sum = saved
        return favor_attention.backward(
            grad_out, q, k, v, projection, out, context, key_sum, key_max, row_max, row_sum, *segments
        )

    return {"forward": forward, "backward": backward}


def _gather_source(precision: str, width: int) -> list[Config]:
    return _configs((256, 4, 2), names="BLOCK")


def _gather_forward(precision: str, width: int) -> list[Config]:
    rows, channels = (16, width) if precision == "half" and width > 64 else _gather_tile(width)
    return _configs((rows, channels, 4, 2), names="BLOCK_R BLOCK_D")


def _gather_backward(precision: str, width: int) -> list[Config]:
    return _configs((*_gather_tile(width), 4, 2), names="BLOCK_R BLOCK_D")


def _gather_tile(width: int) -> tuple[int, int]:
    """16 bytes of half precision for each thread of four warps, of 64 threads where a card has those."""
    return (32, 64) if width == 64 else (16, 128)


def _gather_calls(dtype: torch.dtype, dim: int, lengths: Lengths, device: torch.device) -> dict[str, Call]:
    """All genes of every cell, 500 of them masked, and 200 asked genes of every cell."""
    genes = 600 if device.type == "cpu" else 19_264
    shapes = ((genes, dim), (dim,), (dim,), (sum(lengths), dim))
    table, zero_row, mask_row, encoded = (torch.randn(shape, device=device).to(dtype) for shape in shapes)

    def cells(starts: Lengths, ends: Lengths) -> tuple[Tensor, Tensor]:
        ids = torch.cat([torch.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        return ids.int().to(device), offsets(tuple(counts)).to(device)

    none = (0,) * len(lengths)
    gene_ids, cu_seqlens = cells(none, lengths)
    masked = cells(lengths, tuple(min(n + 500, genes) for n in lengths))
    # (out_genes, out_cu_seqlens)
    asked = cells(none, (200,) * len(lengths))
    indices = (cu_seqlens, gene_ids, *masked)
    grad_out = torch.randn((len(lengths), genes, dim), device=device).to(dtype)
    grad_asked = grad_out.flatten(0, 1)[: asked[0].numel()]

    def forward() -> Sequence[Tensor]:
        rows = (table, zero_row, mask_row, encoded, *indices)
        return [masked_decoder_gather.forward(*rows, *genes) for genes in ((None, None), asked)]

    def backward() -> Sequence[Tensor]:
        of_all = masked_decoder_gather.backward(grad_out, *indices, None, None, genes)
        return [*of_all, *masked_decoder_gather.backward(grad_asked, *indices, *asked, genes)]

    return {"forward": forward, "backward": backward}


def _head(precision: str, width: int) -> list[Config]:
    """16 channels for a thread, or 8."""
    rows, warps = max(2048 // width, 1), max(width // 512, 4)
    fewer = (rows // 2, warps, 2) if rows > 1 else (rows, 2 * warps, 2)
    return _configs((rows, warps, 2), fewer, names="BLOCK_N")


def _head_calls(dtype: torch.dtype, dim: int, lengths: Lengths, device: torch.device) -> dict[str, Call]:
    """Squared error at as many rows as there are tokens, chosen of twice as many, and the predictions there and at all
    rows; float32 parameters."""
    n = sum(lengths)
    x = torch.randn((2 * n, dim), device=device).to(dtype)
    rows, target = torch.arange(0, 2 * n, 2, dtype=torch.int32, device=device), torch.randn(n, device=device)
    norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight = (torch.randn(dim, device=device) for _ in range(5))
    params = (norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, torch.randn(1, device=device))
    grad_loss, grad_out = torch.ones((), device=device), torch.randn(2 * n, device=device)

    def forward() -> Sequence[Tensor]:
        predictions = (masked_head.masked_head(x, chosen, *params, 1e-5) for chosen in (rows, None))
        return [masked_head.masked_mse(x, rows, target, *params, 1e-5, True), *predictions]

    def backward() -> Sequence[Tensor]:
        return [
            *masked_head.masked_mse_backward(grad_loss, x, rows, target, *params, 1e-5, True),
            *masked_head.masked_head_backward(grad_out[:n], x, rows, *params, 1e-5),
            *masked_head.masked_head_backward(grad_out, x, None, *params, 1e-5),
        ]

    return {"forward": forward, "backward": backward}


OPS = {
    "ragged_attention": Op(
        kernels={
            "forward": Kernel("forward", _attention_forward, model.attention_forward),
            "grad_query": Kernel("backward", _attention_grad_query, model.attention_grad_query),
            "grad_key_value": Kernel("backward", _attention_grad_key_value, model.attention_grad_key_value),
        },
        sizes={16: 16, 32: 32, 64: 64, 128: 128},
        usual=64,
        calls=_attention_calls,
    ),
    "expression_embedding": Op(
        kernels={
            "forward": Kernel("forward", _embedding_forward, model.embedding_forward),
            "grad_bin_table": Kernel("backward", _embedding_grad_bin_table, model.embedding_grad_bin_table),
            "grad_weights": Kernel("backward", _embedding_grad_weights, model.embedding_grad_weights),
            "grad_gene_table": Kernel("backward", _embedding_grad_gene_table, has_dot=False),
        },
        sizes={32: 20, 128: 100, 256: 200},
        usual=128,
        calls=_embedding_calls,
    ),
    "favor_attention": Op(
        kernels={
            "context": Kernel("forward", _favor_sums, model.favor_context),
            # Sums float32 in every precision.
            "sum_parts": Kernel("forward", _favor_sum_parts, has_dot=False),
            "query": Kernel("forward", _favor_rows, model.favor_query),
            "grad_query": Kernel("backward", _favor_rows, model.favor_grad_query),
            "grad_context": Kernel("backward", _favor_sums, model.favor_grad_context),
            "grad_key_value": Kernel("backward", _favor_rows, model.favor_grad_key_value),
            # Once a segment and head.
            "grad_key_max": Kernel("backward", _favor_key_max, has_dot=False, has_rows=False),
        },
        sizes={16: 16, 32: 32, 64: 64, 128: 128},
        usual=64,
        calls=_favor_calls,
    ),
    "masked_decoder_gather": Op(
        kernels={
            "source": Kernel("forward", _gather_source, has_dot=False, has_rows=False),
            "forward": Kernel("forward", _gather_forward, has_dot=False),
            "backward": Kernel("backward", _gather_backward, has_dot=False),
            "grad_table": Kernel("backward", _gather_backward, has_dot=False),
        },
        sizes={64: 40, 128: 128, 256: 512},
        usual=256,
        calls=_gather_calls,
    ),
    "masked_head": Op(
        kernels={
            "forward": Kernel("forward", _head, has_dot=False),
            "backward": Kernel("backward", _head, has_dot=False),
        },
        sizes={128: 128, 512: 512, 4096: 4096},
        usual=512,
        calls=_head_calls,
    ),
    "dropout": Op(
        kernels={
            "forward": Kernel("forward", _dropout_rows, has_dot=False),
            "backward": Kernel("backward", _dropout_rows, has_dot=False),
        },
        # 128 channels at a time, whatever the width.
        sizes={128: 768},
        usual=128,
        calls=_dropout_calls,
    ),
}


def main() -> None:
    """Launches every kernel once for each precision, on small tensors of the GPU: for sanitizers."""
    for op in OPS.values():
        for dtype in (torch.bfloat16, torch.float32):
            for size in op.sizes.values():
                op.on_small_tensors(dtype, size, "cuda")()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
