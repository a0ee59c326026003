"""ragged_attention: against float64 and plain PyTorch, gradients, edges, determinism, registration, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.xtg_kernels.ragged_cases import (
    EDGE_LENGTHS,
    IMPLEMENTATIONS,
    ISAS,
    cu_seqlens_of,
    implementation,
    needs_cpp,
    relative_error,
    threads,
)
from xtg_kernels import ragged_attention, use_backend

MIXED = [0, 5, 1, 64, 0, 65, 130, 193, 17]
REAL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed_qkv(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, slack: int = 0) -> Tensor:
    """(total_nnz, 3, heads, head_dim) leaf; the slack rows hold NaN, which nothing may read."""
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total * 131 + head_dim)
    qkv = torch.randn((total + slack, 3, heads, head_dim), generator=generator).to(dtype)
    qkv[total:] = math.nan
    return qkv.requires_grad_()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Attention of each cell by matmul and softmax in the dtype of q: what a user would write."""
    outputs = []
    for q_s, k_s, v_s in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        q_s, k_s, v_s = (x.transpose(0, 1) for x in (q_s, k_s, v_s))
        probs = (q_s @ k_s.mT * q.shape[2] ** -0.5).softmax(dim=-1)
        outputs.append((probs @ v_s).transpose(0, 1))
    return torch.cat(outputs) if outputs else q.new_zeros(q.shape)


def run(qkv: Tensor, lengths: list[int], grad_out: Tensor, **kwargs: float) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = ragged_attention(
        *qkv.unbind(1), cu_seqlens_of(lengths), max(lengths, default=0), return_lse=True, **kwargs
    )
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    return out.detach(), lse.detach(), grad


@pytest.mark.parametrize("head_dim", [8, 20, 64, 256])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_error_within_plain_pytorch(name: str, dtype: torch.dtype, head_dim: int) -> None:
    """Error against float64: at most 2x (forward) and 3x (gradients) that of plain PyTorch in the same dtype."""
    qkv = packed_qkv(MIXED, 2, head_dim, dtype)
    grad_out = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with implementation(name):
        out, _, grad = run(qkv, MIXED, grad_out)
    exact = qkv.detach().double().requires_grad_()
    exact_out = plain_attention(*exact.unbind(1), MIXED)
    (exact_grad,) = torch.autograd.grad(exact_out, exact, grad_out.double())
    plain_out = plain_attention(*qkv.unbind(1), MIXED)
    (plain_grad,) = torch.autograd.grad(plain_out, qkv, grad_out)
    assert relative_error(out, exact_out) <= 2 * relative_error(plain_out, exact_out)
    for part in range(3):
        error = relative_error(grad[:, part], exact_grad[:, part])
        assert error <= 3 * relative_error(plain_grad[:, part], exact_grad[:, part]), "qkv"[part]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_segments_of_several_panels_and_units(name: str, dtype: torch.dtype) -> None:
    """Longer than the rows of one unit of work and than a packed panel, with ends inside both."""
    lengths = [1700, 3, 1100]
    qkv = packed_qkv(lengths, 1, 16, dtype)
    grad_out = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    with implementation(name):
        out, _, grad = run(qkv, lengths, grad_out)
    exact = qkv.detach().double().requires_grad_()
    exact_out = plain_attention(*exact.unbind(1), lengths)
    (exact_grad,) = torch.autograd.grad(exact_out, exact, grad_out.double())
    plain_out = plain_attention(*qkv.unbind(1), lengths)
    (plain_grad,) = torch.autograd.grad(plain_out, qkv, grad_out)
    assert relative_error(out, exact_out) <= 2 * relative_error(plain_out, exact_out)
    assert relative_error(grad, exact_grad) <= 3 * relative_error(plain_grad, exact_grad)


