"""Cell types on made cells: fitted, predicted and judged, killed and resumed, and the one line for bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from xtg_kernels import RaggedBatch
from xtrimogene import Vocabulary, XTrimoGene, cli
from xtrimogene.cells.ragged import taken
from xtrimogene.tasks import annotation, baselines, cell_types
from xtrimogene.tasks.annotation import evaluate, fit, predict
from xtrimogene.tasks.cell_types import (
    CellTypeHead,
    CellTypeModel,
    CellTypeNetwork,
    FitOptions,
    LabelledCells,
    encoded,
    feature_width,
    features_of,
)
from xtrimogene.tasks.options import (
    CONFIDENCE_COLUMN,
    MAJORITY_COLUMN,
    PROBABILITIES_KEY,
    TUNES,
    TYPE_COLUMN,
    TYPES_KEY,
    UNKNOWN,
)
from xtrimogene.tasks.splits import validation_part
from xtrimogene.tasks.work import partial_folder

ROOT = Path(__file__).parents[3]
GENES = [f"GENE{i}" for i in range(60)]
KINDS = ["alpha", "beta", "gamma"]
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}
FIT: dict[str, Any] = {**QUIET, "epochs": 6, "learning_rate": 5e-3, "batch_cells": 16}


def _cells(count: int, seed: int) -> anndata.AnnData:
    """Counts of three kinds of cells from five donors."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(9).gamma(0.5, 3.0, (3, len(GENES)))
    kind = np.arange(count) % 3
    counts = rng.poisson(means[kind] * rng.uniform(0.5, 2, count)[:, None]).astype(np.float32)
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(np.array(KINDS)[kind]),
            "donor": np.array([f"d{i}" for i in range(5)])[np.arange(count) // 3 % 5],
            "same": "x",
            "own": np.array(["p", "q", "r"])[kind],
        },
        index=[f"s{seed}_{i}" for i in range(count)],
    )
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def network() -> XTrimoGene:
    sizes = {"dim": 16, "num_heads": 2, "decoder_dim": 16, "num_layers": 2, "gene_std": 0.5, "dropout": 0.1}
    return XTrimoGene.from_preset("tiny", Vocabulary(GENES), seed=1, **sizes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.h5ad"
    _cells(150, 2).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def model(network: XTrimoGene, reference: Path) -> Path:
    output = reference.with_name("model")
    fit(reference, network, "kind", output, group="donor", tune="all", **FIT)
    return output


@pytest.mark.parametrize("tune", TUNES)
def test_types_are_learned_and_only_what_is_tuned_changes(network: XTrimoGene, tmp_path: Path, tune: str) -> None:
    epochs = {"head": 40, "published": 12, "all": 6}[tune]
    report = fit(_cells(150, 2), network, "kind", tmp_path / "model", tune=tune, **{**FIT, "epochs": epochs})
    assert report.types == KINDS
    assert report.cells == {"training": 135, "validation": 15}
    found = predict(tmp_path / "model", _cells(60, 1), **QUIET)
    assert found.labels is not None
    assert (found.labels == np.array(KINDS)[np.arange(60) % 3]).mean() > 0.9
    before, after = network.state_dict(), CellTypeModel.load(tmp_path / "model").network.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    if tune == "head":
        assert not changed
    elif tune == "published":
        assert changed
        assert all(name.startswith("encoder.layers.0.") for name in changed)  # the last but one of two
    else:
        assert changed >= {"embedding.gene_table", "encoder.layers.0.linear1.weight", "encoder.layers.1.linear1.weight"}
        assert all(name.startswith(("embedding.", "encoder.")) for name in changed)


@pytest.mark.parametrize("depth_tokens", [False, True])
def test_of_a_product_head_the_cells_vector_is_read_too(tmp_path: Path, depth_tokens: bool) -> None:
    sizes = {"dim": 16, "num_heads": 2, "decoder_dim": 16, "num_layers": 1, "dropout": 0.0, "product_head": 4}
    own = XTrimoGene.from_preset("tiny", Vocabulary(GENES), seed=1, **sizes, depth_tokens=depth_tokens)
    ids = torch.tensor([1, 4, 0, 2, 5], dtype=torch.int32)
    bounds = torch.tensor([0, 2, 5, 5], dtype=torch.int32)
    batch = RaggedBatch(torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5]), ids, bounds, 3)
    # The same weights without depth tokens, whose cells all tokens belong to.
    plain = XTrimoGene.from_preset("tiny", Vocabulary(GENES), seed=1, **sizes)
    if not depth_tokens:
        wanted = torch.cat([plain.embed_batch(batch, "max"), plain.embed_batch(batch, "product")], dim=1)
        torch.testing.assert_close(features_of(own, batch), wanted, equal_nan=True)
    # The last two tokens are genes as others are. (A fresh head knows nothing of the encoder's rows.)
    changed = RaggedBatch(torch.tensor([1.0, 2.5, 0.5, 3.0, 1.5]), ids, bounds, 3)
    assert not torch.equal(features_of(own, changed)[0, 16:], features_of(own, batch)[0, 16:])
    assert features_of(own, batch)[:2].isfinite().all()
    assert features_of(own, batch)[2].isnan().all()
    assert features_of(own, batch).shape == (3, feature_width(own.config)) == (3, 20)
    fit(_cells(60, 2), own, "kind", tmp_path / "model", tune="all", **{**FIT, "epochs": 2})
    tuned = CellTypeModel.load(tmp_path / "model").network.state_dict()
    retuned = {name for name, tensor in own.state_dict().items() if not torch.equal(tensor, tuned[name])}
    assert "product_head.cell_map.weight" in retuned
    assert predict(tmp_path / "model", _cells(9, 1), **QUIET).labels is not None


