"""Triton backend of masked_head and masked_mse: two LayerNorms and a linear map to one number, at chosen rows.

    normed1 = (x - mean) * rstd1                 middle = normed1 * norm1_weight + norm1_bias
    normed2 = (middle - mean) * rstd2            prediction = weight . (normed2 * norm2_weight + norm2_bias) + bias

A program owns a block of chosen rows and holds them whole, in float32, padded to a power of two of channels. With
scale = weight * norm2_weight the prediction is normed2 . scale + offset, and the parameters' gradients follow from
three sums over rows: of grad * normed2, of grad_middle * normed1 and of grad_middle.

The backward sorts the chosen rows; the first position of a row sums what comes from above over all positions of the
row, in their order, and writes its grad_x. The three sums are taken in a number of chunks that depends on the number of
rows alone, and the chunks are added in order. So there are no atomics, and the same bits every time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtg_kernels.triton_launch import LaunchConfigs

_configs = LaunchConfigs("masked_head", Path(__file__).with_name("configs.json"))
# Upper bound on the chunks of the backward: enough programs to fill a large GPU, few enough for small partial sums.
_CHUNKS = 512

Parameters = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _load_vector(pointer, dims, DIM: tl.constexpr):
    return tl.load(pointer + dims, mask=dims < DIM, other=0.0).to(tl.float32)


@triton.jit
def _normalise(tile, in_row, eps, DIM: tl.constexpr):
    """Rows with mean 0 and variance 1 (0 past DIM), and the factors that made them so."""
    mean = tl.sum(tile, 1) / DIM
    centred = tl.where(in_row[None, :], tile - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / DIM + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def _predict(
    x,
    row,
    in_use,
    row_stride,
    norm1_weight,
    norm1_bias,
    norm2_weight,
    norm2_bias,
    weight,
    bias,
    eps,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """normed1, rstd1, normed2, rstd2 of a block of rows, normed2 . scale, and the predictions."""
    dims = tl.arange(0, BLOCK_D)
    in_row = dims < DIM
    pointers = x + row[:, None] * row_stride + dims[None, :]
    tile = tl.load(pointers, mask=in_use[:, None] & in_row[None, :], other=0.0).to(tl.float32)
    normed1, rstd1 = _normalise(tile, in_row, eps, DIM)
    middle = normed1 * _load_vector(norm1_weight, dims, DIM)[None, :] + _load_vector(norm1_bias, dims, DIM)[None, :]
    normed2, rstd2 = _normalise(middle, in_row, eps, DIM)
    head = _load_vector(weight, dims, DIM)
    product = tl.sum(normed2 * (head * _load_vector(norm2_weight, dims, DIM))[None, :], 1)
    offset = tl.sum(head * _load_vector(norm2_bias, dims, DIM), 0) + tl.load(bias).to(tl.float32)
    return normed1, rstd1, normed2, rstd2, product, product + offset


@triton.jit(do_not_specialize=["n"])
def _forward_kernel(
    x,
    rows,
    target,
    out,
    norm1_weight,
    norm1_bias,
    norm2_weight,
    norm2_bias,
    weight,
    bias,
    eps,
    row_stride,
    n,
    HAS_ROWS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Predictions of a block of chosen rows, or with a target the sum of their squared errors."""
    position = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_use = position < n
    row = position
    if HAS_ROWS:
        row = tl.load(rows + position, mask=in_use, other=0).to(tl.int64)
    _, _, _, _, _, prediction = _predict(
        x, row, in_use, row_stride, norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias, eps, DIM, BLOCK_D
    )
    if HAS_TARGET:
        error = tl.where(in_use, prediction - tl.load(target + position, mask=in_use, other=0.0), 0.0)
        tl.store(out + tl.program_id(0), tl.sum(error * error, 0))
    else:
        tl.store(out + position, prediction, mask=in_use)


