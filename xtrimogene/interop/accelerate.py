"""accelerate: the encoders inside somebody's model, run without padding behind the padded calls that the model makes.

An accelerated encoder is the object that it was, with a class derived from its own whose forward takes the padding
out, runs the layers over sequences laid end to end (xtrimogene.interop.dropin) and puts it back in. So its children,
the keys of its state dict, hooks on it and references to it stay. What cannot be run so is left to its own forward.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xtg_kernels import ragged_attention
from xtrimogene.interop.dropin import RaggedEncoder, capture_hooks, is_bert_class, is_flash, own_class, view
from xtrimogene.network.encoder import Attention, Layer

__all__ = ["Accelerated", "accelerate"]

# A float mask is added to the scores. From here down what it is added to has no weight in any softmax of float32.
_EXCLUDES = -1e4
# What a BertEncoder may be given that changes nothing of what it computes.
_HARMLESS = ("position_ids", "cache_position", "return_dict", "output_hidden_states", "num_items_in_batch")


def accelerate(model: nn.Module, *, padded_rows: bool = True, omit_attention_dropout: bool = False) -> Accelerated:
    """Run the Transformer encoders inside a model without padding, in place; the model is called as before.

        handle = accelerate(model)      # print(handle) says what was taken, what was left, and why
        handle.remove()                 # or: with accelerate(model): ...

    Takes every torch.nn.TransformerEncoder (layers of torch or scGPT's FlashTransformerEncoderLayer, batch first or
    not), every torch.nn.TransformerEncoderLayer, also where a model calls one by itself, and every BertEncoder of
    transformers that ``ragged_encoder`` can run, wherever in the model they are. Results and gradients are those of the
    model as it was, at places of padding too. Parameters, state dicts, hooks around an encoder, train(), eval(), to(),
    autocast, gradient checkpointing, torch.compile (with a graph break), copies and pickles go on as before; inference
    under autocast runs in its dtype, which torch's fused path does not heed. A checkpoint with scGPT's names for
    flash-attn (Wqkv) loads into torch's layers.

    A call that cannot be run so (a mask between places, causal attention, attention weights asked for, modules
    replaced or hooked inside the encoder, dropout of attention probabilities in training) is run as it was, and a
    RuntimeWarning says so and why. A float mask whose numbers exclude no key, as the ones that UCE adds at padding, is
    added to the scores as it was: padding is then attended to, and has to be computed.

    padded_rows             False: places of padding are not computed but filled as torch's fused inference path fills
                            them, with zeros before the final norm. Faster where there is much padding, and right for a
                            model that looks at no such place, as most; a backward through one raises RuntimeError.
    omit_attention_dropout  train without the dropout of attention probabilities, as in ``ragged_encoder``

    Raises TypeError if model is no module, and ValueError with all reasons if nothing in it can be taken. If only a
    part can, a RuntimeWarning tells what was left.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    taken: dict[str, nn.Module] = {}
    left: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") or not other for other in (*taken, *left)):
            continue
        reasons = _reasons(module)
        if reasons:
            left[name] = reasons
        elif reasons is not None:
            taken[name] = module
    told = "; ".join(f"{_shown(name)}: {reason}" for name, reasons in left.items() for reason in reasons)
    if not taken:
        told = told or "no torch.nn.TransformerEncoder and no BertEncoder is in it"
        raise ValueError(f"model: nothing in it can be accelerated: {told}")
    if left:
        warnings.warn(f"left as they were: {told}", RuntimeWarning, stacklevel=2)
    handle = Accelerated(taken, left)
    for name, module in taken.items():
        handle._take(module, _Options(_shown(name), padded_rows, omit_attention_dropout))
    return handle


