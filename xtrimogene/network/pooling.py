"""Pooling: one row per cell from the encoder's rows of its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_POOLS = ("mean", "max", "all")


def pool(encoded: Tensor, cu_seqlens: Tensor, how: str, *, depth_tokens: bool = False) -> Tensor:
    """One row per cell from the rows of its tokens.

    encoded       (total_nnz, dim), any float dtype
    cu_seqlens    (batch + 1,) int32; cell c owns rows cu_seqlens[c]:cu_seqlens[c + 1], rows past the last are ignored
    how           "mean" or "max" over all tokens of the cell, T and S among them where there are any; "all": row of S,
                  row of T, max and mean over the genes, one after the other; all as scFoundation embeds cells
    depth_tokens  whether each cell's last two rows are the tokens T and S, which are no genes
    returns       (batch, dim), for "all" (batch, 4 dim), float32 (float64 for float64 input); NaN for a cell without
                  genes

    A cell's tokens are reduced in their own order by one thread, so its row has the same bits whatever the other cells.
    Raises ValueError for another `how`, or "all" without depth tokens.
    """
    if how not in _POOLS:
        raise ValueError(f"pooling: expected one of {', '.join(_POOLS)}, got {how!r}")
    if how == "all" and not depth_tokens:
        raise ValueError("pooling: expected mean or max for a model without depth tokens, got 'all'")
    rows = encoded if encoded.dtype == torch.float64 else encoded.float()
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    gene_ends = torch.maximum(ends - 2, starts) if depth_tokens else ends
    # Segments in turn: what is reduced of a cell, then its other tokens.
    reduced_ends = gene_ends if how == "all" else ends
    offsets = torch.cat([torch.stack([starts, reduced_ends], dim=1).flatten(), cu_seqlens[-1:]])
    parts = []
    if how == "all":
        rows = F.pad(rows, (0, 0, 0, 2))  # that a cell without tokens, too, has two rows to read
        parts = [rows[(ends - 1).long()], rows[(ends - 2).long()]]
    for reduction in ("max", "mean") if how == "all" else (how,):
        parts.append(torch.segment_reduce(rows, reduction, offsets=offsets, axis=0)[::2])
    # The maximum of nothing comes back as -inf, and without a gene T and S say nothing but that.
    return torch.cat(parts, dim=1).masked_fill((gene_ends == starts).unsqueeze(1), torch.nan)
