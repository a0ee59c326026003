"""Packed: the cells of a batch end to end, as embedding code of other models can take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Cells of a batch end to end, for embedding code of your own and ``ragged_encoder``.

        batch = Packed.collate(cells, max_length=1200)          # or DataLoader(cells, collate_fn=Packed.collate)
        x = embed(batch.gene_ids) + embed_values(batch.values)  # (total_nnz, dim)
        y = encoder(x, batch.cu_seqlens, batch.max_seqlen)
        first = y[batch.cu_seqlens[:-1]]                        # the first token of each cell, where none is empty

    values      (total_nnz,) what each token has beside its gene: counts, bins, or ranks
    gene_ids    (total_nnz,) int64
    cu_seqlens  (cells + 1,) int32; cell c owns tokens cu_seqlens[c]:cu_seqlens[c + 1]
    max_seqlen  length of the longest cell
    """

    values: Tensor
    gene_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def collate(cls, cells: Iterable[tuple[Any, Any]], max_length: int | None = None) -> Packed:
        """Pack pairs (values, gene_ids) of arrays, tensors or lists, one pair a cell; each is cut after max_length.

        Values keep their dtype, which has to be one in all cells; gene_ids become int64. Raises ValueError for values
        and gene_ids of one cell that differ in length or are no vectors, and where there is no cell.
        """
        values, gene_ids = [], []
        for i, cell in enumerate(cells):
            pair = [torch.as_tensor(part) for part in cell]
            if len(pair) != 2 or any(part.dim() != 1 for part in pair) or len(pair[0]) != len(pair[1]):
                shapes = ", ".join(str(tuple(part.shape)) for part in pair)
                raise ValueError(f"cells: expected values and gene_ids, two vectors of one length, got {shapes} at {i}")
            values.append(pair[0][:max_length])
            gene_ids.append(pair[1][:max_length].long())
        if not values:
            raise ValueError("cells: expected at least one cell, got none")
        lengths = [len(cell) for cell in values]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        return cls(torch.cat(values), torch.cat(gene_ids), cu_seqlens, max(lengths))

    def positions(self) -> Tensor:
        """(total_nnz,) int64: the place of each token in its cell, from 0, for embeddings of positions."""
        starts = self.cu_seqlens[:-1].long().repeat_interleave(self.cu_seqlens.diff())
        return torch.arange(len(self.values), device=starts.device) - starts

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Packed:
        """The same batch on another device."""
        values, gene_ids, cu_seqlens = (x.to(device, non_blocking=non_blocking) for x in self[:3])
        return Packed(values, gene_ids, cu_seqlens, self.max_seqlen)
