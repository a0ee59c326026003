"""Closed-form FLOPs of encoder and decoder on real cell lengths, and of padded, dense and plain ones of that shape.

FLOPs are those of matrix products, two for a multiply-add, as torch.utils.flop_counter.FlopCounterMode counts them; the
tests hold both counts equal to the last unit. d is the width, b the number of bins, f = ffn_mult, L a cell's length.

    part        forward                              backward
    embedding   2 (b + b b + b d) a distinct value   2 (2 b + 3 b b + 2 b d) a distinct value
    linear      (8 + 4 f) d d     a token, layer     twice the forward
    attention   4 d L L           a cell, layer      10 d L L (the scores are computed again)

With f = 4 the linear layers cost 24 d d. The backward is that of training: gradients to all weights, none to values.

In the decoder D is the width and m the number of random features. Its rows are the positions of all cells; n of them
are encoded, k masked and a asked for (the rows whose loss, or output, is wanted). What each row of a layer costs:

    part        forward    backward                  rows
    bridge      2 d D      twice the forward         positions of one cell + n + 2; plain: all
    qkv         6 D D      twice the forward         first layer: positions of one cell + n + k, if cells are several
    q           2 D D      twice the forward         last layer: a
    k, v        4 D D      twice the forward         all
    out, ffn    (2 + 4 f) D D  twice the forward     last layer: a
    favor       4 D m      8 D m                     queries and keys, each; last layer: a queries
    head        2 D        6 D (squared error; plain: 4 D)  a

With a product head of width w, its term costs 4 d w + 2 d positions a cell and twice that in the backward, and the head
4 D a row there, as in the plain network: the predictions are kept, to be added up.

The plain network has all rows everywhere, and embeds the value of every position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xtrimogene.network.config import DEPTH_NUMBERS, PRODUCT_HIDDEN_MULT, XTrimoGeneConfig, num_favor_features

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
    """FLOPs by part: value embedding of zeros, bridge, linear layers, FAVOR+ products, head, product head."""

    embedding: int
    bridge: int
    linear: int
    favor: int
    head: int
    product: int = 0

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.embedding + self.bridge + self.linear + self.favor + self.head + self.product


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

    As dense_flops with linear attention of m = num_favor_features(head_dim) random features: 8 d m a gene and layer.
    """
    dense = dense_flops(config, num_cells)
    favor = config.num_layers * 8 * config.dim * num_favor_features(config.head_dim) * config.num_genes * num_cells
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
    lengths: Counts,
    *,
    masked: Counts | None = None,
    asked: Counts | None = None,
    savings: bool = True,
) -> DecoderFlopCount:
    """Forward FLOPs of our decoder on one batch of cells, to the predictions at the asked genes.

    lengths  tokens of each cell that the encoder saw, depth tokens included
    masked   masked genes of each cell; None for none
    asked    genes of each cell whose prediction is wanted; None for all positions
    savings  False for the plain network, which computes every row of every cell

    Raises ValueError for a negative or fractional count, or lists of another length than `lengths`.
    """
    rows = _decoder_rows(config, lengths, masked, asked, savings)
    bins, dim, width = config.num_bins, config.dim, config.decoder_dim
    return DecoderFlopCount(
        embedding=2 * (bins + bins * bins + bins * dim) * rows.values,
        bridge=2 * dim * width * rows.bridge,
        linear=width * width * rows.linear(config),
        favor=4 * width * config.num_features * rows.favor,
        head=2 * width * rows.head,
        product=_product(config, len(lengths)),
    )


def decoder_backward_flops(
    config: XTrimoGeneConfig,
    lengths: Counts,
    *,
    masked: Counts | None = None,
    asked: Counts | None = None,
    savings: bool = True,
) -> DecoderFlopCount:
    """Backward FLOPs of our decoder from the squared error at the asked genes; arguments and errors as above."""
    rows = _decoder_rows(config, lengths, masked, asked, savings)
    bins, dim, width = config.num_bins, config.dim, config.decoder_dim
    return DecoderFlopCount(
        embedding=2 * (2 * bins + 3 * bins * bins + 2 * bins * dim) * rows.values,
        bridge=2 * 2 * dim * width * rows.bridge,
        linear=2 * width * width * rows.linear(config),
        favor=8 * width * config.num_features * rows.favor,
        # The plain network keeps its predictions, ours computes them again, but for those that a product is added to.
        head=(6 if savings and config.product_head is None else 4) * width * rows.head,
        product=2 * _product(config, len(lengths)),
    )


