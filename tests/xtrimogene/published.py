"""The published network in plain torch.nn modules, under the key names of released checkpoints: an oracle.

One cell at a time, every position spelled out, nothing saved: the encoder over the expressed genes, the decoder over
all positions, FAVOR+ as its formula stands. Only the names and shapes are those of released files.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xtg_kernels import RaggedBatch
from xtrimogene.model import XTrimoGene
from xtrimogene.network.config import XTrimoGeneConfig


class TokenEmbedding(nn.Module):
    """Auto-discretisation of values; emb_mask stands for a masked gene, emb_pad for nothing here."""

    def __init__(self, num_bins: int, dim: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.mlp = nn.Linear(1, num_bins)
        self.mlp2 = nn.Linear(num_bins, num_bins)
        self.emb = nn.Embedding(num_bins, dim)
        self.emb_mask = nn.Embedding(1, dim)
        self.emb_pad = nn.Embedding(1, dim)

    def forward(self, values: Tensor) -> Tensor:
        hidden = F.leaky_relu(self.mlp(values[:, None]), 0.1)
        return (self.alpha * hidden + self.mlp2(hidden)).softmax(-1) @ self.emb.weight


class Encoder(nn.Module):
    def __init__(self, config: XTrimoGeneConfig) -> None:
        super().__init__()
        self.transformer_encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(config.dim, config.num_heads, config.ffn_dim, dropout=0.0, batch_first=True)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.transformer_encoder:
            x = layer(x[None])[0]
        return self.norm(x)


class FastAttention(nn.Module):
    """FAVOR+ of one cell: q, k, v (heads, n, w); the maximum of the keys over the whole cell, or over each head."""

    projection_matrix: Tensor

    def __init__(self, num_features: int, head_dim: int, stabilizer: str, eps: float) -> None:
        super().__init__()
        self.stabilizer, self.eps = stabilizer, eps
        self.register_buffer("projection_matrix", torch.randn(num_features, head_dim))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = q.shape[-1] ** -0.25
        q_scores, k_scores = (c * x @ self.projection_matrix.T for x in (q, k))
        q_norms, k_norms = ((c * x).square().sum(-1, keepdim=True) / 2 for x in (q, k))
        q_max = q_scores.amax(-1, keepdim=True)
        k_max = k_scores.amax((-1, -2) if self.stabilizer == "head" else (-1, -2, -3), keepdim=True)
        q_features = (q_scores - q_norms - q_max).exp() + self.eps
        k_features = (k_scores - k_norms - k_max).exp() + self.eps
        return q_features @ (k_features.mT @ v) / (q_features @ k_features.sum(-2)[..., None])


class SelfAttention(nn.Module):
    def __init__(self, config: XTrimoGeneConfig) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.heads = config.decoder_heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.fast_attention = FastAttention(
            config.num_features, config.decoder_head_dim, config.stabilizer, config.favor_eps
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(0, 1) for y in (self.to_q(x), self.to_k(x), self.to_v(x))
        )
        return self.to_out(self.fast_attention(q, k, v).transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x)))


class Chunk(nn.Module):
    """A level of names between a norm and a feed-forward layer."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Net(nn.Module):
    def __init__(self, config: XTrimoGeneConfig) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, SelfAttention(config)),
                    PreNorm(dim, Chunk(FeedForward(dim, config.decoder_ffn_dim))),
                ]
            )
            for _ in range(config.decoder_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed_forward in self.layers:
            x = x + attention(x)
            x = x + feed_forward(x)
        return x


class Performer(nn.Module):
    def __init__(self, config: XTrimoGeneConfig) -> None:
        super().__init__()
        self.register_buffer("calls_since_last_redraw", torch.tensor(0))
        self.net = Net(config)


class PlainDecoder(nn.Module):
    def __init__(self, config: XTrimoGeneConfig) -> None:
        super().__init__()
        self.performer = Performer(config)
        self.norm = nn.LayerNorm(config.decoder_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.performer.net(x))


class PublishedNetwork(nn.Module):
    """seq_len = config.num_positions; forward gives what the head reads, (positions, decoder_dim)."""

    def __init__(self, config: XTrimoGeneConfig) -> None:
        super().__init__()
        self.token_emb = TokenEmbedding(config.num_bins, config.dim, config.alpha)
        self.pos_emb = nn.Embedding(config.num_positions + 1, config.dim)
        self.encoder = Encoder(config)
        self.decoder_embed = nn.Linear(config.dim, config.decoder_dim)
        self.decoder = PlainDecoder(config)
        self.norm = nn.LayerNorm(config.decoder_dim)
        self.to_final = nn.Linear(config.decoder_dim, 1)

    def encode(self, values: Tensor, gene_ids: Tensor) -> Tensor:
        """(n, dim) rows of one cell's tokens."""
        return self.encoder(self.token_emb(values) + self.pos_emb(gene_ids))

    def forward(self, values: Tensor, gene_ids: Tensor, masked_ids: Tensor) -> Tensor:
        positions = torch.arange(self.pos_emb.num_embeddings - 1)
        x = self.token_emb(values.new_zeros(len(positions)))
        x = x.index_copy(0, masked_ids.long(), self.token_emb.emb_mask.weight.expand(len(masked_ids), -1))
        if len(values):
            x = x.index_copy(0, gene_ids.long(), self.encode(values, gene_ids))
        return self.norm(self.decoder(self.decoder_embed(x + self.pos_emb(positions))))

    def predict(self, values: Tensor, gene_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """(positions,) predictions of one cell."""
        return self.to_final(self(values, gene_ids, masked_ids))[:, 0]


def cells_of(batch: RaggedBatch) -> list[tuple[Tensor, Tensor]]:
    """(values, gene ids) of each cell."""
    bounds = batch.cu_seqlens.tolist()
    return [(batch.values[a:b], batch.gene_ids[a:b]) for a, b in itertools.pairwise(bounds)]


def published_names(config: XTrimoGeneConfig) -> dict[str, str]:
    """Name in an XTrimoGene -> name of the same tensor in a PublishedNetwork; their shapes may differ by ones."""
    names = {
        "embedding.w1": "token_emb.mlp.weight",
        "embedding.b1": "token_emb.mlp.bias",
        "embedding.w2": "token_emb.mlp2.weight",
        "embedding.b2": "token_emb.mlp2.bias",
        "embedding.bin_table": "token_emb.emb.weight",
        "embedding.gene_table": "pos_emb.weight",
        "mask_row": "token_emb.emb_mask.weight",
    }
    pairs = {
        "encoder.norm": "encoder.norm",
        "decoder.bridge": "decoder_embed",
        "decoder.norm": "decoder.norm",
        "decoder.final_norm": "norm",
        "decoder.head": "to_final",
    }
    for i in range(config.num_layers):
        ours, theirs = f"encoder.layers.{i}", f"encoder.transformer_encoder.{i}"
        for name in ("self_attn.in_proj_weight", "self_attn.in_proj_bias"):
            names[f"{ours}.{name}"] = f"{theirs}.{name}"
        for name in ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"):
            pairs[f"{ours}.{name}"] = f"{theirs}.{name}"
    for i in range(config.decoder_layers):
        ours, theirs = f"decoder.layers.{i}", f"decoder.performer.net.layers.{i}"
        names[f"{ours}.projection"] = f"{theirs}.0.fn.fast_attention.projection_matrix"
        for name, other in {
            "norm1": "0.norm",
            "q_proj": "0.fn.to_q",
            "k_proj": "0.fn.to_k",
            "v_proj": "0.fn.to_v",
            "out_proj": "0.fn.to_out",
            "norm2": "1.norm",
            "linear1": "1.fn.fn.w1",
            "linear2": "1.fn.fn.w2",
        }.items():
            pairs[f"{ours}.{name}"] = f"{theirs}.{other}"
    for ours, theirs in pairs.items():
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = f"{theirs}.{kind}"
    return names


def published_from(model: XTrimoGene) -> PublishedNetwork:
    """The plain network with the weights of a model, in its dtype."""
    network = PublishedNetwork(model.config).to(model.mask_row.dtype)
    state, theirs = model.state_dict(), network.state_dict()
    names = published_names(model.config)
    assert set(names) == set(state)
    with torch.no_grad():
        for ours, other in names.items():
            theirs[other].copy_(state[ours].reshape(theirs[other].shape))
    return network
