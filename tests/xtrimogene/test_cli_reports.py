"""What every command says: help without torch, the version, the report as JSON, and silence when it is asked for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

from tests.test_rooms import HIDE, SINGLE_CELL
from xtrimogene import XTrimoGene, __version__, embed
from xtrimogene.cli import _parser, main
from xtrimogene.cli.messages import tell
from xtrimogene.network.vocabulary import Vocabulary

GENES = [f"G{i}" for i in range(30)]
COMMANDS = ("embed", "genes", "impute", "inspect", "convert", "pretrain", "evaluate", "init", "bench")
# Commands of several parts.
PARTS = dict.fromkeys(("annotate", "perturb", "synergy"), ("fit", "predict", "evaluate"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty cells, their genes and a tiny model."""
    counts = sp.random(20, 30, density=0.4, format="csr", random_state=np.random.default_rng(0), dtype=np.float32)
    counts.data = np.ceil(counts.data * 9)
    adata = AnnData(counts)
    adata.var_names = GENES
    adata.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "genes.txt").write_text("\n".join(GENES))
    XTrimoGene.from_preset("tiny", Vocabulary(GENES), seed=0).save_pretrained(tmp_path / "checkpoint")
    return tmp_path


def arguments(command: str, folder: Path) -> list[str]:
    """A small job for a command, by what it is given in README.md."""
    cells = ["--checkpoint", f"{folder}/checkpoint", "--input", f"{folder}/cells.h5ad"]
    return [
        command,
        *{
            "embed": [*cells, "--output", f"{folder}/out.h5ad"],
            "genes": [*cells, "--output", f"{folder}/out.h5ad", "--genes", "G3", "G4"],
            "impute": [*cells, "--output", f"{folder}/out.h5ad"],
            "evaluate": [
                "--checkpoint", f"{folder}/checkpoint", "--data", f"{folder}/cells.h5ad", "--output", f"{folder}/out",
                "--min-genes", "3",
            ],
            "init": ["--preset", "tiny", "--vocabulary", f"{folder}/genes.txt", "--output", f"{folder}/out"],
            "pretrain": [
                "--data", f"{folder}/cells.h5ad", "--output", f"{folder}/out", "model.preset=tiny", "min_genes=0",
                "max_steps=1", "batch_cells=4",
            ],
        }[command],
    ]  # fmt: skip


def test_commands_are_those_of_the_parser() -> None:
    parser = _parser()
    (choices,) = [action.choices for action in parser._actions if action.dest == "command"]
    assert set(choices) == {*COMMANDS, *PARTS}
    commands = [choices[name] for name in COMMANDS]
    for name, parts in PARTS.items():
        (inner,) = [action.choices for action in choices[name]._actions if action.dest == "part"]
        assert set(inner) == set(parts)
        commands += inner.values()
    for command in commands:
        assert {"--quiet", "--json"} <= set(command._option_string_actions)


