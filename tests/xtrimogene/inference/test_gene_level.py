"""Tests of the gene level: gene embeddings and predicted expression, in memory and in files, and every error."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

from tests import warm
from tests.xtrimogene.published import published_from
from xtrimogene.inference import gene_level
from xtrimogene.model import XTrimoGene
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.network.vocabulary import Vocabulary

N_OBS, N_VARS, WIDTH = 11, 40, 32
EMPTY = [3]
VOCABULARY = Vocabulary([*(f"G{i}" for i in range(N_VARS)), "CD3D", "CD3E", "ENSG00000141510"][::-1])
ASKED = ["G7", "CD3D", "G0"]


def counts() -> sp.csr_matrix:
    rng = np.random.default_rng(5)
    matrix = sp.random(N_OBS, N_VARS, density=0.3, format="lil", random_state=rng)
    matrix[EMPTY] = 0
    matrix = matrix.tocsr()
    matrix.data = rng.geometric(0.3, matrix.nnz)
    return matrix.astype(np.float32)


def cells(matrix: Any = None) -> AnnData:
    obs = pd.DataFrame({"label": pd.Categorical(["a", "b"] * 5 + ["a"])}, index=[f"cell{i}" for i in range(N_OBS)])
    var = pd.DataFrame({"id": [f"E{i}" for i in range(N_VARS)]}, index=[f"G{i}" for i in range(N_VARS)])
    return AnnData(counts() if matrix is None else matrix, obs=obs, var=var)


@pytest.fixture(scope="module")
def model() -> XTrimoGene:
    return XTrimoGene.from_preset(
        "tiny", VOCABULARY, dim=24, num_heads=3, decoder_dim=WIDTH, decoder_layers=2, stabilizer="cell"
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cells().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def log_normalised() -> np.ndarray:
    """(N_OBS, vocabulary) values by the formula alone."""
    dense = np.zeros((N_OBS, len(VOCABULARY)))
    dense[:, [VOCABULARY.index_of[f"G{i}"] for i in range(N_VARS)]] = counts().toarray()
    return np.log1p(dense / np.maximum(dense.sum(1, keepdims=True), 1) * 1e4)


@pytest.fixture(scope="module")
def expected(model: XTrimoGene) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (cells, vocabulary, width) and predictions (cells, vocabulary) of the plain network."""
    network, rows = published_from(model), []
    nothing = torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        for values in log_normalised():
            genes = np.flatnonzero(values)
            tokens = torch.from_numpy(values[genes].astype(np.float32)), torch.from_numpy(genes)
            rows.append(network(*tokens, nothing) if len(genes) else torch.full((len(VOCABULARY), WIDTH), torch.nan))
        embeddings = torch.stack(rows)
        return embeddings.numpy(), network.to_final(embeddings)[..., 0].numpy()


def ids(genes: list[str]) -> list[int]:
    return [VOCABULARY.index_of[gene] for gene in genes]


