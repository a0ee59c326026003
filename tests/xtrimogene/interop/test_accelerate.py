"""Tests of accelerate: a model that is called as before gives what it gave before, at places of padding too."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks.models import others
from xtrimogene.interop.accelerate import accelerate
from xtrimogene.interop.dropin import RaggedEncoder, packed_embeddings, ragged_encoder
from xtrimogene.interop.packed import Packed

LENGTHS = [5, 1, 11, 8]
LENGTH, DIM, HEADS, TOKENS = 12, 16, 2, 40
# One place is padding in every sequence.
USED = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
SIZE: dict[str, Any] = {"dim": DIM, "heads": HEADS, "ffn_dim": 24, "layers": 2, "dropout": 0.0}

pytestmark = [
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _moved(module: Any) -> Any:
    """No weight at a value that could hide a mistake (0, 1, or the same in all layers)."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def _inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(1, TOKENS, USED.shape).masked_fill(~USED, 0)
    return ids, (5 * torch.rand(USED.shape)).masked_fill(~USED, 0.0)


def _scgpt(model: Any) -> dict[str, Tensor]:
    ids, values = _inputs()
    return model(ids, values.to(model.decoder[0].weight.dtype), src_key_padding_mask=~USED)


def _uce(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(2)
    genes, cells = model(torch.randn(LENGTH, len(LENGTHS), 24), USED.float())
    return {"genes": genes.transpose(0, 1), "cells": cells}


def _nicheformer(model: Any) -> dict[str, Tensor]:
    ids = _inputs()[0]
    found = model(ids.masked_fill(~USED, 1), ~USED)
    return {**found, "cells": model.get_embeddings(ids.masked_fill(~USED, 1), ~USED)}


def _geneformer(model: Any) -> dict[str, Any]:
    found = model(_inputs()[0], attention_mask=USED.long(), output_hidden_states=True)
    return {f"{name}{i}": x for name, xs in found.items() for i, x in enumerate(xs if isinstance(xs, tuple) else [xs])}


class FlashMHA(nn.Module):
    """scGPT's wrapper of the attention of flash-attn 1 or 2."""

    def __init__(self, impl: nn.Module) -> None:
        super().__init__()
        self._impl, self.batch_first = impl, True

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self._impl(x, key_padding_mask=key_padding_mask)


def _wrapped() -> Any:
    model = others.ScGPT(genes=TOKENS, flash="post", **SIZE)
    for layer in model.transformer_encoder.layers:
        layer.self_attn = FlashMHA(layer.self_attn)
    return model


Call = Callable[[Any], dict[str, Tensor]]
MODELS: dict[str, tuple[Callable[[], Any], Call]] = {
    "scGPT": (lambda: others.ScGPT(genes=TOKENS, **SIZE), _scgpt),
    "scGPT, flash, post-norm": (lambda: others.ScGPT(genes=TOKENS, flash="post", **SIZE), _scgpt),
    "scGPT, flash, pre-norm": (lambda: others.ScGPT(genes=TOKENS, flash="pre", **SIZE), _scgpt),
    "scGPT, flash, wrapped": (_wrapped, _scgpt),
    "UCE": (lambda: others.UCE(token_dim=24, output_dim=8, length=LENGTH, **SIZE), _uce),
    "Nicheformer": (lambda: others.Nicheformer(tokens=TOKENS, length=LENGTH, **SIZE), _nicheformer),
    **{
        f"Geneformer, {kind}, {attention}": (
            lambda kind=kind, attention=attention: others.geneformer(
                kind, tokens=TOKENS, length=LENGTH, attn_implementation=attention, **SIZE
            ),
            _geneformer,
        )
        for kind, attention in [
            ("BertModel", "sdpa"),
            ("BertForMaskedLM", "eager"),
            ("BertForSequenceClassification", "sdpa"),
            ("BertForTokenClassification", "sdpa"),
        ]
    },
}


def _model(name: str) -> tuple[Any, Call]:
    torch.manual_seed(0)
    make, call = MODELS[name]
    return _moved(make()), call


def _assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], places: Tensor | None = None) -> None:
    """Places: which to compare, in what has one row for each."""
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        got = found[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        if places is not None and want.shape[:2] == places.shape:
            got, want = got[places], want[places]
        assert float((got - want).detach().norm()) <= 2e-6 * float(want.detach().norm()), name


def _gradients(model: nn.Module, found: dict[str, Tensor], places: Tensor | None = None) -> dict[str, Tensor]:
    chosen = [x[places] if places is not None and x.shape[:2] == places.shape else x for x in found.values()]
    loss = sum((x * torch.randn(x.shape, generator=torch.manual_seed(3))).sum() for x in chosen)
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def _assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, want in wanted.items():
        assert (found[name] is None) == (want is None), name
        if want is not None:
            # The bias of the keys shifts all scores of a query alike: its gradient is zero but for rounding.
            assert float((found[name] - want).norm()) < 2e-5 * max(float(want.norm()), 1.0), name


@pytest.mark.parametrize("name", MODELS)
def test_results_and_gradients_are_those_of_the_model_as_it_was(name: str) -> None:
    model, call = _model(name)
    for training in (True, False):
        model.train(training)
        wanted = call(model)
        gradients = _gradients(model, wanted)
        with accelerate(model):
            found = call(model)
            _assert_same(found, wanted)
            _assert_same_gradients(_gradients(model, found), gradients)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", MODELS)
def test_inference_is_that_of_the_model_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's fused path where the model takes it: it puts zeros where padding was."""
    model, call = _model(name)
    runs: list[int] = []
    run = RaggedEncoder.run
    monkeypatch.setattr(RaggedEncoder, "run", lambda *args: (runs.append(len(args[1])), run(*args))[1])
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            wanted = call(model)
            with accelerate(model):
                _assert_same(call(model), wanted)
    # Nicheformer calls its layers one by one too.
    assert runs == 2 * ([2, 1, 1] if name == "Nicheformer" else [2])


@pytest.mark.usefixtures("route")
def test_hidden_states_of_a_batch_without_padding() -> None:
    model, _ = _model("Geneformer, BertModel, sdpa")
    with torch.no_grad():
        wanted = model(_inputs()[0], output_hidden_states=True).hidden_states
        with accelerate(model):
            found = model(_inputs()[0], output_hidden_states=True).hidden_states
    _assert_same(dict(enumerate(found)), dict(enumerate(wanted)))  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_masks_of_a_bert_in_every_form(attention: str) -> None:
    model = _moved(others.geneformer("BertModel", tokens=TOKENS, length=LENGTH, attn_implementation=attention, **SIZE))
    excluded = torch.zeros(USED.shape).masked_fill(~USED, torch.finfo(torch.float32).min)
    numbers = (torch.arange(LENGTH) % 3 - 1.0).expand(USED.shape) + excluded
    masks = [None, USED, USED.long(), USED.float(), torch.ones(USED.shape)]
    # Four dimensions go to the attention as they are: the eager one adds a bool, and numbers are added by both.
    for mask in (USED, excluded, numbers):
        masks += [mask[:, None, None], mask[:, None, None].expand(-1, 1, LENGTH, -1)]
    for mask in masks:
        wanted = model(_inputs()[0], attention_mask=mask)
        with accelerate(model):
            _assert_same(dict(model(_inputs()[0], attention_mask=mask)), dict(wanted))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", ["scGPT", "scGPT, flash, pre-norm", "UCE", "Geneformer, BertModel, sdpa"])
def test_bfloat16_errors_are_within_those_of_the_model_as_it_was(name: str) -> None:
    model, call = _model(name)
    model.eval()
    exact = {key: value.double() for key, value in call(model).items()}
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        each = copy.deepcopy(model).to(dtype)
        if not autocast and name == "UCE":
            continue  # takes float32 alone
        for grad in (True, False):
            torch.backends.mha.set_fastpath_enabled(grad)  # which leaves autocast alone
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                plain = call(each)
                with accelerate(each):
                    found = call(each)
            torch.backends.mha.set_fastpath_enabled(True)
            for key, want in exact.items():
                assert found[key].dtype == plain[key].dtype, key
                errors = [float((x[key].double() - want).detach().norm()) for x in (found, plain)]
                assert errors[0] <= 2 * errors[1], (key, autocast, grad)


def encoder(*, batch_first: bool = True, nested: bool = True, norm: bool = True, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 24, dropout=0.0, batch_first=batch_first, **options)
    final = nn.LayerNorm(DIM) if norm else None
    return _moved(nn.Sequential(nn.TransformerEncoder(layer, 2, norm=final, enable_nested_tensor=nested)))


def _masks() -> dict[str, Tensor | None]:
    scattered = USED[:, torch.tensor([3, 0, 7, *range(8, LENGTH), 1, 2, 4, 5, 6])]
    return {
        "none": None,
        "bool": ~USED,
        "scattered": ~scattered,
        "-inf": torch.zeros(USED.shape).masked_fill(~USED, -torch.inf),
        "lowest": torch.zeros(USED.shape).masked_fill(~USED, torch.finfo(torch.float32).min),
        "numbers": (torch.arange(LENGTH) % 3 - 1.0).expand(USED.shape).masked_fill(~scattered, -torch.inf),
    }


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"nested": False}, {"norm": False}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:Converting mask without torch.bool")
def test_masks_of_every_kind(batch_first: bool, options: dict[str, Any]) -> None:
    model = encoder(batch_first=batch_first, **options)
    for mask, training, grad in itertools.product(_masks().values(), (True, False), (True, False)):
        model.train(training)
        x = torch.randn(len(LENGTHS), LENGTH, DIM)
        x = (x if batch_first else x.transpose(0, 1)).requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            wanted = model[0](x, src_key_padding_mask=mask)
            with accelerate(model):
                found = model[0](x, src_key_padding_mask=mask)
            _assert_same({"x": found}, {"x": wanted})
        if grad:
            seed, leaves = torch.randn(x.shape), [x, *model.parameters()]
            pairs = (torch.autograd.grad((y * seed).sum(), leaves) for y in (found, wanted))
            for got, want in zip(*pairs, strict=True):
                assert float((got - want).norm()) < 2e-5 * max(float(want.norm()), 1.0)


