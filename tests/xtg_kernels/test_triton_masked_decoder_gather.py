"""Triton kernels of masked_decoder_gather, in the interpreter where there is no GPU: error, edges, determinism.

The interpreter shows what the kernels compute; it shows nothing of speed, of races or of the launcher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.interpreter import bf16_interpreter
from tests.xtg_kernels.ragged_cases import relative_error
from tests.xtg_kernels.test_masked_decoder_gather import (
    EDGES,
    NAMES,
    Cells,
    exact_rows_and_grads,
    gradient_like,
    leaves_of,
    plain_rows,
    random_cells,
)
from xtg_kernels import masked_decoder_gather, use_backend
from xtg_kernels.ops.masked_decoder_gather import triton_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Blocks of the interpreter are small and slow: 40 genes are several of them.
EDGES = {name: cells for name, cells in EDGES.items() if cells.num_genes <= 40}


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    # NumPy warns of the inf and NaN that masked elements of a tile run into; a GPU does not.
    with use_backend("triton"), np.errstate(all="ignore"), bf16_interpreter() if DEVICE == "cpu" else nullcontext():
        yield


def on_device(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves]


def run(leaves: list[Tensor], cells: Cells, grad_out: Tensor, slack: int = 0) -> tuple[Tensor, list[Tensor]]:
    indices, keywords = cells.indices(slack)
    moved = (None if x is None else x.to(DEVICE) for x in indices)
    out = masked_decoder_gather(*leaves, *moved, **{name: x.to(DEVICE) for name, x in keywords.items()})
    return out.detach(), list(torch.autograd.grad(out, leaves, grad_out.to(DEVICE)))


@pytest.mark.parametrize("asked", [None, (80, 0, 30)], ids=["all genes", "asked genes"])
@pytest.mark.parametrize("dim", [192, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_within_plain_pytorch(dtype: torch.dtype, dim: int, asked: tuple[int, ...] | None) -> None:
    """The output has the bits of plain PyTorch, one rounded sum; gradients at most three times its error."""
    cells = random_cells(90, [40, 0, 5], [30, 9, 0], asked)
    leaves = on_device(leaves_of(cells, dim, dtype))
    plain_out = plain_rows(leaves, cells, dtype)
    grad_out = gradient_like(plain_out.shape, dtype).to(DEVICE)
    out, grads = run(leaves, cells, grad_out)
    assert torch.equal(out, plain_out)
    plain = torch.autograd.grad(plain_out, leaves, grad_out)
    _, exact = exact_rows_and_grads(leaves, cells, grad_out)
    floor = 2e-6 if dtype == torch.float32 else 0.0
    for what, got, plain_grad, want in zip(NAMES, grads, plain, exact, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) <= max(3 * relative_error(plain_grad, want), floor), what


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("cells", EDGES.values(), ids=EDGES.keys())
def test_edges_and_slack(cells: Cells, slack: int) -> None:
    """Slack tokens and genes hold NaN and impossible ids: none is read, their rows and gradients are 0."""
    leaves = leaves_of(cells, 12, slack=slack)
    if cells.asked is None:
        used, shape = len(cells.encoded), (len(cells.encoded), cells.num_genes, 12)
    else:
        used = sum(map(len, cells.asked))
        shape = (used + slack, 12)
    grad_out = gradient_like(shape)
    exact_out, exact = exact_rows_and_grads(leaves, cells, grad_out)
    grad_out[used:] = math.nan
    out, grads = (x.cpu() if isinstance(x, Tensor) else x for x in run(on_device(leaves), cells, grad_out, slack))
    assert out.shape == shape
    assert relative_error(out[:used], exact_out) < 1e-6
    assert not out[used:].any()
    assert not grads[3][cells.total_nnz :].any()
    for what, got, want in zip(NAMES, grads, exact, strict=True):
        assert relative_error(got.cpu(), want) < 1e-6, what


@pytest.mark.parametrize("asked", [None, (100, 0, 40)], ids=["all genes", "asked genes"])
def test_same_bits_again_and_alone(asked: tuple[int, ...] | None) -> None:
    """A second run gives the same bits; so do a cell's rows and its tokens' gradients alone."""
    cells = random_cells(120, [40, 0, 90], [20, 7, 30], asked)
    leaves = on_device(leaves_of(cells, 24, torch.bfloat16))
    grad_out = gradient_like(plain_rows(leaves, cells, torch.bfloat16).shape, torch.bfloat16)
    out, grads = run(leaves, cells, grad_out)
    again, again_grads = run(leaves, cells, grad_out)
    for a, b in zip((out, *grads), (again, *again_grads), strict=True):
        assert torch.equal(a, b)
    assert cells.masked is not None
    last = Cells(120, cells.encoded[2:], cells.masked[2:], None if cells.asked is None else cells.asked[2:])
    rows = slice(2, 3) if asked is None else slice(100, 140)
    encoded = leaves[3].detach()[40:].requires_grad_()
    alone, alone_grads = run([*leaves[:3], encoded], last, grad_out[rows])
    assert torch.equal(alone, out[rows])
    assert torch.equal(alone_grads[3], grads[3][40:])


def test_a_masked_gene_that_is_encoded_too_is_masked() -> None:
    """On a GPU nobody looks at the ids (without XTG_DEBUG=1): the token then gets no gradient."""
    cells = Cells(5, [[1, 3]], [[3]])
    leaves = on_device(leaves_of(cells, 8))
    cu_seqlens, gene_ids, masked_ids, masked_cu = (x.to(DEVICE) for x in cells.indices()[0])
    op = torch.ops.xtg.masked_decoder_gather.triton
    out = op(*leaves, cu_seqlens, gene_ids, masked_ids, masked_cu, None, None)
    assert torch.equal(out[0, 3], leaves[0][3] + leaves[2])
    grads = torch.autograd.grad(out.sum(), leaves)
    assert grads[3].tolist() == [[1.0] * 8, [0.0] * 8]
    assert grads[2].tolist() == [1.0] * 8


def test_more_rows_than_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few chunks of several blocks each give the gradients of many chunks of one block."""
    cells = random_cells(90, [40, 5], [30, 9], (80, 30))
    leaves = on_device(leaves_of(cells, 12))
    grad_out = gradient_like((110, 12))
    _, many = run(leaves, cells, grad_out)
    monkeypatch.setattr(triton_kernel, "_ROW_CHUNKS", 2)
    _, few = run(leaves, cells, grad_out)
    for what, a, b in zip(NAMES, few, many, strict=True):
        assert relative_error(a, b) < 1e-6, what
    assert torch.equal(few[0], many[0])
    assert torch.equal(few[3], many[3])


