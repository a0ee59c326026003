"""TrainingCells: many files of cells as masked batches, streamed in an order that is a function of (seed, epoch) alone.

An epoch takes blocks of consecutive rows in a shuffled order, a window of several blocks at a time, and shuffles the
cells of a window. Only the windows in use are in memory. What is the same whatever the number of processes, and after
any interruption: the order of the cells, the cells of each batch, and the masks.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import resource
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from anndata import AnnData

from xtg_kernels import RaggedBatch
from xtrimogene.cells.aliases import Aliases
from xtrimogene.cells.data_sets import Data, expand_data
from xtrimogene.cells.kinds import ValueKind
from xtrimogene.cells.mapped import MappedCells
from xtrimogene.cells.masking import MaskingConfig, hash_words, hashed_keys, mask_cells, mask_counts
from xtrimogene.cells.order import Array, Cells, Order
from xtrimogene.cells.prefetch import prefetched
from xtrimogene.cells.ragged import joined, taken
from xtrimogene.cells.sources import CellSource, open_cells
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.vocabulary import Vocabulary
from xtrimogene.progress import progress_bar

# What a hash is for; the words differ, so that the uses of one seed have nothing to do with one another.
_BLOCKS, _CELLS, _VALIDATION = 1, 2, 3

# Masks of validation cells are those of this epoch, always, so that losses can be compared.
VALIDATION_EPOCH = 0

# Rows between two that are wanted, up to which one read is cheaper than two.
_GAP = 16

# Share of the files that this process may have open which the cells may take.
_OPEN_SHARE = 4

# Rows in memory while the genes of all cells are counted.
_COUNTED_ROWS = 1024


class TrainingCells:
    """The cells of several data sets for pre-training: checked, counted, split, shuffled, batched and masked.

    Opening checks all that can be known before training starts: every file is opened, its genes are found in the
    vocabulary, and then every cell is read once, because the number of its genes decides whether and in which batch it
    is, and every number is looked at. Broken files and bad numbers stop here, by name. What breaks later stops
    the iteration with the name of the file and its rows.

    Cells are numbered through all data sets in the order given, files of a folder by name. A cell with at most
    ``min_genes`` expressed genes of the vocabulary is left out. Of the others a share is kept for validation.

    Memory: 12 bytes a cell and the row offsets of the files, and three windows of cells.

    Args:
        data: AnnData, files or stores of cells (see open_cells), folders of these, or several of them.
        vocabulary: its genes; what the files lack is zero.
        layer, gene_symbols, aliases, normalized, values, fractional_counts, total_counts: as for embed; the same for
            all data sets.
        masking: how genes are chosen.
        depth_tokens: read-depth training, see masking.mask_counts; needs raw counts, whole ones, of the whole cell.
        target_sum: counts of a cell are scaled to this total.
        min_genes: cells with at most so many expressed genes are left out; 200 in the published recipe.
        seed: of the order of the cells.
        validation_share: share of the cells that is never trained on, a function of (split_seed, number of the cell).
        max_validation_cells: most cells that validation() reads, always the same ones; None for all of the share.
        batch_tokens: most expressed genes of a batch, before masking.
        batch_cells: most cells of a batch.
        cost: (constant, linear, quadratic): a cell of L expressed genes costs constant + linear * L + quadratic * L^2.
            The batches of a step are made to cost about the same.
        block_size: consecutive rows that are read together.
        window_blocks: blocks whose cells are mixed.
        prefetch: batches that a background thread has ready; 0 for no threads.
        num_threads: threads of the packer, None for torch.get_num_threads(). No result depends on it.
        genes_per_cell: what an earlier object found for the same data, to count nothing again.
        progress: show a progress bar while genes are counted.

    Attributes:
        sources: the open data sets.
        genes_per_cell: (num_cells,) int32, expressed genes of the vocabulary.
        training, validation_cells: (n,) int64, numbers of the cells, ascending.

    Raises:
        FileNotFoundError: no such file, or a folder without one.
        ValueError: a file that is broken or does not fit, a bad argument, or no cell left; names file or argument.
    """

    def __init__(
        self,
        data: Data | Sequence[Data],
        vocabulary: Vocabulary,
        *,
        layer: str | None = None,
        gene_symbols: str | None = None,
        aliases: str | os.PathLike[str] | None = None,
        normalized: bool = False,
        values: str | None = None,
        fractional_counts: bool = False,
        total_counts: str | None = None,
        masking: MaskingConfig | None = None,
        depth_tokens: bool = False,
        target_sum: float = 1e4,
        min_genes: int = 200,
        seed: int = 0,
        validation_share: float = 0.05,
        split_seed: int = 0,
        max_validation_cells: int | None = None,
        batch_tokens: int = 65_536,
        batch_cells: int | None = None,
        cost: tuple[float, float, float] = (0.0, 1.0, 0.0),
        block_size: int = 256,
        window_blocks: int = 16,
        prefetch: int = 2,
        num_threads: int | None = None,
        genes_per_cell: npt.NDArray[np.int32] | None = None,
        progress: bool = True,
    ) -> None:
        _check_at_least(0, min_genes=min_genes, seed=seed, split_seed=split_seed, prefetch=prefetch)
        _check_at_least(1, batch_tokens=batch_tokens, block_size=block_size, window_blocks=window_blocks)
        if batch_cells is not None:
            _check_at_least(1, batch_cells=batch_cells)
        if max_validation_cells is not None:
            _check_at_least(0, max_validation_cells=max_validation_cells)
        if not 0 <= validation_share < 1:
            raise ValueError(f"validation_share: expected 0 <= share < 1, got {validation_share}")
        if len(cost) != 3 or not all(math.isfinite(part) and part >= 0 for part in cost) or sum(cost) == 0:
            raise ValueError(f"cost: expected three numbers of at least 0 and not all 0, got {cost}")
        self.kind = ValueKind.checked(values, normalized, fractional_counts)
        if depth_tokens and self.kind.logged:
            raise ValueError(
                f"{'normalized' if normalized else 'values'}: expected raw counts with depth_tokens=True, got "
                f"{'normalized=True' if normalized else repr(values)}"
            )
        if depth_tokens and not self.kind.whole:
            given = "fractional_counts=True" if fractional_counts else f"values={values!r}"
            raise ValueError(
                f"{given.partition('=')[0]}: expected whole counts with depth_tokens=True, which thins them, got "
                f"{given}; round them, or train a model without depth tokens"
            )
        if depth_tokens and total_counts is not None:
            raise ValueError(
                f"total_counts: expected none with depth_tokens=True, got {total_counts!r}: the total of a thinned "
                "cell is not known unless all its counts are; train on matrices of all genes, or without depth tokens"
            )
        self.vocabulary = vocabulary
        self.masking = MaskingConfig() if masking is None else masking
        self.depth_tokens, self.target_sum = depth_tokens, target_sum
        self.min_genes, self.seed = min_genes, seed
        self.batch_tokens, self.batch_cells, self.cost = batch_tokens, batch_cells, cost
        self.block_size, self.window_blocks, self.prefetch = block_size, window_blocks, prefetch
        self.num_threads = num_threads
        self.sources: list[CellSource] = []
        self._mapped: list[MappedCells] = []
        self._open_files = _OpenFiles()
        self._epoch: tuple[int, Order] | None = None
        try:
            self._open(data, layer, gene_symbols, aliases, total_counts)
            # Number of the first cell of each source, and past the last of all.
            self._first_cells = np.cumsum([0, *(source.n_obs for source in self.sources)])
            self.genes_per_cell = self._count_genes(progress) if genes_per_cell is None else genes_per_cell
            if self.genes_per_cell.shape != (self.num_cells,):
                raise ValueError(
                    f"genes_per_cell: expected one number for each of the {self.num_cells} cells, got shape "
                    f"{self.genes_per_cell.shape}; leave it out to count again"
                )
            self._split(validation_share, split_seed, max_validation_cells)
            self._check_longest_cell()
        except BaseException:
            self.close()
            raise

    def _open(
        self,
        data: Data | Sequence[Data],
        layer: str | None,
        gene_symbols: str | None,
        aliases: str | os.PathLike[str] | None,
        total_counts: str | None,
    ) -> None:
        table = None if aliases is None else Aliases.from_tsv(aliases)
        for each in expand_data(data):
            source = open_cells(each, layer=layer, gene_symbols=gene_symbols)
            self.sources.append(source)
            self._open_files.used(source)
            if isinstance(each, AnnData):
                source.name = f"AnnData {len(self.sources)}"
            mapped = MappedCells.checked(
                source,
                self.vocabulary,
                self.kind,
                total_counts=total_counts,
                aliases=table,
                target_sum=self.target_sum,
                thinned=self.depth_tokens,
            )
            self._mapped.append(mapped)

    def _count_genes(self, progress: bool) -> npt.NDArray[np.int32]:
        counts = np.empty(self.num_cells, np.int32)
        with progress_bar(self.num_cells, unit="cell", desc="count genes", disable=not progress) as bar:
            for file, source in enumerate(self.sources):
                for start in range(0, source.n_obs, _COUNTED_ROWS):
                    stop = min(start + _COUNTED_ROWS, source.n_obs)
                    packed = self._pack(file, start, stop, None, normalize=False)
                    first = self._first_cells[file]
                    counts[first + start : first + stop] = packed.lengths.numpy()
                    bar.update(stop - start)
        return counts

    def _split(self, share: float, split_seed: int, most: int | None) -> None:
        keys = hashed_keys(hash_words(split_seed, _VALIDATION)[0], self.num_cells)
        held_out = keys < np.uint64(share * 2.0**64)
        long_enough = self.genes_per_cell > self.min_genes
        self.training = np.flatnonzero(long_enough & ~held_out)
        validation = np.flatnonzero(long_enough & held_out)
        if most is not None:
            validation = np.sort(validation[np.argsort(keys[validation])[:most]])
        self.validation_cells = validation
        if not len(self.training):
            raise ValueError(
                f"{', '.join(source.name for source in self.sources)}: expected cells to train on with more than "
                f"min_genes = {self.min_genes} expressed genes of the vocabulary, got none among {self.num_cells:,}"
            )

    def _check_longest_cell(self) -> None:
        """Refuses batch_tokens below the longest cell before training."""
        for cells in (self.training, self.validation_cells):
            lengths = self.genes_per_cell[cells]
            if len(cells) and lengths.max() > self.batch_tokens:
                file, row = self._place(int(cells[np.argmax(lengths)]))
                source = self.sources[file]
                raise ValueError(
                    f"batch_tokens: expected room for the longest cell, got {self.batch_tokens:,}, and cell "
                    f"{source.cell_name(row)!r} (row {row}) of {source.name} expresses {lengths.max():,} vocabulary "
                    f"genes; raise batch_tokens to {lengths.max():,}"
                )

    @property
    def num_cells(self) -> int:
        """Cells of all data sets, those that are left out too."""
        return int(self._first_cells[-1])

    @property
    def genes_found(self) -> int:
        """Genes of the vocabulary that at least one data set has."""
        gene_ids = [mapped.column_map.gene_ids for mapped in self._mapped]
        found = [each[each >= 0] for each in gene_ids]
        return len(np.unique(np.concatenate(found)))

    def __str__(self) -> str:
        left_out = int(np.count_nonzero(self.genes_per_cell <= self.min_genes))
        return (
            f"{self.num_cells:,} cells of {len(self.sources):,} data sets: {len(self.training):,} for training, "
            f"{len(self.validation_cells):,} for validation, {left_out:,} left out with at most {self.min_genes:,} "
            f"expressed genes; {self.genes_found:,} of {len(self.vocabulary):,} vocabulary genes found"
        )

    @property
    def fingerprint(self) -> str:
        """Equal for objects that give the same batches: of the cells, the vocabulary and the options, not of paths."""
        digest = hashlib.sha256()
        options = (
            [source.n_obs for source in self.sources], self.kind.logged, self.depth_tokens, self.target_sum,
            self.masking, self.seed, self.batch_tokens, self.batch_cells, self.cost, self.block_size,
            self.window_blocks, self.vocabulary.genes,
        )  # fmt: skip
        digest.update(repr(options).encode())
        for array in (self.genes_per_cell, self.training, self.validation_cells):
            digest.update(np.ascontiguousarray(array).tobytes())
        for mapped in self._mapped:
            digest.update((mapped.digest() or "").encode())
        return digest.hexdigest()

    def num_steps(self, epoch: int, *, world_size: int = 1, accumulate: int = 1) -> int:
        """Steps of an epoch: the same for every rank."""
        return len(self._order(epoch).steps(world_size * accumulate)) - 1

    def iterate(
        self, epoch: int, start_step: int = 0, *, rank: int = 0, world_size: int = 1, accumulate: int = 1
    ) -> Generator[MaskedBatch, None, None]:
        """The masked batches of one rank in one epoch, from a step on: ``accumulate`` of them, one after the other, a
        step.

        The cells of a step go to world_size * accumulate batches of about equal cost, and each to one of them, so that
        a step has the same batches for 2 ranks as for 1 rank that accumulates 2. Every batch keeps to batch_tokens and
        batch_cells and has at least one cell. The batches from ``start_step`` on are those of an uninterrupted epoch,
        bit for bit, and no window before theirs is read.

        An epoch has every training cell once. (Where batches have room for few cells, fewer cells than a step has
        batches may be over at the end; they are left out then.)

        Raises ValueError, also while iterating, for a file that has become unreadable; it names the file and the rows.
        """
        _check_at_least(0, epoch=epoch)
        return self._iterate(self._order(epoch), epoch, start_step, rank, world_size, accumulate)

    def validation(self, *, rank: int = 0, world_size: int = 1) -> Generator[MaskedBatch, None, None]:
        """The masked batches of one rank over the validation cells, in the order of the data, always masked alike."""
        return self.masked(self.validation_cells, VALIDATION_EPOCH, rank=rank, world_size=world_size)

    def masked(
        self, cells: Array, epoch: int, *, rank: int = 0, world_size: int = 1
    ) -> Generator[MaskedBatch, None, None]:
        """The masked batches of one rank over cells by their numbers, ascending, masked as in an epoch."""
        windows = np.arange(0, len(cells) + self._window_cells, self._window_cells).clip(max=len(cells))
        return self._iterate(self._ordered(cells, windows), epoch, 0, rank, world_size, 1)

    def read(self, cells: Array) -> RaggedBatch:
        """The log-normalised values of cells by their numbers, in the order given, not masked."""
        wanted, place = np.unique(np.asarray(cells, np.int64), return_inverse=True)
        if len(wanted) and not (wanted[0] >= 0 and wanted[-1] < self.num_cells):
            raise ValueError(f"cells: expected numbers from 0 to {self.num_cells - 1}, got {wanted[0]} to {wanted[-1]}")
        return taken(self._read(wanted), place)

    def close(self) -> None:
        """Close the files. Iterations have to be over, or closed, before."""
        for source in self.sources:
            source.close()

    def __enter__(self) -> TrainingCells:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _window_cells(self) -> int:
        return self.block_size * self.window_blocks

    def _order(self, epoch: int) -> Order:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1]

    def _shuffled(self, epoch: int) -> Order:
        """The training cells in the order of an epoch."""
        first_of_block = np.concatenate(
            [np.arange(first, stop, self.block_size) for first, stop in itertools.pairwise(self._first_cells)]
        )
        # A block ends where the next one begins; those of different data sets meet at a first cell of a data set.
        bounds = np.searchsorted(self.training, [*first_of_block, self.num_cells])
        order_of_blocks = np.argsort(hashed_keys(hash_words(self.seed, epoch, _BLOCKS)[0], len(first_of_block)))
        windows, begins = [], [0]
        for start in range(0, len(order_of_blocks), self.window_blocks):
            blocks = order_of_blocks[start : start + self.window_blocks]
            cells = np.concatenate([self.training[bounds[block] : bounds[block + 1]] for block in blocks.tolist()])
            windows.append(cells[np.argsort(hash_words(self.seed, epoch, _CELLS, cells))])
            begins.append(begins[-1] + len(cells))
        return self._ordered(np.concatenate(windows), np.array(begins))

    def _ordered(self, cells: Cells, windows: Array) -> Order:
        lengths = self.genes_per_cell[cells].astype(np.int64)
        return Order(cells, windows, lengths, self.batch_tokens, self.batch_cells, self.cost)

    def _iterate(
        self, order: Order, epoch: int, start_step: int, rank: int, world_size: int, accumulate: int
    ) -> Generator[MaskedBatch, None, None]:
        _check_at_least(1, world_size=world_size, accumulate=accumulate)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        steps = order.steps(world_size * accumulate)
        if not 0 <= start_step < len(steps):
            raise ValueError(f"start_step: expected 0 to {len(steps) - 1}, the steps of the epoch, got {start_step}")
        parts = range(rank * accumulate, (rank + 1) * accumulate)
        windows = self._windows(order, steps[start_step:], parts, world_size * accumulate)
        if not self.prefetch:
            return self._batches(windows, epoch)
        return prefetched(self._batches(prefetched(windows, 1), epoch), self.prefetch)

    def _windows(self, order: Order, steps: Array, parts: range, num_parts: int) -> Generator[_Window, None, None]:
        """Window after window, what the given parts of its steps need of it, read and packed."""
        for begin, end in itertools.pairwise(order.windows.tolist()):
            first = max(int(np.searchsorted(steps, begin, side="right")) - 1, 0)
            last = int(np.searchsorted(steps, end))
            batches, own = [], []
            for start, stop in itertools.pairwise(steps[first : last + 1].tolist()):
                part_of = order.parts(start, stop, num_parts)
                for part in parts:
                    positions = start + np.flatnonzero(part_of == part)
                    own.append(positions[(positions >= begin) & (positions < end)])
                    if stop <= end:
                        batches.append(order.cells[positions])
            cells = np.sort(order.cells[np.concatenate([np.zeros(0, np.int64), *own])])
            if len(cells) or batches:
                yield _Window(cells, self._read(cells, normalize=not self.depth_tokens), batches)

    def _batches(self, windows: Generator[_Window, None, None], epoch: int) -> Generator[MaskedBatch, None, None]:
        with contextlib.closing(windows):
            # Windows whose last steps end in a later one
            open_windows: list[_Window] = []
            for window in windows:
                open_windows.append(window)
                for cells in window.batches:
                    yield self._masked(open_windows, cells, epoch)
                if window.batches:
                    del open_windows[:-1]

    def _masked(self, windows: list[_Window], cells: Cells, epoch: int) -> MaskedBatch:
        packed, rows = _find(windows, cells)
        options: dict[str, Any] = {
            "epoch": epoch,
            "num_genes": len(self.vocabulary),
            "num_threads": self.num_threads,
        }
        if self.depth_tokens:
            counts = taken(packed, rows)
            return mask_counts(counts, cells, self.masking, target_sum=self.target_sum, **options)
        return mask_cells(packed, cells, self.masking, rows=rows, **options)

    def _place(self, cell: int) -> tuple[int, int]:
        """The data set of a cell and its row there."""
        file = int(np.searchsorted(self._first_cells, cell, side="right")) - 1
        return file, cell - int(self._first_cells[file])

    def _read(self, cells: Cells, *, normalize: bool = True) -> RaggedBatch:
        """Ascending cells, packed; neighbours are read together."""
        files = np.searchsorted(self._first_cells, cells, side="right") - 1
        ends = np.flatnonzero((np.diff(files) > 0) | (np.diff(cells) > _GAP)) + 1
        pieces = []
        for first, last in itertools.pairwise([0, *ends.tolist(), len(cells)]):
            if first == last:
                continue
            file = int(files[first])
            rows = cells[first:last] - self._first_cells[file]
            start, stop = int(rows[0]), int(rows[-1]) + 1
            pieces.append(self._pack(file, start, stop, rows - start, normalize=normalize))
        return joined(pieces)

    def _pack(self, file: int, start: int, stop: int, rows: Cells | None, *, normalize: bool) -> RaggedBatch:
        source = self.sources[file]
        rows_csr = source.read_rows(start, stop)
        self._open_files.used(source)
        return self._mapped[file].pack(
            rows_csr,
            first_row=start,
            rows=rows,
            normalize=normalize and not self.kind.logged,
            distinct=False,
            num_threads=self.num_threads,
        )[0]


class _OpenFiles:
    """Keeps no more files open than the process has room for: the one that was not read for longest is suspended."""

    def __init__(self) -> None:
        self.most = max(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _OPEN_SHARE)
        self._used: dict[int, CellSource] = {}
        self._lock = threading.Lock()

    def used(self, source: CellSource) -> None:
        with self._lock:
            self._used.pop(id(source), None)
            self._used[id(source)] = source
            if len(self._used) > self.most:
                self._used.pop(next(iter(self._used))).suspend()


@dataclass(frozen=True, eq=False)
class _Window:
    """Cells of a window that one rank needs, and its batches that end in the window.

    cells    (n,) ascending
    packed   RaggedBatch of these cells
    batches  cells of each batch
    """

    cells: Cells
    packed: RaggedBatch
    batches: list[Cells]


def _find(windows: list[_Window], cells: Cells) -> tuple[RaggedBatch, Array]:
    """A packed batch that holds the cells, and the row of each in it."""
    last = windows[-1]
    if np.all(np.isin(cells, last.cells)):
        return last.packed, np.searchsorted(last.cells, cells)
    pieces, found = [], []
    for window in windows:
        rows = np.flatnonzero(np.isin(window.cells, cells))
        pieces.append(taken(window.packed, rows))
        found.append(window.cells[rows])
    numbers = np.concatenate(found)
    by_number = np.argsort(numbers)
    return joined(pieces), by_number[np.searchsorted(numbers[by_number], cells)]


def _check_at_least(low: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
            raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}")
