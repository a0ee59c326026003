"""Cells of a packed batch in plain PyTorch: attention cell by cell, and padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention_split(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """(total_nnz, num_heads, head_dim): SDPA on each cell by itself."""
    parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts]
    )


def padded(x: Tensor, lengths: Sequence[int], width: int) -> Tensor:
    """(total_nnz, ...) -> (cells, width, ...), zero in unused slots."""
    rows = nn.utils.rnn.pad_sequence(x.split(list(lengths)), batch_first=True)
    return F.pad(rows, [0, 0] * (x.dim() - 1) + [0, width - rows.shape[1]])


def used_slots(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """(cells, width) bool: the first slots of each row, as many as the cell has tokens."""
    return torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
