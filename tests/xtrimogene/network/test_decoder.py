"""Tests of xtrimogene.decoder: its savings equal the plain network, outputs and gradients; batch mates; autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.xtrimogene.published import cells_of, published_from, published_names
from xtg_kernels import RaggedBatch, use_backend
from xtrimogene.cells.masking import MaskingConfig, mask_cells
from xtrimogene.model import XTrimoGene
from xtrimogene.network import linear
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.decoder import Decoder, orthogonal_projection
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.vocabulary import Vocabulary

GENES = 60
VOCABULARY = Vocabulary([f"GENE{i}" for i in range(GENES)])
SIZES = {"dim": 24, "num_heads": 3, "decoder_dim": 32, "decoder_heads": 2, "num_bins": 10, "dropout": 0.0}


def _model(**overrides: object) -> XTrimoGene:
    model = XTrimoGene.from_preset("tiny", VOCABULARY, seed=3, **{**SIZES, **overrides})
    with torch.no_grad():
        # Fresh norms and zero biases would hide a norm or a bias that is left out or taken twice.
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def _masked(depth_tokens: bool = False, cells: int = 4, rate: float = 0.3) -> MaskedBatch:
    """Cells of different lengths, the second one without any gene, masked as in pre-training."""
    generator = torch.Generator().manual_seed(5)
    lengths = [17, 0, 30, 1, 8][:cells]
    genes, values = [], []
    for length in lengths:
        genes.append(torch.randperm(GENES, generator=generator)[:length].sort().values.int())
        values.append(torch.randint(1, 5, (length,), generator=generator).float().log1p())
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    batch = RaggedBatch(torch.cat(values), torch.cat(genes), cu_seqlens, max(lengths))
    depth = torch.rand(cells, 2, generator=generator) + 3 if depth_tokens else None
    masking = MaskingConfig(nonzero_rate=rate, zero_rate=rate / 3)
    return mask_cells(batch, torch.arange(cells), masking, epoch=0, num_genes=GENES, depth=depth)


def _double(masked: MaskedBatch) -> MaskedBatch:
    batch = replace(masked.batch, values=masked.batch.values.double())
    return replace(masked, batch=batch, chosen_values=masked.chosen_values.double())


def _ragged(ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    return ids.split(cu_seqlens.diff().tolist())


def _plain_predictions(model: XTrimoGene, masked: MaskedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The unsaved network's predictions at the chosen genes, and its parameters under our names."""
    network = published_from(model)
    hidden = _ragged(masked.masked_ids, masked.masked_cu_seqlens)
    chosen = _ragged(masked.chosen_ids, masked.chosen_cu_seqlens)
    predictions = [
        network.predict(values, gene_ids, hidden_ids)[chosen_ids.long()]
        for (values, gene_ids), hidden_ids, chosen_ids in zip(cells_of(masked.batch), hidden, chosen, strict=True)
    ]
    parameters = dict(network.named_parameters())
    names = published_names(model.config)
    ours = {name: parameters[names[name]] for name, _ in model.named_parameters()}
    return torch.cat(predictions), ours


def _error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def _assert_equal_to_the_plain_network(model: XTrimoGene, masked: MaskedBatch, tolerance: float) -> None:
    predictions = model.masked_predictions(masked)
    plain, parameters = _plain_predictions(model, masked)
    assert predictions.shape == (masked.total_chosen,)
    assert _error(predictions, plain) < tolerance
    model.zero_grad()
    model.loss(masked).backward()
    (plain - masked.chosen_values).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        want = parameters[name].grad.reshape(parameter.shape)
        if name.endswith("k_proj.bias"):
            # One vector added to all keys changes little but the eps terms: it is small beside the weights' gradient.
            scale = parameters[name.replace("bias", "weight")].grad.norm()
            assert (parameter.grad - want).norm() < tolerance * scale
        else:
            assert _error(parameter.grad, want) < tolerance, name


@pytest.mark.parametrize("stabilizer", ["head", "cell"])
@pytest.mark.parametrize("depth_tokens", [False, True])
@pytest.mark.parametrize("decoder_layers", [1, 3])
def test_savings_equal_the_plain_network_in_float64(stabilizer: str, depth_tokens: bool, decoder_layers: int) -> None:
    model = _model(stabilizer=stabilizer, depth_tokens=depth_tokens, decoder_layers=decoder_layers).double()
    with use_backend("reference"):
        _assert_equal_to_the_plain_network(model, _double(_masked(depth_tokens)), 1e-8)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("stabilizer", ["head", "cell"])
