"""README.md and docs/benchmarks.md show the committed results, and the pictures are those of the committed lengths."""

from __future__ import annotations

import runpy
from pathlib import Path

from benchmarks import readme

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_committed_results() -> None:
    assert set(readme.PAGES) == {"README.md", "docs/benchmarks.md", "docs/tutorials/ragged.md"}
    for name, made in readme.PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert readme.with_tables(text, made()) == text


def test_pictures_are_those_of_the_committed_lengths() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["drawn"]()
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "pictures").iterdir()}
