"""torch.library registration of favor_attention: schema, fake, autograd, autocast, FLOPs, what a backend takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xtg_kernels import dispatch
from xtg_kernels.ops.favor_attention import reference

_SEGMENTS = "Tensor cu_seqlens, SymInt max_seqlen, Tensor cu_seqlens_q, SymInt max_seqlen_q, float eps, bool per_cell"
SCHEMA = (
    f"(Tensor q, Tensor k, Tensor v, Tensor projection, {_SEGMENTS})"
    " -> (Tensor out, Tensor context, Tensor key_sum, Tensor key_max, Tensor row_max, Tensor row_sum)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor projection, Tensor out, Tensor context, Tensor key_sum,"
    f" Tensor key_max, Tensor row_max, Tensor row_sum, {_SEGMENTS}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
)


def not_supported_reasons(backend: str, q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> list[str]:
    """Every reason why ``backend`` declines these arguments; empty when it takes them."""
    if backend == "reference":
        return []
    tensors = {"q": q, "k": k, "v": v, "projection": projection}
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
        reasons.append(f"dtype is {q.dtype}, the kernels take float32 and bfloat16 (the reference takes it)")
    return reasons


def _fake(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, cu_seqlens: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, features = cu_seqlens.shape[0] - 1, q.shape[1], projection.shape[0]
    rows = (heads, q.shape[0])
    return (
        q.new_empty(q.shape),
        q.new_empty((batch, heads, features, q.shape[2]), dtype=dtype),
        q.new_empty((batch, heads, features), dtype=dtype),
        q.new_empty((batch, heads), dtype=dtype),
        q.new_empty(rows, dtype=dtype),
        q.new_empty(rows, dtype=dtype),
    )


def _fake_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, projection, cu_seqlens, ctx.max_seqlen, cu_seqlens_q, ctx.max_seqlen_q, ctx.eps, ctx.per_cell = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, projection, *output, cu_seqlens, cu_seqlens_q)


def _backward(op: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_out: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        *tensors, cu_seqlens, cu_seqlens_q = ctx.saved_tensors
        segments = (cu_seqlens, ctx.max_seqlen, cu_seqlens_q, ctx.max_seqlen_q)
        grads = op(grad_out, *tensors, *segments, ctx.eps, ctx.per_cell)
        return *grads, *[None] * 7

    return backward


def _plain_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward as a function of grad_out, q, k and v: what the forward has kept of them is made again."""
    segments = others[6:]
    kept = reference.forward(q, k, v, projection, *segments)
    return reference.backward(grad_out, q, k, v, projection, *kept, *segments)


def _rows(cu_seqlens: Tensor, cu_seqlens_q: Tensor) -> int:
    """Query rows and key rows, together, of the cells that have both."""
    keys, queries = cu_seqlens.diff().long(), cu_seqlens_q.diff().long()
    return int(((keys + queries) * ((keys > 0) & (queries > 0))).sum())


def _flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Tensor,
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    """Scores and context of the keys, scores and output of the queries: 4 per head, channel, feature and row."""
    return 4 * q.shape[1] * projection.numel() * _rows(cu_seqlens, cu_seqlens_q)


def _flops_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    out: Tensor,
    context: Tensor,
    key_sum: Tensor,
    key_max: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Tensor,
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    """8 per head, channel, feature and row: four products for a query and four for a key.

    Queries: scores again, gradient of the features, of the context, of q. Keys: scores again, gradient of v, of the
    features, of k.
    """
    return 8 * q.shape[1] * projection.numel() * _rows(cu_seqlens, cu_seqlens_q)


_HOME = "xtg_kernels.ops.favor_attention.triton_kernel"
dispatch.register_op(
    "favor_attention", SCHEMA, reference=reference.forward, triton=f"{_HOME}:forward", fake=_fake, flops=_flops
)
dispatch.register_op(
    "favor_attention_backward",
    BACKWARD_SCHEMA,
    reference=reference.backward,
    plain=_plain_backward,
    triton=f"{_HOME}:backward",
    fake=_fake_backward,
    flops=_flops_backward,
)
dispatch.register_autograd("favor_attention", _setup_context, _backward)
# Half the range of exponentials is beyond float16: under its autocast the op runs in float32.
dispatch.register_autocast("favor_attention", None, tensors=3, instead_of_float16=torch.float32)
