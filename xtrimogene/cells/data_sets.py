"""Many data sets given at once: files, stores and folders of them in order, and the genes of them all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from anndata import AnnData

from xtrimogene.cells.formats.refused import folder_refusal
from xtrimogene.cells.formats.soma import is_soma
from xtrimogene.cells.formats.tenx_mtx import mtx_files
from xtrimogene.cells.formats.zarr_store import is_zarr
from xtrimogene.cells.genes import columns_left_out
from xtrimogene.cells.sources import open_cells
from xtrimogene.network.vocabulary import Vocabulary

Data: TypeAlias = AnnData | str | os.PathLike[str]
# What a folder stands for. 10x files have to be named: Cell Ranger leaves the same cells in several of them.
_SUFFIXES = (".h5ad", ".zarr", ".h5mu", ".loom")


def expand_data(data: Data | Sequence[Data]) -> list[AnnData | Path]:
    """Data sets in order: a folder that is no data set itself stands for the files and stores in it (h5ad, zarr, h5mu,
    loom), by name. Hidden files, such as macOS leaves beside others (._NAME), are not looked at.

    Raises FileNotFoundError for a folder without any, ValueError for nothing at all or a file that is given twice.
    """
    found: list[AnnData | Path] = []
    for each in [data] if isinstance(data, AnnData | str | os.PathLike) else data:
        if isinstance(each, AnnData):
            found.append(each)
            continue
        path = Path(each)
        if path.is_dir() and not is_zarr(path) and not is_soma(path) and mtx_files(path) is None:
            files = sorted(
                entry for entry in path.iterdir() if entry.suffix in _SUFFIXES and not entry.name.startswith(".")
            )
            if not files:
                raise FileNotFoundError(
                    f"{path}: expected h5ad files or zarr stores in the folder, got none: {folder_refusal(path)}"
                )
            found += files
        else:
            found.append(path)
    if not found:
        raise ValueError("data: expected at least one data set, got none")
    paths = [each.resolve() for each in found if isinstance(each, Path)]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"data: expected each file once, got {path} more than once")
    return found


def genes_of_data(
    data: Data | Sequence[Data], *, layer: str | None = None, gene_symbols: str | None = None
) -> Vocabulary:
    """A vocabulary of all genes of the data sets, in the order in which they are met, without columns that are no genes
    by ``var["feature_types"]``."""
    names: dict[str, None] = {}
    for each in expand_data(data):
        with open_cells(each, layer=layer, gene_symbols=gene_symbols) as source:
            left_out = columns_left_out(source.var)
            names |= dict.fromkeys(
                name for name, left in zip(source.var_names, left_out, strict=True) if name and not left
            )
    return Vocabulary(names)
