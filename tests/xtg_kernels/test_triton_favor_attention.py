"""Triton kernels of favor_attention, in the interpreter where there is no GPU: error, edges, determinism, layouts.

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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.interpreter import bf16_interpreter
from tests.xtg_kernels.favor_cases import (
    Case,
    error_limits,
    first_maximum,
    overall_errors,
    relative_errors,
    set_apart,
    ties,
)
from tests.xtg_kernels.ragged_cases import cu_seqlens_of, relative_error
from xtg_kernels import favor_attention, use_backend
from xtg_kernels.ops.favor_attention import triton_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REAL_DTYPES = [torch.float32, torch.bfloat16]
# Keys and queries of each cell: cells without either, of one row, and on both sides of the tiles' 32 and 64 rows.
MIXED = [(0, 5), (5, 0), (1, 1), (64, 32), (0, 0), (65, 70), (3, 65)]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    # NumPy warns of the inf and NaN in rows of a tile that are never stored; a GPU does not.
    with use_backend("triton"), np.errstate(all="ignore"), bf16_interpreter() if DEVICE == "cpu" else nullcontext():
        yield


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of several parts without thousands of rows."""
    monkeypatch.setattr(triton_kernel, "_CHUNK", 64)


@pytest.mark.parametrize("sizes", [(16, 30, "head"), (40, 70, "cell"), (64, 266, "head"), (128, 33, "cell")], ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_error_within_plain_pytorch(dtype: torch.dtype, sizes: tuple[int, int, str]) -> None:
    """Error against float64: at most 2x (forward) and 3x (gradients) that of plain PyTorch in the same dtype."""
    head_dim, features, stabilizer = sizes
    case = Case.random(MIXED, 1, head_dim, features, dtype, 3, stabilizer=stabilizer, device=DEVICE)
    got = case.run()
    assert got[0].dtype == dtype
    for error, limit in zip(relative_errors(got, case.exact()), error_limits(case), strict=True):
        assert error <= limit
    for x, unused in zip(got, case.unused(), strict=True):
        assert torch.equal(x[unused], torch.zeros_like(x[unused])), "slack rows, and cells without keys or queries"


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("stabilizer", ["head", "cell"])
def test_segments_of_several_parts(eps: float, stabilizer: str) -> None:
    case = Case.random(
        [(200, 150), (0, 3), (7, 65), (70, 0)], 2, 16, 40, torch.float32, eps=eps, stabilizer=stabilizer, device=DEVICE
    )
    got = case.run()
    for error, limit in zip(relative_errors(got, case.exact()), error_limits(case), strict=True):
        assert error <= limit


@pytest.mark.parametrize("lengths", [[], [(0, 0), (0, 0)], [(0, 4)], [(4, 0)], [(1, 1)]], ids=str)
def test_edges(lengths: list[tuple[int, int]]) -> None:
    for slack in (0, 3):
        case = Case.random(lengths, 2, 16, 20, torch.float32, slack, device=DEVICE)
        got = case.run()
        assert max(overall_errors(got, case.exact())) < 2e-6
        for x, unused in zip(got, case.unused(), strict=True):
            assert torch.equal(x[unused], torch.zeros_like(x[unused]))


@pytest.mark.usefixtures("_small_chunks")
def test_saves_what_the_reference_saves() -> None:
    case = Case.random([(70, 80), (0, 3), (4, 0), (5, 5)], 2, 16, 30, torch.float32, 2, eps=1e-2, device=DEVICE)
    args = (case.q, case.k, case.v, case.projection, case.cu_seqlens, 70, case.cu_seqlens_q, 80, 1e-2)
    for per_cell in (False, True):
        got = torch.ops.xtg.favor_attention.triton(*args, per_cell)
        want = torch.ops.xtg.favor_attention.reference(*args, per_cell)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.usefixtures("_small_chunks")
def test_a_maximum_that_grows_all_the_way() -> None:
    """Exponents from 0 to 60 along the cell: what was summed before has to be brought to each new maximum."""
    case = Case.random([(400, 40)], 1, 16, 40, torch.float32, eps=0.0, device=DEVICE)
    case.projection[35] *= 11 / case.projection[35].norm()
    towards = 16**0.25 * case.projection[35] * torch.linspace(0, 1, 400, device=DEVICE)[:, None, None]
    with torch.no_grad():
        case.k.copy_(0.3 * case.k + towards)
        case.q *= 0.5
    for error, limit in zip(relative_errors(case.run(), case.exact()), error_limits(case), strict=True):
        assert error <= limit


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_same_bits_again_and_alone(dtype: torch.dtype) -> None:
    """A second run gives the same bits, and a cell gives the same bits alone as among others."""
    lengths = [(70, 33), (0, 5), (1, 65)]
    case = Case.random(lengths, 2, 20, 24, dtype, stabilizer="cell", device=DEVICE)
    one = case.run()
    for a, b in zip(one, case.run(), strict=True):
        assert torch.equal(a, b)
    for c in range(len(lengths)):
        alone, rows = case.cell(c)
        for i, (a, b) in enumerate(zip(alone.run(), one, strict=True)):
            assert torch.equal(a, b[rows[i >= 2]])


@pytest.mark.parametrize("stabilizer", ["head", "cell"])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_the_first_of_equal_maxima_gets_the_gradient(dtype: torch.dtype, stabilizer: str) -> None:
    """Rows that come again in other blocks, and a head like another."""
    case = ties(dtype, stabilizer, keys=140, queries=35, device=DEVICE)
    row = first_maximum(case)
    assert set_apart(case.run()[2]) == ([[row, 0], [row, 1]] if stabilizer == "head" else [[row, 0]])


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("large", ["query", "key", "the only key", "all"])
def test_rows_of_any_size_are_right_or_nan(large: str, eps: float) -> None:
    """Far beyond what leaves digits behind the point of a maximum; with eps a large query or key is right."""
    for exponent in (4, 9, 30):
        case = Case.random([(33, 20), (1, 3), (20, 33)], 1, 16, 40, torch.float32, eps=eps, device=DEVICE)
        rows = {"query": [case.q[5]], "key": [case.k[7]], "the only key": [case.k[33]], "all": [case.q, case.k]}[large]
        with torch.no_grad():
            for x in rows:
                x *= 10.0**exponent
        got = case.run()
        # Not the formula, which knows no features below the smallest number, and has 0 / 0 without eps.
        with use_backend("reference"):
            exact, plain = (case.converted(dtype).run() for dtype in (torch.float64, torch.float32))
        for i, (a, b, c) in enumerate(zip(got, exact, plain, strict=True)):
            known = ~(a.double() + b).flatten(1).isnan().any(1)
            # Scores of forward and backward may differ in their last digit, which all that has no eps shows.
            floor = 2e-6 if eps else 2e-6 + torch.finfo(torch.float32).eps * 10.0**exponent
            allowed = (2 if i == 0 else 3) * (c.double() - b)[known].norm() + floor * b.nan_to_num().norm()
            assert (a.double() - b)[known].norm() <= allowed, (exponent, i)
            assert bool(known.all()) or not eps or large in ("the only key", "all")


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("bad", ["keys", "queries"])
def test_neighbours_are_not_read(bad: str) -> None:
    """A cell full of NaN leaves the others alone, forward and backward; a query of NaN leaves other outputs alone."""
    case = Case.random([(30, 30), (65, 65), (30, 30)], 1, 16, 30, torch.float32, device=DEVICE)
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


def test_layouts() -> None:
    """Views of a packed tensor, heads first, a last dimension that is not contiguous and rows off the 16-byte grid that
    vector loads need give one result."""
    cu_seqlens = cu_seqlens_of([40, 9]).to(DEVICE)
    qkv, grad_out = torch.randn((49, 3, 2, 16), device=DEVICE), torch.randn((49, 2, 16), device=DEVICE)
    projection = torch.randn((20, 16), device=DEVICE)

    def out_and_grads(q: Tensor, k: Tensor, v: Tensor, grad: Tensor = grad_out) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = favor_attention(*leaves, projection, cu_seqlens, 40)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    want = out_and_grads(*(x.contiguous() for x in qkv.unbind(1)))
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv.unbind(1)]
    channels_first = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in qkv.unbind(1)]
    off_grid = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in qkv.unbind(1)]
    grad_channels_first = grad_out.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for got in (
        out_and_grads(*qkv.unbind(1)),
        out_and_grads(*heads_first),
        out_and_grads(*channels_first, grad_channels_first),
        out_and_grads(*off_grid),
    ):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE != "cpu", reason="a sparse file stands in for a tensor of 4.5 GB")
