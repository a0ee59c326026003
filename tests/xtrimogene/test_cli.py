"""Tests of the command line: a checkpoint made, cells embedded, and one clear line for every error."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
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
from xtrimogene import XTrimoGene, embed, predict_expression
from xtrimogene.cli import main
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.network.vocabulary import Vocabulary

GENES = [f"G{i}" for i in range(30)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "genes.txt").write_text("\n".join(GENES))
    folder = tmp_path / "checkpoint"
    assert main(["init", "--preset", "3m", "--vocabulary", str(tmp_path / "genes.txt"), "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    counts = sp.random(20, 30, density=0.4, format="csr", random_state=np.random.default_rng(0))
    counts.data = np.ceil(counts.data * 9).astype(np.float32)
    adata = AnnData(counts.astype(np.float32), var=pd.DataFrame({"id": [f"E{i}" for i in range(30)]}, index=GENES))
    adata.layers["half"] = adata.X * 0.5
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def arguments(checkpoint: Path, path: Path, *more: str) -> list[str]:
    output = str(path.with_name("out.h5ad"))
    return ["embed", "--checkpoint", str(checkpoint), "--input", str(path), "--output", output, "--no-progress", *more]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a user sees: nothing on stdout, one line on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("xtrimogene: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_init(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = XTrimoGene.from_pretrained(checkpoint)
    assert model.vocabulary.genes == tuple(GENES)
    assert model.config.num_layers == 4
    genes = str(tmp_path / "genes.txt")
    assert main(["init", "--preset", "3m", "--vocabulary", genes, "--output", str(tmp_path / "b"), "--seed", "1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'b'}: untrained 3m model, 1,234,237 parameters, 30 genes\n"
    other = XTrimoGene.from_pretrained(tmp_path / "b")
    assert not torch.equal(model.embedding.gene_table, other.embedding.gene_table)
    capsys.readouterr()
    assert main(["init", "--preset", "3m", "--vocabulary", genes, "--output", str(checkpoint)]) == 2
    assert "not empty" in error_line(capsys)
    assert main(["init", "--preset", "3m", "--vocabulary", "none.tsv", "--output", str(tmp_path / "c")]) == 2
    assert "none.tsv: no such file" in error_line(capsys)
    assert not (tmp_path / "c").exists()


def test_init_replaces_a_checkpoint_and_nothing_else(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["init", "--preset", "tiny", "--vocabulary", str(tmp_path / "genes.txt"), "--output", str(checkpoint)]
    capsys.readouterr()
    assert main(command) == 2
    assert "--overwrite" in error_line(capsys)
    assert XTrimoGene.from_pretrained(checkpoint).config.num_layers == 4
    assert main([*command, "--overwrite"]) == 0
    assert XTrimoGene.from_pretrained(checkpoint).config.num_layers == 2
    (checkpoint / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main([*command, "--overwrite"]) == 2
    assert "notes.txt in it belongs to no checkpoint" in error_line(capsys)
    # Said before work starts: the file that is not there was not looked for.
    convert = ["convert", "--from-scfoundation", "none.ckpt", "--part", "cell", "--vocabulary", "none.tsv"]
    for more in ([], ["--overwrite"]):
        assert main([*convert, "--output", str(checkpoint), *more]) == 2
        assert str(checkpoint) in error_line(capsys)


def test_embed(checkpoint: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(arguments(checkpoint, path)) == 0
    out = capsys.readouterr().out
    assert "20 cells, 0 of them empty" in out
    assert "30 of 30 vocabulary genes found" in out
    assert "obsm['X_xtrimogene']" in out
    adata = anndata.read_h5ad(path)
    embed(adata, checkpoint, progress=False)
    written = anndata.read_h5ad(path.with_name("out.h5ad")).obsm["X_xtrimogene"]
    np.testing.assert_array_equal(written, adata.obsm["X_xtrimogene"])


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ("--values tpm", {"values": "tpm"}),
        ("--values log1p", {"values": "log1p"}),
        ("--layer half --fractional-counts", {"layer": "half", "fractional_counts": True}),
        ("--total-counts n", {"total_counts": "n"}),
        ("--aliases {folder}/aliases.tsv", {"aliases": "{folder}/aliases.tsv"}),
    ],
)
@pytest.mark.parametrize("command", ["embed", "impute"])
@pytest.mark.filterwarnings("ignore:.*whole numbers only:UserWarning")
def test_what_the_numbers_and_names_are(
    checkpoint: Path, path: Path, command: str, options: str, keywords: dict[str, Any]
) -> None:
    adata = anndata.read_h5ad(path)
    adata.obs["n"] = np.asarray(adata.X.sum(axis=1)).ravel() * 2
    adata.var_names = [*GENES[:-1], "old"]
    adata.write_h5ad(path)
    (path.parent / "aliases.tsv").write_text(f"old\t{GENES[-1]}\n")
    keywords = {
        name: value.format(folder=path.parent) if isinstance(value, str) else value for name, value in keywords.items()
    }
    more = options.format(folder=path.parent).split()
    written = path.with_name("out.h5ad")
    assert (
        main([command, *arguments(checkpoint, path, *more)[1:], *(["--genes", "G3"] if command == "impute" else [])])
        == 0
    )
    if command == "embed":
        want = embed(adata, checkpoint, progress=False, **keywords).embedding
        np.testing.assert_array_equal(anndata.read_h5ad(written).obsm["X_xtrimogene"], want)
    else:
        _, want = predict_expression(adata, checkpoint, ["G3"], progress=False, **keywords)
        np.testing.assert_array_equal(anndata.read_h5ad(written).layers["imputed"], want)


def test_all_options(checkpoint: Path, path: Path) -> None:
    threads = torch.get_num_threads()
    options = (
        "--embed-key X_max --pooling max --max-tokens 40 --dtype bfloat16 --threads 1 --layer half --normalized "
        "--resume --overwrite --device cpu"
    )
    try:
        assert main(arguments(checkpoint, path, *options.split())) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    written = anndata.read_h5ad(path.with_name("out.h5ad"))
    adata = anndata.read_h5ad(path)
    embed(
        adata,
        checkpoint,
        layer="half",
        normalized=True,
        pooling="max",
        dtype="bfloat16",
        key_added="X_max",
        progress=False,
    )
    assert list(written.obsm) == ["X_max"]
    np.testing.assert_allclose(written.obsm["X_max"], adata.obsm["X_max"], rtol=0.1, atol=0.1)


def test_warnings_are_one_line(checkpoint: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = anndata.read_h5ad(path)
    adata.X.data[adata.X.indptr[3] : adata.X.indptr[4]] = 0
    adata.write_h5ad(path)
    capsys.readouterr()
    assert main(arguments(checkpoint, path)) == 0
    captured = capsys.readouterr()
    assert "20 cells, 1 of them empty" in captured.out
    assert (
        captured.err
        == f"xtrimogene: warning: {path}: 1 of 20 cells have no gene of the vocabulary; their embedding is NaN\n"
    )


def test_gene_symbols(checkpoint: Path, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = anndata.read_h5ad(path)
    adata.var["symbol"], adata.var_names = GENES, adata.var["id"]
    adata.write_h5ad(path)
    capsys.readouterr()
    assert main(arguments(checkpoint, path)) == 2
    assert "--gene-symbols symbol" in error_line(capsys)
    assert main(arguments(checkpoint, path, "--gene-symbols", "symbol")) == 0


def test_the_default_arguments_are_those_of_the_function() -> None:
    import inspect

    from xtrimogene.cli import _parser

    given = vars(_parser().parse_args(["embed", "--checkpoint", "c", "--input", "i", "--output", "o"]))
    names = {"embed_key": "key_added", "threads": "num_threads"}
    own = ("command", "run", "kept", "smaller", "checkpoint", "input", "output", "no_progress", "quiet", "json")
    defaults = {name: parameter.default for name, parameter in inspect.signature(embed).parameters.items()}
    for name, value in given.items():
        if name not in own:
            assert defaults[names.get(name, name)] == value, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--input", "none.h5ad"], "none.h5ad: no such file"),
        (["--input", "{folder}/text.h5ad"], "text.h5ad: expected an h5ad file"),
        (["--input", "{folder}/cut.h5ad"], "the file is damaged or truncated"),
        (["--checkpoint", "none"], "none: no such checkpoint folder"),
        (["--checkpoint", "{folder}/pickle"], "a pickle can run code"),
        (["--output", "{folder}/text.h5ad"], "exists; name another file, or pass overwrite=True (--overwrite)"),
        (["--output", "{folder}/none/out.h5ad"], "expected an existing folder"),
        (["--output", "/proc/out.h5ad"], "the folder /proc cannot be written to"),
        (["--output", "{folder}/cells.h5ad", "--overwrite"], "the input is never changed"),
        (["--max-tokens", "3"], "raise max_tokens to"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--threads", "100000"], "--threads: expected at most 1,024, got 100000"),
        (["--max-tokens", "9" * 30], "max_tokens: expected less than 2^31, got 999"),
        (["--layer", "half"], "pass normalized=True (--normalized; of pretrain, normalized=true)"),
        (["--layer", "none"], "expected layer 'none'"),
        (["--gene-symbols", "none"], "expected a column of var, got 'none'"),
        (["--device", "abacus"], "device: expected 'auto'"),
    ],
)
def test_errors_are_one_line_and_change_nothing(
    change: list[str], message: str, checkpoint: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = path.parent
    (folder / "text.h5ad").write_text("precious")
    (folder / "cut.h5ad").write_bytes(path.read_bytes()[:-3000])
    (folder / "pickle").mkdir()
    (folder / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert main(arguments(checkpoint, path, *(word.format(folder=folder) for word in change))) == 2
    assert message in error_line(capsys)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("kept", [False, True])
def test_interruption_promises_what_is_there(
    kept: bool, checkpoint: Path, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    original, calls = XTrimoGeneNetwork.embed_batch, []

    def interrupt(*given: object) -> torch.Tensor:
        calls.append(given)
        if len(calls) > kept:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(importlib.import_module("xtrimogene.inference.embed"), "_WINDOW", 8)
    monkeypatch.setattr(XTrimoGeneNetwork, "embed_batch", interrupt)
    capsys.readouterr()
    assert main(arguments(checkpoint, path, "--dtype", "float32")) == 130
    promise = "; what is finished is kept, --resume goes on with it" if kept else ""
    assert capsys.readouterr().err == f"xtrimogene: interrupted{promise}\n"
    assert path.with_name("out.h5ad.partial").exists() == kept
    command = ["impute", *arguments(checkpoint, path)[1:]]
    monkeypatch.setattr(XTrimoGeneNetwork, "predict", interrupt)
    assert main(command) == 130
    assert capsys.readouterr().err == "xtrimogene: interrupted\n"


class Unheard(BaseException):
    """As some libraries raise: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError("odd\nlines"), TypeError(), Unheard("odd"), RecursionError("deep")])
