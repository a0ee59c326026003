"""README.md: its examples run as they stand, its make targets exist, its tables are those of the committed results."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from benchmarks import readme
from xtrimogene.network.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Installing is the business of the Makefile, which does the same; an indented block that is not listed here fails.
SET_UP = [
    "make demo",
    "make test",
    "pip install torch 'setuptools>=77' ninja 'pybind11>=2.13'",
    "pip install --no-build-isolation .",
    "xtrimogene convert --from-scfoundation models.ckpt --part cell --vocabulary genes.tsv --output checkpoint",
    "xtrimogene pretrain --data cells.h5ad --output tuned checkpoint=checkpoint max_steps=1000 learning_rate=1e-5",
    "xtrimogene bench --input cells.h5ad --output bench",
]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def _real_counts() -> anndata.AnnData:
    """Counts of scanpy's shipped PBMC: log1p(count / total * 1e4), where the smallest count of a cell is 1."""
    import scanpy

    cells = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    scaled = sp.csr_matrix(np.expm1(cells.X))
    ones = np.minimum.reduceat(scaled.data, scaled.indptr[:-1])
    scaled.data = np.rint(scaled.data / np.repeat(ones, np.diff(scaled.indptr))).astype(np.float32)
    return anndata.AnnData(scaled, obs=cells.obs[[]], var=cells.var[[]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples take for granted."""
    folder = tmp_path_factory.mktemp("readme")
    counts = _real_counts()
    counts.write_h5ad(folder / "cells.h5ad")
    Vocabulary.from_adata(counts).save(folder / "genes.tsv")
    return folder


def _run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)[:200]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_python_examples_run_one_after_the_other(folder: Path) -> None:
    blocks = _blocks("python")
    assert len(blocks) >= 5
    script = "\n".join([*blocks, "assert 0 < share < 1", "assert rows.shape == (1000, 128)"])
    assert "700 cells" in _run([sys.executable, "-c", script], folder)
    embedded = anndata.read_h5ad(folder / "embedded.h5ad")
    assert np.isfinite(embedded.obsm["X_xtrimogene"]).all()


def test_commands_run(folder: Path) -> None:
    lines = [line for block in _blocks("bash") for line in block.splitlines()]
    assert len(lines) >= 3
    for line in lines:
        _run(line.split(), folder)
    assert anndata.read_h5ad(folder / "out.h5ad").obsm["X_xtrimogene"].shape == (700, 128)


def test_the_top_names_the_two_commands_and_they_are_targets() -> None:
    outside = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    indented = [line.split("#")[0].strip() for line in outside.splitlines() if line.startswith("    ")]
    assert indented == SET_UP
    for target in re.findall(r"`make ([a-z0-9-]+)`", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target


def test_options_of_embed_are_those_of_the_command(folder: Path) -> None:
    told = set(re.findall(r"--[a-z-]+", _run(["xtrimogene", "embed", "--help"], folder)))
    table = README[README.index("| option of `embed`") : README.index("A run writes shard")]
    assert set(re.findall(r"--[a-z-]+", table.replace("|---", ""))) == told - {
        "--checkpoint", "--input", "--output", "--no-progress", "--help",
    }  # fmt: skip


def test_tables_are_those_of_the_committed_results() -> None:
    assert set(readme.PAGES) == {"README.md", "docs/benchmarks.md"}
    for name, names in readme.PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert readme.with_tables(text, names=names) == text


def test_pictures_are_those_of_the_committed_lengths() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["drawn"]()
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "pictures").iterdir()}
