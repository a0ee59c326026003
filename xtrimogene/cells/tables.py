"""Tables of tab-separated text that a user has: other names of genes, graphs of genes, splits."""

from __future__ import annotations

import csv
import os
from pathlib import Path


def tab_separated(path: str | os.PathLike[str], name: str) -> list[tuple[int, list[str]]]:
    """The lines of a table that are not empty: their numbers, from 1, and their cells without blanks around.

    Raises FileNotFoundError, or ValueError for what is no text, that begin with a name of the table and its path.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter="\t")]
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} {path}: no such file") from None
    except (UnicodeDecodeError, IsADirectoryError, csv.Error) as error:
        raise ValueError(f"{name} {path}: expected a table of tab-separated text: {error}") from error
    return [(number, row) for number, row in enumerate(rows, start=1) if any(row)]
