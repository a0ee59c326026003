"""favor_attention: linear attention by positive random features (FAVOR+) inside each segment, forward and backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xtg_kernels import checks, dispatch
from xtg_kernels.ops.favor_attention import library

__all__ = ["favor_attention"]

STABILIZERS = ("head", "cell")


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    eps: float = 1e-4,
    stabilizer: str = "head",
) -> Tensor:
    """FAVOR+ attention inside each segment: its cost is linear in the length, and no feature is written to memory.

    The softmax kernel of non-causal attention, by positive random features (Performer, Choromanski et al. 2021). With
    c = head_dim ** -0.25, for every segment and head::

        scores(x) = c x @ projection.T                               half_norms(x) = |c x|^2 / 2
        query_features = exp(scores(q) - half_norms(q) - row_max) + eps
        key_features = exp(scores(k) - half_norms(k) - key_max) + eps
        out = query_features @ (key_features.T @ v) / (query_features @ key_features.sum(0))

    row_max is the largest score of the query, key_max the largest score of the keys of this segment and head, or of all
    heads of the segment. (The published code takes the maximum over the batch, so that a cell depends on its batch
    mates; at batch size 1 it equals ``stabilizer="cell"``.) eps makes key_max visible in the result, so the two are
    different functions. Both maxima pass gradient on, to the first of equal largest scores (of a query by features, of
    keys by rows and then features, with "cell" by heads before both).

    Args:
        q: (total_q, num_heads, head_dim), float32 or bfloat16 (float64: reference backend).
        k, v: (total_nnz, num_heads, head_dim) in the dtype of q. All three may be strided views; the last dimension
            should be contiguous, else it is copied.
        projection: (num_features, head_dim) float32 (float64 with float64 q), rows of the random projection; it gets no
            gradient.
        cu_seqlens: (batch + 1,) int32, starts at 0, non-decreasing; the keys of segment c are rows
            cu_seqlens[c]:cu_seqlens[c + 1].
        max_seqlen: length of the longest segment, in rows.
        cu_seqlens_q, max_seqlen_q: the same for the rows of q, where not all rows ask; None means those of the keys.
        eps: added to every feature.
        stabilizer: "head" or "cell", what key_max is the maximum of.

    Returns:
        out (total_q, num_heads, head_dim) in the dtype of q; zero in rows past cu_seqlens_q[-1] and in segments without
        keys. FLOPs: forward 4, backward 8 times num_heads * num_features * head_dim * (rows of q + rows of k). Under
        autocast to float16 the op runs in float32.

    Raises:
        TypeError: not a tensor, or a wrong dtype; float16 is refused because its features overflow. ValueError: a wrong
        shape or device, bad offsets, a max_seqlen below the longest segment, a negative or infinite eps, an unknown
        stabilizer, or a backend asked for by name that declines (all its reasons are shown).
    """
    checks.check_tensor("q", q, ("total_q", "num_heads", "head_dim"))
    checks.check_floating("q", q)
    if q.dtype == torch.float16 and not torch.is_autocast_enabled(q.device.type):
        raise TypeError("q: expected float32, bfloat16 or float64, got torch.float16, whose range features overflow")
    if q.shape[1] < 1 or q.shape[2] < 1:
        raise ValueError(f"q: expected num_heads >= 1 and head_dim >= 1, got shape {tuple(q.shape)}")
    total_nnz: int | str = q.shape[0] if cu_seqlens_q is None else "total_nnz"
    for name, x in (("k", k), ("v", v)):
        checks.check_tensor(name, x, (total_nnz, *q.shape[1:]), q)
        checks.check_floating(name, x, q.dtype)
        total_nnz = x.shape[0]
    checks.check_tensor("projection", projection, ("num_features", q.shape[2]), q)
    checks.check_floating("projection", projection, torch.float64 if q.dtype == torch.float64 else torch.float32)
    if projection.shape[0] < 1:
        raise ValueError(f"projection: expected num_features >= 1, got shape {tuple(projection.shape)}")
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a number in [0, inf), got {eps!r}")
    if stabilizer not in STABILIZERS:
        raise ValueError(f"stabilizer: expected one of {', '.join(STABILIZERS)}, got {stabilizer!r}")
    _check_int("max_seqlen", max_seqlen)
    checks.check_cu_seqlens(cu_seqlens, q, k.shape[0], max_seqlen)
    if cu_seqlens_q is None:
        if max_seqlen_q is not None:
            raise ValueError("max_seqlen_q: expected None without cu_seqlens_q")
        cu_seqlens_q, max_seqlen_q = cu_seqlens, max_seqlen
    else:
        if max_seqlen_q is None:
            raise ValueError("max_seqlen_q: expected the longest segment of cu_seqlens_q, got None")
        _check_int("max_seqlen_q", max_seqlen_q)
        checks.check_tensor("cu_seqlens_q", cu_seqlens_q, tuple(cu_seqlens.shape), q)
        checks.check_cu_seqlens(cu_seqlens_q, q, q.shape[0], max_seqlen_q, name="cu_seqlens_q", total="total_q")
    op = dispatch.choose_overload(
        "favor_attention", lambda backend: library.not_supported_reasons(backend, q, k, v, projection)
    )
    return op(
        q,
        k,
        v,
        projection.detach(),
        cu_seqlens,
        max_seqlen,
        cu_seqlens_q,
        max_seqlen_q,
        float(eps),
        stabilizer == "cell",
    )[0]


def _check_int(name: str, x: object) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(x).__name__}")
