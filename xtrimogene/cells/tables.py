"""Tables of text that a user has: other names of genes, graphs of genes, splits, drug pairs."""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from pathlib import Path


def tab_separated(path: str | os.PathLike[str], name: str) -> list[tuple[int, list[str]]]:
    """The rows of a table, separated by tabs, see separated."""
    return separated(path, name, "\t", "tab-separated text")


def separated(
    path: str | os.PathLike[str], name: str, separators: str, kind: str = "text"
) -> list[tuple[int, list[str]]]:
    """The lines of a table that are not empty: their numbers, from 1, and their cells without blanks around.

    The table is plain or gzipped; of the separators it has the one of which its first line has most.

    Raises FileNotFoundError, or ValueError for what is no text, that begin with a name of the table and its path, and
    say what kind of text it should be.
    """
    try:
        content = Path(path).read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
        lines = text.splitlines()
        first = next((line for line in lines if line.strip()), "")
        separator = max(separators, key=first.count)
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} {path}: no such file") from None
    except (UnicodeDecodeError, IsADirectoryError, csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{name} {path}: expected a table of {kind}: {error}") from error
    return [(number, row) for number, row in enumerate(rows, start=1) if any(row)]