@pytest.mark.parametrize("decoder_layers", [1, 3])
def test_savings_equal_the_plain_network_in_float32(
    backend: str, by_blocks: bool, stabilizer: str, decoder_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_blocks:
        _go_by_blocks(monkeypatch)
    model = _model(decoder_layers=decoder_layers, stabilizer=stabilizer)
    with use_backend(backend):
        _assert_equal_to_the_plain_network(model, _masked(), 1e-5)
        # A batch of one cell shares no rows between cells.
        _assert_equal_to_the_plain_network(model, _masked(cells=1), 1e-5)


def _go_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer by blocks of 64 rows, however few there are."""
    for name, value in {"_LARGE_BYTES": 0, "_BLOCK_BYTES": 1, "_MIN_UNITS": 1}.items():
        monkeypatch.setattr(linear, name, value)
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)


def test_the_triton_kernels_agree_in_their_interpreter() -> None:
    model, masked = _model(dim=32, num_heads=2, decoder_layers=2), _masked(cells=3)
    results = []
    for backend in ("reference", "triton"):
        model.zero_grad()
        with use_backend(backend):
            loss = model.loss(masked)
            loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for got, want in zip(results[1], results[0], strict=True):
        assert (got - want).norm() < 1e-4 * want.norm() + 1e-5


def test_each_saving_alone_equals_the_plain_decoder() -> None:
    """All rows of the last layer without asking, and asked genes in any order and twice."""
    model, masked = _model(decoder_layers=2).double(), _double(_masked())
    with use_backend("reference"):
        masks = {"masked_ids": masked.masked_ids, "masked_cu_seqlens": masked.masked_cu_seqlens}
        everything = model.decode(masked.batch, **masks)
        plain = published_from(model)
        hidden = _ragged(masked.masked_ids, masked.masked_cu_seqlens)
        want = torch.cat([plain(*cell, ids) for cell, ids in zip(cells_of(masked.batch), hidden, strict=True)])
        assert _error(model.decoder.normed(everything), want) < 1e-10
        assert _error(model.decoder.predictions(everything), plain.to_final(want)[:, 0]) < 1e-10
        asked = torch.tensor([5, 0, 59, 5], dtype=torch.int32).repeat(4)
        some = model.decode(
            masked.batch, **masks, asked_ids=asked, asked_cu_seqlens=torch.arange(0, 17, 4, dtype=torch.int32)
        )
        rows = torch.arange(4).repeat_interleave(4) * GENES + asked
        assert _error(some, everything[rows]) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_batch_mates_change_nothing(backend: str) -> None:
    model, masked = _model(decoder_layers=2), _masked(cells=5)
    with use_backend(backend), torch.no_grad():
        together = _ragged(model.masked_predictions(masked), masked.chosen_cu_seqlens)
        alone = _ragged(model.masked_predictions(_masked(cells=1)), _masked(cells=1).chosen_cu_seqlens)
    # Within rounding only: a matrix product may sum in another order for another number of rows.
    torch.testing.assert_close(together[0], alone[0], rtol=1e-4, atol=1e-5)


def test_slack_tokens_change_nothing() -> None:
    model, masked = _model(decoder_layers=2), _masked()
    batch = masked.batch
    slack = replace(
        masked,
        batch=RaggedBatch(
            torch.cat([batch.values, torch.full((3,), 7.0)]),
            torch.cat([batch.gene_ids, torch.tensor([-1, 3, 10**6], dtype=torch.int32)]),
            batch.cu_seqlens,
            batch.max_seqlen,
            None if batch.distinct_index is None else torch.cat([batch.distinct_index, torch.full((3,), -1).int()]),
        ),
    )
    with torch.no_grad():
        torch.testing.assert_close(model.masked_predictions(slack), model.masked_predictions(masked))


@pytest.mark.parametrize("by_blocks", [False, True])
def test_bfloat16_autocast(by_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients stay near float32's; the sum over the layers is kept in float32."""
    if by_blocks:
        _go_by_blocks(monkeypatch)
    model, masked = _model(decoder_layers=2), _masked()
    exact = model.loss(masked)
    exact.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rows = model.decode(masked.batch)
        loss = model.loss(masked)
    assert rows.dtype == loss.dtype == torch.float32
    loss.backward()
    assert _error(loss, exact) < 0.02
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        if not name.endswith("k_proj.bias"):
            assert _error(parameter.grad, grads[name]) < 0.1, name


def test_a_bfloat16_model_decodes() -> None:
    model, masked = _model(decoder_layers=2), _masked()
    with torch.no_grad():
        exact = model.masked_predictions(masked)
        rounded = model.bfloat16().masked_predictions(masked)
    assert rounded.dtype == torch.float32
    assert _error(rounded, exact) < 0.1


@pytest.mark.parametrize("by_blocks", [False, True])
def test_checkpointed_activations_give_the_same_gradients(by_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_blocks:
        _go_by_blocks(monkeypatch)
    model, masked = _model(decoder_layers=3, dropout=0.1).train(), _masked()
    kept, grads = [], []
    for checkpointed in (False, True):
        model.checkpoint_activations = checkpointed
        model.zero_grad()
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model.loss(masked)
        loss.backward()
        kept.append(saved)
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert kept[1] < kept[0] / 2
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_a_hook_or_a_replaced_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    _go_by_blocks(monkeypatch)
    model, masked = _model(), _masked()
    layer, calls = model.decoder.layers[0], []
    hooked: list[tuple[str, torch.nn.Module]] = [
        (name, getattr(layer, name)) for name in ("norm1", "q_proj", "out_proj", "norm2", "linear1", "linear2")
    ] + [("bridge", model.decoder.bridge)]

    def remember(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    for name, module in hooked:
        handle = module.register_forward_hook(remember(name))
        model.loss(masked)
        handle.remove()
        assert calls == [name] or (name == "norm1" and set(calls) == {name}), name
        calls.clear()


def test_gradients_stop_where_nobody_needs_them() -> None:
    model, masked = _model(decoder_layers=2), _masked()
    model.requires_grad_(False)
    model.decoder.head.requires_grad_(True)
    model.loss(masked).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        "decoder.head.weight",
        "decoder.head.bias",
    ]


def test_projection_is_orthogonal_in_blocks_and_of_gaussian_lengths() -> None:
    projection = orthogonal_projection(266, 64, generator=torch.Generator().manual_seed(0)).double()
    assert projection.shape == (266, 64)
    lengths = projection.norm(dim=1, keepdim=True)
    for block in (projection / lengths).split(64):
        assert (block @ block.T - torch.eye(len(block))).abs().max() < 1e-5
    # Squared lengths are chi-squared with 64 degrees of freedom: mean 64, variance 128.
    assert abs(float(lengths.square().mean()) - 64) < 4 * (128 / 266) ** 0.5
    assert 60 < float(lengths.square().var()) < 220


def test_projections_come_from_the_generator_alone() -> None:
    model = _model(decoder_layers=2)
    before = [layer.projection.clone() for layer in model.decoder.layers]
    assert not torch.equal(before[0], before[1])
    state = torch.get_rng_state()
    model.redraw_projections(torch.Generator().manual_seed(1))
    once = [layer.projection.clone() for layer in model.decoder.layers]
    model.redraw_projections(torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    for layer, first, drawn in zip(model.decoder.layers, before, once, strict=True):
        assert torch.equal(layer.projection, drawn)
        assert not torch.equal(first, drawn)
    assert not any(layer.projection.requires_grad for layer in model.decoder.layers)


def test_a_redraw_changes_predictions_and_evaluation_does_not() -> None:
    model, masked = _model().eval(), _masked()
    with torch.no_grad():
        first = model.masked_predictions(masked)
        assert torch.equal(model.masked_predictions(masked), first)
        model.redraw_projections(torch.Generator().manual_seed(1))
        assert not torch.equal(model.masked_predictions(masked), first)


def test_the_decoder_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model, masked = _model(decoder_layers=2), _masked()
    compiled = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(masked.batch), model.decode(masked.batch))


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="dim: expected a multiple of num_heads = 3, got 32"):
        Decoder(24, 32, 3, 1, ffn_dim=64, num_features=8)


def test_config_sizes_reach_the_layers() -> None:
    config = XTrimoGeneConfig.preset(
        "tiny", num_genes=GENES, favor_features=7, favor_eps=0.5, stabilizer="cell", layer_norm_eps=1e-3, ffn_mult=3
    )
    layer = XTrimoGene(config, VOCABULARY).decoder.layers[0]
    assert layer.projection.shape == (7, 32)
    assert (layer.favor_eps, layer.stabilizer) == (0.5, "cell")
    assert layer.linear1.out_features == 192
    assert layer.norm1.eps == layer.norm2.eps == 1e-3
