"""favor_attention: against float64 and plain PyTorch, gradients, edges, determinism, registration, refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.xtg_kernels.favor_cases import Case, error_limits, overall_errors, plain_favor, relative_errors
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
from xtg_kernels import favor_attention, use_backend

# Keys and queries of each cell: cells without either, of one row, and around the blocks of 64 rows.
MIXED = [(0, 5), (5, 0), (1, 1), (64, 64), (0, 0), (65, 130), (130, 3), (17, 63)]
REAL_DTYPES = [torch.float32, torch.bfloat16]
STABILIZERS = ["head", "cell"]


@pytest.mark.parametrize("sizes", [(8, 16), (20, 61), (64, 266)], ids=str)
@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_error_within_plain_pytorch(name: str, dtype: torch.dtype, stabilizer: str, sizes: tuple[int, int]) -> None:
    """Error against float64: at most 2x (forward) and 3x (gradients) that of plain PyTorch in the same dtype."""
    case = Case.random(MIXED, 2, *sizes, dtype, stabilizer=stabilizer)
    with implementation(name):
        got = case.run()
    assert got[0].dtype == dtype
    for error, limit in zip(relative_errors(got, case.exact()), error_limits(case), strict=True):
        assert error <= limit


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_segments_of_several_parts(name: str, dtype: torch.dtype) -> None:
    """Longer than the rows of one partial sum and of one unit of work, with several blocks of features."""
    case = Case.random([(2500, 700), (3, 2100)], 1, 16, 110, dtype)
    with implementation(name):
        got = case.run()
    for error, limit in zip(relative_errors(got, case.exact()), error_limits(case), strict=True):
        assert error <= limit


@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())
@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_edges(name: str, slack: int, lengths: list[int]) -> None:
    """Slack rows, which hold NaN, and rows of cells without keys or queries are zero."""
    case = Case.random([*zip(lengths, reversed(lengths), strict=True)], 2, 12, 33, torch.float32, slack)
    with implementation(name):
        got = case.run()
    out_error, grad_error = overall_errors(got, case.exact())
    assert out_error < 2e-6
    assert grad_error < 1e-5
    for x, unused in zip(got, case.unused(), strict=True):
        assert torch.equal(x[unused], torch.zeros_like(x[unused]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_queries_are_those_of_the_keys_by_default(name: str) -> None:
    lengths = [40, 0, 9]
    case = Case.random([(n, n) for n in lengths], 2, 16, 30, torch.float32)
    with implementation(name):
        want = case.run()[0]
        got = favor_attention(case.q, case.k, case.v, case.projection, cu_seqlens_of(lengths), 40)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_chosen_queries_get_what_they_get_among_all(name: str) -> None:
    """The last decoder layer asks at chosen rows only; in C++ these have the bits that they have among all rows."""
    lengths = [150, 70]
    case = Case.random([(n, n) for n in lengths], 2, 16, 110, torch.float32)
    chosen = torch.tensor([3, 4, 80, 149, 150, 200])
    with implementation(name):
        everywhere = case.run()[0]
        got = favor_attention(
            case.q[chosen],
            case.k,
            case.v,
            case.projection,
            cu_seqlens_of(lengths),
            150,
            cu_seqlens_q=cu_seqlens_of([4, 2]),
            max_seqlen_q=4,
        )
    if name == "reference":
        assert relative_error(got, everywhere[chosen]) < 1e-6
    else:
        assert torch.equal(got, everywhere[chosen])


def test_the_two_stabilizers_are_different_functions() -> None:
    """eps makes the maximum of the keys visible: over the heads of a cell it is not that of each head."""
    found = {s: Case.random([(30, 30)], 2, 16, 40, torch.float32, eps=1e-2, stabilizer=s).run()[0] for s in STABILIZERS}
    assert relative_error(found["head"], found["cell"]) > 1e-4


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_without_eps_the_stabilizers_cancel(name: str, dtype: torch.dtype) -> None:
    """Also where norms of 30 make every feature of a query vanish in float32."""
    case = Case.random([(90, 70)], 2, 16, 40, dtype, eps=0.0, stabilizer="cell")
    with torch.no_grad():
        case.q[::2] *= 8
        case.k[:, 1] *= 2
    with implementation(name):
        got = case.run()
    for x in got:
        assert bool(x.isfinite().all())
    want = case.exact()
    case.stabilizer = "head"
    assert relative_errors(case.exact(), want)[0] < 1e-9
    assert max(relative_errors(got, want)) < (1e-4 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.3])
def test_gradcheck_of_the_reference(eps: float, stabilizer: str) -> None:
    """Finite differences of the op itself, which know of the stabilisers whatever an oracle makes of them."""
    lengths = [(0, 2), (3, 2), (1, 3), (5, 0), (4, 1)]
    case = Case.random(lengths, 2, 3, 5, torch.float64, slack=1, eps=eps, stabilizer=stabilizer)
    q, k, v = (x.detach().nan_to_num(0.5).requires_grad_() for x in (case.q, case.k, case.v))
    assert torch.autograd.gradcheck(case.attend, (q, k, v))


@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_gradient_of_the_reference_with_eps(stabilizer: str) -> None:
    """Against autograd through the formula, maxima and all."""
    case = Case.random(MIXED, 2, 6, 11, torch.float64, eps=0.1, stabilizer=stabilizer)
    assert max(relative_errors(case.run(), case.exact())) < 1e-13


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_first_of_equal_maxima_gets_the_gradient(name: str, dtype: torch.dtype, stabilizer: str) -> None:
    """Rows that come again, in other blocks and units, and a head like another: the first gets all of it."""
    case = Case.random([(700, 70)], 2, 16, 110, dtype, eps=0.1, stabilizer=stabilizer)
    with torch.no_grad():
        for x in (case.q, case.k, case.v, case.grad_out):
            x.copy_(x[:35].repeat(len(x) // 35, 1, 1))
            x[:, 1] = x[:, 0]
    with implementation(name):
        grad_k = case.run()[2].float()
    scores = case.k.detach()[:35, 0].float() @ case.projection.T
    row = int(scores.argmax()) // scores.shape[1]
    beyond = (grad_k - grad_k[35:70].repeat(20, 1, 1)).norm(dim=2)  # what a row gets that its second copy does not
    found = (beyond > 0.1 * grad_k[row, 0].norm()).nonzero().tolist()
    assert found == ([[row, 0], [row, 1]] if stabilizer == "head" else [[row, 0]])


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_maximum_that_grows_all_the_way(name: str, dtype: torch.dtype) -> None:
    """Exponents from 0 to 60 along the cell: what was summed before has to be brought to each new maximum."""
    case = Case.random([(2200, 200)], 2, 16, 110, dtype, eps=0.0)
    case.projection[50] *= 11 / case.projection[50].norm()
    towards = 16**0.25 * case.projection[50] * torch.linspace(0, 1, 2200)[:, None, None]
    with torch.no_grad():
        case.k.copy_(0.3 * case.k + towards)
        case.q *= 0.5
    keys = 16**-0.25 * case.k.detach().double()
    exponents = keys @ case.projection.double().T - keys.square().sum(-1, keepdim=True) / 2
    assert float(exponents[:64].max()) < 10
    assert float(exponents.max()) > 55
    with implementation(name):
        got = case.run()
    for error, limit in zip(relative_errors(got, case.exact()), error_limits(case), strict=True):
        assert error <= limit


@pytest.mark.parametrize("size", [1e5, 1e12, 1e20, 1e30])
@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_of_any_size(name: str, dtype: torch.dtype, stabilizer: str, size: float) -> None:
    """A query or a key whose norm, or its square, is past all others: nothing is left of its features but eps, and of the
    other keys' features where it is their maximum. Its gradient is zero, not the rounding error of its size."""
    case = Case.random([(70, 90), (33, 20), (40, 64)], 2, 16, 110, dtype, stabilizer=stabilizer)
    with torch.no_grad():
        case.q[5] *= size
        case.q[100, 1, 3] = size
        case.k[110, 0] *= size
    with implementation(name):
        got = case.run()
    for error, limit in zip(relative_errors(got, case.exact()), error_limits(case), strict=True):
        assert error <= limit
    assert not got[1][5].any()
    assert not got[2][110, 0].any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_values_of_one_sign_lose_no_digits(name: str) -> None:
    """Long sums of numbers that are alike round the same way every time, where eps rules and where it does not."""
    for eps in (1e-4, 10.0):
        case = Case.random([(4000, 50)], 1, 16, 110, torch.float32, eps=eps)
        with torch.no_grad():
            case.v.copy_(0.1 + 1e-3 * case.v)
        with implementation(name):
            out = case.run()[0]
        assert relative_error(out, case.exact()[0]) < 5e-7


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_same_bits_for_any_thread_count_and_batch(isa: str, dtype: torch.dtype) -> None:
    """A cell has the same bits alone, among others, and on one thread or two; forward and gradients."""
    lengths = [(200, 70), (0, 5), (37, 37), (2100, 600), (1, 2100)]
    case = Case.random(lengths, 2, 20, 50, dtype, stabilizer="cell")
    with implementation(f"cpp-{isa}"):
        with threads(1):
            one = case.run()
        with threads(2):
            two = case.run()
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)
        for c in range(len(lengths)):
            alone, rows = case.cell(c)
            for a, b in zip(alone.run(), one, strict=True):
                assert torch.equal(a, b[rows[0] if len(b) == len(case.q) else rows[1]])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_layouts(name: str) -> None:
    """Views of a packed tensor, transposed heads, and a last dimension that is not contiguous give one result."""
    cu_seqlens, projection = cu_seqlens_of([40, 9]), torch.randn((30, 16))
    qkv = torch.randn((49, 3, 2, 16))
    strided_projection = projection.T.contiguous().T
    with implementation(name):
        want = favor_attention(*(x.contiguous() for x in qkv.unbind(1)), projection, cu_seqlens, 40)
        # PyTorch's products of the reference take other ways for other layouts.
        tolerance = 1e-6 if name == "reference" else 0.0
        assert relative_error(favor_attention(*qkv.unbind(1), strided_projection, cu_seqlens, 40), want) <= tolerance
        heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv.unbind(1)]
        assert relative_error(favor_attention(*heads_first, projection, cu_seqlens, 40), want) <= tolerance
        channels_first = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in qkv.unbind(1)]
        assert channels_first[0].stride(2) != 1
        assert relative_error(favor_attention(*channels_first, projection, cu_seqlens, 40), want) <= tolerance


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_expanded_gradient(name: str) -> None:
    """out.sum() hands a gradient with stride 0 to the backward."""
    case = Case.random([(33, 20)], 2, 16, 30, torch.float32)
    case.grad_out = torch.ones(case.q.shape)
    inputs = (case.q, case.k, case.v)
    with implementation(name):
        got = torch.autograd.grad(case.attend(*inputs).sum(), inputs)
        want = case.run()[1:]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", ["keys", "queries"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_neighbours_are_not_read(name: str, bad: str) -> None:
    """A cell full of NaN leaves the others alone, forward and backward; a query of NaN leaves other outputs alone."""
    case = Case.random([(30, 30), (65, 65), (30, 30)], 2, 16, 30, torch.float32)
    with implementation(name):
        want = case.run()
        with torch.no_grad():
            if bad == "keys":
                case.k[30:95] = math.nan
            else:
                case.q[40:95] = math.nan
        got = case.run()
    keep = torch.cat([torch.arange(30), torch.arange(95, 125)])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[keep], b[keep])
    assert bool(got[0][40:95].isnan().all()), "and NaN is not swallowed"
    assert bool(got[2][30:95].isnan().all())
    if bad == "queries":
        assert torch.equal(got[0][30:40], want[0][30:40])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), max_size=5),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    features=st.integers(1, 120),
    slack=st.integers(0, 2),
    eps=st.sampled_from([0.0, 1e-4, 0.3]),
    stabilizer=st.sampled_from(STABILIZERS),
    name=st.sampled_from(IMPLEMENTATIONS),
)
def test_ragged_shapes_against_the_formula(
    lengths: list[tuple[int, int]],
    heads: int,
    head_dim: int,
    features: int,
    slack: int,
    eps: float,
    stabilizer: str,
    name: str,
) -> None:
    case = Case.random(lengths, heads, head_dim, features, torch.float32, slack, eps=eps, stabilizer=stabilizer)
    with implementation(name):
        got = case.run()
    out_error, grad_error = overall_errors(got, case.exact())
    plain_error, _ = overall_errors(case.plain(torch.float32), case.exact())
    assert out_error < max(2e-6, 2 * plain_error)
    assert grad_error < 1e-5


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(overload: str) -> None:
    for dtype, slack in ((torch.float32, 0), (torch.bfloat16, 2)):
        case = Case.random([(10, 4), (0, 3), (15, 20)], 2, 16, 20, dtype, slack)
        q, k, v = (x.detach().nan_to_num().requires_grad_() for x in (case.q, case.k, case.v))
        segments = (case.cu_seqlens, 15, case.cu_seqlens_q, 20, 1e-4, True)
        op = getattr(torch.ops.xtg.favor_attention, overload)
        torch.library.opcheck(op, (q, k, v, case.projection, *segments))
        q, k, v = (x.detach() for x in (q, k, v))
        saved = op(q, k, v, case.projection, *segments)
        backward = getattr(torch.ops.xtg.favor_attention_backward, overload)
        torch.library.opcheck(backward, (torch.randn_like(saved[0]), q, k, v, case.projection, *saved, *segments))


