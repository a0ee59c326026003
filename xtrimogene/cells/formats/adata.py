"""AnnData objects: in memory, views, backed."""

from __future__ import annotations

from typing import Any

import pandas as pd
from anndata import AnnData

from xtrimogene.cells.formats.anndata_group import present
from xtrimogene.cells.formats.contents import Contents


def adata_contents(adata: AnnData, kind: str = "AnnData") -> Contents:
    """An AnnData object. "raw" is .raw where no layer has that name."""
    layers: list[str | None] = [None] if _has_x(adata) else []
    layers += list(adata.layers)
    if adata.raw is not None and "raw" not in layers and not _is_null(adata, "raw"):
        layers.append("raw")

    def from_raw(layer: str | None) -> bool:
        return layer == "raw" and "raw" not in adata.layers

    def matrix(layer: str | None) -> Any:
        return adata.raw.X if from_raw(layer) else adata.X if layer is None else adata.layers[layer]

    def var(layer: str | None) -> pd.DataFrame:
        return adata.raw.var if from_raw(layer) else adata.var

    return Contents(
        kind, layers, matrix, var, lambda _: adata.obs, lambda _, row: str(adata.obs_names[row]), lambda _: adata.n_obs
    )


def _has_x(adata: AnnData) -> bool:
    return adata.X is not None if not adata.isbacked else "X" in adata.file._file and not _is_null(adata, "X")


def _is_null(adata: AnnData, key: str) -> bool:
    """Whether the file behind a backed AnnData says that there is no such matrix."""
    stored = adata.file._file if adata.isbacked else None
    return stored is not None and key in stored and not present(stored, key)