@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())
@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_edges(name: str, slack: int, lengths: list[int]) -> None:
    qkv = packed_qkv(lengths, 2, 12, torch.float32, slack)
    total = sum(lengths)
    grad_out = torch.randn((total + slack, 2, 12), generator=torch.Generator().manual_seed(2))
    with implementation(name):
        out, lse, grad = run(qkv, lengths, grad_out)
    exact = qkv.detach()[:total].double().requires_grad_()
    exact_out = plain_attention(*exact.unbind(1), lengths)
    assert relative_error(out[:total], exact_out) < 2e-6
    for x in (out[total:], lse[:, total:], grad[total:]):
        assert torch.equal(x, torch.zeros_like(x)), "slack rows are zero"
    if total:
        (exact_grad,) = torch.autograd.grad(exact_out, exact, grad_out[:total].double())
        assert relative_error(grad[:total], exact_grad) < 4e-6
    assert lse.shape == (2, total + slack)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_lse_and_its_gradient(name: str) -> None:
    lengths = [9, 0, 70]
    qkv = packed_qkv(lengths, 2, 16, torch.float32)
    grad_out = torch.randn((79, 2, 16), generator=torch.Generator().manual_seed(3))
    grad_lse = torch.randn((2, 79), generator=torch.Generator().manual_seed(4))
    with implementation(name):
        out, lse = ragged_attention(*qkv.unbind(1), cu_seqlens_of(lengths), 70, return_lse=True)
        (grad,) = torch.autograd.grad((out, lse), qkv, (grad_out, grad_lse))
        (lse_alone,) = torch.autograd.grad(
            ragged_attention(*qkv.unbind(1), cu_seqlens_of(lengths), 70, return_lse=True)[1], qkv, grad_lse
        )
    exact = qkv.detach().double().requires_grad_()
    parts = (
        [x.transpose(0, 1) for x in exact[:, 0].split(lengths)],
        [x.transpose(0, 1) for x in exact[:, 1].split(lengths)],
    )
    scores = [q @ k.mT * 16**-0.5 for q, k in zip(*parts, strict=True)]
    exact_lse = torch.cat([s.logsumexp(dim=-1) for s in scores], dim=1)
    exact_out = plain_attention(*exact.unbind(1), lengths)
    assert relative_error(lse.detach(), exact_lse) < 5e-7
    (exact_grad,) = torch.autograd.grad(
        (exact_out, exact_lse), exact, (grad_out.double(), grad_lse.double()), retain_graph=True
    )
    assert relative_error(grad, exact_grad) < 4e-6
    (exact_alone,) = torch.autograd.grad(exact_lse, exact, grad_lse.double())
    assert relative_error(lse_alone, exact_alone) < 4e-6


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("softmax_scale", [None, 0.7, 0.0, -0.5])
def test_gradcheck_of_the_reference(softmax_scale: float | None, return_lse: bool) -> None:
    qkv = packed_qkv([0, 3, 1, 5], 2, 3, torch.float64, slack=1).detach()
    qkv[-1] = 0.5
    q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(1))
    cu_seqlens = cu_seqlens_of([0, 3, 1, 5])
    keywords = {"softmax_scale": softmax_scale, "return_lse": return_lse}
    assert torch.autograd.gradcheck(lambda q, k, v: ragged_attention(q, k, v, cu_seqlens, 5, **keywords), (q, k, v))


@pytest.mark.parametrize("softmax_scale", [0.0, -0.5, 3.0])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_any_scale(name: str, softmax_scale: float) -> None:
    lengths = [65, 7]
    qkv = packed_qkv(lengths, 1, 16, torch.float32)
    grad_out = torch.ones((72, 1, 16))
    with implementation(name):
        out, _, grad = run(qkv, lengths, grad_out, softmax_scale=softmax_scale)
    exact = qkv.detach().double().requires_grad_()
    with use_backend("reference"):
        exact_out, _, exact_grad = run(exact, lengths, grad_out.double(), softmax_scale=softmax_scale)
    assert relative_error(out, exact_out) < 4e-6
    assert relative_error(grad, exact_grad) < 1e-5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(name: str) -> None:
    """Scores of +-2000: the running maximum has to be taken away before any exponential."""
    q = torch.zeros((130, 1, 8))
    q[:, 0, 0] = torch.linspace(-50, 50, 130)
    with implementation(name):
        out, lse = ragged_attention(q, q, q, cu_seqlens_of([130]), 130, softmax_scale=1.0, return_lse=True)
    exact = plain_attention((q * 8**0.5).double(), q.double(), q.double(), [130])
    assert relative_error(out, exact) < 1e-4  # float32 scores of 2,000 carry 1e-4
    assert bool(lse.isfinite().all())


