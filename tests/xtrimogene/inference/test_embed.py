"""Tests of xtrimogene.embed: same embeddings whatever the form, batch or interruption; bad input before any work."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
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
from anndata.io import write_elem

import xtg_kernels
import xtrimogene
from tests import warm
from xtg_kernels import dispatch
from xtrimogene import Vocabulary, XTrimoGene, embed, writing
from xtrimogene.cells.formats import loom as formats_loom
from xtrimogene.inference import precision, shards
from xtrimogene.inference.shards import Destination
from xtrimogene.network.model import XTrimoGeneNetwork

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*have no gene of the vocabulary:UserWarning"),
]

embed_module = sys.modules["xtrimogene.inference.embed"]
N_OBS, N_VARS, DIM = 50, 60, 16
EMPTY = [0, 17]
GENES = [f"G{i}" for i in range(N_VARS)]


def counts() -> sp.csr_matrix:
    rng = np.random.default_rng(5)
    matrix = sp.random(N_OBS, N_VARS, density=0.3, format="lil", random_state=rng)
    matrix[EMPTY] = 0
    matrix = matrix.tocsr()
    matrix.data = rng.geometric(0.3, matrix.nnz)
    return matrix.astype(np.float32)


def cells(matrix: Any = None) -> AnnData:
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_OBS)])
    return AnnData(counts() if matrix is None else matrix, obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(autouse=True)
def float32_unless_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are compared to many digits: "auto" is float32 here, but for the tests that are about it."""
    if "bfloat16" not in request.node.name:
        monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)


@pytest.fixture(scope="module")
def model() -> XTrimoGene:
    return XTrimoGene.from_preset("3m", Vocabulary(GENES[::-1]), num_layers=1, dim=DIM, num_heads=2)


@pytest.fixture
def checkpoint(model: XTrimoGene, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cells().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_module, "_WINDOW", 8)


@pytest.fixture(scope="module")
def expected(model: XTrimoGene) -> np.ndarray:
    """One cell at a time, by the formula and the model alone."""
    from xtg_kernels import RaggedBatch

    rows = []
    for row in counts().toarray().astype(np.float64)[:, ::-1]:
        genes = np.flatnonzero(row)
        values = np.log1p(row[genes] / row.sum() * 1e4) if len(genes) else row[genes]
        batch = RaggedBatch(
            torch.from_numpy(values.astype(np.float32)),
            torch.from_numpy(genes.astype(np.int32)),
            torch.tensor([0, len(genes)], dtype=torch.int32),
            len(genes),
        )
        with torch.inference_mode():
            rows.append(model.embed_batch(batch)[0].numpy())
    return np.stack(rows)


def assert_close(embedding: Any, expected: np.ndarray) -> None:
    assert np.flatnonzero(np.isnan(np.asarray(embedding)).all(axis=1)).tolist() == EMPTY
    np.testing.assert_allclose(embedding, expected, rtol=1e-4, atol=1e-5)


def test_adata_gets_obsm(model: XTrimoGene, expected: np.ndarray) -> None:
    adata = cells()
    with pytest.warns(
        UserWarning, match="AnnData: 2 of 50 cells have no gene of the vocabulary; their embedding is NaN"
    ):
        report = embed(adata, model, progress=False)
    assert adata.obsm["X_xtrimogene"].dtype == np.float32
    assert_close(adata.obsm["X_xtrimogene"], expected)
    assert (report.cells, report.empty_cells, report.tokens) == (50, 2, counts().nnz)
    assert (report.genes_found, report.vocabulary_size) == (60, 60)
    assert (report.dtype, report.device) == ("float32", "cpu")
    assert report.backend in ("cpp", "reference")
    parts = report.seconds_reading + report.seconds_packing + report.seconds_encoder
    assert 0 < report.seconds_encoder < parts < report.seconds
    assert report.cells_per_second == pytest.approx(50 / report.seconds)
    assert "50 cells, 2 of them empty" in str(report)


def test_checkpoint_folder_and_other_options(checkpoint: Path, model: XTrimoGene) -> None:
    adata = cells()
    embed(adata, checkpoint, pooling="max", key_added="X_max", progress=False)
    by_mean = embed(adata, str(checkpoint), progress=False).embedding
    assert set(adata.obsm) == {"X_max", "X_xtrimogene"}
    assert by_mean is not None
    kept = np.setdiff1d(np.arange(N_OBS), EMPTY)
    assert (adata.obsm["X_max"][kept].mean(1) > by_mean[kept].mean(1)).all()


@pytest.mark.parametrize("max_tokens", [40, 100, 10**6])
@pytest.mark.parametrize("window", [1, 7, 1024])
def test_batches_and_windows_do_not_matter(
    window: int, max_tokens: int, model: XTrimoGene, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_module, "_WINDOW", window)
    sizes = []
    original = XTrimoGene.embed_batch

    def spy(self: XTrimoGene, batch: Any, pooling: str = "mean") -> torch.Tensor:
        sizes.append(batch.total_nnz)
        lengths = batch.lengths.tolist()
        assert lengths == sorted(lengths)
        return original(self, batch, pooling)

    monkeypatch.setattr(XTrimoGeneNetwork, "embed_batch", spy)
    assert_close(embed(cells(), model, max_tokens=max_tokens, progress=False).embedding, expected)
    assert max(sizes) <= max_tokens


@pytest.mark.filterwarnings("ignore:Setting element:anndata.ImplicitModificationWarning")
@pytest.mark.parametrize("form", ["csc", "dense", "view", "layer", "backed"])
def test_forms(form: str, model: XTrimoGene, expected: np.ndarray, path: Path) -> None:
    if form == "backed":
        adata = anndata.read_h5ad(path, backed="r")
        before = path.read_bytes()
    elif form == "view":
        adata = cells()[np.arange(N_OBS)]
    elif form == "layer":
        adata = cells(np.zeros((N_OBS, N_VARS), np.float32))
        adata.layers["counts"] = counts()
    else:
        adata = cells(counts().tocsc() if form == "csc" else counts().toarray())
    embed(adata, model, layer="counts" if form == "layer" else None, progress=False)
    assert_close(adata.obsm["X_xtrimogene"], expected)
    if form == "backed":
        adata.file.close()
        assert path.read_bytes() == before


def test_the_callers_model_stays_as_it_was(model: XTrimoGene, expected: np.ndarray) -> None:
    trained = XTrimoGene(model.config, model.vocabulary)
    trained.load_state_dict(model.state_dict())
    trained.train()
    assert_close(embed(cells(), trained, progress=False).embedding, expected)
    assert trained.training
    half = embed(cells(), trained, dtype="bfloat16", progress=False)
    assert half.dtype == "bfloat16"
    assert next(trained.parameters()).dtype == torch.float32
    assert next(trained.parameters()).requires_grad
    kept = np.setdiff1d(np.arange(N_OBS), EMPTY)
    assert half.embedding is not None
    difference = np.linalg.norm(half.embedding[kept] - expected[kept]) / np.linalg.norm(expected[kept])
    assert 1e-5 < difference < 2e-2


