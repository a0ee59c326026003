"""Triton kernels with every tensor flush against an unreadable page: an access past an end kills the process.

Run in the interpreter, in a process of its own. Reads of a neighbouring cell do not show here; NaN-poisoned neighbours
in the other test files show those.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
Guard = Callable[[Tensor], Tensor]
_PAGE = mmap.PAGESIZE
_new_empty = torch.empty
# The guarded buffers must outlive their tensors' use by the kernels.
_buffers: list[mmap.mmap] = []


def guarded_empty(shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """torch.empty whose last byte is the last byte before a page that must not be touched; what lies before it, and
    what it holds, is NaN (integers: -1)."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(shape)
    if count == 0:
        return _new_empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    pages = -(-size // _PAGE)
    buffer = mmap.mmap(-1, (pages + 1) * _PAGE)
    buffer.write(b"\xff" * (pages * _PAGE))
    _buffers.append(buffer)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages * _PAGE), _PAGE, no_access) == 0
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=pages * _PAGE - size).view(shape)


def guarded(x: Tensor) -> Tensor:
    """A copy of x against an unreadable page."""
    return guarded_empty(tuple(x.shape), x.dtype).copy_(x)


def run_attention(guard: Guard, lengths: list[int], slack: int, head_dim: int) -> list[Tensor]:
    """Forward and backward with guarded inputs, outputs and work list."""
    from xtg_kernels import triton_launch
    from xtg_kernels.ops.ragged_attention import triton_kernel

    def guarded_work_list(*args: Any) -> triton_launch.WorkList:
        segment_of_slot, segments, num_slots = triton_launch.work_list(*args)
        return guard(segment_of_slot), guard(segments), num_slots

    total, heads = sum(lengths) + slack, 2
    q, k, v, grad_out = (guard(_random(i, total, heads, head_dim)) for i in range(4))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    with mock.patch.object(triton_kernel, "work_list", guarded_work_list):
        out, lse = triton_kernel.forward(q, k, v, cu_seqlens, max(lengths), 0.3)
        grads = triton_kernel.backward(grad_out, guard(lse), q, k, v, out, lse, cu_seqlens, max(lengths), 0.3)
    return [out, lse, *grads]


def run_favor(guard: Guard, lengths: list[tuple[int, int]], slack: int, head_dim: int, features: int) -> list[Tensor]:
    """Forward and backward with guarded inputs, outputs, parts and work list; lengths are (keys, queries)."""
    from xtg_kernels.ops.favor_attention import triton_kernel

    work_list, scaled = triton_kernel.work_list, triton_kernel._scaled

    def guarded_work_list(*args: Any) -> tuple[Tensor, Tensor, int]:
        segment_of_slot, segments, num_slots = work_list(*args)
        return guard(segment_of_slot), guard(segments), num_slots

    def guarded_scaled(*args: Any) -> tuple[Tensor, Any]:
        projection, factor = scaled(*args)
        return guard(projection), factor

    keys, queries = (torch.tensor([pair[i] for pair in lengths]) for i in range(2))
    cu_seqlens, cu_seqlens_q = (guard(F.pad(n.cumsum(0), (1, 0)).int()) for n in (keys, queries))
    k, v = (guard(_random(i, int(keys.sum()) + slack, 2, head_dim)) for i in range(2))
    q, grad_out = (guard(_random(2 + i, int(queries.sum()) + slack, 2, head_dim)) for i in range(2))
    projection = guard(_random(4, features, head_dim))
    segments = (cu_seqlens, int(keys.max()), cu_seqlens_q, int(queries.max()), 1e-3)
    with (
        mock.patch.object(triton_kernel, "work_list", guarded_work_list),
        mock.patch.object(triton_kernel, "_scaled", guarded_scaled),
        mock.patch.object(triton_kernel, "_CHUNK", 32),
    ):
        saved = triton_kernel.forward(q, k, v, projection, *segments, True)
        return [*saved, *triton_kernel.backward(grad_out, q, k, v, projection, *saved, *segments)]


