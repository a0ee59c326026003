"""Tests of xtrimogene.demo: the whole demo once, offline, and the pieces its figures come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xtrimogene import XTrimoGene, demo
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.flops import dense_flops, encoder_flops
from xtrimogene.training.log import LOG_FILE, read_log


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo_output"
    demo.main(["--output", str(folder), "--steps", "4"])
    return folder


@pytest.fixture(scope="module")
def figures(output: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((output / "report.json").read_text())
    return figures


def test_the_demo_writes_a_report_with_pictures_and_a_model(output: Path) -> None:
    assert {entry.name for entry in output.iterdir()} == {"report.md", "report.json", "loss.png", "umap.png", "run"}
    report = (output / "report.md").read_text()
    for picture in ("loss.png", "umap.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
        assert f"({picture})" in report
    model = XTrimoGene.from_pretrained(output / "run" / "model")
    shipped = XTrimoGene.from_pretrained(demo.MODEL)
    assert (model.config, model.vocabulary) == (shipped.config, shipped.vocabulary)
    assert not torch.equal(model.embedding.w2, shipped.embedding.w2)


def test_the_report_and_its_figures_agree(output: Path, figures: dict[str, Any]) -> None:
    report = (output / "report.md").read_text()
    assert f"{figures['speed']['cells_per_second']:,.0f} cells/s" in report
    training = figures["training"]
    assert f"{training['steps']:,} steps" in report
    for part in (demo.loss_table(training), demo.loss_verdict(training), demo.flop_table(figures["flops"])):
        assert part in report
    scores = {key: figures["agreement"][key] for key in demo.SPACES}
    assert demo.agreement_verdict(scores, figures["cells"]["held_out"]) in report
    for score in scores.values():
        assert f"| {score['neighbours']:.3f}" in report
        assert f"| {score['probe']:.3f}" in report


def test_figures_are_those_of_the_cells(figures: dict[str, Any]) -> None:
    cells = demo.load_cells()
    known, asked = demo.split(cells)
    assert figures["cells"] == {
        "num_cells": 700, "num_genes": 765, "tokens": cells.X.nnz, "training": len(known), "held_out": len(asked)
    }  # fmt: skip
    assert sorted([*known, *asked]) == list(range(700))
    assert 100 < len(asked) < 180
    speed = figures["speed"]
    assert speed["cells_per_second"] == pytest.approx(700 / speed["seconds"])
    known_genes = cells.var_names.isin(XTrimoGene.from_pretrained(demo.MODEL).vocabulary.genes)
    assert speed["tokens_per_second"] == pytest.approx(cells.X[:, known_genes].nnz / speed["seconds"])


def test_training_is_seen_in_the_losses(output: Path, figures: dict[str, Any]) -> None:
    training = figures["training"]
    steps, losses = zip(*training["hidden"], strict=True)
    assert steps[0] == 0
    assert steps[-1] == training["steps"] == training["training"][-1][0] == 4
    assert losses[-1] < losses[0]
    line = [line for line in read_log(output / "run" / LOG_FILE) if line["event"] == "validation"][-1]
    assert (losses[-1], training["ridge"]) == (line["hidden_loss"], line["ridge_hidden_loss"])
    assert training["cells_per_second"] == pytest.approx(training["cells"] / training["seconds"])


def test_labels_are_read_off_pca_better_than_by_chance(figures: dict[str, Any]) -> None:
    agreement = figures["agreement"]
    labels = demo.load_cells().obs["bulk_labels"].to_numpy()
    known, asked = demo.split(demo.load_cells())
    largest = max(set(labels[known]), key=list(labels[known]).count)
    assert agreement["largest_label"] == np.mean(labels[asked] == largest)
    # Ten blood cell types part well in PCA.
    for reader in ("neighbours", "probe"):
        assert agreement["X_pca"][reader] > 0.7
        assert agreement["largest_label"] < agreement["X_xtrimogene"][reader] <= 1


def test_a_second_demo_replaces_the_first(output: Path) -> None:
    (output / "run" / "mark").touch()
    demo.train(demo.load_cells(), output / "run", 1)
    assert not (output / "run" / "mark").exists()


def test_flop_rows_cover_these_cells_and_the_real_lengths(figures: dict[str, Any]) -> None:
    these, *real = figures["flops"]
    matrix = demo.load_cells().X.tocsr()
    distinct = [len(set(matrix[cell].data.tolist())) for cell in range(700)]
    config = XTrimoGeneConfig.preset("tiny", num_genes=765)
    assert these["total"] == encoder_flops(config, np.diff(matrix.indptr), distinct).total
    assert these["dense"] == dense_flops(config, 700).total
    lengths = demo.load_lengths()["lengths"]
    assert [row["preset"] for row in real] == ["tiny", "3m", "10m", "100m"]
    for row in real:
        assert (row["num_cells"], row["num_genes"]) == (len(lengths), 19264)
        assert row["total"] == row["embedding"] + row["linear"] + row["attention"]
        assert row["share_of_dense"] == row["total"] / row["dense"]
        assert row["total"] < row["padded"] < row["dense"]


def test_the_verdict_on_losses() -> None:
    training = {"hidden": [[0, 3.0], [5, 1.0], [9, 1.9]], "ridge": 2.0}
    assert demo.loss_verdict(training).endswith(
        "the model has 50.0 % more squared error as it comes, 5.0 % less after training on."
    )


def test_the_verdict_on_labels_calls_chance_chance() -> None:
    scores = {
        "X_xtrimogene": {"neighbours": 0.7, "probe": 0.8},
        "X_untrained": {"neighbours": 0.5, "probe": 0.79},
        "X_pca": {"neighbours": 0.9, "probe": 0.81},
    }
    assert demo.agreement_verdict(scores, 143) == (
        "By nearest neighbours, labels are read off the trained embedding better than off the untrained one "
        "(0.700, 0.500) and worse than off PCA (0.700, 0.900). By a linear probe, labels are read off the trained "
        "embedding about as well as off the untrained one (0.800, 0.790) and about as well as off PCA (0.800, 0.810)."
    )


def test_tables_line_up() -> None:
    text = demo.table(["name", "n"], [["a", "100"], ["longer", "1"]])
    assert text.split("\n") == ["| name   | n   |", "| ------ | --- |", "| a      | 100 |", "| longer | 1   |"]
