"""AnnData in a group of an HDF5 file or a zarr store: h5ad files, zarr stores, modalities and tables in larger ones."""

from __future__ import annotations

from typing import Any

import h5py
import pandas as pd

from xtrimogene.cells.formats.contents import Contents
from xtrimogene.cells.formats.tables import name_of, num_rows, read_table
from xtrimogene.cells.hdf5 import HdfFile, text


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
    folder = group["layers"] if present(group, "layers") else {}
    stored_layers = [layer for layer in folder if present(folder, layer)]
    layers += stored_layers
    if present(group, "raw") and "X" in group["raw"] and "raw" not in layers:
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


def present(group: Any, key: str) -> bool:
    """Whether there is a value: anndata 0.12 writes an element of encoding "null" for None."""
    if key not in group:
        return False
    stored = group[key]
    return text(stored.attrs.get("encoding-type")) != "null" and getattr(stored, "shape", ()) is not None
