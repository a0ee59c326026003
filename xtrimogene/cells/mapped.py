"""MappedCells: the cells of a source in the genes of a vocabulary, every number of them looked at as it is packed."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtg_kernels import RaggedBatch
from xtrimogene.cells.aliases import Aliases
from xtrimogene.cells.genes import map_genes, warn_of_genes
from xtrimogene.cells.kinds import ValueKind
from xtrimogene.cells.matrix import CsrArrays
from xtrimogene.cells.numbers import LogScale, check_logged, check_numbers, check_totals, read_totals, refused, without
from xtrimogene.cells.packing import LEFT_OUT, pack_rows_and_totals
from xtrimogene.cells.sources import CellSource
from xtrimogene.network.vocabulary import ColumnMap, Vocabulary


@dataclass
class MappedCells:
    """Cells of a source, their genes found in a vocabulary, their numbers of a kind.

    total_counts  column of obs with the cells' totals, None for the sums of their counts
    totals        (n_obs,) what it holds
    scale         what looks at every cell whose values are log-normalised already
    thinned       whether the counts are thinned in training
    rounded       whether numbers that were whole but for rounding have been met, and told
    """

    source: CellSource
    column_map: ColumnMap
    kind: ValueKind
    target_sum: float
    total_counts: str | None
    totals: npt.NDArray[np.float64] | None
    scale: LogScale | None
    thinned: bool = False
    rounded: bool = False

    @classmethod
    def checked(
        cls,
        source: CellSource,
        vocabulary: Vocabulary,
        kind: ValueKind,
        *,
        total_counts: str | None = None,
        aliases: Aliases | str | os.PathLike[str] | None = None,
        target_sum: float = 1e4,
        depth_tokens: bool = False,
        thinned: bool = False,
    ) -> MappedCells:
        """Maps the genes and looks at a sample of the numbers, before any work.

        Raises ValueError that names the source and what to do; warns of what is likely to be wrong.
        """
        if aliases is not None and not isinstance(aliases, Aliases):
            aliases = Aliases.from_tsv(aliases)
        column_map = map_genes(source, vocabulary, normalized=kind.logged, aliases=aliases)
        totals = None if total_counts is None else read_totals(source, total_counts)
        scale = check_numbers(
            source, kind, target_sum=target_sum, depth_tokens=depth_tokens, thinned=thinned, total_counts=total_counts
        )
        warn_of_genes(source, vocabulary, column_map)
        return cls(source, column_map, kind, target_sum, total_counts, totals, scale, thinned)

    def digest(self) -> str | None:
        """Of what the cells are made of beside their rows and options: totals of obs, genes renamed. None: neither."""
        if self.totals is None and not self.column_map.renamed:
            return None
        digest = hashlib.sha256(repr(self.column_map.renamed).encode())
        if self.totals is not None:
            digest.update(self.totals.tobytes())
        return digest.hexdigest()[:16]

    def pack(
        self,
        rows_csr: CsrArrays,
        *,
        first_row: int,
        rows: npt.NDArray[np.int64] | None = None,
        normalize: bool | None = None,
        distinct: bool = True,
        num_threads: int | None = None,
    ) -> tuple[RaggedBatch, Tensor]:
        """The rows that source.read_rows gave, as a batch, and the cells' totals (batch,) float64: those of obs, or
        the sums over the genes of the vocabulary. Arguments as for packing.pack_rows; ``normalize`` False leaves
        counts as they are.

        Raises BadNumbers that names the source, row, cell, column and value of a number that is refused.
        """
        normalize = not self.kind.logged if normalize is None else normalize
        row_numbers = first_row + (np.arange(len(rows_csr[0]) - 1) if rows is None else rows)
        given = None if self.totals is None else self.totals[row_numbers]
        counts = self.kind.values == "counts"
        try:
            batch, sums = pack_rows_and_totals(
                rows_csr,
                self.column_map.gene_ids,
                rows=rows,
                normalized=not normalize,
                target_sum=self.target_sum,
                distinct=distinct,
                num_threads=num_threads,
                first_row=first_row,
                whole=self.kind.whole,
                cell_totals=given if counts else None,
                on_rounded=self._tell_rounded,
            )
        except ValueError as error:
            raise refused(self.source, error, self.thinned, rows_csr, first_row) from error
        if not self.kind.whole:
            seen = without(self.column_map.gene_ids == LEFT_OUT, rows_csr)
            if self.scale is None:
                check_logged(self.source, seen, first_row, self.target_sum)
            else:
                self.scale.check(seen, first_row)
        if given is None:
            return batch, sums
        assert self.total_counts is not None
        if counts:
            check_totals(self.source, self.total_counts, given, sums.numpy(), row_numbers)
        return batch, torch.from_numpy(given)

    def _tell_rounded(self) -> None:
        if not self.rounded:
            self.rounded = True
            warnings.warn(
                f"{self.source.name}: numbers that are whole but for rounding, as after a logarithm that was undone, "
                "are taken for the whole ones",
                stacklevel=6,
            )
