"""Other people's single-cell models as far as their encoders see them, with published sizes and names of weights.

They stand in for scGPT, UCE and Nicheformer where the package is not installed, in tests, on a page and in benchmarks:
the same embedding of tokens, the same calls of the encoder with the same masks, the first of the heads. The weights are
random. Geneformer is a BERT of transformers, and is made by it.

scGPT        https://github.com/bowang-lab/scGPT, scgpt/model/model.py
UCE          https://github.com/snap-stanford/UCE, model.py
Nicheformer  https://github.com/theislab/nicheformer, src/nicheformer/models/_nicheformer.py
Geneformer   https://huggingface.co/ctheodoris/Geneformer, config.json
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedded(nn.Module):
    """scGPT's GeneEncoder: an embedding and its norm."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim, padding_idx=0)
        self.enc_norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., dim)."""
        return self.enc_norm(self.embedding(ids))


class ContinuousValues(nn.Module):
    """scGPT's ContinuousValueEncoder: two linear maps of a number."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear1, self.linear2 = nn.Linear(1, dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, values: Tensor) -> Tensor:
        """values (...) -> (..., dim)."""
        hidden = F.relu(self.linear1(values[..., None].clamp(max=512)))
        return self.dropout(self.norm(self.linear2(hidden)))


class FlashAttention(nn.Module):
    """The attention of flash-attn as its callers see it, on any device: padding gets zeros."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.softmax_scale, self.dropout_p = None, dropout

    def forward(self, qkv: Tensor, keep: Tensor | None) -> Tensor:
        """qkv (batch, length, 3, heads, head_dim), keep (batch, length) bool -> (batch, length, heads, head_dim)."""
        q, k, v = qkv.transpose(1, 3).unbind(2)
        mask = None if keep is None else keep[:, None, None]
        dropout = self.dropout_p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)
        return out if keep is None else out * keep[:, :, None, None]


class FlashMHA(nn.Module):
    """flash-attn's multi-head attention: one linear map of q, k and v, named Wqkv."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.causal, self.batch_first = heads, False, True
        self.Wqkv, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.inner_attn = FlashAttention(dropout)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """x (batch, length, dim); key_padding_mask (batch, length) bool, True for what is kept."""
        qkv = self.Wqkv(x).unflatten(2, (3, self.num_heads, -1))
        return self.out_proj(self.inner_attn(qkv, key_padding_mask).flatten(2)), None


class FlashTransformerEncoderLayer(nn.Module):
    """scGPT's layer for flash-attn. With norm_scheme "pre" the residual branches start from the normed rows."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, dropout: float, norm_scheme: str) -> None:
        super().__init__()
        self.self_attn = FlashMHA(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout, self.dropout1, self.dropout2 = (nn.Dropout(dropout) for _ in range(3))
        self.activation, self.norm_scheme = F.relu, norm_scheme

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Any = None, **_: Any
    ) -> Tensor:
        """src (batch, length, dim), src_key_padding_mask (batch, length), not 0 for padding."""
        if src_mask is not None:
            raise ValueError("FlashTransformerEncoderLayer does not support src_mask")
        keep = ~src_key_padding_mask.bool() if src_key_padding_mask.any() else None
        before = self.norm_scheme == "pre"
        src = self.norm1(src) if before else src
        src = src + self.dropout1(self.self_attn(src, key_padding_mask=keep)[0])
        src = self.norm2(src) if before else self.norm1(src)
        src = src + self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(src)))))
        return src if before else self.norm2(src)


class ScGPT(nn.Module):
    """scGPT's TransformerModel: genes and values in, values and a cell embedding out.

    flash is the norm scheme of layers for flash-attn, "pre" or "post"; empty for torch's own layers.
    """

    def __init__(
        self, *, genes: int = 60_697, dim: int = 512, heads: int = 8, ffn_dim: int = 512, layers: int = 12,
        dropout: float = 0.2, flash: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.value_encoder = Embedded(genes, dim), ContinuousValues(dim, dropout)
        layer: Any
        if flash:
            layer = FlashTransformerEncoderLayer(dim, heads, ffn_dim, dropout, flash)
        else:
            layer = nn.TransformerEncoderLayer(dim, heads, ffn_dim, dropout, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=not flash)
        self.decoder = nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(), nn.Linear(dim, 1))

    def embed(self, src: Tensor, values: Tensor) -> Tensor:
        """src and values (...) -> (..., dim), what the encoder is given."""
        return self.encoder(src) + self.value_encoder(values)

    def forward(self, src: Tensor, values: Tensor, src_key_padding_mask: Tensor) -> dict[str, Tensor]:
        """src, values and src_key_padding_mask (batch, length), the mask True for padding."""
        out = self.transformer_encoder(self.embed(src, values), src_key_padding_mask=src_key_padding_mask)
        return {"mlm_output": self.decoder(out)[..., 0], "cell_emb": out[:, 0]}


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): the positions of Vaswani et al. 2017."""
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


