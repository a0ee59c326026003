"""masked_head and masked_mse: final norms, head and squared error of the decoder, at chosen rows only."""

from __future__ import annotations

import torch
from torch import Tensor

from xtg_kernels import checks, dispatch
from xtg_kernels.ops.masked_head import library

__all__ = ["masked_head", "masked_mse"]


def masked_head(
    x: Tensor,
    rows: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Predictions at the chosen rows: two LayerNorms (Ba et al. 2016) and a linear map to one number, fused.

    The end of xTrimoGene's decoder (Gong et al. 2023, arXiv 2311.15156), for each chosen row r of x::

        out = weight . LayerNorm2(LayerNorm1(x[r])) + bias

    Args:
        x: (N, dim), float32, bfloat16 or float16 (float64: reference backend). The last dimension should be contiguous,
            else x is copied.
        rows: (n,) int32 or int64, rows of x in any order, again and again if need be; None for all of them.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight: (dim,).  bias: (1,). One dtype, that of x or
            float32 (float64 with float64). torch.nn.Linear(dim, 1) holds weight as (1, dim): pass linear.weight[0].
        eps: added to both variances.

    Returns:
        (n,) float32 (float64 for float64); the arithmetic is float32 for half types too. Gradients go to x (zero in
        rows not chosen, summed in the order of ``rows`` where one is chosen again) and to all parameters. FLOPs:
        forward 2, backward 4 times n * dim, those of the linear map. Autocast changes nothing.

    Raises:
        TypeError: not a tensor, or a wrong dtype. ValueError: a wrong shape or device, a row outside x (on a GPU looked
        for with XTG_DEBUG=1 only), or a backend asked for by name that declines (all its reasons are shown).
    """
    params = (norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias)
    _check(x, rows, params)
    op = dispatch.choose_overload("masked_head", lambda backend: library.not_supported_reasons(backend, x))
    return op(x, rows, *params, float(eps))


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
    *,
    eps: float = 1e-5,
    reduction: str = "sum",
) -> Tensor:
    """Squared error of ``masked_head`` against ``target``, fused: predictions are not stored, for the backward neither.

    Args:
        x, rows, norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias, eps: as ``masked_head`` takes them.
        target: (n,) float32 (float64 with float64), the true values. It is data: no gradient goes there.
        reduction: "sum" or "mean" over the n rows.

    Returns:
        () float32 (float64 for float64). Of no rows the sum is 0 and the mean NaN, as torch.nn.functional.mse_loss has
        it. FLOPs: forward 2, backward 6 times n * dim.

    Raises:
        TypeError, ValueError: as ``masked_head``; also a target that requires a gradient, or another reduction.
    """
    params = (norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias)
    n = _check(x, rows, params)
    checks.check_tensor("target", target, (n,), x)
    checks.check_floating("target", target, torch.float64 if x.dtype == torch.float64 else torch.float32)
    if target.requires_grad:
        raise ValueError("target: expected data, got a tensor that requires a gradient (use target.detach())")
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction: expected "sum" or "mean", got {reduction!r}')
    op = dispatch.choose_overload("masked_mse", lambda backend: library.not_supported_reasons(backend, x))
    return op(x, rows, target, *params, float(eps), reduction == "mean")


_PARAM_NAMES = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "weight", "bias")


def _check(x: object, rows: Tensor | None, params: tuple[Tensor, ...]) -> int:
    """The arguments that both functions share; how many rows are chosen."""
    x = checks.check_tensor("x", x, ("N", "dim"))
    checks.check_floating("x", x)
    dim = x.shape[1]
    if dim < 1:
        raise ValueError(f"x: expected at least one channel, got shape {tuple(x.shape)}")
    for name, param in zip(_PARAM_NAMES, params, strict=True):
        checks.check_tensor(name, param, (1,) if name == "bias" else (dim,), x)
        checks.check_floating(name, param, params[0].dtype)
    if params[0].dtype not in (x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32):
        raise TypeError(f"norm1_weight: expected the dtype of x, {x.dtype}, or torch.float32, got {params[0].dtype}")
    if rows is None:
        return x.shape[0]
    checks.check_tensor("rows", rows, ("n",), x)
    checks.check_ids_dtype("rows", rows)
    if checks.values_are_readable(rows):
        outside = (rows < 0) | (rows >= x.shape[0])
        if bool(outside.any()):
            i = int(outside.nonzero()[0, 0])
            raise ValueError(f"rows: expected rows of x, [0, {x.shape[0]}), got {int(rows[i])} at {i}")
    return rows.shape[0]