@needs_cpp
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_implementations_save_the_same(eps: float) -> None:
    """context, key_sum, key_max, row_max and row_sum mean the same in all implementations."""
    case = Case.random([(70, 80), (0, 3), (4, 0), (5, 5)], 2, 16, 30, torch.float32, 2, eps=eps, stabilizer="cell")
    args = (case.q, case.k, case.v, case.projection, case.cu_seqlens, 70, case.cu_seqlens_q, 80, eps, True)
    want = torch.ops.xtg.favor_attention.reference(*args)
    for isa in ISAS:
        with implementation(f"cpp-{isa}"):
            got = torch.ops.xtg.favor_attention.default(*args)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compile_without_graph_breaks_for_changing_shapes(backend: str) -> None:
    torch._dynamo.reset()
    projection = torch.randn((30, 16))
    compiled = torch.compile(
        lambda qkv, cu_seqlens, n: favor_attention(*qkv.unbind(1), projection, cu_seqlens, n),
        fullgraph=True,
        backend="aot_eager",
    )
    with use_backend(backend):
        for lengths in ([5, 9], [0, 30, 2], [64]):
            qkv = torch.randn((sum(lengths), 3, 2, 16), requires_grad=True)
            args = cu_seqlens_of(lengths), max(lengths)
            got, want = compiled(qkv, *args), favor_attention(*qkv.unbind(1), projection, *args)
            assert torch.equal(got, want)
            grad_out = torch.randn(got.shape)
            (a,), (b,) = torch.autograd.grad(got, qkv, grad_out), torch.autograd.grad(want, qkv, grad_out)
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_projection_and_float16_in_float32(dtype: torch.dtype) -> None:
    case = Case.random([(12, 12)], 2, 16, 20, torch.float32)
    inside = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    with torch.autocast("cpu", dtype=dtype):
        q, k, v = (x.to(dtype) for x in (case.q, case.k, case.v))
        out = favor_attention(q, k, v, case.projection, case.cu_seqlens, 12)
    q, k, v = (x.detach().to(dtype).to(inside) for x in (case.q, case.k, case.v))
    assert out.dtype == inside
    assert torch.equal(out, favor_attention(q, k, v, case.projection, case.cu_seqlens, 12))
    (grad,) = torch.autograd.grad(out.sum(), case.q)
    assert grad.dtype == torch.float32


