"""ModelCells: the cells of a data set as one model reads them, and the checks that come before any work."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xtg_kernels import RaggedBatch
from xtrimogene.cells.depth import TargetDepth, add_depth_tokens
from xtrimogene.cells.genes import map_genes
from xtrimogene.cells.matrix import CsrArrays
from xtrimogene.cells.numbers import check_counts
from xtrimogene.cells.packing import pack_rows_and_totals
from xtrimogene.cells.sources import CellSource
from xtrimogene.hub import checkpoint_folder
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.folder import CHECKPOINT_FILES, Checkpoint
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.network.vocabulary import ColumnMap

# Cells that are read and packed at a time.
WINDOW = 1024


def opened(model: XTrimoGeneNetwork | str | os.PathLike[str]) -> XTrimoGeneNetwork:
    """A model as it is, or that of a checkpoint folder or of a name on the Hub."""
    if isinstance(model, XTrimoGeneNetwork):
        return model
    return XTrimoGeneNetwork.from_checkpoint(Checkpoint.open(checkpoint_folder(os.fspath(model), CHECKPOINT_FILES)))


class BadNumbers(ValueError):
    """A cell holds numbers that are no expression: it stays so until the input is mended."""


@dataclass
class ModelCells:
    """Cells of a source, in the genes of a model's vocabulary, normalised and with depth tokens where it has them."""

    source: CellSource
    config: XTrimoGeneConfig
    column_map: ColumnMap
    normalized: bool
    target_depth: TargetDepth

    @classmethod
    def checked(
        cls, source: CellSource, network: XTrimoGeneNetwork, *, normalized: bool, target_depth: float | str
    ) -> ModelCells:
        """Maps the genes and refuses, before any work, numbers that are not what normalized says.

        Raises ValueError that names the source; warns where counts of several columns are added up.
        """
        depth = TargetDepth.parse(target_depth)
        if normalized and network.config.depth_tokens:
            raise ValueError(
                f"{source.name}: expected raw counts, got normalized=True: this model reads each cell's total "
                "(config depth_tokens); give it the counts"
            )
        column_map = map_genes(source, network.vocabulary, normalized=normalized)
        check_counts(source, normalized)
        if column_map.merged:
            warnings.warn(f"{source.name}: {column_map}", stacklevel=3)
        return cls(source, network.config, column_map, normalized, depth)

    def windows(self, size: int = WINDOW) -> list[tuple[int, int]]:
        """(first, past the last) row of each window of rows."""
        n_obs = self.source.n_obs
        return [(start, min(start + size, n_obs)) for start in range(0, n_obs, size)]

    def pack(
        self,
        rows_csr: CsrArrays,
        *,
        first_row: int,
        rows: npt.NDArray[np.int64] | None = None,
        num_threads: int | None = None,
    ) -> RaggedBatch:
        """The rows that source.read_rows gave, as a batch; arguments as for data.pack_rows.

        Raises BadNumbers that names the source, row and column of a bad number.
        """
        try:
            batch, totals = pack_rows_and_totals(
                rows_csr,
                self.column_map.gene_ids,
                rows=rows,
                normalized=self.normalized,
                target_sum=self.config.target_sum,
                num_threads=num_threads,
                first_row=first_row,
            )
        except ValueError as error:
            raise BadNumbers(f"{self.source.name}: {error}") from error
        if not self.config.depth_tokens:
            return batch
        depth = self.target_depth
        return add_depth_tokens(batch, totals, num_genes=self.config.num_genes, target=depth.number, mode=depth.mode)

    def check_longest_cell(self, max_tokens: int, window: int = WINDOW) -> None:
        """Raises ValueError for max_tokens below the longest cell, before any work."""
        source, depth_tokens = self.source, 2 * self.config.depth_tokens
        if self.column_map.num_found + depth_tokens <= max_tokens:
            return
        stored = source.stored_entries
        if stored is None:
            lengths = [np.diff(source.read_rows(start, stop)[0]) for start, stop in self.windows(window)]
            stored = np.concatenate([np.zeros(0, np.int64), *lengths])
        # A cell stores at least its expressed genes, and also zeros and genes that the vocabulary lacks.
        for row in np.argsort(-stored, kind="stable").tolist():
            if stored[row] + depth_tokens <= max_tokens:
                break
            length = self.pack(source.read_rows(row, row + 1), first_row=row).max_seqlen
            if length > max_tokens:
                enough = min(int(stored.max()), self.column_map.num_found) + depth_tokens
                raise ValueError(
                    f"max_tokens: expected room for the longest cell, got {max_tokens:,}, and cell "
                    f"{source.cell_name(row)!r} (row {row}) of {source.name} expresses {length - depth_tokens:,} "
                    f"vocabulary genes; raise max_tokens to {enough:,}"
                )
