"""What rows say of the code: the commit of a checkout, else the version, and that an installed package is complete."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

import xtg_kernels
from xtrimogene.bench import report, rows, sizes

ROOT = Path(__file__).parents[3]


def test_outside_a_checkout_rows_and_report_name_the_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "xtrimogene" / "bench" / "rows.py"))
    here = rows.machine()
    assert here["commit"] == f"version {xtg_kernels.__version__}"
    assert not here["dirty"]
    made = report.Report([], {}, here | {"gpus": ""}, "", 1, sizes.QUICK, True)
    assert f" at version {xtg_kernels.__version__}: " in report._where(made)
    made.where["commit"] = "0123456789ab"
    assert " at commit 0123456789ab: " in report._where(made)


def test_the_packages_that_are_installed_have_all_that_they_import() -> None:
    """And the lengths of cells, which `xtrimogene bench` reads; of the repository's own folders they import none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert project["packages"]["find"]["include"] == ["xtg_kernels*", "xtrimogene*"]
    assert "bench/cell_lengths.json" in project["package-data"]["xtrimogene"]
    for package in ("xtg_kernels", "xtrimogene"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found += [name.name for name in node.names] if isinstance(node, ast.Import) else []
                assert not {name.split(".")[0] for name in found} & {"benchmarks", "tests"}, path
