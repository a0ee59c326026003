"""CellSource: the cells of one matrix of a data set, opened without reading them, whatever format they come in."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData

from xtrimogene.cells.formats.adata import adata_contents
from xtrimogene.cells.formats.anndata_group import anndata_group_contents, is_anndata_group, is_legacy_group
from xtrimogene.cells.formats.contents import Contents
from xtrimogene.cells.formats.inner import chosen_part, folder_of_parts, has_inner
from xtrimogene.cells.formats.loom import is_loom_root, loom_contents
from xtrimogene.cells.formats.refused import file_refusal, folder_refusal, hdf5_refusal, store_refusal
from xtrimogene.cells.formats.soma import is_soma, soma_contents
from xtrimogene.cells.formats.tables import UNREADABLE
from xtrimogene.cells.formats.tenx_h5 import is_tenx_root, tenx_contents
from xtrimogene.cells.formats.tenx_mtx import mtx_contents, mtx_files
from xtrimogene.cells.formats.zarr_store import damaged_metadata, is_zarr
from xtrimogene.cells.hdf5 import HdfFile, MachineLimit, is_hdf5
from xtrimogene.cells.matrix import CsrArrays, Rows, rows_of
from xtrimogene.network.vocabulary import column_names

_IN_MEMORY = "AnnData"


class UnreadableCells(ValueError):
    """Rows that could not be read this time: damage, or a disk or network that fails for a while."""


class MissingMatrix(ValueError):
    """A data set without the matrix that was asked for; layers are those that it has, None for X."""

    def __init__(self, message: str, layers: list[str | None]) -> None:
        super().__init__(message)
        self.layers = layers


@dataclass
class CellSource:
    """The cells of one matrix of a data set.

    name         how messages call it: the path, or "AnnData"
    kind         its format, in words
    n_obs        cells
    n_vars       columns of the matrix
    var          (n_vars rows) annotation of the columns
    var_names    (n_vars,) gene name of each column, from the index of var or its column ``gene_symbols``
    layer        the layer that is read, None for X
    other_layers what ``layer`` could be instead
    obs_columns  names of the columns of obs that can be read
    read_obs     (n_obs,) values of one of them
    obs          (n_obs rows) all of obs; raises UnreadableCells
    """

    name: str
    kind: str
    var: pd.DataFrame
    var_names: list[str]
    gene_symbols: str | None
    layer: str | None
    other_layers: list[str | None]
    rows: Rows
    cell_name: Callable[[int], str]
    obs: Callable[[], pd.DataFrame] = field(repr=False)
    open_layer: Callable[[str | None], CellSource] = field(repr=False)
    _file: HdfFile | None = field(default=None, repr=False)
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
        except MachineLimit as error:
            raise MachineLimit(f"{self.name}: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # HDF5, zarr and its codecs have no common base of what they raise
            raise UnreadableCells(
                f"{self.name}: cannot read rows {start} to {stop - 1}: {error}; the file is damaged or truncated, or "
                "its disk fails"
            ) from error

    def suspend(self) -> None:
        """Gives the file handle back until rows are read again; nothing for formats that hold none."""
        if self._file is not None:
            self._file.close()

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> CellSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_cells(
    adata_or_path: AnnData | str | os.PathLike[str], *, layer: str | None = None, gene_symbols: str | None = None
) -> CellSource:
    """Open the cells of an AnnData (in memory, view or backed) or of a file, without reading them.

    Files: h5ad, zarr stores, 10x Cell Ranger (h5, or the folder of matrix.mtx), loom, MuData (the modality with gene
    expression, or FILE.h5mu/NAME), SpatialData (its table, or STORE.zarr/tables/NAME), TileDB-SOMA with tiledbsoma.

    CSR is read by windows of rows; dense matrices are turned into rows block by block; what is stored by genes, or as
    text, is turned around once, in temporary files. Two things are read whole: a view of a backed AnnData, of which
    anndata cannot take a part, and files written by anndata before 0.7.

    Args:
        layer: the layer to read, None (or "X") for X. "raw" stands for ``.raw`` where no layer has that name. Of 10x
            files with several genomes: the genome.
        gene_symbols: column of ``var`` with the gene names, None for ``var_names`` (of 10x files: the symbols).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a format that is not read (says what to do), a truncated file, a missing layer or var column, a
            matrix of no numbers; the message names the file.
    """
    closing = contextlib.ExitStack()
    if isinstance(adata_or_path, AnnData):
        name = _IN_MEMORY
        contents = adata_contents(adata_or_path)
    elif isinstance(adata_or_path, str | os.PathLike):
        name = str(Path(adata_or_path))
        contents = _opened(Path(adata_or_path), closing)
    else:
        raise TypeError(f"adata_or_path: expected an AnnData or a path, got {type(adata_or_path).__name__}")
    with _naming(name, contents.kind, closing):
        return _source(adata_or_path, name, contents, layer, gene_symbols, closing)


def _source(
    adata_or_path: AnnData | str | os.PathLike[str],
    name: str,
    contents: Contents,
    layer: str | None,
    gene_symbols: str | None,
    closing: contextlib.ExitStack,
) -> CellSource:
    layers = contents.layers
    if layer == "X" and "X" not in layers:
        layer = None  # as tables and help texts call it
    if layer not in layers:
        wanted = "X" if layer is None else f"layer {layer!r}"
        known = ", ".join("X" if known is None else str(known) for known in layers) or "none"
        raise MissingMatrix(f"{name}: expected {wanted}, got a data set without it; its matrices: {known}", layers)
    var = contents.var(layer)
    unreadable = var.attrs.get(UNREADABLE, {})
    if gene_symbols in unreadable:
        raise ValueError(f"gene_symbols: var[{gene_symbols!r}] cannot be read: {unreadable[gene_symbols]}")
    names_column = contents.names_column if gene_symbols is None else gene_symbols
    names = column_names(var, names_column)
    lasting = (lambda stored: stored) if contents.file is None else contents.file.array
    rows = rows_of(contents.matrix(layer), lasting)
    for axis, (word, size) in enumerate((("obs", contents.num_cells(layer)), ("var", len(var)))):
        if rows.shape[axis] != size:
            side = ("rows", "columns")[axis]
            raise ValueError(f"expected {size} {side} as {word} has rows, got {rows.shape[axis]}; the file is damaged")
    return CellSource(
        name, contents.kind, var, names, names_column, layer, [other for other in layers if other != layer], rows,
        cell_name=functools.partial(_cell_name, contents, layer),
        obs=functools.cache(functools.partial(_obs, name, contents, layer)),
        open_layer=lambda other: open_cells(adata_or_path, layer=other),
        _file=contents.file,
        _closing=closing,
    )  # fmt: skip


def _cell_name(contents: Contents, layer: str | None, row: int) -> str:
    try:
        return contents.cell_name(layer, row)
    except MemoryError:
        raise
    except Exception:  # it is for messages, which are about something else
        return "a name that cannot be read"


def _obs(name: str, contents: Contents, layer: str | None) -> pd.DataFrame:
    try:
        return contents.obs(layer)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableCells(f"{name}: cannot read obs: {error}; the file is damaged or truncated") from error


@contextlib.contextmanager
def _naming(name: str, kind: str, closing: contextlib.ExitStack) -> Any:
    """Every error names the file; what libraries raise for damage of one kind or another becomes a ValueError."""
    try:
        yield
    except (PermissionError, MemoryError):
        closing.close()
        raise
    except MachineLimit as error:
        closing.close()
        raise MachineLimit(f"{name}: {error}") from error
    except Exception as error:  # h5py, zarr, tiledb and anndata have no common base of what they raise
        closing.close()
        # zarr has a kind of its own for what is missing in a store
        if type(error) is FileNotFoundError or isinstance(error, MissingMatrix):
            raise
        if type(error) is ValueError:
            raise error if name in str(error) else ValueError(f"{name}: {error}") from error
        damaged = damaged_metadata(Path(name)) if name != _IN_MEMORY else None
        if damaged is not None:
            raise ValueError(f"{name}: {damaged}; the store is damaged") from error
        raise ValueError(f"{name}: cannot be read as {kind}: {error}; the file is damaged or truncated") from error
    except BaseException:
        closing.close()
        raise


def _opened(path: Path, closing: contextlib.ExitStack) -> Contents:
    """What a path holds, by what is in it, not by its name."""
    file, part = split_part(path)
    if not file.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with _naming(str(path), "a data set", closing):
        if not file.is_dir():
            return _of_hdf5(file, part, path, closing)
        if is_zarr(file):
            return _of_zarr(file)
        if is_soma(file):
            return soma_contents(file, closing)
        files = mtx_files(file)
        if files is None:
            raise ValueError(folder_refusal(file))
        return mtx_contents(files)


def _of_hdf5(path: Path, part: str | None, name: Path, closing: contextlib.ExitStack) -> Contents:
    if not is_hdf5(path):
        raise ValueError(file_refusal(path))
    file = HdfFile(path)
    closing.callback(file.close)
    root = file.root
    if has_inner(root):
        folder, kind = folder_of_parts(root)
        inner = f"{folder}/{chosen_part(list(root[folder]), part, folder, str(path))}"
        return anndata_group_contents(root[inner], f"{kind}, {inner}", file)
    if part is not None:
        raise FileNotFoundError(f"{name}: no such file; only h5mu files have parts")
    if is_anndata_group(root):
        if is_legacy_group(root):
            file.close()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # anndata tells, item by item, how it moves old fields
                return adata_contents(anndata.read_h5ad(path), "h5ad of anndata before 0.7")
        return anndata_group_contents(root, "h5ad", file)
    if is_loom_root(root):
        return loom_contents(file)
    if is_tenx_root(root):
        return tenx_contents(file)
    raise ValueError(hdf5_refusal(root))


def _of_zarr(path: Path) -> Contents:
    import zarr

    root = zarr.open_group(path, mode="r")
    if _is_anndata(root):
        return anndata_group_contents(root, "zarr")
    if has_inner(root):
        folder, kind = folder_of_parts(root)
        # Looked up as folders: a part may be of another zarr format than the store, and zarr does not list it then.
        names = sorted(entry.name for entry in (path / folder).iterdir() if entry.is_dir() and is_zarr(entry))
        inner = f"{folder}/{chosen_part(names, None, folder, str(path))}"
        return anndata_group_contents(zarr.open_group(path / inner, mode="r"), f"{kind}, {inner}")
    raise ValueError(store_refusal(root))


def split_part(path: Path) -> tuple[Path, str | None]:
    """The file of a path and the part of it that the path names: FILE.h5mu/rna, as muon has it. A store is a folder,
    and its parts are paths already."""
    for parent in path.parents:
        if parent.is_file():
            return parent, str(path.relative_to(parent))
    return path, None


def is_anndata_file(path: Path) -> bool:
    """Whether a path is an AnnData file (h5ad or zarr), of which a copy can hold more. Raises as open_cells."""
    if not path.exists() or not (is_zarr(path) if path.is_dir() else is_hdf5(path)):
        return False
    closing = contextlib.ExitStack()
    with closing, _naming(str(path), "AnnData", closing):
        root = _root(path, closing)
        if path.is_dir() and not _is_anndata(root) and not has_inner(root):
            raise ValueError(store_refusal(root))
        return _is_anndata(root)


def _is_anndata(root: Any) -> bool:
    return is_anndata_group(root) and "mod" not in root


def open_store(path: Path) -> tuple[Any, contextlib.ExitStack]:
    """The root group (h5py or zarr) of an AnnData file opened for reading, and what closes it.

    Raises FileNotFoundError, or ValueError that names the file when it is no AnnData file.
    """
    closing = contextlib.ExitStack()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with _naming(str(path), "AnnData", closing):
        if not path.is_dir() and not is_hdf5(path):
            raise ValueError(file_refusal(path))
        root = _root(path, closing)
        if not is_anndata_group(root):
            raise ValueError(hdf5_refusal(root))
        return root, closing


def _root(path: Path, closing: contextlib.ExitStack) -> Any:
    """The root group of a zarr store or an HDF5 file."""
    if path.is_dir():
        import zarr

        return zarr.open_group(path, mode="r")
    file = HdfFile(path)
    closing.callback(file.close)
    return file.root


def is_legacy_store(root: Any) -> bool:
    """Whether anndata before 0.7 wrote the file: tables and obsm are compound data sets then, not groups."""
    return is_legacy_group(root)