def test_one_sequence_without_a_batch() -> None:
    model = encoder().eval()
    x, mask = torch.randn(LENGTH, DIM), ~USED[0]
    wanted = model[0](x, src_key_padding_mask=mask)
    with accelerate(model):
        _assert_same({"x": model[0](x, src_key_padding_mask=mask)}, {"x": wanted})


def test_a_mask_that_sets_nothing_is_none() -> None:
    model = encoder().eval()
    x = torch.randn(len(LENGTHS), LENGTH, DIM)
    for mask in (torch.zeros(LENGTH, LENGTH), torch.zeros(LENGTH, LENGTH, dtype=torch.bool)):
        with torch.no_grad():
            wanted = model[0](x, mask, ~USED if mask.dtype == torch.bool else None)
            with accelerate(model):
                _assert_same({"x": model[0](x, mask, ~USED if mask.dtype == torch.bool else None)}, {"x": wanted})


def test_the_fused_path_takes_every_gelu_for_the_exact_one() -> None:
    """And so does what stands in for it; training has the tanh that was asked for."""
    model = encoder(activation=nn.GELU(approximate="tanh")).eval()
    x = 5 * torch.randn(len(LENGTHS), LENGTH, DIM)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            wanted = model[0](x)
            with accelerate(model):
                _assert_same({"x": model[0](x)}, {"x": wanted})


