"""TileDB-SOMA experiments, read with tiledbsoma where it is installed (pip install 'xtrimogene[soma]')."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from xtrimogene.cells.formats.contents import Contents
from xtrimogene.cells.matrix import CsrArrays

_EXPRESSION = ("RNA", "rna", "gex", "GEX")
_NAMES = {
    "obs": ("obs_id", "_index", "index", "barcode", "cell_id"),
    "var": ("var_id", "_index", "index", "feature_name"),
}


def is_soma(folder: Path) -> bool:
    """Whether a folder is a TileDB group."""
    return (folder / "__tiledb_group.tdb").exists() or (folder / "__group").is_dir()


def soma_contents(folder: Path, closing: contextlib.ExitStack) -> Contents:
    """The measurement with gene expression: its arrays of X by name; the array "data" is X where there is one."""
    try:
        import tiledbsoma
    except ImportError as error:
        raise ValueError(
            "is a TileDB-SOMA experiment, and tiledbsoma is not installed: pip install 'xtrimogene[soma]' (or "
            "tiledbsoma), or write it as h5ad with tiledbsoma.io.to_h5ad"
        ) from error
    experiment = closing.enter_context(tiledbsoma.open(str(folder)))
    if not isinstance(experiment, tiledbsoma.Experiment):
        raise ValueError(f"expected a SOMA experiment, got a {type(experiment).__name__}; give the folder above it")
    measurements = list(experiment.ms)
    name = next(
        (each for each in _EXPRESSION if each in measurements), measurements[0] if len(measurements) == 1 else None
    )
    if name is None:
        raise ValueError(f"expected the measurement RNA, got {', '.join(measurements) or 'none'}")
    measurement = experiment.ms[name]
    arrays: dict[str | None, str] = {None if key == "data" else key: key for key in measurement.X}
    obs, var = (_table(frame, kind) for frame, kind in ((experiment.obs, "obs"), (measurement.var, "var")))
    return Contents(
        f"TileDB-SOMA, measurement {name}",
        list(arrays),
        lambda layer: SomaRows(
            measurement.X[arrays[layer]], obs["soma_joinid"].to_numpy(), var["soma_joinid"].to_numpy()
        ),
        lambda _: var.drop(columns="soma_joinid"),
        lambda _: obs.drop(columns="soma_joinid"),
        lambda _, row: str(obs.index[row]),
        lambda _: len(obs),
    )


class SomaRows:
    """Rows of a sparse SOMA array, by the ids that obs and var have."""

    def __init__(self, array: Any, cell_ids: npt.NDArray[np.int64], gene_ids: npt.NDArray[np.int64]) -> None:
        self.array, self.cell_ids = array, cell_ids
        self.shape = (len(cell_ids), len(gene_ids))
        self.gene_order = np.argsort(gene_ids)
        self.sorted_genes = gene_ids[self.gene_order]

    def read(self, start: int, stop: int) -> CsrArrays:
        ids = self.cell_ids[start:stop]
        table = self.array.read(coords=(ids.tolist(),)).tables().concat()
        rows, genes, data = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        by_id = np.argsort(ids)
        rows = by_id[np.searchsorted(ids[by_id], rows)]
        order = np.lexsort((genes, rows))
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(ids)))])
        columns = self.gene_order[np.searchsorted(self.sorted_genes, genes[order])]
        return indptr, columns, data[order]

    def stored_entries(self) -> None:
        """Only reading everything would tell."""


def _table(frame: Any, kind: str) -> pd.DataFrame:
    """obs or var in the order of its ids, by its column of names."""
    table = frame.read().concat().to_pandas().sort_values("soma_joinid", ignore_index=True)
    names = next((name for name in _NAMES[kind] if name in table.columns), None)
    return table if names is None else table.set_axis(pd.Index(table[names].astype(str).to_numpy()), axis=0)
