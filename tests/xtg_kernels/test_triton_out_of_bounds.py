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
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import warm
from tests.interpreter import replace_language_once_a_launch
from tests.xtg_kernels.test_masked_decoder_gather import Cells, random_cells
from xtg_kernels.triton_launch import WorkList, overriding, work_list

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


def guarded_work_list(guard: Guard) -> Callable[..., WorkList]:
    """work_list with guarded tensors."""

    def make(*args: Any) -> WorkList:
        segment_of_slot, segments, num_slots = work_list(*args)
        return guard(segment_of_slot), guard(segments), num_slots

    return make


def run_attention(guard: Guard, lengths: list[int], slack: int, head_dim: int) -> list[Tensor]:
    """Forward and backward with guarded inputs, outputs and work list."""
    from xtg_kernels.ops.ragged_attention import triton_kernel

    total, heads = sum(lengths) + slack, 2
    q, k, v, grad_out = (guard(_random(i, total, heads, head_dim)) for i in range(4))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    with mock.patch.object(triton_kernel, "work_list", guarded_work_list(guard)):
        out, lse = triton_kernel.forward(q, k, v, cu_seqlens, max(lengths), 0.3)
        grads = triton_kernel.backward(grad_out, guard(lse), q, k, v, out, lse, cu_seqlens, max(lengths), 0.3)
    return [out, lse, *grads]


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


