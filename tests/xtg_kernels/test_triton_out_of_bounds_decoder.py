"""Triton kernels of the decoder's gather and head with every tensor flush against an unreadable page.

In the interpreter, in a process of its own; test_triton_out_of_bounds.py says what that shows and what it does not.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.xtg_kernels.test_masked_decoder_gather import Cells, random_cells
from tests.xtg_kernels.test_triton_out_of_bounds import guarded, guarded_empty


def run_gather(cells: Cells, slack: int, dim: int) -> None:
    """Forward and backward with guarded inputs, outputs and work tensors."""
    from xtg_kernels.ops.masked_decoder_gather import triton_kernel

    (cu_seqlens, gene_ids, masked_ids, masked_cu), keywords = cells.indices(slack)
    asked = (keywords.get("out_genes"), keywords.get("out_cu_seqlens"))
    indices = [None if x is None else guarded(x) for x in (cu_seqlens, gene_ids, masked_ids, masked_cu, *asked)]
    shapes = [(cells.num_genes, dim), (dim,), (dim,), (cells.total_nnz + slack, dim)]
    out = triton_kernel.forward(*(guarded(torch.randn(shape)) for shape in shapes), *indices)
    triton_kernel.backward(guarded(torch.randn(out.shape)), *indices, cells.num_genes)


def run_head(rows: list[int] | None, dim: int) -> None:
    """Forward and backward of both ops with guarded inputs and outputs."""
    from xtg_kernels.ops.masked_head import triton_kernel

    x, chosen = guarded(torch.randn(37, dim)), None if rows is None else guarded(torch.tensor(rows))
    params = [guarded(torch.randn(size)) for size in (dim, dim, dim, dim, dim, 1)]
    n = 37 if rows is None else len(rows)
    target, grad_out, grad_loss = guarded(torch.randn(n)), guarded(torch.randn(n)), guarded(torch.randn(1)).view(())
    triton_kernel.masked_head(x, chosen, *params, 1e-5)
    triton_kernel.masked_head_backward(grad_out, x, chosen, *params, 1e-5)
    triton_kernel.masked_mse(x, chosen, target, *params, 1e-5, True)
    triton_kernel.masked_mse_backward(grad_loss, x, chosen, target, *params, 1e-5, True)


def _guarded_search(*args: Tensor, **keywords: object) -> Tensor:
    return guarded(_searchsorted(*args, **keywords))


def _guarded_sort(*args: Tensor, **keywords: object) -> tuple[Tensor, ...]:
    return tuple(guarded(x) for x in _sort(*args, **keywords))


def _guarded_zeros(x: Tensor, *shape: object) -> Tensor:
    return guarded(_new_zeros(x, *shape))


_searchsorted, _sort, _new_zeros, _zeros = torch.searchsorted, torch.sort, Tensor.new_zeros, torch.zeros


def main() -> None:
    """All cases; a read past an end ends the process with SIGSEGV."""
    patches = [
        mock.patch.object(torch, "empty", guarded_empty),
        mock.patch.object(torch, "zeros", lambda *args, **keywords: guarded(_zeros(*args, **keywords))),
        mock.patch.object(torch, "searchsorted", _guarded_search),
        mock.patch.object(torch, "sort", _guarded_sort),
        mock.patch.object(Tensor, "new_zeros", _guarded_zeros),
    ]
    for patch in patches:
        patch.start()
    for dim in (12, 40):
        run_gather(random_cells(37, [9, 0, 20], [8, 3, 0]), 0, dim)
        run_gather(random_cells(37, [9, 0, 20], None, [12, 0, 37]), 3, dim)
        run_head([36, 0, 36, 7, 35], dim)
        run_head(None, dim)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
def test_no_access_past_the_end_of_a_tensor() -> None:
    code = "from tests.xtg_kernels import test_triton_out_of_bounds_decoder as guard; guard.main(); print('all ran')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "all ran"
