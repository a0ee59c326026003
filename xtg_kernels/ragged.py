"""RaggedBatch: the expressed genes of several cells, one after the other, never padded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RaggedBatch:
    """Expressed genes of a batch of cells in ragged (CSR-like) form.

    Cell ``c`` owns the tokens ``cu_seqlens[c]:cu_seqlens[c + 1]``; tokens past ``cu_seqlens[-1]`` are slack that every
    op ignores.

    Attributes:
        values: (total_nnz,) float32 (float64 for reference runs), the normalised expression of each token.
        gene_ids: (total_nnz,) int32 (or int64), the row of each token's gene in the vocabulary.
        cu_seqlens: (batch + 1,) int32, starts at 0, non-decreasing.
        max_seqlen: length of the longest cell, in tokens.
        distinct_index: (total_nnz,) int32 or None: for each token, the batch position of the first token of the same
            cell with the same value (-1 in slack rows); with it ``expression_embedding`` embeds each value once.
    """

    values: Tensor
    gene_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    distinct_index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.dim() != 1:
            raise ValueError(f"values: expected shape (total_nnz,), got {tuple(self.values.shape)}")
        for name in ("gene_ids", "distinct_index"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.values.shape:
                raise ValueError(
                    f"{name}: expected the shape of values {tuple(self.values.shape)}, got {tuple(tensor.shape)}"
                )
        if self.cu_seqlens.dim() != 1 or self.cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens: expected shape (batch + 1,), got {tuple(self.cu_seqlens.shape)}")

    @property
    def batch_size(self) -> int:
        """Number of cells."""
        return self.cu_seqlens.numel() - 1

    @property
    def total_nnz(self) -> int:
        """Number of tokens, slack included."""
        return self.values.numel()

    @property
    def lengths(self) -> Tensor:
        """(batch,) int32: tokens of each cell."""
        return self.cu_seqlens.diff()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> RaggedBatch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            values=self.values.to(device, non_blocking=non_blocking),
            gene_ids=self.gene_ids.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            distinct_index=None
            if self.distinct_index is None
            else self.distinct_index.to(device, non_blocking=non_blocking),
        )