@triton.jit(do_not_specialize=["n", "blocks_per_chunk"])
def _backward_kernel(
    x,
    sorted_rows,
    run_end,
    order,
    target,
    grad_out,
    grad_x,
    partial_sums,
    partial_grad_out,
    norm1_weight,
    norm1_bias,
    norm2_weight,
    norm2_bias,
    weight,
    bias,
    eps,
    loss_factor,
    row_stride,
    n,
    blocks_per_chunk,
    HAS_ROWS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_x of one chunk of the sorted positions, and the chunk's share of the sums."""
    chunk = tl.program_id(0)
    dims = tl.arange(0, BLOCK_D)
    in_row = dims < DIM
    sum_normed2 = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_product = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_middle = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_grad = tl.zeros((BLOCK_N,), tl.float32)
    last_block = tl.minimum((chunk + 1) * blocks_per_chunk, tl.cdiv(n, BLOCK_N))
    for block in range(chunk * blocks_per_chunk, last_block):
        position = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_use = position < n
        row = position
        run_length = tl.where(in_use, 1, 0)
        if HAS_ROWS:
            row = tl.load(sorted_rows + position, mask=in_use, other=0).to(tl.int64)
            before = tl.load(sorted_rows + position - 1, mask=in_use & (position > 0), other=-1).to(tl.int64)
            in_use = in_use & (row != before)
            run_length = (tl.load(run_end + position, mask=in_use, other=0) - position).to(tl.int32)
            run_length = tl.where(in_use, run_length, 0)
        normed1, rstd1, normed2, rstd2, product, prediction = _predict(
            x,
            row,
            in_use,
            row_stride,
            norm1_weight,
            norm1_bias,
            norm2_weight,
            norm2_bias,
            weight,
            bias,
            eps,
            DIM,
            BLOCK_D,
        )
        grad = tl.zeros((BLOCK_N,), tl.float32)
        for i in range(tl.max(run_length, 0)):
            of_row = i < run_length
            chosen = position + i
            if HAS_ROWS:
                chosen = tl.load(order + position + i, mask=of_row, other=0)
            if HAS_TARGET:
                error = prediction - tl.load(target + chosen, mask=of_row, other=0.0)
                grad += tl.where(of_row, loss_factor * tl.load(grad_out) * error, 0.0)
            else:
                grad += tl.load(grad_out + chosen, mask=of_row, other=0.0)

        scale = _load_vector(weight, dims, DIM) * _load_vector(norm2_weight, dims, DIM)
        centred = (scale - tl.sum(scale, 0) / DIM)[None, :] - normed2 * (product / DIM)[:, None]
        grad_middle = tl.where(in_row[None, :], (grad * rstd2)[:, None] * centred, 0.0)
        sum_normed2 += grad[:, None] * normed2
        sum_product += grad_middle * normed1
        sum_middle += grad_middle
        sum_grad += grad
        grad_normed1 = grad_middle * _load_vector(norm1_weight, dims, DIM)[None, :]
        mean_grad = tl.sum(grad_normed1, 1) / DIM
        mean_product = tl.sum(grad_normed1 * normed1, 1) / DIM
        grad_row = rstd1[:, None] * (grad_normed1 - mean_grad[:, None] - normed1 * mean_product[:, None])
        tl.store(
            grad_x + row[:, None] * DIM + dims[None, :],
            grad_row.to(grad_x.dtype.element_ty),
            mask=in_use[:, None] & in_row[None, :],
        )
    partial_sums += chunk.to(tl.int64) * 3 * DIM
    tl.store(partial_sums + dims, tl.sum(sum_normed2, 0), mask=in_row)
    tl.store(partial_sums + DIM + dims, tl.sum(sum_product, 0), mask=in_row)
    tl.store(partial_sums + 2 * DIM + dims, tl.sum(sum_middle, 0), mask=in_row)
    tl.store(partial_grad_out + chunk, tl.sum(sum_grad, 0))


def _launch_config(kernel: str, x: Tensor) -> dict[str, Any]:
    """What the kernels take for rows of this dtype and width: configs are for up to 128, 512 and 4096 channels."""
    dim = x.shape[1]
    width = next(width for width in (128, 512, 4096) if dim <= width)
    return {**_configs(kernel, x.dtype, width, x.device), "DIM": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim))}


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(x: Tensor, rows: Tensor | None, target: Tensor | None, params: Parameters, eps: float) -> Tensor:
    """(n,) predictions, or with a target the squared errors summed over blocks of rows."""
    n = (x if rows is None else rows).shape[0]
    config = _launch_config("forward", x)
    blocks = triton.cdiv(n, config["BLOCK_N"])
    out = torch.empty((n if target is None else blocks,), dtype=torch.float32, device=x.device)
    if n == 0:
        return out
    x = _last_contiguous(x)
    with torch.cuda.device_of(x):
        _forward_kernel[(blocks,)](
            x,
            x if rows is None else rows.contiguous(),
            x if target is None else target.contiguous(),
            out,
            *(p.contiguous() for p in params),
            eps,
            x.stride(0),
            n,
            HAS_ROWS=rows is not None,
            HAS_TARGET=target is not None,
            **config,
        )
    return out


