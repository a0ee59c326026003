"""ModelCells: the cells of a data set as one model reads them, and the checks that come before any work."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from xtg_kernels import RaggedBatch, current_backend, dispatch
from xtrimogene.cells.sources import (
    DEPTH_TARGETS,
    CellSource,
    CsrArrays,
    add_depth_tokens,
    check_counts,
    map_genes,
    pack_rows_and_totals,
)
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.model import XTrimoGene
from xtrimogene.network.vocabulary import ColumnMap

# Cells that are read and packed at a time.
WINDOW = 1024
DEFAULT_TARGET_DEPTH = 4.0


@dataclass(frozen=True)
class TargetDepth:
    """What the token T tells a model with depth tokens: the log10 total that is aimed at.

    mode "value": T = number; "fold": T = log10(total * number); "offset": T = log10(total) + number.
    """

    mode: str
    number: float

    @classmethod
    def parse(cls, given: float | str) -> TargetDepth:
        """From a number (a value), or text such as "4.0", "fold:2" or "offset:0.5". Raises ValueError for all else."""
        mode, _, number = str(given).rpartition(":")
        with contextlib.suppress(ValueError):
            depth = cls(mode or "value", float(number))
            if math.isfinite(depth.number) and depth.mode in DEPTH_TARGETS and (mode != "fold" or depth.number > 0):
                return depth
        raise ValueError(
            "target_depth: expected the log10 total to aim at, such as 4.0, or fold:2 (twice the cell's total), or "
            f"offset:0.5 (added to its log10 total), got {given!r}"
        )


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
        cls, source: CellSource, network: XTrimoGene, *, normalized: bool, target_depth: float | str
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

        Raises ValueError that names the source, row and column of a bad number.
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
            raise ValueError(f"{self.source.name}: {error}") from error
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


def choose_device(device: str | torch.device) -> torch.device:
    """The device asked for, the GPU if there is one for "auto". Raises ValueError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or another of torch, got {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is there, got {device!r}, and torch finds no GPU; use 'cpu'")
    return torch.empty(0, device=chosen).device  # "cuda" as "cuda:0", as parameters report it


def backend_name(device: torch.device) -> str:
    """The backend that ops take on a device."""
    if current_backend() != "auto":
        return current_backend()
    if device.type != "cpu":
        return "triton"
    return "reference" if dispatch.extension() is None else "cpp"


@contextlib.contextmanager
def prepared(network: XTrimoGene, device: torch.device, dtype: torch.dtype) -> Iterator[XTrimoGene]:
    """The model on a device, in a dtype and in evaluation mode; the caller's own model is as before afterwards."""
    parameter = next(network.parameters())
    if parameter.device != device or parameter.dtype != dtype:
        network = copy.deepcopy(network).to(device=device, dtype=dtype)
    training = network.training
    network.eval()
    try:
        # Not inference_mode: its tensors do not count their changes, and the GPU kernels would list the blocks of a
        # batch anew in every layer.
        with torch.no_grad():
            yield network
    finally:
        network.train(training)
