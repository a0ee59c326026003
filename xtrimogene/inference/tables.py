"""New h5ad files: a write that fails is an OSError, and obs and var are written so that every anndata reads them."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem

from xtrimogene.writing import written_beside

_GROUPS = ("layers", "obsm", "obsp", "uns", "varm", "varp")


class _Recorded(io.FileIO):
    """A file whose writes never fail for HDF5, which prints tracebacks or crashes after one that did; see error."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size, end = len(view), self.tell() + len(view)
        try:
            while len(view) and self.error is None:
                view = view[super().write(view) :]
        except OSError as error:
            self.error = error
        self.seek(end)
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self.tell() if size is None else size


class NewHdf5(h5py.File):
    """An HDF5 file that is being written."""

    recorded: _Recorded

    def check(self) -> None:
        """Raises the OSError of a write that has failed since it was opened: a full disk, mostly."""
        if self.recorded.error is not None:
            raise self.recorded.error


@contextlib.contextmanager
def new_hdf5(path: Path, mode: str) -> Iterator[NewHdf5]:
    """An HDF5 file of our own, open for writing ("w" or "r+"). Raises OSError at the end where a write failed."""
    with _Recorded(path, "w+" if mode == "w" else "r+") as recorded:
        try:
            with NewHdf5(recorded, mode) as root:
                root.recorded = recorded
                yield root
        except Exception:
            if recorded.error is None:
                raise
        if recorded.error is not None:
            number = recorded.error.errno
            raise OSError(number, os.strerror(number or 0), str(path)) from recorded.error


@contextlib.contextmanager
def new_h5ad(output: Path, obs: pd.DataFrame, var_names: Sequence[str], overwrite: bool) -> Iterator[NewHdf5]:
    """An AnnData file with cells and genes alone, open for more; it bears its name once it is whole."""
    with written_beside(output, overwrite) as written, new_hdf5(written, "w") as root:
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in _GROUPS:
            root.create_group(name).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        _write_table(root, "obs", obs)
        _write_table(root, "var", pd.DataFrame(index=pd.Index(list(var_names), dtype=object)))
        yield root


def _write_table(root: h5py.File, name: str, table: pd.DataFrame) -> None:
    """A table column by column; what anndata cannot write is left out with a warning."""
    index = pd.Index(table.index.astype(str).to_numpy(object), dtype=object)
    if table.index.name not in (None, *table.columns):
        index.name = str(table.index.name)
    write_elem(root, name, pd.DataFrame(index=index))
    group, written, left_out = root[name], [], []
    for number, label in enumerate(table.columns):
        column = str(label)
        try:
            if column in group:
                raise ValueError("a second column of that name")
            write_elem(group, column, _plain(table.iloc[:, number]))
            written.append(column)
        except (OSError, MemoryError):
            raise
        except Exception:  # anndata has no common base of what it raises for what it cannot write
            left_out.append(column)
            if column in group and column not in (*written, group.attrs["_index"]):
                del group[column]
    group.attrs["column-order"] = np.array(written, dtype=h5py.string_dtype())
    if left_out:
        warnings.warn(f"{name}: columns that h5ad files cannot hold are left out: {', '.join(left_out)}", stacklevel=4)


def _plain(column: pd.Series) -> Any:
    """The values of a column; strings in the encodings that every version of anndata reads."""
    if not isinstance(column.dtype, pd.StringDtype):
        return column.array if isinstance(column.dtype, pd.api.extensions.ExtensionDtype) else column.to_numpy()
    if column.isna().any():
        return pd.Categorical(column.astype(object))
    return column.to_numpy(object)
