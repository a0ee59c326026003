"""Tests of xtrimogene.demo: the whole demo once, offline, and the pieces its figures come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtrimogene import demo
from xtrimogene.config import XTrimoGeneConfig
from xtrimogene.flops import dense_flops, encoder_flops


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo_output"
    demo.main(["--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def figures(output: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((output / "report.json").read_text())
    return figures


def test_the_demo_writes_a_report_with_a_picture(output: Path) -> None:
    assert {entry.name for entry in output.iterdir()} == {"report.md", "report.json", "umap.png"}
    assert (output / "umap.png").read_bytes().startswith(b"\x89PNG")
    report = (output / "report.md").read_text()
    assert "The model is untrained" in report
    assert "(umap.png)" in report


def test_the_report_and_its_figures_agree(output: Path, figures: dict[str, Any]) -> None:
    report = (output / "report.md").read_text()
    assert f"{figures['speed']['cells_per_second']:,.0f} cells/s" in report
    for accuracy in figures["neighbour_accuracy"].values():
        assert f"{accuracy:.3f}" in report
    assert demo.flop_table(figures["flops"]) in report


def test_figures_are_those_of_the_cells(figures: dict[str, Any]) -> None:
    cells = demo.load_cells()
    assert figures["cells"] == {"num_cells": 700, "num_genes": 765, "tokens": cells.X.nnz}
    speed = figures["speed"]
    assert speed["cells_per_second"] == pytest.approx(700 / speed["seconds"])
    assert speed["tokens_per_second"] == pytest.approx(cells.X.nnz / speed["seconds"])
    accuracy = figures["neighbour_accuracy"]
    assert accuracy["largest_label"] == cells.obs["bulk_labels"].value_counts().max() / 700
    # Ten blood cell types part well in PCA; random weights keep some of it, so both stand above the largest label.
    assert accuracy["pca_50"] > 0.7
    assert accuracy["largest_label"] < accuracy["xtrimogene_3m_untrained"] <= 1


def test_flop_rows_cover_these_cells_and_the_real_lengths(figures: dict[str, Any]) -> None:
    these, *real = figures["flops"]
    matrix = demo.load_cells().X.tocsr()
    distinct = [len(set(matrix[cell].data.tolist())) for cell in range(700)]
    config = XTrimoGeneConfig.preset("3m", num_genes=765)
    assert these["total"] == encoder_flops(config, np.diff(matrix.indptr), distinct).total
    assert these["dense"] == dense_flops(config, 700).total
    lengths = demo.load_lengths()["lengths"]
    assert [row["preset"] for row in real] == ["3m", "10m", "100m"]
    for row in real:
        assert (row["num_cells"], row["num_genes"]) == (len(lengths), 19264)
        assert row["total"] == row["embedding"] + row["linear"] + row["attention"]
        assert row["share_of_dense"] == row["total"] / row["dense"]
        assert row["total"] < row["padded"] < row["dense"]


def test_neighbour_accuracy_tells_parted_labels_from_shuffled_ones() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], 100)
    points = rng.normal(size=(200, 3)) + 20 * (labels == "b")[:, None]
    assert demo.neighbour_accuracy(points, labels) == 1
    assert abs(demo.neighbour_accuracy(points, rng.permutation(labels)) - 0.5) < 0.15


def test_tables_line_up() -> None:
    text = demo.table(["name", "n"], [["a", "100"], ["longer", "1"]])
    assert text.split("\n") == ["| name   | n   |", "| ------ | --- |", "| a      | 100 |", "| longer | 1   |"]


def test_without_the_lengths_file_it_says_where_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "CELL_LENGTHS", tmp_path / "cell_lengths.json")
    with pytest.raises(FileNotFoundError, match="run the demo from a checkout of the repository"):
        demo.run(tmp_path / "demo_output")
    assert not (tmp_path / "demo_output").exists()
