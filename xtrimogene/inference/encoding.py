"""Encoding: one pass of a model's encoder over the cells of a data set, window by window, and the report of it."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor
from tqdm import tqdm

from xtg_kernels import RaggedBatch
from xtrimogene.cells.matrix import CsrArrays
from xtrimogene.cells.packing import split_by_tokens
from xtrimogene.inference.model_cells import ModelCells, of_columns
from xtrimogene.network.model import XTrimoGeneNetwork

Embeddings = npt.NDArray[np.float32]


@dataclass
class EmbedReport:
    """What one run of embed did.

    cells             cells of the data set
    empty_cells       cells without any gene of the vocabulary: their embedding is NaN
    resumed_cells     cells whose shards an earlier, interrupted run had finished
    tokens            expressed vocabulary genes that went through the encoder in this run
    genes_found       genes of the vocabulary that the data set has, out of ``vocabulary_size``
    columns_left_out  columns of the data set that are no genes by ``var["feature_types"]``
    genes_renamed     columns that the table of aliases has mapped
    old_names         columns that are unknown under their old name and would not be under the new one
    seconds_reading, seconds_packing, seconds_encoder, seconds
                      wall time of the parts and of the whole
    dtype, device, backend
                      what the encoder ran in, on and with
    bfloat16_error    dtype="auto" on a machine with bfloat16: the error that it measured and decided by, else None
    embedding         (cells, dim) float32, None when it was written to a file
    """

    cells: int
    vocabulary_size: int
    genes_found: int
    dtype: str
    device: str
    backend: str
    columns_left_out: int = 0
    genes_renamed: int = 0
    old_names: int = 0
    empty_cells: int = 0
    resumed_cells: int = 0
    tokens: int = 0
    seconds_reading: float = 0.0
    seconds_packing: float = 0.0
    seconds_encoder: float = 0.0
    seconds: float = 0.0
    bfloat16_error: float | None = None
    embedding: Embeddings | None = dataclasses.field(default=None, repr=False)

    @property
    def cells_per_second(self) -> float:
        """Cells of this run by its whole wall time."""
        return (self.cells - self.resumed_cells) / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        resumed = f" ({self.resumed_cells:,} of them by an earlier run)" if self.resumed_cells else ""
        return (
            f"{self.cells:,} cells{resumed}, {self.empty_cells:,} of them empty, {self.tokens:,} tokens, "
            f"{self.genes_found:,} of {self.vocabulary_size:,} vocabulary genes found"
            f"{of_columns(self.columns_left_out, self.genes_renamed, self.old_names)}\n"
            f"{self.seconds:.1f} s (reading {self.seconds_reading:.1f}, packing {self.seconds_packing:.1f}, "
            f"encoder {self.seconds_encoder:.1f}), {self.cells_per_second:,.0f} cells/s, "
            f"{self.dtype}{self._reason()} on {self.device}, backend {self.backend}"
        )

    def _reason(self) -> str:
        if self.bfloat16_error is None:
            return ""
        return f" (bfloat16 moves cells by {self.bfloat16_error:.1%} of their spread)"


@dataclass
class Encoding:
    """One pass of a model over cells.

    window  cells that are read, packed and sorted by length together
    """

    cells: ModelCells
    network: XTrimoGeneNetwork
    pooling: str
    max_tokens: int
    window: int
    num_threads: int | None
    report: EmbedReport
    bar: tqdm

    @property
    def width(self) -> int:
        """Numbers of one embedding."""
        return self.network.config.embedding_dim(self.pooling)

    def rows_of(self, batch: RaggedBatch) -> Tensor:
        """(batch, width) float32: what is kept of each cell, NaN for a cell without genes; here its embedding."""
        return self.network.embed_batch(batch, self.pooling)

    def windows(self) -> list[tuple[int, int]]:
        return self.cells.windows(self.window)

    def read(self, start: int, stop: int) -> CsrArrays:
        """The rows of one window."""
        clock = time.perf_counter()
        rows = self.cells.source.read_rows(start, stop)
        self.report.seconds_reading += time.perf_counter() - clock
        return rows

    def embed_rows(self, start: int, window: CsrArrays) -> Embeddings:
        """(rows, width) embeddings of the rows of one window, the first of which is row start of the data set.

        Cells go through the encoder sorted by length: attention costs the square of the length, and batches of like
        cells take about as long as one another.
        """
        report = self.report
        clock = time.perf_counter()
        order = np.argsort(np.diff(window[0]), kind="stable").astype(np.int64)
        packed = self.cells.pack(window, rows=order, num_threads=self.num_threads, first_row=start)
        report.seconds_packing += time.perf_counter() - clock

        clock = time.perf_counter()
        device = next(self.network.parameters()).device
        embeddings = np.empty((len(order), self.width), np.float32)
        for first, last, batch in split_by_tokens(packed, self.max_tokens):
            rows = self.rows_of(batch.to(device)).cpu().numpy()
            self.cells.check_finite(rows, batch.lengths.numpy(), start + order[first:last])
            embeddings[order[first:last]] = rows
            self.bar.update(last - first)
        report.seconds_encoder += time.perf_counter() - clock
        report.tokens += int((packed.gene_ids < self.network.config.num_genes).sum())
        return embeddings