@pytest.mark.parametrize(("error", "dtype"), [(0.0, "float32"), (0.049, "bfloat16"), (0.051, "float32")])
def test_auto_takes_bfloat16_where_it_moves_cells_little(
    error: float, dtype: str, model: XTrimoGene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """error 0 stands for a machine without bfloat16, where nothing is measured."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: error > 0)
    monkeypatch.setattr(embed_module, "bfloat16_error", lambda *args: error)
    report = embed(cells(), model, progress=False)
    assert report.dtype == dtype
    assert report.bfloat16_error == (error or None)
    assert (f"{dtype} (bfloat16 moves cells by {error:.1%} of their spread)" in str(report)) == (error > 0)
    fixed = embed(cells(), model, dtype=dtype, progress=False)
    np.testing.assert_array_equal(report.embedding, fixed.embedding)
    assert fixed.bfloat16_error is None


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_the_bfloat16_error_is_that_of_the_checked_cells(
    pooling: str, model: XTrimoGene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    report = embed(cells(), model, pooling=pooling, progress=False)
    exact, rounded = (
        embed(cells(), model, dtype=dtype, pooling=pooling, progress=False).embedding
        for dtype in ("float32", "bfloat16")
    )
    assert exact is not None
    assert rounded is not None
    rows = [row for row in np.linspace(0, N_OBS - 1, 16).astype(int) if row not in EMPTY]
    exact, rounded = exact[rows].astype(np.float64), rounded[rows].astype(np.float64)
    want = np.linalg.norm(rounded - exact) / np.linalg.norm(exact - exact.mean(axis=0))
    assert report.bfloat16_error == pytest.approx(want, rel=0.1)
    assert 1e-4 < want < 0.2


def test_auto_without_bfloat16_cells_to_check(model: XTrimoGene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    for adata in (cells()[:0], cells()[:3], cells()[:1]):
        adata = adata.copy()
        kept = int((np.asarray(adata.X.sum(axis=1)).ravel() > 0).sum())
        report = embed(adata, model, progress=False)
        assert report.bfloat16_error is not None
        assert np.isnan(report.bfloat16_error) == (kept < 2)
        assert kept >= 2 or report.dtype == "float32"


@pytest.mark.skipif(dispatch.extension() is None, reason="the C++ extension was not built")
def test_bfloat16_is_found_where_the_isa_has_it(model: XTrimoGene) -> None:
    extension = dispatch.extension()
    before = extension.active_isa()
    try:
        for isa in extension.available_isas():
            extension.use_isa(isa)
            has = isa in ("avx512bf16", "amx")
            assert precision.has_bfloat16(torch.device("cpu")) == has
            with xtg_kernels.use_backend("reference"):
                assert not precision.has_bfloat16(torch.device("cpu"))
    finally:
        extension.use_isa(before)


def test_the_models_own_target_sum_is_used(model: XTrimoGene) -> None:
    other = XTrimoGene.from_preset("3m", model.vocabulary, num_layers=1, dim=DIM, num_heads=2, target_sum=100)
    other.load_state_dict(model.state_dict())
    scaled = cells()
    totals = np.asarray(scaled.X.sum(axis=1)).ravel()
    scaled.X.data = np.log1p(scaled.X.data / np.repeat(totals, np.diff(scaled.X.indptr)) * 100)
    ours, by_hand = embed(cells(), other, progress=False), embed(scaled, other, normalized=True, progress=False)
    np.testing.assert_allclose(ours.embedding, by_hand.embedding, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_a_path_without_output_returns_the_embedding(path: Path, model: XTrimoGene, expected: np.ndarray) -> None:
    before = sorted(path.parent.iterdir())
    report = embed(path, model, progress=False)
    assert_close(report.embedding, expected)
    assert sorted(path.parent.iterdir()) == before


def content(path: Path) -> dict[str, Any]:
    """Every group, data set and attribute of an HDF5 file."""
    found: dict[str, Any] = {}

    def note(name: str, item: Any) -> None:
        found[name] = (
            {k: str(v) for k, v in item.attrs.items()},
            item[()].tolist() if hasattr(item, "shape") else None,
        )

    with h5py.File(path) as file:
        file.visititems(note)
    return found


@pytest.mark.usefixtures("small_windows")
def test_a_file_is_copied_with_the_embedding(
    path: Path, checkpoint: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    before = path.read_bytes()
    output = tmp_path / "out.h5ad"
    report = embed(path, checkpoint, output=output, progress=False)
    assert report.embedding is None
    assert (report.cells, report.empty_cells, report.resumed_cells) == (50, 2, 0)
    assert path.read_bytes() == before
    assert_close(anndata.read_h5ad(output).obsm["X_xtrimogene"], expected)
    written = content(output)
    attributes = dict(written.pop("obsm/X_xtrimogene")[0])
    assert len(attributes.pop("xtrimogene-run")) == 64
    assert attributes == {"encoding-type": "array", "encoding-version": "0.2.0"}
    assert written == content(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.h5ad", "checkpoint", "out.h5ad"]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning")
@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning")
def test_zarr_in_zarr_out(zarr_format: int, checkpoint: Path, expected: np.ndarray, tmp_path: Path) -> None:
    store, output = tmp_path / "cells.zarr", tmp_path / "out.zarr"
    with anndata.settings.override(zarr_write_format=zarr_format):
        cells().write_zarr(store)
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    embed(store, checkpoint, output=output, progress=False)
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before
    assert_close(anndata.read_zarr(output).obsm["X_xtrimogene"], expected)
    embed(store, checkpoint, output=output, pooling="max", overwrite=True, progress=False)
    assert not np.array_equal(anndata.read_zarr(output).obsm["X_xtrimogene"][1:5], expected[1:5])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.zarr", "checkpoint", "out.zarr"]


def test_an_embedding_that_is_there_is_replaced(
    path: Path, checkpoint: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    adata = cells()
    adata.obsm["X_xtrimogene"] = np.zeros((N_OBS, 3))
    adata.obsm["X_pca"] = np.ones((N_OBS, 2))
    adata.write_h5ad(path)
    embed(path, checkpoint, output=tmp_path / "out.h5ad", progress=False)
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert_close(written.obsm["X_xtrimogene"], expected)
    assert (written.obsm["X_pca"] == 1).all()


def test_a_real_legacy_file(tmp_path: Path) -> None:
    """scanpy's shipped PBMC as a path: written by an early anndata, log-normalised values in .raw, X scaled."""
    import scanpy

    source = Path(scanpy.__file__).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"
    raw = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    model = XTrimoGene.from_preset("3m", Vocabulary.from_adata(raw), num_layers=1, dim=DIM, num_heads=2)
    with pytest.raises(ValueError, match=r"10x_pbmc68k_reduced\.h5ad: row 0 .*value -.*expected raw counts"):
        embed(source, model, progress=False)
    with pytest.raises(
        ValueError, match=r"expected raw counts in layer 'raw', got numbers that are not whole; if they are"
    ):
        embed(source, model, layer="raw", progress=False)
    report = embed(source, model, layer="raw", normalized=True, output=tmp_path / "out.h5ad", progress=False)
    assert (report.cells, report.empty_cells, report.genes_found) == (700, 0, 765)
    embed(raw, model, normalized=True, progress=False)
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(written.obsm["X_xtrimogene"], raw.obsm["X_xtrimogene"])
    assert {"X_pca", "X_umap"} <= set(written.obsm)


# --- interruption ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What kill -9 looks like from inside: nothing is cleaned up after it."""


@contextlib.contextmanager
def killed_at_step(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From the given change to the file system on, every change raises Killed and does nothing.

    Flushing the files of a store one after the other is one step: a process killed between two of them leaves the same
    names with the same content.
    """
    count, inside = -1, False

    def guard(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count, inside
            if inside:  # a part of another step
                return original(*args, **kwargs)
            count += 1
            if count >= step:
                raise Killed
            inside = True
            try:
                return original(*args, **kwargs)
            finally:
                inside = False

        return call

    with monkeypatch.context() as patch:
        for owner, name in (
            (os, "replace"),
            (os, "fsync"),
            (shutil, "copyfile"),
            (shards, "_copy_store"),
            (shards, "_flush_tree"),
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "unlink"),
            (Path, "rmdir"),
            (shards, "_add_to_h5ad"),
            (shards, "_add_to_zarr"),
            (shards, "_remove_path"),
        ):
            patch.setattr(owner, name, guard(getattr(owner, name)))
        yield


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
@pytest.mark.parametrize("replacing", [False, True])
def test_killed_at_any_step_and_resumed(
    replacing: bool, kind: str, model: XTrimoGene, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_module, "_WINDOW", 20)
    source, output = tmp_path / f"cells.{kind}", tmp_path / f"out.{kind}"
    getattr(cells(), f"write_{kind}")(source)
    options: dict[str, Any] = {"output": output, "overwrite": replacing, "progress": False}
    read = getattr(anndata, f"read_{kind}")
    for step in range(200):
        if replacing:
            shutil.copytree(source, output) if kind == "zarr" else shutil.copyfile(source, output)
        try:
            with killed_at_step(step, monkeypatch):
                embed(source, model, **options)
            break
        except Killed:
            pass
        if output.exists():
            embedding = read(output).obsm.get("X_xtrimogene")
            assert embedding is not None or replacing
            if embedding is not None:
                assert_close(embedding, expected)
        report = embed(source, model, resume=True, **options)
        assert (report.cells, report.empty_cells) == (50, 2)
        assert_close(read(output).obsm["X_xtrimogene"], expected)
        assert sorted(p.name for p in tmp_path.iterdir()) == [f"cells.{kind}", f"out.{kind}"]
        shutil.rmtree(output) if kind == "zarr" else output.unlink()
    assert step > 10
    assert_close(read(output).obsm["X_xtrimogene"], expected)


def test_kill_9_and_resume(
    path: Path, checkpoint: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.h5ad"
    partial = tmp_path / "out.h5ad.partial"
    script = f"""
        import sys, time
        import xtrimogene.inference.embed
        from xtrimogene import cli
        from xtrimogene.network.model import XTrimoGeneNetwork
        sys.modules["xtrimogene.inference.embed"]._WINDOW = 8
        original, batches = XTrimoGeneNetwork.embed_batch, []
        def stuck_in_the_fourth(self, *args):
            batches.append(args)
            if len(batches) == 4:
                time.sleep(600)
            return original(self, *args)
        XTrimoGeneNetwork.embed_batch = stuck_in_the_fourth
        files = ["--checkpoint", {str(checkpoint)!r}, "--input", {str(path)!r}, "--output", {str(output)!r}]
        cli.main(["embed", *files, "--dtype", "float32"])
    """
    before = path.read_bytes()
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(partial.glob("shard-*.npy"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    assert not output.exists()
    finished = {shard: (shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in partial.glob("shard-*.npy")}
    assert len(finished) == 3

    monkeypatch.setattr(embed_module, "_WINDOW", 8)
    at_the_end: dict[Path, tuple[int, int]] = {}
    publish = Destination._publish

    def spy(self: Any, *args: Any) -> None:
        at_the_end.update(
            {shard: (shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in partial.glob("shard-*.npy")}
        )
        publish(self, *args)

    monkeypatch.setattr(Destination, "_publish", spy)
    report = embed(path, checkpoint, output=output, resume=True, progress=False)
    assert len(at_the_end) == 7
    assert finished.items() <= at_the_end.items()
    assert report.resumed_cells == 24
    assert path.read_bytes() == before
    uninterrupted = embed(path, checkpoint, progress=False).embedding
    np.testing.assert_array_equal(anndata.read_h5ad(output).obsm["X_xtrimogene"], uninterrupted)
    assert not partial.exists()


@pytest.fixture
def interrupted(
    path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_windows: None
) -> Path:
    """The folder that a run leaves when it is interrupted after 3 of its 7 shards."""
    write = Destination._write_shard

    def interrupt(self: Any, start: int, embeddings: Any) -> None:
        if start == 24:
            raise KeyboardInterrupt
        write(self, start, embeddings)

    with monkeypatch.context() as patch:
        patch.setattr(Destination, "_write_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(path, model, output=tmp_path / "out.h5ad", progress=False)
    folder = tmp_path / "out.h5ad.partial"
    assert len(list(folder.glob("shard-*.npy"))) == 3
    return folder


def test_a_left_folder_needs_resume(interrupted: Path, path: Path, model: XTrimoGene, tmp_path: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"out\.h5ad\.partial is left from an interrupted run; .*--resume"):
            embed(path, model, output=tmp_path / "out.h5ad", overwrite=overwrite, progress=False)
    assert len(list(interrupted.glob("shard-*.npy"))) == 3
    report = embed(path, model, output=tmp_path / "out.h5ad", resume=True, max_tokens=60, progress=False)
    assert report.resumed_cells == 24
    assert not interrupted.exists()


def test_resume_refuses_other_shards(interrupted: Path, path: Path, model: XTrimoGene, tmp_path: Path) -> None:
    output = tmp_path / "out.h5ad"
    options: dict[str, Any] = {"output": output, "resume": True, "progress": False}
    with pytest.raises(ValueError, match=r"got others: pooling was 'mean', is 'max'; give the same, or remove"):
        embed(path, model, pooling="max", **options)
    with pytest.raises(ValueError, match=r"got others: values was .*'fractional': False.*, is .*'fractional': True"):
        embed(path, model, fractional_counts=True, **options)
    with pytest.raises(ValueError, match=r"got others: values was .*'counts'.*, is .*'tpm'"):
        embed(path, model, values="tpm", **options)
    other = XTrimoGene.from_preset("3m", model.vocabulary, num_layers=1, dim=DIM, num_heads=2, seed=1)
    with pytest.raises(ValueError, match="got others: checkpoint was"):
        embed(path, other, **options)
    changed = counts()
    changed.data[changed.indptr[20]] += 1
    cells(changed).write_h5ad(path)
    with pytest.raises(ValueError, match=r"got other cells from row 16 of .*cells\.h5ad on; give the same"):
        embed(path, model, **options)
    # What the manifest would have told of the input, the rows tell as well.
    (interrupted / "manifest.json").write_text("{")
    with (
        pytest.warns(UserWarning, match="manifest.json: damaged"),
        pytest.raises(ValueError, match="got other cells from row 16"),
    ):
        embed(path, model, **options)
    assert len(list(interrupted.glob("shard-*.npy"))) == 3
    assert not output.exists()


@pytest.mark.usefixtures("small_windows")
def test_resume_refuses_other_totals_and_other_aliases(
    model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = cells()
    adata.obs["n"] = np.asarray(adata.X.sum(axis=1)).ravel() + 100
    adata.var_names = ["old", *GENES[1:]]
    path, table, output = tmp_path / "cells.h5ad", tmp_path / "aliases.tsv", tmp_path / "out.h5ad"
    adata.write_h5ad(path)
    table.write_text("old\tG0\n")
    options: dict[str, Any] = {"total_counts": "n", "aliases": table, "output": output, "progress": False}
    write = Destination._write_shard

    def interrupt(self: Any, start: int, embeddings: Any) -> None:
        write(self, start, embeddings)
        if start == 24:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Destination, "_write_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(path, model, **options)
    with pytest.raises(ValueError, match="got others: total counts was 'n', is None; content of total counts and alia"):
        embed(path, model, **{**options, "total_counts": None}, resume=True)
    table.write_text("other\tG0\n")
    with pytest.raises(ValueError, match=r"got others: .*content of total counts and aliases was"):
        embed(path, model, **options, resume=True)
    table.write_text("old\tG0\n")
    adata.obs["n"] += 1
    adata.write_h5ad(path)
    with pytest.raises(ValueError, match="got others: content of total counts and aliases was"):
        embed(path, model, **options, resume=True)
    adata.obs["n"] -= 1
    adata.write_h5ad(path)
    assert embed(path, model, **options, resume=True).resumed_cells == 32
    adata.var_names = GENES
    embed(adata, model, total_counts="n", progress=False)
    np.testing.assert_array_equal(anndata.read_h5ad(output).obsm["X_xtrimogene"], adata.obsm["X_xtrimogene"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_a_broken_model_gives_are_no_empty_cells(
    path: Path, tmp_path: Path, model: XTrimoGene, value: float
) -> None:
    broken = XTrimoGene.from_preset("3m", model.vocabulary, num_layers=1, dim=DIM, num_heads=2)
    with torch.no_grad():
        broken.encoder.norm.bias[3] = value
    message = r"row \d+ \(cell\d+\): the model gives NaN or infinite numbers for a cell with \d+ tokens"
    with pytest.raises(ValueError, match=message):
        embed(cells(), broken, progress=False)
    with pytest.raises(ValueError, match=message):
        embed(path, broken, output=tmp_path / "out.h5ad", progress=False)
    assert not (tmp_path / "out.h5ad").exists()
    for run in (xtrimogene.predict_expression, xtrimogene.gene_embeddings):
        with pytest.raises(ValueError, match=message):
            run(cells(), broken, ["G1"], progress=False)
    # An empty cell has no other numbers than NaN.
    empty = cells()[EMPTY].copy()
    assert embed(empty, broken, progress=False).empty_cells == 2


def test_two_runs_at_once(interrupted: Path, path: Path, model: XTrimoGene, tmp_path: Path) -> None:
    import fcntl

    with open(interrupted / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for resume in (True, False):
            with pytest.raises(FileExistsError, match="another run is at work"):
                embed(path, model, output=tmp_path / "out.h5ad", resume=resume, progress=False)
    assert len(list(interrupted.glob("shard-*.npy"))) == 3


def test_what_is_only_touched_or_copied_is_the_same_input(
    interrupted: Path, path: Path, model: XTrimoGene, expected: np.ndarray, tmp_path: Path
) -> None:
    """A touch before the run goes on, and one while it is at work."""
    copy = tmp_path / "copy.h5ad"
    shutil.copyfile(path, copy)
    os.replace(copy, path)
    os.utime(path, ns=(0, 0))
    original = XTrimoGene.embed_batch

    def touch(self: XTrimoGene, *args: Any) -> torch.Tensor:
        path.touch()
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(XTrimoGeneNetwork, "embed_batch", touch)
        report = embed(path, model, output=tmp_path / "out.h5ad", resume=True, progress=False)
    assert report.resumed_cells == 24
    assert_close(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_xtrimogene"], expected)


@pytest.mark.usefixtures("small_windows")
def test_input_that_changes_meanwhile(
    path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xtrimogene.cells.matrix import SparseRows

    read, original = SparseRows.read, XTrimoGene.embed_batch
    last = tmp_path / "out.h5ad.partial" / "shard-000000000048.npy"

    def change(self: XTrimoGene, *args: Any) -> torch.Tensor:
        os.utime(path, ns=(0, 0))
        return original(self, *args)

    def reread(self: SparseRows, start: int, stop: int) -> Any:
        indptr, indices, data = read(self, start, stop)
        return indptr, indices, data + float(start == 16 and last.exists())

    monkeypatch.setattr(XTrimoGeneNetwork, "embed_batch", change)
    monkeypatch.setattr(SparseRows, "read", reread)
    with pytest.raises(ValueError, match=r"cells\.h5ad: changed while it was read; run again"):
        embed(path, model, output=tmp_path / "out.h5ad", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.h5ad"]


def test_input_that_changes_while_it_is_copied(
    path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile, output = shutil.copyfile, tmp_path / "out.h5ad"

    def change(source: Path, target: Path) -> None:
        copyfile(source, target)
        os.utime(source, ns=(0, 0))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", change)
        with pytest.raises(OSError, match=r"cells\.h5ad: changed while it was copied; the cells that are finished are"):
            embed(path, model, output=output, progress=False)
    assert not output.exists()
    assert embed(path, model, output=output, resume=True, progress=False).resumed_cells == N_OBS


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_the_result_is_on_disk_before_it_is_the_output(
    kind: str, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / f"cells.{kind}", tmp_path / f"out.{kind}"
    getattr(cells(), f"write_{kind}")(source)
    fsync, replace = os.fsync, os.replace
    flushed: set[int] = set()

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def publish(written: Path, target: Path) -> None:
        if target == output:
            assert {entry.stat().st_ino for entry in (written, *written.rglob("*"))} <= flushed
            flushed.clear()
        replace(written, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", publish)
    embed(source, model, output=output, progress=False)
    assert flushed == {tmp_path.stat().st_ino}


def test_an_output_that_appears_meanwhile_stays(
    path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, original = tmp_path / "out.h5ad", XTrimoGene.embed_batch

    def other_run(self: XTrimoGene, *args: Any) -> torch.Tensor:
        output.write_bytes(b"another run")
        return original(self, *args)

    monkeypatch.setattr(XTrimoGeneNetwork, "embed_batch", other_run)
    with pytest.raises(
        OSError, match=r"out\.h5ad has appeared meanwhile, .*; move it away; the cells that are finished"
    ):
        embed(path, model, output=output, progress=False)
    assert output.read_bytes() == b"another run"
    output.rename(tmp_path / "other.h5ad")
    assert embed(path, model, output=output, resume=True, progress=False).resumed_cells == N_OBS


@pytest.mark.parametrize("damage", ["array", "header", "digest", "cut", "other run"])
def test_a_damaged_shard_is_made_again(
    damage: str, interrupted: Path, path: Path, model: XTrimoGene, expected: np.ndarray, tmp_path: Path
) -> None:
    shard = interrupted / "shard-000000000008.npy"
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        del content[-40:]
    elif damage == "other run":
        content[-32:] = (interrupted / "shard-000000000016.npy").read_bytes()[-32:]
    else:
        content[{"array": 300, "header": 70, "digest": len(content) - 40}[damage]] ^= 64
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match=r"shard-000000000008\.npy: not the shard that was written; its cells are emb"):
        report = embed(path, model, output=tmp_path / "out.h5ad", resume=True, progress=False)
    assert report.resumed_cells == 16
    assert_close(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_xtrimogene"], expected)


@pytest.mark.parametrize("old", ['"cells": 50', '"pooling"', "{"])
def test_a_damaged_manifest_loses_nothing(
    old: str, interrupted: Path, path: Path, model: XTrimoGene, expected: np.ndarray, tmp_path: Path
) -> None:
    manifest = interrupted / "manifest.json"
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, "x" if old == "{" else old.replace("5", "4").replace("p", "q"), 1))
    other = XTrimoGene.from_preset("3m", model.vocabulary, num_layers=1, dim=DIM, num_heads=2, seed=1)
    left = interrupted.with_name("left")
    shutil.copytree(interrupted, left)
    with pytest.warns(UserWarning, match=r"manifest\.json: damaged; each shard is compared with its cells instead"):
        report = embed(path, model, output=tmp_path / "out.h5ad", resume=True, progress=False)
    assert report.resumed_cells == 24
    assert_close(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_xtrimogene"], expected)
    # The shards of a model are never taken for those of another, whatever is left of the manifest.
    left.rename(tmp_path / "other.h5ad.partial")
    with pytest.warns(UserWarning, match="not the shard that was written"):
        report = embed(path, other, output=tmp_path / "other.h5ad", resume=True, progress=False)
    assert report.resumed_cells == 0


def test_a_disk_that_fails_keeps_what_is_finished(
    path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_windows: None
) -> None:
    from xtrimogene.cells.matrix import SparseRows

    read, output = SparseRows.read, tmp_path / "out.h5ad"
    for code in (errno.EIO, errno.ESTALE):

        def fail(self: SparseRows, start: int, stop: int, code: int = code) -> Any:
            if start >= 24 and stop - start == 8:
                raise OSError(code, os.strerror(code))
            return read(self, start, stop)

        with monkeypatch.context() as patch:
            patch.setattr(SparseRows, "read", fail)
            with pytest.raises(
                ValueError, match=r"cells\.h5ad: cannot read rows 24 to 31: .*; the cells that are fini"
            ):
                embed(path, model, output=output, resume=True, progress=False)
    assert embed(path, model, output=output, resume=True, progress=False).resumed_cells == 24


def test_an_empty_folder_makes_no_old_output_the_result(path: Path, model: XTrimoGene, tmp_path: Path) -> None:
    output = tmp_path / "out.h5ad"
    output.write_bytes(b"old")
    (tmp_path / "out.h5ad.partial").mkdir()
    with pytest.raises(FileExistsError, match=r"out\.h5ad exists"):
        embed(path, model, output=output, resume=True, progress=False)
    assert output.read_bytes() == b"old"
    embed(path, model, output=output, resume=True, overwrite=True, progress=False)
    assert "X_xtrimogene" in anndata.read_h5ad(output).obsm


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_going_on_with_a_run_that_is_over_changes_nothing(
    kind: str, model: XTrimoGene, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / f"cells.{kind}", tmp_path / f"out.{kind}"
    getattr(cells(), f"write_{kind}")(source)
    options: dict[str, Any] = {"output": output, "resume": True, "progress": False}
    embed(source, model, **options)
    inode = output.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(XTrimoGeneNetwork, "embed_batch", None)
        report = embed(source, model, **options)
    assert (report.cells, report.resumed_cells, report.empty_cells) == (50, 50, 2)
    assert output.stat().st_ino == inode
    # Another run is another run: refused, or made where that is allowed.
    with pytest.raises(FileExistsError, match=rf"out\.{kind} exists, of another input, checkpoint or options"):
        embed(source, model, pooling="max", **options)
    assert embed(source, model, pooling="max", overwrite=True, **options).resumed_cells == 0
    assert embed(source, model, overwrite=True, **options).resumed_cells == 0
    assert_close(getattr(anndata, f"read_{kind}")(output).obsm["X_xtrimogene"], expected)
    # So is one of an input that has changed since.
    time.sleep(0.01)
    getattr(cells(), f"write_{kind}")(source)
    with pytest.raises(FileExistsError, match=rf"out\.{kind} exists, of another input"):
        embed(source, model, **options)


@pytest.mark.parametrize("what", ["no folder", "file", "folder", "shard folder", "link", "empty link", "link inside"])
def test_a_folder_of_somebody_else_is_left_alone(
    what: str, path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, precious = tmp_path / "out.h5ad.partial", tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    if what == "link":
        folder.symlink_to(precious)
    elif what == "empty link":
        (tmp_path / "empty").mkdir()
        folder.symlink_to(tmp_path / "empty")
    elif what == "no folder":
        folder.write_text("mine")
    elif what == "file":
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    elif what == "folder":
        folder.mkdir()
        (folder / "notes").mkdir()
    elif what == "shard folder":
        (folder / "shard-000000000000.npy").mkdir(parents=True)
    else:
        folder.mkdir()
        (folder / "lock").symlink_to(precious / "thesis.txt")
    before = sorted(tmp_path.rglob("*"))
    for resume in (True, False):
        with (
            no_work(monkeypatch, tmp_path),
            pytest.raises(
                FileExistsError, match=r"output: .*out\.h5ad\.partial.*; move it away or name another output"
            ),
        ):
            embed(path, model, output=tmp_path / "out.h5ad", resume=resume, overwrite=True, progress=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_comes_meanwhile_stays(
    path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, publish = tmp_path / "out.h5ad.partial", Destination._publish

    def drop(self: Destination, *args: Any) -> None:
        (folder / "notes.txt").write_text("mine")
        publish(self, *args)

    monkeypatch.setattr(Destination, "_publish", drop)
    with pytest.warns(UserWarning, match=r"out\.h5ad\.partial\.\d+: cannot be removed"):
        embed(path, model, output=tmp_path / "out.h5ad", progress=False)
    (kept,) = tmp_path.glob("out.h5ad.partial.*")
    assert [entry.name for entry in kept.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_overwrite_replaces_stores_and_nothing_else(
    zarr_format: int, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, output = tmp_path / "cells.zarr", tmp_path / "out.zarr"
    with anndata.settings.override(zarr_write_format=zarr_format):
        cells().write_zarr(store)
    options: dict[str, Any] = {"output": output, "overwrite": True, "progress": False}
    for foreign in ("thesis.txt", "obs/thesis.txt", "notes/thesis.txt", "X/data/thesis.txt", "X/data/mine/zarr.json"):
        for as_store in (False, True):
            if as_store:
                shutil.copytree(store, output)
            (output / foreign).parent.mkdir(parents=True, exist_ok=True)
            (output / foreign).write_text("mine")
            with no_work(monkeypatch, tmp_path), pytest.raises(FileExistsError, match=r"got a folder that holds "):
                embed(store, model, **options)
            shutil.rmtree(output)
    output.write_text("mine")
    with no_work(monkeypatch, tmp_path), pytest.raises(FileExistsError, match="expected a folder, got the file"):
        embed(store, model, **options)
    output.unlink()
    shutil.copytree(store, output)
    embed(store, model, **options)
    assert "X_xtrimogene" in anndata.read_zarr(output).obsm
    shutil.rmtree(output)
    output.mkdir()  # empty: nothing to lose
    embed(store, model, **options)
    assert "X_xtrimogene" in anndata.read_zarr(output).obsm


def test_output_and_input_in_one_another(model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "cells.zarr"
    cells().write_zarr(store)
    shutil.copytree(store, tmp_path / "outer.zarr" / "cells.zarr")
    for source, output in ((store, store / "out.zarr"), (tmp_path / "outer.zarr/cells.zarr", tmp_path / "outer.zarr")):
        with no_work(monkeypatch, tmp_path), pytest.raises(ValueError, match="expected a place apart from the input"):
            embed(source, model, output=output, overwrite=True, progress=False)


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_an_output_that_is_a_link(kind: str, model: XTrimoGene, expected: np.ndarray, tmp_path: Path) -> None:
    """What it points at is replaced, there or not."""
    source, link, real = tmp_path / f"cells.{kind}", tmp_path / f"link.{kind}", tmp_path / "elsewhere" / "real"
    real.parent.mkdir()
    getattr(cells(), f"write_{kind}")(source)
    link.symlink_to(real)
    for _ in range(2):
        embed(source, model, output=link, overwrite=True, progress=False)
        assert link.is_symlink()
        assert_close(getattr(anndata, f"read_{kind}")(real).obsm["X_xtrimogene"], expected)
    assert [entry.name for entry in real.parent.iterdir()] == ["real"]


def test_a_read_only_store_gives_one_that_can_be_written(model: XTrimoGene, tmp_path: Path) -> None:
    store, output = tmp_path / "cells.zarr", tmp_path / "out.zarr"
    cells().write_zarr(store)
    for entry in (*store.rglob("*"), store):
        entry.chmod(0o555 if entry.is_dir() else 0o444)
    before = os.umask(0o027)
    try:
        embed(store, model, output=output, progress=False)
    finally:
        os.umask(before)
        for entry in (store, *store.rglob("*")):
            entry.chmod(0o755 if entry.is_dir() else 0o644)
    for entry in (*output.rglob("*"), output):
        assert entry.stat().st_mode & 0o777 == (0o750 if entry.is_dir() else 0o640)


def test_modes_are_those_of_the_umask(interrupted: Path, path: Path, model: XTrimoGene, tmp_path: Path) -> None:
    path.chmod(0o400)
    before = os.umask(0o022)
    try:
        embed(path, model, output=tmp_path / "out.h5ad", resume=True, progress=False)
    finally:
        os.umask(before)
    assert (tmp_path / "out.h5ad").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_arrays_that_are_not_read_do_not_matter(
    zarr_format: int, consolidated: bool, model: XTrimoGene, expected: np.ndarray, tmp_path: Path
) -> None:
    import zarr

    store, output = tmp_path / "cells.zarr", tmp_path / "out.zarr"
    adata = cells()
    adata.obsm["X_pca"] = np.ones((N_OBS, 2))
    adata.obsm["X_xtrimogene"] = pd.DataFrame({"a": np.ones(N_OBS)}, index=adata.obs_names)
    with anndata.settings.override(zarr_write_format=zarr_format):
        adata.write_zarr(store)
    if not consolidated and zarr_format == 2:
        (store / ".zmetadata").unlink()
    elif not consolidated:
        root = json.loads((store / "zarr.json").read_bytes())
        (store / "zarr.json").write_text(json.dumps({**root, "consolidated_metadata": None}))
    broken = store / "obsm" / "X_pca" / (".zarray" if zarr_format == 2 else "zarr.json")
    whole = broken.read_bytes()
    broken.write_bytes(b"{")
    embed(store, model, output=output, progress=False)
    (output / broken.relative_to(store)).write_bytes(whole)
    written = anndata.read_zarr(output)
    assert_close(written.obsm["X_xtrimogene"], expected)
    assert set(written.obsm) == {"X_pca", "X_xtrimogene"}
    root = zarr.open_group(output, mode="r")
    assert (root.metadata.consolidated_metadata is not None) == consolidated
    assert_close(root["obsm/X_xtrimogene"][:], expected)
    assert set(root["obsm"]) == {"X_pca", "X_xtrimogene"}


def test_room_on_the_disk_is_looked_for_first(
    path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = path.stat().st_blocks * 512 + N_OBS * DIM * 4  # the copy and the embedding, but no shards
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    with no_work(monkeypatch, tmp_path), pytest.raises(OSError, match=r"output: expected .* MB free in .*, got .* MB"):
        embed(path, model, output=tmp_path / "out.h5ad", progress=False)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cells.h5ad"]


@pytest.mark.parametrize("moment", ["_write_shard", "_publish"])
def test_a_full_disk_keeps_what_is_finished(
    moment: str, path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_windows: None
) -> None:
    original, written = getattr(Destination, moment), []

    def fail(self: Destination, *args: Any) -> None:
        written.append(args)
        if len(written) == 4 or moment == "_publish":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Destination, moment, fail)
        with pytest.raises(OSError, match=r"No space left on device; the cells that are finished are kept: .*--resume"):
            embed(path, model, output=tmp_path / "out.h5ad", progress=False)
    report = embed(path, model, output=tmp_path / "out.h5ad", resume=True, progress=False)
    assert report.resumed_cells == (24 if moment == "_write_shard" else 50)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_no_other_run(
    code: int, path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match=r"lock: this file system has no locks \(.*\); see to it that no other run"):
        embed(path, model, output=tmp_path / "out.h5ad", progress=False)
    assert "X_xtrimogene" in anndata.read_h5ad(tmp_path / "out.h5ad").obsm


def test_a_lock_that_fails_otherwise_is_told_as_it_is(
    interrupted: Path, path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        embed(path, model, output=tmp_path / "out.h5ad", resume=True, progress=False)
    assert len(list(interrupted.glob("shard-*.npy"))) == 3


@pytest.mark.parametrize("another", [False, True])
def test_a_lock_of_a_file_that_is_gone_keeps_nobody_out(
    another: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another run has made one of that name since."""
    import fcntl

    flock = fcntl.flock

    def late(*args: Any) -> None:
        flock(*args)
        (tmp_path / "lock").unlink()
        if another:
            (tmp_path / "lock").touch()

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(FileExistsError, match="busy"), writing.locked(tmp_path / "lock", "busy"):
        raise AssertionError("two at work")


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_a_view_of_a_backed_adata_keeps_its_embedding(
    form: str, model: XTrimoGene, expected: np.ndarray, path: Path
) -> None:
    cells(counts() if form == "csr" else counts().tocsc() if form == "csc" else counts().toarray()).write_h5ad(path)
    view = anndata.read_h5ad(path, backed="r")[5:20]
    with pytest.warns(UserWarning, match="a view of a backed AnnData takes nothing into obsm; the embedding is in"):
        report = embed(view, model, progress=False)
    np.testing.assert_allclose(report.embedding, expected[5:20], rtol=1e-4, atol=1e-5)
    view.file.close()


@pytest.mark.parametrize(
    "key", ["", ".", "..", ".hidden", "__a", "zarr.json", "a\0b", "x" * 256, "\u00e4" * 128, "\udce4" * 256]
)
def test_keys_that_no_file_can_hold(key: str, path: Path, model: XTrimoGene, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_work(monkeypatch, path.parent), pytest.raises(ValueError, match="key_added: expected "):
        embed(path, model, output=path.with_name("out.h5ad"), key_added=key, progress=False)


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_an_obsm_of_null_takes_the_embedding(
    kind: str, model: XTrimoGene, expected: np.ndarray, tmp_path: Path
) -> None:
    import zarr

    source, output = tmp_path / f"cells.{kind}", tmp_path / f"out.{kind}"
    getattr(cells(), f"write_{kind}")(source)
    null = {"encoding-type": "null", "encoding-version": "0.1.0"}
    if kind == "h5ad":
        with h5py.File(source, "r+") as root:
            del root["obsm"]
            root.create_dataset("obsm", data=h5py.Empty("f4")).attrs.update(null)
    else:
        store = zarr.open_group(source, mode="r+", use_consolidated=False)
        del store["obsm"]
        store.create_array("obsm", shape=(), dtype=bool).attrs.update(null)
    embed(source, model, output=output, progress=False)
    assert_close(getattr(anndata, f"read_{kind}")(output).obsm["X_xtrimogene"], expected)


# --- what bad input gets -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_work(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """The encoder never runs, and the folder is as it was."""

    def fail(*_: Any) -> torch.Tensor:
        raise AssertionError("the encoder ran")

    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(XTrimoGeneNetwork, "embed_batch", fail)
        yield
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("row", [1, 49])
@pytest.mark.parametrize("as_path", [True, False])
def test_bad_values(
    value: float,
    row: int,
    as_path: bool,
    model: XTrimoGene,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = counts()
    entry = matrix.indptr[row]
    matrix.data[entry] = value
    adata = cells(matrix)
    adata.write_h5ad(path)
    message = rf"row {row} \(cell{row}\), column {matrix.indices[entry]}: value {value}"
    arguments = (path, {"output": tmp_path / "out.h5ad"}) if as_path else (adata, {})
    with no_work(monkeypatch, tmp_path), pytest.raises(ValueError, match=message):
        embed(arguments[0], model, progress=False, **arguments[1])
    assert not adata.obsm


@pytest.mark.usefixtures("small_windows")
def test_bad_values_outside_the_sample_leave_nothing(
    model: XTrimoGene, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xtrimogene.cells.mapped.check_numbers", lambda source, kind, **_: None)
    matrix = counts()
    matrix.data[matrix.indptr[40]] = -2
    cells(matrix).write_h5ad(path)
    with pytest.raises(
        ValueError, match=rf"cells\.h5ad: row 40, column {matrix.indices[matrix.indptr[40]]}: negative value -2\.0"
    ):
        embed(path, model, output=tmp_path / "out.h5ad", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.h5ad"]
    adata = cells(matrix)
    with pytest.raises(ValueError, match="row 40"):
        embed(adata, model, progress=False)
    assert not adata.obsm


def test_what_is_no_counts(model: XTrimoGene) -> None:
    adata = cells(counts() * 0.5)
    with pytest.raises(
        ValueError, match=r"AnnData: expected raw counts in X, got numbers that are not whole; if they are log1p"
    ):
        embed(adata, model, progress=False)
    adata.layers["counts"], adata.layers["scaled"] = counts(), counts() * 0.1
    adata.raw = cells()
    with pytest.raises(
        ValueError, match=r"these matrices hold whole numbers: layer='counts' \(--layer counts\), layer='raw'"
    ):
        embed(adata, model, progress=False)
    with pytest.raises(ValueError, match=r"raw counts in layer 'scaled', .* whole numbers: layer='counts'"):
        embed(adata, model, layer="scaled", progress=False)
    embed(adata, model, normalized=True, progress=False)
    with pytest.warns(UserWarning, match="normalized=True, but the matrix holds whole numbers only"):
        embed(cells(), model, normalized=True, progress=False)


def test_genes(model: XTrimoGene, tmp_path: Path) -> None:
    adata = cells()
    adata.var["symbol"] = GENES
    adata.var_names = [f"E{i}" for i in range(N_VARS)]
    with pytest.raises(ValueError, match=r"got none of the 60 vocabulary genes .*pass gene_symbols='symbol'"):
        embed(adata, model, progress=False)
    report = embed(adata, model, gene_symbols="symbol", progress=False)
    assert report.genes_found == 60
    adata.var["symbol"] = ["G1", "G1", *GENES[2:]]
    with pytest.warns(
        UserWarning,
        match="59 of 60 vocabulary genes found; 60 of 60 data columns used; counts of columns added up for G1",
    ):
        embed(adata, model, gene_symbols="symbol", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.var_names = ["G1", "G1", *GENES[2:]]
        with pytest.raises(ValueError, match="got G1 more than once; make them unique"):
            embed(adata, model, progress=False)


@pytest.mark.parametrize("form", ["csr", "csc on disk", "dense on disk"])
def test_max_tokens_below_the_longest_cell(
    form: str, model: XTrimoGene, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = counts()
    lengths = np.diff(matrix.indptr)
    longest = int(lengths.argmax())
    cells(matrix if form == "csr" else matrix.tocsc() if form == "csc on disk" else matrix.toarray()).write_h5ad(path)
    most = int(lengths.max())
    message = (
        rf"got {most - 1}, and cell 'cell{longest}' \(row {longest}\) of .*cells\.h5ad expresses {most} vocabulary "
        rf"genes; raise max_tokens to {most}"
    )
    with no_work(monkeypatch, tmp_path), pytest.raises(ValueError, match=message):
        embed(path, model, output=tmp_path / "out.h5ad", max_tokens=most - 1, progress=False)
    embed(path, model, output=tmp_path / "out.h5ad", max_tokens=most, progress=False)


def test_entries_that_are_no_genes_do_not_count(model: XTrimoGene) -> None:
    """max_tokens is about vocabulary genes; a cell may store more than that."""
    some = XTrimoGene.from_preset("3m", Vocabulary(GENES[:12]), num_layers=1, dim=DIM, num_heads=2)
    most = int((counts()[:, :12].toarray() > 0).sum(axis=1).max())
    assert np.diff(counts().indptr).max() > most
    embed(cells(), some, max_tokens=most, progress=False)
    with pytest.raises(ValueError, match=f"expresses {most} vocabulary genes"):
        embed(cells(), some, max_tokens=most - 1, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pooling": "sum"}, ValueError, "pooling: expected one of mean, max, all, product, got 'sum'"),
        ({"dtype": "float16"}, ValueError, "dtype: expected one of auto, float32, bfloat16, got 'float16'"),
        ({"max_tokens": 0}, ValueError, "max_tokens: expected at least 1, got 0"),
        ({"num_threads": 0}, ValueError, "num_threads: expected at least 1, got 0"),
        ({"key_added": "a/b"}, ValueError, "key_added: expected a name without '/', got 'a/b'"),
        ({"device": "abacus"}, ValueError, "device: expected 'auto', 'cpu', 'cuda'"),
        ({"resume": True}, ValueError, "resume, overwrite: expected output to be given too"),
        ({"output": "out.h5ad"}, ValueError, "output: expected None with an AnnData"),
        ({"layer": "none"}, ValueError, "AnnData: expected layer 'none'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str, model: XTrimoGene) -> None:
    adata = cells()
    with pytest.raises(error, match=message):
        embed(adata, model, progress=False, **options)
    assert not adata.obsm


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(model: XTrimoGene) -> None:
    with pytest.raises(ValueError, match="device: expected one that is there, got 'cuda', and torch finds no GPU"):
        embed(cells(), model, device="cuda", progress=False)


def test_bad_outputs(path: Path, model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.h5ad").write_text("precious")
    (tmp_path / "folder.h5ad").mkdir()
    (tmp_path / "link.h5ad").symlink_to(path)
    for output, options, error, message in (
        (
            "there.h5ad",
            {},
            FileExistsError,
            r"there\.h5ad exists; name another file, or pass overwrite=True \(--overwrite\)",
        ),
        ("there.h5ad", {"resume": True}, FileExistsError, r"there\.h5ad exists"),
        ("cells.h5ad", {"overwrite": True}, ValueError, "expected another file than the input"),
        ("link.h5ad", {"overwrite": True}, ValueError, "expected another file than the input"),
        ("folder.h5ad", {"overwrite": True}, FileExistsError, "expected a file name, got the folder"),
        ("none/out.h5ad", {}, FileNotFoundError, "output: expected an existing folder, got .*none; make it first"),
        ("out.zarr", {}, ValueError, r"expected a name that ends in \.h5ad"),
    ):
        with no_work(monkeypatch, tmp_path), pytest.raises(error, match=message):
            embed(path, model, output=tmp_path / output, progress=False, **options)  # type: ignore[arg-type]
    embed(path, model, output=tmp_path / "there.h5ad", overwrite=True, progress=False)
    assert "X_xtrimogene" in anndata.read_h5ad(tmp_path / "there.h5ad").obsm


def test_an_output_folder_that_cannot_be_written(
    path: Path, model: XTrimoGene, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        no_work(monkeypatch, path.parent),
        pytest.raises(PermissionError, match="output: the folder /proc cannot be written to"),
    ):
        embed(path, model, output="/proc/out.h5ad", progress=False)


def test_bad_files(model: XTrimoGene, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cut = tmp_path / "text.h5ad", tmp_path / "cut.h5ad"
    text.write_text("no cells")
    cut.write_bytes(path.read_bytes()[:-3000])
    for bad, message in ((text, "not HDF5"), (cut, "truncated"), (tmp_path / "none.h5ad", "no such file")):
        with (
            no_work(monkeypatch, tmp_path),
            pytest.raises((ValueError, FileNotFoundError), match=rf"{bad.name}: .*{message}"),
        ):
            embed(bad, model, output=tmp_path / "out.h5ad", progress=False)


@pytest.mark.parametrize("n_obs", [0, 3])
def test_no_cells_or_only_empty_ones(n_obs: int, model: XTrimoGene, tmp_path: Path) -> None:
    adata = AnnData(sp.csr_matrix((n_obs, N_VARS), dtype=np.float32), var=pd.DataFrame(index=GENES))
    report = embed(adata, model, progress=False)
    assert (report.cells, report.empty_cells, report.tokens) == (n_obs, n_obs, 0)
    assert adata.obsm["X_xtrimogene"].shape == (n_obs, DIM)
    assert np.isnan(adata.obsm["X_xtrimogene"]).all()
    adata.write_h5ad(tmp_path / "few.h5ad")
    report = embed(tmp_path / "few.h5ad", model, output=tmp_path / "out.h5ad", progress=False)
    assert report.empty_cells == n_obs


def test_memory_does_not_grow_with_the_cells(checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # Not ru_maxrss, which a process inherits from the one that started it.
    script = """
        import re, sys, xtrimogene
        xtrimogene.embed(sys.argv[1], sys.argv[2], output=sys.argv[3], progress=False)
        print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
    """
    peaks = []
    for n_obs in (4400, 22000):
        # 14 and 70 MB of rows; dense they would take 176 and 880
        matrix = sp.csr_matrix(
            (np.ones(n_obs * 400, np.float32), rng.integers(0, 10000, n_obs * 400), np.arange(n_obs + 1) * 400),
            shape=(n_obs, 10000),
        )
        names = [*GENES, *(f"other{i}" for i in range(10000 - N_VARS))]
        AnnData(matrix, var=pd.DataFrame(index=names)).write_h5ad(tmp_path / f"{n_obs}.h5ad")
        files = [str(tmp_path / f"{n_obs}.h5ad"), str(checkpoint), str(tmp_path / f"{n_obs}.out.h5ad")]
        command = [*warm.python(cells=True), "-c", textwrap.dedent(script), *files]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout) // 1024)
    assert peaks[1] < peaks[0] + 20, f"peak memory in MB: {peaks}"


def test_real_counts(shared_data: Path, tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_tsv(shared_data / "gene_vocabulary_19264.tsv")
    model = XTrimoGene.from_preset("3m", vocabulary, num_layers=1, dim=32)
    adata = anndata.read_h5ad(shared_data / "pbmc3k_counts_labelled.h5ad")[::20].copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    report = embed(tmp_path / "cells.h5ad", model, output=tmp_path / "out.h5ad", progress=False)
    assert (report.cells, report.empty_cells, report.genes_found) == (132, 0, 11213)
    found = adata.var_names.isin(vocabulary.genes)
    assert report.tokens == adata[:, found].X.nnz
    embed(adata, model, max_tokens=5000, progress=False)
    np.testing.assert_allclose(
        anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_xtrimogene"], adata.obsm["X_xtrimogene"], rtol=1e-3, atol=1e-5
    )


def test_the_manifest_says_what_the_shards_are(interrupted: Path) -> None:
    manifest = json.loads((interrupted / "manifest.json").read_text())
    assert manifest["cells"] == 50
    assert manifest["pooling"] == "mean"
    assert xtrimogene.embed is embed


def loom(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["matrix"] = counts().toarray().T
        file["row_attrs/Gene"] = np.array(GENES, "S")
        file["col_attrs/CellID"] = np.array([f"cell{i}" for i in range(N_OBS)], "S")
        file["col_attrs/batch"] = np.arange(N_OBS) % 3
    return path


def test_other_formats_give_a_file_of_their_cells(
    model: XTrimoGene, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_windows: None
) -> None:
    """Also by a run that is killed again and again."""
    path, output = loom(tmp_path / "cells.loom"), tmp_path / "out.h5ad"
    with pytest.raises(ValueError, match=r"expected a name that ends in \.h5ad, for an input that is no AnnData file"):
        embed(path, model, output=tmp_path / "out.loom", progress=False)
    for step in (9, 12, 8):
        with killed_at_step(step, monkeypatch), pytest.raises(Killed):
            embed(path, model, output=output, resume=True, progress=False)
    assert embed(path, model, output=output, resume=True, progress=False).resumed_cells > 0
    written = anndata.read_h5ad(output)
    assert_close(written.obsm["X_xtrimogene"], expected)
    assert written.shape == (N_OBS, 0)
    assert list(written.obs_names) == [f"cell{i}" for i in range(N_OBS)]
    assert written.obs["batch"].tolist() == [i % 3 for i in range(N_OBS)]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cells.loom", "out.h5ad"]


def test_a_modality_by_its_path_is_not_written_over(model: XTrimoGene, expected: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    cells().write_h5ad(tmp_path / "rna.h5ad")
    with h5py.File(tmp_path / "rna.h5ad") as file, h5py.File(path, "w") as target:
        file.copy("/", target.create_group("mod"), "rna")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="the input is never changed"):
        embed(path / "rna", model, output=path, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="the input is never changed"):
        xtrimogene.predict_expression(path / "rna", model, GENES[:2], output=path, overwrite=True, progress=False)
    assert path.read_bytes() == before
    embed(path / "rna", model, output=tmp_path / "out.h5ad", progress=False)
    assert_close(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_xtrimogene"], expected)


def test_what_the_copy_would_fail_for_is_told_first(
    model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(XTrimoGeneNetwork, "embed_batch", lambda *_: pytest.fail("work was begun"))
    path, output = tmp_path / "cells.zarr", tmp_path / "out.zarr"
    cells().write_zarr(path)
    access = os.access
    monkeypatch.setattr(os, "access", lambda each, mode: access(each, mode) and Path(each).parent.name != "uns")
    with pytest.raises(PermissionError, match=r"cells\.zarr/uns/\.z\w+: may not be read .*the result is a copy of it"):
        embed(path, model, output=output, progress=False)
    monkeypatch.setattr(os, "access", access)
    for file in path.glob("obsm/.z*"):
        file.write_text("{")
    (path / ".zmetadata").unlink()
    with pytest.raises(ValueError, match=r"cells\.zarr: obsm, where the embedding goes, cannot be read"):
        embed(path, model, output=output, progress=False)
    shutil.rmtree(path / "obs")
    with pytest.raises(
        ValueError, match=r"cells\.zarr: expected an AnnData file, got one without obs; the store holds"
    ):
        embed(path, model, output=output, progress=False)
    assert list(tmp_path.iterdir()) == [path]


def test_columns_of_obs_that_cannot_be_read_are_left_out(path: Path, model: XTrimoGene, tmp_path: Path) -> None:
    with h5py.File(path, "r+") as file:
        odd = file["obs"].create_group("odd")
        odd.attrs.update({"encoding-type": "future-array", "encoding-version": "9.9"})
        write_elem(file["obs"], "good", np.arange(N_OBS))
        file["obs"].attrs["column-order"] = np.array(["good", "odd"], dtype=h5py.string_dtype())
    with pytest.warns(UserWarning, match=r"obs: column 'odd' cannot be read and is left out: .*future-array"):
        xtrimogene.predict_expression(path, model, GENES[:2], output=tmp_path / "out.h5ad", progress=False)
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obs["good"].tolist() == list(range(N_OBS))


def test_obs_of_another_format_is_read_before_the_work(
    model: XTrimoGene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(XTrimoGeneNetwork, "embed_batch", lambda *_: pytest.fail("work was begun"))
    path = loom(tmp_path / "cells.loom")
    monkeypatch.setattr(formats_loom, "_table", _broken_beside)
    with pytest.raises(ValueError, match=r"cells\.loom: cannot read obs: broken"):
        embed(path, model, output=tmp_path / "out.h5ad", progress=False)
    assert list(tmp_path.iterdir()) == [path]


def _broken_beside(attributes: h5py.Group, names: str | None, length: int) -> pd.DataFrame:
    """The table of genes; that of cells cannot be read."""
    if length == N_OBS:
        raise OSError("broken")
    return pd.DataFrame({"Gene": GENES}, index=GENES)
