"""What a skilled user of plain PyTorch would write for the same work, and the same work in float64 as the truth.

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

from xtrimogene.config import XTrimoGeneConfig, num_favor_features
from xtrimogene.decoder import GeneRows, PerformerLayer
from xtrimogene.encoder import RaggedTransformerEncoder
from xtrimogene.flops import FlopCount, dense_autoencoder_flops, dense_flops, performer_flops
from xtrimogene.masking import MaskedBatch
from xtrimogene.model import XTrimoGene

_QUERY_ROWS = 1024  # rows of scores at a time in float64


def attention_split(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """(total_nnz, num_heads, head_dim): SDPA on each cell by itself."""
    parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts]
    )


def attention_padded(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """(total_nnz, num_heads, head_dim): one SDPA on the batch padded to its longest cell, with a mask."""
    used = used_slots(lengths, max(lengths), q.device)
    q, k, v = (_padded(x, lengths, max(lengths)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=used[:, None, None])
    return out.transpose(1, 2)[used]


def favor_features(q: Tensor, k: Tensor, projection: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """FAVOR+ features (num_heads, rows, num_features) of queries and keys of one cell, stabilised for each head."""
    scale, ratio = q.shape[-1] ** -0.25, len(projection) ** -0.5
    found = []
    for x, dims in ((q, (-1,)), (k, (-2, -1))):
        x = scale * x.transpose(0, 1)
        scores = torch.einsum("hnd,md->hnm", x, projection)
        half_norms = x.square().sum(-1, keepdim=True) / 2
        found.append(ratio * ((scores - half_norms - scores.amax(dims, keepdim=True)).exp() + eps))
    return found[0], found[1]


def favor_einsum(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, lengths: Sequence[int], lengths_q: Sequence[int], eps: float
) -> Tensor:
    """(total_q, num_heads, head_dim): FAVOR+ attention of each cell by einsum, as public Performers compute it."""
    outputs = []
    for q_s, k_s, v_s in zip(q.split(list(lengths_q)), k.split(list(lengths)), v.split(list(lengths)), strict=True):
        query_features, key_features = favor_features(q_s, k_s, projection, eps)
        context = torch.einsum("hnm,nhd->hmd", key_features, v_s)
        inverse = 1 / torch.einsum("hnm,hm->hn", query_features, key_features.sum(1))
        outputs.append((torch.einsum("hnm,hmd->hnd", query_features, context) * inverse[..., None]).transpose(0, 1))
    return torch.cat(outputs)


def embedding_unfused(
    values: Tensor,
    gene_ids: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    bin_table: Tensor,
    gene_table: Tensor,
) -> Tensor:
    """(total_nnz, dim): the formula of the value embedding, one PyTorch call a step, with (total_nnz, bins) tensors."""
    hidden = F.leaky_relu(values.to(w1.dtype)[:, None] * w1 + b1, 0.1)
    bin_weights = (hidden + F.linear(hidden, w2, b2)).softmax(-1)
    return bin_weights @ bin_table + F.embedding(gene_ids, gene_table)


def gather_indexed(
    table: Tensor,
    zero_row: Tensor,
    mask_row: Tensor,
    encoded: Tensor,
    cu_seqlens: Tensor,
    gene_ids: Tensor,
    masked_ids: Tensor,
    masked_cu_seqlens: Tensor,
) -> Tensor:
    """(batch, num_genes, dim): every gene looks up its row among the tokens, the zero row and the mask row.

    Faster, forward and backward, than writing tokens and masks into a tensor of zero rows with index_put.
    """
    batch, total = cu_seqlens.numel() - 1, len(gene_ids)
    cells = torch.arange(batch)
    source = torch.full((batch, len(table)), total)
    source[cells.repeat_interleave(cu_seqlens.diff()), gene_ids.long()] = torch.arange(total)
    source[cells.repeat_interleave(masked_cu_seqlens.diff()), masked_ids.long()] = total + 1
    return F.embedding(source, torch.cat([encoded, zero_row[None], mask_row[None]])) + table


def head_indexed(
    rows: Tensor,
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """(n,): the chosen rows, both norms and the linear map, one PyTorch call a step."""
    shape = x.shape[1:]
    normed = F.layer_norm(F.layer_norm(x[rows], shape, norm1_weight, norm1_bias), shape, norm2_weight, norm2_bias)
    return F.linear(normed, weight[None], bias)[:, 0]


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
        return theirs(_padded(x, lengths, width), src_key_padding_mask=~used)[used]


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


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Attention and its gradients to q, k, v in float64, some rows of scores at a time: long cells fit in memory."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    grads = [torch.zeros_like(out) for _ in range(3)]
    scale = q.shape[2] ** -0.5
    start = 0
    for length in lengths:
        cell = slice(start, start + length)
        start += length
        for head in range(q.shape[1]):
            k_s, v_s = (x[cell, head].detach().double() for x in (k, v))
            for first in range(cell.start, cell.stop, _QUERY_ROWS):
                rows = slice(first, min(first + _QUERY_ROWS, cell.stop))
                q_s, grad_s = (x[rows, head].detach().double() for x in (q, grad_out))
                probs = (scale * q_s @ k_s.T).softmax(-1)
                out[rows, head] = probs @ v_s
                grad_probs = grad_s @ v_s.T
                delta = (grad_s * out[rows, head]).sum(-1, keepdim=True)
                grad_scores = scale * probs * (grad_probs - delta)
                grads[0][rows, head] = grad_scores @ k_s
                grads[1][cell, head] += grad_scores.T @ q_s
                grads[2][cell, head] += probs.T @ grad_s
    return out, grads


def _linear(x: Tensor, weight: Tensor, bias: Tensor, parts: int) -> Tensor:
    if parts == 1:
        return F.linear(x, weight, bias)
    products = [F.linear(a, b) for a, b in zip(x.tensor_split(parts, 1), weight.tensor_split(parts, 1), strict=True)]
    return sum(products[1:], products[0]) + bias


def exact_favor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    grad_out: Tensor,
    lengths: Sequence[int],
    lengths_q: Sequence[int],
    eps: float,
) -> tuple[Tensor, list[Tensor]]:
    """FAVOR+ attention and its gradients to q, k, v in float64, a head at a time: features of all take gigabytes."""
    out, grads = (
        torch.empty(q.shape, dtype=torch.float64, device=q.device),
        [torch.empty(x.shape, dtype=torch.float64, device=q.device) for x in (q, k, v)],
    )
    for head in range(q.shape[1]):
        one = slice(head, head + 1)
        inputs = [x[:, one].detach().double().requires_grad_() for x in (q, k, v)]
        head_out = favor_einsum(inputs[0], inputs[1], inputs[2], projection.double(), lengths, lengths_q, eps)
        out[:, one] = head_out.detach()
        for grad, found in zip(grads, torch.autograd.grad(head_out, inputs, grad_out[:, one].double()), strict=True):
            grad[:, one] = found
    return out, grads


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def used_slots(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """(cells, width) bool: the first slots of each row, as many as the cell has tokens."""
    return torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]


def _padded(x: Tensor, lengths: Sequence[int], width: int) -> Tensor:
    """(total_nnz, ...) -> (cells, width, ...), zero in unused slots."""
    rows = nn.utils.rnn.pad_sequence(x.split(list(lengths)), batch_first=True)
    return F.pad(rows, [0, 0] * (x.dim() - 1) + [0, width - rows.shape[1]])


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


# Under their names in benchmarks.costs.
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