def run_embedding(guard: Guard, total: int, slack: int, num_bins: int, dim: int) -> list[Tensor]:
    """Forward and backward with guarded inputs and outputs, with a gene table and slack rows."""
    from xtg_kernels.ops.expression_embedding import triton_kernel

    shapes = ((num_bins,), (num_bins,), (num_bins, num_bins), (num_bins,), (num_bins, dim), (5, dim))
    w1, b1, w2, b2, bin_table, gene_table = (guard(_random(i, *shape)) for i, shape in enumerate(shapes))
    gene_ids = torch.arange(total + slack, dtype=torch.int32) % 5
    gene_ids[-1] = 4
    gene_ids[total:] = 10**9
    index = torch.arange(total + slack, dtype=torch.int32)
    index[total:] = -1
    values, gene_ids, index = guard(_random(7, total + slack).abs()), guard(gene_ids), guard(index)
    args = (values, w1, b1, w2, b2, bin_table, 1.0, gene_ids, gene_table, index)
    out = triton_kernel.forward(*args)
    return [out, *triton_kernel.backward(guard(_random(8, total + slack, dim)), *args, True)]


CASES: list[Callable[[Guard], list[Tensor]]] = [
    functools.partial(run_attention, lengths=[31, 0, 65, 4], slack=3, head_dim=24),
    functools.partial(run_attention, lengths=[7], slack=0, head_dim=64),
    functools.partial(run_favor, lengths=[(33, 7), (0, 5), (65, 40), (4, 0)], slack=3, head_dim=24, features=35),
    functools.partial(run_favor, lengths=[(5, 5)], slack=0, head_dim=64, features=32),
    functools.partial(run_embedding, total=70, slack=3, num_bins=20, dim=12),
    functools.partial(run_embedding, total=33, slack=0, num_bins=130, dim=40),
]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def main(architecture: str) -> None:
    """All cases with the tile sizes of an architecture; a read past an end ends the process with SIGSEGV, one before a
    start shows in the results. Prints the kernels that ran."""
    from triton.runtime.interpreter import InterpretedFunction

    from xtg_kernels.triton_launch import overriding

    ran: set[str] = set()
    run = InterpretedFunction.run

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran.add(f"{self.fn.__module__.split('.')[-2]}.{self.fn.__name__}")
        return run(self, *args, **kwargs)

    InterpretedFunction.run = noting
    with overriding(architecture=architecture), np.errstate(all="ignore"):
        wanted = [case(lambda x: x) for case in CASES]
        torch.empty = guarded_empty
        torch.empty_like = lambda x: guarded_empty(tuple(x.shape), x.dtype)
        for case, want in zip(CASES, wanted, strict=True):
            for got, plain in zip(case(guarded), want, strict=True):
                assert torch.equal(got, plain), case
    print(" ".join(sorted(ran)))


def kernels_of_all_ops() -> set[str]:
    """op.function of everything that a module of kernels can launch."""
    found = set()
    for path in sorted((ROOT / "xtg_kernels" / "ops").glob("*/triton_kernel.py")):
        names = re.findall(r"^def (_\w+_kernel)\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        found |= {f"{path.parent.name}.{name}" for name in names}
    return found


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@pytest.mark.parametrize("architecture", ["default", "sm_90"])
def test_no_kernel_reads_or_writes_past_the_ends_of_a_tensor(architecture: str) -> None:
    done = _run(f"from tests.xtg_kernels import test_triton_out_of_bounds as guard; guard.main({architecture!r})")
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    assert set(done.stdout.split()) == kernels_of_all_ops()


def test_the_page_behind_a_tensor_is_not_readable() -> None:
    done = _run(
        "import ctypes; from tests.xtg_kernels.test_triton_out_of_bounds import guarded_empty;"
        "x = guarded_empty((5,)); x[4] = 1.0; ctypes.c_float.from_address(x.data_ptr() + 20).value"
    )
    assert done.returncode < 0, "killed by a signal"
