"""New h5ad files: a write that fails is an OSError, and obs and var are written so that every anndata reads them."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def new_hdf5(path: Path, mode: str) -> Iterator[h5py.File]:
    """An HDF5 file of our own, open for writing; what HDF5 says of a full disk, also when it closes, is an OSError."""
    # Nobody else knows the file, and where the file system has no locks, HDF5 would not open it.
    root = h5py.File(path, mode, locking=False)
    try:
        yield root
        root.flush()
    except BaseException:
        with contextlib.suppress(Exception):
            root.close()
        raise
    try:
        root.close()
    except RuntimeError as error:
        raise OSError(f"{path}: {error}") from error


@contextlib.contextmanager
def new_h5ad(output: Path, obs: pd.DataFrame, var_names: Sequence[str], overwrite: bool) -> Iterator[h5py.File]:
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
