"""Reference of dropout: plain PyTorch, any dtype, any device, written to be read.

The mask is a pure function of seed, place, the row's id and the channel. Philox4x32-7 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) turns a key of 64 bits and a counter of 128 into 128 bits: from seven rounds on
no test of theirs tells them from random ones. 16 of them decide about a channel. The kernels (csrc/cpu/dropout.h,
triton_kernel.py) draw the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A channel takes 16 bits: p is a multiple of 1 / STEPS.
STEPS = 1 << 16
# Channel BLOCK * b + 64 * half + LANES * word + lane takes one half of a word of counter LANES * b + lane.
BLOCK, LANES = 128, 16
_FACTORS, _STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32-7 of counters and a key, as words of 32 bits in int64 tensors that broadcast."""
    c, k = list(counter), list(key)
    for _ in range(_ROUNDS):
        # The product of two words may pass the sign bit: its bits are right all the same.
        first, second = c[0] * _FACTORS[0], c[2] * _FACTORS[1]
        c = [
            _upper(second) ^ c[1] ^ k[0],
            second & _WORD,
            _upper(first) ^ c[3] ^ k[1],
            first & _WORD,
        ]
        k = [(word + step) & _WORD for word, step in zip(k, _STEPS, strict=True)]
    return c


def _upper(x: Tensor) -> Tensor:
    return (x >> 32) & _WORD


def threshold_and_scale(p: float) -> tuple[int, float]:
    """The least 16 bits that a channel is kept with, and the factor of what is kept, 1 / (1 - p) of the rounded p."""
    steps = round(p * STEPS)
    return min(steps, STEPS - 1), 0.0 if steps == STEPS else STEPS / (STEPS - steps)


def kept(row_ids: Tensor, seed: Tensor, place: int, p: float, dim: int) -> Tensor:
    """(rows, dim) bool: the channels of each row that are kept."""
    blocks = -(-dim // BLOCK)
    groups = torch.arange(blocks * LANES, device=row_ids.device)[None]
    seed, ids = seed.to(row_ids.device), row_ids[:, None]
    counter = (groups, torch.full_like(groups, place), ids & _WORD, _upper(ids))
    words = torch.stack(torch.broadcast_tensors(*philox(counter, (seed & _WORD, _upper(seed)))))
    halves = torch.stack([words & (STEPS - 1), words >> 16])
    # (half, word, row, block, lane) -> (row, block, half, word, lane)
    bits = halves.view(2, 4, len(row_ids), blocks, LANES).permute(2, 3, 0, 1, 4).reshape(len(row_ids), blocks * BLOCK)
    return bits[:, :dim] >= threshold_and_scale(p)[0]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def forward(
    x: Tensor, residual: Tensor | None, row_ids: Tensor, seed: Tensor, place: int, p: float, relu: bool
) -> Tensor:
    """(rows, dim): x, after ReLU if asked for, dropped out, plus residual, in whose dtype it then is."""
    mask, scale = kept(row_ids, seed, place, p, x.shape[1]), threshold_and_scale(p)[1]
    rows = _wide(x).relu() if relu else _wide(x)
    rows = torch.where(mask, rows * scale, 0.0)
    return rows.to(x.dtype) if residual is None else (_wide(residual) + rows).to(residual.dtype)


def backward(
    grad_out: Tensor, out: Tensor | None, row_ids: Tensor, seed: Tensor, place: int, p: float, dtype: torch.dtype
) -> Tensor:
    """Gradient to x, in its dtype. out is what came out after ReLU, positive where the gradient passes, else None."""
    mask = kept(row_ids, seed, place, p, grad_out.shape[1]) if out is None else out > 0
    return torch.where(mask, _wide(grad_out) * threshold_and_scale(p)[1], 0.0).to(dtype)
