"""Triton kernels of expression_embedding, in the interpreter where there is no GPU: error, edges, determinism.

The interpreter shows what the kernels compute; it shows nothing of speed, of races or of the launcher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.interpreter import bf16_interpreter, to_float32
from tests.xtg_kernels.ragged_cases import cu_seqlens_of, relative_error
from tests.xtg_kernels.test_expression_embedding import NAMES, cells, plain_embedding, weights_of
from xtg_kernels import expression_embedding, use_backend
from xtg_kernels.ops.expression_embedding import triton_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    # NumPy warns of the inf and NaN that masked elements of a tile run into; a GPU does not.
    with use_backend("triton"), np.errstate(all="ignore"), bf16_interpreter() if DEVICE == "cpu" else nullcontext():
        yield


def leaves(weights: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [w.detach().to(DEVICE, dtype or w.dtype).requires_grad_() for w in weights]


def random_gradient(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((rows, dim), generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def run(
    values: Tensor, weights: list[Tensor], gene_ids: Tensor | None, grad_out: Tensor, lengths: list[int] | None
) -> tuple[Tensor, list[Tensor]]:
    """out and the gradients to values and all weights in use."""
    values = values.to(DEVICE).requires_grad_()
    out = expression_embedding(
        values,
        *weights[:5],
        alpha=0.8,
        gene_ids=None if gene_ids is None else gene_ids.to(DEVICE),
        gene_table=None if gene_ids is None else weights[5],
        cu_seqlens=None if lengths is None else cu_seqlens_of(lengths).to(DEVICE),
    )
    used = [values, *weights[: 5 if gene_ids is None else 6]]
    return out.detach(), list(torch.autograd.grad(out, used, grad_out))


@pytest.mark.parametrize(("bins", "dim"), [(100, 72), (7, 20), (130, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_within_plain_pytorch(dtype: torch.dtype, bins: int, dim: int) -> None:
    """Error against float64: at most 2x (forward) and 3x (gradients) that of plain PyTorch in the same dtype."""
    lengths = [60, 0, 1, 100]
    values, gene_ids = cells(lengths)
    weights = leaves(weights_of(bins, dim, dtype))
    grad_out = random_gradient(161, dim, dtype)
    out, grads = run(values, weights, gene_ids, grad_out, lengths)
    assert out.dtype == dtype

    def differentiate(compute: torch.dtype, at: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf = values.to(DEVICE, torch.float64 if compute == torch.float64 else torch.float32).requires_grad_()
        result = plain_embedding(leaf, at, gene_ids.to(DEVICE), 0.8, compute)
        return result.detach(), torch.autograd.grad(result, [leaf, *at], grad_out.to(compute))

    exact_out, exact = differentiate(torch.float64, leaves(weights, torch.float64))
    plain_out, plain = differentiate(dtype, weights)
    assert relative_error(out, exact_out) <= 2 * relative_error(plain_out, exact_out)
    for what, weight, got, plain_grad, want in zip(NAMES, [None, *weights], grads, plain, exact, strict=True):
        assert got.dtype == (torch.float32 if weight is None else dtype), what
        assert relative_error(got, want) <= max(3 * relative_error(plain_grad, want), 2e-6), what


def test_logits_keep_what_rounding_hidden_would_lose() -> None:
    """Hidden units of about 50 in pairs that cancel in w2 hidden: rounded to bfloat16 each would be off by 0.1, and the
    bin weights by 10 %."""
    values, gene_ids = cells([100])
    w1, b1, w2, b2, bin_table, gene_table = (w.detach() for w in weights_of(20, 24, torch.bfloat16))
    w1 = 16 + w1 / 4
    w2 = w2[:, :10].repeat_interleave(2, 1) * torch.tensor([1.0, -1.0]).repeat(10)
    weights = leaves([w1, b1, w2.bfloat16(), b2, bin_table, gene_table])
    out, _ = run(values, weights, gene_ids, random_gradient(100, 24, torch.bfloat16), [100])
    exact = plain_embedding(
        values.to(DEVICE).double(), leaves(weights, torch.float64), gene_ids.to(DEVICE), 0.8, torch.float64
    )
    assert relative_error(out, exact) < 2 * relative_error(exact.bfloat16(), exact)


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize(
    "lengths",
    [[], [0, 0], [1], [31, 32, 33], [0, 17, 0, 130]],
    ids=["no cells", "empty cells", "one token", "around a block", "empty in between"],
)
def test_edges_and_slack(lengths: list[int], slack: int) -> None:
    """Slack rows hold NaN values, NaN gradients, impossible and possible gene ids: all give zeros and go unread."""
    total = sum(lengths)
    values, gene_ids = cells(lengths, slack)
    gene_ids[total + 1 :] = 7
    weights = leaves(weights_of(20, 12))
    grad_out = random_gradient(total + slack, 12)
    grad_out[total:] = math.nan
    out, grads = run(values, weights, gene_ids, grad_out, lengths)
    assert torch.equal(out[total:].cpu(), torch.zeros((slack, 12)))
    assert torch.equal(grads[0][total:].cpu(), torch.zeros(slack))
    if total == 0:
        assert not any(g.any() for g in grads)
        return
    exact_values = values[:total].to(DEVICE).double().requires_grad_()
    exact_leaves = leaves(weights, torch.float64)
    exact_out = plain_embedding(exact_values, exact_leaves, gene_ids[:total].to(DEVICE), 0.8, torch.float64)
    exact = torch.autograd.grad(exact_out, [exact_values, *exact_leaves], grad_out[:total].double())
    assert relative_error(out[:total], exact_out) < 1e-6
    for what, got, want in zip(NAMES, [grads[0][:total], *grads[1:]], exact, strict=True):
        assert relative_error(got, want) < 1e-5, what


def test_without_gene_table() -> None:
    values, _ = cells([40])
    weights = leaves(weights_of(20, 12))
    grad_out = random_gradient(40, 12)
    out, grads = run(values, weights, None, grad_out, None)
    zero_ids = torch.zeros(40, dtype=torch.int32, device=DEVICE)
    exact_leaves = [*leaves(weights[:5], torch.float64), torch.zeros((1, 12), dtype=torch.float64, device=DEVICE)]
    exact_out = plain_embedding(values.to(DEVICE).double(), exact_leaves, zero_ids, 0.8, torch.float64)
    exact = torch.autograd.grad(exact_out, exact_leaves[:5], grad_out.double())
    assert relative_error(out, exact_out) < 1e-6
    for what, got, want in zip(NAMES[1:6], grads[1:], exact, strict=True):
        assert relative_error(got, want) < 1e-5, what


def test_every_row_of_the_gene_table_is_summed_once() -> None:
    """Genes nobody has, a gene every cell has, and more tokens of a gene than a block takes; 64-bit ids."""
    gene_ids = torch.tensor([3] * 40 + [0, 49, 3, 7, 0])
    weights = leaves(weights_of(5, 6))
    grad_out = random_gradient(45, 6)
    _, grads = run(torch.ones(45), weights, gene_ids, grad_out, None)
    want = torch.zeros((50, 6), dtype=torch.float64).index_add_(0, gene_ids, grad_out.cpu().double())
    assert relative_error(grads[6].cpu(), want) < 1e-6
    assert not grads[6][[1, 2, 8, 48]].any()


@pytest.fixture
def dot_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies with BLAS, which on some CPUs rounds a row by where it stands in its tile.

    The hardware does not.
    """

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any
    ) -> TensorHandle:
        operands = (to_float32(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        product = np.einsum("ik,kj->ij", *(x.astype(d.data.dtype) for x in operands))
        return TensorHandle(product + d.data, d.dtype.scalar)

    if not torch.cuda.is_available():
        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("dot_by_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_again_and_alone(dtype: torch.dtype) -> None:
    """A second run gives the same bits; so do a cell's rows and value gradients alone. (Parameter gradients sum over
    the batch.)"""
    lengths = [70, 0, 33, 1]
    values, gene_ids = cells(lengths)
    weights = leaves(weights_of(100, 40, dtype))
    grad_out = random_gradient(104, 40, dtype)
    out, grads = run(values, weights, gene_ids, grad_out, lengths)
    again, again_grads = run(values, weights, gene_ids, grad_out, lengths)
    for a, b in zip((out, *grads), (again, *again_grads), strict=True):
        assert torch.equal(a, b)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone, alone_grads = run(values[rows], weights, gene_ids[rows], grad_out[rows], [length])
        assert torch.equal(alone, out[rows])
        assert torch.equal(alone_grads[0], grads[0][rows])
        start += length


def test_a_nan_value_stays_in_its_row() -> None:
    """102.0, 0.0, negatives and huge values embed as themselves; NaN gives a NaN row and no other."""
    values = torch.tensor([102.0, 0.0, -3.0, 1e30, 102.0, math.nan, 1.0])
    weights = leaves(weights_of(20, 12))
    gene_ids = torch.arange(7, dtype=torch.int32)
    out, _ = run(values, weights, gene_ids, random_gradient(7, 12), [7])
    exact = plain_embedding(values.to(DEVICE).double(), weights, gene_ids.to(DEVICE), 0.8, torch.float64).detach()
    keep = [0, 1, 2, 3, 4, 6]
    assert relative_error(out[keep], exact[keep]) < 1e-6
    assert bool(out[5].isnan().all())


def test_layouts() -> None:
    """Strided values, transposed weights and an expanded gradient give the result of their contiguous copies."""
    values, gene_ids = cells([50])
    weights = leaves(weights_of(20, 12))
    ones = torch.ones((50, 12), device=DEVICE)
    want = run(values, weights, gene_ids, ones, None)
    strided = [w.detach().mT.contiguous().mT if w.dim() == 2 else w.detach() for w in weights]
    assert not strided[2].is_contiguous()
    got = run(torch.stack([values, values], 1)[:, 0], leaves(strided), gene_ids, ones[:1, :1].expand(50, 12), None)
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert torch.equal(a, b)


def test_chunks_cover_all_blocks() -> None:
    """No chunk is empty, none is missing, and there are never more than asked for."""
    for total_nnz in [1, 15, 16, 17, 1000, 16 * 256, 16 * 256 + 1, 10**6, 2**31 + 5]:
        num_chunks, blocks_per_chunk = triton_kernel._chunks(total_nnz, 16, 256)
        blocks = -(-total_nnz // 16)
        assert 1 <= num_chunks <= 256
        assert (num_chunks - 1) * blocks_per_chunk < blocks <= num_chunks * blocks_per_chunk


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few chunks of several blocks each give the gradients of many chunks of one block."""
    values, gene_ids = cells([200])
    weights = leaves(weights_of(20, 12))
    grad_out = random_gradient(200, 12)
    _, many = run(values, weights, gene_ids, grad_out, None)
    monkeypatch.setattr(triton_kernel, "_WEIGHT_CHUNKS", 3)
    monkeypatch.setattr(triton_kernel, "_TABLE_CHUNKS", 2)
    _, few = run(values, weights, gene_ids, grad_out, None)
    assert torch.equal(few[0], many[0])
    for what, a, b in zip(NAMES, few, many, strict=True):
        assert relative_error(a, b) < 2e-6, what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    values, gene_ids = (x.to(DEVICE) for x in cells([10, 0, 15], slack=1))
    index = torch.tensor([*range(25), -1], dtype=torch.int32, device=DEVICE)
    values = values.nan_to_num().requires_grad_()
    weights = leaves(weights_of(20, 12, dtype))
    detached = [w.detach() for w in weights]
    grad_out = torch.randn((26, 12), device=DEVICE).to(dtype)
    for optional in ((gene_ids, weights[5], index), (None, None, None)):
        args = (values, *weights[:5], 0.8, *optional)
        torch.library.opcheck(torch.ops.xtg.expression_embedding.triton, args)
        plain = tuple(None if x is None else x.detach() for x in optional)
        args = (grad_out, values.detach(), *detached[:5], 0.8, *plain, optional[0] is not None)
        torch.library.opcheck(torch.ops.xtg.expression_embedding_backward.triton, args)