def assert_close(got: Any, want: np.ndarray) -> None:
    assert got.dtype == np.float32
    assert np.flatnonzero(np.isnan(got).reshape(N_OBS, -1).all(axis=1)).tolist() == EMPTY
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no gene of the vocabulary")
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_both_equal_the_plain_network(
    batch_size: int, model: XTrimoGene, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    options = {"batch_size": batch_size, "progress": False}
    embeddings, predictions = expected
    assert_close(model.gene_embeddings(cells(), ASKED, **options), embeddings[:, ids(ASKED)])
    assert_close(model.predict_expression(cells(), ASKED, **options), predictions[:, ids(ASKED)])
    assert_close(model.predict_expression(cells(), **options), predictions)


def test_empty_cells_are_counted_and_warned_about(model: XTrimoGene) -> None:
    with pytest.warns(
        UserWarning, match="AnnData: 1 of 11 cells have no gene of the vocabulary; their numbers are NaN"
    ):
        report, numbers = gene_level.predict_expression(cells(), model, ASKED, progress=False)
    assert numbers is not None
    assert (report.cells, report.genes, report.empty_cells) == (11, 3, 1)
    assert (report.genes_found, report.vocabulary_size) == (40, 43)
    assert "11 cells, 1 of them empty, 3 genes asked for, 40 of 43 vocabulary genes found" in str(report)


@pytest.mark.filterwarnings("ignore:.*no gene of the vocabulary")
def test_asked_genes_alone_are_computed_in_the_last_layer(model: XTrimoGene, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = []
    linear2 = model.decoder.layers[-1].linear2
    handle = linear2.register_forward_hook(lambda module, inputs, output: heads.append(len(output)))
    model.predict_expression(cells(), ASKED, batch_size=11, progress=False)
    model.predict_expression(cells(), batch_size=11, progress=False)
    handle.remove()
    assert heads == [11 * 3, 11 * len(VOCABULARY)]


@pytest.mark.filterwarnings("ignore:.*no gene of the vocabulary")
@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_files_of_gene_embeddings(
    kind: str, path: Path, tmp_path: Path, model: XTrimoGene, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    if kind == "zarr":
        path = tmp_path / "cells.zarr"
        cells().write_zarr(path)
    report, nothing = gene_level.gene_embeddings(path, model, ASKED, output=tmp_path / "out.h5ad", progress=False)
    assert nothing is None
    assert report.empty_cells == 1
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert written.obs.equals(cells().obs)
    assert list(written.var_names) == ASKED
    assert written.X is None
    assert_close(written.obsm["gene_embeddings"], expected[0][:, ids(ASKED)])
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")) == []


@pytest.mark.filterwarnings("ignore:.*no gene of the vocabulary")
@pytest.mark.parametrize("genes", [ASKED, None])
def test_files_of_imputed_expression(
    genes: list[str] | None, path: Path, tmp_path: Path, model: XTrimoGene, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    gene_level.predict_expression(path, model, genes, output=tmp_path / "out.h5ad", batch_size=3, progress=False)
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    names = list(VOCABULARY.genes) if genes is None else genes
    assert list(written.var_names) == names
    assert written.obs.equals(cells().obs)
    assert_close(written.layers["imputed"], expected[1][:, ids(names)])
    assert sp.issparse(written.X)
    np.testing.assert_allclose(written.X.toarray(), log_normalised()[:, ids(names)], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*no gene of the vocabulary")
def test_depth_tokens_are_no_genes(tmp_path: Path) -> None:
    model = XTrimoGene.from_preset("tiny", VOCABULARY, dim=24, num_heads=3, depth_tokens=True)
    gene_level.predict_expression(cells(), model, output=tmp_path / "out.h5ad", progress=False)
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert written.shape == (N_OBS, len(VOCABULARY))
    np.testing.assert_allclose(written.X.toarray(), log_normalised(), rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"expected raw counts, got normalized=True: this model reads each cell's total"
    ):
        model.predict_expression(cells(), normalized=True, progress=False)
    with pytest.raises(ValueError, match=r"target_depth: expected the log10 total to aim at, .* got 'twice:2'"):
        model.predict_expression(cells(), target_depth="twice:2", progress=False)


@pytest.mark.filterwarnings("ignore:.*no gene of the vocabulary")
def test_other_ways_to_ask(model: XTrimoGene) -> None:
    """Another var column, a layer, values that are normalised already, an Ensembl id with a version, bfloat16."""
    adata = cells()
    want = model.predict_expression(adata, ASKED, progress=False)
    adata.layers["counts"], adata.X = adata.X, adata.X * 0.5
    adata.var["name"], adata.var_names = adata.var_names, adata.var["id"]
    assert_close(model.predict_expression(adata, ASKED, layer="counts", gene_symbols="name", progress=False), want)
    adata = cells(sp.csr_matrix(log_normalised()[:, ids([f"G{i}" for i in range(N_VARS)])]))
    assert_close(model.predict_expression(adata, ASKED, normalized=True, progress=False), want)
    versioned = model.predict_expression(cells(), ["ENSG00000141510.18"], progress=False)
    np.testing.assert_array_equal(versioned, model.predict_expression(cells(), ["ENSG00000141510"], progress=False))
    rounded = model.predict_expression(cells(), ASKED, dtype="bfloat16", progress=False)
    kept = ~np.isnan(want)
    assert 0 < np.abs(rounded - want)[kept].max() < 0.1


@pytest.mark.filterwarnings("ignore:.*no gene of the vocabulary")
def test_the_model_is_left_as_it_was(model: XTrimoGene) -> None:
    model.train()
    model.predict_expression(cells(), ASKED, progress=False)
    assert model.training
    model.eval()
    half = XTrimoGene.from_preset("tiny", VOCABULARY).bfloat16()
    assert half.predict_expression(cells(), ASKED, progress=False).dtype == np.float32
    assert half.mask_row.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        (["G7", "cd3d"], r"genes: expected genes of the vocabulary, such as .*, got 'cd3d' \(near: CD3D, CD3E\)"),
        (["zzzz"], r"got 'zzzz'$"),
        ([f"x{i}" for i in range(7)], r"'x4'.* and 2 more"),
        (["G7", "G1", "G7"], r"genes: expected each gene once, got 'G7' again"),
        (["ENSG00000141510", "ENSG00000141510.18"], r"expected each gene once, got 'ENSG00000141510.18' again"),
        ([], r"genes: expected a list of gene names, got \[\]"),
        ("G7", r"genes: expected a list of gene names, got 'G7'"),
    ],
)
def test_bad_genes_are_named(genes: Any, message: str, model: XTrimoGene, tmp_path: Path) -> None:
    for ask in (gene_level.gene_embeddings, gene_level.predict_expression):
        with pytest.raises(ValueError, match=message):
            ask(cells(), model, genes, output=tmp_path / "out.h5ad")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "auto"}, ValueError, "dtype: expected one of float32, bfloat16, got 'auto'"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"num_threads": 0}, ValueError, "num_threads: expected at least 1, got 0"),
        ({"device": "abacus"}, ValueError, "device: expected 'auto', 'cpu', 'cuda'"),
        ({"overwrite": True}, ValueError, "overwrite: expected output to be given too"),
        ({"output": "out.zarr"}, ValueError, "output: expected a name that ends in .h5ad, got out.zarr"),
        (
            {"output": "none/out.h5ad"},
            FileNotFoundError,
            "output: expected an existing folder, got none; make it first",
        ),
        ({"layer": "none"}, ValueError, "AnnData: expected layer 'none'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str, model: XTrimoGene) -> None:
    with pytest.raises(error, match=message):
        gene_level.predict_expression(cells(), model, ASKED, **options)


def test_fractions_are_refused_before_work(model: XTrimoGene) -> None:
    with pytest.raises(ValueError, match="AnnData: expected raw counts in X, got numbers that are not whole"):
        model.predict_expression(cells(counts() * 0.5), ASKED)


@pytest.mark.filterwarnings("ignore:.*no gene of the vocabulary")
def test_an_output_is_not_replaced_unasked_nor_the_input_ever(path: Path, tmp_path: Path, model: XTrimoGene) -> None:
    output = tmp_path / "out.h5ad"
    gene_level.predict_expression(path, model, ASKED, output=output, progress=False)
    before = output.read_bytes()
    with pytest.raises(FileExistsError, match=r"out.h5ad exists; name another file, or pass overwrite=True"):
        gene_level.gene_embeddings(path, model, ASKED, output=output, progress=False)
    assert output.read_bytes() == before
    gene_level.gene_embeddings(path, model, ASKED, output=output, overwrite=True, progress=False)
    assert "gene_embeddings" in anndata.read_h5ad(output).obsm
    with pytest.raises(ValueError, match="expected another file than the input"):
        gene_level.predict_expression(path, model, ASKED, output=path, overwrite=True)


@pytest.mark.filterwarnings("ignore:.*no gene of the vocabulary")
def test_a_run_that_fails_leaves_no_file_and_the_old_one(
    path: Path, tmp_path: Path, model: XTrimoGene, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.h5ad"
    output.write_bytes(b"old")
    calls = []

    def fail(self: XTrimoGene, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(self, *args, **options)

    predict = XTrimoGene.predict
    monkeypatch.setattr(XTrimoGeneNetwork, "predict", fail)
    with pytest.raises(KeyboardInterrupt):
        gene_level.predict_expression(path, model, ASKED, output=output, overwrite=True, batch_size=4, progress=False)
    assert output.read_bytes() == b"old"
    assert {entry.name for entry in tmp_path.iterdir()} == {"cells.h5ad", "out.h5ad"}


@pytest.mark.filterwarnings("ignore:.*no gene of the vocabulary")
@pytest.mark.parametrize("infer_string", [False, True])
def test_nullable_strings_of_obs_are_written(infer_string: bool, path: Path, tmp_path: Path, model: XTrimoGene) -> None:
    adata = anndata.read_h5ad(path)
    donors = [f"d{i % 3}" for i in range(adata.n_obs)]
    adata.obs["donor"] = pd.array(donors, dtype="string")
    adata.obs["missing"] = pd.array([None, *donors[1:]], dtype="string")
    adata.obs["when"] = pd.date_range("2020-01-01", periods=adata.n_obs)
    adata.obs.index = adata.obs.index.astype("string")
    with (
        pd.option_context("future.infer_string", infer_string),
        pytest.warns(UserWarning, match="obs: columns that h5ad files cannot hold are left out: when"),
    ):
        gene_level.predict_expression(adata, model, ASKED, output=tmp_path / "out.h5ad", progress=False)
    obs = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert list(obs.index) == list(adata.obs.index)
    assert list(obs["donor"]) == donors
    assert obs["missing"].isna().tolist() == [True] + [False] * (adata.n_obs - 1)
    with h5py.File(tmp_path / "out.h5ad") as root:
        encodings = {root["obs"][name].attrs["encoding-type"] for name in ("donor", "missing", "_index")}
    assert encodings == {"string-array", "categorical"}


@pytest.mark.filterwarnings("ignore:.*no gene of the vocabulary")
def test_an_output_that_comes_meanwhile_stays_and_the_result_too(
    path: Path, tmp_path: Path, model: XTrimoGene, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, predict = tmp_path / "out.h5ad", XTrimoGeneNetwork.predict

    def other_run(self: XTrimoGene, *args: Any, **options: Any) -> torch.Tensor:
        output.write_bytes(b"another run")
        return predict(self, *args, **options)

    monkeypatch.setattr(XTrimoGeneNetwork, "predict", other_run)
    with pytest.raises(FileExistsError, match=r"out\.h5ad has appeared meanwhile, .*; the result of this one is "):
        gene_level.predict_expression(path, model, ASKED, output=output, progress=False)
    assert output.read_bytes() == b"another run"
    (kept,) = tmp_path.glob("out.*.h5ad")
    assert "imputed" in anndata.read_h5ad(kept).layers


@pytest.mark.parametrize("command", ["impute", "genes"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    command: str, path: Path, tmp_path: Path, model: XTrimoGene
) -> None:
    """In a process of its own: HDF5 is apt to end one after a write that failed."""
    model.save_pretrained(tmp_path / "checkpoint")
    script = """
        import resource, sys
        from xtrimogene.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
        sys.exit(main(sys.argv[2:]))
    """
    files = ["--checkpoint", str(tmp_path / "checkpoint"), "--input", str(path), "--output", str(tmp_path / "out.h5ad")]
    asked = ["--genes", *ASKED] if command == "genes" else []
    python = [*warm.python(cells=True), "-c", textwrap.dedent(script)]
    for limit in (100, 4_000, 20_000):
        done = subprocess.run(
            [*python, str(limit), command, *files, *asked, "--no-progress"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == (2 if "File too large" in done.stderr else 0), done.stderr
        if done.returncode:
            assert done.stderr.startswith("xtrimogene: error: [Errno 27] File too large: ")
            assert done.stderr.count("\n") == 1
            assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "checkpoint"}
        else:
            assert limit > 100
            (tmp_path / "out.h5ad").unlink()