def test_a_model_works_wherever_its_folder_is(model: Path, tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(model, copied)
    here, there = (predict(each, _cells(30, 1), **QUIET) for each in (model, copied))
    assert np.array_equal(here.labels, there.labels)
    assert np.array_equal(here.confidence, there.confidence)
    assert {path.suffix for path in copied.rglob("*") if path.is_file()} == {".json", ".safetensors", ".tsv", ".md"}
    card = (copied / "README.md").read_text(encoding="utf-8")
    assert "| gamma | 50 |" in card
    assert XTrimoGene.from_pretrained(copied / "network").vocabulary.genes == tuple(GENES)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".loom"])
def test_a_file_is_annotated_as_the_same_cells_in_memory(model: Path, tmp_path: Path, suffix: str) -> None:
    cells = _cells(30, 1)
    cells.X[4] = 0
    path = tmp_path / f"cells{suffix}"
    if suffix == ".loom":
        with h5py.File(path, "w") as file:
            file["matrix"] = np.asarray(cells.X).T
            file["row_attrs/Gene"] = np.array(GENES, dtype=h5py.string_dtype())
            file["col_attrs/CellID"] = np.array(cells.obs_names, dtype=h5py.string_dtype())
    else:
        (cells.write_zarr if suffix == ".zarr" else cells.write_h5ad)(path)
    output = tmp_path / f"out{'.zarr' if suffix == '.zarr' else '.h5ad'}"
    options: dict[str, Any] = {**QUIET, "unknown_below": 0.7}
    with pytest.warns(UserWarning, match="1 of 30 cells have no gene of the vocabulary; their type is 'unknown'"):
        told = predict(model, path, output=output, **options)
    with pytest.warns(UserWarning, match="no gene"):
        expected = predict(model, cells, **options)
    result = anndata.read_zarr(output) if suffix == ".zarr" else anndata.read_h5ad(output)
    assert expected.labels is not None
    assert result.obs[TYPE_COLUMN].tolist() == expected.labels.tolist() == cells.obs[TYPE_COLUMN].tolist()
    assert result.obs[TYPE_COLUMN].dtype == "category"
    np.testing.assert_array_equal(result.obs[CONFIDENCE_COLUMN], expected.confidence)
    np.testing.assert_array_equal(result.obsm[PROBABILITIES_KEY], cells.obsm[PROBABILITIES_KEY])
    assert result.uns[TYPES_KEY].tolist() == KINDS
    assert (told.cells, told.empty_cells, told.unknown) == (30, 1, int((expected.labels == UNKNOWN).sum()))
    assert expected.labels[4] == UNKNOWN
    below = result.obsm[PROBABILITIES_KEY].max(axis=1) < 0.7
    assert set(expected.labels[below]) <= {UNKNOWN}
    if suffix != ".loom":
        assert result.obs["donor"].tolist() == cells.obs["donor"].tolist()
    # A second time over it: the columns are replaced; and a run that is over goes on with no error.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = predict(model, path, output=output, resume=True, **options)
        if suffix != ".loom":  # whose result holds no counts
            predict(model, output, output=tmp_path / f"more{output.suffix}", **QUIET)
    assert (again.resumed_cells, again.unknown, again.counts) == (30, told.unknown, told.counts)


