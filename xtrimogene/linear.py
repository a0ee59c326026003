"""Linear layers by blocks of rows through oneDNN, with bias and ReLU in the product and the weight packed once.

torch.nn.functional.linear on a CPU copies the bias into the output first, and a (total_nnz, 4 dim) output is new memory
that the system hands out page by page: on a machine with AMX that takes as long as a bfloat16 product itself. Here the
rows go through in blocks whose widest tensor stays in cache, and a block's memory is the one that the last block freed.
In float32 this is also the way around MKL, which is slow on some CPUs.

The oneDNN ops of PyTorch that it takes are internal ones, made for torch.compile. They are used only where they exist
and give the right numbers on a small example (asked once in a process); otherwise the same blocks go through
torch.nn.functional.linear.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

# Bytes of the widest tensor of a block, for each thread: about what second-level caches hold.
_BLOCK_BYTES = 3 << 20
# oneDNN compiles, and keeps, kernels for every number of rows that it meets: blocks are multiples of a unit, and what
# is left at the end goes by powers of two.
_UNIT_ROWS = 64
_MIN_UNITS = 4


def row_blocks(total: int, width: int, dtype: torch.dtype) -> list[slice]:
    """Blocks of [0, total) rows, so small that (rows, width) of the dtype stays in the caches.

    About equal multiples of 64 rows, and at the end powers of two below 64.
    """
    units = total // _UNIT_ROWS
    limit = max(_MIN_UNITS, _BLOCK_BYTES * torch.get_num_threads() // (width * dtype.itemsize * _UNIT_ROWS))
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
    _count_flops()
    exact = F.linear(x.double(), weight.double())
    tolerance = 10 * torch.finfo(dtype).eps
    return all(
        a.dtype == dtype and torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance)
        for a, b in zip(got, [F.relu(exact + bias), exact], strict=True)
    )


def _count_flops() -> None:
    """Makes FlopCounterMode count the internal op as it counts F.linear, unless PyTorch does so itself."""
    op = torch.ops.mkldnn._linear_pointwise
    if op not in flop_registry:
        register_flop_formula(op)(_linear_flops)


def _linear_flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    rows = 1
    for n in x_shape[:-1]:
        rows *= n
    return 2 * rows * weight_shape[0] * weight_shape[1]
