"""torch.library registration of ragged_attention: schema, fake, autograd, autocast, FLOPs, what a backend takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xtg_kernels import dispatch
from xtg_kernels.ops.ragged_attention import reference, varlen

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale)"
    " -> (Tensor out, Tensor softmax_lse)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,"
    " Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
)


def not_supported_reasons(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Every reason why ``backend`` declines these arguments; empty when it takes them."""
    if backend == "reference":
        return []
    if backend == "varlen":
        return varlen.not_supported_reasons(q, k, v)
    tensors = {"q": q, "k": k, "v": v}
    head_dim = q.shape[2]
    if backend == "cpp":
        reasons = dispatch.cpp_reasons(tensors)
        if head_dim > 256:
            reasons.append(f"head_dim is {head_dim}, C++ kernels take at most 256")
    else:
        reasons = dispatch.triton_reasons(tensors)
        if not 16 <= head_dim <= 128:
            reasons.append(f"head_dim is {head_dim}, Triton kernels take 16 to 128")
    if q.dtype == torch.float64:
        reasons.append(f"dtype is {q.dtype}, the kernels take float32, bfloat16 and float16 (the reference takes it)")
    return reasons


def _fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen, ctx.softmax_scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(op: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, softmax_lse, cu_seqlens = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = op(grad_out, grad_lse, q, k, v, out, softmax_lse, cu_seqlens, ctx.max_seqlen, ctx.softmax_scale)
        return *grads, None, None, None

    return backward


def _sum_of_squares(cu_seqlens: Tensor) -> int:
    return int((cu_seqlens.diff().long() ** 2).sum())


def _flops(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """q k^T and probs v: 4 per head, channel and pair of tokens of one segment."""
    return 4 * q.shape[1] * q.shape[2] * _sum_of_squares(cu_seqlens)


def _flops_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens: Tensor,
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    """q k^T again, then grad_out v^T, and the products into grad_q, grad_k and grad_v: 10 per head, channel and pair.

    The algorithm's count: the two passes of the tiled kernels repeat two of these five products and are not credited.
    """
    return 10 * q.shape[1] * q.shape[2] * _sum_of_squares(cu_seqlens)


_HOME = "xtg_kernels.ops.ragged_attention.triton_kernel"
dispatch.register_op(
    "ragged_attention", SCHEMA, reference=reference.forward, triton=f"{_HOME}:forward", fake=_fake, flops=_flops
)
dispatch.register_op(
    "ragged_attention_backward",
    BACKWARD_SCHEMA,
    reference=reference.backward,
    triton=f"{_HOME}:backward",
    fake=_fake_backward,
    flops=_flops_backward,
)
dispatch.register_autograd("ragged_attention", _setup_context, _backward)
dispatch.register_autocast("ragged_attention", None)