def test_a_cell_s_type_does_not_depend_on_its_batch(model: Path) -> None:
    cells = _cells(40, 1)
    predict(model, cells, **QUIET)
    alone = _cells(40, 1)[7:8].copy()
    predict(model, alone, **QUIET)
    few = _cells(40, 1)
    predict(model, few, max_tokens=100, **QUIET)
    expected = cells.obsm[PROBABILITIES_KEY]
    np.testing.assert_allclose(alone.obsm[PROBABILITIES_KEY][0], expected[7], rtol=0, atol=2e-6)
    np.testing.assert_allclose(few.obsm[PROBABILITIES_KEY], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("vote", ["donor", "auto"])
def test_a_majority_decides_for_its_group(model: Path, vote: str) -> None:
    cells = _cells(90, 1)
    predict(model, cells, majority_vote=vote, **QUIET)
    types, voted = cells.obs[TYPE_COLUMN].astype(str), cells.obs[MAJORITY_COLUMN].astype(str)
    if vote == "auto":
        assert (voted == cells.obs["kind"].astype(str)).mean() > 0.9
        return
    for _, group in cells.obs.groupby("donor", observed=True):
        counts = types[group.index].value_counts()
        assert set(voted[group.index]) <= set(counts.index[counts == counts.max()])


def test_majority_counts_unknown_cells_too() -> None:
    codes = np.array([-1, -1, 0, 1, 1, 0], np.int64)
    assert baselines.majority(codes, np.array(["a", "a", "a", "b", "b", "b"])).tolist() == [-1, -1, -1, 1, 1, 1]


def test_temperature_and_calibration_error() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20_000, 4)) * 2
    shares = baselines.softmax(scores)
    truth = (shares.cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    assert baselines.temperature_of(3 * scores, truth) == pytest.approx(3, rel=0.05)
    assert baselines.calibration_error(shares, truth) < 0.02
    assert baselines.calibration_error(baselines.softmax(3 * scores), truth) > 0.1
    # By hand: ten cells of confidence 0.9, of which six are right.
    certain = np.tile([0.9, 0.1], (10, 1))
    assert baselines.calibration_error(certain, np.array([0] * 6 + [1] * 4)) == pytest.approx(0.3)


def test_what_a_model_says_is_what_it_is_said_to_compute(model: Path, reference: Path) -> None:
    """Written down once more, in float64: the encoder's rows, their maximum, the moments of the training cells."""
    known = CellTypeModel.load(model)
    assert known.head.temperature.item() == pytest.approx(known.settings["validation"]["temperature"])
    assert known.settings["validation"]["temperature"] != 1
    cells = anndata.read_h5ad(reference)
    kind, donor = (cells.obs[name].astype(str).to_numpy(object) for name in ("kind", "donor"))
    trained = cells[~validation_part(kind, donor, share=0.1, seed=0)]
    _check_probabilities(model, trained)


def _features(known: CellTypeModel, cells: anndata.AnnData) -> torch.Tensor:
    """(n, dim) float64 the maximum over the encoder's rows, a cell at a time."""
    network, rows = known.network.double(), []
    for counts in np.asarray(cells.X, np.float64):
        genes = np.flatnonzero(counts)
        values = torch.from_numpy(np.log1p(counts[genes] / counts.sum() * 1e4).astype(np.float32)).double()
        ids = torch.from_numpy(genes.astype(np.int32))
        batch = RaggedBatch(values, ids, torch.tensor([0, len(genes)], dtype=torch.int32), len(genes))
        rows.append(network(batch).max(dim=0).values)
    return torch.stack(rows)


def test_losses_weigh_types_and_the_temperature_is_that_of_the_validation_part(
    network: XTrimoGene, tmp_path: Path
) -> None:
    cells = _cells(150, 2)
    cells = cells[(np.arange(150) % 3 > 0) | (np.arange(150) > 100)].copy()  # a third as many of the first type
    one_step = {**QUIET, "tune": "head", "epochs": 1, "batch_cells": 200, "validation_share": 0.3, "seed": 5}
    fit(cells, network, "kind", tmp_path / "model", **one_step)
    known = CellTypeModel.load(tmp_path / "model")
    kinds = cells.obs["kind"].astype(str).to_numpy(object)
    held_out = validation_part(kinds, None, share=0.3, seed=5)
    codes = torch.from_numpy(np.searchsorted(KINDS, kinds.astype(str)))
    weight = torch.bincount(codes[~held_out]).double() ** -0.5

    def loss(scores: torch.Tensor, truth: torch.Tensor) -> float:
        likelihood = -scores.log_softmax(dim=1)[torch.arange(len(truth)), truth]
        return float((weight[truth] * likelihood).sum() / weight[truth].sum())

    torch.manual_seed(5)
    fresh, head = CellTypeHead(16, 3).double(), known.head.double()
    with torch.no_grad():
        features = _features(known, cells)
        first = loss(fresh.train()(features[~held_out]), codes[~held_out])
        scores = head(features[held_out])
    assert known.settings["history"][0]["training loss"] == pytest.approx(first, rel=1e-4)
    validation = known.settings["validation"]
    assert validation["loss"] == pytest.approx(loss(scores, codes[held_out]), rel=1e-4)
    wanted = baselines.temperature_of(scores.numpy(), codes[held_out].numpy())
    assert validation["temperature"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("tune", ["all", "published"])
def test_each_layer_has_its_own_rate(network: XTrimoGene, tmp_path: Path, tune: str) -> None:
    """The first step of Adam moves a weight by its rate, and a little for the decay. Without dropout: with it the
    norm's gradients may be as small as what Adam adds to them."""
    weights = network.state_dict()
    network = XTrimoGene(dataclasses.replace(network.config, dropout=0.0), network.vocabulary)
    network.load_state_dict(weights)
    one_step = {**QUIET, "tune": tune, "epochs": 1, "batch_cells": 200, "learning_rate": 1e-3}
    fit(_cells(60, 2), network, "kind", tmp_path / "model", **one_step)
    known = CellTypeModel.load(tmp_path / "model")
    torch.manual_seed(0)
    before = {"head.out.weight": CellTypeHead(16, 3).out.weight, **network.state_dict()}
    after = {"head.out.weight": known.head.out.weight, **known.network.state_dict()}
    expected = {"head.out.weight": 1.0, "encoder.layers.0.linear1.weight": 0.8, "encoder.layers.1.linear1.weight": 0.0}
    if tune == "all":
        expected |= {
            "encoder.norm.weight": 0.8, "encoder.layers.1.linear1.weight": 0.8,
            "encoder.layers.0.linear1.weight": 0.8**2, "embedding.gene_table": 0.8**3,
        }  # fmt: skip
    moved = {name: float((after[name] - before[name]).detach().abs().max()) for name in expected}
    assert moved == pytest.approx({name: 1e-3 * share for name, share in expected.items()}, rel=0.02)


def test_a_fit_ends_where_its_patience_does(network: XTrimoGene, tmp_path: Path) -> None:
    options = {"tune": "head", "epochs": 60, "patience": 2, "learning_rate": 0.5}
    told = fit(_cells(60, 2), network, "kind", tmp_path / "model", **QUIET, **options)
    assert told.epochs == told.best_epoch + 2 < 60
    rest = {"validation_share": 0.1, "batch_cells": 2, "batch_tokens": 1, "dtype": "float32", "seed": 0}
    unsaid = dict.fromkeys(("learning_rate", "epochs", "patience"))
    found = {tune: FitOptions.checked(tune, {**rest, **unsaid}) for tune in TUNES}
    assert {tune: (each.learning_rate, each.epochs, each.patience) for tune, each in found.items()} == {
        "head": (2e-3, 200, 20), "published": (1e-3, 30, 5), "all": (2e-3, 30, 5),
    }  # fmt: skip


@pytest.mark.parametrize(("tune", "cells", "tokens"), [("head", 60, 130), ("all", 60, 130), ("all", 2, 1000)])
def test_no_batch_is_over_its_budget(
    network: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: str, cells: int, tokens: int
) -> None:
    sizes: list[tuple[int, int]] = []

    def seen(own: Any, batch: RaggedBatch) -> torch.Tensor:
        sizes.append((len(batch.values), len(batch.lengths)))
        return features_of(own, batch)

    monkeypatch.setattr(cell_types, "features_of", seen)
    monkeypatch.setattr(cell_types, "_PIECE", 7)
    options = {"tune": tune, "epochs": 1, "batch_cells": cells, "batch_tokens": tokens}
    fit(_cells(60, 2), network, "kind", tmp_path / "model", **QUIET, **options)
    assert max(each for each, _ in sizes) <= tokens
    assert max(each for _, each in sizes) == min(cells, 4)  # of 30 genes each, about


def test_features_of_pieces_are_those_of_each_cell(network: XTrimoGene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_types, "_PIECE", 7)
    cells = LabelledCells.read(_cells(20, 2), network, "kind", None, {}, 1000, False)
    module = CellTypeNetwork(network, CellTypeHead(16, 3))
    found = encoded(module, cells.packed, 130, None, False)
    with torch.no_grad():
        alone = torch.cat([module.features(taken(cells.packed, np.array([row]))) for row in range(20)])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


def test_the_reading_options_reach_fit_predict_and_evaluate(network: XTrimoGene, tmp_path: Path) -> None:
    def hidden(count: int, seed: int) -> anndata.AnnData:
        cells = _cells(count, seed)
        cells.layers["counts"] = cells.X.copy()
        cells.X[:] = 1
        cells.var = pd.DataFrame({"symbol": GENES}, index=[f"ENS{i}" for i in range(len(GENES))])
        cells.obs["total"] = 2 * cells.layers["counts"].sum(axis=1)
        return cells

    one = {**QUIET, "tune": "head", "epochs": 3}
    options: dict[str, Any] = {"layer": "counts", "gene_symbols": "symbol"}
    plain = fit(_cells(60, 2), network, "kind", tmp_path / "plain", **one)
    told = fit(hidden(60, 2), network, "kind", tmp_path / "hidden", **one, **options)
    assert told.validation == plain.validation
    whole: dict[str, Any] = {**QUIET, "untrained": False}
    expected = evaluate(tmp_path / "plain", _cells(30, 1), "kind", reference=_cells(60, 2), **whole)
    found = evaluate(tmp_path / "hidden", hidden(30, 1), "kind", reference=hidden(60, 2), **whole, **options)
    assert (found.methods, found.confusion) == (expected.methods, expected.confusion)
    # The reference is read as the fit read it, whatever the judged cells hold.
    mixed = evaluate(tmp_path / "hidden", _cells(30, 1), "kind", reference=hidden(60, 2), **whole)
    assert mixed.loss == expected.loss
    same = predict(tmp_path / "plain", _cells(30, 1), **QUIET)
    read = predict(tmp_path / "plain", hidden(30, 1), **QUIET, **options)
    assert np.array_equal(same.confidence, read.confidence)
    # Of a total twice as large, counts are half as much.
    halved = predict(tmp_path / "plain", hidden(30, 1), **QUIET, **options, total_counts="total")
    assert not np.array_equal(same.confidence, halved.confidence)


def test_what_is_below_the_limit_is_unknown_and_nothing_else(model: Path) -> None:
    known = CellTypeModel.load(model)
    known.head.temperature.fill_(20.0)  # these cells are easy: all else would be 1
    confidence = predict(known, _cells(30, 1), **QUIET).confidence
    assert confidence is not None
    limit = float(np.sort(confidence)[10])
    labels = predict(known, _cells(30, 1), unknown_below=limit, **QUIET).labels
    assert labels is not None
    assert ((labels == UNKNOWN) == (confidence < limit)).all()


def test_a_prediction_goes_on_window_by_window(
    model: Path, network: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, output = tmp_path / "cells.h5ad", tmp_path / "out.h5ad"
    _cells(30, 1).write_h5ad(cells)
    whole = _cells(30, 1)
    predict(model, whole, majority_vote="donor", **QUIET)
    options: dict[str, Any] = {**QUIET, "output": output, "majority_vote": "donor"}
    monkeypatch.setattr(annotation, "WINDOW", 8)
    windows: list[int] = []

    def interrupted(self: Any, batch: RaggedBatch) -> torch.Tensor:
        windows.append(len(batch.lengths))
        if len(windows) == 3:
            raise KeyboardInterrupt
        return rows_of(self, batch)

    rows_of = annotation._Labelling.rows_of
    with monkeypatch.context() as patched:
        patched.setattr(annotation._Labelling, "rows_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict(model, cells, **options)
    assert windows == [8, 8, 8]
    fit(_cells(60, 2), network, "kind", tmp_path / "other", **{**QUIET, "tune": "head", "epochs": 1})
    for changed in ({"unknown_below": 0.5}, {"majority_vote": "auto"}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            predict(model, cells, resume=True, **{**options, **changed})
    own = CellTypeModel.load(model)
    with torch.no_grad():
        own.head.temperature.mul_(2)
    with pytest.raises(ValueError, match="head"):
        predict(own, cells, resume=True, **options)
    assert predict(model, cells, resume=True, **options).resumed_cells == 16
    found = anndata.read_h5ad(output)
    for column in (TYPE_COLUMN, MAJORITY_COLUMN):
        assert found.obs[column].tolist() == whole.obs[column].tolist()
    np.testing.assert_allclose(found.obsm[PROBABILITIES_KEY], whole.obsm[PROBABILITIES_KEY], rtol=0, atol=2e-6)


def test_the_others_are_fitted_to_the_cells_of_the_fit(model: Path, reference: Path, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}

    def fitted_types(network: Any, cells: Any, held_out: Any, *rest: Any) -> Any:
        seen.update(network={name: each.clone() for name, each in network.state_dict().items()}, held_out=held_out)
        return cell_types.fitted_types(network, cells, held_out, *rest)

    def guesses(known: Any, asked: Any, codes: Any, ours: Any) -> Any:
        seen.update(known=known.toarray(), codes=codes)
        return given(known, asked, codes, ours)

    given = baselines.guesses
    monkeypatch.setattr(annotation, "fitted_types", fitted_types)
    monkeypatch.setattr(baselines, "guesses", guesses)
    evaluate(model, _cells(30, 1), "kind", **QUIET)
    cells = anndata.read_h5ad(reference)
    counts = np.asarray(cells.X, np.float64)
    np.testing.assert_allclose(seen["known"], np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4), rtol=1e-5)
    kind, donor = (cells.obs[name].astype(str).to_numpy(object) for name in ("kind", "donor"))
    assert (np.array(KINDS)[seen["codes"]] == kind).all()
    assert (seen["held_out"] == validation_part(kind, donor, share=0.1, seed=0)).all()
    tuned = CellTypeModel.load(model).network.state_dict()
    weights = [name for name, each in tuned.items() if each.ndim > 1 and not torch.equal(each, seen["network"][name])]
    assert {"embedding.gene_table", "encoder.layers.0.linear1.weight"} <= set(weights)
    assert (tuned["embedding.gene_table"] - seen["network"]["embedding.gene_table"]).abs().mean() > 0.1


def _check_probabilities(model: Path, trained: anndata.AnnData) -> None:
    """What predict says against float64, for a model that was trained on these cells."""
    known = CellTypeModel.load(model)
    # These cells are easy: at their own temperature all but one probability of each are next to 0.
    known.head.temperature.fill_(20.0)
    found = _cells(20, 1)
    predict(known, found, **QUIET)
    head = known.head.double()
    with torch.no_grad():
        own = _features(known, trained)
        x = (_features(known, _cells(20, 1)) - own.mean(dim=0)) / (own.var(dim=0) + 1e-6).sqrt()
        scores = head.out(head.hidden(x).clamp(min=0)) / head.temperature
    np.testing.assert_allclose(found.obsm[PROBABILITIES_KEY], scores.softmax(dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tune", ["head", "all"])
def test_a_fit_killed_at_any_moment_ends_with_the_same_bits(
    network: XTrimoGene, reference: Path, tmp_path: Path, tune: str
) -> None:
    network.save_pretrained(tmp_path / "checkpoint")
    options = {"tune": tune, "epochs": 2, "batch_cells": 32, "seed": 3}
    command = [
        "annotate", "fit", "--data", str(reference), "--checkpoint", str(tmp_path / "checkpoint"), "--label", "kind",
        "--output", str(tmp_path / "killed"), "--device", "cpu", "--quiet", "--tune", tune, "--epochs", "2",
        "--batch-cells", "32", "--seed", "3",
    ]  # fmt: skip
    script = f"""
import os, signal
from xtrimogene import cli
from xtrimogene.tasks import fitting
from xtrimogene.tasks.work import WorkFolder
fitting.SAVE_SECONDS = 0.0
save, saved = WorkFolder.save, []
def killing(self, name, tensors, numbers):
    save(self, name, tensors, numbers)
    saved.append(name)
    if len(saved) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
WorkFolder.save = killing
cli.main({command!r})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed").exists()
    assert (partial_folder(tmp_path / "killed") / "state.safetensors").is_file()
    common: dict[str, Any] = {**QUIET, **options}
    with pytest.raises(FileExistsError, match="--resume"):
        fit(reference, tmp_path / "checkpoint", "kind", tmp_path / "killed", **common)
    with pytest.raises(ValueError, match=r"resume: expected the data and options .* seed was 3, is 4"):
        fit(reference, tmp_path / "checkpoint", "kind", tmp_path / "killed", resume=True, **{**common, "seed": 4})
    other = XTrimoGene(network.config, network.vocabulary)
    with pytest.raises(ValueError, match="checkpoint was"):
        fit(reference, other, "kind", tmp_path / "killed", resume=True, **common)
    assert cli.main([*command, "--resume"]) == 0
    fit(reference, tmp_path / "checkpoint", "kind", tmp_path / "whole", **common)
    for name in ("task.safetensors", "task.json", "network/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    # A fit that is over is no error to go on with; another one's model is.
    told = fit(reference, tmp_path / "checkpoint", "kind", tmp_path / "whole", resume=True, **common)
    assert told.epochs == 2
    with pytest.raises(FileExistsError, match="not empty"):
        fit(reference, tmp_path / "checkpoint", "kind", tmp_path / "whole", resume=True, **{**common, "seed": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "killed", "whole"]


def test_the_report_has_all_ways_on_the_same_cells(model: Path, tmp_path: Path) -> None:
    evaluation = evaluate(model, _cells(60, 1), "kind", output=tmp_path / "report", **QUIET)
    assert set(evaluation.methods) == {
        "this model", "this model, majority vote", "logistic regression, L2", "logistic regression, L1",
        "logistic regression, L2, majority vote", "15 neighbours on 50 components", "untrained network, same tuning",
    }  # fmt: skip
    assert evaluation.methods["logistic regression, L2"]["accuracy"] > 0.95
    assert evaluation.compared == {"cells": 150, "genes": 60}
    assert np.sum(evaluation.confusion) == evaluation.cells == 60
    assert np.trace(evaluation.confusion) / 60 == pytest.approx(evaluation.methods["this model"]["accuracy"])
    assert {name: each["cells"] for name, each in evaluation.per_type.items()} == dict.fromkeys(KINDS, 20)
    files = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {f"{name}.{kind}" for name in ("methods", "confusion", "reliability") for kind in ("png", "svg")}
    assert files == {"report.html", "report.md", "report.json", *pictures}
    assert json.loads((tmp_path / "report" / "report.json").read_text())["cells"] == 60
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert all(name in text for name in evaluation.methods)
    with pytest.raises(FileExistsError, match="--overwrite"):
        evaluate(model, _cells(60, 1), "kind", output=tmp_path / "report", **QUIET)


def test_a_model_is_not_judged_by_what_it_was_fitted_to(model: Path, reference: Path) -> None:
    fitted_to = anndata.read_h5ad(reference)[:9].copy()
    both = anndata.concat([_cells(30, 1), fitted_to])
    with pytest.raises(ValueError, match="9 of 39 cells are among those that the model was fitted to"):
        evaluate(model, both, "kind", untrained=False, **QUIET)
    with pytest.raises(ValueError, match="reference: expected the cells that the model was fitted to, got others"):
        evaluate(model, _cells(30, 1), "kind", reference=_cells(150, 5), **QUIET)


def test_without_the_reference_a_model_stands_alone(network: XTrimoGene, tmp_path: Path) -> None:
    known, judged = _cells(60, 2), _cells(30, 1)
    for cells in (known, judged):  # a cell of so few genes may be like another one by chance
        cells.X[0] = [7, 2, 1] + [0] * 57
    fit(known, network, "kind", tmp_path / "model", **{**FIT, "epochs": 1})
    with pytest.warns(UserWarning, match="reference: the cells .* are not where they were"):
        alone = evaluate(tmp_path / "model", judged, "kind", output=tmp_path / "alone", **QUIET)
    assert set(alone.methods) == {"this model"}
    beside = evaluate(
        tmp_path / "model", judged, "kind", output=tmp_path / "beside", reference=known, untrained=False, **QUIET
    )
    told = {name: (tmp_path / name / "report.md").read_text(encoding="utf-8") for name in ("alone", "beside")}
    held_out = "The cells of this report had no part in it."
    assert "not known whether cells of this report had a part" in told["alone"]
    assert held_out not in told["alone"]
    assert held_out in told["beside"]
    assert "untrained network" not in told["beside"]
    assert "logistic regression, L1" in beside.methods
    assert "untrained network, same tuning" not in beside.methods


def test_bad_labels_are_refused_before_any_work(network: XTrimoGene, model: Path, tmp_path: Path) -> None:
    output, cells = tmp_path / "model", _cells(60, 2)
    for label, group, told in (
        ("none", None, "label none: expected a column of obs, got 'none'; columns: kind, donor, same, own"),
        ("same", None, r"label same: expected at least two different labels, got \['x'\]"),
        ("kind", "same", r"group: expected at least two groups, got \['x'\]"),
        ("kind", "own", "got 3 of 3 in one group only: 'alpha', 'beta', 'gamma'"),
    ):
        with pytest.raises(ValueError, match=told):
            fit(cells, network, label, output, group=group, **FIT)
    rare = _cells(61, 2)
    rare.obs["kind"] = rare.obs["kind"].astype(str)
    rare.obs.iloc[60, 0] = "delta"
    with pytest.raises(ValueError, match="at least 2 cells of each label, got fewer of 'delta'"):
        fit(rare, network, "kind", output, **FIT)
    with pytest.raises(ValueError, match="label kind: expected types that the model knows, got 'delta'"):
        evaluate(model, rare, "kind", **QUIET)
    gaps = _cells(60, 2)
    gaps.obs.iloc[5, 0] = np.nan
    with pytest.raises(ValueError, match=r"got none for 1 of 60 in .* such as 's2_5'"):
        fit(gaps, network, "kind", output, **FIT)
    with pytest.raises(ValueError, match="batch_tokens: expected room for the two longest cells"):
        fit(cells, network, "kind", output, **FIT, batch_tokens=70)
    for name, value in (
        ("tune", "some"), ("epochs", 0), ("batch_cells", 1), ("learning_rate", 0.0), ("validation_share", 0.9),
        ("dtype", "int8"), ("seed", -1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected"):
            fit(cells, network, "kind", output, **{**FIT, name: value})
    assert not list(tmp_path.iterdir())


def test_bad_prediction_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    cells = _cells(30, 1)
    with pytest.raises(ValueError, match="unknown_below: expected a probability from 0 to 1, got 2"):
        predict(model, cells, unknown_below=2, **QUIET)
    for option, told in (
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, got 'int8'"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"max_tokens": 20}, "max_tokens.*20"),
        ({"output": tmp_path / "out.h5ad"}, "output: expected None with an AnnData"),
        ({"resume": True}, "expected output to be given too"),
        ({"overwrite": True}, "expected output to be given too"),
    ):
        with pytest.raises(ValueError, match=told):
            predict(model, cells, **QUIET, **option)
    with pytest.raises(ValueError, match="majority_vote: expected a column of obs, got 'cluster'"):
        predict(model, cells, majority_vote="cluster", **QUIET)
    with pytest.raises(FileNotFoundError, match="no such folder of a model for annotation"):
        predict(tmp_path / "none", cells, **QUIET)
    with pytest.raises(FileNotFoundError, match=r"got one without task\.json"):
        predict(model / "network", cells, **QUIET)
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    task = broken / "task.json"
    task.write_text(task.read_text().replace('"annotation"', '"synergy"', 1))
    with pytest.raises(ValueError, match="got damaged files: its checksum is another one"):
        predict(broken, cells, **QUIET)
    assert not cells.obsm
    assert TYPE_COLUMN not in cells.obs


def test_bfloat16_gives_the_same_types(network: XTrimoGene, tmp_path: Path) -> None:
    report = fit(_cells(150, 2), network, "kind", tmp_path / "model", dtype="bfloat16", **FIT)
    assert report.validation["accuracy"] > 0.9
    weights = CellTypeModel.load(tmp_path / "model").network.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    exact, rounded = (
        predict(tmp_path / "model", _cells(60, 1), dtype=dtype, **QUIET) for dtype in ("float32", "bfloat16")
    )
    assert exact.labels is not None
    assert (exact.labels == rounded.labels).mean() > 0.9
    plain = fit(_cells(150, 2), network, "kind", tmp_path / "plain", **FIT)
    assert plain.validation["loss"] != report.validation["loss"]


def test_models_with_depth_tokens_are_fitted_without_them(tmp_path: Path) -> None:
    sizes = {"dim": 16, "num_heads": 2, "decoder_dim": 16, "num_layers": 1, "depth_tokens": True}
    network = XTrimoGene.from_preset("tiny", Vocabulary(GENES), seed=1, **sizes)
    cells = _cells(150, 2)
    fit(cells, network, "kind", tmp_path / "model", **FIT)
    held_out = validation_part(cells.obs["kind"].astype(str).to_numpy(object), None, share=0.1, seed=0)
    _check_probabilities(tmp_path / "model", cells[~held_out])


def test_the_commands(network: XTrimoGene, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network.save_pretrained(tmp_path / "checkpoint")
    _cells(30, 1).write_h5ad(tmp_path / "new.h5ad")
    model, told = str(tmp_path / "model"), str(tmp_path / "told.json")
    common = ["--device", "cpu", "--no-progress"]
    fitting = [
        "annotate", "fit", "--checkpoint", str(tmp_path / "checkpoint"), "--data", str(reference), "--label", "kind",
        "--group", "donor", "--tune", "head", "--epochs", "30", "--output", model, *common,
        "--patience", "7", "--learning-rate", "0.004", "--validation-share", "0.2", "--batch-cells", "20",
        "--batch-tokens", "4000", "--dtype", "bfloat16", "--seed", "4",
    ]  # fmt: skip
    wanted = {
        "group": "donor", "tune": "head", "epochs": 30, "patience": 7, "learning_rate": 0.004, "validation_share": 0.2,
        "batch_cells": 20, "batch_tokens": 4000, "dtype": "bfloat16", "seed": 4,
    }  # fmt: skip
    assert cli.main([*fitting, "--json", told]) == 0
    assert f"{model}: the model" in capsys.readouterr().out
    assert CellTypeModel.load(model).settings["fit"].items() >= wanted.items()
    report = json.loads(Path(told).read_text())
    assert (report["command"], report["types"]) == ("annotate", KINDS)
    assert cli.main(fitting) == 2
    assert capsys.readouterr().err.startswith(f"xtrimogene: error: {model}: the folder is not empty")
    assert cli.main([*fitting, "--resume"]) == 0
    new = str(tmp_path / "new.h5ad")
    arguments = ["--model", model, "--input", new, *common]
    predicted = str(tmp_path / "predicted.h5ad")
    vote = ["--majority-vote", "donor", "--unknown-below", "0.5"]
    assert cli.main(["annotate", "predict", *arguments, "--output", predicted, *vote]) == 0
    assert {TYPE_COLUMN, CONFIDENCE_COLUMN, MAJORITY_COLUMN} <= set(anndata.read_h5ad(predicted).obs.columns)
    capsys.readouterr()
    output = str(tmp_path / "report")
    judged = ["annotate", "evaluate", *arguments, "--label", "kind", "--output", output, "--no-untrained"]
    assert cli.main([*judged, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main([*judged, "--overwrite"]) == 0
    assert "logistic regression, L2" in capsys.readouterr().out
    assert cli.main(["annotate", "predict", *arguments, "--output", predicted]) == 2
    assert capsys.readouterr().err.count("\n") == 1
