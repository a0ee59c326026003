"""ragged_attention: full softmax attention inside each segment of a ragged batch, forward and backward."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from xtg_kernels import checks, dispatch
from xtg_kernels.ops.ragged_attention import library, varlen

__all__ = ["ragged_attention"]


@overload
def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Full (non-causal) softmax attention inside each segment; nothing is padded, no score matrix is stored.

    For every segment and head, ``out = softmax(softmax_scale * q @ k.T) @ v`` (Vaswani et al. 2017), computed tile by
    tile with a running row maximum (Milakov and Gimelshein 2018; Dao et al. 2022).

    Args:
        q, k, v: (total_nnz, num_heads, head_dim), one dtype of float32, bfloat16, float16 (float64: reference backend).
            May be strided views of one packed qkv tensor; the last dimension should be contiguous, else it is copied.
        cu_seqlens: (batch + 1,) int32, starts at 0, non-decreasing; segment c is rows cu_seqlens[c]:cu_seqlens[c + 1].
        max_seqlen: length of the longest segment, in rows.
        softmax_scale: factor on the scores; None means head_dim ** -0.5.
        return_lse: also return softmax_lse.

    Returns:
        out (total_nnz, num_heads, head_dim) in the dtype of q, zero in rows past cu_seqlens[-1]; with ``return_lse``
        also softmax_lse (num_heads, total_nnz) float32, the natural log of each row's sum of exponentials (0 there).
        Both are differentiable (backend varlen: out alone). float16 on CPU is computed in float32. FLOPs: forward 4,
        backward 10 times num_heads * head_dim * sum(length ** 2).

    Raises:
        TypeError: not a tensor, or a wrong dtype. ValueError: a wrong shape or device, bad cu_seqlens, a max_seqlen
        below the longest segment, or a backend asked for by name that declines (all its reasons are shown).
    """
    checks.check_tensor("q", q, ("total_nnz", "num_heads", "head_dim"))
    checks.check_floating("q", q)
    if q.shape[1] < 1 or q.shape[2] < 1:
        raise ValueError(f"q: expected num_heads >= 1 and head_dim >= 1, got shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        checks.check_tensor(name, x, tuple(q.shape), q)
        checks.check_floating(name, x, q.dtype)
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"max_seqlen: expected an int, got {type(max_seqlen).__name__}")
    checks.check_cu_seqlens(cu_seqlens, q, q.shape[0], max_seqlen)
    if softmax_scale is None:
        softmax_scale = q.shape[2] ** -0.5
    if dispatch.current_backend() == "varlen":
        lse_with_gradient = return_lse and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        dispatch.refuse("ragged_attention", "varlen", varlen.not_supported_reasons(q, k, v, lse_with_gradient))
        if not dispatch.is_transformed():
            out, softmax_lse = varlen.attention(q, k, v, cu_seqlens, max_seqlen, float(softmax_scale))
            return (out, softmax_lse) if return_lse else out
    op = dispatch.choose_overload("ragged_attention", lambda backend: library.not_supported_reasons(backend, q, k, v))
    out, softmax_lse = op(q, k, v, cu_seqlens, max_seqlen, float(softmax_scale))
    return (out, softmax_lse) if return_lse else out