def test_padding_that_is_filled() -> None:
    """padded_rows=False: zeros before the final norm, as the fused path has it, and a loss must not ask for them."""
    model = encoder()
    x = torch.randn(len(LENGTHS), LENGTH, DIM)
    wanted = model[0](x, src_key_padding_mask=~USED)
    with accelerate(model, padded_rows=False):
        found = model[0](x, src_key_padding_mask=~USED)
        _assert_same({"x": found}, {"x": wanted}, USED)
        assert torch.equal(found[~USED], model[0].norm.bias.expand(int((~USED).sum()), DIM))
        _assert_same_gradients(_gradients(model, {"x": found}, USED), _gradients(model, {"x": wanted}, USED))
        with pytest.raises(RuntimeError, match="loss depends on places of padding, which padded_rows=False does not"):
            model[0](x, src_key_padding_mask=~USED).sum().backward()
    bert, call = _model("Geneformer, BertModel, sdpa")
    wanted = call(bert)
    with accelerate(bert, padded_rows=False):
        _assert_same(call(bert), wanted, USED)


def _kept(model: nn.Module) -> tuple[Any, ...]:
    """What must be as before once an encoder is undone."""
    found = [(name, type(module), set(vars(module))) for name, module in model.named_modules()]
    hooks = [len(module._load_state_dict_pre_hooks) for module in model.modules()]
    return found, hooks, [(name, id(x)) for name, x in model.named_parameters()]


