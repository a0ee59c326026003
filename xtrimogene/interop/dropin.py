"""ragged_encoder: a torch.nn.TransformerEncoder or a Hugging Face BERT encoder, run over sequences laid end to end.

xtrimogene.interop.accelerate puts it behind the padded call of a whole model.

Other single-cell models are plain Transformer encoders on padded batches: Geneformer is a BERT, scGPT a
TransformerEncoder. The ragged encoder made here runs the modules that it was given, without padding, through the
kernels and the blocks of rows of xtrimogene.encoder. It has no weights of its own.

transformers is needed only by who has a BERT: its classes are recognised by name, nothing of it is imported here.
scGPT's layers for flash-attn are recognised so too, and run without it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xtrimogene.network.encoder import Attention, Layer, attend, infer_by_blocks, infers_by_blocks

__all__ = ["RaggedEncoder", "packed_embeddings", "ragged_encoder"]

_BERT = "transformers.models.bert.modeling_bert"
# Installed by transformers itself when somebody first asks for hidden states; they do nothing unless asked.
_HARMLESS_HOOKS = "transformers.utils.output_capturing"
# Attention functions of transformers that compute softmax attention under the mask that they are given.
_BERT_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", None)

# Submodule -> its type, or the names of transformers' classes. Anything else in a layer means that it computes
# something else.
_Kind = type | tuple[str, ...]
_TORCH_LAYER: Mapping[str, _Kind] = {
    "": nn.TransformerEncoderLayer,
    "self_attn": nn.MultiheadAttention,
    "self_attn.out_proj": nn.modules.linear.NonDynamicallyQuantizableLinear,
    "linear1": nn.Linear,
    "dropout": nn.Dropout,
    "linear2": nn.Linear,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
    "dropout1": nn.Dropout,
    "dropout2": nn.Dropout,
}
_BERT_LAYER: Mapping[str, _Kind] = {
    "": ("BertLayer",),
    "attention": ("BertAttention",),
    "attention.self": ("BertSelfAttention", "BertSdpaSelfAttention"),
    "attention.self.query": nn.Linear,
    "attention.self.key": nn.Linear,
    "attention.self.value": nn.Linear,
    "attention.self.dropout": nn.Dropout,
    "attention.output": ("BertSelfOutput",),
    "attention.output.dense": nn.Linear,
    "attention.output.LayerNorm": nn.LayerNorm,
    "attention.output.dropout": nn.Dropout,
    "intermediate": ("BertIntermediate",),
    "intermediate.dense": nn.Linear,
    "output": ("BertOutput",),
    "output.dense": nn.Linear,
    "output.LayerNorm": nn.LayerNorm,
    "output.dropout": nn.Dropout,
}
# scGPT's layer for flash-attn, with the attention of flash-attn 1, or inside scGPT's wrapper of it (`_impl`).
_FLASH_CLASSES = ("FlashTransformerEncoderLayer", "FlashMHA", "_FA2FlashMHA", "FlashAttention", "_FA2FlashAttention")
_FLASH_LAYER: Mapping[str, _Kind] = {
    "": ("FlashTransformerEncoderLayer",),
    "self_attn": ("FlashMHA",),
    "self_attn.Wqkv": nn.Linear,
    "self_attn.inner_attn": ("FlashAttention", "_FA2FlashAttention"),
    "self_attn.out_proj": nn.Linear,
    **{key: kind for key, kind in _TORCH_LAYER.items() if key and not key.startswith("self_attn")},
}
_FLASH_WRAPPED_LAYER: Mapping[str, _Kind] = {
    "self_attn": ("FlashMHA",),
    "self_attn._impl": ("FlashMHA", "_FA2FlashMHA"),
    **{key.replace("self_attn.", "self_attn._impl."): kind for key, kind in _FLASH_LAYER.items() if key != "self_attn"},
}
_CONVERTED = "torch.nn.TransformerEncoder, or transformers' BertModel or BertEncoder"


def ragged_encoder(module: nn.Module, *, omit_attention_dropout: bool = False) -> RaggedEncoder:
    """Another way to run the same encoder: over sequences of unequal length laid end to end, with no padding.

        encoder = ragged_encoder(module)
        y = encoder(x, cu_seqlens, max_seqlen)      # (total_nnz, dim) -> (total_nnz, dim)

    Takes a torch.nn.TransformerEncoder (any number of layers, norm_first or not, with or without biases and final norm,
    batch_first or not, relu, gelu or tanh-gelu; its layers torch's own or scGPT's FlashTransformerEncoderLayer) or a
    transformers BertModel or BertEncoder. The result for a sequence is that of the original on it alone, without a
    mask; of a BertModel it is last_hidden_state, given what its embeddings give (``packed_embeddings``). Where torch
    replaces tanh-gelu by the exact one (in its fused inference path), this does not.

    The modules are shared, not copied: training one trains the other, train(), eval() and to() act on the whole module
    that was given, and the ragged encoder's state dict has the keys of the TransformerEncoder or BertEncoder, so it
    loads both ways. Gradient checkpointing that a BERT was told to do is done.

    omit_attention_dropout  train without the dropout of attention probabilities. The ragged attention draws no random
                            mask: where a layer has such a dropout above 0, training mode is refused without this.
                            Dropout on the residual branches and after the activation works as in the original.

    Raises TypeError for another class of module, and ValueError with all reasons for a module of these classes that
    computes something else: causal or cross-attention, relative positions, another activation, layers, norms or linear
    maps of a class of their own, hooks, quantised or other unusual weights, appended keys (add_bias_kv, add_zero_attn).
    """
    if not _is_convertible(module):
        inside = next((name for name, part in module.named_modules() if _is_convertible(part)), None)
        hint = f"; pass its submodule .{inside}" if inside else ""
        raise TypeError(
            f"module: expected {_CONVERTED}, not a class derived from them, got {_class_name(module)}{hint}"
        )
    encoder = view(module, omit_attention_dropout)
    kind = own_class(module)
    # Hooks on the outermost module are not among its layers.
    reasons = [*_touched("", module, kind), *encoder.not_supported_reasons()]
    if kind.__name__ == "BertModel":
        reasons += _touched("encoder", cast(nn.Module, module.encoder), ("BertEncoder",))
    if reasons:
        raise ValueError(f"module: cannot be run as a ragged encoder: {'; '.join(reasons)}")
    return encoder


def view(module: nn.Module, omit_attention_dropout: bool = False) -> RaggedEncoder:
    """What ragged_encoder makes of a module of one of its classes, whether or not that can be run; or of one layer."""
    if own_class(module) is nn.TransformerEncoder:
        return _RaggedTorchEncoder(module, omit_attention_dropout)
    if own_class(module) is nn.TransformerEncoderLayer:
        alone: Any = SimpleNamespace(layers=nn.ModuleList([module]), norm=None, training=module.training)
        return _RaggedTorchEncoder(alone, omit_attention_dropout)
    return _RaggedBertEncoder(module, omit_attention_dropout)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, of an accelerated one the class that it had before."""
    return getattr(type(module), "accelerates", type(module))


