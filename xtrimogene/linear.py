"""Linear layers by blocks of rows through oneDNN, with bias and ReLU in the product and the weight packed once.

torch.nn.functional.linear on a CPU copies the bias into the output first, and a (total_nnz, 4 dim) output is new memory
that the system hands out page by page: on a machine with AMX that takes as long as a bfloat16 product itself. Here the
rows go through in blocks, and a block's memory is the one that the last block freed.
In float32 this is also the way around MKL, which is slow on some CPUs.

The oneDNN ops of PyTorch that it takes are internal ones, made for torch.compile. They are used only where they exist
and give the right numbers on a small example (asked once in a process); otherwise the same blocks go through
torch.nn.functional.linear.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula

# Bytes of the widest tensor of a block: for each thread, and at most for all of them. Smaller blocks would fit caches
# better, but threads that meet more often wait more for each other on a busy machine. From 32 MB on glibc gives every
# tensor new memory.
_BLOCK_BYTES = 8 << 20
_MAX_BLOCK_BYTES = 24 << 20
# oneDNN compiles, and keeps, kernels for every number of rows that it meets: blocks are multiples of a unit, and what
# is left at the end goes by powers of two.
_UNIT_ROWS = 64
_MIN_UNITS = 4
# Below this the memory of a layer's widest tensor is used again from call to call, and blocks only add calls.
_LARGE_BYTES = 16 << 20
# Where oneDNN is the faster one it is so from the rows on that earn back the packing of the weight.
_PACKING_PAYS_ROWS = 512


def is_large(rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a (rows, width) tensor is so large that going by blocks of rows is faster."""
    if rows * width * dtype.itemsize >= _LARGE_BYTES:
        return True
    return dtype == torch.float32 and rows >= _PACKING_PAYS_ROWS and onednn_takes(dtype) and _mkl_is_slow()