@pytest.mark.parametrize("large", ["q", "k"])
@pytest.mark.parametrize("size", [1e6, 1e9, 3e9, 1e10, 1e15, 1e30, 1e36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_scores_of_any_size(name: str, dtype: torch.dtype, size: float, large: str) -> None:
    """Numbers of one channel and of one row are far larger than all others: the largest score takes everything, and no
    gradient of a row that is decided comes out as the rounding error of its neighbour's size."""
    lengths = [33, 300]
    qkv = packed_qkv(lengths, 2, 16, dtype).detach()
    part = 0 if large == "q" else 1
    qkv[5, part, 0, 3] = size
    qkv[100, part, 1] *= size
    grad_out = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(8)).to(dtype)
    with implementation(name):
        out, lse, grad = run(qkv.requires_grad_(), lengths, grad_out)
    exact = qkv.detach().double().requires_grad_()
    exact_out = plain_attention(*exact.unbind(1), lengths)
    (exact_grad,) = torch.autograd.grad(exact_out, exact, grad_out.double())
    plain_out = plain_attention(*qkv.unbind(1), lengths)
    (plain_grad,) = torch.autograd.grad(plain_out, qkv, grad_out)
    # Probabilities of 0 and 1, which plain PyTorch has exactly, take one rounding here.
    rounding = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert relative_error(out, exact_out) <= max(2 * relative_error(plain_out, exact_out), rounding)
    for i in range(3):
        error, plain_error = (relative_error(x[:, i], exact_grad[:, i]) for x in (grad, plain_grad))
        assert error <= max(3 * plain_error, rounding), "qkv"[i]
    assert bool(lse.isfinite().all())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equal_scores_of_any_size_share(name: str) -> None:
    """Every key twice, the queries so large that half a unit of the last place of a score is far more than 128."""
    qkv = packed_qkv([70, 70], 1, 16, torch.float32).detach()
    qkv[35:70, 1], qkv[105:, 1] = qkv[:35, 1], qkv[70:105, 1]
    qkv[:, 0] *= 1e12
    grad_out = torch.randn((140, 1, 16), generator=torch.Generator().manual_seed(9))
    with implementation(name):
        out, _, grad = run(qkv.requires_grad_(), [70, 70], grad_out)
    exact = qkv.detach().double().requires_grad_()
    exact_out = plain_attention(*exact.unbind(1), [70, 70])
    (exact_grad,) = torch.autograd.grad(exact_out, exact, grad_out.double())
    assert relative_error(out, exact_out) < 2e-6
    for i in (1, 2):
        assert relative_error(grad[:, i], exact_grad[:, i]) < 4e-6, "qkv"[i]
    # What equal keys give a query is equal and of opposite sign.
    assert grad[:, 0].norm() < 1e-6 * grad_out.norm()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_scores_that_overflow_give_nan_in_their_row_alone(name: str) -> None:
    qkv = packed_qkv([40], 1, 16, torch.float32).detach()
    qkv[:, 1] = qkv[:, 1].abs()
    qkv[7, 0] = 3e38
    with implementation(name):
        out, _, _ = run(qkv.requires_grad_(), [40], torch.ones((40, 1, 16)))
    bad = out.isnan().flatten(1).any(1)
    assert bad.nonzero().flatten().tolist() == [7]
    exact_out = plain_attention(*qkv.detach().double().unbind(1), [40])
    assert relative_error(out[~bad], exact_out[~bad]) < 2e-6


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_same_bits_for_any_thread_count_and_batch(isa: str, dtype: torch.dtype) -> None:
    """A cell has the same bits alone, among others, and on one thread or two; forward and gradients."""
    lengths = [200, 0, 37, 513, 1]
    qkv = packed_qkv(lengths, 3, 20, dtype)
    qkv.data[210, :2] *= 100  # a cell whose backward is another one does not change that of the others
    grad_out = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    with implementation(f"cpp-{isa}"):
        with threads(1):
            one = run(qkv, lengths, grad_out)
        with threads(2):
            two = run(qkv, lengths, grad_out)
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)
        start = 0
        for length in lengths:
            rows = slice(start, start + length)
            alone = qkv.detach()[rows].clone().requires_grad_()
            out, lse, grad = run(alone, [length], grad_out[rows])
            assert torch.equal(out, one[0][rows])
            assert torch.equal(lse, one[1][:, rows])
            assert torch.equal(grad, one[2][rows])
            start += length


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_layouts(name: str) -> None:
    """Views of a packed tensor, transposed heads, and a last dimension that is not contiguous give one result."""
    lengths = [40, 9]
    qkv = packed_qkv(lengths, 2, 16, torch.float32).detach()
    cu_seqlens = cu_seqlens_of(lengths)

    def same(x: torch.Tensor, y: torch.Tensor) -> bool:
        # PyTorch's own matmul, of which the reference is made, may take another way for other strides.
        return torch.allclose(x, y, rtol=0, atol=1e-6) if name == "reference" else torch.equal(x, y)

    with implementation(name):
        want = ragged_attention(*(x.contiguous() for x in qkv.unbind(1)), cu_seqlens, 40)
        assert same(ragged_attention(*qkv.unbind(1), cu_seqlens, 40), want)
        heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv.unbind(1)]
        assert same(ragged_attention(*heads_first, cu_seqlens, 40), want)
        channels_first = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in qkv.unbind(1)]
        assert channels_first[0].stride(2) != 1
        assert same(ragged_attention(*channels_first, cu_seqlens, 40), want)
        one_query_for_all = qkv[:1, 0].expand(49, 2, 16)
        got = ragged_attention(one_query_for_all, qkv[:, 1], qkv[:, 2], cu_seqlens, 40)
        again = ragged_attention(one_query_for_all.contiguous(), qkv[:, 1], qkv[:, 2], cu_seqlens, 40)
        assert torch.equal(got, again)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_expanded_gradient(name: str) -> None:
    """out.sum() hands a gradient with stride 0 to the backward."""
    qkv = packed_qkv([33], 2, 16, torch.float32)
    with implementation(name):
        (got,) = torch.autograd.grad(ragged_attention(*qkv.unbind(1), cu_seqlens_of([33]), 33).sum(), qkv)
        _, _, want = run(qkv, [33], torch.ones((33, 2, 16)))
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_neighbours_are_not_read(name: str) -> None:
    """A cell full of NaN leaves the others alone, forward and backward."""
    lengths = [30, 65, 30]
    qkv = packed_qkv(lengths, 1, 16, torch.float32)
    poisoned = qkv.detach().clone()
    poisoned[30:95] = math.nan
    grad_out = torch.ones((125, 1, 16))
    with implementation(name):
        want = run(qkv, lengths, grad_out)
        got = run(poisoned.requires_grad_(), lengths, grad_out)
    keep = torch.cat([torch.arange(30), torch.arange(95, 125)])
    for a, b in ((got[0], want[0]), (got[1].T, want[1].T), (got[2], want[2])):
        assert torch.equal(a[keep], b[keep])
        assert bool(a[30:95].isnan().all()), "and NaN is not swallowed"


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), max_size=6),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    slack=st.integers(0, 2),
    name=st.sampled_from(IMPLEMENTATIONS),
)
def test_ragged_shapes_against_a_dense_mask(
    lengths: list[int], heads: int, head_dim: int, slack: int, name: str
) -> None:
    """One dense attention over all tokens with a block-diagonal mask is the oracle."""
    total = sum(lengths)
    qkv = packed_qkv(lengths, heads, head_dim, torch.float32, slack)
    grad_out = torch.randn((total + slack, heads, head_dim), generator=torch.Generator().manual_seed(6))
    with implementation(name):
        out, _, grad = run(qkv, lengths, grad_out)
    if total == 0:
        assert not out.any()
        return
    exact = qkv.detach()[:total].double().requires_grad_()
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    q, k, v = (x.transpose(0, 1) for x in exact.unbind(1))
    scores = (q @ k.mT * head_dim**-0.5).masked_fill(segment[:, None] != segment, -math.inf)
    exact_out = (scores.softmax(dim=-1) @ v).transpose(0, 1)
    (exact_grad,) = torch.autograd.grad(exact_out, exact, grad_out[:total].double())
    assert relative_error(out[:total], exact_out) < 2e-6
    assert relative_error(grad[:total], exact_grad) < 5e-6


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(overload: str) -> None:
    for dtype, slack in ((torch.float32, 0), (torch.bfloat16, 2)):
        qkv = torch.randn((25 + slack, 3, 2, 16), dtype=dtype)
        q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(1))
        cu_seqlens = cu_seqlens_of([10, 0, 15])
        op = getattr(torch.ops.xtg.ragged_attention, overload)
        torch.library.opcheck(op, (q, k, v, cu_seqlens, 15, 0.25))
        out, lse = op(q.detach(), k.detach(), v.detach(), cu_seqlens, 15, 0.25)
        backward = getattr(torch.ops.xtg.ragged_attention_backward, overload)
        for grad_lse in (None, torch.randn_like(lse)):
            args = (torch.randn_like(out), grad_lse, *(x.detach() for x in (q, k, v)), out, lse, cu_seqlens, 15, 0.25)
            torch.library.opcheck(backward, args)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compile_without_graph_breaks_for_changing_shapes(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda qkv, cu_seqlens, n: ragged_attention(*qkv.unbind(1), cu_seqlens, n), fullgraph=True, backend="aot_eager"
    )
    with use_backend(backend):
        for lengths in ([5, 9], [0, 30, 2], [64]):
            qkv = packed_qkv(lengths, 2, 16, torch.float32)
            args = cu_seqlens_of(lengths), max(lengths)
            got, want = compiled(qkv, *args), ragged_attention(*qkv.unbind(1), *args)
            assert torch.equal(got, want)
            (a,), (b,) = torch.autograd.grad(got.sum(), qkv), torch.autograd.grad(want.sum(), qkv)
            assert torch.equal(a, b)


