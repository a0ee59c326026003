"""FLOPs of `xtrimogene bench`: per cell and model in closed form, and by part (counted: xtrimogene.bench.counting).

FLOPs are those of matrix products, two for a multiply-add. The models that are compared, all of one preset:

    dense               Transformer encoder of the same width and depth over all genes of the vocabulary
    dense auto-encoder  the same, and a softmax Transformer decoder of the configured width and depth behind it
    performer           the dense encoder with linear attention (FAVOR+)
    padded              our encoder in batches of 64 cells, each padded to its longest, as published code runs it
    encoder             our encoder over expressed genes alone: what an embedding of a cell costs
    auto-encoder, plain our encoder and decoder in pre-training, the network as it is written down
    auto-encoder        the same with the exact savings of xtrimogene.decoder: what runs here
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xtrimogene.bench.cells import Cells, Lengths
from xtrimogene.cells.masking import MaskingConfig
from xtrimogene.network.config import PRESETS, XTrimoGeneConfig
from xtrimogene.network.flops import (
    DecoderFlopCount,
    FlopCount,
    decoder_flops,
    dense_autoencoder_flops,
    dense_flops,
    encoder_flops,
    padded_flops,
    performer_flops,
)

Row = dict[str, Any]
PADDED_BATCH = 64
SIZES = tuple(name for name in PRESETS if name != "tiny")
# Cells of a step, among which the savings of the decoder are shared.
STEP_CELLS = 8
PARTS = ("embedding", "projections", "attention", "ffn", "bridge", "favor", "decoder linear", "head")
MODELS = ("dense auto-encoder", "dense", "performer", "padded", "auto-encoder, plain", "auto-encoder", "encoder")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def masked_counts(lengths: Lengths, num_genes: int) -> tuple[Lengths, Lengths, Lengths]:
    """Tokens, masked and chosen genes of each cell in pre-training; the rules are those of xtrimogene.masking.

    lengths  expressed genes of each cell, at least one
    """
    masking = MaskingConfig()
    found = []
    for length in lengths.tolist():
        tokens, masked, chosen = length, 0, 0
        for rate, size, expressed in (
            (masking.nonzero_rate, length, True),
            (masking.zero_rate, num_genes - length, False),
        ):
            of_group = round(rate * size)
            hidden = round(masking.mask_share * of_group)
            replaced = min(round(masking.random_share * of_group), of_group - hidden)
            chosen, masked = chosen + of_group, masked + hidden
            # A zero gene that gets a random value is a token.
            tokens += -hidden if expressed else replaced
        found.append((tokens, masked, chosen))
    tokens_of, masked_of, chosen_of = np.asarray(found, dtype=np.int64).reshape(-1, 3).T
    return tokens_of, masked_of, chosen_of


def by_part(config: XTrimoGeneConfig, encoder: FlopCount, decoder: DecoderFlopCount | None = None) -> dict[str, int]:
    """Part -> FLOPs; of the encoder's linear layers, 8 d d are projections and 4 f d d the feed-forward."""
    ffn = encoder.linear * 4 * config.ffn_mult // (8 + 4 * config.ffn_mult)
    parts = dict.fromkeys(PARTS, 0) | {
        "embedding": encoder.embedding, "projections": encoder.linear - ffn, "ffn": ffn, "attention": encoder.attention,
    }  # fmt: skip
    if decoder is not None:
        parts["embedding"] += decoder.embedding
        parts |= {
            "bridge": decoder.bridge, "favor": decoder.favor, "decoder linear": decoder.linear, "head": decoder.head,
        }  # fmt: skip
    return parts


def flop_rows(presets: Sequence[str], cells: Cells) -> Iterator[Row]:
    """Forward FLOPs per cell of every model, mean over all cells, in closed form."""
    order = cells.shuffled()
    lengths, distinct = cells.lengths[order], cells.distinct[order]
    count = len(lengths)
    for preset in presets:
        config = XTrimoGeneConfig.preset(preset, num_genes=cells.num_genes)
        dense = dense_flops(config, count)
        ours = encoder_flops(config, lengths, distinct)
        found = {
            "dense auto-encoder": _dense_autoencoder(config, count),
            "dense": by_part(config, dense),
            "performer": by_part(config, performer_flops(config, count)),
            "padded": by_part(config, padded_flops(config, lengths, PADDED_BATCH)),
            "encoder": by_part(config, ours),
            "auto-encoder, plain": _pretraining(config, lengths, distinct, savings=False),
            "auto-encoder": _pretraining(config, lengths, distinct, savings=True),
        }
        for model in MODELS:
            total = sum(found[model].values())
            split = {f"gflop_{part}": flops / count / 1e9 for part, flops in found[model].items()}
            yield {
                "benchmark": "flops", "case": preset, "cells": count, "tokens": int(lengths.sum()),
                "direction": "forward", "provider": model, "correct": True, "gflop_per_cell": total / count / 1e9,
                "share_of_dense": total / dense.total, "genes": cells.num_genes, **split,
            }  # fmt: skip
        for level in QUANTILES:
            length = int(np.quantile(lengths, level, method="nearest"))
            total = encoder_flops(config, [length], [int(distinct[np.argmin(np.abs(lengths - length))])]).total
            yield {
                "benchmark": "flops of a cell", "case": preset, "cells": 1, "tokens": length, "direction": "forward",
                "provider": "encoder", "correct": True, "quantile": level, "gflop_per_cell": total / 1e9,
                "share_of_dense": total * count / dense.total,
            }  # fmt: skip


def _dense_autoencoder(config: XTrimoGeneConfig, count: int) -> dict[str, int]:
    """Encoder and softmax decoder; the attention of both is one part."""
    encoder, whole = dense_flops(config, count), dense_autoencoder_flops(config, count)
    rows = count * config.num_genes
    bridge, head = 2 * config.dim * config.decoder_dim * rows, 2 * config.decoder_dim * rows
    linear = whole.linear - encoder.linear - bridge - head
    decoder = DecoderFlopCount(embedding=0, bridge=bridge, linear=linear, favor=0, head=head)
    return by_part(config, dataclasses.replace(encoder, attention=whole.attention), decoder)


def _pretraining(config: XTrimoGeneConfig, lengths: Lengths, distinct: Lengths, *, savings: bool) -> dict[str, int]:
    """Encoder and decoder on masked cells, in steps of STEP_CELLS cells; without savings every token is embedded."""
    tokens, masked, chosen = masked_counts(lengths, config.num_genes)
    # Masking leaves at most the distinct values that were there.
    encoder = encoder_flops(config, tokens, np.minimum(distinct, tokens) if savings else None)
    total: dict[str, int] = dict.fromkeys(PARTS, 0)
    for start in range(0, len(lengths), STEP_CELLS):
        step = slice(start, start + STEP_CELLS)
        decoder = decoder_flops(config, tokens[step], masked=masked[step], asked=chosen[step], savings=savings)
        for part, flops in by_part(config, FlopCount(0, 0, 0), decoder).items():
            total[part] += flops
    return {part: flops + total[part] for part, flops in by_part(config, encoder).items()}
