"""Screen: the cells of a perturbation screen, read as the mean change that each perturbation makes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from anndata import AnnData
from scipy import sparse

from xtrimogene.cells.genes import columns_left_out
from xtrimogene.cells.kinds import ValueKind
from xtrimogene.cells.mapped import MappedCells
from xtrimogene.cells.sources import CellSource, open_cells
from xtrimogene.network.vocabulary import Vocabulary
from xtrimogene.progress import progress_bar
from xtrimogene.tasks.conditions import Perturbation, control_of, name_of, perturbations_of
from xtrimogene.tasks.splits import column_of

Array = npt.NDArray[Any]
_WINDOW = 1024
CONTROL = -1
_TARGET_SUM = 1e4


@dataclass(eq=False)
class Screen:
    """A screen whose conditions are known and whose numbers are not read yet.

    cells          what reads them: log1p(count / total * 10,000)
    genes          names of the measured genes
    control        label of the control cells
    perturbations  in alphabetical order of their names, those with enough cells
    few            perturbations that are left out, for they have too few cells
    condition      (n_obs,) position in perturbations, -1 control, -2 left out
    group          (n_obs,) position in groups
    groups         values of the column of groups, such as cell lines; one without it
    """

    cells: MappedCells
    genes: tuple[str, ...]
    control: str
    perturbations: list[Perturbation]
    few: list[Perturbation]
    condition: Array
    group: Array
    groups: list[str]

    @property
    def source(self) -> CellSource:
        return self.cells.source

    def rows_of(self, condition: int) -> Array:
        """Rows of the cells of a perturbation by its position, or of the control, -1."""
        return np.flatnonzero(self.condition == condition)

    def drawn(self, one_in: int, seed: Sequence[int]) -> Array:
        """(n_obs,) 1 for one in so many cells of each perturbation, one at least, else 0."""
        found = np.zeros(self.source.n_obs, np.int64)
        rng = np.random.default_rng(seed)
        for number in range(len(self.perturbations)):
            rows = rng.permutation(self.rows_of(number))
            found[rows[: max(1, len(rows) // one_in)]] = 1
        return found

    def read(self, rows: Array, genes: Array | None = None) -> Iterator[tuple[Array, sparse.csr_matrix]]:
        """Windows of some ascending rows: (n,) the rows and (n, genes) what they hold, log-normalised."""
        for start in range(0, self.source.n_obs, _WINDOW):
            stop = min(start + _WINDOW, self.source.n_obs)
            own = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
            if len(own):
                batch, _ = self.cells.pack(
                    self.source.read_rows(start, stop), first_row=start, rows=own - start, distinct=False
                )
                matrix = sparse.csr_matrix(
                    (batch.values.numpy(), batch.gene_ids.numpy(), batch.cu_seqlens.numpy()),
                    shape=(len(own), len(self.genes)),
                )
                yield own, matrix if genes is None else matrix[:, genes]

    def dense(self, rows: Array, genes: Array | None = None) -> npt.NDArray[np.float32]:
        """(rows, genes) float32 of a few ascending rows."""
        found = [matrix.toarray() for _, matrix in self.read(rows, genes)]
        width = len(self.genes if genes is None else genes)
        return np.concatenate([np.zeros((0, width), np.float32), *found])

    def sums(self, part: Array, parts: int, *, progress: bool = True) -> Sums:
        """Sums over the cells of each condition, group and part; part (n_obs,) numbers from 0."""
        shape = (len(self.perturbations) + 1, len(self.groups), parts)
        place = np.ravel_multi_index((self.condition.clip(min=CONTROL) + 1, self.group, part), shape)
        totals = np.zeros((int(np.prod(shape)), len(self.genes)))
        squares = np.zeros((shape[0], len(self.genes)))
        counts = np.zeros(len(totals), np.int64)
        rows = np.flatnonzero(self.condition >= CONTROL)
        with progress_bar(len(rows), unit="cell", desc="read screen", disable=not progress) as bar:
            for own, matrix in self.read(rows):
                matrix = matrix.astype(np.float64)
                counts += np.bincount(place[own], minlength=len(counts))
                totals += (_adder(place[own], len(totals)) @ matrix).toarray()
                squares += (_adder(self.condition[own] + 1, len(squares)) @ matrix.multiply(matrix)).toarray()
                bar.update(len(own))
        return Sums(counts.reshape(shape), totals.reshape(*shape, -1), squares)


@dataclass(eq=False)
class Sums:
    """Sums over cells. Conditions are in the order of Screen.perturbations, after the control.

    counts   (1 + perturbations, groups, parts) cells
    totals   (1 + perturbations, groups, parts, genes) float64, of their log-normalised values
    squares  (1 + perturbations, genes) float64, of the squares of these
    """

    counts: Array
    totals: Array
    squares: Array

    def changes(self, parts: tuple[int, ...]) -> Array:
        """(perturbations, genes) mean of the cells of some parts less that of all control cells; where there are
        groups, in each of them, and the mean weighs the groups as the cells of the perturbation lie in them."""
        # A group without control cells has none of perturbations either.
        control = self.totals[0].sum(1) / self.counts[0].sum(1)[:, None].clip(min=1)
        counts, totals = self.counts[1:][:, :, parts].sum(2), self.totals[1:][:, :, parts].sum(2)
        return (totals.sum(1) - np.einsum("pg,gn->pn", counts, control)) / counts.sum(1)[:, None]

    def variances(self, perturbations: Array) -> Array:
        """(genes,) variance over the control cells and those of some perturbations."""
        conditions = np.concatenate([[0], perturbations + 1])
        cells = self.counts[conditions].sum()
        mean = self.totals[conditions].sum((0, 1, 2)) / cells
        return self.squares[conditions].sum(0) / cells - mean**2


@contextlib.contextmanager
def open_screen(
    data: AnnData | str | os.PathLike[str],
    *,
    condition: str,
    control: str | None,
    known: Collection[str] = (),
    group: str | None = None,
    min_cells: int = 10,
    layer: str | None = None,
    gene_symbols: str | None = None,
    normalized: bool = False,
    values: str | None = None,
    fractional_counts: bool = False,
    total_counts: str | None = None,
) -> Iterator[Screen]:
    """Open a screen and read its conditions, before any number is read.

    Args:
        data: cells, as for embed.
        condition: column of obs with the perturbed genes of each cell, see conditions.
        control: label of the control cells in it, None for the only one that goes by a name of controls.
        known: names of genes beside the measured ones, by which labels are told apart.
        group: column of obs, such as a cell line or a batch: changes are taken within each.
        min_cells: perturbations of fewer cells are left out.
        layer, gene_symbols, normalized, values, fractional_counts, total_counts: as for embed.

    Raises ValueError, OSError that says in a line what is wrong with the data or the labels, and what to do.
    """
    if min_cells < 2:
        raise ValueError(f"min_cells: expected at least 2, so that some can be kept back, got {min_cells}")
    kind = ValueKind.checked(values, normalized, fractional_counts)
    with open_cells(data, layer=layer, gene_symbols=gene_symbols) as source:
        labels = np.char.strip(column_of([source], condition, "condition").astype(str))
        genes = _measured(source)
        label = control_of(set(labels.tolist()), control, column=condition)
        meanings = perturbations_of(labels.tolist(), {*genes, *known}, label, column=condition)
        names, place = np.unique(labels, return_inverse=True)
        meaning = [meanings[name] for name in names.tolist()]
        counts: dict[Perturbation, int] = {}
        for perturbation, cells in zip(meaning, np.bincount(place).tolist(), strict=True):
            counts[perturbation] = counts.get(perturbation, 0) + cells
        kept = sorted((each for each in counts if each and counts[each] >= min_cells), key=name_of)
        if len(kept) < 2:
            raise ValueError(
                f"condition: expected at least two perturbations of at least {min_cells} cells in obs[{condition!r}], "
                f"got {len(kept)}; give more cells, or a smaller min_cells (--min-cells)"
            )
        position = {(): CONTROL, **{each: number for number, each in enumerate(kept)}}
        conditions = np.array([position.get(each, -2) for each in meaning])[place]
        one = np.zeros(len(labels), int)
        groups, group_of = np.unique(
            one if group is None else column_of([source], group, "group").astype(str), return_inverse=True
        )
        for number, each in enumerate(groups.tolist()):
            own = conditions[group_of == number]
            if np.any(own >= 0) and not np.any(own == CONTROL):
                raise ValueError(
                    f"group: expected control cells in every group, got none in obs[{group!r}] == {each!r}; changes "
                    "are taken within groups: take these cells out, or leave group out (--group)"
                )
        mapped = MappedCells.checked(source, Vocabulary(genes), kind, total_counts=total_counts, target_sum=_TARGET_SUM)
        yield Screen(
            mapped,
            genes,
            label,
            kept,
            sorted((each for each in counts if each and counts[each] < min_cells), key=name_of),
            conditions,
            group_of,
            [str(each) for each in groups.tolist()],
        )


def _measured(source: CellSource) -> tuple[str, ...]:
    """The names of the columns that are genes."""
    left_out = columns_left_out(source.var)
    names = [str(name) for name, left in zip(source.var_names, left_out, strict=True) if not left]
    distinct = tuple(dict.fromkeys(name for name in names if name))
    if not distinct:
        raise ValueError(f"{source.name}: expected columns with names of genes, got none")
    return distinct


def _adder(place: Array, rows: int) -> sparse.csr_matrix:
    """(rows, n) matrix that adds up n rows where they belong."""
    return sparse.csr_matrix((np.ones(len(place)), (place, np.arange(len(place)))), shape=(rows, len(place)))