def test_help_version_and_wrong_arguments_import_neither_torch_nor_a_single_cell_package() -> None:
    asked = [["--help"], ["--version"], [], ["none"], ["--none"]]
    commands = [[name] for name in (*COMMANDS, *PARTS)] + [[name, part] for name in PARTS for part in PARTS[name]]
    asked += [[*command, *more] for command in commands for more in (["--help"], [], ["--none"])]
    script = HIDE.format(hidden={*SINGLE_CELL, "torch", "numpy", "safetensors"}) + (
        "import contextlib, io\n"
        "from xtrimogene.cli import main\n"
        f"for words in {asked!r}:\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        try:\n"
        "            main(words)\n"
        "        except SystemExit as end:\n"
        "            status = end.code\n"
        "    wrong = not {'--help', '--version'} & {*words}\n"
        "    assert status == (2 if wrong else 0), (words, status, err.getvalue())\n"
        "    assert 'error: ' in err.getvalue() if wrong else 'xtrimogene ' in out.getvalue(), words\n"
        "    print(*words)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(asked)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"xtrimogene {__version__}\n"


@pytest.mark.parametrize("command", ["embed", "genes", "impute", "init", "pretrain", "evaluate"])
def test_quiet_commands_say_nothing_and_report_as_json(
    command: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = folder / "report.json"
    capfd.readouterr()
    assert main([*arguments(command, folder), "--quiet", "--json", str(report)]) == 0
    assert capfd.readouterr() == ("", "")
    told = json.loads(report.read_text())
    assert told["xtrimogene"] == __version__
    assert told["command"] == command
    assert Path(told["output"]).exists()
    judged = {"judged": 4, "known": 16}
    want = {"pretrain": ("steps", 1), "init": ("genes", 30), "evaluate": ("cells", judged)}
    name, value = want.get(command, ("cells", 20))
    assert told[name] == value
    assert sorted(path.name for path in folder.iterdir() if "report" in path.name) == ["report.json"]


def test_the_json_of_embed_holds_the_fields_of_its_report(folder: Path) -> None:
    report = folder / "report.json"
    assert main([*arguments("embed", folder), "--no-progress", "--dtype", "float32", "--json", str(report)]) == 0
    told = json.loads(report.read_text())
    want = embed(anndata.read_h5ad(folder / "cells.h5ad"), folder / "checkpoint", dtype="float32", progress=False)
    for name in ("cells", "empty_cells", "tokens", "genes_found", "vocabulary_size", "dtype", "device", "backend"):
        assert told[name] == getattr(want, name)
    assert told["seconds"] > 0
    assert "embedding" not in told


def test_a_quiet_command_still_warns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = anndata.read_h5ad(folder / "cells.h5ad")
    adata.X.data[adata.X.indptr[3] : adata.X.indptr[4]] = 0
    adata.write_h5ad(folder / "cells.h5ad")
    capsys.readouterr()
    assert main([*arguments("embed", folder), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("xtrimogene: warning: ")


def test_a_report_replaces_a_report_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, message in (
        ("cells.h5ad", "exists and is no report"),
        ("checkpoint/config.json", "exists and is no report"),
        ("checkpoint", "exists and is no report"),
        ("none/report.json", "expected an existing folder"),
        ("genes.txt/report.json", "expected an existing folder"),
    ):
        capsys.readouterr()
        assert main([*arguments("embed", folder), "--json", f"{folder}/{name}"]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    report = folder / "report.json"
    for name in ("a", "b"):
        job = [*arguments("init", folder)[:-1], f"{folder}/{name}"]
        assert main([*job, "--json", str(report), "--quiet"]) == 0
        assert json.loads(report.read_text())["output"] == f"{folder}/{name}"


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    given = _parser().parse_args(["init", "--preset", "3m", "--vocabulary", "v", "--output", "o"])
    given.json = str(tmp_path / "report.json")
    tell(
        given, "", {"loss": float("nan"), "model": None, "path": Path("a/b"), "rows": [{"x": np.float32(0.5)}], 1: (2,)}
    )
    told = json.loads((tmp_path / "report.json").read_text())
    del told["xtrimogene"]
    want = {"command": "init", "loss": None, "model": None, "path": "a/b", "rows": [{"x": 0.5}], "1": [2]}
    assert told == want


VERSION = "import sys; sys.path.insert(0, {tree!r}); import xtrimogene; print(xtrimogene.__version__, end='')"


def test_the_version_knows_the_commit_of_a_checkout(tmp_path: Path) -> None:
    """Of its own checkout, not of another project's that it was put into; and it says when files are changed."""
    import xtrimogene

    def version() -> str:
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        command = [sys.executable, "-c", VERSION.format(tree=str(tmp_path))]
        return subprocess.run(command, cwd="/", env=environment, check=True, capture_output=True, text=True).stdout

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@localhost", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "xtrimogene"
    package.mkdir()
    for name in ("__init__.py", "_moved.py", "version.py"):
        shutil.copy(Path(xtrimogene.__file__).with_name(name), package)
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    assert "+" not in version()
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "3.4.5"\n')
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    commit = git("rev-parse", "--short", "HEAD")
    assert version() == f"3.4.5+g{commit}"
    with (package / "_moved.py").open("a") as file:
        file.write("# changed\n")
    assert version() == f"3.4.5+g{commit}.dirty"
    shutil.rmtree(tmp_path / ".git")
    assert "+" not in version()
    (package / "commit.txt").write_text(f"g{commit}\n")
    assert version().endswith(f"+g{commit}")
    assert re.fullmatch(r"[0-9.]+\+g[0-9a-f]+", version())
