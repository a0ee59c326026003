"""AnnData in a group of an HDF5 file or a zarr store: h5ad files, zarr stores, modalities and tables in larger ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import h5py
import pandas as pd

from xtrimogene.cells.formats.contents import Contents
from xtrimogene.cells.formats.tables import name_of, num_rows, read_table
from xtrimogene.cells.formats.zarr_store import members
from xtrimogene.cells.hdf5 import HdfFile, text

T = TypeVar("T")


def is_anndata_group(group: Any) -> bool:
    """Whether obs and var are there."""
    return "obs" in group and "var" in group


def is_legacy_group(group: Any) -> bool:
    """Whether anndata before 0.7 wrote it: tables and obsm are compound data sets then, not groups."""
    return isinstance(group["obs"], h5py.Dataset)


def anndata_group_contents(group: Any, kind: str, file: HdfFile | None = None) -> Contents:
    """The AnnData that a group holds. "raw" is its raw/X where no layer has that name."""
    name = group.name

    def root() -> Any:
        return group if file is None else file.root[name]  # the file may have been closed since

    layers: list[str | None] = [None] if present(group, "X") else []
    stored_layers: list[str] = _unless_damaged(lambda: _stored_layers(group), [])
    layers += stored_layers
    if "raw" not in layers and _unless_damaged(lambda: _has_raw(group), True):
        layers.append("raw")

    def from_raw(layer: str | None) -> bool:
        return layer == "raw" and "raw" not in stored_layers

    def matrix(layer: str | None) -> Any:
        return root()["raw/X" if from_raw(layer) else "X" if layer is None else f"layers/{layer}"]

    def var(layer: str | None) -> pd.DataFrame:
        return read_table(root()["raw/var" if from_raw(layer) else "var"])

    return Contents(
        kind, layers, matrix, var,
        lambda _: read_table(root()["obs"]),
        lambda _, row: name_of(root()["obs"], row),
        lambda _: num_rows(root()["obs"]),
        file=file,
    )  # fmt: skip


def _stored_layers(group: Any) -> list[str]:
    if not present(group, "layers"):
        return []
    folder = group["layers"]
    return [name for name in members(folder) if _unless_damaged(partial(present, folder, name), True)]


def _has_raw(group: Any) -> bool:
    return present(group, "raw") and "X" in group["raw"]


def _unless_damaged(ask: Callable[[], T], damaged: T) -> T:
    """An answer, and another one where damage keeps from it: what is damaged does not matter until it is asked for."""
    try:
        return ask()
    except MemoryError:
        raise
    except Exception:  # h5py and zarr have no common base of what they raise
        return damaged


def present(group: Any, key: str) -> bool:
    """Whether there is a value: anndata 0.12 writes an element of encoding "null" for None."""
    if key not in group:
        return False
    stored = group[key]
    return text(stored.attrs.get("encoding-type")) != "null" and getattr(stored, "shape", ()) is not None
