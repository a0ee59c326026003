"""RaggedTransformerEncoder: torch.nn.TransformerEncoder for cells of unequal length, with no padding anywhere."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xtg_kernels import ragged_attention
from xtrimogene.linear import (
    feed_forward,
    in_autocast_dtype,
    is_large,
    linear,
    pays_by_blocks,
    row_blocks,
    row_linear,
    untouched,
)


class RaggedSelfAttention(nn.Module):
    """Multi-head self-attention inside each segment, named and initialised as torch.nn.MultiheadAttention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads = {num_heads}, got {dim}")
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """x (total_nnz, dim) -> (total_nnz, dim)."""
        qkv = self._in_proj(x)
        # Three strided views of one tensor: the op reads them where they are.
        q, k, v = qkv.view(x.shape[0], 3, self.num_heads, x.shape[1] // self.num_heads).unbind(1)
        return self.out_proj(ragged_attention(q, k, v, cu_seqlens, max_seqlen).flatten(1))

    def _in_proj(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and untouched(x, ()):
            rows, weight, bias = in_autocast_dtype(x, self.in_proj_weight, self.in_proj_bias)
            if pays_by_blocks(len(rows), weight, bias, rows):
                return linear(rows, weight, bias)
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)


class RaggedTransformerEncoderLayer(nn.Module):
    """One post-norm layer, as torch.nn.TransformerEncoderLayer(norm_first=False, activation="relu") computes it:

    x = norm1(x + self_attn(x))
    x = norm2(x + linear2(relu(linear1(x))))

    In training, dropout acts on both residual branches and after the relu. torch's layer (and the published training
    recipe) also drops attention probabilities; that one is left out, so that the attention kernel needs no random mask.
    Evaluation is the same in both.
    """

    def __init__(
        self, dim: int, num_heads: int, ffn_dim: int, *, dropout: float = 0.1, layer_norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.self_attn = RaggedSelfAttention(dim, num_heads)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.norm2 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """x (total_nnz, dim) -> (total_nnz, dim)."""
        x = self.norm1(x + self.dropout(self.self_attn(x, cu_seqlens, max_seqlen)))
        return self.norm2(x + self.dropout(self._feed_forward(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and untouched(x, (self.linear1, self.linear2, self.dropout)):
            rows, w1, b1, w2, b2 = in_autocast_dtype(
                x, self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias
            )
            if pays_by_blocks(len(rows), w1, b1, w2, b2, rows):
                return feed_forward(rows, w1, b1, w2, b2, self.dropout.p if self.dropout.training else 0.0)
        # In place: no backward needs the value before the relu, and this is the widest tensor of the layer.
        return self.linear2(self.dropout(F.relu(self.linear1(x), inplace=True)))


class RaggedTransformerEncoder(nn.Module):
    """Stack of post-norm Transformer layers and a final LayerNorm over cells laid end to end.

    Equal to torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(...), num_layers, torch.nn.LayerNorm(dim)) on
    each cell by itself. State dicts have the same keys and shapes and load both ways. It knows nothing of genes: any
    model with rows of unequal sequences can use it.

        encoder = RaggedTransformerEncoder(dim=128, num_heads=2, num_layers=4)
        y = encoder(x, cu_seqlens, max_seqlen)

    `checkpoint_activations = True` keeps only the input of each layer for the backward and computes the rest again.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_layers: int,
        *,
        ffn_dim: int | None = None,
        dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            RaggedTransformerEncoderLayer(
                dim, num_heads, 4 * dim if ffn_dim is None else ffn_dim, dropout=dropout, layer_norm_eps=layer_norm_eps
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.checkpoint_activations = False

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Encode every segment of x by itself.

        x           (total_nnz, dim), float32, bfloat16, float16 or float64
        cu_seqlens  (batch + 1,) int32; segment c owns rows cu_seqlens[c]:cu_seqlens[c + 1]
        max_seqlen  length of the longest segment
        returns     (total_nnz, dim); rows past cu_seqlens[-1] hold no cell and mean nothing

        Raises ValueError or TypeError for a wrong shape or dtype, or offsets that do not fit x.
        """
        dim = self.norm.normalized_shape[0]
        if x.dim() != 2 or x.shape[1] != dim:
            raise ValueError(f"x: expected shape (total_nnz, {dim}), got {tuple(x.shape)}")
        if self._infers_by_blocks(x):
            return self._infer(x, cu_seqlens, max_seqlen)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, cu_seqlens, max_seqlen, use_reentrant=False)
            else:
                x = layer(x, cu_seqlens, max_seqlen)
        return self.norm(x)

    def _infers_by_blocks(self, x: Tensor) -> bool:
        """Whether nothing but the numbers of the last layer is asked for: a CPU, no gradients, no dropout, no tracing,
        and modules and weights that nobody replaced or hooked."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not len(self.layers):
            return False
        if any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in self.modules()):
            return False
        if not untouched(x, tuple(self.modules()), _KINDS) or any(p.dtype != x.dtype for p in self.parameters()):
            return False
        layer = cast(RaggedTransformerEncoderLayer, self.layers[0])
        # PyTorch's own bfloat16 layers keep kernels for every number of rows: memory would grow from batch to batch.
        return x.dtype == torch.bfloat16 or is_large(len(x), layer.linear1.out_features, x.dtype)

    def _infer(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The same layers with everything between two attentions done for a block of rows at a time.

        Between attentions every row is on its own, so a block goes from one attention's output to the next one's q, k
        and v while it is in cache. Only q, k, v, the rows themselves and the attention's output exist for all tokens.
        """
        layers = cast(list[RaggedTransformerEncoderLayer], list(self.layers))
        heads, dim = layers[0].self_attn.num_heads, x.shape[1]
        blocks = row_blocks(len(x), layers[0].linear1.out_features, x.dtype)
        qkv, out = x.new_empty((len(x), 3 * dim)), x.new_empty(x.shape)
        in_proj = row_linear(layers[0].self_attn.in_proj_weight, layers[0].self_attn.in_proj_bias)
        for block in blocks:
            qkv[block] = in_proj(x[block])
        for i, layer in enumerate(layers):
            q, k, v = qkv.view(len(x), 3, heads, dim // heads).unbind(1)
            attended = ragged_attention(q, k, v, cu_seqlens, max_seqlen).flatten(1)
            out_proj = row_linear(layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias)
            linear1 = row_linear(layer.linear1.weight, layer.linear1.bias, relu=True)
            linear2 = row_linear(layer.linear2.weight, layer.linear2.bias)
            last = i + 1 == len(layers)
            if not last:
                attention = layers[i + 1].self_attn
                in_proj = row_linear(attention.in_proj_weight, attention.in_proj_bias)
            for block in blocks:
                rows = layer.norm1(out_proj(attended[block]).add_(x[block]))
                rows = layer.norm2(linear2(linear1(rows)).add_(rows))
                out[block] = self.norm(rows) if last else rows
                if not last:
                    qkv[block] = in_proj(rows)
            x = out
        return out


_KINDS = (RaggedTransformerEncoder, RaggedTransformerEncoderLayer, RaggedSelfAttention)
