"""The source archive, the wheel built from it, and the package installed from that, used without the source tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
SDIST = "from setuptools import build_meta; build_meta.build_sdist({folder!r})"
WHEEL = "from setuptools import build_meta; build_meta.build_wheel({folder!r})"
EMBED = """
import anndata, numpy, sys, torch, xtrimogene
from xtg_kernels import dispatch
counts = numpy.random.default_rng(0).poisson(0.7, (40, 200)).astype(numpy.float32)
adata = anndata.AnnData(counts)
model = xtrimogene.XTrimoGene.from_preset("tiny", xtrimogene.Vocabulary(list(adata.var_names)), seed=0)
report = xtrimogene.embed(adata, model, dtype="float32", progress=False)
numpy.save("embedding.npy", adata.obsm["X_xtrimogene"])
adata.write_h5ad("cells.h5ad")
model.vocabulary.save("genes.tsv")
print(report.backend, dispatch.extension().__file__, xtrimogene.__file__, xtrimogene.__version__, sep="\\n")
"""


def _run(command: list[str], folder: Path, **variables: str) -> str:
    """Output of a command in a folder, with nothing from the source tree on Python's path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XTG_BUILD_CPP")}
    done = subprocess.run(command, cwd=folder, env={**environment, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)[:200]}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _pip(*words: str, python: str = sys.executable) -> list[str]:
    return [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *words, "--no-index"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks or would track, committed."""
    folder = tmp_path_factory.mktemp("packaging") / "repository"
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", *ignored))
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        _run(["git", "-c", "user.name=x", "-c", "user.email=x@localhost", *words], folder)
    return folder


@pytest.fixture(scope="module")
def tracked(repository: Path) -> set[str]:
    return set(_run(["git", "ls-files"], repository).splitlines())


@pytest.fixture(scope="module")
def commit(repository: Path) -> str:
    return "g" + _run(["git", "rev-parse", "--short", "HEAD"], repository).strip()


@pytest.fixture(scope="module")
def archive(repository: Path, tracked: set[str], commit: str) -> Path:
    """The source archive, and the repository gone: what is to be known of it, is asked before."""
    folder = repository.parent / "archive"
    _run([sys.executable, "-c", SDIST.format(folder=str(folder))], repository)
    shutil.rmtree(repository)
    return folder / f"xtrimogene-{VERSION}.tar.gz"


@pytest.fixture(scope="module")
def wheel(archive: Path) -> Path:
    """The wheel that pip builds from the archive. Unoptimised: the set-up has built the same files as users do."""
    folder = archive.with_name("wheel")
    words = ("--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", str(folder))
    _run(_pip("wheel", *words, str(archive)), archive.parent, CXXFLAGS="-O0")
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A clean environment with the wheel, and with the packages that it needs from the one that runs the tests."""
    folder = wheel.parents[1] / "environment"
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], wheel.parent)
    python = str(folder / "bin" / "python")
    _run(_pip("install", "--no-deps", "--quiet", str(wheel), python=python), wheel.parent)
    # A path file inside a folder that is added so is not read: an editable install there stays unseen.
    site = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_archive_holds_all_that_the_repository_has(archive: Path, tracked: set[str]) -> None:
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    assert tracked <= names
    more = names - tracked
    assert {name for name in more if not name.startswith("xtrimogene.egg-info/")} == {
        "PKG-INFO", "setup.cfg", "xtrimogene/commit.txt",
    }  # fmt: skip


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path, tracked: set[str]) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = f"xtrimogene-{VERSION}.dist-info"
        described = file.read(f"{metadata}/WHEEL").decode()
    assert {name.split("/")[0] for name in names} == {"xtg_kernels", "xtrimogene", metadata}
    ours = {name for name in tracked if name.split("/")[0] in ("xtg_kernels", "xtrimogene")}
    extension = f"xtg_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    expected = {*ours, extension, "xtrimogene/commit.txt"}
    assert {name for name in names if not name.startswith(metadata)} == expected
    # For this Python and this kind of machine: pybind11 needs the one, the kernels the other.
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert re.findall(r"^Tag: (.*)$", described, flags=re.MULTILINE) == [f"{python}-{python}-{platform}"]


def test_the_installed_package_works_without_the_source(installed: Path, commit: str, tmp_path: Path) -> None:
    assert not any((installed.parent / "repository").rglob("*.py"))
    python, command = str(installed / "bin" / "python"), str(installed / "bin" / "xtrimogene")
    backend, extension, package, version = _run([python, "-c", EMBED], tmp_path).splitlines()
    assert backend == "cpp"
    assert Path(extension).is_relative_to(installed)
    assert Path(package).is_relative_to(installed)
    assert version == f"{VERSION}+{commit}"
    (tmp_path / "here").mkdir()
    _run([sys.executable, "-c", EMBED], tmp_path / "here", PYTHONPATH=str(ROOT))
    here = np.load(tmp_path / "here" / "embedding.npy")
    np.testing.assert_allclose(np.load(tmp_path / "embedding.npy"), here, rtol=1e-4, atol=1e-5)

    assert _run([command, "--version"], tmp_path) == f"xtrimogene {VERSION}+{commit}\n"
    assert "--quick" in _run([command, "bench", "--help"], tmp_path)
    _run([command, "init", "--preset", "tiny", "--vocabulary", "genes.tsv", "--output", "fresh"], tmp_path)
    words = ["--checkpoint", "fresh", "--input", "cells.h5ad", "--output", "out.h5ad", "--dtype", "float32"]
    assert "40 cells" in _run([command, "embed", *words], tmp_path)
    told = _run([python, "-m", "xtg_kernels.info"], tmp_path)
    assert re.search(rf"^xtg_kernels +{re.escape(VERSION)}$", told, flags=re.MULTILINE)
    assert f"against torch {torch.__version__}" in told


def test_a_wheel_without_the_extension_is_for_all_and_free_of_earlier_builds(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    source = tmp_path / f"xtrimogene-{VERSION}"
    for left in ("benchmarks/__init__.py", "xtrimogene/gone.py", "xtg_kernels/_C.so"):
        path = source / "build" / "lib" / left
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    # One that was built in place is not taken along either.
    (source / "xtg_kernels" / "_C.so").write_text("")
    _run([sys.executable, "-c", WHEEL.format(folder=str(tmp_path))], source, XTG_BUILD_CPP="0")
    with zipfile.ZipFile(tmp_path / f"xtrimogene-{VERSION}-py3-none-any.whl") as file:
        names = file.namelist()
    assert {name.split("/")[0] for name in names} == {"xtg_kernels", "xtrimogene", f"xtrimogene-{VERSION}.dist-info"}
    assert not {"xtrimogene/gone.py", "xtg_kernels/_C.so"} & set(names)
