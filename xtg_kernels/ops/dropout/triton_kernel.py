"""Triton backend of dropout: the mask is drawn in registers, rows are read and written once, forward and backward.

A program has some rows and 128 channels of them: 16 counters a row, whose 64 words are turned into the order of the
channels. In words and bits it is csrc/cpu/dropout.h.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtg_kernels.ops.dropout.reference import BLOCK, LANES, threshold_and_scale
from xtg_kernels.triton_launch import LaunchConfigs

_configs = LaunchConfigs("dropout", Path(__file__).with_name("configs.json"))
_BLOCK, _LANES = tl.constexpr(BLOCK), tl.constexpr(LANES)


@triton.jit
def _bits(row_id, seed, place, block, BLOCK_R: tl.constexpr):
    """(BLOCK_R, 128) the 16 bits of each channel of a block of them."""
    groups = (block * _LANES + tl.arange(0, _LANES)).to(tl.uint32)
    zeros = tl.zeros((BLOCK_R, _LANES), tl.uint32)
    low, high = (row_id & 0xFFFFFFFF).to(tl.uint32), ((row_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, zeros + groups[None, :], zeros + place.to(tl.uint32), zeros + low[:, None], zeros + high[:, None], 7
    )
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    # (row, lane, lower and upper bit of the word's number, half) -> (row, half, word, lane)
    return tl.reshape(tl.permute(halves, (0, 4, 3, 2, 1)), (BLOCK_R, _BLOCK)).to(tl.int32)


@triton.jit
def _tile(num_rows, DIM: tl.constexpr, BLOCK_R: tl.constexpr):
    """This program's block of channels, its rows, and where in memory they are, with a mask."""
    block = tl.program_id(0) % tl.cdiv(DIM, _BLOCK)
    row = (tl.program_id(0) // tl.cdiv(DIM, _BLOCK)).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = block * _BLOCK + tl.arange(0, _BLOCK)
    mask = (row < num_rows)[:, None] & (channel < DIM)[None, :]
    return block, row, row[:, None] * DIM + channel[None, :], mask


@triton.jit
def _kept(row_ids, row, num_rows, seed, place, threshold, block, BLOCK_R: tl.constexpr):
    row_id = tl.load(row_ids + row, mask=row < num_rows, other=0)
    return _bits(row_id, tl.load(seed), place, block, BLOCK_R) >= threshold


@triton.jit(do_not_specialize=["num_rows", "place", "threshold", "scale"])
def _forward_kernel(
    x,
    residual,
    out,
    row_ids,
    seed,
    num_rows,
    place,
    threshold,
    scale,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    block, row, at, mask = _tile(num_rows, DIM, BLOCK_R)
    rows = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        rows = tl.where(rows < 0, 0.0, rows)
    dropped = tl.where(_kept(row_ids, row, num_rows, seed, place, threshold, block, BLOCK_R), rows * scale, 0.0)
    if HAS_RESIDUAL:
        dropped += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, dropped.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "place", "threshold", "scale"])
def _backward_kernel(
    grad_out,
    out,
    grad_x,
    row_ids,
    seed,
    num_rows,
    place,
    threshold,
    scale,
    HAS_OUT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    block, row, at, mask = _tile(num_rows, DIM, BLOCK_R)
    grad_rows = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_OUT:
        kept = tl.load(out + at, mask=mask, other=0.0).to(tl.float32) > 0
    else:
        kept = _kept(row_ids, row, num_rows, seed, place, threshold, block, BLOCK_R)
    tl.store(grad_x + at, tl.where(kept, grad_rows * scale, 0.0).to(grad_x.dtype.element_ty), mask=mask)


def _launch(
    kernel: Any,
    name: str,
    x: Tensor,
    other: Tensor | None,
    row_ids: Tensor,
    seed: Tensor,
    place: int,
    p: float,
    dtype: torch.dtype,
    **flags: bool,
) -> Tensor:
    made = torch.empty(x.shape, dtype=dtype, device=x.device)
    if made.numel() == 0:
        return made
    num_rows, dim = x.shape
    # Product and sum are rounded one after the other, as everywhere: the same bits.
    config = {**_configs(name, x.dtype, BLOCK, x.device), "enable_fp_fusion": False}
    x, row_ids = x.contiguous(), row_ids.contiguous()
    other = x if other is None else other.contiguous()
    programs = triton.cdiv(num_rows, config["BLOCK_R"]) * triton.cdiv(dim, BLOCK)
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            x, other, made, row_ids, seed, num_rows, place, *threshold_and_scale(p), **flags, DIM=dim, **config
        )
    return made


def forward(
    x: Tensor, residual: Tensor | None, row_ids: Tensor, seed: Tensor, place: int, p: float, relu: bool
) -> Tensor:
    """Rows of x, or of relu(x), dropped out, plus residual.

    Args:
        x: (rows, dim), float32, bfloat16 or float16.
        residual: (rows, dim) of that dtype or float32, or None.
        row_ids, seed: (rows,) and () int64.
        place, p: which dropout of the network, and its probability.

    Returns:
        (rows, dim) in the dtype of residual, else of x.
    """
    dtype = x.dtype if residual is None else residual.dtype
    flags = {"HAS_RESIDUAL": residual is not None, "RELU": relu}
    return _launch(_forward_kernel, "forward", x, residual, row_ids, seed, place, p, dtype, **flags)


def backward(
    grad_out: Tensor, out: Tensor | None, row_ids: Tensor, seed: Tensor, place: int, p: float, dtype: torch.dtype
) -> Tensor:
    """Gradient of `forward` to x in its dtype; out is what came out after ReLU, else None."""
    has_out = out is not None
    return _launch(_backward_kernel, "backward", grad_out, out, row_ids, seed, place, p, dtype, HAS_OUT=has_out)