class RaggedEncoder(nn.Module):
    """What ``ragged_encoder`` makes: the layers of another module, run over sequences laid end to end."""

    def __init__(self, source: nn.Module, omit_attention_dropout: bool) -> None:
        super().__init__()
        self.omit_attention_dropout = omit_attention_dropout
        # In a tuple, where it is no child: the keys of the state dict are those of the layers.
        self._source = (source,)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        """Encode every segment of x by itself.

        x           (total_nnz, dim), the dtype of the weights (under autocast: any that the layers take)
        cu_seqlens  (batch + 1,) int32; segment c owns rows cu_seqlens[c]:cu_seqlens[c + 1]
        max_seqlen  length of the longest segment; None: read from cu_seqlens, for which a GPU has to be waited for
        returns     (total_nnz, dim); rows past cu_seqlens[-1] belong to no sequence and mean nothing

        Raises ValueError or TypeError for a wrong shape, dtype or device, or offsets that do not fit x; and ValueError
        in training mode with dropout of attention probabilities, or when the modules were changed since the conversion
        into something that ``ragged_encoder`` refuses.
        """
        if not torch.compiler.is_compiling():
            reasons = [*self._replaced(), *self.not_supported_reasons()]
            if reasons:
                raise ValueError(f"the modules of this ragged encoder were changed: {'; '.join(reasons)}")
        layers = self.parts()
        weight = layers[0].linear1.weight
        dim = weight.shape[1]
        if x.dim() != 2 or x.shape[1] != dim:
            raise ValueError(f"x: expected shape (total_nnz, {dim}), got {tuple(x.shape)}")
        if x.device != weight.device:
            raise ValueError(f"x: expected device {weight.device}, that of the weights, got {x.device}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: expected dtype {weight.dtype}, that of the weights, got {x.dtype}")
        dropout = self.attention_dropout()
        if dropout > 0:
            raise ValueError(
                f"dropout of attention probabilities is {dropout}, and the ragged attention draws no mask: call "
                "eval(), set it to 0 in the layers, or convert with omit_attention_dropout=True to train without it"
            )
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
        return self.run(layers, x, cu_seqlens, max_seqlen)

    def run(
        self,
        layers: list[Layer],
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        attention: Attention | None = None,
        after: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """The layers and the final norm, unchecked; attention, if given, in place of the one inside each segment.

        after is told the number of each layer and the rows that leave it, in memory that may be used again.
        """
        norm = self.final_norm()
        leaves = tuple(module for module in self.modules() if module._parameters or isinstance(module, nn.Dropout))
        if infers_by_blocks(x, leaves, max(layer.linear1.out_features for layer in layers)):
            return infer_by_blocks(layers, norm, x, cu_seqlens, max_seqlen, attention, after)
        for i, layer in enumerate(layers):
            checkpoint = self._checkpoint(i)
            arguments = (x, cu_seqlens, max_seqlen, attention)
            x = layer(*arguments) if checkpoint is None else checkpoint(layer, *arguments)
            if after is not None:
                after(i, x)
        return x if norm is None else norm(x)

    def attention_dropout(self) -> float:
        """Probability of dropout of attention probabilities that the modules ask for as they are now, 0 if omitted."""
        return 0.0 if self.omit_attention_dropout else max(self._attention_dropouts())

    def not_supported_reasons(self) -> list[str]:
        """Why the modules cannot be run as they are now; empty where they can."""
        raise NotImplementedError

    def parts(self) -> list[Layer]:
        """The layers, each with the modules that it has now."""
        raise NotImplementedError

    def final_norm(self) -> nn.LayerNorm | None:
        """The norm after the last layer."""
        return None

    def train(self, mode: bool = True) -> RaggedEncoder:
        """train() of the whole module that was converted: the embeddings of a BertModel follow."""
        self._source[0].train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RaggedEncoder:
        # The layers are part of the source.
        self._source[0]._apply(fn, recurse)
        return self

    def _replaced(self) -> Iterator[str]:
        """Children that the source no longer has: what is run here would not be what it runs."""
        source: Any = self._source[0]
        encoder = source.encoder if own_class(source).__name__ == "BertModel" else source
        for name, part in self._modules.items():
            if getattr(encoder, name, None) is not part:
                yield f"{name} was replaced in the original (convert it again)"

    def _attention_dropouts(self) -> Iterable[float]:
        """Probability of dropout of attention probabilities in each layer, in its present mode."""
        raise NotImplementedError

    def _checkpoint(self, layer: int) -> Callable[..., Tensor] | None:
        """What runs a layer so that its activations are computed again in the backward; None to keep them."""
        return None


class _RaggedTorchEncoder(RaggedEncoder):
    def __init__(self, module: Any, omit_attention_dropout: bool) -> None:
        super().__init__(module, omit_attention_dropout)
        self.layers, self.norm = module.layers, module.norm
        self.training = module.training

    def not_supported_reasons(self) -> list[str]:
        reasons = _layer_reasons("layers", self.layers, _torch_kinds(self.layers), "activation")
        if self.norm is not None:
            reasons += _touched("norm", self.norm, nn.LayerNorm)
        for name, layer in self.layers.named_children():
            name = f"layers.{name}"
            if is_flash(layer):
                reasons += _flash_reasons(name, layer)
            elif own_class(layer) is not nn.TransformerEncoderLayer:
                continue
            elif isinstance(layer.self_attn, nn.MultiheadAttention):
                attention = layer.self_attn
                if attention.in_proj_weight is None:
                    reasons.append(f"{name}.self_attn has keys or values of another width (kdim, vdim)")
                if attention.bias_k is not None or attention.add_zero_attn:
                    reasons.append(f"{name}.self_attn appends a key to every sequence (add_bias_kv or add_zero_attn)")
            activation = getattr(layer, "activation", None)
            if _torch_activation(activation) is None:
                reasons.append(f"{name}.activation is {_described(activation)}, expected relu or gelu")
        return reasons

    def parts(self) -> list[Layer]:
        return [_flash_layer(layer) if is_flash(layer) else _torch_layer(layer) for layer in cast(Any, self.layers)]

    def final_norm(self) -> nn.LayerNorm | None:
        return cast(nn.LayerNorm | None, self.norm)

    def _attention_dropouts(self) -> Iterable[float]:
        for layer in cast(Any, self.layers):
            attention = _flash_attention(layer).inner_attn if is_flash(layer) else layer.self_attn
            yield (attention.dropout_p if is_flash(layer) else attention.dropout) if attention.training else 0.0


class _RaggedBertEncoder(RaggedEncoder):
    def __init__(self, module: Any, omit_attention_dropout: bool) -> None:
        super().__init__(module, omit_attention_dropout)
        encoder = module.encoder if own_class(module).__name__ == "BertModel" else module
        self.layer = encoder.layer
        self.training = encoder.training

    def not_supported_reasons(self) -> list[str]:
        reasons = _layer_reasons("layer", self.layer, _BERT_LAYER, "intermediate.intermediate_act_fn")
        layer: Any
        for i, layer in enumerate(cast(Any, self.layer)):
            name = f"layer.{i}"
            if not is_bert_class(type(layer), "BertLayer"):
                continue
            attention = getattr(layer.attention, "self", None)
            if layer.is_decoder or getattr(attention, "is_causal", False):
                reasons.append(f"{name} attends causally (is_decoder)")
            if hasattr(layer, "crossattention"):
                reasons.append(f"{name} has cross-attention")
            reasons += _bert_attention_reasons(f"{name}.attention.self", attention)
            # transformers before 5 has relative positions, added to the scores.
            positions = getattr(attention, "position_embedding_type", None) or "absolute"
            if positions != "absolute":
                reasons.append(f"{name} has relative positions (position_embedding_type {positions!r})")
            activation = getattr(layer.intermediate, "intermediate_act_fn", None)
            if _bert_activation(activation) is None:
                reasons.append(f"{name}.intermediate has activation {_described(activation)}, expected relu or gelu")
        return [*reasons, *self._config_reasons()]

    def _config_reasons(self) -> Iterator[str]:
        """What transformers reads from the configuration at every call."""
        holders = [self._source[0], *(part for part in self.modules() if hasattr(part, "config"))]
        configs: dict[int, Any] = {id(part.config): part.config for part in holders}
        for config in configs.values():
            if getattr(config, "is_decoder", False):
                yield "its config asks for causal attention (is_decoder)"
            if (getattr(config, "position_embedding_type", None) or "absolute") != "absolute":
                yield f"its config asks for relative positions ({config.position_embedding_type!r})"
            name = getattr(config, "_attn_implementation", None)
            # Anyone may register a function, under a known name too.
            registered: Any = getattr(sys.modules.get(_BERT), "ALL_ATTENTION_FUNCTIONS", {})
            function = registered.get(name)
            own = function is None or function.__module__.startswith("transformers.")
            if name not in _BERT_ATTENTION or not own:
                yield f"its config asks for the attention function {name!r}, which is not one of transformers' own"

    def parts(self) -> list[Layer]:
        return [_bert_layer(layer) for layer in cast(Any, self.layer)]

    def _attention_dropouts(self) -> Iterable[float]:
        for layer in cast(Any, self.layer):
            # transformers reads the mode of the attention, not that of the dropout in it.
            attention = layer.attention.self
            yield attention.dropout.p if attention.training else 0.0

    def _checkpoint(self, layer: int) -> Callable[..., Tensor] | None:
        module = cast(Any, self.layer)[layer]
        if getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled():
            return module._gradient_checkpointing_func
        return None


def packed_embeddings(
    bert: nn.Module, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None = None
) -> Tensor:
    """What the ragged encoder of a transformers BertModel takes: its embeddings of sequences laid end to end.

    input_ids       (total_nnz,) int32 or int64, the tokens of all sequences
    cu_seqlens      (batch + 1,) int32; positions count from 0 in every sequence
    token_type_ids  (total_nnz,) int32 or int64; None for zeros
    returns         (total_nnz, dim), what bert.embeddings gives for each sequence (with its dropout in training mode)

    Raises TypeError for another module than a BertModel, and ValueError for a wrong shape, offsets that do not fit, or
    a sequence longer than the position table.
    """
    if not (_is_convertible(bert) and own_class(bert).__name__ == "BertModel"):
        raise TypeError(f"bert: expected transformers' BertModel, got {_class_name(bert)}")
    total = input_ids.numel()
    for name, ids in (("input_ids", input_ids), ("token_type_ids", token_type_ids)):
        if ids is not None and tuple(ids.shape) != (total,):
            raise ValueError(f"{name}: expected shape ({total},), one id for each token, got {tuple(ids.shape)}")
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[-1]) != total or int(cu_seqlens[0]) != 0 or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens: expected to rise from 0 to the number of input_ids = {total}, got {cu_seqlens}")
    embeddings: Any = bert.embeddings
    limit = embeddings.position_embeddings.num_embeddings
    if total and int(lengths.max()) > limit:
        raise ValueError(f"input_ids: expected sequences of at most {limit} tokens, got one of {int(lengths.max())}")
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths)
    positions = torch.arange(total, device=input_ids.device) - starts
    types = torch.zeros_like(positions) if token_type_ids is None else token_type_ids
    # One batch row with the positions of many sequences: the embeddings look at nothing else.
    return embeddings(input_ids=input_ids[None], token_type_ids=types[None], position_ids=positions[None])[0]


