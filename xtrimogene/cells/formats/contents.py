"""Contents: what a file or an object holds, opened and not read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from xtrimogene.cells.hdf5 import HdfFile


@dataclass
class Contents:
    """The matrices of a data set and what belongs to their rows and columns.

    kind          the format, in words
    layers        its matrices by name, None for X
    matrix        (layer) -> the stored matrix, as rows_of takes it
    var           (layer) -> annotation of its columns
    obs           (layer) -> annotation of its cells
    cell_name     (layer, row) -> name of a cell
    num_cells     (layer) -> rows that obs has
    names_column  column of var with the gene names where a user names none, None for the index
    file          the HDF5 file that all is read from, None for other formats
    """

    kind: str
    layers: list[str | None]
    matrix: Callable[[str | None], Any]
    var: Callable[[str | None], pd.DataFrame]
    obs: Callable[[str | None], pd.DataFrame]
    cell_name: Callable[[str | None, int], str]
    num_cells: Callable[[str | None], int]
    names_column: str | None = None
    file: HdfFile | None = None
