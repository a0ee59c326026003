"""Reference of masked_head and masked_mse: plain PyTorch, any dtype, any device, written to be read.

    normed1 = (x - mean) * rstd1                 middle = normed1 * norm1_weight + norm1_bias
    normed2 = (middle - mean) * rstd2            prediction = weight . (normed2 * norm2_weight + norm2_bias) + bias

at the chosen rows of x only. The kernels (csrc/cpu/masked_head.h, triton_kernel.py) do this for a row at a time and
keep nothing: the backward, whose only input from above is one number a row, computes these again.
"""

from __future__ import annotations

import torch
from torch import Tensor

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows.long()]


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Each row with mean 0 and variance 1, and the factor (n, 1) that made it so."""
    centred = x - x.mean(dim=-1, keepdim=True)
    rstd = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _normalise_backward(grad_normed: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    mean_grad = grad_normed.mean(dim=-1, keepdim=True)
    mean_product = (grad_normed * normed).mean(dim=-1, keepdim=True)
    return rstd * (grad_normed - mean_grad - normed * mean_product)


def masked_head(
    x: Tensor,
    rows: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """(n,) predictions at the chosen rows."""
    dtype = _compute_dtype(x)
    w1, b1, w2, b2, w, b = (p.to(dtype) for p in (norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias))
    normed1, _ = _normalise(_chosen(x, rows).to(dtype), eps)
    normed2, _ = _normalise(normed1 * w1 + b1, eps)
    return ((normed2 * w2 + b2) * w).sum(dim=-1) + b


def masked_head_backward(
    grad_out: Tensor,
    x: Tensor,
    rows: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Grads:
    """Gradients to x (zero in rows not chosen, summed where a row is chosen again) and to the six parameters."""
    dtype = _compute_dtype(x)
    params = (norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias)
    w1, b1, w2, b2, w, _ = (p.to(dtype) for p in params)
    normed1, rstd1 = _normalise(_chosen(x, rows).to(dtype), eps)
    normed2, rstd2 = _normalise(normed1 * w1 + b1, eps)
    grad = grad_out.to(dtype)[:, None]

    grad_weight = (grad * (normed2 * w2 + b2)).sum(dim=0)
    grad_scaled2 = grad * w
    grad_middle = _normalise_backward(grad_scaled2 * w2, normed2, rstd2)
    grad_rows = _normalise_backward(grad_middle * w1, normed1, rstd1)
    grad_x = grad_rows
    if rows is not None:
        grad_x = grad_rows.new_zeros(x.shape).index_add_(0, rows.long(), grad_rows)
    grads = (
        (grad_middle * normed1).sum(dim=0),
        grad_middle.sum(dim=0),
        (grad_scaled2 * normed2).sum(dim=0),
        grad_scaled2.sum(dim=0),
        grad_weight,
        grad.sum(dim=0),
    )
    g1, g2, g3, g4, g5, g6 = (g.to(p.dtype) for g, p in zip(grads, params, strict=True))
    return grad_x.to(x.dtype), g1, g2, g3, g4, g5, g6


def masked_mse(
    x: Tensor,
    rows: Tensor | None,
    target: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mean: bool,
) -> Tensor:
    """() squared error of the predictions, summed or averaged."""
    predictions = masked_head(x, rows, norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias, eps)
    squares = (predictions - target.to(predictions.dtype)).square()
    return squares.mean() if mean else squares.sum()


def masked_mse_backward(
    grad_out: Tensor,
    x: Tensor,
    rows: Tensor | None,
    target: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mean: bool,
) -> Grads:
    """As masked_head_backward, from the gradient of the loss; the predictions are computed again."""
    params = (norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias)
    predictions = masked_head(x, rows, *params, eps)
    grad = 2 * grad_out * (predictions - target.to(predictions.dtype))
    if mean and grad.numel():
        grad = grad / grad.numel()
    return masked_head_backward(grad, x, rows, *params, eps)
