"""expression_embedding and distinct_index: against float64, gradients, equal values, edges, determinism, refusals."""

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
from xtg_kernels import distinct_index, expression_embedding, use_backend

GENES = 50
NAMES = ("values", "w1", "b1", "w2", "b2", "bin_table", "gene_table")


def weights_of(bins: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """w1, b1, w2, b2, bin_table, gene_table as leaves."""
    generator = torch.Generator().manual_seed(bins * 1009 + dim)
    shapes: list[tuple[int, ...]] = [(bins,), (bins,), (bins, bins), (bins,), (bins, dim), (GENES, dim)]
    scales = [1.0, 0.5, bins**-0.5, 0.5, 1.0, 1.0]
    return [
        (s * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
        for s, shape in zip(scales, shapes, strict=True)
    ]


def cells(lengths: list[int], slack: int = 0) -> tuple[Tensor, Tensor]:
    """Values as UMI counts give them (few distinct ones) and gene ids; slack rows hold NaN and impossible ids."""
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    values = torch.randint(1, 30, (total + slack,), generator=generator).float().log1p()
    gene_ids = torch.randint(0, GENES, (total + slack,), generator=generator).int()
    values[total:], gene_ids[total:] = math.nan, -(10**6)
    return values, gene_ids


def plain_embedding(
    values: Tensor, weights: list[Tensor], gene_ids: Tensor, alpha: float, dtype: torch.dtype
) -> Tensor:
    """The formula as a user would write it in one dtype, unfused, one row a token."""
    w1, b1, w2, b2, bin_table, gene_table = (w.to(dtype) for w in weights)
    hidden = torch.nn.functional.leaky_relu(values.to(dtype)[:, None] * w1 + b1, 0.1)
    logits = alpha * hidden + torch.nn.functional.linear(hidden, w2, b2)
    return logits.softmax(dim=-1) @ bin_table + gene_table[gene_ids.long()]


def run(
    values: Tensor, weights: list[Tensor], gene_ids: Tensor, grad_out: Tensor, lengths: list[int] | None
) -> tuple[Tensor, list[Tensor]]:
    values = values.clone().requires_grad_()
    out = expression_embedding(
        values,
        *weights[:5],
        alpha=0.8,
        gene_ids=gene_ids,
        gene_table=weights[5],
        cu_seqlens=None if lengths is None else cu_seqlens_of(lengths),
    )
    return out.detach(), list(torch.autograd.grad(out, [values, *weights], grad_out))


@pytest.mark.parametrize(("bins", "dim"), [(100, 128), (7, 20), (130, 33), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_error_within_plain_pytorch(name: str, dtype: torch.dtype, bins: int, dim: int) -> None:
    """Error against float64: at most 2x (forward) and 3x (gradients) that of plain PyTorch in the same dtype."""
    lengths = [60, 0, 1, 300]
    values, gene_ids = cells(lengths)
    weights = weights_of(bins, dim, dtype)
    grad_out = torch.randn((361, dim), generator=torch.Generator().manual_seed(1)).to(dtype)
    with implementation(name):
        out, grads = run(values, weights, gene_ids, grad_out, lengths)

    def differentiate(compute: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf = values.clone().requires_grad_()
        result = plain_embedding(leaf, weights, gene_ids, 0.8, compute)
        return result.detach(), torch.autograd.grad(result, [leaf, *weights], grad_out.to(compute))

    exact_leaves = [w.detach().double().requires_grad_() for w in weights]
    exact_values = values.double().requires_grad_()
    exact_out = plain_embedding(exact_values, exact_leaves, gene_ids, 0.8, torch.float64)
    exact = torch.autograd.grad(exact_out, [exact_values, *exact_leaves], grad_out.double())
    plain_out, plain = differentiate(dtype)
    assert relative_error(out, exact_out) <= 2 * relative_error(plain_out, exact_out)
    for what, got, plain_grad, exact_grad in zip(NAMES, grads, plain, exact, strict=True):
        if bins == 1 and what in ("values", "w1", "b1", "w2", "b2"):
            assert not got.any(), "a softmax over one bin is constant"
            continue
        # One bin weight's gradient is a difference of large sums: float32 keeps 2e-6 where plain PyTorch is luckier.
        bound = max(3 * relative_error(plain_grad, exact_grad), 2e-6)
        assert relative_error(got, exact_grad) <= bound, what


@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())
@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_edges_and_equal_values(name: str, slack: int, lengths: list[int]) -> None:
    """Equal values computed once give the bits of every token on its own; slack rows are zero and get no gradient."""
    total = sum(lengths)
    values, gene_ids = cells(lengths, slack)
    weights = weights_of(20, 12)
    grad_out = torch.randn((total + slack, 12), generator=torch.Generator().manual_seed(2))
    grad_out[total:] = math.nan
    with implementation(name):
        out, grads = run(values, weights, gene_ids, grad_out, lengths)
        each, each_grads = run(values[:total], weights, gene_ids[:total], grad_out[:total], None)
    assert torch.equal(out[:total], each)
    assert torch.equal(out[total:], torch.zeros((slack, 12)))
    assert torch.equal(grads[0][total:], torch.zeros(slack))
    assert torch.equal(grads[0][:total], each_grads[0])
    for got, want in zip(grads[1:], each_grads[1:], strict=True):
        assert relative_error(got, want) < 1e-5
        assert bool(got.isfinite().all())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_without_gene_table(name: str) -> None:
    values, _ = cells([40])
    weights = weights_of(20, 12)
    with implementation(name):
        out = expression_embedding(values, *weights[:5], cu_seqlens=cu_seqlens_of([40]))
        (grad,) = torch.autograd.grad(out.sum(), weights[4])
    zero_ids = torch.zeros(40, dtype=torch.int32)
    exact = plain_embedding(values, [*weights[:5], torch.zeros((1, 12))], zero_ids, 1.0, torch.float64)
    assert relative_error(out.detach(), exact.detach()) < 1e-6
    assert abs(grad.sum().item() - 40 * 12) < 1e-2, "bin weights of a token sum to one"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_mask_id_is_an_ordinary_value(name: str) -> None:
    """102.0, 0.0, negatives and huge values embed as themselves; NaN gives a NaN row and stays there."""
    values = torch.tensor([102.0, 0.0, -3.0, 1e30, 102.0, math.nan])
    weights = weights_of(20, 12)
    gene_ids = torch.arange(6, dtype=torch.int32)
    with implementation(name):
        out = expression_embedding(
            values, *weights[:5], gene_ids=gene_ids, gene_table=weights[5], cu_seqlens=cu_seqlens_of([6])
        ).detach()
    exact = plain_embedding(values.double(), weights, gene_ids, 1.0, torch.float64).detach()
    assert relative_error(out[:5], exact[:5]) < 1e-6
    assert bool(out[5].isnan().all())


@pytest.mark.parametrize("by_cell", [False, True])
@pytest.mark.parametrize("with_genes", [False, True])
def test_gradcheck_of_the_reference(with_genes: bool, by_cell: bool) -> None:
    """Some values come again in their cell; with cells the last row is slack."""
    values = torch.tensor([0.5, 1.5, 0.5, 2.0, 0.25, 2.0, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    weights = [w.detach().double().requires_grad_() for w in weights_of(4, 3)]
    keywords = {"gene_ids": torch.tensor([0, 3, 3, 0, 1, 2, 0, 1])} if with_genes else {}
    cells = {"cu_seqlens": cu_seqlens_of([3, 0, 4])} if by_cell else {}

    def function(values: Tensor, *weights: Tensor) -> Tensor:
        table = {"gene_table": weights[5]} if with_genes else {}
        return expression_embedding(values, *weights[:5], alpha=0.6, **keywords, **table, **cells)

    leaves = (values, *weights) if with_genes else (values, *weights[:5])
    assert torch.autograd.gradcheck(function, leaves)


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_thread_count_and_batch(isa: str, dtype: torch.dtype) -> None:
    """Gradients of parameters sum over the batch, so they are compared between thread counts only."""
    lengths = [200, 0, 37, 513, 1]
    values, gene_ids = cells(lengths)
    values += torch.arange(751) % 97 / 10  # enough distinct values for several blocks and gradient parts
    weights = weights_of(100, 40, dtype)
    grad_out = torch.randn((751, 40), generator=torch.Generator().manual_seed(3)).to(dtype)
    with implementation(f"cpp-{isa}"):
        with threads(1):
            one, one_grads = run(values, weights, gene_ids, grad_out, lengths)
        with threads(2):
            two, two_grads = run(values, weights, gene_ids, grad_out, lengths)
        assert torch.equal(one, two)
        for a, b in zip(one_grads, two_grads, strict=True):
            assert torch.equal(a, b)
        start = 0
        for length in lengths:
            rows = slice(start, start + length)
            alone, alone_grads = run(values[rows], weights, gene_ids[rows], grad_out[rows], [length])
            assert torch.equal(alone, one[rows])
            assert torch.equal(alone_grads[0], one_grads[0][rows])
            start += length


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), max_size=5),
    bins=st.integers(1, 40),
    dim=st.integers(1, 40),
    slack=st.integers(0, 2),
    wide_ids=st.booleans(),
    name=st.sampled_from(IMPLEMENTATIONS),
)
def test_ragged_shapes_against_the_formula(
    lengths: list[int], bins: int, dim: int, slack: int, wide_ids: bool, name: str
) -> None:
    total = sum(lengths)
    values, gene_ids = cells(lengths, slack)
    weights = weights_of(bins, dim)
    grad_out = torch.randn((total + slack, dim), generator=torch.Generator().manual_seed(4))
    with implementation(name):
        out, grads = run(values, weights, gene_ids.long() if wide_ids else gene_ids, grad_out, lengths)
    exact_leaves = [w.detach().double().requires_grad_() for w in weights]
    exact_values = values[:total].double().requires_grad_()
    exact_out = plain_embedding(exact_values, exact_leaves, gene_ids[:total], 0.8, torch.float64)
    assert relative_error(out[:total], exact_out) < 1e-6
    exact = torch.autograd.grad(exact_out, [exact_values, *exact_leaves], grad_out[:total].double())
    scale = max(g.abs().max().item() for g in exact if g.numel()) or 1.0
    for what, got, want in zip(NAMES, grads, exact, strict=True):
        got = got[:total] if what == "values" else got
        assert (got.double() - want).abs().max().item() <= 2e-5 * scale if want.numel() else True, what


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())
def test_distinct_index(name: str, lengths: list[int]) -> None:
    values, _ = cells(lengths, slack=2)
    with implementation(name):
        got = distinct_index(values, cu_seqlens_of(lengths)).tolist()
    want, start = [], 0
    for length in lengths:
        cell = values[start : start + length].tolist()
        want += [start + cell.index(v) for v in cell]
        start += length
    assert got == [*want, -1, -1]


@needs_cpp
def test_distinct_index_of_many_colliding_values() -> None:
    """All different, so that every slot of the table is probed; bits decide: 0.0 and -0.0 are two values."""
    values = torch.cat([torch.arange(5000).float() * 2.0**100, torch.tensor([-0.0, 0.0])])
    cu_seqlens = cu_seqlens_of([5002])
    want = torch.arange(5002, dtype=torch.int32)
    want[5001] = 0
    assert torch.equal(distinct_index(values, cu_seqlens), want)
    with use_backend("reference"):
        assert torch.equal(distinct_index(values, cu_seqlens), want)


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(overload: str) -> None:
    values, gene_ids = cells([10, 0, 15], slack=1)
    cu_seqlens = cu_seqlens_of([10, 0, 15])
    torch.library.opcheck(getattr(torch.ops.xtg.distinct_index, overload), (values, cu_seqlens))
    index = distinct_index(values, cu_seqlens)
    values = values.nan_to_num().requires_grad_()
    op = getattr(torch.ops.xtg.expression_embedding, overload)
    backward = getattr(torch.ops.xtg.expression_embedding_backward, overload)
    for dtype in (torch.float32, torch.bfloat16):
        weights = weights_of(20, 12, dtype)
        detached = [w.detach() for w in weights]
        for optional in ((gene_ids, weights[5], index), (None, None, None)):
            torch.library.opcheck(op, (values, *weights[:5], 0.8, *optional))
            plain = tuple(None if x is None else x.detach() for x in optional)
            grad_out = torch.randn((26, 12)).to(dtype)
            for needs_values_grad in (True, False):
                args = (grad_out, values.detach(), *detached[:5], 0.8, *plain, needs_values_grad)
                torch.library.opcheck(backward, args)


def test_compile_without_graph_breaks_for_changing_shapes() -> None:
    torch._dynamo.reset()
    weights = weights_of(20, 12)

    def embed(values: Tensor, gene_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        return expression_embedding(
            values, *weights[:5], gene_ids=gene_ids, gene_table=weights[5], cu_seqlens=cu_seqlens
        )

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 9], [0, 30, 2], [64]):
        values, gene_ids = cells(lengths)
        args = (values, gene_ids, cu_seqlens_of(lengths))
        got, want = compiled(*args), embed(*args)
        assert torch.equal(got, want)
        (a,), (b,) = torch.autograd.grad(got.sum(), weights[4]), torch.autograd.grad(want.sum(), weights[4])
        assert torch.equal(a, b)


def test_autocast_keeps_float32() -> None:
    values, _ = cells([12])
    weights = weights_of(20, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = expression_embedding(values, *(w.bfloat16() for w in weights[:5]))
    assert out.dtype == torch.float32


def test_flops_count_distinct_values() -> None:
    values, gene_ids = cells([30, 0, 20], slack=3)
    index = distinct_index(values, cu_seqlens_of([30, 0, 20]))
    distinct = len(set(values[:30].tolist())) + len(set(values[30:50].tolist()))
    weights = weights_of(20, 12)
    keywords = {"gene_ids": gene_ids, "gene_table": weights[5], "distinct_index": index}
    with FlopCounterMode(display=False) as forward:
        out = expression_embedding(values, *weights[:5], **keywords)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * (20 + 20 * 20 + 20 * 12) * distinct
    assert backward.get_total_flops() == 2 * (2 * 20 + 3 * 20 * 20 + 2 * 20 * 12) * distinct
    with FlopCounterMode(display=False) as with_values:
        out = expression_embedding(values.nan_to_num().requires_grad_(), *weights[:5], **keywords)
        out.sum().backward()
    pushed_forward = 2 * (20 * 20 + 20 * 12) * distinct + 2 * 12 * 50
    assert with_values.get_total_flops() == forward.get_total_flops() + backward.get_total_flops() + pushed_forward
    with FlopCounterMode(display=False) as each_token:
        expression_embedding(values[:50], *weights[:5])
    assert each_token.get_total_flops() == 2 * (20 + 20 * 20 + 20 * 12) * 50


def valid() -> dict[str, object]:
    w1, b1, w2, b2, bin_table, gene_table = (w.detach() for w in weights_of(4, 3))
    values, gene_ids = cells([7])
    return {
        "values": values, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "bin_table": bin_table,
        "gene_ids": gene_ids, "gene_table": gene_table,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros((7, 1))}, ValueError, r"values: expected shape \(total_nnz,\), got \(7, 1\)"),
        ({"values": torch.zeros(7).half()}, TypeError, "values: expected dtype torch.float32"),
        ({"w1": torch.zeros(5)}, ValueError, r"w1: expected shape \(4,\), got \(5,\)"),
        ({"w2": torch.zeros((4, 5))}, ValueError, r"w2: expected shape \(4, 4\), got \(4, 5\)"),
        ({"b2": torch.zeros(4).bfloat16()}, TypeError, "b2: expected dtype torch.float32, got torch.bfloat16"),
        ({"bin_table": torch.zeros((0, 3))}, ValueError, "at least one bin"),
        ({"bin_table": torch.zeros((4, 3)).int()}, TypeError, "bin_table: expected float32"),
        ({"gene_table": None}, ValueError, "gene_table: expected together with"),
        ({"gene_ids": None}, ValueError, "gene_ids: expected together with"),
        ({"gene_ids": torch.zeros(6, dtype=torch.int32)}, ValueError, r"gene_ids: expected shape \(7,\)"),
        ({"gene_ids": torch.zeros(7)}, TypeError, "gene_ids: expected dtype int32 or int64, got torch.float32"),
        ({"gene_ids": torch.tensor([0, 1, 2, 50, 0, 0, 0])}, ValueError, r"\[0, 50\), got 50 at 3"),
        ({"gene_ids": torch.tensor([0, -1, 2, 5, 0, 0, 0])}, ValueError, r"\[0, 50\), got -1 at 1"),
        ({"gene_table": torch.zeros((50, 4))}, ValueError, r"gene_table: expected shape \(rows, 3\), got \(50, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 9]).int()}, ValueError, "end at or before total_nnz = 7, got 9"),
        ({"distinct_index": torch.zeros(7)}, TypeError, "distinct_index: expected dtype torch.int32"),
        (
            {"distinct_index": torch.zeros(7).int(), "cu_seqlens": torch.tensor([0, 7]).int()},
            ValueError,
            "only one of cu_seqlens and distinct_index",
        ),
    ],
)
def test_refusals_name_argument_expected_and_got(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        expression_embedding(**(valid() | change))  # type: ignore[arg-type]


@needs_cpp
def test_the_op_itself_refuses_what_would_read_outside() -> None:
    a = valid()
    op = torch.ops.xtg.expression_embedding.default
    weights = (a["values"], a["w1"], a["b1"], a["w2"], a["b2"], a["bin_table"], 1.0)
    with pytest.raises(RuntimeError, match="gene_ids: expected ids"):
        op(*weights, torch.full((7,), 50, dtype=torch.int32), a["gene_table"], None)
    with pytest.raises(RuntimeError, match="distinct_index"):
        op(*weights, None, None, torch.tensor([0, 5, 0, 0, 0, 0, 0], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="distinct_index"):
        op(*weights, None, None, torch.tensor([0, 0, 1, 0, 0, 0, 0], dtype=torch.int32))
