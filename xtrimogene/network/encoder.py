"""RaggedTransformerEncoder: torch.nn.TransformerEncoder for cells of unequal length, with no padding anywhere.

The computation is written once, over `Layer`: what one Transformer layer consists of, in whatever module tree its
weights live. RaggedTransformerEncoder has a tree of its own, xtrimogene.dropin runs over the trees of others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xtg_kernels import ragged_attention
from xtrimogene.network.dropping import DropoutKey, added, any_drops, dropped, share_of
from xtrimogene.network.linear import (
    ACTIVATIONS,
    activate,
    feed_forward,
    in_autocast_dtype,
    is_large,
    linear,
    pays_by_blocks,
    row_blocks,
    row_linear,
    untouched,
    weights_of,
)

# q, k, v -> what each row attends to, all (rows, num_heads, head_dim): in place of the attention inside each segment.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# Of a layer.
DROPOUTS = 3


@dataclass(frozen=True)
class Layer:
    """One Transformer layer: x = norm1(x + attend(x)); x = norm2(x + linear2(activation(linear1(x)))), or with
    norm_first x = x + attend(norm1(x)); x = x + linear2(activation(linear1(norm2(x)))).
    norm_first and residual_of_norm: the same of the normed rows, x = norm1(x); x = x + attend(x); x = norm2(x); ...

    num_heads   attention heads
    in_proj     () -> weight (3 width, dim) and bias (3 width,) or None of q, k and v, one after the other
    attend      x (total_nnz, dim), cu_seqlens, max_seqlen[, attention] -> (total_nnz, dim), with the output projection
    activation  "relu", "gelu" (erf) or "gelu_tanh"
    dropouts    on the attention's branch, after the activation, on the feed-forward branch; None for none
    """

    num_heads: int
    in_proj: Callable[[], tuple[Tensor, Tensor | None]]
    attend: Callable[..., Tensor]
    out_proj: nn.Linear
    norm1: nn.LayerNorm
    linear1: nn.Linear
    linear2: nn.Linear
    norm2: nn.LayerNorm
    activation: str
    norm_first: bool
    dropouts: tuple[nn.Dropout | None, nn.Dropout | None, nn.Dropout | None]
    residual_of_norm: bool = False

    def __call__(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        attention: Attention | None = None,
        key: DropoutKey | None = None,
    ) -> Tensor:
        """x (total_nnz, dim) -> (total_nnz, dim). key is what masks are drawn from, None to take a seed from torch."""
        after_attention, _, after_ffn = self.dropouts
        where = (cu_seqlens, max_seqlen) if attention is None else (cu_seqlens, max_seqlen, attention)
        if not any_drops(self.dropouts):
            key = None
        elif key is None:
            key = DropoutKey.of(cu_seqlens, len(x))
        of_attention, of_hidden, of_ffn = (None if key is None else key.at(i) for i in range(DROPOUTS))
        if self.norm_first:
            rows = self.norm1(x)
            residual = rows if self.residual_of_norm else x
            x = added(residual, after_attention, self.attend(rows, *where), of_attention)
            rows = self.norm2(x)
            residual = rows if self.residual_of_norm else x
            return added(residual, after_ffn, self._feed_forward(rows, of_hidden), of_ffn)
        x = self.norm1(added(x, after_attention, self.attend(x, *where), of_attention))
        return self.norm2(added(x, after_ffn, self._feed_forward(x, of_hidden), of_ffn))

    def _feed_forward(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        dropout = self.dropouts[1]
        modules = (self.linear1, self.linear2, *(() if dropout is None else (dropout,)))
        if torch.is_grad_enabled() and untouched(x, modules):
            rows, w1, w2 = in_autocast_dtype(x, self.linear1.weight, self.linear2.weight)
            b1, b2 = in_autocast_dtype(self.linear1.bias, self.linear2.bias)
            if pays_by_blocks(len(rows), w1, b1, w2, b2, rows):
                return feed_forward(rows, w1, b1, w2, b2, share_of(dropout), key, activation=self.activation)
        if self.activation == "relu":
            return self.linear2(dropped(dropout, self.linear1(x), key, relu=True))
        return self.linear2(dropped(dropout, activate(self.linear1(x), self.activation), key))


def attend(
    x: Tensor,
    in_proj: tuple[Tensor, Tensor | None],
    num_heads: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    attention: Attention | None = None,
) -> Tensor:
    """Multi-head self-attention inside each segment, before the output projection.

    x (total_nnz, dim), in_proj the weight (3 width, dim) and the bias (3 width,) or None -> (total_nnz, width).
    """
    weight, bias = in_proj
    qkv = None
    if torch.is_grad_enabled() and untouched(x, ()):
        (rows, wide), (offsets,) = in_autocast_dtype(x, weight), in_autocast_dtype(bias)
        if pays_by_blocks(len(rows), wide, offsets, rows):
            qkv = linear(rows, wide, offsets)
    if qkv is None:
        qkv = F.linear(x, weight, bias)
    # Three strided views of one tensor: the op reads them where they are.
    q, k, v = qkv.view(x.shape[0], 3, num_heads, weight.shape[0] // 3 // num_heads).unbind(1)
    out = ragged_attention(q, k, v, cu_seqlens, max_seqlen) if attention is None else attention(q, k, v)
    return out.flatten(1)


class RaggedSelfAttention(nn.Module):
    """Multi-head self-attention inside each segment, named and initialised as torch.nn.MultiheadAttention."""

    in_proj_bias: nn.Parameter | None

    def __init__(self, dim: int, num_heads: int, *, bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads = {num_heads}, got {dim}")
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.register_parameter("in_proj_bias", nn.Parameter(torch.zeros(3 * dim)) if bias else None)
        self.out_proj = nn.Linear(dim, dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """x (total_nnz, dim) -> (total_nnz, dim)."""
        return self.out_proj(attend(x, self.in_proj(), self.num_heads, cu_seqlens, max_seqlen))

    def in_proj(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of q, k and v."""
        return self.in_proj_weight, self.in_proj_bias