def test_autocast_runs_in_its_dtype() -> None:
    qkv = packed_qkv([12], 2, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ragged_attention(*qkv.unbind(1), cu_seqlens_of([12]), 12)
    want = ragged_attention(*qkv.detach().bfloat16().unbind(1), cu_seqlens_of([12]), 12)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert grad.dtype == torch.float32


def test_flops_are_those_of_the_segments() -> None:
    lengths = [10, 0, 25]
    qkv = packed_qkv(lengths, 3, 16, torch.float32, slack=4)
    squares = sum(n * n for n in lengths)
    with FlopCounterMode(display=False) as forward:
        out = ragged_attention(*qkv.unbind(1), cu_seqlens_of(lengths), 25)
    with FlopCounterMode(display=False) as backward:
        out[:35].sum().backward()
    assert forward.get_total_flops() == 4 * 3 * 16 * squares
    assert backward.get_total_flops() == 10 * 3 * 16 * squares


def valid() -> dict[str, object]:
    q = torch.zeros((7, 2, 16))
    return {"q": q, "k": q, "v": q, "cu_seqlens": cu_seqlens_of([3, 4]), "max_seqlen": 4}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q: expected a torch.Tensor, got list"),
        (
            {"q": torch.zeros((7, 32))},
            ValueError,
            r"q: expected shape \(total_nnz, num_heads, head_dim\), got \(7, 32\)",
        ),
        ({"k": torch.zeros((6, 2, 16))}, ValueError, r"k: expected shape \(7, 2, 16\), got \(6, 2, 16\)"),
        ({"v": torch.zeros((7, 2, 16)).half()}, TypeError, "v: expected dtype torch.float32, got torch.float16"),
        ({"q": torch.zeros((7, 2, 16), dtype=torch.int32)}, TypeError, "q: expected float32.* got torch.int32"),
        ({"v": torch.zeros((7, 2, 16), device="meta")}, ValueError, "v: expected device cpu, got meta"),
        ({"q": torch.zeros((7, 2, 0))}, ValueError, "head_dim >= 1"),
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, TypeError, "cu_seqlens: expected dtype torch.int32, got torch.int64"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, "cu_seqlens: expected at least one entry"),
        ({"cu_seqlens": torch.tensor([1, 7]).int()}, ValueError, "cu_seqlens: expected to start at 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 5, 3]).int()}, ValueError, "non-decreasing values, got 5 then 3 at segment 1"),
        ({"cu_seqlens": torch.tensor([0, 8]).int()}, ValueError, "end at or before total_nnz = 7, got 8"),
        ({"max_seqlen": 3}, ValueError, "max_seqlen: expected at least the longest segment, 4, got 3"),
        ({"max_seqlen": 4.0}, TypeError, "max_seqlen: expected an int, got float"),
    ],
)
def test_refusals_name_argument_expected_and_got(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ragged_attention(**(valid() | change))  # type: ignore[arg-type]


@needs_cpp
def test_a_backend_asked_for_by_name_shows_all_reasons() -> None:
    q = torch.zeros((4, 1, 300), dtype=torch.float64)
    with use_backend("cpp"), pytest.raises(ValueError, match=r"head_dim is 300.*; dtype is torch.float64"):
        ragged_attention(q, q, q, cu_seqlens_of([4]), 4)
    assert ragged_attention(q, q, q, cu_seqlens_of([4]), 4).shape == q.shape  # auto takes the reference


@needs_cpp
def test_the_op_itself_refuses_what_would_read_outside() -> None:
    q = torch.zeros((4, 1, 16))
    for bounds in ([0, 5], [0, 3, 2], [1, 4]):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            torch.ops.xtg.ragged_attention.default(q, q, q, torch.tensor(bounds, dtype=torch.int32), 4, 1.0)
    with pytest.raises(RuntimeError, match="k: expected size 4"):
        torch.ops.xtg.ragged_attention.default(q, q[:3], q, cu_seqlens_of([3]), 4, 1.0)
