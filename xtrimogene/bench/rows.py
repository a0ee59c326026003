"""The rows that benchmarks yield: what each says of the machine and the code, and their CSV files."""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtg_kernels.info import info

Row = dict[str, Any]
Rows = list[dict[str, str]]  # as they come from a file


def machine() -> Row:
    """What every row says of where and when it was measured, and of which code: outside a checkout, its version."""
    found = info()
    return {
        "machine": found["cpu"],
        "isa": found["isa"] or "reference",
        "threads": found["threads"],
        "torch": found["torch"],
        "commit": _git("rev-parse", "--short=12", "HEAD") or f"version {found['xtg_kernels']}",
        # What is measured is the code: results and documents may change.
        "dirty": bool(_git("status", "--porcelain", "--", "csrc", "xtg_kernels", "xtrimogene", "benchmarks/*.py")),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _git(*arguments: str) -> str:
    root = Path(__file__).parents[2]
    # Installed, the folder above may lie in somebody else's repository.
    if not (root / ".git").exists():
        return ""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One header for all rows; a column that a row lacks is empty there."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> Rows:
    """The rows of a CSV file, as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
