"""Folders of 10x Cell Ranger: matrix.mtx with features.tsv (version 3) or genes.tsv (version 2) and barcodes.tsv,
gzipped or not. Text cannot be read by rows: it is turned once into CSR in temporary files that vanish."""

from __future__ import annotations

import gzip
import itertools
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pandas as pd

from xtrimogene.cells.formats.contents import Contents
from xtrimogene.cells.formats.tenx_h5 import GENES, NAMES, tenx_var
from xtrimogene.cells.matrix import Array, SparseRows, csr_on_disk, scratch_array

# Bytes of text that are read at a time
_BLOCK_BYTES = 1 << 24
# Files on the data sharing sites have the name of the sample before the usual one.
_MATRIX = re.compile(r"(.*)matrix\.mtx(\.gz)?")


class MtxFiles(NamedTuple):
    """The three files of a folder."""

    matrix: Path
    features: Path
    barcodes: Path


def mtx_files(folder: Path) -> MtxFiles | None:
    """The files of a 10x folder, None where it is none. Raises ValueError for the matrices of several samples."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    found = []
    for name in names:
        match = _MATRIX.fullmatch(name)
        if match is None:
            continue
        parts = [
            next(
                (
                    f"{match[1]}{stem}.tsv{end}"
                    for stem in stems
                    for end in ("", ".gz")
                    if f"{match[1]}{stem}.tsv{end}" in names
                ),
                None,
            )
            for stems in (("features", "genes"), ("barcodes",))
        ]
        if all(part is not None for part in parts):
            found.append(MtxFiles(*(folder / str(part) for part in (name, *parts))))
    stems = {each.matrix.name.removesuffix(".gz") for each in found}
    if len(stems) > 1:
        raise ValueError(
            f"expected the matrix of one sample, got {', '.join(sorted(stems))}; make a folder for each and give one"
        )
    return found[0] if found else None


def mtx_contents(files: MtxFiles) -> Contents:
    """A 10x folder: X is the matrix, with cells as rows."""
    features = _tsv(files.features)
    barcodes = [row[0] for row in _tsv(files.barcodes)]
    table = pd.DataFrame(
        {
            "name": [row[1] if len(row) > 1 else row[0] for row in features],
            "gene_ids": [row[0] for row in features],
            "feature_types": [row[2] if len(row) > 2 else GENES for row in features],
            "genome": "",
        },
        dtype=object,
    )

    def matrix(_: str | None) -> SparseRows:
        try:
            return _converted(files.matrix, len(features), len(barcodes))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{files.matrix.name} cannot be unpacked: {error}; the file is damaged or truncated"
            ) from error

    return Contents(
        f"10x Cell Ranger folder, version {3 if files.features.name.split('.')[0].endswith('features') else 2}",
        [None],
        matrix,
        lambda _: tenx_var(table),
        lambda _: pd.DataFrame(index=pd.Index(barcodes)),
        lambda _, row: barcodes[row],
        lambda _: len(barcodes),
        names_column=NAMES,
    )


def _converted(path: Path, num_features: int, num_cells: int) -> SparseRows:
    """CSR of cells x features, in temporary files."""
    shape = (num_cells, num_features)
    with _open(path) as file:
        sizes, entries = _header(file, path.name)
        if sizes not in (shape, shape[::-1]):
            raise ValueError(
                f"{path.name}: expected {num_features} features x {num_cells} cells, as the other files have, got "
                f"{sizes[0]} x {sizes[1]}; these files do not belong together"
            )
        cell_axis, gene_axis = (1, 0) if sizes == shape[::-1] else (0, 1)
        cells, genes, values = (scratch_array(entries, kind) for kind in (np.int32, np.int32, np.float64))
        lengths, end, in_order = np.zeros(num_cells, np.int64), 0, True
        for numbers in _numbers(file, path.name):
            start, end = end, end + len(numbers)
            if end > entries:
                continue  # counted, for the message
            cells[start:end] = _positions(path.name, numbers[:, cell_axis], num_cells, "cells")
            genes[start:end] = _positions(path.name, numbers[:, gene_axis], num_features, "features")
            values[start:end] = numbers[:, 2]
            lengths += np.bincount(cells[start:end], minlength=num_cells)
            in_order = in_order and bool(np.all(np.diff(cells[max(0, start - 1) : end]) >= 0))
        if end != entries:
            raise ValueError(
                f"{path.name}: expected {entries:,} entries, as its size line says, got {end:,}; the file is damaged "
                "or truncated"
            )
        if in_order:  # as Cell Ranger writes it
            return SparseRows(shape, np.concatenate([[0], np.cumsum(lengths)]), genes, values)
        step = _BLOCK_BYTES // 16
        bounds = itertools.pairwise([*range(0, entries, step), entries])
        blocks = ((cells[first:last], genes[first:last], values[first:last]) for first, last in bounds)
        return csr_on_disk(shape, lengths, blocks, np.float64)


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, int], int]:
    """Rows and columns, and entries."""
    banner = file.readline().decode("latin-1").lower().split()
    known = [["%%matrixmarket", "matrix", "coordinate", kind, "general"] for kind in ("integer", "real")]
    if banner not in known:
        raise ValueError(
            f"{name}: expected '%%MatrixMarket matrix coordinate integer (or real) general' as its first line, got "
            f"{' '.join(banner)!r:.80}"
        )
    line = file.readline()
    while line.startswith(b"%"):
        line = file.readline()
    try:
        rows, columns, entries = (int(size) for size in line.split())
    except ValueError:
        raise ValueError(f"{name}: expected the three sizes of the matrix, got the line {line!r:.80}") from None
    return (rows, columns), entries


def _numbers(file: IO[bytes], name: str) -> Iterator[Array]:
    """(n, 3) float64: row, column and value of some entries at a time."""
    while block := file.read(_BLOCK_BYTES):
        block += file.readline()
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # how NumPy tells of text that is no number
            try:
                numbers = np.fromstring(block, sep=" ")
            except (DeprecationWarning, ValueError):
                numbers = np.zeros(1)
        if len(numbers) % 3:
            raise ValueError(f"{name}: expected lines of row, column and value, got others; the file is damaged")
        yield numbers.reshape(-1, 3)


def _positions(name: str, numbers: Array, size: int, what: str) -> Array:
    """Positions from 0; the file counts from 1."""
    if len(numbers) and not (
        numbers.min() >= 1 and numbers.max() <= size and np.array_equal(numbers, np.rint(numbers))
    ):
        raise ValueError(f"{name}: expected {what} 1 to {size}, got {numbers.min():g} to {numbers.max():g}")
    return numbers.astype(np.int32) - 1


def _tsv(path: Path) -> list[list[str]]:
    with _open(path) as file:
        try:
            lines = file.read().decode("utf-8-sig").splitlines()
        except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path.name} cannot be read: {error}; the file is damaged or truncated") from error
    return [line.split("\t") for line in lines if line.strip()]


def _open(path: Path) -> IO[bytes]:
    """A text file, unpacked where it is gzip, whatever its name."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else open(path, "rb")  # type: ignore[return-value]