def test_layouts() -> None:
    """Transposed and strided inputs and an expanded gradient give the result of their contiguous copies."""
    cells = random_cells(30, [9, 3], [8, 0])
    leaves = on_device(leaves_of(cells, 12))
    table, zero_row, mask_row, encoded = (leaf.detach() for leaf in leaves)
    strided = [
        table.mT.contiguous().mT,
        torch.stack([zero_row, zero_row], 1)[:, 0],
        torch.stack([mask_row, mask_row], 1)[:, 0],
        torch.cat([encoded, encoded], 1)[:, :12],
    ]
    ones = torch.ones((2, 30, 12))
    want = run(leaves, cells, ones)
    got = run([x.requires_grad_() for x in strided], cells, ones[:1, :1, :1].expand(2, 30, 12))
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert torch.equal(a, b)


def test_opcheck() -> None:
    for cells in (random_cells(20, [5, 0, 9], [4, 2, 0], [7, 0, 3]), random_cells(20, [5, 0, 9], None)):
        indices, keywords = cells.indices(slack=1)
        indices = (*indices, keywords.get("out_genes"), keywords.get("out_cu_seqlens"))
        moved = tuple(None if x is None else x.to(DEVICE) for x in indices)
        leaves = on_device([x.detach().nan_to_num() for x in leaves_of(cells, 12, slack=1)])
        torch.library.opcheck(torch.ops.xtg.masked_decoder_gather.triton, (*leaves, *moved))
        grad_out = gradient_like((3, 20, 12) if cells.asked is None else (11, 12)).to(DEVICE)
        torch.library.opcheck(torch.ops.xtg.masked_decoder_gather_backward.triton, (grad_out, *moved, 20))
