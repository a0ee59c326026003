"""CellSource: the cells of an AnnData object, an h5ad file or a zarr store, opened without reading them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem

from xtrimogene.cells.matrix import CsrArrays, Rows, rows_of
from xtrimogene.network.vocabulary import column_names


class UnreadableCells(ValueError):
    """Rows that could not be read this time: damage, or a disk or network that fails for a while."""


@dataclass
class CellSource:
    """The cells of one matrix of a data set.

    name         how messages call it: the path, or "AnnData"
    n_obs        cells
    n_vars       columns of the matrix
    var          (n_vars rows) annotation of the columns
    var_names    (n_vars,) gene name of each column, from the index of var or its column ``gene_symbols``
    layer        the layer that is read, None for X
    other_layers what ``layer`` could be instead
    read_obs     reads obs, the annotation of the cells
    """

    name: str
    var: pd.DataFrame
    var_names: list[str]
    gene_symbols: str | None
    layer: str | None
    other_layers: list[str | None]
    rows: Rows
    cell_name: Callable[[int], str]
    read_obs: Callable[[], pd.DataFrame] = field(repr=False)
    open_layer: Callable[[str | None], CellSource] = field(repr=False)
    _closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    @property
    def n_obs(self) -> int:
        return self.rows.shape[0]

    @property
    def n_vars(self) -> int:
        return self.rows.shape[1]

    @cached_property
    def stored_entries(self) -> npt.NDArray[np.int64] | None:
        """(n_obs,) entries that the matrix stores for each cell, at least its expressed genes; None where only reading
        everything would tell (dense on disk)."""
        return self.rows.stored_entries()

    def read_rows(self, start: int, stop: int) -> CsrArrays:
        """Rows start ... stop - 1 as ``(indptr, indices, data)``, indptr from 0; views where the matrix is in memory.

        Raises UnreadableCells, a ValueError that names the file, when it cannot be read.
        """
        try:
            return self.rows.read(start, stop)
        except MemoryError:
            raise
        except Exception as error:  # HDF5, zarr and its codecs have no common base of what they raise
            raise UnreadableCells(
                f"{self.name}: cannot read rows {start} to {stop - 1}: {error}; the file is damaged or truncated, or "
                "its disk fails"
            ) from error

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> CellSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_cells(
    adata_or_path: AnnData | str | os.PathLike[str], *, layer: str | None = None, gene_symbols: str | None = None
) -> CellSource:
    """Open the cells of an AnnData (in memory, view or backed), an h5ad file or a zarr store, without reading them.

    CSR is read by windows of rows; dense matrices are turned into rows block by block; CSC is transposed once, in
    temporary files where the matrix is on disk. Two things are read whole: a view of a backed AnnData, of which anndata
    cannot take a part, and files written by anndata before 0.7.

    Args:
        layer: the layer to read, None for X. "raw" stands for ``.raw`` where no layer has that name.
        gene_symbols: column of ``var`` with the gene names, None for ``var_names``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no h5ad or zarr AnnData, a truncated file, a missing layer or var column, a matrix of no numbers;
            the message names the file.
    """
    if isinstance(adata_or_path, AnnData):
        return _open_adata(adata_or_path, "AnnData", layer, gene_symbols)
    if not isinstance(adata_or_path, str | os.PathLike):
        raise TypeError(f"adata_or_path: expected an AnnData or a path, got {type(adata_or_path).__name__}")
    path = Path(adata_or_path)
    root, closing = open_store(path)
    if is_legacy_store(root):
        closing.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata tells, item by item, how it moves old fields
            return _open_adata(anndata.read_h5ad(path), str(path), layer, gene_symbols)
    try:
        return _open_root(root, path, layer, gene_symbols, closing)
    except (OSError, KeyError, RuntimeError) as error:
        closing.close()
        raise ValueError(f"{path}: cannot be read as AnnData: {error}; the file is damaged or truncated") from error
    except BaseException:
        closing.close()
        raise


def open_store(path: Path) -> tuple[Any, contextlib.ExitStack]:
    """The root group (h5py or zarr) of an AnnData file opened for reading, and what closes it.

    Raises FileNotFoundError, or ValueError that names the file when it is no AnnData file.
    """
    closing = contextlib.ExitStack()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        import zarr

        try:
            root = zarr.open_group(path, mode="r")
        except Exception as error:  # zarr has no common base of what it raises for a folder that is no store
            raise ValueError(f"{path}: expected an h5ad file or a zarr store, got another folder") from error
    else:
        if not h5py.is_hdf5(path):
            raise ValueError(
                f"{path}: expected an h5ad file, got something that is not HDF5, or is cut off at its start; "
                "write one with adata.write_h5ad"
            )
        try:
            root = closing.enter_context(h5py.File(path, "r"))
        except OSError as error:
            raise ValueError(f"{path}: cannot be opened: {error}; the file is damaged or truncated") from error
    missing = [key for key in ("obs", "var") if key not in root]
    if missing:
        hint = "; read a 10x file with scanpy.read_10x_h5 and write it as h5ad" if "matrix" in root else ""
        closing.close()
        raise ValueError(f"{path}: expected an AnnData file, got one without {' and '.join(missing)}{hint}")
    return root, closing


def is_legacy_store(root: Any) -> bool:
    """Whether anndata before 0.7 wrote the file: tables and obsm are compound data sets then, not groups."""
    return isinstance(root["obs"], h5py.Dataset)


def _open_root(
    root: Any, path: Path, layer: str | None, gene_symbols: str | None, closing: contextlib.ExitStack
) -> CellSource:
    layers: list[str | None] = [None] if "X" in root else []
    layers += list(root["layers"]) if "layers" in root else []
    if "raw" in root and "raw" not in layers:
        layers.append("raw")
    _check_layer(layer, layers, str(path))
    from_raw = layer == "raw" and ("layers" not in root or "raw" not in root["layers"])
    matrix = root["raw/X"] if from_raw else root["X"] if layer is None else root[f"layers/{layer}"]
    var = read_elem(root["raw/var"] if from_raw else root["var"])
    obs = root["obs"]

    def cell_name(row: int) -> str:
        names = obs[obs.attrs["_index"]]
        name = names[row] if hasattr(names, "shape") else read_elem(names)[row]
        return name.decode() if isinstance(name, bytes) else str(name)

    return _source(
        str(path), matrix, var, gene_symbols, layer, layers, cell_name, lambda: read_elem(obs),
        lambda other: open_cells(path, layer=other), closing,
    )  # fmt: skip


def _open_adata(adata: AnnData, name: str, layer: str | None, gene_symbols: str | None) -> CellSource:
    layers: list[str | None] = [None] if adata.X is not None or adata.isbacked else []
    layers += list(adata.layers)
    if adata.raw is not None and "raw" not in layers:
        layers.append("raw")
    _check_layer(layer, layers, name)
    from_raw = layer == "raw" and "raw" not in adata.layers
    if from_raw:
        matrix, var = adata.raw.X, adata.raw.var
    else:
        matrix, var = adata.X if layer is None else adata.layers[layer], adata.var
    return _source(
        name, matrix, var, gene_symbols, layer, layers, lambda row: str(adata.obs_names[row]),
        lambda: adata.obs,
        lambda other: _open_adata(adata, name, other, None), contextlib.ExitStack(),
    )  # fmt: skip


def _check_layer(layer: str | None, layers: list[str | None], name: str) -> None:
    if layer not in layers:
        wanted = "X" if layer is None else f"layer {layer!r}"
        known = ", ".join("X" if known is None else str(known) for known in layers) or "none"
        raise ValueError(f"{name}: expected {wanted}, got a data set without it; its matrices: {known}")


def _source(
    name: str,
    matrix: Any,
    var: pd.DataFrame,
    gene_symbols: str | None,
    layer: str | None,
    layers: list[str | None],
    cell_name: Callable[[int], str],
    read_obs: Callable[[], pd.DataFrame],
    open_layer: Callable[[str | None], CellSource],
    closing: contextlib.ExitStack,
) -> CellSource:
    try:
        names = column_names(var, gene_symbols)
        rows = rows_of(matrix, closing)
        if rows.shape[1] != len(var):
            raise ValueError(f"expected {len(var)} columns as var has rows, got {rows.shape[1]}; the file is damaged")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    others = [other for other in layers if other != layer]
    return CellSource(name, var, names, gene_symbols, layer, others, rows, cell_name, read_obs, open_layer, closing)