def test_flops_are_those_of_the_rows() -> None:
    """4 a head, channel, feature and row of q and k, backward 8; cells without keys or queries cost nothing."""
    case = Case.random([(10, 3), (0, 4), (7, 0), (25, 30)], 3, 16, 20, torch.float32, slack=4)
    rows = 10 + 3 + 25 + 30
    with FlopCounterMode(display=False) as forward:
        out = case.attend(case.q, case.k, case.v)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, (case.q, case.k, case.v), case.grad_out)
    assert forward.get_total_flops() == 4 * 3 * 16 * 20 * rows
    assert backward.get_total_flops() == 8 * 3 * 16 * 20 * rows


def test_flops_are_those_that_pytorch_counts_in_the_formula() -> None:
    """The products of the formula; what PyTorch adds are the denominators, which are one channel more."""
    case = Case.random([(10, 3)], 3, 16, 20, torch.float32)
    with FlopCounterMode(display=False) as plain:
        out = plain_favor(case, case.q, case.k, case.v)
    with FlopCounterMode(display=False) as plain_backward:
        torch.autograd.grad(out, (case.q, case.k, case.v), case.grad_out)
    denominator = 2 * 3 * 20 * 3
    assert plain.get_total_flops() == 4 * 3 * 16 * 20 * 13 + denominator
    # Autograd gives features, context, q, k and v their gradients, and does not compute scores again.
    assert plain_backward.get_total_flops() == (8 - 2) * 3 * 16 * 20 * 13 + 2 * denominator


