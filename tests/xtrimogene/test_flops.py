"""Tests of xtrimogene.flops: the closed forms equal what FlopCounterMode counts, to the last unit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import CPU_BACKENDS
from xtg_kernels import RaggedBatch, distinct_index, use_backend
from xtrimogene import linear
from xtrimogene.config import XTrimoGeneConfig
from xtrimogene.embedding import ExpressionEmbedding
from xtrimogene.encoder import RaggedTransformerEncoder
from xtrimogene.flops import (
    DecoderFlopCount,
    FlopCount,
    decoder_backward_flops,
    decoder_flops,
    dense_autoencoder_flops,
    dense_flops,
    encoder_backward_flops,
    encoder_flops,
    padded_flops,
    performer_flops,
)
from xtrimogene.masking import MaskingConfig, mask_cells
from xtrimogene.model import XTrimoGene
from xtrimogene.vocabulary import Vocabulary

LENGTHS = [7, 0, 1, 64, 33]
CONFIG = XTrimoGeneConfig.preset(
    "3m", num_genes=80, dim=24, num_heads=3, num_layers=2, num_bins=10, ffn_mult=3, dropout=0.0
)


def _model_and_batch(with_distinct: bool) -> tuple[ExpressionEmbedding, RaggedTransformerEncoder, RaggedBatch]:
    torch.manual_seed(0)
    embedding = ExpressionEmbedding(CONFIG.num_genes, CONFIG.dim, num_bins=CONFIG.num_bins)
    encoder = RaggedTransformerEncoder(
        CONFIG.dim, CONFIG.num_heads, CONFIG.num_layers, ffn_dim=CONFIG.ffn_dim, dropout=CONFIG.dropout
    )
    values = torch.randint(1, 6, (sum(LENGTHS),)).float().log1p()
    cu_seqlens = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    distinct = distinct_index(values, cu_seqlens)
    batch = RaggedBatch(
        values,
        torch.arange(sum(LENGTHS), dtype=torch.int32) % CONFIG.num_genes,
        cu_seqlens,
        max(LENGTHS),
        distinct if with_distinct else None,
    )
    return embedding, encoder, batch


def _distinct_counts(batch: RaggedBatch) -> list[int]:
    return [len(cell.unique()) for cell in batch.values.split(LENGTHS)]


def _counted(counter: FlopCounterMode, suffix: str = "") -> FlopCount:
    parts = {"expression_embedding": 0, "ragged_attention": 0, "linear": 0}
    for op, flops in counter.get_flop_counts()["Global"].items():
        name = str(op).removesuffix(".default").removesuffix(".reference")
        ours = (f"xtg.expression_embedding{suffix}", f"xtg.ragged_attention{suffix}")
        assert name in ("aten.addmm", "aten.mm", "mkldnn._linear_pointwise", *ours)
        part = "linear" if name not in ours else name.removeprefix("xtg.").removesuffix(suffix or "\0")
        parts[part] += flops
    return FlopCount(parts["expression_embedding"], parts["linear"], parts["ragged_attention"])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("with_distinct", [True, False])
def test_forward_and_backward_equal_the_counter(backend: str, with_distinct: bool) -> None:
    embedding, encoder, batch = _model_and_batch(with_distinct)
    distinct = _distinct_counts(batch)
    with use_backend(backend):
        with FlopCounterMode(display=False) as forward:
            encoded = encoder(embedding(batch), batch.cu_seqlens, batch.max_seqlen)
        with FlopCounterMode(display=False) as backward:
            encoded.sum().backward()
    expected = encoder_flops(CONFIG, LENGTHS, distinct)
    assert _counted(forward) == expected
    assert forward.get_total_flops() == expected.total
    expected_backward = encoder_backward_flops(CONFIG, LENGTHS, distinct)
    assert _counted(backward, "_backward") == expected_backward
    assert backward.get_total_flops() == expected_backward.total


def test_inference_equals_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_LARGE_BYTES", 0)  # by blocks of rows, as large batches go
    linear._onednn_works.cache_clear()  # the example that oneDNN is asked first is nobody's FLOPs
    embedding, encoder, batch = _model_and_batch(True)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        encoder(embedding(batch), batch.cu_seqlens, batch.max_seqlen)
    expected = encoder_flops(CONFIG, LENGTHS, _distinct_counts(batch))
    assert _counted(counter) == expected
    assert counter.get_total_flops() == expected.total


def test_the_formulas_written_out() -> None:
    tokens, squares = 105, 7**2 + 1 + 64**2 + 33**2
    assert encoder_flops(CONFIG, LENGTHS) == FlopCount(
        embedding=2 * (10 + 100 + 240) * tokens, linear=2 * 20 * 24**2 * tokens, attention=2 * 4 * 24 * squares
    )
    config = XTrimoGeneConfig.preset("100m", num_genes=19264)
    dense = dense_flops(config, 1)
    assert dense.total == 12 * (24 * 19264 * 768**2 + 4 * 19264**2 * 768)
    assert dense.total == pytest.approx(17.0e12, rel=0.01)  # the figure for a 100M encoder over 19,264 genes


def test_padded_counts_every_position_of_each_batch() -> None:
    assert padded_flops(CONFIG, LENGTHS, batch_size=2) == encoder_flops(CONFIG, [7, 7, 64, 64, 33])
    assert padded_flops(CONFIG, LENGTHS, batch_size=5) == encoder_flops(CONFIG, [64] * 5)
    assert padded_flops(CONFIG, [], batch_size=5).total == 0


def _dense_encoder(x: Tensor, config: XTrimoGeneConfig) -> Tensor:
    """Matrix products of a dense post-norm encoder: spelled out, since SDPA on CPU is counted as 0 FLOPs."""
    dim, heads = config.dim, config.num_heads
    for _ in range(config.num_layers):
        qkv = torch.mm(x, torch.randn(dim, 3 * dim)).view(len(x), 3, heads, dim // heads)
        q, k, v = qkv.permute(1, 2, 0, 3)
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).transpose(0, 1).reshape(len(x), dim)
        x = x + torch.mm(mixed, torch.randn(dim, dim))
        hidden = torch.mm(x, torch.randn(dim, config.ffn_dim)).relu()
        x = x + torch.mm(hidden, torch.randn(config.ffn_dim, dim))
    return x


def test_dense_equals_the_counter_on_explicit_products() -> None:
    with FlopCounterMode(display=False) as counter:
        _dense_encoder(torch.randn(CONFIG.num_genes, CONFIG.dim), CONFIG)
    assert counter.get_total_flops() == dense_flops(CONFIG, 1).total
    assert dense_flops(CONFIG, 7).total == 7 * dense_flops(CONFIG, 1).total
    # A cell that expresses every gene costs the dense encoder, and nothing less.
    assert encoder_flops(CONFIG, [CONFIG.num_genes]).attention == dense_flops(CONFIG, 1).attention
    assert encoder_flops(CONFIG, [CONFIG.num_genes]).linear == dense_flops(CONFIG, 1).linear


SMALL = XTrimoGeneConfig.preset(
    "3m",
    num_genes=40,
    dim=24,
    num_heads=3,
    num_layers=2,
    num_bins=10,
    ffn_mult=3,
    dropout=0.0,
    decoder_dim=16,
    decoder_heads=2,
    decoder_layers=3,
    favor_features=7,
)
PARTS = {"xtg.favor_attention": "favor", "xtg.masked_head": "head", "xtg.masked_mse": "head"}


def _decoder_parts(counter: FlopCounterMode, encoder: FlopCount) -> tuple[int, int, int, int]:
    """Embedding, linear, FAVOR+ and head of what was counted, the encoder's share taken off."""
    found = {"embedding": -encoder.embedding, "linear": -encoder.linear, "favor": 0, "head": 0}
    for op, flops in counter.get_flop_counts()["Global"].items():
        name = str(op).removesuffix(".default").removesuffix(".reference").removesuffix("_backward")
        if name == "xtg.ragged_attention":
            continue
        part = "embedding" if name == "xtg.expression_embedding" else PARTS.get(name, "linear")
        found[part] += flops
    return found["embedding"], found["linear"], found["favor"], found["head"]


