"""Tests of xtrimogene.linear: the products of oneDNN and of the fallback, their FLOPs, and blocks of rows."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xtg_kernels.ops.dropout.reference import kept, threshold_and_scale
from xtrimogene.network import linear
from xtrimogene.network.dropping import DropoutKey

DTYPES = [torch.float32, torch.bfloat16]
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


@pytest.fixture(autouse=True)
def _asks_again() -> Iterator[None]:
    """What a test makes of the internal ops is forgotten after it."""
    for asked in (linear._onednn_works, linear._mkl_is_slow):
        asked.cache_clear()
    yield
    for asked in (linear._onednn_works, linear._mkl_is_slow):
        asked.cache_clear()


@pytest.fixture(params=["onednn", "onednn, as where all weights are wide", "fallback"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "fallback":
        monkeypatch.setattr(linear, "_onednn_works", lambda dtype: False)
    elif request.param != "onednn":
        monkeypatch.setattr(linear, "_TURNING_PAYS_WIDTH", 1)
    return str(request.param)


def _operands(rows: int, width: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, width), (outputs, width), (outputs,)]
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias


def _error(out: Tensor, exact: Tensor) -> float:
    return float((out.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", linear.ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 1, 1), (7, 33, 5), (300, 96, 130), (1030, 64, 48)])
def test_error_within_plain_pytorch(
    route: str, dtype: torch.dtype, activation: str, with_bias: bool, rows: int, width: int, outputs: int
) -> None:
    x, weight, bias = _operands(rows, width, outputs, dtype)
    used_bias = bias if with_bias else None
    after = AFTER[activation]
    with torch.inference_mode():
        out = linear.row_linear(weight, used_bias, activation=activation)(x)
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
            linear.row_linear(weight, bias, activation="gelu")(x)
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


def _forgets_the_bias(weight: Tensor, bias: Tensor | None, activation: str) -> Callable[[Tensor], Tensor]:
    return lambda x: AFTER[activation](F.linear(x, weight))


def _forgets_the_activation(weight: Tensor, bias: Tensor | None, activation: str) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight, bias)


def _takes_one_gelu_for_the_other(weight: Tensor, bias: Tensor | None, activation: str) -> Callable[[Tensor], Tensor]:
    return lambda x: AFTER[{"gelu_tanh": "gelu"}.get(activation, activation)](F.linear(x, weight, bias))


@pytest.mark.parametrize(
    "broken",
    [_missing, _not_supported, _forgets_the_bias, _forgets_the_activation, _takes_one_gelu_for_the_other],
)
def test_internal_ops_that_are_missing_or_wrong_are_left_alone(
    broken: Callable[..., Callable[[Tensor], Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_onednn_linear", broken)
    assert not linear.onednn_takes(torch.float32)
    x, weight, bias = _operands(40, 64, 24, torch.float32)
    assert torch.allclose(linear.row_linear(weight, bias, activation="relu")(x), F.relu(F.linear(x, weight, bias)))


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
    block_bytes = min(linear._BLOCK_BYTES * torch.get_num_threads(), linear._MAX_BLOCK_BYTES)
    limit = max(linear._MIN_UNITS * unit, block_bytes // (4 * width) // unit * unit)
    assert len(sizes) <= 2 + total // limit
    if sizes:
        assert max(sizes) - min(sizes) <= unit
        assert max(sizes) <= limit


def _leaves(rows: int, dim: int, ffn_dim: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, dim), (ffn_dim, dim), (ffn_dim,), (dim, ffn_dim), (dim,)]
    scales = [1.0, dim**-0.5, 0.5, ffn_dim**-0.5, 0.5]
    return [
        (scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def _plain_feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "relu"
) -> Tensor:
    return F.linear(AFTER[activation](F.linear(x, w1, b1)), w2, b2)


FUNCTIONS = {
    "linear": (linear.linear, F.linear, slice(0, 3)),
    "feed_forward relu": (linear.feed_forward, _plain_feed_forward, slice(0, 5)),
    **{
        f"feed_forward {name}": (
            functools.partial(linear.feed_forward, activation=name),
            functools.partial(_plain_feed_forward, activation=name),
            slice(0, 5),
        )
        for name in ("gelu", "gelu_tanh")
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 150, 2000])
def test_training_errors_within_plain_pytorch(
    route: str, function: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward 2x and gradients 3x the error of plain PyTorch against float64, over up to 33 blocks of rows."""
    monkeypatch.setattr(linear, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(linear, "_MIN_UNITS", 1)
    ours, plain, used = FUNCTIONS[function]
    leaves = _leaves(rows, 48, 130, dtype)[used]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = plain(*exact_leaves)
    grad_out = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact_grads = torch.autograd.grad(exact, exact_leaves, grad_out.double())
    results = [(f(*leaves), f) for f in (ours, plain)]
    (out, _), (plain_out, _) = results
    floor = torch.finfo(torch.float32).eps
    assert out.dtype == dtype
    assert _error(out, exact) <= 2 * _error(plain_out, exact) + floor
    grads, plain_grads = (torch.autograd.grad(y, leaves, grad_out) for y in (out, plain_out))
    for got, other, want in zip(grads, plain_grads, exact_grads, strict=True):
        assert got.dtype == dtype
        assert _error(got, want) <= 3 * _error(other, want) + floor


def _normed(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, 1e-3).to(dtype)


def _norm_linear(x: Tensor, *leaves: Tensor) -> Tensor:
    parts = linear.norm_linear(x, *leaves[:2], 1e-3, *leaves[2:], parts=2)
    assert len(parts) == 2
    return torch.cat(parts, dim=1)


def _plain_norm_linear(x: Tensor, *leaves: Tensor) -> Tensor:
    return F.linear(_normed(x, *leaves[:2], leaves[2].dtype), *leaves[2:])


def _norm_linear_and_rows(x: Tensor, *leaves: Tensor) -> Tensor:
    *parts, taken = linear.norm_linear(x, *leaves[:2], 1e-3, *leaves[2:], parts=2, rows=_some_rows(x))
    return torch.cat([*parts, taken.flatten().expand(len(x), -1)], dim=1)


def _plain_norm_linear_and_rows(x: Tensor, *leaves: Tensor) -> Tensor:
    taken = x[_some_rows(x)]
    return torch.cat([_plain_norm_linear(x, *leaves), taken.flatten().expand(len(x), -1)], dim=1)


def _some_rows(x: Tensor) -> Tensor:
    """The last row, and one in the middle twice."""
    return torch.tensor([len(x) - 1, len(x) // 2, len(x) // 2])


def _norm_feed_forward(x: Tensor, *leaves: Tensor) -> Tensor:
    return linear.norm_feed_forward(x, *leaves[:2], 1e-3, *leaves[2:])


def _plain_norm_feed_forward(x: Tensor, *leaves: Tensor) -> Tensor:
    w1, b1, w2, b2 = leaves[2:]
    return x + F.linear(F.gelu(F.linear(_normed(x, *leaves[:2], w1.dtype), w1, b1)), w2, b2)


def _linear_residual(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *leaves: Tensor) -> Tensor:
    weight, _, back, bias = leaves
    return linear.linear(F.linear(x.to(weight.dtype), weight), back, bias, residual=x)


def _plain_linear_residual(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *leaves: Tensor) -> Tensor:
    weight, _, back, bias = leaves
    return x + F.linear(F.linear(x.to(weight.dtype), weight), back, bias)


# With the leaves x, norm weight and bias, then w1, b1, w2, b2 of _leaves: those that a function takes.
PRE_NORM = {
    "linear residual": (_linear_residual, _plain_linear_residual, [0, 1, 2, 3, 4, 5, 6]),
    "norm_linear": (_norm_linear, _plain_norm_linear, [0, 1, 2, 3, 4]),
    "norm_linear and rows": (_norm_linear_and_rows, _plain_norm_linear_and_rows, [0, 1, 2, 3, 4]),
    "norm_feed_forward": (_norm_feed_forward, _plain_norm_feed_forward, [0, 1, 2, 3, 4, 5, 6]),
}


def _pre_norm_leaves(rows: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> list[Tensor]:
    x, *weights = (leaf.detach() for leaf in _leaves(rows, 48, 130, torch.float32))
    generator = torch.Generator().manual_seed(2)
    norm = [1 + 0.3 * torch.randn(48, generator=generator), 0.3 * torch.randn(48, generator=generator)]
    leaves = [leaf.to(dtype) for leaf in (x + 0.5, *norm)] + [leaf.to(weight_dtype) for leaf in weights]
    return [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2], ids=str
)
@pytest.mark.parametrize("function", PRE_NORM)
@pytest.mark.parametrize("rows", [1, 150, 2000])
def test_pre_norm_errors_within_plain_pytorch(
    route: str, function: str, dtypes: tuple[torch.dtype, torch.dtype], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward 2x and gradients 3x, as above; the sum over the layers may be in a wider dtype than the weights."""
    monkeypatch.setattr(linear, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(linear, "_MIN_UNITS", 1)
    ours, plain, used = PRE_NORM[function]
    leaves = [_pre_norm_leaves(rows, *dtypes)[i] for i in used]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    out, plain_out, exact = ours(*leaves), plain(*leaves), plain(*exact_leaves)
    assert out.dtype == plain_out.dtype
    floor = torch.finfo(torch.float32).eps
    assert _error(out, exact) <= 2 * _error(plain_out, exact) + floor
    grad_out = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads, plain_grads, exact_grads = (
        torch.autograd.grad(y, xs, grad_out.to(y.dtype), allow_unused=True)
        for y, xs in ((out, leaves), (plain_out, leaves), (exact, exact_leaves))
    )
    for leaf, got, other, want in zip(leaves, grads, plain_grads, exact_grads, strict=True):
        assert (got is None) == (want is None)
        if got is not None and other is not None:
            assert got.dtype == leaf.dtype
            assert _error(got, want) <= 3 * _error(other, want) + floor


def test_gradcheck_of_the_pre_norm_functions() -> None:
    leaves = [leaf.detach().double()[:3].clone() for leaf in _pre_norm_leaves(5, torch.float32, torch.float32)]
    x, norm_weight, norm_bias = torch.randn(5, 3, dtype=torch.float64), leaves[1], leaves[2]
    _, w1, b1, w2, b2 = (leaf.detach() for leaf in _leaves(5, 3, 8, torch.float64))
    inputs = [leaf.requires_grad_() for leaf in (x, norm_weight, norm_bias, w1, b1, w2, b2)]
    for ours, _, used in PRE_NORM.values():
        assert torch.autograd.gradcheck(ours, [inputs[i] for i in used])


def test_flops_of_pre_norm_training_are_those_of_linear_layers(route: str) -> None:
    linear.onednn_takes(torch.float32)  # the example that oneDNN is asked first is nobody's FLOPs
    x, *leaves = _pre_norm_leaves(150, torch.float32, torch.float32)
    with FlopCounterMode(display=False) as counter:
        _norm_feed_forward(x, *leaves).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 150 * 48 * 130


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden rows are the widest tensor of a layer: without gradients a block of them is gone before the next."""
    monkeypatch.setattr(linear, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(linear, "_MIN_UNITS", 1)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    row_linear = linear.row_linear

    def watched(weight: Tensor, *args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
        layer = row_linear(weight, *args, **kwargs)

        def call(x: Tensor) -> Tensor:
            out = layer(x)
            if len(weight) == 130:
                made.append(weakref.ref(out))
                alive.append(sum(block() is not None for block in made))
            return out

        return call

    monkeypatch.setattr(linear, "row_linear", watched)
    x, *leaves = _pre_norm_leaves(300, torch.float32, torch.float32)
    for wanted in (True, False):
        made.clear()
        alive.clear()
        with torch.set_grad_enabled(wanted):
            _norm_feed_forward(x, *leaves)
        assert len(alive) > 4
        assert alive == list(range(1, len(alive) + 1)) if wanted else set(alive) <= {1, 2}


def test_gradients_that_nobody_needs_are_not_made() -> None:
    leaves = _leaves(70, 16, 40, torch.float32)
    for i, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        with FlopCounterMode(display=False) as counter:
            out = linear.feed_forward(*leaves)
            forward = counter.get_total_flops()
            out.sum().backward()
        want = [x.detach().double().requires_grad_(x is leaf) for x in leaves]
        _plain_feed_forward(*want).sum().backward()
        assert [x.grad is not None for x in leaves] == [x is leaf for x in leaves]
        assert torch.allclose(leaf.grad.double(), want[i].grad, atol=1e-4)
        assert counter.get_total_flops() - forward <= 2 * 2 * 70 * 16 * 40
        leaf.grad = None


def test_gradcheck_of_the_training_functions() -> None:
    leaves = _leaves(5, 3, 7, torch.float64)
    for activation in ("relu", "gelu", "gelu_tanh"):
        assert torch.autograd.gradcheck(functools.partial(linear.feed_forward, activation=activation), leaves)
    assert torch.autograd.gradcheck(linear.linear, leaves[:3])


# Of 150 rows at most.
KEY = DropoutKey(torch.arange(150), torch.tensor(3), 5)


def _plain_dropout(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, activation: str) -> Tensor:
    mask = kept(KEY.row_ids[: len(x)], KEY.seed, KEY.place, 0.4, len(w1))
    return F.linear(AFTER[activation](F.linear(x, w1, b1)) * mask * threshold_and_scale(0.4)[1], w2, b2)


def _own_dropout(*leaves: Tensor, activation: str) -> Tensor:
    return linear.feed_forward(*leaves, 0.4, KEY.rows(slice(len(leaves[0]))), activation=activation)


# Ours, the plain layers, and which of x, w1, b1, w2, b2 and a residual they take.
TRAINING: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[int]]] = {
    **{
        name: (
            functools.partial(linear.feed_forward, activation=name),
            functools.partial(_plain_feed_forward, activation=name),
            [0, 1, 2, 3, 4],
        )
        for name in ("relu", "gelu", "gelu_tanh")
    },
    **{
        f"dropout after {name}": (
            functools.partial(_own_dropout, activation=name),
            functools.partial(_plain_dropout, activation=name),
            [0, 1, 2, 3, 4],
        )
        for name in ("relu", "gelu")
    },
    "no bias": (
        lambda x, w1, w2: linear.feed_forward(x, w1, None, w2, None),
        lambda x, w1, w2: _plain_feed_forward(x, w1, None, w2, None),
        [0, 1, 3],
    ),
    "linear": (linear.linear, F.linear, [0, 1, 2]),
    "linear, with a residual": (
        linear.linear,
        lambda x, w1, b1, residual: F.linear(x, w1, b1) + residual,
        [0, 1, 2, 5],
    ),
}


def _penalty(function: Callable[..., Tensor | tuple[Tensor, ...]], leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of a gradient penalty, where the gradient of the outputs is in part a constant, as that of a sum is."""
    torch.manual_seed(3)
    outs = function(*leaves)
    total = torch.stack([out.sum() + out[:3].square().sum() for out in (outs if isinstance(outs, tuple) else (outs,))])
    grads = torch.autograd.grad(total.sum(), leaves, create_graph=True, allow_unused=True)
    squares = torch.stack([x.square().sum() for x in grads if x is not None])
    return torch.autograd.grad(squares.sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("function", [*TRAINING, *PRE_NORM])
@pytest.mark.parametrize("rows", [5, 150])
def test_second_derivatives_are_those_of_the_plain_layers(
    function: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(linear, "_MIN_UNITS", 1)
    leaves = [*_leaves(rows, 16, 40, torch.float64), torch.ones((rows, 40), dtype=torch.float64, requires_grad=True)]
    if function in PRE_NORM:
        leaves = [x.detach().double().requires_grad_() for x in _pre_norm_leaves(rows, torch.float32, torch.float32)]
    ours, plain, used = (TRAINING | PRE_NORM)[function]
    got, want = (_penalty(f, [leaves[i] for i in used]) for f in (ours, plain))
    for a, b in zip(got, want, strict=True):
        assert (a is None or not a.any()) == (b is None or not b.any())
        assert a is None or b is None or _error(a, b) < 1e-12


def test_forward_mode_and_torch_func_are_left_to_the_modules() -> None:
    x = torch.zeros(3)
    assert linear.untouched(x, ())
    with torch.autograd.forward_ad.dual_level():
        assert not linear.untouched(x, ())
    asked = []
    torch.func.vmap(lambda row: asked.append(linear.untouched(row, ())) or row)(x)
    assert asked == [False]


def test_layers_without_bias_train() -> None:
    x, w1, _, w2, _ = _leaves(70, 16, 40, torch.float32)
    for activation in ("relu", "gelu"):
        out = linear.feed_forward(x, w1, None, w2, None, activation=activation)
        want = _plain_feed_forward(x, w1, None, w2, None, activation=activation)
        assert torch.allclose(out, want, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), [x, w1, w2]) for y in (out, want)), strict=True):
            assert _error(a, b.double()) < 1e-5
    assert torch.allclose(linear.linear(x, w1, None), F.linear(x, w1), atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_dropout_of_the_hidden_rows(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks follow the rows through all blocks, forward and backward."""
    monkeypatch.setattr(linear, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(linear, "_MIN_UNITS", 1)
    leaves = _leaves(150, 16, 40, torch.float32)
    out = _own_dropout(*leaves, activation=activation)
    plain = _plain_dropout(*leaves, activation=activation)
    assert torch.allclose(out, plain, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (out, plain)), strict=True):
        assert _error(a, b.double()) < 1e-5


def test_flops_of_training_are_those_of_linear_layers(route: str) -> None:
    leaves = _leaves(150, 16, 40, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        linear.feed_forward(*leaves).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 150 * 16 * 40


@pytest.mark.parametrize(("vendor", "slow"), [("GenuineIntel", False), ("AuthenticAMD", True), ("", False)])
def test_float32_goes_through_onednn_where_mkl_is_slow(
    vendor: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(linear, "_onednn_works", lambda dtype: dtype != torch.float64)
    assert linear.pays_in_training(torch.float32) == slow
    assert linear.pays_in_training(torch.bfloat16)
    assert not linear.pays_in_training(torch.float64)
    monkeypatch.setattr(linear, "_onednn_works", lambda dtype: False)
    assert not linear.pays_in_training(torch.float32)


@pytest.mark.parametrize(("outputs", "width", "turned"), [(512, 600, True), (600, 511, False), (511, 600, False)])
def test_gradients_of_wide_float32_weights_go_through_onednn(
    outputs: int, width: int, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The choice is one of shapes: which product stands for oneDNN's does not matter here.
    monkeypatch.setattr(linear, "onednn_takes", lambda dtype: True)
    monkeypatch.setattr(linear, "_onednn_linear", lambda weight, bias, name: lambda x: F.linear(x, weight, bias))
    x, weight, bias = _operands(70, width, outputs, torch.float32)
    weight.requires_grad_()
    out, made = linear.linear(x, weight, bias), []
    original = linear.row_linear
    monkeypatch.setattr(linear, "row_linear", lambda *a, **k: made.append(a[0].shape) or original(*a, **k))
    out.sum().backward()
    # One layer for the gradient of x, and one for the gradient of the weight from each block: 64, 4 and 2 rows.
    blocks = [torch.Size([width, rows]) for rows in (64, 4, 2)]
    assert made == [torch.Size([width, outputs]), *(blocks if turned else [])]


def test_the_vendor_is_what_the_system_says() -> None:
    known = Path("/proc/cpuinfo")
    text = known.read_text() if known.exists() else ""
    assert (linear._cpu_vendor() != "") == ("vendor_id" in text)
    assert linear._cpu_vendor() in text
