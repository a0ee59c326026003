"""Models as a skilled user of plain PyTorch would write them, and the network of pre-training as it is written down.

The baseline of every ratio is the packed form: linear layers over all tokens of the batch at once, and
``q.split(lengths)`` with F.scaled_dot_product_attention cell by cell. (Slices q[a:b] in a loop are slower to train: the
backward of each allocates a gradient of the whole.) Padded and dense forms are what most published code runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xtrimogene.bench.plain import attention_split, padded, used_slots
from xtrimogene.model import XTrimoGene
from xtrimogene.network.config import XTrimoGeneConfig, num_favor_features
from xtrimogene.network.decoder import GeneRows, PerformerLayer
from xtrimogene.network.encoder import RaggedTransformerEncoder
from xtrimogene.network.flops import FlopCount, dense_autoencoder_flops, dense_flops, performer_flops
from xtrimogene.network.masked_batch import MaskedBatch


def encoder_packed(encoder: RaggedTransformerEncoder, x: Tensor, lengths: Sequence[int], parts: int = 1) -> Tensor:
    """(total_nnz, dim): the layers with our encoder's weights in plain PyTorch, packed; attention_split attends.

    With parts > 1 each linear layer is a sum of so many products over its input channels: the same numbers but for
    rounding.
    """
    layer: Any
    for layer in encoder.layers:
        attention = layer.self_attn
        qkv = _linear(x, attention.in_proj_weight, attention.in_proj_bias, parts)
        q, k, v = qkv.view(len(x), 3, attention.num_heads, -1).unbind(1)
        attended = attention_split(q, k, v, lengths).flatten(1)
        x = _norm(layer.norm1, x + _linear(attended, attention.out_proj.weight, attention.out_proj.bias, parts))
        hidden = F.relu(_linear(x, layer.linear1.weight, layer.linear1.bias, parts))
        x = _norm(layer.norm2, x + _linear(hidden, layer.linear2.weight, layer.linear2.bias, parts))
    return _norm(encoder.norm, x)


def transformer(dim: int, heads: int, ffn: int, layers: int) -> nn.TransformerEncoder:
    """torch.nn.TransformerEncoder as ours is built: norm last, ReLU, no dropout, a norm at the end."""
    layer = nn.TransformerEncoderLayer(dim, heads, ffn, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)


def torch_encoder(encoder: RaggedTransformerEncoder) -> nn.TransformerEncoder:
    """torch.nn.TransformerEncoder with the weights of ours, in evaluation mode."""
    first: Any = encoder.layers[0]
    theirs = transformer(
        first.norm1.normalized_shape[0], first.self_attn.num_heads, first.linear1.out_features, len(encoder.layers)
    )
    theirs.to(encoder.norm.weight.device, encoder.norm.weight.dtype).load_state_dict(encoder.state_dict())
    return theirs.eval()


def encoder_padded(theirs: nn.TransformerEncoder, x: Tensor, lengths: Sequence[int], width: int) -> Tensor:
    """(total_nnz, dim): torch's encoder on every cell padded to ``width`` slots, the unused ones masked.

    With the longest cell as width this is the usual padded batch, with all genes of the vocabulary the dense form.
    """
    used = used_slots(lengths, width, x.device)
    with without_fastpath():
        return theirs(padded(x, lengths, width), src_key_padding_mask=~used)[used]


def encoder_dense(theirs: nn.TransformerEncoder, x: Tensor) -> Tensor:
    """(positions, dim): torch's encoder on one cell whose every position is a token; no mask."""
    with without_fastpath():
        return theirs(x[None])[0]