def _torch_layer(layer: Any) -> Layer:
    attention = layer.self_attn

    def in_proj() -> tuple[Tensor, Tensor | None]:
        return attention.in_proj_weight, attention.in_proj_bias

    return Layer(
        attention.num_heads,
        in_proj,
        _attend(in_proj, attention.num_heads, attention.out_proj),
        attention.out_proj,
        layer.norm1,
        layer.linear1,
        layer.linear2,
        layer.norm2,
        cast(str, _torch_activation(layer.activation)),
        layer.norm_first,
        (layer.dropout1, layer.dropout, layer.dropout2),
    )


def is_flash(layer: nn.Module) -> bool:
    """Whether this is scGPT's layer for flash-attn."""
    return type(layer).__name__ == "FlashTransformerEncoderLayer"


def _torch_kinds(layers: nn.Module) -> Mapping[str, _Kind]:
    """What the layers of a TransformerEncoder have to consist of, by what the first one is."""
    first: Any = next(layers.children(), None)
    if not is_flash(first):
        return _TORCH_LAYER
    return _FLASH_WRAPPED_LAYER if hasattr(getattr(first, "self_attn", None), "_impl") else _FLASH_LAYER


def _flash_attention(layer: Any) -> Any:
    return getattr(layer.self_attn, "_impl", layer.self_attn)


