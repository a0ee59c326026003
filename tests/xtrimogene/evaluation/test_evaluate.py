"""Tests of evaluate, its report and its command: figures on made cells, and the one line for each kind of bad input."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import silhouette_samples

from tests.xtrimogene.cells.test_formats import loom
from xtrimogene import Vocabulary, XTrimoGene, cli
from xtrimogene.evaluation import report
from xtrimogene.evaluation.bars import BARS
from xtrimogene.evaluation.evaluate import MODEL, UNTRAINED, Evaluation, evaluate
from xtrimogene.evaluation.spaces import agreement, batch_mixing, largest_label, silhouette

GENES = [f"GENE{i}" for i in range(60)]


def _cells(count: int, seed: int, genes: list[str] = GENES) -> anndata.AnnData:
    """Counts of three kinds of cells."""
    rng = np.random.default_rng(seed)
    kinds = np.random.default_rng(9).gamma(0.5, 3.0, (3, len(genes)))
    kind = np.arange(count) % 3
    counts = rng.poisson(kinds[kind] * rng.uniform(0.5, 2, count)[:, None]).astype(np.float32)
    obs = pd.DataFrame({"kind": pd.Categorical(np.array(["a", "b", "c"])[kind]), "same": "x"})
    obs.index = [f"s{seed}_{i}" for i in range(count)]
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))


@pytest.fixture(scope="module")
def model() -> XTrimoGene:
    sizes = {"dim": 16, "num_heads": 2, "decoder_dim": 16, "num_layers": 1, "product_head": 4}
    return XTrimoGene.from_preset("tiny", Vocabulary(GENES), seed=1, **sizes)


OPTIONS: dict[str, Any] = {"min_genes": 5, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def evaluation(model: XTrimoGene) -> Evaluation:
    return evaluate(model, _cells(60, 1), train_data=_cells(150, 2), label="kind", **OPTIONS)


def test_all_figures_are_there(evaluation: Evaluation) -> None:
    assert evaluation.cells == {"judged": 60, "known": 150}
    assert evaluation.genes == {"vocabulary": 60, "found": 60}
    assert tuple(evaluation.masked) == (MODEL, *BARS)
    assert evaluation.spaces is not None
    assert list(evaluation.spaces) == [MODEL, UNTRAINED, "PCA, 50 components", "random projection"]
    # Kinds part in PCA; a fresh network is a fresh network, seed aside.
    pca = evaluation.spaces["PCA, 50 components"]
    assert pca["neighbours"] == pca["probe"] == 1.0
    assert evaluation.largest_label == pytest.approx(1 / 3)
    error = evaluation.masked["PCA"]["all"]["mean squared error"]
    mean = evaluation.masked["gene mean"]["all"]["mean squared error"]
    ours = evaluation.masked[MODEL]["all"]["mean squared error"]
    assert error is not None
    assert mean is not None
    assert ours is not None
    assert error < mean < ours
    assert not evaluation.passes_ridge


def test_batches_of_a_label_are_told_apart_or_not(model: XTrimoGene, evaluation: Evaluation) -> None:
    rng = np.random.default_rng(0)
    labels, batches = np.repeat(["a", "b"], 100), np.tile(["x", "y"], 100)
    points = rng.normal(size=(200, 3)) + 20 * (labels == "b")[:, None]
    apart = points + 30 * (batches == "y")[:, None]
    mixed, parted = batch_mixing(points, labels, batches), batch_mixing(apart, labels, batches)
    assert mixed is not None
    assert parted is not None
    assert mixed > 0.9 > 0.1 > parted
    # Of the definition, on one label; a label of one batch says nothing.
    widths = silhouette_samples(apart[labels == "a"], batches[labels == "a"])
    one = np.where(labels == "b", "x", batches)
    assert batch_mixing(apart, labels, one) == pytest.approx(1 - np.abs(widths).mean())
    assert batch_mixing(apart, labels, labels) is None

    judged = _cells(60, 1)
    judged.obs["donor"] = np.where(np.arange(60) < 30, "first", "second")
    found = evaluate(model, judged, train_data=_cells(150, 2), label="kind", batch="donor", **OPTIONS)
    assert found.spaces is not None
    assert evaluation.spaces is not None
    for name, figures in found.spaces.items():
        assert {key: figures[key] for key in evaluation.spaces[name]} == evaluation.spaces[name]
        assert figures["batch mixing"] is not None
        assert 0.8 < figures["batch mixing"] <= 1
    text = report.text(found)
    assert f"{found.spaces[MODEL]['batch mixing']:.3f}" in text
    assert "batches (`donor`)" in text
    assert "batch" not in report.text(evaluation)


def test_the_same_cells_give_the_same_figures_and_are_left_alone(model: XTrimoGene, evaluation: Evaluation) -> None:
    held_out = _cells(60, 1)
    again = evaluate(model, held_out, train_data=_cells(150, 2), label="kind", **OPTIONS)
    assert dataclasses.asdict(again) == dataclasses.asdict(evaluation)
    assert not held_out.obsm


def test_without_training_cells_a_fifth_is_judged(model: XTrimoGene, tmp_path: Path) -> None:
    cells = _cells(100, 1)
    cells[:40].write_h5ad(tmp_path / "a.h5ad")
    cells[40:].write_h5ad(tmp_path / "b.h5ad")
    found = evaluate(model, tmp_path, label="kind", **OPTIONS)
    assert found.cells == {"judged": 20, "known": 80}
    assert found.known == "data"
    assert found.masked == evaluate(model, cells, **OPTIONS).masked
    assert evaluate(model, cells, max_cells=50, **OPTIONS).cells == {"judged": 10, "known": 40}


def test_a_model_with_depth_tokens_is_judged(tmp_path: Path) -> None:
    sizes = {"dim": 16, "num_heads": 2, "decoder_dim": 16, "num_layers": 1, "depth_tokens": True}
    model = XTrimoGene.from_preset("tiny", Vocabulary(GENES), seed=1, **sizes)
    found = evaluate(model, _cells(60, 1), label="kind", **OPTIONS)
    assert found.masked[MODEL]["all"]["mean squared error"] is not None
    assert found.spaces is not None
    assert np.isfinite(found.spaces[MODEL]["neighbours"])


def _without_label() -> anndata.AnnData:
    cells = _cells(60, 1)
    cells.obs.loc[cells.obs_names[3], "kind"] = None
    return cells


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            _cells(60, 1),
            {"label": "kinds"},
            "label: expected a column of obs of data, got 'kinds'; columns: kind, same",
        ),
        (
            _cells(60, 1),
            {"label": "same"},
            r"label: expected at least two different labels, got \['x'\] for all 48 known",
        ),
        (_cells(60, 1), {"label": "kind", "batch": "lab"}, "batch: expected a column of obs of data, got 'lab'"),
        (_cells(60, 1), {"label": "kind", "batch": "same"}, "batch: expected at least two different batches, got"),
        (
            _cells(60, 1),
            {"label": "kind", "scib": True},
            "scib: expected label and batch too, which its figures",
        ),
        (_cells(60, 1), {"batch": "kind"}, "batch: expected a label too, by which cells of 'kind' can be alike; give"),
        (_without_label(), {"label": "kind"}, "label: expected a label for every cell of data, got none for 1 of 60"),
        (
            _cells(60, 1),
            {"train_data": _cells(90, 2)[:, :50], "label": "bulk"},
            "label: expected a column of obs of data",
        ),
        (
            _cells(60, 1),
            {"train_data": anndata.concat([_cells(90, 2), _cells(60, 1)[[4, 9]]])},
            "data: 2 of 60 cells, such as number 4 from 0, are in train_data too, by their genes and values; judge by",
        ),
        (
            anndata.concat([_cells(60, 1), _cells(60, 1)[[7]]]),
            {},
            "data: 2 of 61 cells, such as number 7 from 0, are there more than once, .*; take the copies out",
        ),
        (
            _cells(60, 1, [f"OTHER{i}" for i in range(60)]),
            {},
            "expected genes such as GENE0, GENE1, GENE2, got none of the 60 vocabulary genes",
        ),
        (
            _cells(60, 1, ["GENE0", "GENE1", *(f"OTHER{i}" for i in range(58))]),
            {"min_genes": 0},
            "data: expected at least 5% of the model's 60 genes, got 2 of them; give cells with the genes",
        ),
        (_cells(8, 1), {}, "data: expected at least 10 cells, got 8; give more"),
        (_cells(60, 1), {"min_genes": 70}, "expected cells to train on with more than min_genes = 70"),
        (_cells(60, 1), {"max_cells": 0}, "max_cells: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_before_work(
    data: anndata.AnnData, options: dict[str, Any], message: str, model: XTrimoGene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(XTrimoGene, "predict", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        evaluate(model, data, **{**OPTIONS, **options})


def test_cells_of_another_format_are_refused(model: XTrimoGene, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.loom: expected an h5ad file or a zarr store of AnnData, got loom"):
        evaluate(model, loom(tmp_path / "a.loom"), progress=False)


def test_labels_need_scikit_learn_and_say_so(model: XTrimoGene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"label: needs scikit-learn, .*: pip install 'xtrimogene\[scanpy\]'"):
        evaluate(model, _cells(60, 1), label="kind", **OPTIONS)
    assert evaluate(model, _cells(60, 1), **OPTIONS).spaces is None


def test_scib_metrics_judges_where_it_is_installed(model: XTrimoGene, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = _cells(60, 1)
    judged.obs["donor"] = np.where(np.arange(60) < 30, "first", "second")
    options: dict[str, Any] = {"train_data": _cells(150, 2), "label": "kind", "batch": "donor", "scib": True}
    monkeypatch.setitem(sys.modules, "scib_metrics", None)
    with pytest.raises(ImportError, match=r"scib: needs scib-metrics, .*: pip install 'xtrimogene\[scib\]'"):
        evaluate(model, judged, **options, **OPTIONS)

    # A package of the same functions, that tell what they were given. (The package itself brings jax.)
    kinds, donors = (np.unique(judged.obs[name], return_inverse=True)[1] for name in ("kind", "donor"))

    def told(number: float, *codes: np.ndarray) -> Callable[..., float]:
        def figure(points: Any, *given: np.ndarray) -> float:
            assert len(points) == 60
            assert len(given) == len(codes)
            assert all(np.array_equal(*pair) for pair in zip(given, codes, strict=True))
            return number

        return figure

    def neighbours(points: np.ndarray, n_neighbors: int, random_state: int, n_jobs: int) -> np.ndarray:
        assert (n_neighbors, points.dtype) == (59, np.float32)
        return points

    package, module = types.ModuleType("scib_metrics"), types.ModuleType("scib_metrics.nearest_neighbors")
    module.pynndescent = neighbours  # type: ignore[attr-defined]
    figures = {
        "isolated_labels": told(0.1, kinds, donors),
        "nmi_ari_cluster_labels_kmeans": lambda _, labels: {"nmi": 0.2, "ari": 0.3},
        "silhouette_label": told(0.4, kinds),
        "clisi_knn": told(0.5, kinds),
        "graph_connectivity": told(0.6, kinds),
        "silhouette_batch": told(0.7, kinds, donors),
        "ilisi_knn": told(np.nan, donors),
        "kbet_per_label": told(0.9, donors, kinds),
    }
    for name, function in figures.items():
        setattr(package, name, function)
    monkeypatch.setitem(sys.modules, "scib_metrics", package)
    monkeypatch.setitem(sys.modules, "scib_metrics.nearest_neighbors", module)
    found = evaluate(model, judged, **options, **OPTIONS)
    assert found.spaces is not None
    for figures in found.spaces.values():
        assert [value for key, value in figures.items() if key.startswith("scIB ")] == [
            0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, None, 0.9
        ]  # fmt: skip
    assert "| kBET               | 0.900" in report.text(found)


def test_the_command_writes_a_report(model: XTrimoGene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "model")
    _cells(60, 1).write_h5ad(tmp_path / "held.h5ad")
    words = ["evaluate", "--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "held.h5ad"), "--min-genes"]
    words += ["5", "--label", "kind", "--output", str(tmp_path / "out"), "--no-progress", "--device", "cpu"]
    told = tmp_path / "told.json"
    assert cli.main([*words, "--json", str(told)]) == 0
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {
        "report.json", "report.md", "masked.png", "spaces.png"
    }  # fmt: skip
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert json.loads(told.read_text())["masked"] == figures["masked"]
    text = (tmp_path / "out" / "report.md").read_text()
    shown = figures["masked"]["depth + PCA"]["all"]
    assert f"| depth + PCA | all          | {shown['mean squared error']:.4f}" in text
    assert f"| {figures['spaces'][MODEL]['probe']:.3f}" in text
    assert "masked.png" in text
    assert "spaces.png" in text
    assert "12 held-out cells are judged" in capsys.readouterr().out
    assert (tmp_path / "out" / "masked.png").read_bytes().startswith(b"\x89PNG")
    # Again: not without leave, and never over what is something else's.
    assert cli.main(words) == 2
    assert "exists; name another folder, or pass --overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0
    (tmp_path / "out" / "notes.txt").touch()
    assert cli.main([*words, "--overwrite"]) == 2
    assert "notes.txt in it is of no evaluation" in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["held.h5ad", "model", "out", "told.json"]


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ({}, "less error than every guess"),
        ({"depth + PCA": 0.1}, r"above that of depth \+ PCA and below that of gene mean, .* knows more"),
        (dict.fromkeys(BARS, 0.1), "below that of none. A ridge"),
    ],
)
def test_the_verdict(errors: dict[str, float], words: str, evaluation: Evaluation) -> None:
    masked = {
        name: {"all": {"mean squared error": {MODEL: 0.5, **dict.fromkeys(BARS, 0.9), **errors}[name]}}
        for name in (MODEL, *BARS)
    }
    judged = dataclasses.replace(evaluation, masked=masked)
    assert __import__("re").search(words, report.verdict(judged))
    assert judged.passes_ridge == (not errors)


def test_agreement_tells_parted_labels_from_shuffled_ones() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], 100)
    points = rng.normal(size=(200, 3)) + 20 * (labels == "b")[:, None]
    known, asked = slice(0, 200, 2), slice(1, 200, 2)
    assert agreement(points[known], points[asked], labels[known], labels[asked]) == {"neighbours": 1.0, "probe": 1.0}
    mixed = rng.permutation(labels)
    for share in agreement(points[known], points[asked], mixed[known], mixed[asked]).values():
        assert abs(share - 0.5) < 0.2
    assert silhouette(points, labels) > 0.7 > 0.1 > silhouette(points, mixed)
    assert silhouette(points[:3], np.array(["a", "b", "c"])) is None
    assert largest_label(np.array(["a", "a", "b"]), np.array(["b", "a", "a", "a"])) == 0.75
