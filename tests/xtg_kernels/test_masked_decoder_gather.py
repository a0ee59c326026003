"""masked_decoder_gather: against a dense oracle, gradients, edges, asked genes, determinism, refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tests.xtg_kernels.ragged_cases import (
    IMPLEMENTATIONS,
    ISAS,
    cu_seqlens_of,
    implementation,
    needs_cpp,
    relative_error,
    threads,
)
from xtg_kernels import masked_decoder_gather

NAMES = ("table", "zero_row", "mask_row", "encoded")


@dataclass(frozen=True)
class Cells:
    """Genes of each cell: encoded, masked (None: no masked_ids are given) and asked for (None: all of the table)."""

    num_genes: int
    encoded: list[list[int]]
    masked: list[list[int]] | None
    asked: list[list[int]] | None = None

    @property
    def total_nnz(self) -> int:
        return sum(map(len, self.encoded))

    def indices(self, slack: int = 0, dtype: torch.dtype = torch.int32) -> tuple[tuple[Tensor | None, ...], dict]:
        """The positional and keyword arguments behind the rows; slack entries hold impossible genes."""
        cu_seqlens, gene_ids = _ragged(self.encoded, slack, dtype)
        masked_cu, masked_ids = (None, None) if self.masked is None else _ragged(self.masked, slack, dtype)
        keywords = {}
        if self.asked is not None:
            out_cu, out_genes = _ragged(self.asked, slack, dtype)
            keywords = {"out_genes": out_genes, "out_cu_seqlens": out_cu}
        return (cu_seqlens, gene_ids, masked_ids, masked_cu), keywords


def _ragged(genes: Sequence[Sequence[int]], slack: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    ids = [gene for cell in genes for gene in cell] + [-(10**6)] * slack
    return cu_seqlens_of([len(cell) for cell in genes]), torch.tensor(ids, dtype=dtype)


def random_cells(
    num_genes: int, encoded: Sequence[int], masked: Sequence[int] | None, asked: Sequence[int] | None = None
) -> Cells:
    """Cells with these numbers of encoded, masked and asked genes, drawn at random."""
    generator = torch.Generator().manual_seed(num_genes + sum(encoded))

    def draw(counts: Sequence[int], skipped: Sequence[list[int]]) -> list[list[int]]:
        order = [torch.randperm(num_genes, generator=generator).tolist() for _ in counts]
        free = [[g for g in genes if g not in set(skip)] for genes, skip in zip(order, skipped, strict=True)]
        return [sorted(genes[:count]) for genes, count in zip(free, counts, strict=True)]

    nothing: list[list[int]] = [[] for _ in encoded]
    encoded_genes = draw(encoded, nothing)
    return Cells(
        num_genes,
        encoded_genes,
        None if masked is None else draw(masked, encoded_genes),
        None if asked is None else draw(asked, nothing),
    )


EDGES = {
    "no cells": Cells(7, [], []),
    "no cells, asked genes": Cells(7, [], [], []),
    "nothing encoded": Cells(7, [[], []], [[1, 2], []]),
    "empty cells": Cells(7, [[], [0, 6], [], [3], []], [[], [], [2], [0], []]),
    "everything masked": Cells(5, [[], []], [[0, 1, 2, 3, 4]] * 2),
    "everything encoded": Cells(5, [[0, 1, 2, 3, 4]], [[]]),
    "nothing masked": Cells(5, [[1], [0, 4]], None),
    "one gene": Cells(1, [[0], [], []], [[], [0], []]),
    "genes over several blocks": random_cells(2200, [700, 0, 90], [300, 4, 0]),
    "asked genes": random_cells(40, [9, 0, 20], [8, 5, 0], [12, 3, 40]),
    "one gene asked": Cells(9, [[2], [3], [2, 5]], [[3], [], []], [[2], [2], [2]]),
    "some cells not asked": Cells(9, [[2], [3], [2, 5]], [[3], [], []], [[], [0, 3], []]),
    "nothing asked": Cells(9, [[2]], [[3]], [[]]),
}


def leaves_of(cells: Cells, dim: int, dtype: torch.dtype = torch.float32, slack: int = 0) -> list[Tensor]:
    """table, zero_row, mask_row and encoded, whose slack rows are NaN."""
    generator = torch.Generator().manual_seed(dim)
    shapes = [(cells.num_genes, dim), (dim,), (dim,), (cells.total_nnz + slack, dim)]
    leaves = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    leaves[3][cells.total_nnz :] = math.nan
    return [x.requires_grad_() for x in leaves]


def plain_rows(leaves: list[Tensor], cells: Cells, dtype: torch.dtype) -> Tensor:
    """What to compute, in dense PyTorch operations: (batch, num_genes, dim), or the asked rows one after the other."""
    table, zero_row, mask_row, encoded = (x.to(dtype) for x in leaves)
    batch = len(cells.encoded)
    added = zero_row.expand(batch, *table.shape).clone()
    for c, genes in enumerate(cells.masked or []):
        added[c, genes] = mask_row.expand(len(genes), -1)
    start = 0
    for c, genes in enumerate(cells.encoded):
        added[c, genes] = encoded[start : start + len(genes)]
        start += len(genes)
    rows = table + added
    if cells.asked is None:
        return rows
    asked = [(c, gene) for c, genes in enumerate(cells.asked) for gene in genes]
    return rows[[c for c, _ in asked], [gene for _, gene in asked]]


def exact_rows_and_grads(leaves: list[Tensor], cells: Cells, grad_out: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The oracle in float64; grad_out may have slack rows at its end."""
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    out = plain_rows(leaves, cells, torch.float64)
    grads = torch.autograd.grad(out, leaves, grad_out[: out.shape[0]].double(), materialize_grads=True)
    return out.detach(), grads