class RaggedTransformerEncoderLayer(nn.Module):
    """One layer, as torch.nn.TransformerEncoderLayer computes it:

    x = norm1(x + self_attn(x))                     norm_first: x = x + self_attn(norm1(x))
    x = norm2(x + linear2(activation(linear1(x))))              x = x + linear2(activation(linear1(norm2(x))))

    activation is "relu", "gelu" (erf) or "gelu_tanh". In training, dropout acts on both residual branches and after the
    activation, with masks of xtg_kernels.dropout. torch's layer (and the published training recipe) also drops
    attention probabilities; that one is left out. Evaluation is the same in both.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
        activation: str = "relu",
        norm_first: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS[1:]:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS[1:])}, got {activation!r}")
        self.activation, self.norm_first = activation, norm_first
        self.self_attn = RaggedSelfAttention(dim, num_heads, bias=bias)
        self.linear1 = nn.Linear(dim, ffn_dim, bias=bias)
        self.linear2 = nn.Linear(ffn_dim, dim, bias=bias)
        self.norm1 = nn.LayerNorm(dim, eps=layer_norm_eps, bias=bias)
        self.norm2 = nn.LayerNorm(dim, eps=layer_norm_eps, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, key: DropoutKey | None = None) -> Tensor:
        """x (total_nnz, dim) -> (total_nnz, dim). key is what masks are drawn from, None to take a seed from torch."""
        return self.parts()(x, cu_seqlens, max_seqlen, key=key)

    def parts(self) -> Layer:
        """This layer's modules."""
        return Layer(
            self.self_attn.num_heads,
            self.self_attn.in_proj,
            self.self_attn,
            self.self_attn.out_proj,
            self.norm1,
            self.linear1,
            self.linear2,
            self.norm2,
            self.activation,
            self.norm_first,
            (self.dropout, self.dropout, self.dropout),
        )