class UCE(nn.Module):
    """UCE's TransformerModel: embedded proteins in, sequence first, a cell embedding out.

    Its mask goes to the encoder as 1 - mask in numbers, which are added to the scores: padding is attended to.
    """

    pe: Tensor

    def __init__(
        self, *, token_dim: int = 5120, dim: int = 1280, heads: int = 20, ffn_dim: int = 5120, layers: int = 4,
        output_dim: int = 1280, dropout: float = 0.05, length: int = 1536,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("pe", sinusoids(length, dim)[:, None])
        self.encoder = nn.Sequential(nn.Linear(token_dim, dim), nn.GELU(), nn.LayerNorm(dim))
        layer = nn.TransformerEncoderLayer(dim, heads, ffn_dim, dropout)
        self.transformer_encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.decoder = nn.Sequential(nn.Linear(dim, output_dim), nn.LayerNorm(output_dim), nn.GELU())

    def embed(self, src: Tensor) -> Tensor:
        """src (length, batch, token_dim) -> (length, batch, dim), what the encoder is given."""
        return self.encoder(src) * math.sqrt(self.pe.shape[2]) + self.pe[: len(src)]

    def forward(self, src: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """src (length, batch, token_dim); mask (batch, length) float, 1 where there is a gene."""
        out = self.decoder(self.transformer_encoder(self.embed(src), src_key_padding_mask=1 - mask))
        return out, F.normalize(out[0], dim=1)


class Nicheformer(nn.Module):
    """Nicheformer: ranked genes in, gene logits out; its embedding of a cell calls the layers one by one."""

    def __init__(
        self, *, tokens: int = 20_340, dim: int = 512, heads: int = 16, ffn_dim: int = 1024, layers: int = 12,
        dropout: float = 0.0, length: int = 1500,
    ) -> None:  # fmt: skip
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            d_model=dim, nhead=heads, dim_feedforward=ffn_dim, batch_first=True, dropout=dropout, layer_norm_eps=1e-12
        )
        self.encoder_layer = layer
        self.encoder = nn.TransformerEncoder(encoder_layer=layer, num_layers=layers, enable_nested_tensor=False)
        self.embeddings = nn.Embedding(tokens + 5, dim, padding_idx=1)
        self.positional_embedding = nn.Embedding(length, dim)
        self.classifier_head = nn.Linear(dim, tokens)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """x and positions (...) -> (..., dim), what the encoder is given."""
        return self.embeddings(x) + self.positional_embedding(positions)

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """x (batch, length) int64; attention_mask (batch, length) bool, True for padding."""
        rows = self.embed(x, torch.arange(x.shape[1], device=x.device))
        out = self.encoder(rows, is_causal=False, src_key_padding_mask=attention_mask)
        return {"mlm_prediction": self.classifier_head(out), "transformer_output": out}

    def get_embeddings(self, x: Tensor, attention_mask: Tensor, layer: int = -1) -> Tensor:
        """(batch, dim): the mean over all places, padding too, of what a layer gives."""
        rows = self.embed(x, torch.arange(x.shape[1], device=x.device))
        for each in self.encoder.layers[: layer % len(self.encoder.layers) + 1]:
            rows = each(rows, src_key_padding_mask=attention_mask, is_causal=False)
        return rows.mean(1)


def geneformer(
    kind: str = "BertForMaskedLM", *, tokens: int = 20_275, dim: int = 768, heads: int = 12, ffn_dim: int = 3072,
    layers: int = 12, dropout: float = 0.02, length: int = 4096, **options: Any,
) -> Any:  # fmt: skip
    """A BERT of transformers in the size of Geneformer V2 104M; kind is one of its classes."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=tokens, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=ffn_dim, hidden_act="relu", max_position_embeddings=length, layer_norm_eps=1e-12,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, pad_token_id=0, **options,
    )  # fmt: skip
    return getattr(transformers, kind)(config)
