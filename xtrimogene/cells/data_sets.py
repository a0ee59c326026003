"""Many data sets given at once: files, stores and folders of them in order, and the genes of them all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from anndata import AnnData

from xtrimogene.cells.genes import columns_left_out
from xtrimogene.cells.sources import open_cells
from xtrimogene.network.vocabulary import Vocabulary

Data: TypeAlias = AnnData | str | os.PathLike[str]
_ZARR_FILES = ("zarr.json", ".zgroup")


def expand_data(data: Data | Sequence[Data]) -> list[AnnData | Path]:
    """Data sets in order: a folder that is no zarr store stands for the h5ad files and zarr stores in it, by name.

    Raises FileNotFoundError for a folder without any, ValueError for nothing at all or a file that is given twice.
    """
    found: list[AnnData | Path] = []
    for each in [data] if isinstance(data, AnnData | str | os.PathLike) else data:
        if isinstance(each, AnnData):
            found.append(each)
            continue
        path = Path(each)
        if path.is_dir() and path.suffix != ".zarr" and not any((path / name).exists() for name in _ZARR_FILES):
            files = sorted(entry for entry in path.iterdir() if entry.suffix in (".h5ad", ".zarr"))
            if not files:
                raise FileNotFoundError(f"{path}: expected h5ad files or zarr stores in the folder, got none")
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