def _by_part(count: DecoderFlopCount) -> tuple[int, int, int, int]:
    return count.embedding, count.bridge + count.projections + count.ffn, count.favor, count.head


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("cells", [1, 4])
def test_decoder_forward_and_backward_equal_the_counter(backend: str, layers: int, cells: int) -> None:
    config = dataclasses.replace(SMALL, decoder_layers=layers, depth_tokens=cells == 4)
    model = XTrimoGene(config, Vocabulary(f"g{i}" for i in range(40)))
    # One cell without expressed genes, whose chosen zero genes are then kept.
    lengths = [15, 0, 30, 7][:cells]
    values = torch.randint(1, 6, (sum(lengths),)).float().log1p()
    ids = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    batch = RaggedBatch(values, ids, cu_seqlens, max(lengths))
    depth = torch.ones(cells, 2) if config.depth_tokens else None
    choice = MaskingConfig(zero_rate=0.2)
    masked = mask_cells(batch, np.arange(cells), choice, epoch=0, num_genes=40, depth=depth)
    tokens, hidden, chosen = (
        offsets.diff().tolist()
        for offsets in (masked.batch.cu_seqlens, masked.masked_cu_seqlens, masked.chosen_cu_seqlens)
    )
    distinct = [len(cell.unique()) for cell in masked.batch.values.split(tokens)]
    with use_backend(backend):
        with FlopCounterMode(display=False) as forward:
            loss = model.loss(masked)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        with FlopCounterMode(display=False) as everything:
            model.decoder.predictions(model.decode(masked.batch))
    encoder = encoder_flops(config, tokens, distinct)
    assert _decoder_parts(forward, encoder) == _by_part(decoder_flops(config, tokens, hidden, chosen))
    assert forward.get_total_flops() == encoder.total + decoder_flops(config, tokens, hidden, chosen).total
    expected = decoder_backward_flops(config, tokens, hidden, chosen)
    encoder_backward = encoder_backward_flops(config, tokens, distinct)
    assert _decoder_parts(backward, encoder_backward) == _by_part(expected)
    assert everything.get_total_flops() == encoder.total + decoder_flops(config, tokens).total