class RaggedTransformerEncoder(nn.Module):
    """Stack of Transformer layers and a final LayerNorm over cells laid end to end.

    Equal to torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(...), num_layers, torch.nn.LayerNorm(dim)) on
    each cell by itself. State dicts have the same keys and shapes and load both ways. It knows nothing of genes: any
    model with rows of unequal sequences can use it. norm_first, activation and bias are those of torch's layer.

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
        activation: str = "relu",
        norm_first: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            RaggedTransformerEncoderLayer(
                dim,
                num_heads,
                4 * dim if ffn_dim is None else ffn_dim,
                dropout=dropout,
                layer_norm_eps=layer_norm_eps,
                activation=activation,
                norm_first=norm_first,
                bias=bias,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=layer_norm_eps, bias=bias)
        self.checkpoint_activations = False

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_key: DropoutKey | None = None
    ) -> Tensor:
        """Encode every segment of x by itself.

        x           (total_nnz, dim), float32, bfloat16, float16 or float64
        cu_seqlens  (batch + 1,) int32; segment c owns rows cu_seqlens[c]:cu_seqlens[c + 1]
        max_seqlen  length of the longest segment
        dropout_key what the masks of dropout are drawn from in training; None for a seed from torch's generator and the
                    numbers of the segments in the batch
        returns     (total_nnz, dim); rows past cu_seqlens[-1] hold no cell and mean nothing

        Raises ValueError or TypeError for a wrong shape or dtype, or offsets that do not fit x.
        """
        dim = self.norm.normalized_shape[0]
        if x.dim() != 2 or x.shape[1] != dim:
            raise ValueError(f"x: expected shape (total_nnz, {dim}), got {tuple(x.shape)}")
        if self._infers_by_blocks(x):
            layers = [layer.parts() for layer in cast(list[RaggedTransformerEncoderLayer], self.layers)]
            return infer_by_blocks(layers, self.norm, x, cu_seqlens, max_seqlen)
        dropouts = [layer.dropout for layer in cast(list[RaggedTransformerEncoderLayer], self.layers)]
        if dropout_key is None and any_drops(dropouts):
            dropout_key = DropoutKey.of(cu_seqlens, len(x))
        for i, layer in enumerate(self.layers):
            key = None if dropout_key is None else dropout_key.at(DROPOUTS * i)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, cu_seqlens, max_seqlen, key, use_reentrant=False)
            else:
                x = layer(x, cu_seqlens, max_seqlen, key)
        return self.norm(x)

    def _infers_by_blocks(self, x: Tensor) -> bool:
        if not len(self.layers):
            return False
        layer = cast(RaggedTransformerEncoderLayer, self.layers[0])
        return infers_by_blocks(x, tuple(self.modules()), layer.linear1.out_features)


def infers_by_blocks(x: Tensor, modules: Sequence[nn.Module], width: int) -> bool:
    """Whether nothing but the numbers of the last layer is asked for: a CPU, no gradients, no dropout, no tracing, and
    modules and weights that nobody replaced or hooked; and whether a batch of this width is large enough to pay."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in modules):
        return False
    if not untouched(x, modules, _KINDS) or any(p.dtype != x.dtype for module in modules for p in weights_of(module)):
        return False
    # PyTorch's own bfloat16 layers keep kernels for every number of rows: memory would grow from batch to batch.
    return x.dtype == torch.bfloat16 or is_large(len(x), width, x.dtype)


def infer_by_blocks(
    layers: Sequence[Layer],
    norm: nn.LayerNorm | None,
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    attention: Attention | None = None,
    after: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The same layers with everything between two attentions done for a block of rows at a time.

    after is told the number of each layer and the rows that leave it, in memory that the next layer uses again.

    Between attentions every row is on its own, so a block goes from one attention's output to the next one's q, k
    and v while it is in cache. Only q, k, v, the rows themselves and the attention's output exist for all tokens.
    """
    blocks = row_blocks(len(x), max(layer.linear1.out_features for layer in layers), x.dtype)
    out = x.new_empty(x.shape)
    weight, bias = layers[0].in_proj()
    in_proj, qkv = row_linear(weight, bias), x.new_empty((len(x), len(weight)))
    if layers[0].residual_of_norm:
        x = layers[0].norm1(x)
    for block in blocks:
        qkv[block] = in_proj(_asks(layers[0], x[block]))
    for i, (layer, following) in enumerate(zip(layers, [*layers[1:], None], strict=True)):
        q, k, v = qkv.view(len(x), 3, layer.num_heads, qkv.shape[1] // 3 // layer.num_heads).unbind(1)
        attended = ragged_attention(q, k, v, cu_seqlens, max_seqlen) if attention is None else attention(q, k, v)
        attended = attended.flatten(1)
        out_proj = row_linear(layer.out_proj.weight, layer.out_proj.bias)
        linear1 = row_linear(layer.linear1.weight, layer.linear1.bias, activation=layer.activation)
        linear2 = row_linear(layer.linear2.weight, layer.linear2.bias)
        if following is not None:
            weight, bias = following.in_proj()
            in_proj = row_linear(weight, bias)
            if qkv.shape[1] != len(weight):
                qkv = x.new_empty((len(x), len(weight)))
        for block in blocks:
            rows = out_proj(attended[block]).add_(x[block])
            if layer.norm_first:
                normed = layer.norm2(rows)
                rows = linear2(linear1(normed)).add_(normed if layer.residual_of_norm else rows)
            else:
                rows = layer.norm1(rows)
                rows = layer.norm2(linear2(linear1(rows)).add_(rows))
            if following is not None:
                if following.residual_of_norm:
                    rows = following.norm1(rows)
                out[block] = rows
                qkv[block] = in_proj(_asks(following, rows))
            else:
                out[block] = rows if norm is None else norm(rows)
        x = out
        if after is not None:
            after(i, x)
    return out


def _asks(layer: Layer, rows: Tensor) -> Tensor:
    """What q, k and v are made of, of rows that are normed already where the residual starts from the normed ones."""
    return layer.norm1(rows) if layer.norm_first and not layer.residual_of_norm else rows


# torch's own encoder layer has the last two; xtrimogene.dropin takes care that nothing else is in it.
_KINDS = (
    RaggedTransformerEncoder,
    RaggedTransformerEncoderLayer,
    RaggedSelfAttention,
    nn.MultiheadAttention,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
)
