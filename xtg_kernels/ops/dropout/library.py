"""torch.library registration of dropout: schema, fake, autograd, autocast, FLOPs, backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xtg_kernels import dispatch
from xtg_kernels.ops.dropout import reference

_MASK = "Tensor row_ids, Tensor seed, int place, float p"
SCHEMA = f"(Tensor x, Tensor? residual, {_MASK}, bool relu) -> Tensor"
BACKWARD_SCHEMA = f"(Tensor grad_out, Tensor? out, {_MASK}, ScalarType dtype) -> Tensor"


def not_supported_reasons(backend: str, x: Tensor) -> list[str]:
    """Every reason why ``backend`` declines these arguments; empty when it takes them."""
    if backend == "reference":
        return []
    find = dispatch.cpp_reasons if backend == "cpp" else dispatch.triton_reasons
    reasons = find({"x": x})
    if x.dtype == torch.float64:
        reasons.append(f"dtype is {x.dtype}, the kernels take float32, bfloat16 and float16 (the reference takes it)")
    return reasons


def _fake(x: Tensor, residual: Tensor | None, *args: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)


def _fake_backward(grad_out: Tensor, out: Tensor | None, *args: Any) -> Tensor:
    return grad_out.new_empty(grad_out.shape, dtype=args[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, row_ids, seed, ctx.place, ctx.p, relu = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(row_ids, seed, output if relu else None)


def _backward(op: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        row_ids, seed, out = ctx.saved_tensors
        needs_x, needs_residual = ctx.needs_input_grad[:2]
        grad_x = op(grad_out, out, row_ids, seed, ctx.place, ctx.p, ctx.dtype) if needs_x else None
        return grad_x, grad_out if needs_residual else None, *[None] * 5

    return backward


_HOME = "xtg_kernels.ops.dropout.triton_kernel"
dispatch.register_op(
    "dropout", SCHEMA, reference=reference.forward, triton=f"{_HOME}:forward", fake=_fake, flops=dispatch.no_flops
)
dispatch.register_op(
    "dropout_backward",
    BACKWARD_SCHEMA,
    reference=reference.backward,
    triton=f"{_HOME}:backward",
    fake=_fake_backward,
    flops=dispatch.no_flops,
)
dispatch.register_autograd("dropout", _setup_context, _backward)
# As torch's: in the dtype that comes.
dispatch.register_autocast("dropout", None, tensors=0)
