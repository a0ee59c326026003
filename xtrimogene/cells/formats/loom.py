"""Loom files: a dense matrix genes x cells in an HDF5 file, read by blocks of cells."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
import pandas as pd

from xtrimogene.cells.formats.contents import Contents
from xtrimogene.cells.hdf5 import HdfFile, check_filters, text, texts
from xtrimogene.cells.matrix import DenseRows, check_numbers

# Where writers put the names of genes and of cells, the usual one first.
_GENE_NAMES = ("Gene", "gene", "var_names", "gene_name", "gene_names", "Name", "name", "Symbol", "Accession")
_CELL_NAMES = ("CellID", "cellid", "obs_names", "cell_id", "Barcode", "barcode", "barcodes", "index")


def is_loom_root(root: Any) -> bool:
    """Whether an HDF5 file is a loom file."""
    return "matrix" in root and isinstance(root["matrix"], h5py.Dataset) and "row_attrs" in root and "col_attrs" in root


def loom_contents(file: HdfFile) -> Contents:
    """A loom file: "matrix" is X, what is in "layers" its other matrices."""
    root = file.root
    genes, cells = (int(size) for size in root["matrix"].shape)
    gene_names = _first(root["row_attrs"], _GENE_NAMES, genes)
    cell_names = _first(root["col_attrs"], _CELL_NAMES, cells)
    if gene_names is None:
        raise ValueError(
            f"expected the names of the genes in row_attrs/Gene, got a loom file with row_attrs "
            f"{', '.join(root['row_attrs']) or '(none)'}; name them with loompy, or write the cells as h5ad"
        )
    layers: list[str | None] = [None, *root.get("layers", [])]

    def matrix(layer: str | None) -> DenseRows:
        stored = file.root["matrix" if layer is None else f"layers/{layer}"]
        check_filters(stored)
        check_numbers(stored.dtype)
        return DenseRows((int(stored.shape[1]), int(stored.shape[0])), _Transposed(file.array(stored)))

    def obs(_: str | None) -> pd.DataFrame:
        return _table(file.root["col_attrs"], cell_names, cells)

    def cell_name(_: str | None, row: int) -> str:
        return str(row) if cell_names is None else text(file.root["col_attrs"][cell_names][row])

    return Contents(
        "loom", layers, matrix, lambda _: _table(file.root["row_attrs"], gene_names, genes), obs, cell_name,
        lambda _: cells, names_column=gene_names, file=file,
    )  # fmt: skip


class _Transposed:
    """Rows of a matrix that is stored by columns: cells of genes x cells."""

    def __init__(self, columns: Any) -> None:
        self.columns = columns

    def __getitem__(self, rows: slice) -> Any:
        return self.columns[:, rows].T


def _first(attributes: h5py.Group, names: tuple[str, ...], length: int) -> str | None:
    return next((name for name in names if name in attributes and attributes[name].shape == (length,)), None)


def _table(attributes: h5py.Group, names: str | None, length: int) -> pd.DataFrame:
    """The attributes that have one entry a row, by the given one as index; names stay a column too."""
    columns = {}
    for key, stored in attributes.items():
        if isinstance(stored, h5py.Dataset) and stored.shape == (length,):
            columns[key] = np.array(texts(stored), object) if stored.dtype.kind in "SO" else stored[:]
    index = [str(row) for row in range(length)] if names is None else [str(name) for name in columns[names]]
    return pd.DataFrame(columns, index=pd.Index(index))