def test_an_unexpected_error_is_one_line_and_a_file(
    error: BaseException,
    checkpoint: Path,
    path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(XTrimoGeneNetwork, "embed_batch", fail)
    monkeypatch.setattr("tempfile.tempdir", str(path.parent))
    capsys.readouterr()
    assert main(arguments(checkpoint, path)) == 1
    line = error_line(capsys)
    assert f"unexpected {type(error).__name__}: " in line
    (written,) = path.parent.glob("xtrimogene-error-*.txt")
    assert f"please report it with the traceback in {written}" in line
    assert "Traceback (most recent call last)" in written.read_text()
    assert "embed_batch" in written.read_text()


def test_a_traceback_without_a_temporary_folder_goes_to_the_current_one(
    checkpoint: Path, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise TypeError("odd")

    monkeypatch.setattr(XTrimoGeneNetwork, "embed_batch", fail)
    monkeypatch.setattr("tempfile.tempdir", str(path.parent / "gone"))
    monkeypatch.chdir(path.parent)
    capsys.readouterr()
    assert main(arguments(checkpoint, path)) == 1
    (written,) = path.parent.glob("xtrimogene-error-*.txt")
    assert f"please report it with the traceback in {written}" in error_line(capsys)

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkstemp", full)
    assert main(arguments(checkpoint, path)) == 1
    assert f"please report it with its place, {__file__}" in error_line(capsys)


def test_warnings_of_libraries_are_off(
    checkpoint: Path, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    library: dict[str, object] = {"__name__": "library", "warnings": warnings}
    exec("def warn():\n    warnings.warn('nothing a user can do about', FutureWarning, stacklevel=2)", library)
    inner = XTrimoGeneNetwork.embed_batch

    def embed_batch(*given: object) -> torch.Tensor:
        library["warn"]()  # type: ignore[operator]
        return inner(*given)

    monkeypatch.setattr(XTrimoGeneNetwork, "embed_batch", embed_batch)
    capsys.readouterr()
    assert main(arguments(checkpoint, path)) == 0
    assert capsys.readouterr().err == ""


def test_what_fails_in_threads_and_destructors_prints_nothing(
    checkpoint: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("in a destructor")

    def fail() -> None:
        raise ValueError("in a thread")

    def embed_batch(*given: object) -> torch.Tensor:
        Broken()
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        return inner(*given)

    told: list[object] = []
    inner = XTrimoGeneNetwork.embed_batch
    monkeypatch.setattr(XTrimoGeneNetwork, "embed_batch", embed_batch)
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(threading, "excepthook", told.append)
    assert main(arguments(checkpoint, path)) == 0
    assert told == []
    assert (sys.unraisablehook, threading.excepthook) == (told.append, told.append)  # as they were


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[enforce fail at file.cpp:1] mmap: Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        OSError("Can't synchronously read data (memory allocation failed for raw data chunk)"),
        RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"),
    ],
)
def test_running_out_of_memory_says_what_helps(
    error: BaseException,
    checkpoint: Path,
    path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhaust(*_: object) -> torch.Tensor:
        raise error

    capsys.readouterr()
    monkeypatch.setattr(XTrimoGeneNetwork, "embed_batch", exhaust)
    assert main(arguments(checkpoint, path)) == 2
    assert "smaller --max-tokens" in error_line(capsys)


def test_what_fails_at_exit_for_want_of_memory_prints_no_traceback(checkpoint: Path, path: Path) -> None:
    script = """
        import atexit, sys
        from xtrimogene.cli import main
        from xtrimogene.network.model import XTrimoGeneNetwork

        def exhaust(*_):
            raise MemoryError

        atexit.register(exhaust)
        XTrimoGeneNetwork.embed_batch = exhaust
        sys.exit(main(sys.argv[1:]))
    """
    command = [*warm.python(cells=True), "-c", textwrap.dedent(script), *arguments(checkpoint, path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "out of memory" in done.stderr


def test_memory_that_is_exhausted_in_training_has_the_status_of_a_failed_training(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: object, **__: object) -> torch.Tensor:
        raise MemoryError

    command = ["pretrain", "--data", str(path), "--no-progress", "min_genes=0", "model.preset=tiny", "tensorboard=no"]
    with monkeypatch.context() as patch:
        patch.setattr(XTrimoGeneNetwork, "loss", exhaust)
        capsys.readouterr()
        assert main([*command, "--output", str(tmp_path / "run")]) == 1
    assert "try a smaller batch_cells" in error_line(capsys)
    monkeypatch.setattr(XTrimoGeneNetwork, "__init__", exhaust)
    assert main([*command, "--output", str(tmp_path / "other")]) == 2
    assert "try a smaller batch_cells" in error_line(capsys)


def test_as_a_module(path: Path, tmp_path: Path) -> None:
    command = [*warm.python(cells=True), "-m", "xtrimogene"]
    shown = subprocess.run([*command, "embed", "--help"], check=True, capture_output=True, text=True).stdout
    for option in ("checkpoint", "input", "output", "embed-key", "pooling", "max-tokens", "dtype", "threads", "resume"):
        assert f"--{option}" in shown
    done = subprocess.run([*command, *arguments(tmp_path / "none", path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("xtrimogene: error: ")
    assert "Traceback" not in done.stderr


def test_genes_and_impute(checkpoint: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adata = XTrimoGene.from_pretrained(checkpoint), anndata.read_h5ad(path)
    output, asked = path.with_name("genes.h5ad"), path.with_name("asked.txt")
    common = ["--checkpoint", str(checkpoint), "--input", str(path), "--output", str(output), "--no-progress"]
    capsys.readouterr()
    assert main(["genes", *common, "--genes", "G3", "G29", "--batch-size", "7"]) == 0
    out = capsys.readouterr().out
    assert "20 cells, 0 of them empty, 2 genes asked for" in out
    assert f"{output}: obsm['gene_embeddings']" in out
    written = anndata.read_h5ad(output)
    want = model.gene_embeddings(adata, ["G3", "G29"], progress=False)
    np.testing.assert_allclose(written.obsm["gene_embeddings"], want, rtol=1e-4, atol=1e-5)
    asked.write_text("G29\nG3\n")
    assert main(["impute", *common, "--genes-file", str(asked), "--layer", "half", "--normalized", "--overwrite"]) == 0
    assert f"{output}: layers['imputed']" in capsys.readouterr().out
    written = anndata.read_h5ad(output)
    assert list(written.var_names) == ["G29", "G3"]
    want = model.predict_expression(adata, ["G29", "G3"], layer="half", normalized=True, progress=False)
    np.testing.assert_allclose(written.layers["imputed"], want, rtol=1e-4, atol=1e-5)
    assert main(["impute", *common, "--overwrite", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert anndata.read_h5ad(output).layers["imputed"].shape == (20, 30)
    capsys.readouterr()
    assert main(["impute", *common, "--genes", "g3", "--overwrite"]) == 2
    assert "got 'g3' (near: G3" in error_line(capsys)
    asked.write_text("G3\nG3\n")
    assert main(["impute", *common, "--genes-file", str(asked), "--overwrite"]) == 2
    assert "--genes-file: " in error_line(capsys)


def test_target_depth_of_models_with_depth_tokens(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = path.with_name("deep")
    XTrimoGene.from_preset("tiny", Vocabulary(GENES), depth_tokens=True).save_pretrained(folder)
    adata = anndata.read_h5ad(path)
    embed(adata, folder, pooling="all", target_depth="fold:2", dtype="float32", progress=False)
    options = ["--pooling", "all", "--dtype", "float32", "--target-depth"]
    assert main(arguments(folder, path, *options, "fold:2")) == 0
    written = anndata.read_h5ad(path.with_name("out.h5ad")).obsm["X_xtrimogene"]
    assert written.shape == (20, 256)
    np.testing.assert_allclose(written, adata.obsm["X_xtrimogene"], rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert main(arguments(folder, path, *options, "deep", "--overwrite")) == 2
    assert "target_depth: expected the log10 total to aim at" in error_line(capsys)
    assert main(arguments(folder, path, "--normalized", "--layer", "half", "--overwrite")) == 2
    assert "expected raw counts, got normalized=True" in error_line(capsys)


def test_all_pooling_needs_depth_tokens(checkpoint: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(arguments(checkpoint, path, "--pooling", "all")) == 2
    assert "pooling: expected mean or max for a model without depth tokens, got 'all'" in error_line(capsys)


REFUSED = {
    "cells.csv": "is a table of text; make it sparse once, in Python: adata = anndata.io.read_csv",
    "cells.rds": "is an object of R; write it from there: anndataR::write_h5ad",
    "folder": "is a folder of data sets (a.h5ad, b.h5ad); give one of them (pretrain takes a folder)",
    "scaled.h5ad": "not negative, NaN or infinite ones; layer='raw' looks log-normalised: layer='raw', normalized=True "
    "(--layer raw --normalized)",
    "counted.h5ad": "ones; layer='counts' holds counts: --layer counts",
    "foreign.h5ad": "got none of the 30 vocabulary genes",
    "cut.h5ad": "the file is damaged or truncated",
    "a file.h5": "expected an h5ad, 10x, loom or h5mu file, got HDF5 that holds nothing",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", ["embed", "impute", "pretrain"])
def test_every_refusal_of_an_input_ends_with_how_to_look_into_it(
    command: str, name: str, checkpoint: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = path.parent / "given" / name
    given.parent.mkdir()
    if name == "folder":
        given.mkdir()
        for each in "ab":
            shutil.copy(path, given / f"{each}.h5ad")
    elif name in ("scaled.h5ad", "counted.h5ad", "foreign.h5ad"):
        adata = anndata.read_h5ad(path)
        if name == "foreign.h5ad":
            adata.var_names = [f"Mouse{i}" for i in range(30)]
        else:
            adata.raw, adata.layers = adata.copy(), {}
            if name == "counted.h5ad":
                adata.layers["counts"] = adata.X.copy()
            adata.raw.X.data[:] = np.log1p(adata.raw.X.data)
            adata.X = adata.X.toarray() - 1
        adata.write_h5ad(given)
    elif name == "cut.h5ad":
        given.write_bytes(path.read_bytes()[:-3000])
    elif name == "a file.h5":
        h5py.File(given, "w").close()
    else:
        given.write_text("gene,c1\n")
    capsys.readouterr()
    asked = arguments(checkpoint, given)
    asked[0] = command
    if command == "pretrain":
        if name == "folder":
            given = given / "b.h5ad"
            given.write_bytes(path.read_bytes()[:-3000])
        asked = ["pretrain", "--data", str(path.parent / "given" / name), "--output", str(path.parent / "run")]
        asked += [f"checkpoint={checkpoint}", "min_genes=0", "max_steps=1"]
    assert main(asked) == 2
    told = error_line(capsys)
    if (command, name) != ("pretrain", "folder"):
        assert REFUSED[name] in told
    assert told.endswith(f"; xtrimogene inspect {shlex.quote(str(given))} tells what it holds\n")


def test_inspect(checkpoint: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = path.parent / "report.json"
    capsys.readouterr()
    assert main(["inspect", str(path), "--checkpoint", str(checkpoint), "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: h5ad\n\nmatrices\n  X: 20 cells x 30 columns, 40.0% stored; raw counts\n")
    assert "genes found, of 30\n  var_names: 30 (such as G0, G1, G2)\n  var['id']: 0" in out
    told = json.loads(report.read_text())
    assert told["command"] == "inspect"
    assert (told["matrices"][0]["layer"], told["matrices"][0]["values"]) == (None, "counts")
    assert told["genes"][0] == {"column": None, "found": 30, "examples": ["G0", "G1", "G2"]}
    assert main(["inspect", str(path), "--vocabulary", str(path.parent / "genes.txt"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    for name, message in (("none.h5ad", "none.h5ad: no such file"), ("genes.txt", "is a table of text")):
        assert main(["inspect", str(path.parent / name)]) == 2
        told = error_line(capsys)
        assert message in told
        assert "xtrimogene inspect" not in told
