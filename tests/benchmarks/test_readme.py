"""The tables of README.md are made from the files of results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import readme
from xtrimogene.bench.rows import write_csv


def test_readme_tables_are_made_from_the_files_alone(tmp_path: Path) -> None:
    text = f"before\n{readme.OPENING}\nold\n{readme.CLOSING}\nafter\n"
    assert readme.with_tables(text, tmp_path) == f"before\n{readme.OPENING}\n{readme.CLOSING}\nafter\n"
    where = {"machine": "M", "isa": "avx2", "threads": 2, "torch": "2", "commit": "abc", "dirty": False, "date": "D"}
    row = {"case": "cells, 3m", "cells": 2000, "peak_mib": 123.4, "quick": False, **where}
    write_csv(tmp_path / "memory.csv", [row])
    made = readme.with_tables(text, tmp_path)
    assert "| 2,000 | 123 MiB |" in made
    assert "old" not in made
    assert readme.with_tables(made, tmp_path) == made
    with pytest.raises(ValueError, match="markers"):
        readme.with_tables("no markers", tmp_path)
