"""Read depth as a model with depth tokens sees it: the tokens T and S, and what T aims at."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xtg_kernels import RaggedBatch, distinct_index

DEPTH_TARGETS = ("value", "fold", "offset")


@dataclass(frozen=True)
class TargetDepth:
    """What the token T tells a model with depth tokens: the log10 total that is aimed at.

    mode "value": T = number, above 0; "fold": T = log10(total * number); "offset": T = log10(total) + number.
    """

    mode: str
    number: float

    @classmethod
    def parse(cls, given: float | str) -> TargetDepth:
        """From a number (a value), or text such as "4.0", "fold:2" or "offset:0.5". Raises ValueError for all else."""
        mode, _, number = str(given).rpartition(":")
        with contextlib.suppress(ValueError):
            depth = cls(mode or "value", float(number))
            # To the published code a T of 0 or below is no token: it takes it for a gene that is not expressed.
            if math.isfinite(depth.number) and depth.mode in DEPTH_TARGETS and (mode == "offset" or depth.number > 0):
                return depth
        raise ValueError(
            "target_depth: expected the log10 total to aim at, above 0, such as 4.0, or fold:2 (twice the cell's "
            f"total), or offset:0.5 (added to its log10 total), got {given!r}"
        )


class DepthBelowZero(ValueError):
    """A token T or S of a cell of the batch would be negative: its total, or what is aimed at, is below 1."""

    def __init__(self, message: str, cell: int) -> None:
        super().__init__(message)
        self.cell = cell


def add_depth_tokens(
    batch: RaggedBatch, totals: Tensor, *, num_genes: int, target: float = 4.0, mode: str = "value"
) -> RaggedBatch:
    """The batch with the two read-depth tokens of scFoundation (Hao et al. 2024) at the end of each cell.

    First T, the log10 total that is aimed at, with gene id ``num_genes``; then S = log10(total), the cell's own, with
    gene id ``num_genes + 1``. A cell without a gene gets no tokens and stays empty.

    The published code drops tokens whose value is 0 or below. Here a value below 0, of a total below 1, is refused; a
    value of 0, of a cell with a single count, is a token like any other, so that every cell that has genes has both.

    Args:
        batch: cells without depth tokens and without slack rows.
        totals: (batch,) float, the total of each cell: its raw counts summed over the genes of the vocabulary, as
            pack_rows_and_totals gives them (the published code sums after it has mapped the genes, too), or what is
            known of the whole cell.
        num_genes: genes of the vocabulary, G.
        target: what T is, by ``mode``: "value" T = target; "fold" T = log10(total * target);
            "offset" T = log10(total) + target.

    Raises:
        ValueError: another mode, a fold that is not positive, a target that is not finite, totals that do not fit;
            DepthBelowZero, one of them, for a total or an aimed total below 1.
    """
    if mode not in DEPTH_TARGETS:
        raise ValueError(f"mode: expected one of {', '.join(DEPTH_TARGETS)}, got {mode!r}")
    if not math.isfinite(target) or (mode == "fold" and target <= 0):
        wanted = "a positive number for mode 'fold'" if mode == "fold" else "a finite number"
        raise ValueError(f"target: expected {wanted}, got {target}")
    if totals.shape != (batch.batch_size,):
        raise ValueError(f"totals: expected shape ({batch.batch_size},), one a cell, got {tuple(totals.shape)}")
    totals = totals.to(device=batch.values.device, dtype=torch.float64)
    if not bool(torch.all(torch.isfinite(totals) & (totals >= 0))):
        raise ValueError("totals: expected finite numbers of at least 0; give the sums of raw counts")
    has_tokens = batch.lengths.to(totals.device) > 0
    source = torch.log10(totals)
    if mode == "value":
        aimed = torch.full_like(source, target)
    else:
        aimed = source + (math.log10(target) if mode == "fold" else target)
    for name, values in (("S, the log10 of its total", source), ("T, the log10 total that is aimed at", aimed)):
        below = has_tokens & (values < 0)
        if bool(below.any()):
            cell = int(below.int().argmax())
            raise DepthBelowZero(
                f"the token {name}, would be {float(values[cell]):.3g}: expected a total of at least 1, as of counts; "
                "leave the cell out, or name other totals (total_counts) or another target_depth",
                cell,
            )

    lengths = batch.lengths + 2 * has_tokens.int()
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    moved = torch.repeat_interleave(cu_seqlens[:-1] - batch.cu_seqlens[:-1], batch.lengths.long())
    place = torch.arange(batch.total_nnz, device=moved.device) + moved
    ends = cu_seqlens[1:][has_tokens].long()
    total_nnz = batch.total_nnz + 2 * len(ends)
    values, gene_ids = batch.values.new_empty(total_nnz), batch.gene_ids.new_empty(total_nnz)
    values[place], gene_ids[place] = batch.values, batch.gene_ids
    values[ends - 2], gene_ids[ends - 2] = aimed[has_tokens].to(values.dtype), num_genes
    values[ends - 1], gene_ids[ends - 1] = source[has_tokens].to(values.dtype), num_genes + 1
    return RaggedBatch(
        values,
        gene_ids,
        cu_seqlens,
        int(lengths.max()) if len(lengths) else 0,
        None if batch.distinct_index is None else distinct_index(values, cu_seqlens),
    )
