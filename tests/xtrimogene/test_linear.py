"""Tests of xtrimogene.linear: the products of oneDNN and of the fallback, their FLOPs, and blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xtrimogene import linear

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _asks_again() -> Iterator[None]:
    """What a test makes of the internal ops is forgotten after it."""
    linear._onednn_works.cache_clear()
    yield
    linear._onednn_works.cache_clear()


@pytest.fixture(params=["onednn", "fallback"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "fallback":
        monkeypatch.setattr(linear, "_onednn_works", lambda dtype: False)
    return str(request.param)


def _operands(rows: int, width: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, width), (outputs, width), (outputs,)]
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias


def _error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 1, 1), (7, 33, 5), (300, 96, 130), (1030, 64, 48)])
def test_error_within_plain_pytorch(
    route: str, dtype: torch.dtype, relu: bool, with_bias: bool, rows: int, width: int, outputs: int
) -> None:
    x, weight, bias = _operands(rows, width, outputs, dtype)
    used_bias = bias if with_bias else None
    after: Callable[[Tensor], Tensor] = F.relu if relu else lambda y: y
    with torch.inference_mode():
        out = linear.row_linear(weight, used_bias, relu=relu)(x)
        exact = after(F.linear(x.double(), weight.double(), bias.double() if with_bias else None))
        plain = after(F.linear(x, weight, used_bias))
    assert out.dtype == dtype
    assert out.shape == plain.shape
    assert _error(out, exact) <= 2 * _error(plain, exact) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_strided_view_and_a_transposed_weight(route: str, dtype: torch.dtype) -> None:
    x, weight, bias = _operands(40, 64, 24, dtype)
    wide = torch.randn(40, 128).to(dtype)
    wide[:, ::2] = x
    with torch.inference_mode():
        want = linear.row_linear(weight, bias)(x)
        assert torch.equal(linear.row_linear(weight.t().contiguous().t(), bias)(wide[:, ::2]), want)


def test_no_rows(route: str) -> None:
    _, weight, bias = _operands(1, 8, 4, torch.float32)
    with torch.inference_mode():
        assert linear.row_linear(weight, bias)(torch.zeros(0, 8)).shape == (0, 4)


def test_the_layer_keeps_its_own_copy_of_nothing_but_the_weight_it_was_made_from(route: str) -> None:
    x, weight, bias = _operands(40, 64, 24, torch.float32)
    with torch.no_grad():
        before = linear.row_linear(weight, bias)(x)
        weight.mul_(2)
        assert not torch.allclose(linear.row_linear(weight, bias)(x), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flops_are_those_of_a_linear_layer(route: str, dtype: torch.dtype) -> None:
    x, weight, bias = _operands(40, 64, 24, dtype)
    with torch.inference_mode():
        linear.row_linear(weight, bias)(x)
        with FlopCounterMode(display=False) as counter:
            linear.row_linear(weight, bias, relu=True)(x)
    assert counter.get_total_flops() == 2 * 40 * 64 * 24


def test_onednn_is_taken_where_pytorch_has_it() -> None:
    assert linear.onednn_takes(torch.float32) == torch.backends.mkldnn.is_available()
    assert not linear.onednn_takes(torch.float64)
    assert not linear.onednn_takes(torch.float16)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not linear.onednn_takes(torch.float32)


def _missing(*args: object) -> Callable[[Tensor], Tensor]:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")


def _not_supported(*args: object) -> Callable[[Tensor], Tensor]:
    def layer(x: Tensor) -> Tensor:
        raise RuntimeError("could not create a primitive descriptor")

    return layer


def _forgets_the_bias(weight: Tensor, bias: Tensor | None, relu: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: F.relu(F.linear(x, weight)) if relu else F.linear(x, weight)


def _forgets_the_relu(weight: Tensor, bias: Tensor | None, relu: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight, bias)


@pytest.mark.parametrize("broken", [_missing, _not_supported, _forgets_the_bias, _forgets_the_relu])
def test_internal_ops_that_are_missing_or_wrong_are_left_alone(
    broken: Callable[..., Callable[[Tensor], Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_onednn_linear", broken)
    assert not linear.onednn_takes(torch.float32)
    x, weight, bias = _operands(40, 64, 24, torch.float32)
    assert torch.allclose(linear.row_linear(weight, bias, relu=True)(x), F.relu(F.linear(x, weight, bias)))


@pytest.mark.parametrize("total", [0, 1, 63, 64, 65, 256, 5000, 32768])
@pytest.mark.parametrize("width", [1, 512, 3072, 1 << 20])
def test_blocks_cover_every_row_once(total: int, width: int) -> None:
    unit = linear._UNIT_ROWS
    blocks = linear.row_blocks(total, width, torch.float32)
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(total))
    sizes = [block.stop - block.start for block in blocks]
    tail = [size for size in sizes if size < unit]
    assert tail == [1 << bit for bit in reversed(range(6)) if total & 1 << bit]
    sizes = sizes[: len(sizes) - len(tail)]
    assert all(size % unit == 0 for size in sizes)
    limit = max(linear._MIN_UNITS * unit, linear._BLOCK_BYTES * torch.get_num_threads() // (4 * width))
    assert len(sizes) <= 2 + total // limit
    if sizes:
        assert max(sizes) - min(sizes) <= unit
        assert max(sizes) <= limit
