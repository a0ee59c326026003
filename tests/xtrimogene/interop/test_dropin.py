"""Tests of the drop-in: the ragged encoder is the original, padded or not, in numbers, gradients and weights."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEncoder

from benchmarks.models.others import FlashTransformerEncoderLayer
from xtrimogene.interop.dropin import RaggedEncoder, packed_embeddings, ragged_encoder

LENGTHS = [5, 1, 40, 23]
DIM, HEADS, VOCABULARY = 32, 4, 50


@pytest.fixture(autouse=True)
def _plain_torch_layers_on_one_thread() -> Iterator[None]:
    """torch's fused inference path has rules of its own; small work is fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)
    torch.set_num_threads(threads)


def torch_encoder(
    *, norm: bool = True, num_layers: int = 2, dropout: float = 0.0, batch_first: bool = True, **options: Any
) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 48, dropout=dropout, batch_first=batch_first, **options)
    final = nn.LayerNorm(DIM, bias=options.get("bias", True)) if norm else None
    return _moved(nn.TransformerEncoder(layer, num_layers, norm=final, enable_nested_tensor=False))


def bert(*, dropout: float = 0.0, **options: Any) -> transformers.BertModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=dropout,
        **options,
    )
    return _moved(transformers.BertModel(config))


def _moved(module: Any) -> Any:
    """No weight at a value that could hide a mistake (0, 1, or the same in all layers)."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def flash_encoder(norm_scheme: str) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer: Any = FlashTransformerEncoderLayer(DIM, HEADS, 48, 0.0, norm_scheme)
    return _moved(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(DIM), enable_nested_tensor=False))


def _share_dropout(layer: Any) -> None:
    layer.dropout1 = layer.dropout2 = layer.dropout


def _changed(make: Callable[[], Any], change: Callable[[Any], object]) -> Callable[[], Any]:
    def changed() -> Any:
        module = make()
        change(module)
        return module

    return changed


ORIGINALS: dict[str, Callable[[], nn.Module]] = {
    "torch": torch_encoder,
    "torch, pre-norm, gelu": lambda: torch_encoder(norm_first=True, activation="gelu"),
    "torch, gelu module, no final norm": lambda: torch_encoder(activation=nn.GELU(), norm=False),
    "torch, tanh-gelu, one layer": lambda: torch_encoder(activation=nn.GELU(approximate="tanh"), num_layers=1),
    "torch, pre-norm, no bias": lambda: torch_encoder(norm_first=True, bias=False, activation=nn.ReLU()),
    "torch, sequence first": lambda: torch_encoder(batch_first=False),
    "torch, tanh-gelu as a partial": lambda: torch_encoder(activation=functools.partial(F.gelu, approximate="tanh")),
    "torch, one dropout for all": _changed(torch_encoder, lambda m: [_share_dropout(layer) for layer in m.layers]),
    "scGPT's layers, post-norm": lambda: flash_encoder("post"),
    "scGPT's layers, pre-norm": lambda: flash_encoder("pre"),
    "bert": bert,
    "bert, relu": lambda: bert(hidden_act="relu"),
    "bert, gelu_accurate": lambda: bert(hidden_act="gelu_accurate"),
    "bert, gelu_new": lambda: bert(hidden_act="gelu_new", attn_implementation="eager"),
    "bert encoder": lambda: bert().encoder,
}


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _padded(module: nn.Module, x: Tensor, lengths: list[int]) -> Tensor:
    """The original on the batch padded to its longest sequence, with its own mask; only the used slots come back."""
    used = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows = nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)
    if isinstance(module, nn.TransformerEncoder):
        first = module.layers[0].self_attn.batch_first
        out = module(rows if first else rows.transpose(0, 1), src_key_padding_mask=~used)
        return (out if first else out.transpose(0, 1))[used]
    mask = torch.zeros(used.shape).masked_fill(~used, -torch.inf)[:, None, None].to(x.dtype)
    encoder = module.encoder if isinstance(module, transformers.BertModel) else module
    return encoder(rows, attention_mask=mask.expand(-1, -1, max(lengths), -1)).last_hidden_state[used]


def _one_by_one(module: nn.Module, x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([_padded(module, part, [len(part)]) for part in x.split(lengths)])


def _error(x: Tensor, exact: Tensor) -> float:
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm())


def _encoder_of(module: Any) -> nn.Module:
    return module.encoder if isinstance(module, transformers.BertModel) else module


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", ORIGINALS)
def test_inference_and_training_are_those_of_the_original(name: str) -> None:
    original = ORIGINALS[name]()
    ragged = ragged_encoder(original)
    x = torch.randn(sum(LENGTHS), DIM, requires_grad=True)
    seed, cu_seqlens = torch.randn(x.shape), _offsets(LENGTHS)
    leaves = [x, *_encoder_of(original).parameters()]
    for mode in (True, False):
        original.train(mode)
        for how in (_padded, _one_by_one):
            expected = how(original, x, LENGTHS)
            out = ragged(x, cu_seqlens, max(LENGTHS))
            assert _error(out, expected) < 2e-6
            wanted = torch.autograd.grad((expected * seed).sum(), leaves)
            for got, want in zip(torch.autograd.grad((out * seed).sum(), leaves), wanted, strict=True):
                # The bias of the keys shifts all scores of a query alike: its gradient is zero but for rounding.
                assert float((got - want).norm()) < 2e-5 * max(float(want.norm()), 1.0)
        with torch.no_grad():
            assert _error(ragged(x.detach(), cu_seqlens, max(LENGTHS)), expected) < 2e-6


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", ["torch", "bert"])
def test_cells_without_genes_change_nothing(name: str) -> None:
    original = ORIGINALS[name]().eval()
    x, empty = torch.randn(sum(LENGTHS), DIM), _offsets([0, 5, 0, 0, 1, 40, 23, 0])
    with torch.no_grad():
        out = ragged_encoder(original)(x, empty, max(LENGTHS))
        assert _error(out, _one_by_one(original, x, LENGTHS)) < 2e-6
        assert ragged_encoder(original)(x[:0], _offsets([0, 0]), 0).shape == (0, DIM)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", ["torch, pre-norm, gelu", "bert", "torch"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_errors_are_within_those_of_the_original(name: str, how: str) -> None:
    original = ORIGINALS[name]()
    dtype = torch.bfloat16 if how == "weights" else torch.float32
    # A cell is small work with few roundings: several of them make the errors comparable.
    lengths = LENGTHS * 3
    ragged = ragged_encoder(original.to(dtype))
    exactly = copy.deepcopy(original).double()
    x = torch.randn(sum(lengths), DIM).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    exact = _one_by_one(exactly, exact_x, lengths)
    seed = torch.randn(x.shape).to(dtype)
    named = {"x": x, **dict(_encoder_of(original).named_parameters())}
    exact_named = {"x": exact_x, **dict(_encoder_of(exactly).named_parameters())}
    exact_grads = torch.autograd.grad((exact * seed).sum(), list(exact_named.values()))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        plain, out = _one_by_one(original, x, lengths), ragged(x, _offsets(lengths), max(lengths))
        with torch.no_grad():
            inferred = ragged(x.detach(), _offsets(lengths), max(lengths))
    assert 0 < _error(out, exact) <= 2 * _error(plain, exact)
    assert 0 < _error(inferred, exact) <= 2 * _error(plain, exact)
    plain_grads = torch.autograd.grad((plain * seed).sum(), list(named.values()))
    grads = torch.autograd.grad((out * seed).sum(), list(named.values()))
    for name, got, other, want in zip(named, grads, plain_grads, exact_grads, strict=True):
        if not name.endswith("key.bias"):  # zero but for rounding
            assert _error(got, want) <= 3 * _error(other, want), name


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", ["torch", "bert"])
def test_weights_are_shared_and_state_dicts_load_both_ways(name: str) -> None:
    original, other = ORIGINALS[name](), ORIGINALS[name]()
    ragged = ragged_encoder(original)
    encoder = _encoder_of(original)
    assert {id(p) for p in ragged.parameters()} == {id(p) for p in encoder.parameters()}
    assert list(ragged.state_dict()) == list(encoder.state_dict())
    x, cu_seqlens = torch.randn(sum(LENGTHS), DIM), _offsets(LENGTHS)
    # Training one trains the other.
    optimizer = torch.optim.SGD(ragged.parameters(), lr=0.1)
    before = _one_by_one(original, x, LENGTHS)
    ragged(x, cu_seqlens, max(LENGTHS)).square().sum().backward()
    optimizer.step()
    after = _one_by_one(original, x, LENGTHS)
    assert _error(after, before) > 1e-3
    assert _error(ragged(x, cu_seqlens, max(LENGTHS)), after) < 2e-6
    # Out of the ragged encoder into a fresh original, and back.
    _encoder_of(other).load_state_dict(ragged.state_dict())
    assert torch.equal(_one_by_one(other, x, LENGTHS), after)
    for assign in (False, True):
        saved = {key: 0.5 * value for key, value in _encoder_of(other).state_dict().items()}
        ragged.load_state_dict(saved, assign=assign)
        assert _error(_one_by_one(original, x, LENGTHS), after) > 1e-2
        assert _error(ragged(x, cu_seqlens, max(LENGTHS)), _one_by_one(original, x, LENGTHS)) < 2e-6
        encoder.load_state_dict(other.encoder.state_dict() if name == "bert" else other.state_dict(), assign=assign)
        assert _error(ragged(x, cu_seqlens, max(LENGTHS)), after) < 2e-6


def test_embeddings_of_a_bert_laid_end_to_end() -> None:
    model = bert().eval()
    ids, types = torch.randint(0, VOCABULARY, (sum(LENGTHS),)), torch.randint(0, 2, (sum(LENGTHS),))
    cu_seqlens = _offsets(LENGTHS)
    ragged = ragged_encoder(model)
    with torch.no_grad():
        for token_type_ids in (None, types):
            rows = packed_embeddings(model, ids, cu_seqlens, token_type_ids)
            out = ragged(rows, cu_seqlens, max(LENGTHS))
            expected = [
                model(cell[None], token_type_ids=None if token_type_ids is None else kind[None]).last_hidden_state[0]
                for cell, kind in zip(ids.split(LENGTHS), types.split(LENGTHS), strict=True)
            ]
            assert _error(out, torch.cat(expected)) < 2e-6
        pad = nn.utils.rnn.pad_sequence(ids.split(LENGTHS), batch_first=True)
        used = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        padded = model(pad, attention_mask=used.long()).last_hidden_state[used]
        assert _error(ragged(packed_embeddings(model, ids, cu_seqlens), cu_seqlens, max(LENGTHS)), padded) < 2e-6
        # Hidden states once asked for leave hooks of transformers' own behind, which change nothing.
        model(pad, output_hidden_states=True)
        assert _error(ragged_encoder(model)(rows, cu_seqlens, max(LENGTHS)), out) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bert": "encoder"}, TypeError, "bert: expected transformers' BertModel, got"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, ValueError, r"input_ids: expected shape \(6,\)"),
        ({"token_type_ids": torch.zeros(5, dtype=torch.long)}, ValueError, r"token_type_ids: expected shape \(6,\)"),
        ({"cu_seqlens": _offsets([2, 3])}, ValueError, "cu_seqlens: expected to rise from 0 to the number"),
        ({"cu_seqlens": torch.tensor([0, 7, 6])}, ValueError, "cu_seqlens: expected to rise"),
        (
            {"input_ids": torch.zeros(70, dtype=torch.long), "cu_seqlens": _offsets([5, 65])},
            ValueError,
            "input_ids: expected sequences of at most 64 tokens, got one of 65",
        ),
    ],
)
def test_bad_embedding_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = bert()
    given = {"bert": model, "input_ids": torch.zeros(6, dtype=torch.long), "cu_seqlens": _offsets([2, 4])} | change
    if given["bert"] == "encoder":
        given["bert"] = model.encoder
    with pytest.raises(error, match=message):
        packed_embeddings(**given)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("make", [torch_encoder, bert])
def test_dropout_of_attention_probabilities(make: Callable[..., nn.Module]) -> None:
    """Inference does not care; training refuses until told to leave it out, and then drops everything else."""
    original = make(dropout=0.5)
    x, cu_seqlens = torch.randn(sum(LENGTHS), DIM), _offsets(LENGTHS)
    ragged = ragged_encoder(original.eval())
    with torch.no_grad():
        expected = ragged(x, cu_seqlens, max(LENGTHS))
        assert _error(expected, _one_by_one(original, x, LENGTHS)) < 2e-6
        ragged.train()
        assert all(module.training for module in list(_encoder_of(original).modules())[1:])
        with pytest.raises(ValueError, match=r"attention probabilities is 0\.5.*omit_attention_dropout=True"):
            ragged(x, cu_seqlens, max(LENGTHS))
        without = ragged_encoder(original, omit_attention_dropout=True)
        difference = _error(without(x, cu_seqlens, max(LENGTHS)), expected)
        # The BERT of these tests drops nothing else.
        assert difference > 0.1 if make is torch_encoder else difference < 2e-6


@pytest.mark.usefixtures("route")
def test_each_dropout_acts_where_the_original_has_it() -> None:
    """With one of the three dropouts certain, its branch or hidden rows vanish: no randomness is left."""
    x, cu_seqlens = torch.randn(sum(LENGTHS), DIM), _offsets(LENGTHS)
    for name, norm_first in itertools.product(("dropout1", "dropout", "dropout2"), (False, True)):
        original = torch_encoder(norm_first=norm_first)
        for layer in original.layers:
            getattr(layer, name).p = 1.0
        out = ragged_encoder(original)(x, cu_seqlens, max(LENGTHS))
        assert _error(out, _one_by_one(original, x, LENGTHS)) < 2e-6, (name, norm_first)
    model = bert(hidden_act="relu")
    for layer, part in zip(model.encoder.layer, ("attention", ""), strict=True):
        (layer.attention.output if part else layer.output).dropout.p = 1.0
    out = ragged_encoder(model)(x, cu_seqlens, max(LENGTHS))
    assert _error(out, _one_by_one(model, x, LENGTHS)) < 2e-6


class OwnLayer(nn.TransformerEncoderLayer):
    pass


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnBertEncoder(BertEncoder):
    """Might do anything in its forward."""


class OwnBert(transformers.BertModel):
    pass


def _hook(*arguments: object) -> None:
    return None


def _set(path: str, value: Any) -> Callable[[Any], object]:
    def change(module: Any) -> None:
        *parents, name = path.split(".")
        setattr(functools.reduce(getattr, parents, module), name, value)

    return change


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "activation": (lambda: torch_encoder(activation=F.silu), r"layers\.0\.activation is silu, expected relu or gelu"),
    "hook of a BertModel's encoder": (
        _changed(bert, lambda m: m.encoder.register_forward_hook(_hook)),
        "encoder has hooks",
    ),
    "own encoder in a BertModel": (
        _changed(bert, lambda m: setattr(m, "encoder", OwnBertEncoder(m.config))),
        "encoder: expected a plain BertEncoder, got .*OwnBertEncoder",
    ),
    "hook of an activation": (
        _changed(bert, lambda m: m.encoder.layer[0].intermediate.intermediate_act_fn.register_forward_hook(_hook)),
        r"layer\.0\.intermediate\.intermediate_act_fn has hooks",
    ),
    "own layer": (
        lambda: nn.TransformerEncoder(OwnLayer(DIM, HEADS), 2, enable_nested_tensor=False),
        r"layers\.0: expected a plain TransformerEncoderLayer, got .*OwnLayer; layers\.1: expected",
    ),
    "own linear": (
        _changed(torch_encoder, _set("layers.1.linear1", OwnLinear(DIM, 48))),
        r"layers\.1\.linear1: expected a plain Linear, got .*OwnLinear",
    ),
    "parametrised": (
        _changed(torch_encoder, lambda m: nn.utils.parametrizations.weight_norm(m.layers[0].linear2)),
        r"layers\.0\.linear2: expected a plain Linear, got .*ParametrizedLinear",
    ),
    "appended key": (
        _changed(torch_encoder, _set("layers.0.self_attn", nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True))),
        r"layers\.0\.self_attn appends a key",
    ),
    "zero attention": (_changed(torch_encoder, _set("layers.0.self_attn.add_zero_attn", True)), "appends a key"),
    "other widths": (
        _changed(torch_encoder, _set("layers.1.self_attn", nn.MultiheadAttention(DIM, HEADS, kdim=8, vdim=8))),
        r"layers\.1\.self_attn has keys or values of another width",
    ),
    "other norm": (
        _changed(torch_encoder, _set("norm", nn.RMSNorm(DIM))),
        r"norm: expected a plain LayerNorm, got .*RMSNorm",
    ),
    "extra module": (
        _changed(torch_encoder, lambda m: m.layers[0].add_module("adapter", nn.Linear(DIM, DIM))),
        r"layers\.0\.adapter .*is no part of such a layer",
    ),
    "hook": (
        _changed(torch_encoder, lambda m: m.layers[1].register_forward_hook(_hook)),
        r"layers\.1 has hooks, which would not be called",
    ),
    "hook of the whole": (
        _changed(torch_encoder, lambda m: m.register_forward_pre_hook(_hook)),
        "the module has hooks",
    ),
    "own forward": (
        _changed(torch_encoder, lambda m: setattr(m.layers[0], "forward", _hook)),
        r"layers\.0 has a forward of its own",
    ),
    "quantised": (
        _changed(torch_encoder, _set("layers.0.linear1", torch.ao.nn.quantized.dynamic.Linear(DIM, 48))),
        r"linear1: expected a plain Linear, got .*quantized",
    ),
    "integer weights": (
        _changed(
            torch_encoder,
            _set("layers.0.linear1.weight", nn.Parameter(torch.ones(48, DIM, dtype=torch.int8), requires_grad=False)),
        ),
        r"layers\.0\.linear1\.weight is a Parameter of torch\.int8",
    ),
    "causal": (lambda: bert(is_decoder=True), r"layer\.0 attends causally \(is_decoder\); layer\.1 attends"),
    "causal attention": (
        _changed(bert, _set("encoder.layer.1.attention.self.is_causal", True)),
        r"layer\.1 attends causally \(is_decoder\)$",
    ),
    "cross-attention": (
        lambda: bert(is_decoder=True, add_cross_attention=True),
        r"layer\.0 attends causally \(is_decoder\); layer\.0 has cross-attention",
    ),
    "relative positions": (
        _changed(bert, lambda m: setattr(m.encoder.layer[1].attention.self, "position_embedding_type", "relative_key")),
        r"layer\.1 has relative positions \(position_embedding_type 'relative_key'\)",
    ),
    "bert activation": (lambda: bert(hidden_act="silu"), r"layer\.0\.intermediate has activation .*SiLU"),
    "bert linear": (
        _changed(bert, _set("encoder.layer.0.attention.self.query", OwnLinear(DIM, DIM))),
        r"layer\.0\.attention\.self\.query: expected a plain Linear, got .*OwnLinear",
    ),
    "bert biases": (
        _changed(bert, _set("encoder.layer.0.attention.self.key", nn.Linear(DIM, DIM, bias=False))),
        r"layer\.0\.attention\.self: query, key and value differ",
    ),
    "bert scaling": (
        _changed(bert, _set("encoder.layer.0.attention.self.scaling", 1.0)),
        r"layer\.0\.attention\.self scales the scores by 1\.0",
    ),
    "configured to attend causally": (
        _changed(bert, _set("config.is_decoder", True)),
        r"its config asks for causal attention \(is_decoder\)$",
    ),
    "configured positions": (
        _changed(bert, _set("config.position_embedding_type", "relative_key")),
        r"its config asks for relative positions \('relative_key'\)",
    ),
    "attention function of another": (
        _changed(bert, _set("config._attn_implementation_internal", "mine")),
        r"its config asks for the attention function 'mine', which is not one of transformers' own",
    ),
    "causal flash attention": (
        _changed(lambda: flash_encoder("post"), _set("layers.1.self_attn.causal", True)),
        r"layers\.1\.self_attn attends causally \(causal\)$",
    ),
    "scaled flash attention": (
        _changed(lambda: flash_encoder("post"), _set("layers.0.self_attn.inner_attn.softmax_scale", 1.0)),
        r"layers\.0\.self_attn scales the scores by 1\.0",
    ),
    "norm scheme": (
        _changed(lambda: flash_encoder("post"), _set("layers.0.norm_scheme", "sandwich")),
        r"layers\.0\.norm_scheme is 'sandwich', expected 'pre' or 'post'",
    ),
    "bert hook": (
        _changed(bert, lambda m: m.encoder.layer[0].output.register_forward_hook(_hook)),
        r"layer\.0\.output has hooks",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"module: cannot be run as a ragged encoder: .*{message}"):
        ragged_encoder(make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 3), r"got torch\.nn\.modules\.linear\.Linear$"),
        (lambda: OwnBert(bert().config), r"got .*OwnBert; pass its submodule \.encoder$"),
        (lambda: nn.Transformer(DIM, HEADS, 1, 1, 8), r"Transformer; pass its submodule \.encoder$"),
        (lambda: transformers.BertForMaskedLM(bert().config), r"BertForMaskedLM; pass its submodule \.bert$"),
        (lambda: nn.TransformerEncoderLayer(DIM, HEADS), "TransformerEncoderLayer$"),
        (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS), 1), "TransformerDecoder$"),
    ],
)
def test_other_classes_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(TypeError, match=f"module: expected torch.nn.TransformerEncoder, or transformers.*{message}"):
        ragged_encoder(make())


def test_all_reasons_are_told_at_once() -> None:
    module = torch_encoder(activation=F.silu)
    module.layers[1].self_attn.add_zero_attn = True
    module.norm.register_forward_hook(_hook)
    with pytest.raises(
        ValueError, match=r"norm has hooks.*layers\.0\.activation.*layers\.1\.self_attn.*layers\.1\.act"
    ):
        ragged_encoder(module)


@pytest.mark.usefixtures("route")
def test_changes_after_the_conversion_are_seen() -> None:
    module = torch_encoder()
    ragged = ragged_encoder(module)
    x, cu_seqlens = torch.randn(sum(LENGTHS), DIM), _offsets(LENGTHS)
    handle = module.layers[0].register_forward_hook(_hook)
    with pytest.raises(ValueError, match=r"were changed: layers\.0 has hooks"):
        ragged(x, cu_seqlens, max(LENGTHS))
    handle.remove()
    # A plain replacement is a change of weights like any other.
    module.layers[0].linear1 = nn.Linear(DIM, 48)
    out = ragged(x, cu_seqlens, max(LENGTHS))
    assert _error(out, _one_by_one(module, x, LENGTHS)) < 2e-6


def test_rows_of_another_width_dtype_or_device_are_refused() -> None:
    ragged = ragged_encoder(torch_encoder())
    for shape in ((4, DIM + 1), (1, 4, DIM)):
        with pytest.raises(ValueError, match=r"x: expected shape \(total_nnz, 32\)"):
            ragged(torch.zeros(shape), _offsets([4]), 4)
    with pytest.raises(TypeError, match=r"x: expected dtype torch\.float32, that of the weights, got torch\.float64"):
        ragged(torch.zeros(4, DIM).double(), _offsets([4]), 4)
    with pytest.raises(ValueError, match="x: expected device cpu, that of the weights, got meta"):
        ragged(torch.zeros(4, DIM, device="meta"), _offsets([4]), 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ragged(torch.zeros(4, DIM).bfloat16(), _offsets([4]), 4).shape == (4, DIM)


def test_the_longest_segment_is_read_from_the_offsets() -> None:
    ragged, x = ragged_encoder(torch_encoder()), torch.randn(sum(LENGTHS), DIM)
    assert torch.equal(ragged(x, _offsets(LENGTHS)), ragged(x, _offsets(LENGTHS), max(LENGTHS)))
    assert ragged(x[:0], _offsets([])).shape == (0, DIM)


@pytest.mark.parametrize("name", ["layers", "norm"])
def test_a_part_that_the_original_replaced_is_noticed(name: str) -> None:
    original = torch_encoder()
    ragged = ragged_encoder(original)
    setattr(original, name, copy.deepcopy(getattr(original, name)))
    with pytest.raises(ValueError, match=f"were changed: {name} was replaced in the original"):
        ragged(torch.zeros(4, DIM), _offsets([4]), 4)


def test_modes_and_moves_reach_the_embeddings_of_a_bert() -> None:
    model = bert()
    ragged = ragged_encoder(model)
    model.embeddings.dropout.p = 0.5
    ids = torch.randint(0, VOCABULARY, (sum(LENGTHS),))
    first, second = (packed_embeddings(model, ids, _offsets(LENGTHS)) for _ in range(2))
    assert not torch.equal(first, second)
    ragged.eval()
    first, second = (packed_embeddings(model, ids, _offsets(LENGTHS)) for _ in range(2))
    assert torch.equal(first, second)
    ragged.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert packed_embeddings(model, ids, _offsets(LENGTHS)).dtype == torch.float64
    assert ragged.train().training
    assert model.embeddings.training


def test_a_function_registered_under_a_known_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    ragged = ragged_encoder(model)
    model.config.is_decoder = True
    with pytest.raises(ValueError, match="were changed: its config asks for causal attention"):
        ragged(torch.zeros(4, DIM), _offsets([4]), 4)
    model.config.is_decoder = False
    monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", _hook)
    with pytest.raises(ValueError, match="were changed: its config asks for the attention function 'sdpa'"):
        ragged(torch.zeros(4, DIM), _offsets([4]), 4)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("make", [torch_encoder, bert])
def test_a_copy_is_independent_and_compiles(make: Callable[[], nn.Module]) -> None:
    ragged = ragged_encoder(make().eval())
    copied: RaggedEncoder = copy.deepcopy(ragged)
    x, cu_seqlens = torch.randn(sum(LENGTHS), DIM), _offsets(LENGTHS)
    before = ragged(x, cu_seqlens, max(LENGTHS))
    torch._dynamo.reset()
    compiled = torch.compile(copied, fullgraph=True, backend="eager")
    assert _error(compiled(x, cu_seqlens, max(LENGTHS)), before) < 2e-6
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    assert torch.equal(ragged(x, cu_seqlens, max(LENGTHS)), before)
