"""Tests of the product head: its term at asked, masked and all genes, gradients, checkpoints, and models without it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import CPU_BACKENDS
from tests.xtrimogene.network.test_decoder import GENES, SIZES, VOCABULARY, _double, _masked, _model
from xtg_kernels import RaggedBatch, use_backend
from xtrimogene.model import XTrimoGene
from xtrimogene.network import model as network_model
from xtrimogene.network.devices import prepared
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.product_head import CellNorm


def _product(width: int = 5, **overrides: object) -> XTrimoGene:
    """A model whose head has no weight that is zero, and moments that no fresh model has."""
    model = _model(product_head=width, **overrides)
    assert model.product_head is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*model.product_head.parameters(), *model.decoder.head.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.product_head.norm.settle(torch.randn(9, 3 + 2 * model.config.dim, generator=generator) + 0.5)
    return model


def _cells(model: XTrimoGene, batch: RaggedBatch) -> Tensor:
    """(batch, width) the cells' vectors, as their formula stands, a cell and a token at a time."""
    head, depth = model.product_head, 2 * model.config.depth_tokens
    assert head is not None
    found = []
    for tokens, values, ids in zip(
        *(each.split(batch.lengths.tolist()) for each in (model(batch), batch.values, batch.gene_ids)), strict=True
    ):
        genes = len(tokens) - depth
        seen = torch.cat([tokens.new_zeros(1), values])[1 : 1 + max(genes, 0)]
        bag = sum(
            (value * model.embedding.gene_table[gene] for value, gene in zip(seen, ids.tolist(), strict=False)),
            tokens.new_zeros(model.config.dim),
        )
        pooled = tokens.mean(0) if genes > 0 else tokens.new_zeros(model.config.dim)
        total, count = seen.sum(), torch.tensor(float(len(seen)), dtype=tokens.dtype)
        numbers = torch.stack([torch.log(1 + count), total / count.clamp(min=1), total / 1000])
        features = torch.cat([numbers, bag / count.clamp(min=1) ** 0.5, pooled])
        normed = (features - head.norm.mean) / (head.norm.variance + 1e-5).sqrt() * head.norm.weight + head.norm.bias
        hidden = (head.hidden.weight @ normed + head.hidden.bias).relu()
        found.append(head.cell_map.weight @ normed + head.cell_map.bias + head.out.weight @ hidden)
    return torch.stack(found)


def _terms(model: XTrimoGene, batch: RaggedBatch) -> Tensor:
    """(batch, positions) the term of every gene in every cell, as its formula stands, a gene and a cell at a time."""
    head = model.product_head
    assert head is not None
    genes = list(zip(model.embedding.gene_table[:-1], head.gene_bias, strict=True))
    return torch.stack(
        [
            torch.stack([(head.gene_map.weight @ row) @ cell + bias for row, bias in genes])
            for cell in _cells(model, batch)
        ]
    )


def _plain_predictions(model: XTrimoGene, masked: MaskedBatch) -> Tensor:
    """The decoder's predictions at the chosen genes, and the term beside them."""
    chosen = masked.chosen_ids.long(), masked.chosen_cu_seqlens
    decoded = model.decode(
        masked.batch,
        masked_ids=masked.masked_ids,
        masked_cu_seqlens=masked.masked_cu_seqlens,
        asked_ids=masked.chosen_ids,
        asked_cu_seqlens=masked.chosen_cu_seqlens,
    )
    cells = torch.repeat_interleave(torch.arange(masked.batch_size), chosen[1].diff().long())
    return model.decoder.predictions(decoded) + _terms(model, masked.batch)[cells, chosen[0]]


@pytest.mark.parametrize("depth_tokens", [False, True])
def test_loss_and_gradients_are_those_of_the_written_out_term(depth_tokens: bool) -> None:
    model, masked = _product(depth_tokens=depth_tokens).double(), _double(_masked(depth_tokens))
    plain = _plain_predictions(model, masked)
    torch.testing.assert_close(model.masked_predictions(masked), plain, rtol=1e-9, atol=1e-9)
    (plain - masked.chosen_values).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = model.loss(masked)
    loss.backward()
    torch.testing.assert_close(loss, (plain - masked.chosen_values).square().sum())
    torch.testing.assert_close(model.loss(masked, "mean"), loss / masked.total_chosen)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_all_genes_and_asked_genes_have_the_same_term(backend: str) -> None:
    model, batch = _product(), _masked().batch
    asked = torch.tensor([40, 3, 59], dtype=torch.int32)
    with torch.no_grad(), use_backend(backend):
        everything = model.predict(batch).view(batch.batch_size, GENES)
        some = model.predict(
            batch, asked_ids=asked.repeat(4), asked_cu_seqlens=torch.arange(5, dtype=torch.int32) * 3
        ).view(4, 3)
        plain = model.decoder.predictions(model.decode(batch)).view_as(everything)
    torch.testing.assert_close(some, everything[:, asked.long()])
    torch.testing.assert_close(everything, plain + _terms(model, batch).detach())
    assert (everything - plain).abs().mean() > 0.01


