"""Closed-form FLOPs of encoder and decoder on real cell lengths, and of padded and dense models of the same shape.

FLOPs are those of matrix products, two for a multiply-add, as torch.utils.flop_counter.FlopCounterMode counts them; the
tests hold both counts equal to the last unit. d is the width, b the number of bins, f = ffn_mult, L a cell's length.

    part        forward                              backward
    embedding   2 (b + b b + b d) a distinct value   2 (2 b + 3 b b + 2 b d) a distinct value
    linear      (8 + 4 f) d d     a token, layer     twice the forward
    attention   4 d L L           a cell, layer      10 d L L (the scores are computed again)

With f = 4 the linear layers cost 24 d d. The backward is that of training: gradients to all weights, none to values.

The decoder, with D its width, G the positions of a cell (genes and depth tokens), m the random features; each is twice
as much in the backward, but the embedding as above and the head three times:

    part        forward
    embedding   2 (b + b b + b d)   once: the value of a zero gene
    bridge      2 d D               a gene of the vocabulary, a token, and for zero and mask
    linear      (8 + 4 f) D D       a position of a cell, layer
    favor       8 D m               a position of a cell, layer (4 D m where it is only a query, or only a key)
    head        2 D                 a position that is asked for

The linear layers of decoder_flops are fewer where the network allows (xtrimogene.decoder): the first layer projects an
unmasked zero gene once for all cells, the last one has queries, output projection and feed-forward at asked positions.
"""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class DecoderFlopCount:
    """FLOPs by part: value embedding, bridge, projections (q, k, v, output), feed-forward, FAVOR+ products, head."""

    embedding: int
    bridge: int
    projections: int
    ffn: int
    favor: int
    head: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.embedding + self.bridge + self.projections + self.ffn + self.favor + self.head


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


def performer_flops(config: XTrimoGeneConfig, num_cells: int) -> FlopCount:
    """Forward FLOPs of a Performer encoder of this width and depth over all config.num_genes genes of a cell.

    As dense_flops with linear attention of m = int(w ln w) random features (w the head width): 8 d m a gene and layer.
    """
    dense = dense_flops(config, num_cells)
    features = max(1, int(config.head_dim * math.log(config.head_dim)))
    favor = config.num_layers * 8 * config.dim * features * config.num_genes * num_cells
    return FlopCount(embedding=0, linear=dense.linear, attention=favor)


def dense_autoencoder_flops(config: XTrimoGeneConfig, num_cells: int) -> FlopCount:
    """Forward FLOPs of dense_flops and a dense Transformer decoder of the configured width and depth behind it.

    Softmax attention over all genes in both; bridge and head at every gene, counted with the linear layers.
    """
    encoder, genes, dim = dense_flops(config, num_cells), config.num_genes, config.decoder_dim
    layer = (8 + 4 * config.ffn_mult) * dim * dim
    return FlopCount(
        embedding=0,
        linear=encoder.linear + (2 * config.dim * dim + config.decoder_layers * layer + 2 * dim) * genes * num_cells,
        attention=encoder.attention + config.decoder_layers * 4 * dim * genes * genes * num_cells,
    )


def decoder_flops(
    config: XTrimoGeneConfig,
    tokens: Counts,
    masked: Counts | None = None,
    asked: Counts | None = None,
    *,
    savings: bool = True,
) -> DecoderFlopCount:
    """Forward FLOPs of our decoder on one batch, with a prediction at every asked position.

    tokens   the encoder's tokens of each cell, depth tokens included
    masked   masked genes of each cell; None for none
    asked    asked genes of each cell (in pre-training the chosen ones); None for all positions
    savings  False: the network as it is written down, which embeds a value, and computes bridge, every layer and head,
             at every position of every cell

    Raises ValueError as encoder_flops, and for lists of different lengths or more genes than positions.
    """
    return _decoder(config, tokens, masked, asked, savings, backward=False)


def decoder_backward_flops(
    config: XTrimoGeneConfig, tokens: Counts, masked: Counts | None = None, asked: Counts | None = None
) -> DecoderFlopCount:
    """Backward FLOPs of our decoder in training, from the squared error; arguments and errors as decoder_flops."""
    return _decoder(config, tokens, masked, asked, True, backward=True)


def _decoder(
    config: XTrimoGeneConfig,
    tokens: Counts,
    masked: Counts | None,
    asked: Counts | None,
    savings: bool,
    backward: bool,
) -> DecoderFlopCount:
    positions, layers, dim = config.num_positions, config.decoder_layers, config.decoder_dim
    encoded = _checked("tokens", tokens)
    cells = len(encoded)
    hidden = np.zeros_like(encoded) if masked is None else _checked("masked", masked)
    wanted = np.full_like(encoded, positions) if asked is None else _checked("asked", asked)
    for name, counts in (("tokens", encoded), ("masked", hidden), ("asked", wanted)):
        if len(counts) != cells:
            raise ValueError(f"{name}: expected one count for each of {cells} cells, got {len(counts)}")
        if cells and counts.max() > positions:
            raise ValueError(f"{name}: expected at most the {positions} positions of a cell, got {counts.max()}")
    everywhere, tokens_and_masked, out_rows = cells * positions, int(encoded.sum() + hidden.sum()), int(wanted.sum())
    # Rows of each layer: as queries, as keys and values, after the attention, and queries and keys inside it.
    q, kv, out, attended = ([number] * layers for number in (everywhere, everywhere, everywhere, 2 * everywhere))
    if savings and cells > 1:
        q[0] = kv[0] = positions + tokens_and_masked
    if savings:
        q[-1] = q[-1] if asked is None else out_rows
        out[-1], attended[-1] = out_rows, int(((positions + wanted) * (wanted > 0)).sum())
    bins, width, square = config.num_bins, config.dim, dim * dim
    embedding = bins + bins * bins + bins * width
    if backward:
        embedding = 2 * bins + 3 * bins * bins + 2 * bins * width
    times = 2 if backward else 1
    return DecoderFlopCount(
        embedding=2 * embedding * (1 if savings else everywhere),
        bridge=times * 2 * width * dim * (positions + int(encoded.sum()) + 2 if savings else everywhere),
        projections=times * 2 * square * (sum(q) + 2 * sum(kv) + sum(out)),
        ffn=times * 4 * config.ffn_mult * square * sum(out),
        favor=times * 4 * dim * config.num_features * sum(attended),
        head=(3 if backward else 1) * 2 * dim * (out_rows if savings else everywhere),
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