def _backward(
    grad_out: Tensor,
    x: Tensor,
    rows: Tensor | None,
    target: Tensor | None,
    params: Parameters,
    eps: float,
    loss_factor: float,
) -> Grads:
    n, dim = (x if rows is None else rows).shape[0], x.shape[1]
    grad_x = (torch.empty if rows is None else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)
    if n == 0:
        g1, g2, g3, g4, g5, g6 = (torch.zeros_like(p) for p in params)
        return grad_x, g1, g2, g3, g4, g5, g6
    config = _launch_config("backward", x)
    blocks = triton.cdiv(n, config["BLOCK_N"])
    blocks_per_chunk = triton.cdiv(blocks, _CHUNKS)
    chunks = triton.cdiv(blocks, blocks_per_chunk)
    partial_sums = torch.empty((chunks, 3, dim), dtype=torch.float32, device=x.device)
    partial_grad_out = torch.empty((chunks,), dtype=torch.float32, device=x.device)
    x = _last_contiguous(x)
    sorted_rows, run_end, order = x, x, x
    with torch.cuda.device_of(x):
        if rows is not None:
            # Stably, so that the positions of a row keep their order.
            sorted_rows, order = torch.sort(rows, stable=True)
            run_end = torch.searchsorted(sorted_rows, sorted_rows, right=True)
        _backward_kernel[(chunks,)](
            x,
            sorted_rows,
            run_end,
            order,
            x if target is None else target.contiguous(),
            grad_out.contiguous(),
            grad_x,
            partial_sums,
            partial_grad_out,
            *(p.contiguous() for p in params),
            eps,
            loss_factor,
            x.stride(0),
            n,
            blocks_per_chunk,
            HAS_ROWS=rows is not None,
            HAS_TARGET=target is not None,
            **config,
        )
    normed2, product, middle = (partial.sum(0) for partial in partial_sums.unbind(1))
    total = partial_grad_out.sum()
    _, _, norm2_weight, norm2_bias, weight, _ = (p.float() for p in params)
    grads = (
        product,
        middle,
        weight * normed2,
        weight * total,
        norm2_weight * normed2 + norm2_bias * total,
        total[None],
    )
    g1, g2, g3, g4, g5, g6 = (g.to(p.dtype) for g, p in zip(grads, params, strict=True))
    return grad_x, g1, g2, g3, g4, g5, g6


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
    """(n,) float32 predictions at the chosen rows of x (N, dim), dim at most 4096."""
    return _forward(x, rows, None, (norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias), eps)


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
    """Gradients to x, zero in rows not chosen, and to the six parameters, each in its own dtype."""
    params = (norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias)
    return _backward(grad_out, x, rows, None, params, eps, 1.0)


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
    """() float32, the squared error of the predictions, summed or averaged."""
    loss = _forward(x, rows, target, (norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias), eps).sum()
    return loss / target.numel() if mean else loss


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
    """As masked_head_backward, from the gradient () of the loss."""
    params = (norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias)
    return _backward(grad_out, x, rows, target, params, eps, 2.0 / max(target.numel(), 1) if mean else 2.0)
