"""Triton backend of dropout: the mask is drawn in registers, rows are read and written once, forward and backward.

A program has some rows and 128 channels of them: 16 counters a row, whose 64 words are turned into the order of the
channels. In words and bits it is csrc/cpu/dropout.h.
"""

from __future__ import annotations

from pathlib import Path

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


@triton.jit(do_not_specialize=["num_rows", "place", "threshold", "scale"])
def _rows_kernel(
    x,
    other,
    out,
    row_ids,
    seed,
    num_rows,
    place,
    threshold,
    scale,
    HAS_RESIDUAL: tl.constexpr,
    HAS_OUT: tl.constexpr,
    RELU: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """other is the residual, or with HAS_OUT what came out of a forward with RELU."""
    block = tl.program_id(0) % tl.cdiv(DIM, _BLOCK)
    row = (tl.program_id(0) // tl.cdiv(DIM, _BLOCK)).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = block * _BLOCK + tl.arange(0, _BLOCK)
    mask = (row < num_rows)[:, None] & (channel < DIM)[None, :]
    at = row[:, None] * DIM + channel[None, :]
    rows = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_OUT:
        kept = tl.load(other + at, mask=mask, other=0.0).to(tl.float32) > 0
    else:
        row_id = tl.load(row_ids + row, mask=row < num_rows, other=0)
        kept = _bits(row_id, tl.load(seed), place, block, BLOCK_R) >= threshold
    if RELU:
        rows = tl.where(rows < 0, 0.0, rows)
    dropped = tl.where(kept, rows * scale, 0.0)
    if HAS_RESIDUAL:
        dropped += tl.load(other + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, dropped.to(out.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor,
    other: Tensor | None,
    row_ids: Tensor,
    seed: Tensor,
    place: int,
    p: float,
    dtype: torch.dtype,
    *,
    relu: bool = False,
    other_is_out: bool = False,
) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    num_rows, dim = x.shape
    threshold, scale = threshold_and_scale(p)
    config = _configs("rows", x.dtype, BLOCK, x.device)
    programs = triton.cdiv(num_rows, config["BLOCK_R"]) * triton.cdiv(dim, BLOCK)
    with torch.cuda.device_of(x):
        _rows_kernel[(programs,)](
            x.contiguous(),
            x if other is None else other.contiguous(),
            out,
            row_ids.contiguous(),
            seed,
            num_rows,
            place,
            threshold,
            scale,
            HAS_RESIDUAL=other is not None and not other_is_out,
            HAS_OUT=other_is_out,
            RELU=relu,
            DIM=dim,
            # Product and sum are rounded one after the other, as everywhere: the same bits.
            **{**config, "enable_fp_fusion": False},
        )
    return out


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
    return _launch(x, residual, row_ids, seed, place, p, x.dtype if residual is None else residual.dtype, relu=relu)


def backward(
    grad_out: Tensor, out: Tensor | None, row_ids: Tensor, seed: Tensor, place: int, p: float, dtype: torch.dtype
) -> Tensor:
    """Gradient of `forward` to x in its dtype; out is what came out after ReLU, else None."""
    return _launch(grad_out, out, row_ids, seed, place, p, dtype, other_is_out=out is not None)