class Accelerated:
    """What ``accelerate`` did: taken (names of encoders), left (name -> reasons), and how to undo it."""

    def __init__(self, taken: dict[str, nn.Module], left: dict[str, list[str]]) -> None:
        self.taken, self.left = tuple(_shown(name) for name in taken), left
        self._undo: list[Callable[[], None]] = []

    def remove(self) -> None:
        """Give the encoders their own forward back; the second time it does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()

    def __repr__(self) -> str:
        lines = [f"accelerated: {', '.join(self.taken)}"]
        lines += [f"left as it was: {_shown(name)}: {'; '.join(reasons)}" for name, reasons in self.left.items()]
        return "\n".join(lines)

    def _take(self, module: nn.Module, options: _Options) -> None:
        plain: Any = type(module)
        module.__class__ = _accelerated(plain)
        cast(Any, module)._ragged = options

        def undo() -> None:
            module.__class__ = plain
            del cast(Any, module)._ragged

        self._undo.append(undo)
        if plain is nn.TransformerEncoder:
            self._undo.append(module.register_load_state_dict_pre_hook(_spell_keys).remove)
            for layer in cast(Any, module.layers):
                if type(layer) is nn.TransformerEncoderLayer:
                    # For who calls the layers one by one. What cannot be run so the encoder has said already.
                    self._take(layer, options._replace(name=""))


class _Options(NamedTuple):
    name: str  # in warnings; empty to give none
    padded_rows: bool
    omit_attention_dropout: bool


def _shown(name: str) -> str:
    return name or "the model itself"


def _reasons(module: nn.Module) -> list[str] | None:
    """Why an encoder cannot be taken, empty where it can; None for a module that is no encoder."""
    kind = own_class(module)
    if kind is not type(module):
        return ["is accelerated already"]
    if kind in _FORWARDS or is_bert_class(kind, "BertEncoder"):
        own = ["has a forward of its own"] if "forward" in vars(module) else []
        return own + view(module).not_supported_reasons()
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(module, (nn.TransformerDecoder, nn.TransformerDecoderLayer)):
        return [f"a {name} attends causally or to another sequence"]
    others = (*_FORWARDS, nn.MultiheadAttention)
    # Those of transformers' other models, and scGPT's with linear attention.
    theirs = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith(("Encoder", "Decoder"))
    if isinstance(module, others) or theirs or kind.__name__ == "FastTransformerEncoderWrapper":
        return [f"expected a plain torch.nn.TransformerEncoder or BertEncoder, got {name}"]
    return None


@functools.cache
def _accelerated(plain: Any) -> Any:
    """The class of an accelerated encoder of a class."""
    bases = (_FORWARDS.get(plain, _BertForward), plain)
    return type(f"Accelerated{plain.__name__}", bases, {"accelerates": plain, "__module__": __name__})


def _restored(plain: Any) -> Any:
    kind = _accelerated(plain)
    return kind.__new__(kind)


class _Forward(nn.Module):
    accelerates: type[nn.Module]
    _ragged: _Options

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Its class is made when it is first needed: no pickle finds it by name.
        return _restored, (self.accelerates,), dict(vars(self))


class _TransformerForward(_Forward):
    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        compiled = torch.compiler.is_compiling()
        run = torch.compiler.disable(_run_transformer) if compiled else _run_transformer
        out = run(self, src, mask, src_key_padding_mask, is_causal, compiled)
        return super().forward(src, mask, src_key_padding_mask, is_causal) if out is None else out


class _LayerForward(_Forward):
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        compiled = torch.compiler.is_compiling()
        run = torch.compiler.disable(_run_transformer) if compiled else _run_transformer
        out = run(self, src, src_mask, src_key_padding_mask, is_causal, compiled)
        return super().forward(src, src_mask, src_key_padding_mask, is_causal) if out is None else out


class _BertForward(_Forward):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = torch.compiler.disable(_run_bert) if torch.compiler.is_compiling() else _run_bert
        out = run(self, args, kwargs)
        return super().forward(*args, **kwargs) if out is None else out


_FORWARDS: dict[type, type[_Forward]] = {
    nn.TransformerEncoder: _TransformerForward,
    nn.TransformerEncoderLayer: _LayerForward,
}


def _run_transformer(
    encoder: Any, src: Tensor, mask: Tensor | None, key_mask: Tensor | None, is_causal: bool | None, compiled: bool
) -> Tensor | None:
    """What a TransformerEncoder or a layer returns; None where its own forward has to be called."""
    options: _Options = encoder._ragged
    ragged = view(encoder, options.omit_attention_dropout)
    reasons = ragged.not_supported_reasons()
    if reasons:
        _warn(options, reasons)
        return None
    whole = own_class(encoder) is nn.TransformerEncoder
    first = encoder.layers[0] if whole else encoder
    if src.is_nested or src.dim() not in (2, 3) or not _fits(src, ragged):
        return None  # its own message, or its own way with nested tensors
    batch_first = src.dim() == 2 or bool(first.self_attn.batch_first)
    x = src[None] if src.dim() == 2 else src
    shape = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    if key_mask is not None:
        if key_mask.dim() != src.dim() - 1 or key_mask.numel() != shape[0] * shape[1]:
            return None
        key_mask = key_mask.view(shape)
    flash = is_flash(first)
    fused = not flash and _is_fused(first, src)
    keys = _keys(key_mask, shape, src.device, plain=flash or fused)
    reasons = [*_between(mask, is_causal), *_dropout(ragged), *_empty(keys)]
    if reasons:
        _warn(options, reasons)
        return None
    places = _Places(*keys, batch_first)
    zeroed = whole and fused and key_mask is not None and mask is None and encoder.use_nested_tensor and not compiled
    if zeroed and getattr(encoder, "mask_check", True):
        zeroed = places.left_aligned()
    layers = ragged.parts()
    if fused and src.device.type == "cpu":
        # torch's fused layers know one GELU, the exact one.
        layers = [dataclasses.replace(x, activation=x.activation.removesuffix("_tanh")) for x in layers]
    # The attention of flash-attn gives zeros to padding, which is what the ragged one does with rows of no sequence.
    out = _run(ragged, layers, x, places, options.padded_rows and not zeroed, asks=not flash)
    return out[0] if src.dim() == 2 else out


def _run_bert(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a BertEncoder returns; None where its own forward has to be called."""
    options: _Options = encoder._ragged
    given = inspect.signature(encoder.accelerates.forward).bind(encoder, *args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    x, mask = given["hidden_states"], given.get("attention_mask")
    ragged = view(encoder, options.omit_attention_dropout)
    reasons = ragged.not_supported_reasons()
    capturing = capture_hooks()
    asked = {key for key, value in given.items() if _is_given(value)}
    asked |= {"output_attentions"} if any("attentions" in key for key in capturing or ()) else set()
    known = {"self", "hidden_states", "attention_mask", *_HARMLESS}
    reasons += [f"{key} is given or asked for" for key in sorted(asked - known)]
    if not reasons and (x.dim() != 3 or not _fits(x, ragged)):
        return None
    keys = None if reasons else _keys_of_bert(mask, x, getattr(encoder.config, "_attn_implementation", None))
    if isinstance(keys, str):
        reasons.append(f"attention_mask {keys}")
    elif keys is not None:
        reasons += [*_dropout(ragged), *_empty(keys)]
    if reasons:
        _warn(options, reasons)
        return None
    states = [x] if capturing or given.get("output_hidden_states") else None
    places = _Places(*cast(tuple[Tensor, Tensor | None], keys), True)
    out = _run(ragged, ragged.parts(), x, places, options.padded_rows, states=states)
    made = sys.modules[encoder.accelerates.__module__].BaseModelOutputWithPastAndCrossAttentions
    if states is None:
        output = made(last_hidden_state=out)
    elif capturing is None:
        output = made(last_hidden_state=out, hidden_states=tuple(states))
    else:
        # transformers 5 takes hidden states by hooks on the layers, which nobody called.
        for layer, before, after in zip(encoder.layer, states, states[1:], strict=False):
            for hook in layer._forward_hooks.values():
                hook(layer, (before,), after)
        output = made(last_hidden_state=out)
    return output if given.get("return_dict", True) else output.to_tuple()


def _is_given(value: Any) -> bool:
    """Whether an argument asks for anything: transformers hands over [None, None] for no masks of heads."""
    if isinstance(value, (list, tuple)):
        return any(item is not None for item in value)
    return value is not None and value is not False


def _warn(options: _Options, reasons: Sequence[str]) -> None:
    if options.name:
        told = f"{options.name} runs as it was, with padding: {'; '.join(reasons)}"
        warnings.warn(told, RuntimeWarning, stacklevel=4)


def _fits(x: Tensor, ragged: RaggedEncoder) -> bool:
    weight = ragged.parts()[0].linear1.weight
    same = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    return x.numel() > 0 and x.shape[-1] == weight.shape[1] and x.device == weight.device and same


def _dropout(ragged: RaggedEncoder) -> list[str]:
    dropout = ragged.attention_dropout()
    told = f"dropout of attention probabilities is {dropout} (omit_attention_dropout=True trains without it)"
    return [told] if dropout else []


def _between(mask: Tensor | None, is_causal: bool | None) -> Iterator[str]:
    if is_causal:
        yield "is_causal asks for causal attention"
    elif mask is not None and bool((mask != 0).any()):
        yield "mask sets what a place may attend to"


def _keys(
    mask: Tensor | None, shape: Any, device: torch.device, *, plain: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(batch, length) bool, the keys that are not masked out; and (batch, length) float, what is added to the scores of
    these, if anything is. With plain whatever is not 0 masks out."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device), None
    if mask.dtype == torch.bool:
        return ~mask, None
    kept = mask == 0
    used = kept if plain else ~(mask <= _EXCLUDES)
    return used, None if bool((kept == used).all()) else mask


def _empty(keys: tuple[Tensor, Tensor | None]) -> list[str]:
    return [] if bool(keys[0].any(1).all()) else ["a sequence is masked out as a whole"]


def _keys_of_bert(mask: Tensor | None, x: Tensor, attention: str | None) -> tuple[Tensor, Tensor | None] | str:
    """The same of what a BertModel hands to its encoder, or what is wrong with it."""
    shape = x.shape[:2]
    if mask is None:
        return _keys(None, shape, x.device)
    if mask.dim() == 2 and mask.shape == shape and (attention or "").startswith("flash"):
        return _keys(mask == 0, shape, x.device)
    if mask.dim() != 4 or mask.shape[-1] != shape[1] or mask.shape[0] not in (1, shape[0]):
        return f"has shape {tuple(mask.shape)}, expected (batch, 1, 1 or length, length)"
    row = mask[:, :1, :1]
    if not torch.equal(mask, row.expand_as(mask)):
        return "differs between places or heads"
    keys = row[:, 0, 0].expand(shape)
    if keys.dtype == torch.bool and attention != "eager":
        return _keys(~keys, shape, x.device)
    # The eager attention adds what it is given, True for 1.
    return _keys(keys.to(x.dtype), shape, x.device)


def _is_fused(layer: Any, src: Tensor) -> bool:
    """Whether torch.nn.TransformerEncoderLayer takes its fused inference path."""
    attention = layer.self_attn
    tensors = (src, *layer.parameters())
    return bool(
        torch.backends.mha.get_fastpath_enabled()
        and src.dim() == 3
        and not layer.training
        and attention.batch_first
        and attention.in_proj_bias is not None
        and layer.activation_relu_or_gelu
        and layer.norm1.eps == layer.norm2.eps
        and attention.num_heads % 2 == 0
        and not torch.is_autocast_enabled()
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


class _Places:
    """Where the rows of a padded batch go when sequences are laid end to end, padding last.

    used         (batch, length) bool
    added        (batch, length), what the scores of these keys get besides, or None
    batch_first  the batch is (batch, length, dim), otherwise (length, batch, dim)
    """

    def __init__(self, used: Tensor, added: Tensor | None, batch_first: bool) -> None:
        self._used, self._batch_first = used, batch_first
        self.added = None if added is None else added[used]
        self.lengths: list[int] = used.sum(1).tolist()
        self.padding = [used.shape[1] - length for length in self.lengths]
        self.max_seqlen = max(self.lengths)
        ends = [0, *itertools.accumulate(self.lengths)]
        self.cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=used.device)

    def left_aligned(self) -> bool:
        """Whether all padding comes after its sequence."""
        ends = self.cu_seqlens.diff()[:, None]
        return bool((self._used == (torch.arange(self._used.shape[1], device=ends.device) < ends)).all())

    def index(self) -> tuple[Tensor, Tensor]:
        """Rows of the batch (as one of batch * length rows) that hold the sequences, and those that hold padding."""
        used = self._used.flatten()
        return self._rows(used.nonzero()[:, 0]), self._rows((~used).nonzero()[:, 0])

    def _rows(self, slots: Tensor) -> Tensor:
        if self._batch_first:
            return slots
        batch, length = self._used.shape
        return slots % length * batch + slots // length

    def in_order(self) -> bool:
        """Whether the rows lie end to end as they are."""
        return self._batch_first and not any(self.padding)


def _run(
    ragged: RaggedEncoder,
    layers: list[Layer],
    x: Tensor,
    places: _Places,
    padded_rows: bool,
    *,
    asks: bool = True,
    states: list[Tensor] | None = None,
) -> Tensor:
    """The layers over a padded batch (batch, length, dim) or (length, batch, dim), in the shape of x.

    padded_rows  compute padding too; otherwise it is filled
    asks         rows of padding attend to the sequence beside them; otherwise to nothing
    states       is given the rows that leave each layer, in the shape of x
    """
    flat = x.reshape(-1, x.shape[-1])
    used, padding = (None, None) if places.in_order() else places.index()
    taken = torch.cat([used, padding]) if padded_rows and used is not None and padding is not None else used
    rows = flat if taken is None else _Take.apply(flat, taken)
    asks = asks and padded_rows and any(places.padding)
    attention = _attention(places, asks) if asks or places.added is not None else None

    def back(rows: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        if taken is None:
            return rows.view(x.shape)
        empty = rows.detach().new_zeros(1, rows.shape[1])
        if norm is not None:
            with torch.no_grad():
                empty = norm(empty).to(rows.dtype)
        return _Put.apply(rows, taken, None if padded_rows else padding, empty, len(flat)).view(x.shape)

    def after(layer: int, rows: Tensor) -> None:
        # Without gradients the next layer writes where this one did.
        mine = rows.clone() if taken is None and not rows.requires_grad else rows
        cast(list[Tensor], states).append(back(mine, None))

    out = ragged.run(
        layers, rows, places.cu_seqlens, places.max_seqlen, attention, None if states is None else after
    )  # fmt: skip
    return back(out, ragged.final_norm())


def _attention(places: _Places, asks: bool) -> Attention:
    """Attention inside each sequence with what is added to the scores; rows of padding, which come last, attend to the
    keys of the sequence that they pad, if they ask, and otherwise to nothing."""
    lengths, padding, added = places.lengths, places.padding, places.added
    total = sum(lengths)
    where = (places.cu_seqlens, places.max_seqlen)

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if added is None:
            return ragged_attention(q, k, v, *where)
        # One more channel: 1 in every query, in every key what its score gets.
        scale = q.shape[2] ** -0.5
        extra = F.pad(added / scale, (0, len(k) - total)).to(k.dtype)[:, None, None].expand(-1, k.shape[1], 1)
        q, k, v = F.pad(q, (0, 1), value=1.0), torch.cat([k, extra], 2), F.pad(v, (0, 1))
        return ragged_attention(q, k, v, *where, softmax_scale=scale)[..., :-1]

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = inside(q, k, v)
        if not asks:
            return out
        biases = [None] * len(lengths) if added is None else added.to(q.dtype).split(lengths)
        # Split, not sliced: the gradient of every slice would be a tensor as large as the whole.
        queries_of = q.split([total, *padding])[1:]
        keys, values = (x.split([*lengths, len(x) - total])[:-1] for x in (k, v))
        rows = []
        for queries, key, value, bias in zip(queries_of, keys, values, biases, strict=True):
            if len(queries):
                heads = [part.transpose(0, 1)[None] for part in (queries, key, value)]
                mask = None if bias is None else bias.expand(1, 1, len(queries), -1)
                rows.append(F.scaled_dot_product_attention(heads[0], heads[1], heads[2], mask)[0].transpose(0, 1))
        if out.requires_grad:
            return torch.cat([out[:total], *rows])
        out[total:] = torch.cat(rows)
        return out

    return attended


class _Take(torch.autograd.Function):
    """x (rows, dim) -> x[index], no row taken twice: its gradient is put back, not added."""

    @staticmethod
    def forward(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.rows = len(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _Put.apply(grad, index, None, grad.detach().new_zeros(1, grad.shape[1]), ctx.rows), None


class _Put(torch.autograd.Function):
    """rows (n, dim) -> (total, dim) with rows at index, and fill (1, dim) elsewhere.

    Nothing may be asked of the rows at padding, if given: they are not those of the original.
    """

    @staticmethod
    def forward(rows: Tensor, index: Tensor, padding: Tensor | None, fill: Tensor, total: int) -> Tensor:
        # With rows for every place, what is there before does not matter.
        out = rows.new_empty(total, rows.shape[1]) if len(rows) == total else fill.to(rows.dtype).repeat(total, 1)
        return out.index_copy_(0, index, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        index, padding = ctx.saved_tensors
        if padding is not None and bool(grad.index_select(0, padding).any()):
            raise RuntimeError(
                "the loss depends on places of padding, which padded_rows=False does not compute: "
                "use accelerate(model), or leave them out of the loss"
            )
        return _Take.apply(grad, index), None, None, None, None


def _spell_keys(module: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Give the attention's weights in a state dict the names that they have in the module: flash-attn has others."""
    spelled = re.compile(re.escape(prefix) + r"layers\.(\d+)\.self_attn\.(?:_impl\.)?(in_proj_|Wqkv\.|out_proj\.)(\w+)")
    for key in list(state_dict):
        found = spelled.fullmatch(key)
        if not found or int(found[1]) >= len(module.layers):
            continue
        attention = module.layers[int(found[1])].self_attn
        inner = "_impl." if hasattr(attention, "_impl") else ""
        part = found[2]
        if part != "out_proj.":
            part = "Wqkv." if hasattr(getattr(attention, "_impl", attention), "Wqkv") else "in_proj_"
        name = f"{prefix}layers.{found[1]}.self_attn.{inner}{part}{found[3]}"
        if name != key and name not in state_dict:
            state_dict[name] = state_dict.pop(key)
