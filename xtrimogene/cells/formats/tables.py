"""Tables of stored AnnData (obs and var), read column by column: what cannot be read does not matter until it is asked
for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata.io import read_elem

from xtrimogene.cells.hdf5 import check_filters, text

# Key of DataFrame.attrs: {column that could not be read: why}
UNREADABLE = "unreadable"


def read_table(group: Any) -> pd.DataFrame:
    """A stored table. Columns that cannot be read are left out and named in ``table.attrs[UNREADABLE]``.

    Raises ValueError when the index cannot be read.
    """
    index_key = _index_key(group)
    try:
        index = pd.Index([text(name) for name in _column(group[index_key])])
    except MemoryError:
        raise
    except Exception as error:  # anndata, h5py and zarr have no common base of what they raise
        raise ValueError(f"{group.name.strip('/')}: the index {index_key!r} cannot be read: {_told(error)}") from error
    columns, unreadable = {}, {}
    for name in _column_order(group, index_key):
        try:
            values = _column(group[name])
            if len(values) != len(index):
                raise ValueError(f"{len(values)} entries for {len(index)} rows")
            columns[name] = values
        except MemoryError:
            raise
        except Exception as error:
            unreadable[name] = _told(error)
    table = pd.DataFrame(
        {name: values.array if isinstance(values, pd.Series) else values for name, values in columns.items()},
        index=index,
    )
    if index_key != "_index":
        table.index.name = index_key
    table.attrs[UNREADABLE] = unreadable
    return table


def num_rows(group: Any) -> int:
    """Rows of a stored table, without reading it."""
    index = group[_index_key(group)]
    if not hasattr(index, "shape"):  # strings with missing ones, or categories
        index = index["values" if "values" in index else "codes"]
    return int(index.shape[0])


def name_of(group: Any, row: int) -> str:
    """Index entry of one row."""
    names = group[_index_key(group)]
    return text(names[row] if hasattr(names, "shape") else read_elem(names)[row])


def _index_key(group: Any) -> str:
    return text(group.attrs["_index"]) if "_index" in group.attrs else "_index"


def _column_order(group: Any, index_key: str) -> list[str]:
    if "column-order" not in group.attrs:  # not every writer outside Python sets it
        return [name for name in group if name != index_key]
    order = group.attrs["column-order"]
    return [text(name) for name in np.atleast_1d(np.asarray(order, object))] if np.size(order) else []


def _column(stored: Any) -> Any:
    for each in stored.values() if hasattr(stored, "values") else [stored]:
        check_filters(each)
    try:
        return read_elem(stored)
    except Exception:
        # Plain values, but the words that describe them are not as anndata has them.
        if not hasattr(stored, "shape") and {"categories", "codes"} <= set(stored):
            categories, codes = _plain(stored["categories"]), np.asarray(stored["codes"][:])
            return pd.Categorical.from_codes(codes, categories=categories)
        if not hasattr(stored, "shape") or len(stored.shape) != 1:
            raise
        return _plain(stored)


def _plain(stored: Any) -> Any:
    values = np.asarray(stored[:])
    return np.array([text(value) for value in values], object) if values.dtype.kind in "SOT" else values


def _told(error: Exception) -> str:
    """The first line of what a library says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