def test_offsets_past_2_to_the_31(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows 2^23 elements apart: the second cell, and the last blocks of the first, start past 2^31 elements. Only the
    pages of these rows are ever touched."""
    from triton.runtime import interpreter

    # The interpreter copies every storage back onto itself at the end, which would touch all of it.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    row_stride = 2**23
    size = 270 * row_stride * 4
    with (tmp_path / "sparse").open("w+b") as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
    rows = torch.frombuffer(memory, dtype=torch.float32).as_strided((270, 1, 64), (row_stride, 64, 1))
    dense = torch.randn((270, 1, 64))
    rows.copy_(dense)
    projection, cu_seqlens = torch.randn((20, 16)), cu_seqlens_of([260, 10])
    segments = (cu_seqlens, 260, cu_seqlens, 260, 1e-4, False)
    found = []
    for x in (rows, dense):
        q, k, v, grad_out = x.split(16, dim=2)
        saved = triton_kernel.forward(q, k, v, projection, *segments)
        found.append((saved[0], *triton_kernel.backward(grad_out, q, k, v, projection, *saved, *segments)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), max_size=3),
    heads=st.integers(1, 2),
    head_dim=st.integers(16, 40),
    features=st.integers(1, 70),
    eps=st.sampled_from([0.0, 1e-4, 0.3]),
    stabilizer=st.sampled_from(["head", "cell"]),
)
def test_ragged_shapes_against_the_formula(
    lengths: list[tuple[int, int]], heads: int, head_dim: int, features: int, eps: float, stabilizer: str
) -> None:
    case = Case.random(
        lengths, heads, head_dim, features, torch.float32, 1, eps=eps, stabilizer=stabilizer, device=DEVICE
    )
    out_error, grad_error = overall_errors(case.run(), case.exact())
    assert out_error < 2e-6
    assert grad_error < 1e-5


def test_values_of_one_sign_lose_no_digits() -> None:
    """Long sums of numbers that are alike round the same way every time where eps rules."""
    case = Case.random([(300, 20)], 1, 16, 110, torch.float32, eps=10.0, device=DEVICE)
    with torch.no_grad():
        case.v.copy_(0.1 + 1e-3 * case.v)
    assert relative_error(case.run()[0], case.exact()[0]) < 5e-7


def test_opcheck() -> None:
    case = Case.random([(10, 4), (0, 3), (15, 20)], 1, 16, 20, torch.float32, device=DEVICE)
    q, k, v = (x.detach().requires_grad_() for x in (case.q, case.k, case.v))
    segments = (case.cu_seqlens, 15, case.cu_seqlens_q, 20, 1e-4, True)
    torch.library.opcheck(torch.ops.xtg.favor_attention.triton, (q, k, v, case.projection, *segments))
    q, k, v = (x.detach() for x in (q, k, v))
    saved = torch.ops.xtg.favor_attention.triton(q, k, v, case.projection, *segments)
    args = (torch.randn_like(saved[0]), q, k, v, case.projection, *saved, *segments)
    torch.library.opcheck(torch.ops.xtg.favor_attention_backward.triton, args)
