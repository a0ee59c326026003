"""What a task is that is measured, and ragged shapes for it from real cell lengths. A task is data, not a class tree.

Cell lengths are those of cell_lengths.json (genes of the 19,264-gene vocabulary with a count, in 906 real cells); which
of them make a case is drawn with a fixed seed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CELL_LENGTHS = Path(__file__).with_name("cell_lengths.json")
NUM_GENES = 19_264
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Provider:
    """One way to do a task: ``run()`` makes the output from tensors that ``inputs`` (those with gradients) are of."""

    run: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """One case in one dtype, done by several providers on the same numbers.

    providers     name -> Provider; "plain" is the baseline of every ratio and error
    grad_out      gradient of the output
    exact         the output and gradients in float64: () -> (out rows, gradients in the order of inputs)
    checked_rows  how many first rows ``exact`` computes; each cell is right or wrong by itself
    flops         closed-form FLOPs of each direction
    plain_again   the plain provider with its sums in other orders: how far rounding alone takes it. Where a rounding
                  moves a row across the kink of a ReLU its gradient changes by the whole, so one run says little
    moves         whether it moves memory and little else: rows then say its share of the rate of a copy of the output
    """

    benchmark: str
    case: str
    lengths: Lengths
    dtype: str
    providers: dict[str, Provider]
    grad_out: Tensor
    exact: Callable[[], tuple[Tensor, list[Tensor]]]
    checked_rows: int
    flops: dict[str, int]
    plain_again: tuple[Provider, ...] = ()
    moves: bool = False


def real_lengths(count: int, seed: int = 0) -> Lengths:
    """Lengths of ``count`` different real cells."""
    known = json.loads(CELL_LENGTHS.read_text(encoding="utf-8"))["lengths"]
    return tuple(int(n) for n in np.random.default_rng(seed).choice(known, count, replace=False))


def short_lengths(count: int, seed: int = 0) -> Lengths:
    """Cells of 20 to 120 genes, as targeted panels and very shallow sequencing give."""
    return tuple(int(n) for n in np.random.default_rng(seed).integers(20, 121, count))


def offsets(lengths: Lengths) -> Tensor:
    """cu_seqlens (batch + 1,) int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def umi_counts(lengths: Lengths, num_genes: int = NUM_GENES) -> tuple[np.ndarray, np.ndarray]:
    """Counts and gene ids (both (total_nnz,) int32) of cells of these lengths; ids ascend within a cell.

    Counts follow a heavy-tailed law (Zipf, exponent 2): six in ten are 1, a few are hundreds, as in UMI data.
    """
    rng = np.random.default_rng(0)
    counts = np.minimum(rng.zipf(2.0, sum(lengths)), 5000).astype(np.int32)
    gene_ids = [np.sort(rng.choice(num_genes, length, replace=False)) for length in lengths]
    return counts, np.concatenate(gene_ids).astype(np.int32)


def with_both(forward: int, backward: int) -> dict[str, int]:
    """FLOPs of each direction."""
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}