def run_favor(guard: Guard, lengths: list[tuple[int, int]], slack: int, head_dim: int, features: int) -> list[Tensor]:
    """Forward and backward of cells of (keys, queries), with guarded inputs, outputs, parts and work list."""
    from xtg_kernels.ops.favor_attention import triton_kernel

    def guarded_projection(projection: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
        rows, half_norm_scale = scaled(projection, dtype)
        return guard(rows), half_norm_scale

    scaled = triton_kernel._scaled
    keys, queries = (torch.tensor([pair[i] for pair in lengths]) for i in range(2))
    cu_seqlens, cu_seqlens_q = (guard(F.pad(n.cumsum(0), (1, 0)).int()) for n in (keys, queries))
    k, v = (guard(_random(i, int(keys.sum()) + slack, 2, head_dim)) for i in range(2))
    q, grad_out = (guard(_random(2 + i, int(queries.sum()) + slack, 2, head_dim)) for i in range(2))
    projection = guard(_random(4, features, head_dim))
    segments = (cu_seqlens, int(keys.max()), cu_seqlens_q, int(queries.max()), 1e-3, True)
    patches = {"work_list": guarded_work_list(guard), "_scaled": guarded_projection, "_CHUNK": 32}
    with mock.patch.multiple(triton_kernel, **patches):
        saved = triton_kernel.forward(q, k, v, projection, *segments)
        grads = triton_kernel.backward(grad_out, q, k, v, projection, *saved, *segments)
    return [saved[0], *grads]


def run_gather(guard: Guard, cells: Cells, slack: int, dim: int) -> list[Tensor]:
    """Forward and backward with guarded inputs, outputs and work tensors."""
    from xtg_kernels.ops.masked_decoder_gather import triton_kernel

    (cu_seqlens, gene_ids, masked_ids, masked_cu), keywords = cells.indices(slack)
    asked = (keywords.get("out_genes"), keywords.get("out_cu_seqlens"))
    indices = [None if x is None else guard(x) for x in (cu_seqlens, gene_ids, masked_ids, masked_cu, *asked)]
    shapes = [(cells.num_genes, dim), (dim,), (dim,), (cells.total_nnz + slack, dim)]
    out = triton_kernel.forward(*(guard(_random(i, *shape)) for i, shape in enumerate(shapes)), *indices)
    return [out, *triton_kernel.backward(guard(_random(5, *out.shape)), *indices, cells.num_genes)]


def run_head(guard: Guard, rows: list[int] | None, dim: int) -> list[Tensor]:
    """Forward and backward of both ops with guarded inputs, outputs and work tensors."""
    from xtg_kernels.ops.masked_head import triton_kernel

    x, chosen = guard(_random(0, 37, dim)), None if rows is None else guard(torch.tensor(rows))
    params = [guard(_random(i, size)) for i, size in enumerate((dim, dim, dim, dim, dim, 1))]
    n = 37 if rows is None else len(rows)
    target, grad_out, grad_loss = guard(_random(7, n)), guard(_random(8, n)), guard(_random(9, 1)).view(())
    return [
        triton_kernel.masked_head(x, chosen, *params, 1e-5),
        *triton_kernel.masked_head_backward(grad_out, x, chosen, *params, 1e-5),
        triton_kernel.masked_mse(x, chosen, target, *params, 1e-5, True),
        *triton_kernel.masked_mse_backward(grad_loss, x, chosen, target, *params, 1e-5, True),
    ]


def run_dropout(guard: Guard, rows: int, dim: int) -> list[Tensor]:
    """Forward and backward, alone, after ReLU and with a residual, with guarded inputs and outputs."""
    from xtg_kernels.ops.dropout import triton_kernel

    x, residual, grad_out = (guard(_random(i, rows, dim)) for i in range(3))
    mask = (guard(torch.arange(rows) << 32), guard(torch.tensor([7])).view(()), 3, 0.3)
    made = [
        triton_kernel.forward(x, other, *mask, relu) for other, relu in ((None, False), (None, True), (residual, False))
    ]
    grads = [triton_kernel.backward(grad_out, out, *mask, torch.float32) for out in (None, guard(made[1]))]
    return [*made, *grads]


CASES: list[Callable[[Guard], list[Tensor]]] = [
    functools.partial(run_attention, lengths=[31, 0, 65, 4], slack=3, head_dim=24),
    functools.partial(run_attention, lengths=[7], slack=0, head_dim=64),
    functools.partial(run_favor, lengths=[(33, 7), (0, 5), (65, 40), (4, 0)], slack=3, head_dim=24, features=35),
    functools.partial(run_favor, lengths=[(5, 5)], slack=0, head_dim=64, features=32),
    functools.partial(run_embedding, total=70, slack=3, num_bins=20, dim=12),
    functools.partial(run_embedding, total=33, slack=0, num_bins=130, dim=40),
    functools.partial(run_gather, cells=random_cells(37, [9, 0, 20], [8, 3, 0]), slack=0, dim=12),
    functools.partial(run_gather, cells=random_cells(37, [9, 0, 20], None, [12, 0, 37]), slack=3, dim=40),
    functools.partial(run_head, rows=[36, 0, 36, 7, 35], dim=40),
    functools.partial(run_head, rows=None, dim=12),
    functools.partial(run_dropout, rows=37, dim=12),
    functools.partial(run_dropout, rows=5, dim=300),
]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _with_guarded_results(function: Callable[..., Any]) -> Callable[..., Any]:
    """For what the kernels' hosts make of tensors besides torch.empty."""

    def call(*args: Any, **kwargs: Any) -> Any:
        results = function(*args, **kwargs)
        return guarded(results) if isinstance(results, Tensor) else tuple(guarded(x) for x in results)

    return call


def main(architecture: str) -> None:
    """All cases with the tile sizes of an architecture; a read past an end ends the process with SIGSEGV, one before a
    start shows in the results. Prints the kernels that ran."""
    from triton.runtime.interpreter import InterpretedFunction

    replace_language_once_a_launch()
    ran: set[str] = set()
    run = InterpretedFunction.run

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran.add(f"{self.fn.__module__.split('.')[-2]}.{self.fn.__name__}")
        return run(self, *args, **kwargs)

    InterpretedFunction.run = noting
    with overriding(architecture=architecture), np.errstate(all="ignore"):
        wanted = [case(lambda x: x) for case in CASES]
        for module, name in ((torch, "zeros"), (torch, "sort"), (torch, "searchsorted"), (Tensor, "new_zeros")):
            setattr(module, name, _with_guarded_results(getattr(module, name)))
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
    return subprocess.run([*warm.python(), "-c", code], capture_output=True, text=True, cwd=ROOT)


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
