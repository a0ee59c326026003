"""Tests of the product head: its term at asked, masked and all genes, gradients, checkpoints, and models without it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import CPU_BACKENDS
from tests.xtrimogene.network.test_decoder import GENES, VOCABULARY, _double, _masked, _model
from xtg_kernels import RaggedBatch, use_backend
from xtrimogene.model import XTrimoGene
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.product_head import CellNorm


def _product(width: int = 5, **overrides: object) -> XTrimoGene:
    model = _model(product_head=width, **overrides)
    assert model.product_head is not None
    # Moments that no fresh model has, so that one that is left out is seen.
    generator = torch.Generator().manual_seed(0)
    model.product_head.norm.settle(torch.randn(9, model.config.dim, generator=generator) + 0.5)
    return model


def _terms(model: XTrimoGene, batch: RaggedBatch) -> Tensor:
    """(batch, positions) the term of every gene in every cell, as its formula stands, a gene and a cell at a time."""
    head = model.product_head
    assert head is not None
    rows = model(batch).split(batch.lengths.tolist())
    terms = []
    for tokens in rows:
        empty = len(tokens) <= 2 * model.config.depth_tokens
        pooled = tokens.new_zeros(model.config.dim) if empty else tokens.mean(0)
        normed = (pooled - head.norm.mean) / (head.norm.variance + 1e-5).sqrt() * head.norm.weight + head.norm.bias
        cell = head.cell_map.weight @ normed
        terms.append(torch.stack([(head.gene_map.weight @ row) @ cell for row in model.embedding.gene_table[:-1]]))
    return torch.stack(terms)


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


def test_the_norm_takes_the_moments_of_the_batch_in_training_and_settled_ones_in_evaluation() -> None:
    norm = CellNorm(3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    cells = torch.randn(40, 3, dtype=torch.float64) * 3 + 7
    wanted = (cells - cells.mean(0)) / (cells.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(cells), wanted)
    assert torch.equal(norm.mean, torch.zeros(3))  # nothing is averaged along the way
    norm.settle(cells)
    # One cell has no moments of its own.
    torch.testing.assert_close(norm(cells[:1]), wanted[:1])
    norm.eval()
    torch.testing.assert_close(norm(cells[:7]), wanted[:7])
    norm.train()
    torch.autograd.gradcheck(norm, cells[:5].requires_grad_())


def test_autocast_leaves_the_term_in_float32() -> None:
    model, masked = _product(), _masked()
    encoded = model(masked.batch).detach()
    arguments = (model.embedding.gene_table[:-1], encoded, masked.batch.cu_seqlens)
    assert model.product_head is not None
    exact = model.product_head(*arguments, depth_tokens=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.product_head(*arguments, depth_tokens=False), exact)
        assert model.masked_predictions(masked).dtype == torch.float32


def test_a_model_without_it_is_the_one_of_before() -> None:
    """Same seed, same weights, with and without; and no term at all unless the config asks for one."""
    plain, with_product = _model(), _product()
    tensors = with_product.state_dict()
    added = set(tensors) - set(plain.state_dict())
    assert {name.split(".")[0] for name in added} == {"product_head"}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    masked = _masked()
    assert torch.equal(plain.masked_predictions(masked), with_product.decoder.predictions(_decoded(plain, masked)))


def _decoded(model: XTrimoGene, masked: MaskedBatch) -> Tensor:
    genes = {"asked_ids": masked.chosen_ids, "asked_cu_seqlens": masked.chosen_cu_seqlens}
    hidden = {"masked_ids": masked.masked_ids, "masked_cu_seqlens": masked.masked_cu_seqlens}
    return model.decode(masked.batch, **genes, **hidden)


def test_a_config_of_before_loads_as_one_without_it(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    values = json.loads(path.read_text())
    del values["product_head"], values["gene_std"]
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
