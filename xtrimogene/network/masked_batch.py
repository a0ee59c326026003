"""MaskedBatch: what the network takes in a pre-training step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtg_kernels import RaggedBatch


@dataclass(frozen=True)
class MaskedBatch:
    """Cells of a pre-training step: what the encoder sees, and where and against what the loss is taken.

    batch              RaggedBatch of the encoder's tokens: genes that are not hidden, with their values or random ones
                       (a chosen zero gene with a random value is a token as well); with depth tokens, each cell ends
                       with T (gene id G) and S (gene id G + 1)
    masked_ids         (total_masked,) int32, the hidden genes of each cell, ascending
    masked_cu_seqlens  (batch + 1,) int32
    chosen_ids         (total_chosen,) int32, all chosen genes of each cell, ascending: the positions of the loss
    chosen_cu_seqlens  (batch + 1,) int32
    chosen_values      (total_chosen,) float32, the true log-normalised values there, 0 for genes the cell lacks
    cells              (batch,) int64, the number of each cell in the data
    """

    batch: RaggedBatch
    masked_ids: Tensor
    masked_cu_seqlens: Tensor
    chosen_ids: Tensor
    chosen_cu_seqlens: Tensor
    chosen_values: Tensor
    cells: Tensor

    @property
    def batch_size(self) -> int:
        """Number of cells."""
        return self.batch.batch_size

    @property
    def total_chosen(self) -> int:
        """Number of positions in the loss."""
        return self.chosen_ids.numel()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MaskedBatch:
        """The same batch with its tensors on ``device``."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
            for field in dataclasses.fields(self)
        }
        return replace(self, **moved)
