"""ModelCells: the cells of a data set as one model reads them, and the checks that come before any work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xtg_kernels import RaggedBatch
from xtrimogene.cells.depth import DepthBelowZero, TargetDepth, add_depth_tokens
from xtrimogene.cells.kinds import ValueKind
from xtrimogene.cells.mapped import MappedCells
from xtrimogene.cells.matrix import CsrArrays
from xtrimogene.cells.numbers import BadNumbers, columns_of_totals
from xtrimogene.cells.sources import CellSource
from xtrimogene.hub import checkpoint_folder
from xtrimogene.inference.options import DEFAULT_TARGET_DEPTH
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


def of_columns(left_out: int, renamed: int, old_names: int) -> str:
    """What a report says of columns that do not go by the names of genes."""
    parts = [
        f"{number:,} {text}"
        for number, text in (
            (left_out, "columns that are no genes left out"),
            (renamed, "columns renamed"),
            (old_names, "under an old name unknown"),
        )
        if number
    ]
    return "".join(f", {part}" for part in parts)


@dataclass
class ModelCells:
    """Cells of a source, in the genes of a model's vocabulary, normalised and with depth tokens where it has them."""

    mapped: MappedCells
    config: XTrimoGeneConfig
    target_depth: TargetDepth

    @classmethod
    def checked(
        cls,
        source: CellSource,
        network: XTrimoGeneNetwork,
        *,
        normalized: bool = False,
        values: str | None = None,
        fractional_counts: bool = False,
        total_counts: str | None = None,
        aliases: str | os.PathLike[str] | None = None,
        target_depth: float | str | None = None,
    ) -> ModelCells:
        """Maps the genes and refuses, before any work, numbers that are not what the options say.

        Raises ValueError that names the source; warns of what is likely to be wrong, and where counts of several
        columns are added up.
        """
        kind = ValueKind.checked(values, normalized, fractional_counts)
        if target_depth is None:
            target_depth = "fold:1" if kind.values == "tpm" else DEFAULT_TARGET_DEPTH
        depth = TargetDepth.parse(target_depth)
        config = network.config
        if kind.logged and config.depth_tokens and total_counts is None:
            given = "normalized=True" if normalized else "values='log1p'"
            likely = columns_of_totals(source.obs())
            raise ValueError(
                f"{source.name}: expected raw counts, got {given}: this model reads each cell's total (config "
                "depth_tokens); give it the counts, or name the obs column of the totals with total_counts "
                f"(--total-counts{f'; there is {likely[0]}' if likely else ''})"
            )
        mapped = MappedCells.checked(
            source,
            network.vocabulary,
            kind,
            total_counts=total_counts,
            aliases=aliases,
            target_sum=config.target_sum,
            depth_tokens=config.depth_tokens,
        )
        return cls(mapped, config, depth)

    @property
    def source(self) -> CellSource:
        return self.mapped.source

    @property
    def column_map(self) -> ColumnMap:
        return self.mapped.column_map

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
        batch, totals = self.mapped.pack(rows_csr, first_row=first_row, rows=rows, num_threads=num_threads)
        if not self.config.depth_tokens:
            return batch
        depth = self.target_depth
        try:
            return add_depth_tokens(
                batch, totals, num_genes=self.config.num_genes, target=depth.number, mode=depth.mode
            )
        except DepthBelowZero as error:
            row = first_row + (error.cell if rows is None else int(rows[error.cell]))
            raise BadNumbers(f"{self.source.name}: row {row} ({self.source.cell_name(row)}): {error}") from error

    def check_finite(self, numbers: npt.NDArray[np.float32], lengths: npt.NDArray[np.int32], rows: Any) -> None:
        """Refuse numbers of a model that are not finite, for cells that have genes: only empty cells have NaN.

        Args:
            numbers: (cells, ...) what the model made of them.
            lengths: (cells,) tokens of each.
            rows: (cells,) their rows in the source.
        """
        finite = np.isfinite(numbers.reshape(len(numbers), -1)).all(axis=1)
        broken = np.flatnonzero(~finite & (lengths > 0))
        if len(broken):
            row = int(rows[broken[0]])
            raise ValueError(
                f"{self.source.name}: row {row} ({self.source.cell_name(row)}): the model gives NaN or infinite "
                f"numbers for a cell with {lengths[broken[0]]:,} tokens; its weights are broken or too large: try "
                "dtype='float32' (--dtype float32), or another checkpoint"
            )

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
