"""The cells that `xtrimogene bench` takes its lengths and values from: those of the project, or those of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from xtg_kernels import RaggedBatch, distinct_index
from xtrimogene.bench.tasks import CELL_LENGTHS, NUM_GENES, offsets, umi_counts
from xtrimogene.cells.genes import map_genes
from xtrimogene.cells.numbers import looks_like_counts
from xtrimogene.cells.packing import pack_rows
from xtrimogene.cells.sources import open_cells
from xtrimogene.network.vocabulary import Vocabulary

Lengths = npt.NDArray[np.int64]
WINDOW = 1024


@dataclass(frozen=True)
class Cells:
    """Expressed genes and distinct values of every cell, and the cells themselves in batches.

    source     one sentence on where they come from
    num_genes  genes of the vocabulary
    lengths    (cells,) expressed genes of each cell, at least one
    distinct   (cells,) distinct values of each cell
    batch      numbers of cells -> RaggedBatch of these
    """

    source: str
    num_genes: int
    lengths: Lengths
    distinct: Lengths
    batch: Callable[[Sequence[int]], RaggedBatch]

    def shuffled(self) -> list[int]:
        """Numbers of all cells in the order in which they are taken; the same in every run."""
        return np.random.default_rng(0).permutation(len(self.lengths)).tolist()


def known_cells() -> Cells:
    """The committed lengths of real cells, with UMI-like counts drawn for them."""
    known = json.loads(CELL_LENGTHS.read_text(encoding="utf-8"))
    lengths = np.asarray(known["lengths"], dtype=np.int64)
    counts, gene_ids = umi_counts(tuple(lengths.tolist()))
    ends = np.cumsum(lengths)
    cells = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def batch(chosen: Sequence[int]) -> RaggedBatch:
        values = [np.log1p(counts[cells[i]] / counts[cells[i]].sum() * 1e4).astype(np.float32) for i in chosen]
        return _batch(values, [gene_ids[cells[i]] for i in chosen])

    distinct = np.asarray([len(np.unique(counts[cell])) for cell in cells], dtype=np.int64)
    law = "their counts are drawn from a heavy-tailed law (Zipf, exponent 2)"
    source = f"{len(lengths):,} real cells ({known['source']}); {law}"
    return Cells(source, NUM_GENES, lengths, distinct, batch)


def cells_of_file(
    path: str | Path,
    *,
    vocabulary: Vocabulary | None = None,
    layer: str | None = None,
    gene_symbols: str | None = None,
) -> Cells:
    """The cells of an h5ad file or zarr store; without a vocabulary, its own genes are the vocabulary.

    Reads the file once, by windows of rows. Cells without any gene of the vocabulary are left out.
    Raises what xtrimogene.data.open_cells and map_genes raise, and ValueError where no cell is left.
    """
    with open_cells(path, layer=layer, gene_symbols=gene_symbols) as source:
        genes = vocabulary or Vocabulary(dict.fromkeys(source.var_names))
        columns = map_genes(source, genes).gene_ids
        normalized = not looks_like_counts(source)
        lengths, distinct = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for start in range(0, source.n_obs, WINDOW):
            rows = source.read_rows(start, min(start + WINDOW, source.n_obs))
            packed = pack_rows(rows, columns, normalized=normalized, first_row=start)
            index = packed.distinct_index
            assert index is not None
            first = (index == torch.arange(len(index))).numpy()
            ends = packed.cu_seqlens.numpy()
            sums = np.concatenate([[0], np.cumsum(first)])
            lengths.append(np.diff(ends).astype(np.int64))
            distinct.append(sums[ends[1:]] - sums[ends[:-1]])
    all_lengths = np.concatenate(lengths)
    kept = np.flatnonzero(all_lengths)
    if not len(kept):
        raise ValueError(f"{path}: expected cells with expressed genes of the vocabulary, got none")

    def batch(chosen: Sequence[int]) -> RaggedBatch:
        with open_cells(path, layer=layer, gene_symbols=gene_symbols) as source:
            packed = [
                pack_rows(source.read_rows(row, row + 1), columns, normalized=normalized, first_row=row)
                for row in kept[list(chosen)].tolist()
            ]
        return _batch([cell.values.numpy() for cell in packed], [cell.gene_ids.numpy() for cell in packed])

    empty = len(all_lengths) - len(kept)
    source_text = f"{len(kept):,} cells of {Path(path).name}, {len(genes):,} genes" + (
        f" ({empty:,} cells without any of them left out)" if empty else ""
    )
    return Cells(source_text, len(genes), all_lengths[kept], np.concatenate(distinct)[kept], batch)


def _batch(values: Sequence[npt.NDArray[np.float32]], gene_ids: Sequence[npt.NDArray[np.int32]]) -> RaggedBatch:
    lengths = tuple(len(cell) for cell in values)
    packed, cu_seqlens = torch.from_numpy(np.concatenate(values)), offsets(lengths)
    ids = torch.from_numpy(np.concatenate(gene_ids).astype(np.int32))
    return RaggedBatch(packed, ids, cu_seqlens, max(lengths), distinct_index(packed, cu_seqlens))