@pytest.mark.parametrize("name", ["scGPT", "Nicheformer", "Geneformer, BertForMaskedLM, eager"])
def test_undone_the_model_is_as_it_was(name: str) -> None:
    model, call = _model(name)
    call(model)  # transformers leaves hooks of its own behind
    before, state = _kept(model), {key: value.data_ptr() for key, value in model.state_dict().items()}
    handle = accelerate(model)
    assert _kept(model) != before
    assert isinstance(model, type(model))
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == state
    assert [id(x) for x in model.parameters()] == [i for _, i in before[2]]
    with pytest.raises(ValueError, match="is accelerated already"):
        accelerate(model)
    handle.remove()
    handle.remove()
    assert _kept(model) == before
    with pytest.raises(ZeroDivisionError), accelerate(model):
        _ = 1 / 0
    assert _kept(model) == before


@pytest.mark.parametrize("name", ["scGPT", "scGPT, flash, post-norm", "scGPT, flash, wrapped"])
@pytest.mark.parametrize("spelled", ["in_proj", "Wqkv", "_impl.Wqkv"])
def test_checkpoints_load_whatever_flash_attn_named_their_weights(name: str, spelled: str) -> None:
    """Released ones have Wqkv, new ones of scGPT's wrapper _impl.Wqkv, and torch's layers in_proj."""
    model, call = _model(name)
    source, _ = _model("scGPT, flash, post-norm")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(0.9)
    state = source.state_dict()
    if spelled == "in_proj":
        state = {key.replace("Wqkv.", "in_proj_"): value for key, value in state.items()}
    elif spelled == "_impl.Wqkv":
        state = {re.sub(r"self_attn\.(?=Wqkv|out_proj)", "self_attn._impl.", key): v for key, v in state.items()}
    with accelerate(model):
        kept = list(state)
        model.load_state_dict(state)
        assert list(state) == kept  # the caller's own is not changed
        _assert_same(call(model), call(source), USED)


def test_hooks_modes_moves_and_copies() -> None:
    model, call = _model("scGPT")
    seen: list[tuple[int, ...]] = []
    model.transformer_encoder.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    accelerate(model)
    wanted = call(model)
    assert seen == [(len(LENGTHS), LENGTH, DIM)]
    assert isinstance(model.transformer_encoder, nn.TransformerEncoder)
    for module in (copy.deepcopy(model), pickle.loads(pickle.dumps(_without_hooks(model)))):
        _assert_same(call(module), wanted)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(2)
    _assert_same(call(model), wanted)
    assert not model.eval().transformer_encoder.layers[1].dropout.training
    assert call(model.double())["mlm_output"].dtype == torch.float64


def _without_hooks(model: Any) -> Any:
    model.transformer_encoder._forward_hooks.clear()
    return model


@pytest.mark.parametrize("name", ["scGPT", "Geneformer, BertModel, sdpa"])
def test_it_compiles_and_is_checkpointed(name: str) -> None:
    model, call = _model(name)
    wanted = call(model)
    gradients = _gradients(model, wanted)
    with accelerate(model):
        again = torch.utils.checkpoint.checkpoint(lambda: tuple(call(model).values()), use_reentrant=False)
        found = dict(zip(wanted, again, strict=True))
        _assert_same_gradients(_gradients(model, found), gradients)
        torch._dynamo.reset()
        encoder = model.transformer_encoder if name == "scGPT" else model.encoder
        x = torch.randn(len(LENGTHS), LENGTH, DIM)
        compiled = torch.compile(encoder, backend="eager")
        if name == "scGPT":
            out, plain = (each(x, src_key_padding_mask=~USED) for each in (compiled, encoder))
        else:
            out, plain = (each(x).last_hidden_state for each in (compiled, encoder))
        _assert_same({"x": out}, {"x": plain})