def gradient_like(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(list(shape), generator=torch.Generator().manual_seed(1)).to(dtype)


def run(leaves: list[Tensor], cells: Cells, grad_out: Tensor, slack: int = 0) -> tuple[Tensor, list[Tensor]]:
    indices, keywords = cells.indices(slack)
    out = masked_decoder_gather(*leaves, *indices, **keywords)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad_out))


@pytest.mark.parametrize("asked", [None, (80, 0, 30)], ids=["all genes", "asked genes"])
@pytest.mark.parametrize("dim", [128, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_error_within_plain_pytorch(name: str, dtype: torch.dtype, dim: int, asked: tuple[int, ...] | None) -> None:
    """The output has the bits of plain PyTorch, one rounded sum; gradients at most three times its error."""
    cells = random_cells(90, [40, 0, 5], [30, 9, 0], asked)
    leaves = leaves_of(cells, dim, dtype)
    plain_out = plain_rows(leaves, cells, dtype)
    grad_out = gradient_like(plain_out.shape, dtype)
    with implementation(name):
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
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_edges_and_slack(name: str, cells: Cells, slack: int) -> None:
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
    with implementation(name):
        out, grads = run(leaves, cells, grad_out, slack)
    assert out.shape == shape
    assert relative_error(out[:used], exact_out) < 1e-6
    assert not out[used:].any()
    assert not grads[3][cells.total_nnz :].any()
    for what, got, want in zip(NAMES, grads, exact, strict=True):
        assert relative_error(got, want) < 1e-6, what


@pytest.mark.parametrize("masked", [None, (2, 1, 0)], ids=["no masked genes", "masked genes"])
@pytest.mark.parametrize("asked", [None, (5, 0, 3)], ids=["all genes", "asked genes"])
def test_gradcheck_of_the_reference(asked: tuple[int, ...] | None, masked: tuple[int, ...] | None) -> None:
    cells = random_cells(6, [3, 0, 2], masked, asked)
    leaves = [x.detach().double().requires_grad_() for x in leaves_of(cells, 3)]
    indices, keywords = cells.indices(dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda *rows: masked_decoder_gather(*rows, *indices, **keywords), leaves)


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("asked", [None, (400, 30, 900, 200)], ids=["all genes", "asked genes"])
def test_same_bits_for_any_thread_count_and_batch(isa: str, asked: tuple[int, ...] | None) -> None:
    """Gradients of table, zero_row and mask_row sum over the batch, so they are compared between thread counts only."""
    cells = random_cells(1000, [300, 0, 7, 600], [90, 40, 900, 100], asked)
    leaves = leaves_of(cells, 24)
    grad_out = gradient_like(plain_rows(leaves, cells, torch.float32).shape)
    with implementation(f"cpp-{isa}"):
        with threads(1):
            one, one_grads = run(leaves, cells, grad_out)
        with threads(2):
            two, two_grads = run(leaves, cells, grad_out)
        for a, b in zip((one, *one_grads), (two, *two_grads), strict=True):
            assert torch.equal(a, b)
        token = row = 0
        for c in range(4):
            alone = Cells(
                1000, [cells.encoded[c]], [(cells.masked or [])[c]], None if cells.asked is None else [cells.asked[c]]
            )
            rows = slice(c, c + 1) if alone.asked is None else slice(row, row + len(alone.asked[0]))
            row = rows.stop
            tokens = slice(token, token + alone.total_nnz)
            token = tokens.stop
            encoded = leaves[3].detach()[tokens].requires_grad_()
            out, grads = run([*leaves[:3], encoded], alone, grad_out[rows])
            assert torch.equal(out, one[rows])
            assert torch.equal(grads[3], one_grads[3][tokens])


@pytest.mark.parametrize("asked", [False, True], ids=["all genes", "asked genes"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_long_sums_stay_exact(name: str, asked: bool) -> None:
    """100,000 rows go into zero_row, gradients of one sign: adding them one after the other would lose two digits."""
    batch, num_genes = 2500, 41
    cells = Cells(num_genes, [[]] * batch, [[0]] * batch, [list(range(num_genes))] * batch if asked else None)
    leaves = leaves_of(cells, 4)
    grad_out = torch.rand((batch, num_genes, 4), generator=torch.Generator().manual_seed(1))
    with implementation(name):
        _, grads = run(leaves, cells, grad_out.flatten(0, 1) if asked else grad_out)
    exact = grad_out.double()
    for got, want in zip(grads[:3], (exact.sum(0), exact[:, 1:].sum((0, 1)), exact[:, 0].sum(0)), strict=True):
        assert relative_error(got, want) < 2e-6


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ragged_shapes_against_the_oracle(data: st.DataObject) -> None:
    num_genes = data.draw(st.integers(1, 90))
    batch, dim, slack = (data.draw(st.integers(*bounds)) for bounds in ((0, 4), (1, 40), (0, 2)))
    encoded = [data.draw(st.integers(0, num_genes)) for _ in range(batch)]
    masked = [data.draw(st.integers(0, num_genes - n)) for n in encoded]
    asked = [data.draw(st.integers(0, num_genes)) for _ in range(batch)] if data.draw(st.booleans()) else None
    cells = random_cells(num_genes, encoded, masked if data.draw(st.booleans()) else None, asked)
    leaves = leaves_of(cells, dim, slack=slack)
    indices, keywords = cells.indices(slack, data.draw(st.sampled_from([torch.int32, torch.int64])))
    with implementation(data.draw(st.sampled_from(IMPLEMENTATIONS))):
        out = masked_decoder_gather(*leaves, *indices, **keywords)
        # Of one sign, so that no sum cancels to next to nothing.
        grad_out = gradient_like(out.shape).abs()
        grads = torch.autograd.grad(out, leaves, grad_out)
    exact_out, exact = exact_rows_and_grads(leaves, cells, grad_out)
    assert relative_error(out.detach()[: exact_out.shape[0]], exact_out) < 1e-6
    for what, got, want in zip(NAMES, grads, exact, strict=True):
        assert relative_error(got, want) < 2e-6, what


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_layouts(name: str) -> None:
    """Transposed and strided inputs and an expanded gradient give the result of their contiguous copies."""
    cells = random_cells(30, [9, 3], [8, 0])
    leaves = leaves_of(cells, 12)
    table, zero_row, mask_row, encoded = (x.detach() for x in leaves)
    strided = [
        table.mT.contiguous().mT,
        torch.stack([zero_row, zero_row], 1)[:, 0],
        torch.stack([mask_row, mask_row], 1)[:, 0],
        torch.cat([encoded, encoded], 1)[:, :12],
    ]
    assert not any(x.is_contiguous() for x in strided)
    ones = torch.ones((2, 30, 12))
    with implementation(name):
        want = run(leaves, cells, ones)
        got = run([x.requires_grad_() for x in strided], cells, ones[:1, :1, :1].expand(2, 30, 12))
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(overload: str) -> None:
    op = getattr(torch.ops.xtg.masked_decoder_gather, overload)
    backward = getattr(torch.ops.xtg.masked_decoder_gather_backward, overload)
    for cells in (random_cells(20, [5, 0, 9], [4, 2, 0], [7, 0, 3]), random_cells(20, [5, 0, 9], None)):
        indices, keywords = cells.indices(slack=1)
        indices = (*indices, keywords.get("out_genes"), keywords.get("out_cu_seqlens"))
        for dtype in (torch.float32, torch.bfloat16):
            leaves = leaves_of(cells, 12, dtype, slack=1)
            torch.library.opcheck(op, (*(x.detach().nan_to_num().requires_grad_() for x in leaves), *indices))
            shape = (3, 20, 12) if cells.asked is None else (11, 12)
            torch.library.opcheck(backward, (gradient_like(shape, dtype), *indices, 20))


def test_compile_without_graph_breaks_for_changing_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(masked_decoder_gather, fullgraph=True, backend="aot_eager")
    for encoded, masked, asked in (([5, 9], [3, 0], [4, 7]), ([0, 12, 2], [0, 6, 1], [1, 1, 20]), ([20], [0], [11])):
        for cells in (random_cells(20, encoded, masked), random_cells(20, encoded, masked, asked)):
            leaves = leaves_of(cells, 12)
            indices, keywords = cells.indices()
            got, want = (f(*leaves, *indices, **keywords) for f in (compiled, masked_decoder_gather))
            assert torch.equal(got, want)
            for a, b in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (got, want)), strict=True):
                assert torch.equal(a, b)


def test_autocast_gives_its_dtype() -> None:
    cells = random_cells(20, [5], [3])
    leaves = leaves_of(cells, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked_decoder_gather(*leaves, *cells.indices()[0])
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, plain_rows(leaves, cells, torch.bfloat16))
    (grad,) = torch.autograd.grad(out.sum(), leaves[1])
    assert grad.dtype == torch.float32


def test_flops_are_none() -> None:
    """Additions only; the formula says so, for a counter to know the op."""
    assert torch.ops.xtg.masked_decoder_gather in flop_registry
    assert torch.ops.xtg.masked_decoder_gather_backward in flop_registry
    cells = random_cells(20, [5], [3])
    with FlopCounterMode(display=False) as counter:
        masked_decoder_gather(*leaves_of(cells, 12), *cells.indices()[0]).sum().backward()
    assert counter.get_total_flops() == 0


def valid() -> dict[str, object]:
    table, zero_row, mask_row, encoded = torch.randn((9, 3)), torch.randn(3), torch.randn(3), torch.randn((5, 3))
    return {
        "table": table, "zero_row": zero_row, "mask_row": mask_row, "encoded": encoded,
        "cu_seqlens": cu_seqlens_of([2, 3]), "gene_ids": torch.tensor([1, 8, 0, 2, 4]),
        "masked_ids": torch.tensor([0, 5, 7]), "masked_cu_seqlens": cu_seqlens_of([1, 2]),
        "out_genes": torch.tensor([0, 1, 1]), "out_cu_seqlens": cu_seqlens_of([2, 1]),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"table": torch.zeros(9)}, ValueError, r"table: expected shape \(num_genes, dim\), got \(9,\)"),
        ({"table": torch.zeros((0, 3))}, ValueError, "table: expected at least one gene and one channel"),
        ({"table": torch.zeros((9, 3)).int()}, TypeError, "table: expected float32"),
        ({"zero_row": torch.zeros((1, 3))}, ValueError, r"zero_row: expected shape \(3,\), got \(1, 3\)"),
        ({"mask_row": torch.zeros(3).half()}, TypeError, "mask_row: expected dtype torch.float32, got torch.float16"),
        ({"encoded": torch.zeros((5, 4))}, ValueError, r"encoded: expected shape \(total_nnz, 3\), got \(5, 4\)"),
        ({"encoded": torch.zeros((6, 3))}, ValueError, r"gene_ids: expected shape \(6,\), got \(5,\)"),
        ({"gene_ids": torch.zeros(5)}, TypeError, "gene_ids: expected dtype int32 or int64, got torch.float32"),
        ({"gene_ids": torch.tensor([1, 9, 0, 2, 4])}, ValueError, r"gene_ids: .*table, \[0, 9\), got 9 at 1"),
        ({"gene_ids": torch.tensor([1, 8, 2, 0, 4])}, ValueError, "gene_ids: .*ascending .*, got 2 then 0 at 3"),
        ({"gene_ids": torch.tensor([1, 1, 0, 2, 4])}, ValueError, "gene_ids: .*ascending .*, got 1 then 1 at 1"),
        ({"cu_seqlens": cu_seqlens_of([2, 4])}, ValueError, "cu_seqlens: .*end at or before total_nnz = 5, got 6"),
        ({"masked_ids": None}, ValueError, "masked_ids: expected together with"),
        ({"masked_cu_seqlens": None}, ValueError, "masked_cu_seqlens: expected together with"),
        ({"masked_cu_seqlens": cu_seqlens_of([1, 3])}, ValueError, "masked_cu_seqlens: .*total_masked = 3, got 4"),
        ({"masked_cu_seqlens": cu_seqlens_of([3])}, ValueError, "masked_cu_seqlens: expected the 3 entries"),
        ({"masked_cu_seqlens": torch.tensor([0, 1, 3])}, TypeError, "masked_cu_seqlens: expected dtype torch.int32"),
        ({"masked_ids": torch.tensor([0, 7, 5])}, ValueError, "masked_ids: .*ascending .*, got 7 then 5 at 2"),
        ({"masked_ids": torch.tensor([0, -1, 5])}, ValueError, r"masked_ids: .*\[0, 9\), got -1 at 1"),
        ({"masked_ids": torch.tensor([0, 2, 7])}, ValueError, "masked_ids: .*got gene 2 of cell 1 in both"),
        ({"out_genes": None}, ValueError, "out_genes: expected together with"),
        ({"out_genes": torch.tensor([1, 1, 0])}, ValueError, "out_genes: .*ascending .*, got 1 then 1 at 1"),
        ({"out_genes": torch.tensor([1, 2, 9])}, ValueError, r"out_genes: .*\[0, 9\), got 9 at 2"),
        ({"out_cu_seqlens": cu_seqlens_of([2, 1, 0])}, ValueError, "out_cu_seqlens: expected the 3 entries"),
    ],
)
def test_refusals_name_argument_expected_and_got(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    masked_decoder_gather(**valid())  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        masked_decoder_gather(**(valid() | change))  # type: ignore[arg-type]


@needs_cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gene_ids": torch.tensor([1, 9, 0, 2, 4])}, "gene_ids: expected ids"),
        ({"gene_ids": torch.tensor([1, 2**32 + 2, 0, 2, 4])}, "gene_ids: expected ids"),
        ({"gene_ids": torch.tensor([1, 0, 0, 2, 4])}, "gene_ids: expected strictly ascending"),
        ({"masked_ids": torch.tensor([0, 2, 7])}, "got gene 2 of cell 1 in both"),
        ({"out_cu_seqlens": cu_seqlens_of([2, 2])}, "cu_seqlens"),
        ({"out_cu_seqlens": cu_seqlens_of([3])}, "out_genes: expected segments of 2 cells"),
    ],
)
def test_the_op_itself_refuses_what_would_read_outside(change: dict[str, object], message: str) -> None:
    arguments = list((valid() | change).values())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.xtg.masked_decoder_gather.default(*arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.xtg.masked_decoder_gather_backward.default(torch.zeros((3, 3)), *arguments[4:], 9)