def row_blocks(total: int, width: int, dtype: torch.dtype) -> list[slice]:
    """Blocks of [0, total) rows, so small that the memory of (rows, width) of the dtype is used again.

    About equal multiples of 64 rows, and at the end powers of two below 64.
    """
    units = total // _UNIT_ROWS
    block_bytes = min(_BLOCK_BYTES * torch.get_num_threads(), _MAX_BLOCK_BYTES)
    limit = max(_MIN_UNITS, block_bytes // (width * dtype.itemsize * _UNIT_ROWS))
    parts = -(-units // limit)
    ends = [units * i // parts * _UNIT_ROWS for i in range(1, parts + 1)]
    end = units * _UNIT_ROWS
    while end < total:
        end += 1 << (total - end).bit_length() - 1
        ends.append(end)
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


def row_linear(weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> Callable[[Tensor], Tensor]:
    """The layer x -> F.linear(x, weight, bias), then ReLU if asked for, ready for many blocks of rows.

    weight (out, in) and bias (out,) of one dtype on the CPU; the layer takes x (rows, in) of that dtype and returns a
    new (rows, out). Without autograd. It holds a packed copy of the weight: make a new one when the weight changes.
    """
    if not onednn_takes(weight.dtype):
        return lambda x: F.relu(F.linear(x, weight, bias), inplace=True) if relu else F.linear(x, weight, bias)
    return _onednn_linear(weight, bias, relu)


def _onednn_linear(weight: Tensor, bias: Tensor | None, relu: bool) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _UNIT_ROWS)
    bias = None if bias is None else bias.detach().contiguous()
    after = "relu" if relu else "none"
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, after, [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear(x, weight, bias) with gradients to all three, by blocks of rows; differentiable once.

    x (rows, in), weight (out, in) and bias (out,) of one dtype on the CPU.
    """
    return _Linear.apply(x, weight, bias)


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dropout: float = 0.0) -> Tensor:
    """F.linear(F.dropout(F.relu(F.linear(x, w1, b1)), dropout), w2, b2), with gradients to all five, by blocks of rows.

    x (rows, dim), w1 (ffn_dim, dim), b1 (ffn_dim,), w2 (dim, ffn_dim), b2 (dim,), of one dtype on the CPU. Only the
    dropped-out hidden rows are kept for the backward: they are positive where the gradient passes. Differentiable once.
    """
    return _FeedForward.apply(x, w1, b1, w2, b2, dropout)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layer, out = row_linear(weight, bias), x.new_empty((len(x), len(weight)))
        for block in row_blocks(len(x), len(weight), x.dtype):
            out[block] = layer(x[block])
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer, grad_x = row_linear(weight.t(), None), x.new_empty(x.shape)
        grads = _LinearGrads(weight, ctx.needs_input_grad[1:3])
        for block in row_blocks(len(x), len(weight), x.dtype):
            if ctx.needs_input_grad[0]:
                grad_x[block] = layer(grad_out[block])
            grads.add(grad_out[block], x[block])
        return grad_x if ctx.needs_input_grad[0] else None, *grads.sums()


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dropout: float) -> Tensor:
        linear1, linear2 = row_linear(w1, b1, relu=True), row_linear(w2, b2)
        hidden, out = x.new_empty((len(x), len(w1))), x.new_empty((len(x), len(w2)))
        for block in row_blocks(len(x), len(w1), x.dtype):
            rows = linear1(x[block])
            if dropout:
                rows = F.dropout(rows, dropout)
            hidden[block] = rows
            out[block] = linear2(rows)
        ctx.save_for_backward(x, hidden, w1, w2)
        ctx.dropout = dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, w1, w2 = ctx.saved_tensors
        linear1, linear2 = row_linear(w1.t(), None), row_linear(w2.t(), None)
        grad_x = x.new_empty(x.shape)
        grads1, grads2 = _LinearGrads(w1, ctx.needs_input_grad[1:3]), _LinearGrads(w2, ctx.needs_input_grad[3:5])
        for block in row_blocks(len(x), len(w1), x.dtype):
            grad_rows = grad_out[block]
            grad_hidden = torch.ops.aten.threshold_backward(linear2(grad_rows), hidden[block], 0)
            if ctx.dropout:
                grad_hidden.mul_(1 / (1 - ctx.dropout))
            if ctx.needs_input_grad[0]:
                grad_x[block] = linear1(grad_hidden)
            grads1.add(grad_hidden, x[block])
            grads2.add(grad_rows, hidden[block])
        return grad_x if ctx.needs_input_grad[0] else None, *grads1.sums(), *grads2.sums(), None


class _LinearGrads:
    """Gradients of a weight and its bias, summed over blocks of rows in float32."""

    def __init__(self, weight: Tensor, needed: tuple[bool, bool]) -> None:
        self.dtype, wide = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
        self.weight = weight.new_zeros(weight.shape, dtype=wide) if needed[0] else None
        self.bias = weight.new_zeros(weight.shape[:1], dtype=wide) if needed[1] else None

    def add(self, grad_rows: Tensor, x_rows: Tensor) -> None:
        if self.weight is not None:
            if self.dtype == torch.float32 and onednn_takes(self.dtype):
                # torch.mm would go to MKL; here that is the slow one.
                self.weight.add_(row_linear(x_rows.t(), None)(grad_rows.t().contiguous()))
            else:
                self.weight.add_(torch.mm(grad_rows.t(), x_rows))
        if self.bias is not None:
            self.bias.add_(grad_rows.sum(0, dtype=self.bias.dtype))

    def sums(self) -> tuple[Tensor | None, Tensor | None]:
        return tuple(None if x is None else x.to(self.dtype) for x in (self.weight, self.bias))  # type: ignore[return-value]


def pays_in_training(dtype: torch.dtype) -> bool:
    """Whether ``linear`` and ``feed_forward`` are faster than PyTorch's own layers here.

    bfloat16: wherever oneDNN is taken. float32: where MKL is slow.
    """
    if not onednn_takes(dtype):
        return False
    return dtype == torch.bfloat16 or (dtype == torch.float32 and _mkl_is_slow())


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether PyTorch's float32 products go to MKL on a CPU not made by Intel, where it leaves AVX-512 alone.

    A fact of the machine, not a race: a run that is resumed in another process has to take the same way, bit for bit.
    """
    return torch.backends.mkl.is_available() and _cpu_vendor() not in ("GenuineIntel", "")


def _cpu_vendor() -> str:
    """vendor_id of the first processor; empty where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return ""


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether linear layers of a dtype go through oneDNN here; torch.backends.mkldnn.flags(enabled=False) says no."""
    return bool(torch.backends.mkldnn.enabled) and _onednn_works(dtype)


@functools.cache
def _onednn_works(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    # On a thread of its own: the caller may be counting FLOPs or recording gradients, which is a state of its thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_gives_right_numbers, dtype).result()


def _gives_right_numbers(dtype: torch.dtype) -> bool:
    # Sines: a fixed example that leaves the random state alone.
    x, weight, bias = (torch.arange(n).sin().to(dtype) for n in (33 * 48, 40 * 48, 40))
    x, weight = x.view(33, 48), weight.view(40, 48)
    try:
        with torch.no_grad():
            got = [_onednn_linear(weight, bias, True)(x), _onednn_linear(weight, None, False)(x)]
    except (AttributeError, RuntimeError, TypeError):
        return False
    exact = F.linear(x.double(), weight.double())
    tolerance = 10 * torch.finfo(dtype).eps
    return all(
        a.dtype == dtype and torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance)
        for a, b in zip(got, [F.relu(exact + bias), exact], strict=True)
    )


def _linear_flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(x_shape[:-1]) * weight_shape[0] * weight_shape[1]


# FlopCounterMode counts the internal op as it counts F.linear. A counter takes the formulas when it is made: not later
# than this import.
if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_linear_flops)
