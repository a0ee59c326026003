"""Tests of xtrimogene.flops: the closed forms equal what FlopCounterMode counts, to the last unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import CPU_BACKENDS
from tests.xtrimogene.published import PublishedNetwork
from xtg_kernels import RaggedBatch, distinct_index, use_backend
from xtrimogene.cells.masking import MaskingConfig, mask_cells
from xtrimogene.model import XTrimoGene
from xtrimogene.network import linear
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.embedding import ExpressionEmbedding
from xtrimogene.network.encoder import RaggedTransformerEncoder
from xtrimogene.network.flops import (
    DecoderFlopCount,
    FlopCount,
    decoder_backward_flops,
    decoder_flops,
    dense_autoencoder_flops,
    dense_flops,
    encoder_backward_flops,
    encoder_flops,
    executed_share,
    padded_flops,
    performer_flops,
)
from xtrimogene.network.vocabulary import Vocabulary

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


GENES = CONFIG.num_genes
VOCABULARY = Vocabulary([f"GENE{i}" for i in range(GENES)])
DECODER_KEYS = ("decoder_dim", "decoder_heads", "decoder_layers", "depth_tokens")


def _decoder_counts(counter: FlopCounterMode) -> dict[str, int]:
    parts = dict.fromkeys(("expression_embedding", "ragged_attention", "favor_attention", "masked_mse", "linear"), 0)
    for op, flops in counter.get_flop_counts()["Global"].items():
        name = str(op).removesuffix(".default").removesuffix(".reference").removesuffix("_backward")
        name = name.removeprefix("xtg.").replace("masked_head", "masked_mse")
        assert name in ("aten.addmm", "aten.mm", "mkldnn._linear_pointwise", *parts) or flops == 0
        parts[name if name in parts else "linear"] += flops
    return parts


def _sum_of_parts(encoder: FlopCount, decoder: DecoderFlopCount) -> dict[str, int]:
    return {
        "expression_embedding": encoder.embedding + decoder.embedding,
        "ragged_attention": encoder.attention,
        "favor_attention": decoder.favor,
        "masked_mse": decoder.head,
        "linear": encoder.linear + decoder.bridge + decoder.linear + decoder.product,
    }


@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize("lengths", [[7, 0, 40, 1], [33]], ids=["several", "one"])
@pytest.mark.parametrize(("layers", "depth_tokens", "product"), [(1, False, None), (3, True, None), (1, True, 7)])
def test_training_step_equals_the_counter(
    layers: int,
    depth_tokens: bool,
    product: int | None,
    lengths: list[int],
    by_blocks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if by_blocks:
        monkeypatch.setattr(linear, "_LARGE_BYTES", 0)
        monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)
    linear.onednn_takes(torch.float32)  # the example that oneDNN is asked first is nobody's FLOPs
    keys = dict(zip(DECODER_KEYS, (20, 2, layers, depth_tokens), strict=True))
    config = XTrimoGeneConfig.from_dict({**CONFIG.to_dict(), **keys, "product_head": product})
    model = XTrimoGene(config, VOCABULARY)
    values = torch.randint(1, 6, (sum(lengths),)).float().log1p()
    genes = torch.cat([torch.randperm(GENES)[:n].sort().values for n in lengths]).int()
    batch = RaggedBatch(values, genes, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), max(lengths))
    masking = MaskingConfig(nonzero_rate=0.3, zero_rate=0.0)  # the cell without genes has nothing chosen
    depth = torch.full((len(lengths), 2), 4.0) if depth_tokens else None
    masked = mask_cells(batch, torch.arange(len(lengths)), masking, epoch=0, num_genes=GENES, depth=depth)
    with FlopCounterMode(display=False) as forward:
        loss = model.loss(masked)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    tokens = masked.batch.lengths.tolist()
    distinct = [len(cell.unique()) for cell in masked.batch.values.split(tokens)]
    counts = {"masked": masked.masked_cu_seqlens.diff().tolist(), "asked": masked.chosen_cu_seqlens.diff().tolist()}
    assert _decoder_counts(forward) == _sum_of_parts(
        encoder_flops(config, tokens, distinct), decoder_flops(config, tokens, **counts)
    )
    assert _decoder_counts(backward) == _sum_of_parts(
        encoder_backward_flops(config, tokens, distinct), decoder_backward_flops(config, tokens, **counts)
    )


def test_the_plain_decoder_equals_the_counter_on_the_plain_network() -> None:
    """Counted where its FAVOR+ is written with einsum-like products; the sum of the key features is one of them."""
    config = XTrimoGeneConfig.from_dict({**CONFIG.to_dict(), "decoder_dim": 20, "decoder_layers": 2})
    network = PublishedNetwork(config)
    genes = torch.arange(0, 33, 3)
    with FlopCounterMode(display=False) as counter:
        network.predict(torch.ones(11), genes, torch.arange(1, 33, 3))
    plain = decoder_flops(config, [11], masked=[11], savings=False)
    encoder = 2 * (10 + 100 + 240) * 11 + encoder_flops(config, [11]).linear
    # SDPA is counted as 0 on a CPU; the plain network embeds all zeros at first, and divides by one product more.
    more = 2 * (10 + 100 + 240) * 22 + 2 * 2 * GENES * config.decoder_heads * config.num_features
    assert counter.get_total_flops() == plain.total + encoder + more


def test_the_decoder_written_out() -> None:
    config = XTrimoGeneConfig.preset("3m", num_genes=1000, depth_tokens=True, decoder_layers=3)
    square, everything, own, asked = 128 * 128, 4 * 1002, 100 + 200 + 30, 20
    flops = decoder_flops(config, [100, 200, 0, 0], masked=[0, 0, 30, 0], asked=[0, 0, 20, 0])
    assert flops.bridge == 2 * square * (1002 + 300 + 2)
    first = 6 * square * (1002 + own) + 18 * square * everything
    last = 4 * square * everything + 20 * square * asked
    assert flops.linear == first + 24 * square * everything + last
    assert flops.favor == 4 * 128 * 266 * (2 * 2 * everything + 1002 + asked)
    assert flops.head == 2 * 128 * asked
    assert flops.product == 0
    with_product = XTrimoGeneConfig.from_dict({**config.to_dict(), "product_head": 64})
    maps = 259 * 64 + 512 * 259 + 64 * 512 + 64 * 128
    assert decoder_flops(with_product, [100, 200, 0, 0]).product == 4 * 2 * (maps + 128 * 1002)
    plain = decoder_flops(config, [100, 200, 0, 0], savings=False)
    assert plain.linear == 3 * 24 * square * everything
    assert plain.favor == 8 * 128 * 266 * 3 * everything
    assert decoder_flops(config, [100]).linear == 3 * 24 * square * 1002


@pytest.mark.parametrize("backward", [True, False])
def test_a_large_step_executes_at_most_nine_tenths_of_the_plain_network(backward: bool) -> None:
    """100m, 8 cells of 2,000 expressed genes, masked as published, among 19,264 genes and two depth tokens."""
    config = XTrimoGeneConfig.preset("100m", num_genes=19264, depth_tokens=True)
    chosen = round(0.3 * 2000), round(0.03 * 17264)
    masked, replaced = sum(round(0.8 * n) for n in chosen), round(0.1 * chosen[1])
    tokens = 2000 - round(0.8 * chosen[0]) + replaced + 2
    share = executed_share(
        config, [tokens] * 8, distinct=[100] * 8, masked=[masked] * 8, asked=[sum(chosen)] * 8, backward=backward
    )
    assert 0.85 < share <= 0.90


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"masked": [1]}, "masked: expected one count for each of 2 cells, got 1"),
        ({"asked": [1, -2]}, "asked: expected a list of integers >= 0"),
    ],
)
def test_bad_decoder_counts_are_refused(counts: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_flops(CONFIG, [3, 4], **counts)
