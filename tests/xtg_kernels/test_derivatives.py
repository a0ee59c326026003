"""Second derivatives, forward mode and the transforms of torch.func, through every op: right on every backend.

Kernels know first derivatives only, and torch.library takes what it does not know for zero. The truth is finite
differences in float64 (torch.autograd.gradcheck), and for float32 and kernels the reference in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

import xtg_kernels
from tests.conftest import CPU_BACKENDS
from tests.xtg_kernels.ragged_cases import cu_seqlens_of, relative_error
from xtg_kernels import use_backend

CU_SEQLENS = cu_seqlens_of([3, 0, 4])
GENES = torch.tensor([0, 2, 3, 1, 2, 4, 5])
DISTINCT = torch.tensor([0, 0, 2, 3, 4, 3, 6, -1, -1], dtype=torch.int32)
PARAMS = ((3,), (3,), (3,), (3,), (3,), (1,))


def _numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(len, shapes)))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return xtg_kernels.ragged_attention(q, k, v, CU_SEQLENS, 4, return_lse=True)


def _embedding(values: Tensor, *weights: Tensor) -> Tensor:
    *own, table = weights
    ids = torch.cat([GENES, GENES[:2]])
    return xtg_kernels.expression_embedding(
        values, *own, alpha=0.7, gene_ids=ids, gene_table=table, distinct_index=DISTINCT
    )


def _favor(q: Tensor, k: Tensor, v: Tensor, *, eps: float, stabilizer: str = "head") -> Tensor:
    return xtg_kernels.favor_attention(
        q, k, v, PROJECTION.to(q.dtype), CU_SEQLENS, 4, cu_seqlens_q=cu_seqlens_of([2, 1, 3]), max_seqlen_q=3,
        eps=eps, stabilizer=stabilizer,
    )  # fmt: skip


def _gather(table: Tensor, zero_row: Tensor, mask_row: Tensor, encoded: Tensor, *, some: bool) -> Tensor:
    genes = {"out_genes": torch.tensor([0, 1, 2, 4, 5]), "out_cu_seqlens": cu_seqlens_of([2, 0, 2])} if some else {}
    masked = torch.tensor([1, 0]), cu_seqlens_of([1, 0, 1])
    return xtg_kernels.masked_decoder_gather(table, zero_row, mask_row, encoded, CU_SEQLENS, GENES, *masked, **genes)


def _mse(x: Tensor, *params: Tensor, reduction: str) -> Tensor:
    return xtg_kernels.masked_mse(x, ROWS, torch.ones(3, dtype=x.dtype), *params, reduction=reduction)


ROWS = torch.tensor([3, 0, 3])
PROJECTION = torch.linspace(-2, 2, 10, dtype=torch.float64).sin().view(5, 2)
QKV = ((8, 2, 2),) * 3
QUERIES = ((7, 2, 2), (8, 2, 2), (8, 2, 2))
WEIGHTS = ((9,), (5,), (5,), (5, 5), (5,), (5, 3), (6, 3))
OPS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "ragged_attention": (_attention, QKV),
    "expression_embedding": (_embedding, WEIGHTS),
    "favor_attention": (functools.partial(_favor, eps=0.0), QUERIES),
    "favor_attention with eps": (functools.partial(_favor, eps=1e-2), QUERIES),
    "favor_attention by cell": (functools.partial(_favor, eps=1e-2, stabilizer="cell"), QUERIES),
    "masked_decoder_gather": (functools.partial(_gather, some=False), ((6, 3), (3,), (3,), (7, 3))),
    "masked_decoder_gather of some": (functools.partial(_gather, some=True), ((6, 3), (3,), (3,), (7, 3))),
    "masked_head": (lambda x, *params: xtg_kernels.masked_head(x, ROWS, *params), ((5, 3), *PARAMS)),
    "masked_mse": (functools.partial(_mse, reduction="sum"), ((5, 3), *PARAMS)),
    "masked_mse mean": (functools.partial(_mse, reduction="mean"), ((5, 3), *PARAMS)),
}


def _inputs(op: str) -> list[Tensor]:
    inputs = _numbers(*OPS[op][1])
    if op == "expression_embedding":
        # Values that say what DISTINCT says.
        inputs[0] = inputs[0][DISTINCT.clamp(min=0).long()].abs()
    return inputs


def _loss(op: str) -> Callable[..., Tensor]:
    """A number that is not linear in any output."""

    def loss(*inputs: Tensor) -> Tensor:
        outs = OPS[op][0](*inputs)
        return torch.stack([out.sin().sum() for out in (outs if isinstance(outs, tuple) else (outs,))]).sum()

    return loss


@pytest.fixture
def _without_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token for itself: DISTINCT would say of a value that finite differences move that it equals another."""
    alone = torch.where(DISTINCT >= 0, torch.arange(9, dtype=torch.int32), DISTINCT)
    monkeypatch.setattr("tests.xtg_kernels.test_derivatives.DISTINCT", alone)


@pytest.mark.usefixtures("_without_distinct")
@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_by_finite_differences(op: str) -> None:
    """Of the op itself: gradients to all inputs and to the gradient of the output."""
    inputs = [x.requires_grad_() for x in _inputs(op)]
    assert torch.autograd.gradgradcheck(OPS[op][0], inputs)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_tangents_go_through_a_backward_whose_graph_is_older_than_they(op: str, backend: str) -> None:
    """The backward is linear in the gradient of the output: its tangent is the backward of that one's tangent."""
    dtype, tolerance = (torch.float32, 1e-5) if backend == "cpp" else (torch.float64, 1e-12)
    inputs = [x.to(dtype).requires_grad_() for x in _inputs(op)]
    with use_backend(backend):
        outs = OPS[op][0](*inputs)
        out = outs[0] if isinstance(outs, tuple) else outs
        grad, tangent = (x.to(out.dtype) for x in _numbers(tuple(out.shape), tuple(out.shape)))
        want = torch.autograd.grad(out, inputs, tangent, retain_graph=True)
        with forward_ad.dual_level():
            got = torch.autograd.grad(out, inputs, forward_ad.make_dual(grad, tangent))
            tangents = [forward_ad.unpack_dual(x).tangent for x in got]
    for x, wanted in zip(tangents, want, strict=True):
        assert relative_error(x, wanted) < tolerance


