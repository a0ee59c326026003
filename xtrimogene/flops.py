"""Closed-form FLOPs of the encoder on real cell lengths, and of padded and dense Transformers of the same shape.

FLOPs are those of matrix products, two for a multiply-add, as torch.utils.flop_counter.FlopCounterMode counts them; the
tests hold both counts equal to the last unit. d is the width, b the number of bins, f = ffn_mult, L a cell's length.

    part        forward                              backward
    embedding   2 (b + b b + b d) a distinct value   2 (2 b + 3 b b + 2 b d) a distinct value
    linear      (8 + 4 f) d d     a token, layer     twice the forward
    attention   4 d L L           a cell, layer      10 d L L (the scores are computed again)

With f = 4 the linear layers cost 24 d d. The backward is that of training: gradients to all weights, none to values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xtrimogene.config import XTrimoGeneConfig

Counts = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class FlopCount:
    """FLOPs by part: value embedding, linear layers (qkv, output projection, feed-forward), attention products."""

    embedding: int
    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.embedding + self.linear + self.attention


def encoder_flops(config: XTrimoGeneConfig, lengths: Counts, distinct: Counts | None = None) -> FlopCount:
    """Forward FLOPs of our encoder on cells of these lengths.

    lengths   expressed genes of each cell
    distinct  distinct values of each cell, each embedded once; None counts one for every token

    Raises ValueError for a negative or fractional count, or a distinct count above the cell's length.
    """
    tokens, squares, values = _sums(lengths, distinct)
    bins, dim = config.num_bins, config.dim
    return FlopCount(
        embedding=2 * (bins + bins * bins + bins * dim) * values,
        linear=config.num_layers * _linear(config) * tokens,
        attention=config.num_layers * 4 * dim * squares,
    )


def encoder_backward_flops(config: XTrimoGeneConfig, lengths: Counts, distinct: Counts | None = None) -> FlopCount:
    """Backward FLOPs of our encoder in training; arguments and errors as encoder_flops."""
    tokens, squares, values = _sums(lengths, distinct)
    bins, dim = config.num_bins, config.dim
    return FlopCount(
        embedding=2 * (2 * bins + 3 * bins * bins + 2 * bins * dim) * values,
        linear=config.num_layers * 2 * _linear(config) * tokens,
        attention=config.num_layers * 10 * dim * squares,
    )


def padded_flops(config: XTrimoGeneConfig, lengths: Counts, batch_size: int) -> FlopCount:
    """Forward FLOPs of the same encoder with every batch padded to its longest cell.

    Batches are batch_size cells in the given order; every position, padding too, is embedded and attended.
    Raises ValueError as encoder_flops, and for a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    cells = _checked("lengths", lengths)
    padded = [
        int(cells[start : start + batch_size].max())
        for start in range(0, len(cells), batch_size)
        for _ in cells[start : start + batch_size]
    ]
    return encoder_flops(config, padded)


def dense_flops(config: XTrimoGeneConfig, num_cells: int) -> FlopCount:
    """Forward FLOPs of a dense Transformer encoder of this width and depth over all config.num_genes genes of a cell.

    The usual (8 + 4 f) n d d + 4 n n d per layer. Its embedding is left out (0), which favours the dense model.
    """
    genes = config.num_genes
    return FlopCount(
        embedding=0,
        linear=config.num_layers * _linear(config) * genes * num_cells,
        attention=config.num_layers * 4 * config.dim * genes * genes * num_cells,
    )


def _linear(config: XTrimoGeneConfig) -> int:
    """Linear-layer FLOPs of one token in one layer: qkv 6 d d, output projection 2 d d, feed-forward 4 f d d."""
    return (8 + 4 * config.ffn_mult) * config.dim * config.dim


def _sums(lengths: Counts, distinct: Counts | None) -> tuple[int, int, int]:
    """Tokens, sum of squared lengths, and values to embed."""
    cells = _checked("lengths", lengths)
    values = cells
    if distinct is not None:
        values = _checked("distinct", distinct)
        if len(values) != len(cells):
            raise ValueError(f"distinct: expected one count for each of {len(cells)} cells, got {len(values)}")
        if (values > cells).any():
            worst = int(np.argmax(values > cells))
            raise ValueError(
                f"distinct: expected at most the length of each cell, got {values[worst]} of {cells[worst]} "
                f"(cell {worst})"
            )
    return int(cells.sum()), int((cells * cells).sum()), int(values.sum())


def _checked(name: str, counts: Counts) -> npt.NDArray[np.int64]:
    array = np.asarray(counts)
    if array.ndim != 1 or (array.size and (array.dtype.kind not in "iu" or array.min() < 0)):
        raise ValueError(f"{name}: expected a list of integers >= 0, got {counts!r:.80}")
    return array.astype(np.int64)