def test_the_triton_kernels_train_it_in_their_interpreter() -> None:
    model, masked = _product(dim=32, num_heads=2), _masked(cells=3)
    grads = []
    for backend in ("reference", "triton"):
        model.zero_grad()
        with use_backend(backend):
            model.loss(masked).backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for got, want in zip(grads[1], grads[0], strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm().clamp_min(1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_the_norm_has_settled_moments_in_training_too(training: bool) -> None:
    norm = CellNorm(3).double().train(training)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    cells = torch.randn(40, 3, dtype=torch.float64) * 3 + 7
    torch.testing.assert_close(norm(cells), cells / (1 + 1e-5) ** 0.5 * norm.weight + norm.bias)
    norm.settle(cells)
    wanted = (cells - cells.mean(0)) / (cells.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(cells), wanted)
    torch.testing.assert_close(norm(cells[3:4]), wanted[3:4])
    torch.autograd.gradcheck(norm, cells[:5].requires_grad_())


def test_autocast_leaves_the_term_in_float32() -> None:
    model, masked = _product(), _masked()
    encoded, rows = model(masked.batch).detach(), model.embedding.gene_table[:-1]
    assert model.product_head is not None
    features = model.product_features(masked.batch, encoded)
    exact = model.product_head(rows, features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.product_features(masked.batch, encoded), features)
        assert torch.equal(model.product_head(rows, features), exact)
        assert model.masked_predictions(masked).dtype == torch.float32


def test_a_model_without_it_is_the_one_of_before() -> None:
    """Same seed, same weights, with and without, but for the decoder's head, which begins with nothing beside one."""
    plain, with_product = _model(), _model(product_head=5)
    tensors = with_product.state_dict()
    added = set(tensors) - set(plain.state_dict())
    assert {name.split(".")[0] for name in added} == {"product_head"}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, tensors[name]) != name.startswith("decoder.head"), name


def test_a_fresh_one_predicts_as_if_it_were_alone_and_learns_alone() -> None:
    """Encoder and decoder add nothing at first, and the head's own loss gives them no gradient."""
    model = XTrimoGene.from_preset("tiny", VOCABULARY, **{**SIZES, "product_head": 5, "product_dropout": 0.5})
    masked = _masked()
    alone = F.mse_loss(
        model._products(masked.batch, None, masked.chosen_ids, masked.chosen_cu_seqlens), masked.chosen_values
    )
    torch.testing.assert_close(model.loss(masked, "mean"), alone)
    model.product_loss(masked, 0.3, 0.03).backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {
        "embedding.gene_table",
        *(n for n, _ in model.named_parameters() if n.startswith("product_head")),
    }
    model.zero_grad()
    model.loss(masked).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    # But they begin to learn at once.
    assert grads["product_head.cell_map.weight"][:, -model.config.dim :].abs().max() > 0
    assert grads["decoder.head.weight"].abs().max() > 0


def test_the_heads_own_loss_is_that_of_every_gene_it_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out, gene by gene; with nothing hidden beside the masked ones, so that nothing is random."""
    model, masked = _product(), _masked()
    batch, total = masked.batch, 0.0
    for share in (0.0, 1e-9):
        monkeypatch.setattr(network_model, "FURTHER_HIDDEN", share)
        got = model.product_loss(masked, 0.5, 0.2)
    bounds, ends = batch.cu_seqlens.tolist(), masked.chosen_cu_seqlens.tolist()
    for cell, predicted in enumerate(
        model.product_head(model.embedding.gene_table[:-1], model.product_features(batch, None))
    ):
        own = slice(bounds[cell], bounds[cell + 1])
        truth = dict(zip(batch.gene_ids[own].tolist(), batch.values[own].tolist(), strict=True))
        chosen = slice(ends[cell], ends[cell + 1])
        hidden = dict(zip(masked.chosen_ids[chosen].tolist(), masked.chosen_values[chosen].tolist(), strict=True))
        truth |= hidden
        nonzero, unseen = (sum(value > 0 for value in values.values()) for values in (truth, hidden))
        for gene in range(GENES):
            value = truth.get(gene, 0.0)
            weight = 0.2 if value == 0 else 0.5 * nonzero / unseen if gene in hidden else 0.0
            total += weight * (float(predicted[gene].detach()) - value) ** 2
    assert float(got) == pytest.approx(total, rel=1e-5)
    monkeypatch.undo()
    assert model.product_loss(masked, 0.5, 0.2) != model.product_loss(masked, 0.5, 0.2)


def test_channels_of_the_cells_vector_are_dropped_in_training_alone() -> None:
    model, batch = _product(width=64, product_dropout=0.25), _masked().batch
    features = model.product_features(batch, None)
    assert model.product_head is not None
    whole = model.product_head.cells(features)
    model.product_head.norm.eval()
    model.product_head.dropout.train()
    some = model.product_head.cells(features)
    assert 0.1 < float((some == 0).float().mean()) < 0.4
    torch.testing.assert_close(some, torch.where(some == 0, 0.0, whole / 0.75))


def test_a_cells_embedding_is_its_vector_of_the_head() -> None:
    model, batch = _product(), _masked().batch
    vectors = model.embed_batch(batch)
    own = (batch.lengths > 0)[:, None]
    assert 0 < own.sum() < len(own)
    wanted = torch.where(own, _cells(model, batch), torch.nan)
    torch.testing.assert_close(vectors, wanted, equal_nan=True)
    torch.testing.assert_close(model.embed_batch(batch, "product"), vectors, rtol=0, atol=0, equal_nan=True)
    assert model.embed_batch(batch, "mean").shape == (batch.batch_size, model.config.dim)
    plain = (_model().embed_batch(batch, pooling) for pooling in (None, "mean"))
    torch.testing.assert_close(*plain, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="pooling: expected mean or max for a model without product_head, got 'prod"):
        _model().embed_batch(batch, "product")
    with pytest.raises(ValueError, match="pooling: expected one of mean, max, all, product, got 'sum'"):
        model.embed_batch(batch, "sum")


@pytest.mark.parametrize("depth_tokens", [False, True])
def test_slack_empty_cells_and_other_cells_leave_a_cell_alone(depth_tokens: bool) -> None:
    model, whole = _product(depth_tokens=depth_tokens), _masked(depth_tokens).batch
    vectors = model.embed_batch(whole)
    ends = whole.cu_seqlens.tolist()
    for cell, (start, end) in enumerate(itertools.pairwise(ends)):
        alone = RaggedBatch(
            torch.cat([whole.values[start:end], torch.tensor([torch.nan, 3.0])]),
            torch.cat([whole.gene_ids[start:end], torch.tensor([10**6, -5], dtype=torch.int32)]),
            torch.tensor([0, 0, end - start], dtype=torch.int32),
            end - start,
        )
        features = model.product_features(alone, None)
        assert torch.equal(features[1], model.product_features(whole, None)[cell])
        assert torch.equal(features[0], torch.zeros_like(features[0]))
        got = model.embed_batch(alone)
        assert got[0].isnan().all()
        torch.testing.assert_close(got[1], vectors[cell], equal_nan=True)


def test_bfloat16_copies_keep_the_head_in_float32() -> None:
    model = _product()
    assert model.product_head is not None
    with prepared(model, torch.device("cpu"), torch.bfloat16) as ready:
        assert ready.encoder.norm.weight.dtype == torch.bfloat16
        assert ready.product_head is not None
        for name, tensor in ready.product_head.state_dict().items():
            assert torch.equal(tensor, model.product_head.state_dict()[name])
    assert model.bfloat16().embed_batch(_masked().batch).dtype == torch.float32


def test_a_config_of_before_loads_as_one_without_it(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    values = json.loads(path.read_text())
    del values["product_head"], values["product_dropout"], values["gene_std"]
    path.write_text(json.dumps(values))
    loaded = XTrimoGene.from_pretrained(tmp_path / "old")
    assert loaded.config == model.config
    assert torch.equal(loaded.masked_predictions(_masked()), model.masked_predictions(_masked()))


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = _product()
    model.save_pretrained(tmp_path / "model")
    loaded = XTrimoGene.from_pretrained(tmp_path / "model")
    assert loaded.config.product_head == 5
    assert torch.equal(loaded.masked_predictions(_masked()), model.masked_predictions(_masked()))


@pytest.mark.parametrize(
    ("saved", "told", "message"),
    [
        (5, 10**12, r"product_head is 1,000,000,000,000 there and 5 here"),
        (5, None, r"product_head is none there and 5 here"),
        (None, 5, r"missing product_head.norm.weight; .*missing product_head.gene_map.weight"),
    ],
)
def test_another_width_than_the_weights_have_is_refused(
    saved: int | None, told: int | None, message: str, tmp_path: Path
) -> None:
    _model(product_head=saved).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "product_head": told}))
    with pytest.raises(ValueError, match=message):
        XTrimoGene.from_pretrained(tmp_path / "model")


def test_imputed_expression_has_the_term() -> None:
    import anndata

    model, rng = _product(), np.random.default_rng(0)
    counts = anndata.AnnData(rng.poisson(1.0, (4, GENES)).astype(np.float32))
    counts.var_names = list(VOCABULARY.genes)
    got = model.predict_expression(counts, progress=False)
    some = model.predict_expression(counts, ["GENE7", "GENE2"], progress=False)
    np.testing.assert_allclose(some, got[:, [7, 2]], rtol=1e-4, atol=1e-5)
    without = _model().predict_expression(counts, progress=False)
    assert np.abs(got - without).mean() > 0.01
    # Embeddings of genes are the decoder's rows, which the term leaves alone.
    rows = (each.gene_embeddings(counts, ["GENE7"], progress=False) for each in (model, _model()))
    np.testing.assert_array_equal(*rows)


def test_the_fresh_gene_table_has_the_spread_that_is_asked_for() -> None:
    plain, small = _model(), _model(gene_std=0.05)
    torch.testing.assert_close(small.embedding.gene_table, 0.05 * plain.embedding.gene_table)
    assert torch.equal(small.embedding.bin_table, plain.embedding.bin_table)
    with pytest.raises(ValueError, match=r"config gene_std: expected a number > 0, got 0\.0"):
        _model(gene_std=0.0)