@pytest.mark.usefixtures("_without_distinct")
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_by_finite_differences(op: str) -> None:
    inputs = [x.requires_grad_() for x in _inputs(op)]
    check = functools.partial(torch.autograd.gradcheck, check_forward_ad=True, check_backward_ad=False)
    assert check(OPS[op][0], inputs, check_undefined_grad=False)


def _hessian_product(function: Callable[..., Tensor], inputs: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
    return list(torch.autograd.grad(grads, inputs, tangents))


def _jvp_of_grad(function: Callable[..., Tensor], inputs: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    grad = torch.func.grad(function, argnums=tuple(range(len(inputs))))
    return list(torch.func.jvp(grad, tuple(inputs), tuple(tangents))[1])


def _grad_of_grad(function: Callable[..., Tensor], inputs: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    every = tuple(range(len(inputs)))

    def product(*inputs: Tensor) -> Tensor:
        grads = torch.func.grad(function, argnums=every)(*inputs)
        return torch.stack([(a * b).sum() for a, b in zip(grads, tangents, strict=True)]).sum()

    return list(torch.func.grad(product, argnums=every)(*inputs))


def _dual_of_backward(function: Callable[..., Tensor], inputs: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x.detach().clone().requires_grad_(), t) for x, t in zip(inputs, tangents, strict=True)
        ]
        grads = torch.autograd.grad(function(*duals), duals)
        return [forward_ad.unpack_dual(grad).tangent for grad in grads]


WAYS = {
    "double backward": _hessian_product,
    "jvp of grad": _jvp_of_grad,
    "grad of grad": _grad_of_grad,
    "forward over reverse": _dual_of_backward,
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_hessian_products_of_every_backend(op: str, way: str, backend: str) -> None:
    """float32 on each backend beside the reference's double backward in float64, which finite differences vouch for."""
    inputs = _inputs(op)
    tangents = [torch.ones_like(x).cumsum(0).cos() for x in inputs]
    with use_backend("reference"):
        want = _hessian_product(_loss(op), inputs, tangents)
    with use_backend(backend):
        got = WAYS[way](_loss(op), [x.float() for x in inputs], [x.float() for x in tangents])
    every = torch.cat([x.flatten() for x in want])
    assert relative_error(torch.cat([x.flatten() for x in got]), every) < 2e-5


def test_third_derivatives() -> None:
    q, k, v = (x.requires_grad_() for x in _inputs("ragged_attention"))

    def slope(q: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(_loss("ragged_attention")(q, k, v), q, create_graph=True)
        return grad.square().sum()

    assert torch.autograd.gradgradcheck(slope, q)


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_each_argument(op: str) -> None:
    """Values, gradients and tangents, where only one argument has the dimension that is mapped over."""
    inputs = _inputs(op)
    for i, x in enumerate(inputs):

        def loss(x: Tensor, i: int = i) -> Tensor:
            return _loss(op)(*inputs[:i], x, *inputs[i + 1 :])

        pair = torch.stack([x, x.sin()])
        functions = (loss, torch.func.grad(loss), lambda t, x=x, f=loss: torch.func.jvp(f, (x,), (t,))[1])
        for function in functions:
            want = torch.stack([function(row) for row in pair])
            torch.testing.assert_close(torch.func.vmap(function)(pair), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_has_the_autocast_rule_of_the_op(op: str, dtype: torch.dtype) -> None:
    inputs = [x.float() for x in _inputs(op)]

    def outs(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = OPS[op][0](*inputs)
        return found if isinstance(found, tuple) else (found,)

    with torch.autocast("cpu", dtype), use_backend("reference"):
        got = torch.func.jvp(outs, tuple(inputs), tuple(inputs))[0]
        want = outs(*inputs)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < torch.finfo(b.dtype).eps


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_first_derivatives_pay_nothing(op: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward saves tensors with create_graph=True only, and those are the ones that the forward saved."""
    inputs = [x.float().requires_grad_() for x in _inputs(op)]
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.untyped_storage().data_ptr())
        return x

    with use_backend(backend), saved_tensors_hooks(pack, lambda x: x):
        out = OPS[op][0](*inputs)
        out = out[0] if isinstance(out, tuple) else out
        grad_out = torch.ones_like(out)
        by_forward, saved[:] = {*saved}, []
        torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
        assert not saved
        torch.autograd.grad(out, inputs, grad_out.requires_grad_(), create_graph=True)
    assert saved
    assert {*saved} <= by_forward | {grad_out.untyped_storage().data_ptr()}


def test_under_compile_transforms_are_refused_in_one_line() -> None:
    q, k, v = (x.float() for x in _inputs("ragged_attention"))

    @torch.compile(backend="eager", fullgraph=True)
    def tangent(q: Tensor) -> Tensor:
        return torch.func.jvp(lambda q: _attention(q, k, v)[0], (q,), (q,))[1]

    with pytest.raises(Exception, match=r"ragged_attention: torch\.compile cannot trace forward mode"):
        tangent(q)
