"""Triton kernels with every tensor flush against an unreadable page: an access past an end kills the process.

Run in the interpreter, in a process of its own. Reads of a neighbouring cell do not show here; NaN-poisoned neighbours
in the other test files show those.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

_PAGE = mmap.PAGESIZE
_new_empty = torch.empty
# The guarded buffers must outlive their tensors' use by the kernels.
_buffers: list[mmap.mmap] = []


def guarded_empty(shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """torch.empty whose last byte is the last byte before a page that must not be touched."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(shape)
    if count == 0:
        return _new_empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    pages = -(-size // _PAGE)
    buffer = mmap.mmap(-1, (pages + 1) * _PAGE)
    _buffers.append(buffer)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages * _PAGE), _PAGE, no_access) == 0
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=pages * _PAGE - size).view(shape)


def guarded(x: Tensor) -> Tensor:
    """A copy of x against an unreadable page."""
    return guarded_empty(tuple(x.shape), x.dtype).copy_(x)


def run_attention(lengths: list[int], slack: int, head_dim: int) -> None:
    """Forward and backward with guarded inputs, outputs and work list."""
    from xtg_kernels.ops.ragged_attention import triton_kernel

    work_list = triton_kernel.work_list

    def guarded_work_list(*args: Any) -> tuple[Tensor, Tensor, int]:
        segment_of_slot, segments, num_slots = work_list(*args)
        return guarded(segment_of_slot), guarded(segments), num_slots

    triton_kernel.work_list = guarded_work_list
    total, heads = sum(lengths) + slack, 2
    q, k, v, grad_out = (guarded(torch.randn(total, heads, head_dim)) for _ in range(4))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    out, lse = triton_kernel.forward(q, k, v, cu_seqlens, max(lengths), 0.3)
    triton_kernel.backward(grad_out, guarded(lse), q, k, v, out, lse, cu_seqlens, max(lengths), 0.3)


def run_favor(lengths: list[tuple[int, int]], slack: int, head_dim: int, features: int) -> None:
    """Forward and backward with guarded inputs, outputs, parts and work list."""
    from xtg_kernels.ops.favor_attention import triton_kernel

    work_list = triton_kernel.work_list

    def guarded_work_list(*args: Any) -> tuple[Tensor, Tensor, int]:
        segment_of_slot, segments, num_slots = work_list(*args)
        return guarded(segment_of_slot), guarded(segments), num_slots

    triton_kernel.work_list = guarded_work_list
    triton_kernel._CHUNK = 32
    scaled = triton_kernel._scaled
    triton_kernel._scaled = lambda projection, dtype: (
        guarded(scaled(projection, dtype)[0]),
        scaled(projection, dtype)[1],
    )
    keys, queries = (torch.tensor([pair[i] for pair in lengths]) for i in range(2))
    cu_seqlens, cu_seqlens_q = (guarded(F.pad(n.cumsum(0), (1, 0)).int()) for n in (keys, queries))
    k, v = (guarded(torch.randn(int(keys.sum()) + slack, 2, head_dim)) for _ in range(2))
    q, grad_out = (guarded(torch.randn(int(queries.sum()) + slack, 2, head_dim)) for _ in range(2))
    projection = guarded(torch.randn(features, head_dim))
    segments = (cu_seqlens, int(keys.max()), cu_seqlens_q, int(queries.max()), 1e-3)
    saved = triton_kernel.forward(q, k, v, projection, *segments, True)
    triton_kernel.backward(grad_out, q, k, v, projection, *saved, *segments)


def run_embedding(total: int, slack: int, num_bins: int, dim: int) -> None:
    """Forward and backward with guarded inputs and outputs, with a gene table and slack rows."""
    from xtg_kernels.ops.expression_embedding import triton_kernel

    w1, b1, b2 = (guarded(torch.randn(num_bins)) for _ in range(3))
    w2, bin_table = guarded(torch.randn(num_bins, num_bins)), guarded(torch.randn(num_bins, dim))
    gene_table, gene_ids = guarded(torch.randn(5, dim)), torch.randint(0, 5, (total + slack,), dtype=torch.int32)
    gene_ids[-1] = 4
    gene_ids[total:] = 10**9
    index = torch.arange(total + slack, dtype=torch.int32)
    index[total:] = -1
    values, gene_ids, index = guarded(torch.rand(total + slack)), guarded(gene_ids), guarded(index)
    args = (values, w1, b1, w2, b2, bin_table, 1.0, gene_ids, gene_table, index)
    triton_kernel.forward(*args)
    triton_kernel.backward(guarded(torch.randn(total + slack, dim)), *args, True)


def main() -> None:
    """All cases; a read past an end ends the process with SIGSEGV."""
    torch.empty = guarded_empty
    torch.empty_like = lambda x: guarded_empty(tuple(x.shape), x.dtype)
    run_attention([31, 0, 65, 4], 3, 24)
    run_attention([7], 0, 64)
    run_favor([(33, 7), (0, 5), (65, 40), (4, 0)], 3, 24, 35)
    run_favor([(5, 5)], 0, 64, 32)
    run_embedding(70, 3, 20, 12)
    run_embedding(33, 0, 130, 40)


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
def test_no_access_past_the_end_of_a_tensor() -> None:
    done = _run("from tests.xtg_kernels import test_triton_out_of_bounds as guard; guard.main(); print('all ran')")
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "all ran"


def test_the_page_behind_a_tensor_is_not_readable() -> None:
    done = _run(
        "import ctypes; from tests.xtg_kernels.test_triton_out_of_bounds import guarded_empty;"
        "x = guarded_empty((5,)); x[4] = 1.0; ctypes.c_float.from_address(x.data_ptr() + 20).value"
    )
    assert done.returncode < 0, "killed by a signal"
