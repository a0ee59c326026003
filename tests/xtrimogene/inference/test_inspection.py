"""Tests of inspect_cells: what is told of numbers, genes and costs, and that every format and damage has a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from tests.xtrimogene.cells.test_formats import FORMATS, N_OBS, N_VARS, SYMBOLS, spoil
from tests.xtrimogene.cells.test_formats import counts as format_counts
from xtrimogene import Vocabulary, XTrimoGene, inspect_cells
from xtrimogene.network.config import PRESETS, XTrimoGeneConfig
from xtrimogene.network.flops import encoder_flops

pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")

GENES = [f"G{i}" for i in range(40)]


def counts(n_obs: int = 300) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.poisson(3, (n_obs, len(GENES))) * (rng.random((n_obs, len(GENES))) < 0.5) + (np.arange(40) == 0)


def log1p(matrix: np.ndarray, total: float) -> np.ndarray:
    return np.log1p(matrix / matrix.sum(1, keepdims=True) * total)


def adata_of(matrix: np.ndarray) -> AnnData:
    return AnnData(
        sp.csr_matrix(matrix.astype(np.float64)), var=pd.DataFrame({"id": [f"E{g}" for g in GENES]}, index=GENES)
    )


MATRICES = {
    "counts": (counts(), "raw counts"),
    "log1p": (log1p(counts(), 1e4), "log1p(count / total * 10,000)"),
    "other total": (log1p(counts(), 1e3), "log1p of counts scaled to a total of 1,000"),
    "some genes": (log1p(counts(), 1e4)[:, :25] @ np.eye(25, 40), "logarithms, perhaps of some of the genes"),
    "CPM": (
        counts() / counts().sum(1, keepdims=True) * 1e6,
        "counts scaled to a total of 1,000,000 (counts",
    ),
    "scaled": (counts() - 1.5, "scaled (negative numbers)"),
    "corrected": (counts() * 7.3, "fractions: counts that were estimated or corrected"),
    "broken": (counts() * np.nan, "NaN or infinite numbers"),
}


@pytest.mark.parametrize("name", MATRICES)
def test_what_the_numbers_are(name: str) -> None:
    matrix, told = MATRICES[name]
    (report,) = inspect_cells(adata_of(matrix)).matrices
    assert report.numbers.startswith(told)
    assert (report.cells, report.columns) == (300, 40)


def test_numbers_of_a_matrix() -> None:
    matrix = counts()
    report = inspect_cells(adata_of(matrix))
    (told,) = report.matrices
    sample = np.concatenate([matrix[start : start + 32] for start in np.linspace(0, 268, 8).astype(int)])
    assert told.totals == (sample.sum(1).min(), np.median(sample.sum(1)), sample.sum(1).max())
    assert told.largest == sample.max()
    assert told.stored == np.count_nonzero(matrix)
    assert told.density == np.count_nonzero(matrix) / matrix.size
    assert told.genes_a_cell[0] == (sample > 0).sum(1).min()
    assert told.genes_a_cell[3] == (sample > 0).sum(1).max()
    assert [cost.model for cost in report.costs] == list(PRESETS)
    for cost in report.costs:
        config = XTrimoGeneConfig.preset(cost.model, num_genes=40)
        assert cost.flops == pytest.approx(encoder_flops(config, (matrix > 0).sum(1)).total)
        assert cost.seconds == pytest.approx(cost.flops / report.rate)


def test_genes_of_each_column(tmp_path: Path) -> None:
    adata = adata_of(counts())
    adata.obs["total_counts"] = 1.0
    vocabulary = Vocabulary([f"E{gene}" for gene in GENES[:30]] + ["G5"])
    XTrimoGene.from_preset("tiny", vocabulary, seed=0).save_pretrained(tmp_path / "checkpoint")
    for model in (vocabulary, tmp_path / "checkpoint"):
        report = inspect_cells(adata, model)
        assert {column: found for column, (found, _) in report.genes.items()} == {None: 1, "id": 30}
        assert report.vocabulary == 31
        assert report.advice == ["--gene-symbols id"]
        assert report.totals_columns == ["total_counts"]
        assert "var['id']: 30 (such as EG0, EG1, EG2)" in str(report)
    assert [cost.model for cost in report.costs] == ["checkpoint"]
    other = inspect_cells(adata, Vocabulary(["Mouse1"]))
    assert other.advice == ["no column of var names genes of this vocabulary: another species, or other identifiers"]


@pytest.mark.parametrize(
    ("layers", "advice"),
    [
        ({"X": "counts"}, []),
        ({"X": "log1p"}, ["--normalized"]),
        ({"X": "scaled", "counts": "counts"}, ["--layer counts"]),
        ({"X": "scaled", "raw": "log1p"}, ["--layer raw --normalized"]),
        ({"counts": "counts", "raw": "log1p"}, ["--layer counts"]),
        ({"X": "scaled"}, ["none fits: no matrix holds counts or log-normalised values; go back to the counts"]),
    ],
)
def test_options_that_fit(layers: dict[str, str], advice: list[str]) -> None:
    adata = adata_of(MATRICES[layers.get("X", "counts")][0])
    if "raw" in layers:
        adata.raw = adata_of(MATRICES[layers["raw"]][0])
    if "counts" in layers:
        adata.layers["counts"] = MATRICES[layers["counts"]][0]
    if "X" not in layers:
        adata.X = None
    report = inspect_cells(adata)
    assert report.advice == advice
    assert [each.layer for each in report.matrices] == [{"X": None}.get(each, each) for each in layers]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_told(form: str, tmp_path: Path) -> None:
    path = FORMATS[form](tmp_path)
    report = inspect_cells(path, Vocabulary(SYMBOLS[:10]))
    told: Any = report.matrices[0]
    assert (told.layer, told.values, told.cells, told.columns) == (None, "counts", N_OBS, N_VARS)
    assert told.stored in (format_counts().nnz, None)
    assert max(found or 0 for found, _ in report.genes.values()) == 10
    assert str(report).startswith(f"{path}: {report.kind}\n")


def test_what_cannot_be_read_is_told_with_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    adata = adata_of(counts())
    adata.layers["broken"] = adata.X.copy()
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["layers/broken/indices"]
        odd = file["var"].create_group("odd")
        odd.attrs.update({"encoding-type": "future-array", "encoding-version": "9.9"})
        file["var"].attrs["column-order"] = np.array(["id", "odd"], dtype=h5py.string_dtype())
    report = inspect_cells(path)
    assert [each.layer for each in report.matrices if each.problem is not None] == ["broken"]
    assert report.matrices[0].values == "counts"
    assert "broken: cannot be read: " in str(report)
    assert "future-array" in report.unreadable["var['odd']"]
    spoil(path, "obs/_index")
    report = inspect_cells(path)
    assert report.matrices[0].values == "counts"
    assert "obs cannot be read: " in str(report)
    with pytest.raises(FileNotFoundError, match="no such file"):
        inspect_cells(tmp_path / "none.h5ad")