def _flash_reasons(name: str, layer: Any) -> Iterator[str]:
    attention = _flash_attention(layer)
    if any(getattr(part, "causal", False) for part in (layer.self_attn, attention)):
        yield f"{name}.self_attn attends causally (causal)"
    weight = getattr(getattr(attention, "Wqkv", None), "weight", None)
    if weight is not None and weight.shape[0] != 3 * weight.shape[1]:
        yield f"{name}.self_attn has keys and values of another width (Wqkv {tuple(weight.shape)})"
    scale = getattr(getattr(attention, "inner_attn", None), "softmax_scale", None)
    if weight is not None and scale not in (None, (weight.shape[1] // attention.num_heads) ** -0.5):
        yield f"{name}.self_attn scales the scores by {scale}, expected one by the root of the head width"
    if layer.norm_scheme not in ("pre", "post"):
        yield f"{name}.norm_scheme is {layer.norm_scheme!r}, expected 'pre' or 'post'"


def _flash_layer(layer: Any) -> Layer:
    attention = _flash_attention(layer)

    def in_proj() -> tuple[Tensor, Tensor | None]:
        return attention.Wqkv.weight, attention.Wqkv.bias

    # Its "pre" is not that of torch: the residual branches start from the normed rows.
    return Layer(
        attention.num_heads,
        in_proj,
        _attend(in_proj, attention.num_heads, attention.out_proj),
        attention.out_proj,
        layer.norm1,
        layer.linear1,
        layer.linear2,
        layer.norm2,
        cast(str, _torch_activation(layer.activation)),
        layer.norm_scheme == "pre",
        (layer.dropout1, layer.dropout, layer.dropout2),
        residual_of_norm=layer.norm_scheme == "pre",
    )


def _bert_layer(layer: Any) -> Layer:
    attention = layer.attention.self
    maps = (attention.query, attention.key, attention.value)

    def in_proj() -> tuple[Tensor, Tensor | None]:
        biases = [part.bias for part in maps if part.bias is not None]
        return torch.cat([part.weight for part in maps]), torch.cat(biases) if biases else None

    return Layer(
        attention.num_attention_heads,
        in_proj,
        _attend(in_proj, attention.num_attention_heads, layer.attention.output.dense),
        layer.attention.output.dense,
        layer.attention.output.LayerNorm,
        layer.intermediate.dense,
        layer.output.dense,
        layer.output.LayerNorm,
        cast(str, _bert_activation(layer.intermediate.intermediate_act_fn)),
        False,
        (layer.attention.output.dropout, None, layer.output.dropout),
    )


def _bert_attention_reasons(name: str, attention: Any) -> list[str]:
    maps: list[Any] = [getattr(attention, key, None) for key in ("query", "key", "value")]
    if not all(type(part) is nn.Linear for part in maps):
        return []
    reasons = []
    if len({(part.out_features, part.bias is None) for part in maps}) > 1:
        reasons.append(f"{name}: query, key and value differ in width, or in whether they have a bias")
    scaling = getattr(attention, "scaling", None)
    if scaling is not None and scaling != (maps[0].out_features // attention.num_attention_heads) ** -0.5:
        reasons.append(f"{name} scales the scores by {scaling}, expected one by the root of the head width")
    return reasons


def _attend(
    in_proj: Callable[[], tuple[Tensor, Tensor | None]], num_heads: int, out_proj: nn.Linear
) -> Callable[..., Tensor]:
    return lambda x, *where: out_proj(attend(x, in_proj(), num_heads, *where))


def _torch_activation(activation: object) -> str | None:
    if activation is F.relu or type(activation) is nn.ReLU:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if isinstance(activation, functools.partial) and activation.func is F.gelu and not activation.args:
        return {"{}": "gelu", "{'approximate': 'none'}": "gelu", "{'approximate': 'tanh'}": "gelu_tanh"}.get(
            str(activation.keywords)
        )
    return None


def _bert_activation(activation: object) -> str | None:
    kind = type(activation)
    if kind.__module__ == "transformers.activations":
        # gelu_new, gelu_fast, gelu_accurate and gelu_pytorch_tanh are ways to write one formula.
        names = {"GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
        names |= dict.fromkeys(("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation"), "gelu_tanh")
        return names.get(kind.__name__)
    return _torch_activation(activation)


def is_bert_class(kind: type, *names: str) -> bool:
    """Whether this is one of transformers' classes of these names."""
    return kind.__module__ == _BERT and kind.__name__ in names


def capture_hooks() -> dict[str, Any] | None:
    """What transformers 5 is collecting from hooks in this call of a model: {"hidden_states": [...]}; None for nothing
    and before 5."""
    collector = getattr(sys.modules.get(_HARMLESS_HOOKS), "_active_collector", None)
    return None if collector is None else collector.get()


def _is_convertible(module: object) -> bool:
    kind = getattr(type(module), "accelerates", type(module))
    return kind is nn.TransformerEncoder or is_bert_class(kind, "BertModel", "BertEncoder")


def _described(x: object) -> str:
    return getattr(x, "__qualname__", None) or _class_name(x)


def _class_name(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


def _layer_reasons(root: str, layers: nn.Module, expected: Mapping[str, _Kind], activation: str) -> list[str]:
    """Reasons of the tree: modules of other classes, modules too many, hooks and weights."""
    reasons = _touched(root, layers, nn.ModuleList)
    if not reasons and not len(cast(nn.ModuleList, layers)):
        reasons.append(f"{root}: expected at least one layer")
    for index, layer in layers.named_children():
        name = f"{root}.{index}"
        own = _touched(name, layer, expected[""])
        reasons += own
        # Of a layer of another class, what it is made of says nothing more.
        if not _is_kind(layer, expected[""]):
            continue
        found = dict(layer.named_modules(remove_duplicate=False))
        for path, kind in expected.items():
            if path and path in found:
                reasons += _touched(f"{name}.{path}", found[path], kind)
            elif path:
                reasons.append(f"{name} has no {path}")
        if activation in found:
            # Its class is judged by whoever knows the activations.
            reasons += _touched(f"{name}.{activation}", found[activation], type(found[activation]))
        for path, part in found.items():
            # Cross-attention, and what is inside modules of another class, are reasons of their own.
            known = path in expected or path == activation or path.startswith("crossattention")
            parent = path.rpartition(".")[0]
            if not known and (parent not in expected or _is_kind(found[parent], expected[parent])):
                reasons.append(f"{name}.{path} ({_described(part)}) is no part of such a layer")
    return reasons


def _is_kind(module: nn.Module, kind: _Kind) -> bool:
    if not isinstance(kind, tuple):
        return own_class(module) is kind
    if is_bert_class(own_class(module), *kind):
        return True
    return type(module).__name__ in kind and type(module).__name__ in _FLASH_CLASSES


def _touched(name: str, module: nn.Module, kind: _Kind) -> list[str]:
    """Why a module does not compute what its class does, or is of another class."""
    name = name or "the module"
    if not _is_kind(module, kind):
        wanted = " or ".join(kind) if isinstance(kind, tuple) else kind.__name__
        return [f"{name}: expected a plain {wanted}, got {_class_name(module)}"]
    reasons = []
    for hooks in (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    ):  # fmt: skip
        if any(getattr(hook, "__module__", "") != _HARMLESS_HOOKS for hook in hooks.values()):
            reasons.append(f"{name} has hooks, which would not be called")
            break
    if "forward" in vars(module):
        reasons.append(f"{name} has a forward of its own")
    for key, parameter in module._parameters.items():
        if parameter is not None and (type(parameter) is not nn.Parameter or not parameter.is_floating_point()):
            reasons.append(
                f"{name}.{key} is a {type(parameter).__name__} of {parameter.dtype}, expected a plain float Parameter"
            )
    return reasons