@contextlib.contextmanager
def without_fastpath() -> Iterator[None]:
    """torch.nn.TransformerEncoder as a composition of PyTorch's calls: its fused inference path stores all scores."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, parts: int) -> Tensor:
    if parts == 1:
        return F.linear(x, weight, bias)
    products = [F.linear(a, b) for a, b in zip(x.tensor_split(parts, 1), weight.tensor_split(parts, 1), strict=True)]
    return sum(products[1:], products[0]) + bias


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class PerformerEncoder(nn.Module):
    """A Performer of the configured width and depth: our own layers and linear attention, the fastest at hand."""

    def __init__(self, config: XTrimoGeneConfig) -> None:
        super().__init__()
        features = num_favor_features(config.head_dim)
        self.layers = nn.ModuleList(
            PerformerLayer(config.dim, config.num_heads, config.ffn_dim, features) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        cells, genes, _ = x.shape
        cu_seqlens = torch.arange(0, (cells + 1) * genes, genes, dtype=torch.int32, device=x.device)
        rows = x.flatten(0, 1)
        for layer in self.layers:
            rows = layer(rows, cu_seqlens, genes)
        return self.norm(rows).view_as(x)


def dense_encoder(config: XTrimoGeneConfig) -> nn.Module:
    """A Transformer encoder of the configured width and depth."""
    return transformer(config.dim, config.num_heads, config.ffn_dim, config.num_layers)


def dense_autoencoder(config: XTrimoGeneConfig) -> nn.Module:
    """The dense encoder, and a Transformer of the decoder's width and depth behind it; its rows are predictions."""
    width, layers = config.decoder_dim, config.decoder_layers
    decoder = transformer(width, config.decoder_heads, config.decoder_ffn_dim, layers)
    return nn.Sequential(dense_encoder(config), nn.Linear(config.dim, width), decoder, nn.Linear(width, 1))


class FullLength(NamedTuple):
    """A model that runs over every gene of a cell, and what it costs.

    build      config -> module that takes (cells, genes, dim)
    flops      (config, cells) -> forward FLOPs over config.num_genes genes
    backward   FLOPs of attention in the backward, in times those of the forward: fused softmax attention computes its
               scores again
    """

    build: Callable[[XTrimoGeneConfig], nn.Module]
    flops: Callable[[XTrimoGeneConfig, int], FlopCount]
    backward: float


# Under their names in xtrimogene.bench.costs.
FULL_LENGTH = {
    "dense": FullLength(dense_encoder, dense_flops, 2.5),
    "dense auto-encoder": FullLength(dense_autoencoder, dense_autoencoder_flops, 2.5),
    "performer": FullLength(PerformerEncoder, performer_flops, 2.0),
}


def plain_loss(model: XTrimoGene, masked: MaskedBatch) -> Tensor:
    """model.loss, from the network as it is written down: every value embedded, every row of every layer computed."""
    batch, decoder, table = masked.batch, model.decoder, model.embedding.gene_table[:-1]
    positions, cells = len(table), batch.batch_size
    tokens, hidden, chosen = (
        GeneRows.of(ids, cu_seqlens, positions).rows
        for ids, cu_seqlens in (
            (batch.gene_ids, batch.cu_seqlens),
            (masked.masked_ids, masked.masked_cu_seqlens),
            (masked.chosen_ids, masked.chosen_cu_seqlens),
        )
    )
    zero = torch.ones(cells * positions, dtype=torch.bool, device=tokens.device)
    zero[tokens] = False
    zero[hidden] = False
    zeros = zero.nonzero()[:, 0]
    every = torch.arange(batch.total_nnz, dtype=torch.int32, device=tokens.device)
    encoded = model(dataclasses.replace(batch, distinct_index=every))
    zero_rows = model.embedding.value_rows(batch.values.new_zeros(len(zeros)))
    found = torch.cat([encoded, model.mask_row.expand(len(hidden), -1), zero_rows])
    order = torch.cat([tokens, hidden, zeros]).argsort()
    x = decoder.bridge(found.index_select(0, order) + table.repeat(cells, 1)).to(table.dtype)
    cu_seqlens = torch.arange(0, (cells + 1) * positions, positions, dtype=torch.int32, device=x.device)
    for layer in decoder.layers:
        x = layer(x, cu_seqlens, positions)
    predicted = decoder.head(decoder.normed(x))[:, 0].index_select(0, chosen)
    return F.mse_loss(predicted.float(), masked.chosen_values, reduction="sum")
