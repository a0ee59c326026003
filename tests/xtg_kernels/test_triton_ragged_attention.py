"""Triton kernels of ragged_attention, in the interpreter where there is no GPU: error, edges, determinism, layouts.

The interpreter shows what the kernels compute; it shows nothing of speed, of races or of the launcher.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.interpreter import bf16_interpreter
from tests.xtg_kernels.ragged_cases import cu_seqlens_of, relative_error
from xtg_kernels import ragged_attention, use_backend
from xtg_kernels.ops.ragged_attention import triton_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REAL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Empty cells, length 1, and lengths on both sides of the tiles' 32, 64 and 128 rows.
MIXED = [0, 5, 1, 32, 0, 65, 64, 3]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    # NumPy warns of the inf and NaN in rows of a tile that are never stored; a GPU does not.
    with use_backend("triton"), np.errstate(all="ignore"), bf16_interpreter() if DEVICE == "cpu" else nullcontext():
        yield


def packed_qkv(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, slack: int = 0) -> Tensor:
    """(total_nnz, 3, heads, head_dim) leaf; the slack rows hold NaN, which nothing may read."""
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total * 131 + head_dim)
    qkv = torch.randn((total + slack, 3, heads, head_dim), generator=generator).to(dtype)
    qkv[total:] = math.nan
    return qkv.to(DEVICE).requires_grad_()


def gradient_like(out_shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.randn(out_shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """out and lse by matmul and softmax in the dtype of q: what a user would write."""
    outputs, lses = [q.new_zeros((0, *q.shape[1:]))], [q.new_zeros((q.shape[1], 0))]
    for q_s, k_s, v_s in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        q_s, k_s, v_s = (x.transpose(0, 1) for x in (q_s, k_s, v_s))
        scores = q_s @ k_s.mT * q.shape[2] ** -0.5
        outputs.append((scores.softmax(dim=-1) @ v_s).transpose(0, 1))
        lses.append(scores.logsumexp(dim=-1))
    return torch.cat(outputs), torch.cat(lses, dim=1)


def run(qkv: Tensor, lengths: list[int], grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = cu_seqlens_of(lengths).to(DEVICE)
    out, lse = ragged_attention(*qkv.unbind(1), cu_seqlens, max(lengths, default=0), return_lse=True)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    return out.detach(), lse.detach(), grad


@pytest.mark.parametrize("head_dim", [16, 40, 64, 128])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_error_within_plain_pytorch(dtype: torch.dtype, head_dim: int) -> None:
    """Error against float64: at most 2x (forward) and 3x (gradients) that of plain PyTorch in the same dtype."""
    qkv = packed_qkv(MIXED, 2, head_dim, dtype)
    grad_out = gradient_like(qkv[:, 0].shape, dtype)
    out, lse, grad = run(qkv, MIXED, grad_out)
    assert out.dtype == grad.dtype == dtype
    exact = qkv.detach().double().requires_grad_()
    exact_out, exact_lse = plain_attention(*exact.unbind(1), MIXED)
    (exact_grad,) = torch.autograd.grad(exact_out, exact, grad_out.double())
    plain_out, _ = plain_attention(*qkv.unbind(1), MIXED)
    (plain_grad,) = torch.autograd.grad(plain_out, qkv, grad_out)
    assert relative_error(out, exact_out) <= 2 * relative_error(plain_out, exact_out)
    assert relative_error(lse, exact_lse) < 5e-7
    for part in range(3):
        error = relative_error(grad[:, part], exact_grad[:, part])
        assert error <= 3 * relative_error(plain_grad[:, part], exact_grad[:, part]), "qkv"[part]


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize(
    "lengths",
    [[], [0, 0, 0], [1], [31, 32, 33], [127, 128, 129], [1, 3, 300, 2, 0, 5], [0, 17, 0, 33, 0]],
    ids=["no cells", "empty cells", "one token", "around 32", "around 128", "giant among tiny", "empty at both ends"],
)
def test_edges(lengths: list[int], slack: int) -> None:
    qkv = packed_qkv(lengths, 1, 24, torch.float32, slack)
    total = sum(lengths)
    grad_out = gradient_like(qkv[:, 0].shape, torch.float32)
    grad_out[total:] = math.nan
    out, lse, grad = run(qkv, lengths, grad_out)
    for x in (out[total:], lse[:, total:], grad[total:]):
        assert torch.equal(x, torch.zeros_like(x)), "slack rows are zero"
    assert (lse.shape, lse.dtype) == ((1, total + slack), torch.float32)
    if total:
        exact = qkv.detach()[:total].double().requires_grad_()
        exact_out, exact_lse = plain_attention(*exact.unbind(1), lengths)
        (exact_grad,) = torch.autograd.grad(exact_out, exact, grad_out[:total].double())
        assert relative_error(out[:total], exact_out) < 1e-6
        # The lse of one token is its only score and can be close to 0, so its error is absolute.
        torch.testing.assert_close(lse[:, :total].double(), exact_lse, rtol=1e-6, atol=1e-6)
        assert relative_error(grad[:total], exact_grad) < 2e-6


@pytest.mark.parametrize("both", [True, False], ids=["out and lse", "lse alone"])
def test_gradient_of_lse(both: bool) -> None:
    lengths = [9, 0, 70]
    qkv = packed_qkv(lengths, 2, 16, torch.float32, slack=2)
    grad_out = gradient_like(qkv[:, 0].shape, torch.float32)
    grad_lse = gradient_like(torch.Size((2, 81)), torch.float32)
    got = ragged_attention(*qkv.unbind(1), cu_seqlens_of(lengths).to(DEVICE), 70, return_lse=True)
    exact = qkv.detach()[:79].double().requires_grad_()
    want = plain_attention(*exact.unbind(1), lengths)
    first = 0 if both else 1
    (grad,) = torch.autograd.grad(got[first:], qkv, (grad_out, grad_lse)[first:])
    (exact_grad,) = torch.autograd.grad(
        want[first:], exact, (grad_out[:79].double(), grad_lse[:, :79].double())[first:]
    )
    assert relative_error(grad[:79], exact_grad) < 2e-6
    assert not grad[79:].any()


@pytest.mark.parametrize("softmax_scale", [0.0, -0.5, 3.0])
def test_any_scale(softmax_scale: float) -> None:
    lengths = [65, 7]
    qkv = packed_qkv(lengths, 1, 16, torch.float32)
    exact = qkv.detach().double().requires_grad_()
    grads = []
    for x, backend in ((qkv, "triton"), (exact, "reference")):
        with use_backend(backend):
            out = ragged_attention(*x.unbind(1), cu_seqlens_of(lengths).to(DEVICE), 65, softmax_scale=softmax_scale)
        grads.append((out, *torch.autograd.grad(out.sum(), x)))
    assert relative_error(grads[0][0], grads[1][0]) < 4e-6
    assert relative_error(grads[0][1], grads[1][1]) < 1e-5


def test_large_scores_do_not_overflow() -> None:
    """Scores down to -2,500: the running maximum has to be taken away before any exponential, and in the backward the
    zeros that pad the last key block must not count as scores, which would be exp(2,500)."""
    q = torch.zeros((131, 1, 16), device=DEVICE)
    q[:, 0, 0] = torch.linspace(10, 50, 131)
    k, v, cu_seqlens = -q, q.clone(), cu_seqlens_of([131]).to(DEVICE)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaf = q.detach().to(dtype).requires_grad_()
        out, lse = plain_attention(leaf * 16**0.5, k.to(dtype), v.to(dtype), [131])
        return [out.detach(), lse.detach(), *torch.autograd.grad(out.sum(), leaf)]

    leaf = q.clone().requires_grad_()
    out, lse = ragged_attention(leaf, k, v, cu_seqlens, 131, softmax_scale=1.0, return_lse=True)
    exact = plain(torch.float64)
    for ours, theirs, want in zip(
        (out, lse, *torch.autograd.grad(out.sum(), leaf)), plain(q.dtype), exact, strict=True
    ):
        assert relative_error(ours.detach(), want) <= max(3 * relative_error(theirs, want), 1e-6)


@pytest.mark.parametrize("large", ["q", "k", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_any_size_are_right_or_nan(dtype: torch.dtype, large: str) -> None:
    """out up to scores of 2^30, gradients while softmax_lse has digits for probs; beyond NaN, in the cell and head that
    have such scores alone."""
    lengths = [33, 70]
    for exponent in (4, 6, 9, 30):
        qkv = packed_qkv(lengths, 2, 16, dtype).detach()
        for part in {"q": [0], "k": [1], "both": [0, 1]}[large]:
            qkv[5, part, 0] *= 10.0**exponent
        grad_out = gradient_like(qkv[:, 0].shape, dtype)
        out, lse, grad = run(qkv.requires_grad_(), lengths, grad_out)
        exact = qkv.detach().double().requires_grad_()
        exact_out, exact_lse = plain_attention(*exact.unbind(1), lengths)
        (exact_grad,) = torch.autograd.grad(exact_out, exact, grad_out.double())
        plain_out, _ = plain_attention(*qkv.unbind(1), lengths)
        (plain_grad,) = torch.autograd.grad(plain_out, qkv, grad_out)
        largest = float(exact_lse.detach().abs().max())
        rounding = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        of_lse = torch.finfo(torch.float32).eps * largest
        for factor, a, b, c, floor in (
            (2, out, exact_out, plain_out, rounding),
            (3, grad, exact_grad, plain_grad, rounding + of_lse),
        ):
            known = ~a.isnan()
            assert bool(known[33:].all())
            assert bool(known[..., 1, :].all())
            allowed = factor * (c.double() - b)[known].norm() + floor * b.norm()
            assert (a.double() - b)[known].norm() <= allowed, exponent
        known = ~lse.isnan()
        assert relative_error(lse[known], exact_lse[known]) < 5e-7
        assert bool(known.all()) == bool(out.isfinite().all()) == (largest / math.log(2) < 2**30)
        assert bool(grad.isfinite().all()) == (largest < 2**16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_again_and_alone(dtype: torch.dtype) -> None:
    """A second run gives the same bits, and a cell gives the same bits alone as among others."""
    lengths = [70, 0, 33, 129, 1]
    qkv = packed_qkv(lengths, 2, 20, dtype)
    grad_out = gradient_like(qkv[:, 0].shape, dtype)
    one = run(qkv, lengths, grad_out)
    for a, b in zip(one, run(qkv, lengths, grad_out), strict=True):
        assert torch.equal(a, b)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        out, lse, grad = run(qkv.detach()[rows].clone().requires_grad_(), [length], grad_out[rows])
        assert torch.equal(out, one[0][rows])
        assert torch.equal(lse, one[1][:, rows])
        assert torch.equal(grad, one[2][rows])
        start += length


def test_neighbours_are_not_read() -> None:
    """A cell full of NaN leaves the others alone, forward and backward, and stays NaN itself."""
    lengths = [30, 65, 30]
    qkv = packed_qkv(lengths, 1, 16, torch.float32)
    poisoned = qkv.detach().clone()
    poisoned[30:95] = math.nan
    grad_out = torch.ones((125, 1, 16), device=DEVICE)
    want = run(qkv, lengths, grad_out)
    got = run(poisoned.requires_grad_(), lengths, grad_out)
    keep = torch.cat([torch.arange(30), torch.arange(95, 125)])
    for a, b in ((got[0], want[0]), (got[1].T, want[1].T), (got[2], want[2])):
        assert torch.equal(a[keep], b[keep])
        assert bool(a[30:95].isnan().all())


def test_layouts() -> None:
    """Views of a packed tensor, heads first, a last dimension that is not contiguous and rows off the 16-byte grid that
    vector loads need give one result."""
    lengths = [40, 9]
    qkv = packed_qkv(lengths, 2, 16, torch.float32).detach()
    cu_seqlens = cu_seqlens_of(lengths).to(DEVICE)
    grad_out = gradient_like(qkv[:, 0].shape, torch.float32)

    def out_and_grads(q: Tensor, k: Tensor, v: Tensor, grad: Tensor = grad_out) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = ragged_attention(*leaves, cu_seqlens, 40)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    want = out_and_grads(*(x.contiguous() for x in qkv.unbind(1)))
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv.unbind(1)]
    channels_first = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in qkv.unbind(1)]
    assert channels_first[0].stride(2) != 1
    off_grid = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in qkv.unbind(1)]
    assert off_grid[0].data_ptr() % 16 != 0
    assert all(triton_kernel._aligned(x).data_ptr() % 16 == 0 for x in off_grid)
    assert all(triton_kernel._aligned(x) is x for x in (*qkv.unbind(1), *heads_first)), "no copies"
    grad_channels_first = grad_out.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for got in (
        out_and_grads(*qkv.unbind(1)),
        out_and_grads(*heads_first),
        out_and_grads(*channels_first, grad_channels_first),
        out_and_grads(*off_grid),
    ):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_gradient_with_stride_zero() -> None:
    """out.sum() hands an expanded gradient to the backward."""
    qkv = packed_qkv([33], 2, 16, torch.float32)
    out = ragged_attention(*qkv.unbind(1), cu_seqlens_of([33]).to(DEVICE), 33)
    (got,) = torch.autograd.grad(out.sum(), qkv)
    _, _, want = run(qkv, [33], torch.ones((33, 2, 16), device=DEVICE))
    assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE != "cpu", reason="a sparse file stands in for a tensor of 4.5 GB")
def test_offsets_past_2_to_the_31(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows 2^23 elements apart: the second cell, and the third block of the first, start past 2^31 elements. Only the
    pages of these rows are ever touched."""
    from triton.runtime import interpreter

    # The interpreter copies every storage back onto itself at the end, which would touch all of it.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    lengths, row_stride = [260, 10], 2**23
    size = 270 * row_stride * 2
    with (tmp_path / "sparse").open("w+b") as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
    rows = torch.frombuffer(memory, dtype=torch.float16).as_strided((270, 1, 64), (row_stride, 64, 1))
    dense = packed_qkv(lengths, 1, 16, torch.float16).detach()
    q, k, v, grad_out = rows[..., :16], rows[..., 16:32], rows[..., 32:48], rows[..., 48:]
    for sparse, part in ((q, 0), (k, 1), (v, 2), (grad_out, 0)):
        sparse.copy_(dense[:, part])
    cu_seqlens = cu_seqlens_of(lengths)
    out, lse = triton_kernel.forward(q, k, v, cu_seqlens, 260, 0.25)
    got = triton_kernel.backward(grad_out, None, q, k, v, out, lse, cu_seqlens, 260, 0.25)
    dense_out, dense_lse = triton_kernel.forward(*dense.unbind(1), cu_seqlens, 260, 0.25)
    want = triton_kernel.backward(dense[:, 0], None, *dense.unbind(1), dense_out, dense_lse, cu_seqlens, 260, 0.25)
    assert torch.equal(out, dense_out)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_opcheck() -> None:
    q, k, v = (x.clone().requires_grad_() for x in packed_qkv([10, 0, 15], 1, 16, torch.float32).detach().unbind(1))
    cu_seqlens = cu_seqlens_of([10, 0, 15]).to(DEVICE)
    torch.library.opcheck(torch.ops.xtg.ragged_attention.triton, (q, k, v, cu_seqlens, 15, 0.25))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = torch.ops.xtg.ragged_attention.triton(q, k, v, cu_seqlens, 15, 0.25)
    for grad_lse in (None, torch.randn_like(lse)):
        args = (torch.randn_like(out), grad_lse, q, k, v, out, lse, cu_seqlens, 15, 0.25)
        torch.library.opcheck(torch.ops.xtg.ragged_attention_backward.triton, args)