def test_gradient_checkpointing_of_a_bert_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = _model("Geneformer, BertForMaskedLM, eager")
    wanted = call(model.train())
    gradients = _gradients(model, wanted)
    model.gradient_checkpointing_enable()
    called = []
    for layer in model.bert.encoder.layer:
        run = layer._gradient_checkpointing_func
        monkeypatch.setattr(
            layer, "_gradient_checkpointing_func", lambda *a, run=run, **k: (called.append(len(a)), run(*a, **k))[1]
        )
    with accelerate(model):
        found = call(model)
        assert len(called) == 2
        _assert_same_gradients(_gradients(model, found), gradients)


def _attention_dropout(model: Any) -> None:
    for layer in model.transformer_encoder.layers:
        layer.self_attn.dropout = 0.5


def _hooked(model: Any) -> None:
    model.transformer_encoder.layers[1].linear1.register_forward_hook(lambda module, args, out: 2 * out)


def _with_mask(model: Any) -> dict[str, Tensor]:
    x = model.embed(*_inputs())
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    return {"x": model.transformer_encoder(x, mask, is_causal=True)}


def _with_nothing_left(model: Any) -> dict[str, Tensor]:
    left = USED & (USED.sum(1) > 1)[:, None]
    out = model.transformer_encoder(model.embed(*_inputs()), src_key_padding_mask=~left)
    return {"x": out[left.any(1)]}


def _with_attentions(model: Any) -> dict[str, Tensor]:
    return {"x": model(_inputs()[0], output_attentions=True).attentions[0]}


def _with_square_mask(model: Any) -> dict[str, Tensor]:
    mask = (USED[:, None] & USED[:, :, None])[:, None] | torch.eye(LENGTH, dtype=torch.bool)
    return {"x": model(_inputs()[0], attention_mask=mask).last_hidden_state}


AS_IT_WAS: dict[str, tuple[str, Callable[[Any], None], Call, str]] = {
    "mask": ("scGPT", lambda m: None, _with_mask, "is_causal asks for causal attention"),
    "all masked": ("scGPT", lambda m: None, _with_nothing_left, "a sequence is masked out as a whole"),
    "hook inside": ("scGPT", _hooked, _scgpt, r"layers\.1\.linear1 has hooks"),
    "attentions": (
        "Geneformer, BertForMaskedLM, eager",
        lambda m: None,
        _with_attentions,
        "output_attentions is given",
    ),
    "square mask": ("Geneformer, BertModel, sdpa", lambda m: None, _with_square_mask, "attention_mask differs between"),
    "causal by config": (
        "Geneformer, BertModel, sdpa",
        lambda m: setattr(m.config, "is_decoder", True),
        lambda m: {"x": m(_inputs()[0]).last_hidden_state},
        r"its config asks for causal attention",
    ),
}