def test_decoder_without_savings_equals_the_counter_on_explicit_products() -> None:
    """One cell, all of it spelled out: embedding, bridge, layers and head at every position."""
    dim, width, positions = SMALL.decoder_dim, SMALL.dim, SMALL.num_genes
    x = torch.randn(positions, width)
    features, heads = SMALL.num_features, SMALL.decoder_heads
    with FlopCounterMode(display=False) as counter:
        hidden = torch.mm(torch.mm(torch.randn(positions, 1), torch.randn(1, 10)), torch.randn(10, 10))
        x = torch.mm(x + torch.mm(hidden, torch.randn(10, width)), torch.randn(width, dim))
        for _ in range(SMALL.decoder_layers):
            q, k, v = (torch.mm(x, torch.randn(dim, dim)).view(positions, heads, -1).transpose(0, 1) for _ in "qkv")
            q, k = (torch.bmm(a, torch.randn(heads, dim // heads, features)) for a in (q, k))
            mixed = torch.bmm(q, torch.bmm(k.transpose(1, 2), v)).transpose(0, 1).reshape(positions, dim)
            x = x + torch.mm(mixed, torch.randn(dim, dim))
            x = x + torch.mm(torch.mm(x, torch.randn(dim, 3 * dim)), torch.randn(3 * dim, dim))
        torch.mm(x, torch.randn(dim, 1))
    assert counter.get_total_flops() == decoder_flops(SMALL, [5], savings=False).total
    assert decoder_flops(SMALL, [5, 9], [1, 0], [3, 3], savings=False).total == 2 * counter.get_total_flops()


def test_shares_of_the_dense_encoder_are_those_of_the_literature() -> None:
    """Shares computed once by hand from the published shapes: Performer, and encoder with the whole decoder."""
    for preset, performer, by_length in (("3m", 6.5, {500: 3.5, 4000: 8.3}), ("100m", 21.5, {1000: 6.3, 4000: 12.6})):
        config = XTrimoGeneConfig.preset(preset, num_genes=19264)
        dense = dense_flops(config, 1).total
        assert 100 * performer_flops(config, 1).total / dense == pytest.approx(performer, abs=0.05)
        for length, share in by_length.items():
            # Value embedding and head are left out there.
            decoder = decoder_flops(config, [length], savings=False)
            total = encoder_flops(config, [length], [0]).total + decoder.total - decoder.embedding - decoder.head
            assert 100 * total / dense == pytest.approx(share, abs=0.05)


def test_dense_autoencoder_written_out() -> None:
    config = XTrimoGeneConfig.preset("100m", num_genes=19264)
    decoder = 19264 * (2 * 768 * 512 + 6 * 24 * 512**2 + 2 * 512) + 6 * 4 * 512 * 19264**2
    assert dense_autoencoder_flops(config, 3).total == 3 * (dense_flops(config, 1).total + decoder)


def test_bad_decoder_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="asked: expected one count for each of 2 cells, got 1"):
        decoder_flops(SMALL, [3, 4], None, [1])
    with pytest.raises(ValueError, match="masked: expected at most the 40 positions of a cell, got 41"):
        decoder_flops(SMALL, [3, 4], [41, 0])


def test_large_counts_do_not_overflow() -> None:
    config = XTrimoGeneConfig.preset("100m", num_genes=19264)
    cells = np.full(100_000, 60_000, dtype=np.int32)
    assert encoder_flops(config, cells).attention == 100_000 * 12 * 4 * 768 * 60_000**2


@pytest.mark.parametrize(
    ("lengths", "distinct", "message"),
    [
        ([3, -1], None, "lengths: expected a list of integers >= 0"),
        ([3.5], None, "lengths: expected a list of integers >= 0"),
        ([[3]], None, "lengths: expected a list of integers >= 0"),
        ([3, 4], [3], "distinct: expected one count for each of 2 cells, got 1"),
        ([3, 4], [3, 5], r"distinct: expected at most the length of each cell, got 5 of 4 \(cell 1\)"),
    ],
)
def test_bad_counts_are_refused(lengths: list[int], distinct: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder_flops(CONFIG, lengths, distinct)


def test_bad_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        padded_flops(CONFIG, LENGTHS, batch_size=0)
