"""Reference of ragged_attention: plain PyTorch, any dtype, any device, written to be read.

Full softmax attention inside each segment. The tiled kernels (csrc/cpu/ragged_attention.h, triton_kernel.py) compute
the same quantities block by block: a query block keeps a running row_max and row_sum while the key blocks of its
segment stream past, and the backward recomputes probs from scores and softmax_lse, or once more where that is large.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out (total_nnz, num_heads, head_dim) and softmax_lse (num_heads, total_nnz), the natural log of the row sums."""
    dtype = _compute_dtype(q)
    bounds = cu_seqlens.tolist()
    slack = q.shape[0] - bounds[-1]
    outs, lses = [], []
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        segment = slice(start, end)
        q_s, k_s, v_s = (x[segment].transpose(0, 1).to(dtype) for x in (q, k, v))  # (num_heads, length, head_dim)
        scores = softmax_scale * (q_s @ k_s.mT)
        row_max = scores.amax(dim=-1, keepdim=True)
        exponentials = (scores - row_max).exp()
        row_sum = exponentials.sum(dim=-1, keepdim=True)
        # Not by softmax_lse: beside a large score its fraction has no digits left.
        probs = exponentials / row_sum
        outs.append((probs @ v_s).transpose(0, 1).to(q.dtype))
        lses.append((row_max + row_sum.log()).squeeze(-1).to(_lse_dtype(q)))
    outs.append(q.new_zeros((slack, *q.shape[1:])))
    lses.append(q.new_zeros((q.shape[1], slack), dtype=_lse_dtype(q)))
    return torch.cat(outs), torch.cat(lses, dim=1)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v; probs are recomputed from scores."""
    dtype = _compute_dtype(q)
    grad_q, grad_k, grad_v = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        segment = slice(start, end)
        q_s, k_s, v_s, grad_s = (x[segment].transpose(0, 1).to(dtype) for x in (q, k, v, grad_out))
        scores = softmax_scale * (q_s @ k_s.mT)
        exponentials = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        probs = exponentials / exponentials.sum(dim=-1, keepdim=True)
        grad_probs = grad_s @ v_s.mT
        # The kernels take rowsum(grad_out * out), which is the same number but for its last digits.
        delta = (probs * grad_probs).sum(dim=-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[:, segment, None].to(dtype)
        grad_scores = softmax_scale * probs * (grad_probs - delta)
        grad_q[segment] = (grad_scores @ k_s).transpose(0, 1).to(q.dtype)
        grad_k[segment] = (grad_scores.mT @ q_s).transpose(0, 1).to(k.dtype)
        grad_v[segment] = (probs.mT @ grad_s).transpose(0, 1).to(v.dtype)
    return grad_q, grad_k, grad_v


def _lse_dtype(q: Tensor) -> torch.dtype:
    # float64 inputs keep a float64 softmax_lse: gradcheck recomputes probs from it and needs all its digits.
    return torch.float64 if q.dtype == torch.float64 else torch.float32