def step_flops(
    config: XTrimoGeneConfig,
    lengths: Counts,
    *,
    distinct: Counts | None = None,
    masked: Counts | None = None,
    asked: Counts | None = None,
    savings: bool = True,
    backward: bool = True,
) -> int:
    """FLOPs of encoder and decoder on one batch: forward and backward of a training step, or the forward alone.

    distinct is that of encoder_flops; the other arguments and errors are those of decoder_flops. Without savings every
    token is embedded, whatever distinct says.
    """
    values = distinct if savings else None
    total = encoder_flops(config, lengths, values).total
    total += decoder_flops(config, lengths, masked=masked, asked=asked, savings=savings).total
    if backward:
        total += encoder_backward_flops(config, lengths, values).total
        total += decoder_backward_flops(config, lengths, masked=masked, asked=asked, savings=savings).total
    return total


def executed_share(
    config: XTrimoGeneConfig,
    lengths: Counts,
    *,
    distinct: Counts | None = None,
    masked: Counts | None = None,
    asked: Counts | None = None,
    backward: bool = True,
) -> float:
    """FLOPs of encoder and decoder on one batch, as a share of those of the plain network, which saves nothing.

    Arguments and errors are those of step_flops.
    """
    ours, plain = (
        step_flops(config, lengths, distinct=distinct, masked=masked, asked=asked, savings=savings, backward=backward)
        for savings in (True, False)
    )
    return ours / plain


@dataclass(frozen=True)
class _DecoderRows:
    """Rows that each part of the decoder computes: of each layer, those of its q, its k and v, and its out and ffn."""

    values: int
    bridge: int
    layers: list[tuple[int, int, int]]
    favor: int
    head: int

    def linear(self, config: XTrimoGeneConfig) -> int:
        """Linear-layer FLOPs in units of decoder_dim squared."""
        return sum(2 * q + 4 * kv + (2 + 4 * config.ffn_mult) * rest for q, kv, rest in self.layers)


def _decoder_rows(
    config: XTrimoGeneConfig, lengths: Counts, masked: Counts | None, asked: Counts | None, savings: bool
) -> _DecoderRows:
    encoded = _checked("lengths", lengths)
    cells, positions, depth = len(encoded), config.num_positions, config.decoder_layers
    hidden = np.zeros(cells, np.int64) if masked is None else _checked("masked", masked)
    wanted = np.full(cells, positions) if asked is None else _checked("asked", asked)
    for name, counts in (("masked", hidden), ("asked", wanted)):
        if len(counts) != cells:
            raise ValueError(f"{name}: expected one count for each of {cells} cells, got {len(counts)}")
    everything, tokens = cells * positions, int(encoded.sum())
    if not savings:
        return _DecoderRows(
            values=everything - tokens - int(hidden.sum()),
            bridge=everything,
            layers=[(everything,) * 3] * depth,
            favor=2 * everything * depth,
            head=everything,
        )
    first = positions + tokens + int(hidden.sum()) if cells > 1 else everything
    chosen = int(wanted.sum())
    layers = []
    for layer in range(depth):
        rows = first if layer == 0 else everything
        last = layer + 1 == depth and asked is not None
        layers.append((chosen, rows, chosen) if last else (rows, rows, everything))
    # A cell without a query needs no features of its keys either.
    last_keys = positions * int(np.count_nonzero(wanted))
    return _DecoderRows(
        values=1,
        bridge=positions + tokens + 2,
        layers=layers,
        favor=2 * everything * (depth - 1) + chosen + last_keys,
        head=chosen,
    )


def _product(config: XTrimoGeneConfig, cells: int) -> int:
    """Forward FLOPs of the product head: the maps of every cell, and its product with every position's row. The sum of
    the tokens' rows is none of the products of matrices that are counted here."""
    if config.product_head is None:
        return 0
    width, features = config.product_head, DEPTH_NUMBERS + 2 * config.dim
    maps = features * width + PRODUCT_HIDDEN_MULT * width * (features + width) + width * config.dim
    return cells * 2 * (maps + config.dim * config.num_positions)


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
