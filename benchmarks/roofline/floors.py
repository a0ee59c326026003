"""Floors: what each op has to do, whoever does it, and the least time of a card for it at its published peaks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.static.cards import Card
from benchmarks.static.launches import OPS
from xtrimogene.bench.costs import masked_counts
from xtrimogene.bench.tasks import NUM_GENES, Lengths, umi_counts
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.flops import decoder_backward_flops, decoder_flops, encoder_backward_flops, encoder_flops

DIRECTIONS = ("forward", "backward")
HALF, SINGLE, INDEX = 2, 4, 4  # bytes of bfloat16, float32 and int32
# What `needs` counts, a line for each op and direction: FLOPs, exponentials, bytes.
FORMULAS = {
    ("ragged_attention", "forward"): ("4 d S", "h S", "8 N d (q, k, v, out) + 4 h N (softmax_lse)"),
    ("ragged_attention", "backward"): (
        "10 d S", "h S", "16 N d (grad_out, q, k, v, out; grad_q, grad_k, grad_v) + 4 h N (softmax_lse)"
    ),
    ("expression_embedding", "forward"): (
        "2 (b + b b + b d) U", "b U", "2 N d (out) + 2 R d (gene rows) + 12 N (values, ids, index) + W"
    ),
    ("expression_embedding", "backward"): (
        "2 (2 b + 3 b b + 2 b d) U", "b U",
        "2 N d (grad_out) + 2 (G + 1) d (grad_gene_table) + 12 N (values, ids, index) + 2 W",
    ),
    ("favor_attention", "forward"): (
        "8 D m P", "2 H m P", "8 P D (q, k, v, out) + 4 m w (projection) + F"
    ),
    ("favor_attention", "backward"): (
        "16 D m P", "2 H m P", "16 P D (grad_out, q, k, v, out; grad_q, grad_k, grad_v) + 4 m w (projection) + F"
    ),
    ("masked_decoder_gather", "forward"): (
        "0", "0", "2 P D (out) + 2 G D (table) + 2 E D (encoded) + 4 D (two rows) + 4 (E + K) (ids)"
    ),
    ("masked_decoder_gather", "backward"): (
        "0", "0", "2 P D (grad_out) + 2 G D (grad_table) + 2 E D (grad_encoded) + 4 D (two rows) + 4 (E + K) (ids)"
    ),
    ("masked_head", "forward"): ("2 D A", "0", "2 A D (x) + 4 A (target) + 20 D (parameters)"),
    ("masked_head", "backward"): ("6 D A", "0", "4 A D (x, grad_x) + 4 A (target) + 40 D (parameters, gradients)"),
    ("dropout", "forward"): ("0", "0", "6 N d (x, residual, out) + 8 N (ids)"),
    ("dropout", "backward"): ("0", "0", "4 N d (grad_out, grad_x) + 8 N (ids)"),
}  # fmt: skip


@dataclass(frozen=True)
class Need:
    """What has to be done whoever does it: FLOPs of matrix products in bfloat16, exponentials, bytes of memory."""

    flops: int
    exp2: int
    bytes: int


@dataclass(frozen=True)
class Batch:
    """Cells of a step, and what of them the ops work on.

    lengths    genes with a count of each cell: the tokens of the encoder
    distinct   distinct values of each cell
    gene_rows  rows of the gene table that one of the cells has
    encoded, masked, chosen
               of each cell in pre-training: tokens of the encoder, masked genes, genes of the loss
    """

    lengths: Lengths
    distinct: Lengths
    gene_rows: int
    encoded: Lengths
    masked: Lengths
    chosen: Lengths


def model_config() -> XTrimoGeneConfig:
    """The 100m model with the released vocabulary: 19,264 genes, 19,266 positions in the decoder."""
    return XTrimoGeneConfig.preset("100m", num_genes=NUM_GENES, depth_tokens=True)


def batch_of(lengths: Lengths) -> Batch:
    """UMI-like cells of these lengths, masked with the published rates."""
    counts, ids = umi_counts(lengths)
    starts = np.cumsum(lengths)[:-1]
    # Within a cell, values are equal where counts are.
    distinct = tuple(len(np.unique(cell)) for cell in np.split(counts, starts))
    encoded, masked, chosen = (
        tuple(int(n) for n in of_cell) for of_cell in masked_counts(np.asarray(lengths), NUM_GENES)
    )
    return Batch(lengths, distinct, len(np.unique(ids)), encoded, masked, chosen)


def needs(config: XTrimoGeneConfig, batch: Batch) -> dict[tuple[str, str], Need]:
    """(op, direction) -> what it needs: one layer of the attentions, and the other ops once.

    FLOPs are the closed forms of xtrimogene.flops. Bytes are those of FORMULAS: operands once, results once, with the
    boundaries of the cells, which the formulas leave out for brevity.
    """
    cells, tokens, positions = len(batch.lengths), sum(batch.lengths), len(batch.lengths) * config.num_positions
    dim, width, bins, features = config.dim, config.decoder_dim, config.num_bins, config.num_features
    values, starts = sum(batch.distinct), INDEX * (cells + 1)
    embedding = {
        "forward": encoder_flops(config, batch.lengths, batch.distinct).embedding,
        "backward": encoder_backward_flops(config, batch.lengths, batch.distinct).embedding,
    }
    # Of every layer the same, since all positions are asked for; and of the chosen genes, for the head.
    favor = {
        "forward": decoder_flops(config, batch.encoded, masked=batch.masked).favor,
        "backward": decoder_backward_flops(config, batch.encoded, masked=batch.masked).favor,
    }
    head = {
        "forward": decoder_flops(config, batch.encoded, asked=batch.chosen).head,
        "backward": decoder_backward_flops(config, batch.encoded, asked=batch.chosen).head,
    }
    per_token = (SINGLE + 2 * INDEX) * tokens
    weights = HALF * (3 * bins + bins * bins + bins * dim)
    decoder_rows = HALF * positions * width
    projection = SINGLE * features * config.decoder_head_dim
    kept = SINGLE * (cells * features * (width + config.decoder_heads) + cells * config.decoder_heads)
    kept += SINGLE * 2 * config.decoder_heads * positions
    gathered = HALF * (positions + config.num_positions + sum(batch.encoded) + 2) * width
    gathered += INDEX * (sum(batch.encoded) + sum(batch.masked)) + 2 * starts
    chosen, parameters = sum(batch.chosen), SINGLE * (5 * width + 1)

    found = {}
    for direction in DIRECTIONS:
        back = direction == "backward"
        # The gradient of the gene table is written whole; forward reads the rows that the cells have.
        gene_rows = config.num_positions + 1 if back else batch.gene_rows
        found["ragged_attention", direction] = attention_need(config, batch.lengths, direction)
        found["expression_embedding", direction] = Need(
            embedding[direction], bins * values,
            HALF * dim * (tokens + gene_rows) + per_token + (2 if back else 1) * weights,
        )  # fmt: skip
        found["favor_attention", direction] = Need(
            favor[direction] // config.decoder_layers, 2 * config.decoder_heads * features * positions,
            (8 if back else 4) * decoder_rows + projection + kept + 2 * starts,
        )  # fmt: skip
        found["masked_decoder_gather", direction] = Need(0, 0, gathered)
        # Of a residual branch; with the seed.
        found["dropout", direction] = Need(0, 0, (2 if back else 3) * HALF * tokens * dim + 8 * tokens + 8)
        # The loss, or its gradient, is one number.
        found["masked_head", direction] = Need(
            head[direction], 0,
            (2 if back else 1) * (HALF * chosen * width + parameters) + SINGLE * chosen + SINGLE,
        )  # fmt: skip
    return {(op, direction): found[op, direction] for op in OPS for direction in DIRECTIONS}


def attention_need(config: XTrimoGeneConfig, lengths: Lengths, direction: str) -> Need:
    """One layer of the encoder's attention, as FORMULAS has it."""
    back, tokens = direction == "backward", sum(lengths)
    count = (encoder_backward_flops if back else encoder_flops)(config, lengths)
    return Need(
        count.attention // config.num_layers, config.num_heads * sum(n * n for n in lengths),
        (8 if back else 4) * HALF * tokens * config.dim + SINGLE * config.num_heads * tokens
        + INDEX * (len(lengths) + 1),
    )  # fmt: skip


def linear_need(config: XTrimoGeneConfig, tokens: int, direction: str) -> Need:
    """All linear layers of the encoder: every matrix, input and output once; backward also their gradients."""
    f, back = config.ffn_mult, direction == "backward"
    count = (encoder_backward_flops if back else encoder_flops)(config, [tokens])
    # Widths of the inputs of qkv, output projection and feed-forward, and of their outputs, in units of dim.
    inputs, outputs = 3 + f, 5 + f
    moved = config.dim * tokens * (2 * inputs + outputs if back else inputs + outputs)
    weights = (4 + 2 * f) * config.dim**2
    return Need(count.linear, 0, HALF * config.num_layers * (moved + (2 if back else 1) * weights))


def bounds(need: Need, card: Card) -> dict[str, float]:
    """Microseconds of the whole card at its peaks for each of what is needed."""
    return {
        "products": need.flops / (1e6 * card.half_tflops),
        "exp2": need.exp2 / (1e3 * card.ghz * card.processors * card.exp2_per_clock),
        "memory": need.bytes / (1e6 * card.terabytes_per_s),
    }


def floor(need: Need, card: Card) -> float:
    """Microseconds: everything at its peak, side by side."""
    return max(bounds(need, card).values())