@pytest.mark.parametrize("name", AS_IT_WAS)
def test_what_cannot_be_run_so_is_run_as_it_was_and_told(name: str) -> None:
    which, change, call, reason = AS_IT_WAS[name]
    model, _ = _model(which)
    model.eval()
    with accelerate(model):
        change(model)
        with pytest.warns(RuntimeWarning, match=rf"encoder runs as it was, with padding: .*{reason}"):
            found = call(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _assert_same(found, call(model))


def test_training_with_dropout_of_attention_probabilities() -> None:
    model, call = _model("scGPT")
    wanted = call(model)
    _attention_dropout(model)
    with accelerate(model), pytest.warns(RuntimeWarning, match=r"probabilities is 0\.5 \(omit_attention_dropout=True"):
        call(model)
    with accelerate(model, omit_attention_dropout=True):
        _assert_same(call(model), wanted)


class OwnEncoder(nn.TransformerEncoder):
    pass


def test_what_is_taken_and_what_is_left_is_told() -> None:
    model, _ = _model("scGPT")
    model.other = OwnEncoder(nn.TransformerEncoderLayer(DIM, HEADS), 1, enable_nested_tensor=False)
    model.decoding = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS), 1)
    with pytest.warns(RuntimeWarning, match=r"left as they were: other: expected a plain .*OwnEncoder; decoding: a .*"):
        handle = accelerate(model)
    assert str(handle).splitlines()[0] == "accelerated: transformer_encoder"
    assert [line.split(": ")[1] for line in str(handle).splitlines()[1:]] == ["other", "decoding"]
    assert type(model.other) is OwnEncoder
    refused: list[tuple[nn.Module, str]] = [
        (nn.Linear(2, 2), r"no torch\.nn\.TransformerEncoder and no BertEncoder is in it"),
        (OwnEncoder(nn.TransformerEncoderLayer(DIM, HEADS), 1), r"the model itself: expected a plain torch\.nn\.Tr"),
        (
            _changed_encoder(lambda e: setattr(e.layers[1].self_attn, "add_zero_attn", True)),
            r"0: layers\.0\.activation is silu, expected relu or gelu; 0: layers\.1\.self_attn appends a key",
        ),
        (
            others.geneformer("BertModel", tokens=TOKENS, length=LENGTH, is_decoder=True, **SIZE),
            r"encoder: layer\.0 attends causally \(is_decoder\); encoder: layer\.1 attends causally",
        ),
        (_roberta(), r"encoder: expected a plain torch\.nn\.TransformerEncoder or BertEncoder, got .*RobertaEncoder"),
    ]
    for module, reason in refused:
        with pytest.raises(ValueError, match=f"model: nothing in it can be accelerated: {reason}"):
            accelerate(module)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        accelerate("scGPT")  # type: ignore[arg-type]


def _changed_encoder(change: Callable[[Any], None]) -> nn.Module:
    model = encoder(activation=nn.functional.silu)
    change(model[0])
    return model


def _roberta() -> nn.Module:
    size = {"vocab_size": TOKENS, "hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    return transformers.RobertaModel(transformers.RobertaConfig(**size, intermediate_size=24))


def test_packed_cells_are_what_the_padded_batch_holds() -> None:
    model, call = _model("scGPT")
    model.eval()
    ids, values = _inputs()
    cells = [(values[i, :n].numpy(), ids[i, :n].tolist()) for i, n in enumerate(LENGTHS)]
    batch = Packed.collate(cells)
    assert batch.values.dtype == torch.float32
    assert (batch.cu_seqlens.tolist(), batch.max_seqlen) == ([0, 5, 6, 17, 25], 11)
    assert batch.cu_seqlens.dtype == torch.int32
    rows = model.embed(batch.gene_ids, batch.values)
    out = ragged_encoder(model.transformer_encoder)(rows, batch.cu_seqlens, batch.max_seqlen)
    _assert_same({"x": out[batch.cu_seqlens[:-1].long()]}, {"x": call(model)["cell_emb"]})
    assert batch.positions().tolist() == [i for n in LENGTHS for i in range(n)]
    assert Packed.collate(cells, max_length=4).cu_seqlens.tolist() == [0, 4, 5, 9, 13]
    assert batch.to("meta").values.device.type == "meta"
    bert, _ = _model("Geneformer, BertModel, sdpa")
    with accelerate(bert.eval()):  # an accelerated one is taken too
        packed = ragged_encoder(bert)(packed_embeddings(bert, batch.gene_ids, batch.cu_seqlens), *batch[2:])
        _assert_same({"x": packed}, {"x": bert(ids, attention_mask=USED.long()).last_hidden_state[USED]})


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([], "cells: expected at least one cell"),
        ([([1.0], [1]), ([1.0, 2.0], [1])], r"two vectors of one length, got \(2,\), \(1,\) at 1"),
        ([([[1.0]], [[1]])], r"two vectors of one length, got \(1, 1\), \(1, 1\) at 0"),
    ],
)
def test_cells_that_are_no_pairs_are_refused(cells: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Packed.collate(cells)
