"""Reference of favor_attention: plain PyTorch, any dtype, any device, written to be read.

FAVOR+ (Choromanski et al. 2021) replaces the softmax kernel exp(q k^T / sqrt(head_dim)) by a product of positive random
features, so keys and values meet queries through a small context. The tiled kernels (csrc/cpu/favor_attention.h,
triton_kernel.py) compute the same quantities block by block: key blocks stream past under a running key_max, query
blocks under a running row_max, and the backward recomputes features from scores.

The published features carry a factor num_features ** -0.5, which cancels between numerator and denominator.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _segments(cu_seqlens: Tensor, cu_seqlens_q: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """(cell, its key rows, its query rows) of every cell that has both."""
    keys, queries = (itertools.pairwise(x.tolist()) for x in (cu_seqlens, cu_seqlens_q))
    for c, ((start, end), (start_q, end_q)) in enumerate(zip(keys, queries, strict=True)):
        if start < end and start_q < end_q:
            yield c, slice(start, end), slice(start_q, end_q)


def _scores(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """scores (num_heads, length, num_features) of scaled rows with the projection, and half their squared norms."""
    x = x.shape[-1] ** -0.25 * x
    return x @ projection.mT, x.square().sum(dim=-1, keepdim=True) / 2


def _through_maximum(scores: Tensor, grad_scores: Tensor) -> Tensor:
    """grad_scores of exponentials of scores - scores.amax(-1), in which the maximum was taken for a constant, with what
    goes through the maximum added: to the first of the largest scores, in order."""
    return grad_scores.scatter_add(-1, scores.argmax(-1, keepdim=True), -grad_scores.sum(-1, keepdim=True))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    eps: float,
    per_cell: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, and what the backward needs: context, key_sum, key_max, row_max, row_sum.

    context (batch, num_heads, num_features, head_dim) is the sum of key features times values, key_sum (batch,
    num_heads, num_features) that of key features, key_max (batch, num_heads) the stabiliser of the keys; row_max and
    row_sum (num_heads, total_q) are the stabiliser and the denominator of each query. All are zero where a cell lacks
    keys or queries.
    """
    dtype = _compute_dtype(q)
    batch, num_heads, num_features = cu_seqlens.shape[0] - 1, q.shape[1], projection.shape[0]
    # Like all three, so that torch.func.vmap lets each of them alone have the dimension that it maps over.
    like = torch.cat([q[:0], k[:0], v[:0]])
    out = like.new_zeros(q.shape)
    context = like.new_zeros((batch, num_heads, num_features, q.shape[2]), dtype=dtype)
    key_sum = like.new_zeros((batch, num_heads, num_features), dtype=dtype)
    key_max = like.new_zeros((batch, num_heads), dtype=dtype)
    row_max, row_sum = (like.new_zeros((num_heads, q.shape[0]), dtype=dtype) for _ in range(2))
    for c, keys, queries in _segments(cu_seqlens, cu_seqlens_q):
        q_s, k_s, v_s = (x.transpose(0, 1).to(dtype) for x in (q[queries], k[keys], v[keys]))
        scores, half_norms = _scores(k_s, projection.to(dtype))
        # Without eps every stabiliser cancels: one that keeps the largest feature at 1 then avoids 0 / 0.
        stabilised = scores if eps else scores - half_norms
        # max and not amax, which would share the gradient among equal scores.
        segment_max = stabilised.reshape(1 if per_cell and eps else num_heads, 1, -1).max(dim=-1, keepdim=True).values
        key_features = (scores - half_norms - segment_max).exp() + eps
        # Names of their own, since autograd takes a write into the batch's tensor for a change of every part of it.
        key_sum_s, context_s = key_features.sum(dim=1), key_features.mT @ v_s
        key_max[c], key_sum[c], context[c] = segment_max.flatten(), key_sum_s, context_s

        scores, half_norms = _scores(q_s, projection.to(dtype))
        maximum = scores.max(dim=-1, keepdim=True).values
        query_features = (scores - (half_norms if eps else 0) - maximum).exp() + eps
        denominator = query_features @ key_sum_s[..., None]
        out[queries] = (query_features @ context_s / denominator).transpose(0, 1).to(out.dtype)
        row_max[:, queries], row_sum[:, queries] = maximum.squeeze(-1), denominator.squeeze(-1)
    return out, context, key_sum, key_max, row_max, row_sum


def backward(
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
    max_seqlen_q: int,
    eps: float,
    per_cell: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v; features are recomputed from scores.

    Both maxima pass gradient on. Where several scores are the largest, all of it goes to the first one: of a query in
    the order of the features, of the keys in that of rows and then features, with per_cell that of heads before both.
    """
    dtype = _compute_dtype(q)
    scale = q.shape[2] ** -0.25
    projection = projection.to(dtype)
    grad_q, grad_k, grad_v = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for c, keys, queries in _segments(cu_seqlens, cu_seqlens_q):
        q_s, out_s, grad_s = (x[queries].transpose(0, 1).to(dtype) for x in (q, out, grad_out))
        delta = (grad_s * out_s).sum(dim=-1, keepdim=True)
        scores, half_norms = _scores(q_s, projection)
        # Both over the denominator, which every use of them has in common.
        inverse = 1 / row_sum[:, queries, None]
        exponentials = inverse * (scores - (half_norms if eps else 0) - row_max[:, queries, None]).exp()
        query_features = exponentials + eps * inverse
        grad_context = query_features.mT @ grad_s
        grad_key_sum = -(query_features * delta).sum(dim=1)
        grad_scores = exponentials * (grad_s @ context[c].mT - delta * key_sum[c][:, None])
        grad = -(scale**2) * grad_scores.sum(dim=-1, keepdim=True) * q_s
        if eps:  # without it the stabilisers cancel
            grad_scores = _through_maximum(scores, grad_scores)
        grad += scale * grad_scores @ projection
        grad_q[queries] = grad.transpose(0, 1).to(q.dtype)

        k_s, v_s = (x[keys].transpose(0, 1).to(dtype) for x in (k, v))
        scores, half_norms = _scores(k_s, projection)
        exponentials = (scores - half_norms - key_max[c][:, None, None]).exp()
        grad_v[keys] = ((exponentials + eps) @ grad_context).transpose(0, 1).to(v.dtype)
        grad_scores = exponentials * (v_s @ grad_context.mT + grad_key_sum[:, None])
        grad = -(scale**2) * grad_scores.sum(dim=-1, keepdim=True) * k_s
        if eps:
            maxima = 1 if per_cell else len(scores)
            flat = _through_maximum(scores.reshape(maxima, -1), grad_scores.reshape(maxima, -1))
            grad_scores = flat.view(grad_scores.shape)
        grad += scale * grad_scores @ projection
        grad_k[keys] = grad.transpose(0, 1).to(k.dtype)
    return grad_q, grad_k, grad_v
