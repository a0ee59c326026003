"""torch.library registration of masked_head and masked_mse: schemas, fakes, autograd, autocast, FLOPs, backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xtg_kernels import dispatch
from xtg_kernels.ops.masked_head import reference

_PARAMS = (
    "Tensor norm1_weight, Tensor norm1_bias, Tensor norm2_weight, Tensor norm2_bias, Tensor weight, Tensor bias,"
    " float eps"
)
_GRADS = (
    "(Tensor grad_x, Tensor grad_norm1_weight, Tensor grad_norm1_bias, Tensor grad_norm2_weight,"
    " Tensor grad_norm2_bias, Tensor grad_weight, Tensor grad_bias)"
)
SCHEMA = f"(Tensor x, Tensor? rows, {_PARAMS}) -> Tensor"
BACKWARD_SCHEMA = f"(Tensor grad_out, Tensor x, Tensor? rows, {_PARAMS}) -> {_GRADS}"
MSE_SCHEMA = f"(Tensor x, Tensor? rows, Tensor target, {_PARAMS}, bool mean) -> Tensor"
MSE_BACKWARD_SCHEMA = f"(Tensor grad_out, Tensor x, Tensor? rows, Tensor target, {_PARAMS}, bool mean) -> {_GRADS}"
MAX_DIM_TRITON = 4096


def not_supported_reasons(backend: str, x: Tensor) -> list[str]:
    """Every reason why ``backend`` declines these arguments; empty when it takes them."""
    if backend == "reference":
        return []
    if backend == "cpp":
        reasons = dispatch.cpp_reasons({"x": x})
    else:
        reasons = dispatch.triton_reasons({"x": x})
        if x.shape[1] > MAX_DIM_TRITON:
            reasons.append(f"dim is {x.shape[1]}, Triton kernels take at most {MAX_DIM_TRITON}")
    if x.dtype == torch.float64:
        reasons.append(f"dtype is {x.dtype}, the kernels take float32, bfloat16 and float16 (the reference takes it)")
    return reasons


def _number_of(x: Tensor, rows: Tensor | None) -> int:
    return (x if rows is None else rows).shape[0]


def _out_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(x: Tensor, rows: Tensor | None, *args: Any) -> Tensor:
    return x.new_empty((_number_of(x, rows),), dtype=_out_dtype(x))


def _fake_backward(grad_out: Tensor, x: Tensor, rows: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *params, _ = args
    return tuple(p.new_empty(p.shape) for p in (x, *params))


def _fake_mse(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((), dtype=_out_dtype(x))


def _fake_mse_backward(
    grad_out: Tensor, x: Tensor, rows: Tensor | None, target: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *params, _, _ = args
    return tuple(p.new_empty(p.shape) for p in (x, *params))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(op: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *grads = op(grad_out, *ctx.saved_tensors, ctx.eps)
        return grad_x, None, *grads, None

    return backward


def _setup_context_mse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.mean = inputs
    ctx.save_for_backward(*tensors)


def _backward_mse(op: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *grads = op(grad_out, *ctx.saved_tensors, ctx.eps, ctx.mean)
        return grad_x, None, None, *grads, None, None

    return backward


def _flops(x: Tensor, rows: Tensor | None, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """The head's product: 2 dim a chosen row. The norms hold no matrix product."""
    return 2 * x.shape[1] * _number_of(x, rows)


def _flops_backward(
    grad_out: Tensor, x: Tensor, rows: Tensor | None, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    """The products into the head's input and into its weight: 4 dim a chosen row."""
    return 4 * x.shape[1] * _number_of(x, rows)


def _flops_mse_backward(
    grad_out: Tensor, x: Tensor, rows: Tensor | None, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    """The prediction again, then the products into the head's input and into its weight: 6 dim a chosen row."""
    return 6 * x.shape[1] * _number_of(x, rows)


_HOME = "xtg_kernels.ops.masked_head.triton_kernel"
for _name, _schema, _reference, _fake_of, _formula in (
    ("masked_head", SCHEMA, reference.masked_head, _fake, _flops),
    ("masked_head_backward", BACKWARD_SCHEMA, reference.masked_head_backward, _fake_backward, _flops_backward),
    ("masked_mse", MSE_SCHEMA, reference.masked_mse, _fake_mse, _flops),
    (
        "masked_mse_backward",
        MSE_BACKWARD_SCHEMA,
        reference.masked_mse_backward,
        _fake_mse_backward,
        _flops_mse_backward,
    ),
):
    dispatch.register_op(_name, _schema, reference=_reference, triton=f"{_HOME}:{_name}", fake=_fake_of, flops=_formula)
dispatch.register_autograd("masked_head", _setup_context, _backward)
dispatch.register_autograd("masked_mse", _setup_context_mse, _backward_mse)
# Half-precision rows beside float32 parameters are what the kernels take, so nothing is cast.
dispatch.register_autocast("masked_head", None, tensors=0)
dispatch.register_autocast("masked_mse", None, tensors=0)