def test_the_projection_gets_no_gradient() -> None:
    case = Case.random([(10, 3)], 3, 16, 20, torch.float32)
    case.projection.requires_grad_()
    case.attend(case.q, case.k, case.v).sum().backward()
    assert case.q.grad is not None
    assert case.projection.grad is None


def valid() -> dict[str, object]:
    q = torch.zeros((7, 2, 16))
    projection = torch.zeros((20, 16))
    return {"q": q, "k": q, "v": q, "projection": projection, "cu_seqlens": cu_seqlens_of([3, 4]), "max_seqlen": 4}


QUERIES = {"cu_seqlens_q": cu_seqlens_of([2, 5]), "max_seqlen_q": 5}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q: expected a torch.Tensor, got list"),
        ({"q": torch.zeros((7, 32))}, ValueError, r"q: expected shape \(total_q, num_heads, head_dim\), got \(7, 32\)"),
        ({"k": torch.zeros((6, 2, 16))}, ValueError, r"k: expected shape \(7, 2, 16\), got \(6, 2, 16\)"),
        ({"v": torch.zeros((6, 2, 16)), **QUERIES}, ValueError, r"v: expected shape \(7, 2, 16\), got \(6, 2, 16\)"),
        ({"v": torch.zeros((7, 2, 16)).double()}, TypeError, "v: expected dtype torch.float32, got torch.float64"),
        ({x: torch.zeros((7, 2, 16)).half() for x in "qkv"}, TypeError, "q: expected float32, .* features overflow"),
        ({"q": torch.zeros((7, 2, 16), dtype=torch.int32)}, TypeError, "q: expected float32.* got torch.int32"),
        ({"v": torch.zeros((7, 2, 16), device="meta")}, ValueError, "v: expected device cpu, got meta"),
        ({"q": torch.zeros((7, 2, 0))}, ValueError, "head_dim >= 1"),
        (
            {"projection": torch.zeros((20, 8))},
            ValueError,
            r"projection: expected shape \(num_features, 16\), got \(20, 8\)",
        ),
        ({"projection": torch.zeros((0, 16))}, ValueError, "projection: expected num_features >= 1"),
        ({"projection": torch.zeros((20, 16)).bfloat16()}, TypeError, "projection: expected dtype torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, TypeError, "cu_seqlens: expected dtype torch.int32, got torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 8]).int()}, ValueError, "cu_seqlens: .* before total_nnz = 7, got 8"),
        ({"max_seqlen": 3}, ValueError, "max_seqlen: expected at least the longest segment, 4, got 3"),
        ({"max_seqlen": 4.0}, TypeError, "max_seqlen: expected an int, got float"),
        ({"max_seqlen_q": 4}, ValueError, "max_seqlen_q: expected None without cu_seqlens_q"),
        ({"cu_seqlens_q": cu_seqlens_of([2, 5])}, ValueError, "max_seqlen_q: expected the longest segment"),
        ({**QUERIES, "max_seqlen_q": True}, TypeError, "max_seqlen_q: expected an int, got bool"),
        ({**QUERIES, "max_seqlen_q": 4}, ValueError, "max_seqlen_q: expected at least the longest segment, 5, got 4"),
        (
            {**QUERIES, "cu_seqlens_q": cu_seqlens_of([7])},
            ValueError,
            r"cu_seqlens_q: expected shape \(3,\), got \(2,\)",
        ),
        (
            {**QUERIES, "cu_seqlens_q": cu_seqlens_of([2, 6])},
            ValueError,
            "cu_seqlens_q: expected to end at or before total_q = 7, got 8",
        ),
        ({"eps": -1e-4}, ValueError, r"eps: expected a number in \[0, inf\), got -0.0001"),
        ({"eps": math.nan}, ValueError, r"eps: expected a number in \[0, inf\), got nan"),
        ({"stabilizer": "batch"}, ValueError, "stabilizer: expected one of head, cell, got 'batch'"),
    ],
)
def test_refusals_name_argument_expected_and_got(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        favor_attention(**(valid() | change))  # type: ignore[arg-type]


@needs_cpp
def test_a_backend_asked_for_by_name_shows_all_reasons() -> None:
    q = torch.zeros((4, 1, 300), dtype=torch.float64)
    args: Sequence[Any] = (q, q, q, q[:, 0], cu_seqlens_of([4]), 4)
    with use_backend("cpp"), pytest.raises(ValueError, match=r"head_dim is 300.*; dtype is torch.float64"):
        favor_attention(*args)
    assert favor_attention(*args).shape == q.shape  # auto takes the reference


@needs_cpp
def test_the_op_itself_refuses_what_would_read_outside() -> None:
    q, projection = torch.zeros((4, 1, 16)), torch.zeros((20, 16))
    op = torch.ops.xtg.favor_attention.default
    four = cu_seqlens_of([4])
    for bounds in ([0, 5], [0, 3, 2], [1, 4]):
        bad = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            op(q, q, q, projection, bad, 4, four, 4, 1e-4, False)
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            op(q, q, q, projection, four, 4, bad, 4, 1e-4, False)
    with pytest.raises(RuntimeError, match="v: expected size 4"):
        op(q, q, q[:3], projection, four, 4, four, 4, 1e-4, False)
    with pytest.raises(RuntimeError, match="projection: expected size 16"):
        op(q, q, q, projection[:, :8], four, 4, four, 4, 1e-4, False)
