"""The masking plan of pre-training: which genes of a cell are hidden, replaced or kept, and what the encoder sees.

Of the non-zero genes of a cell a share ``nonzero_rate`` is chosen, of the zero genes (all genes of the vocabulary that
the cell does not express, measured or not) a share ``zero_rate``. Of the chosen genes of each of the two groups
``mask_share`` are hidden from the encoder, ``random_share`` get a value drawn from the cell's own non-zero values, and
the rest keep theirs. The loss is taken at all chosen genes. (Gong et al., NeurIPS 2023; Hao et al., Nat. Methods 2024)

The choice is a pure function of (seed, epoch, number of the cell, gene), so that it does not depend on the batch, on
the number of workers, or on an interruption: a 64-bit hash gives every gene of a cell a key, the genes of a group are
ordered by their keys, and the first ``chosen`` of them are taken, the first ``masked`` of these are hidden, the next
``random`` replaced. Keys of a cell are distinct, because the last step of the hash is a bijection. With n genes in the
group, and round() to the nearest integer, halves to the even one, as Python's:

    chosen = round(rate * n)
    masked = round(mask_share * chosen)
    random = min(round(random_share * chosen), chosen - masked)

A cell without a non-zero gene has no values to draw from: its zero genes that would be replaced are kept. A cell all of
whose genes are hidden is an empty cell to the encoder, and still has its chosen genes in the loss.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtg_kernels import RaggedBatch, dispatch
from xtrimogene.cells.matrix import CsrArrays
from xtrimogene.cells.packing import first_of_equal_values, pack_rows_and_totals
from xtrimogene.network.masked_batch import MaskedBatch

Array = npt.NDArray[Any]
UInt64 = npt.NDArray[np.uint64]

# 2^64 divided by the golden ratio: the step between the states of splitmix64.
_STEP = 0x9E3779B97F4A7C15
# Tells the hash that draws a replacement from the one that orders the genes.
_DRAW = 0xD1B54A32D192ED03

# Read-depth training: cells with fewer counts are never thinned, as in the published recipe.
MIN_COUNTS_TO_THIN = 1000


@dataclass(frozen=True)
class MaskingConfig:
    """How genes are chosen in pre-training; the defaults are the published recipe.

    nonzero_rate   share of a cell's non-zero genes that is chosen
    zero_rate      share of its zero genes that is chosen
    mask_share     of the chosen genes, those that are hidden
    random_share   of the chosen genes, those that get a random value; the rest keep theirs
    seed           another seed, another choice

    Raises ValueError, naming the key, the expected and the given value.
    """

    nonzero_rate: float = 0.30
    zero_rate: float = 0.03
    mask_share: float = 0.8
    random_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "seed":
                if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
                    raise ValueError(f"masking seed: expected an integer from 0 to 2^63 - 1, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"masking {field.name}: expected a number from 0 to 1, got {value!r}")
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                "masking mask_share, random_share: expected shares of together at most 1, got "
                f"{self.mask_share} and {self.random_share}"
            )


def mask_cells(
    batch: RaggedBatch,
    cells: Tensor | Array,
    masking: MaskingConfig,
    *,
    epoch: int,
    num_genes: int,
    rows: Array | None = None,
    target: RaggedBatch | None = None,
    depth: Tensor | None = None,
    num_threads: int | None = None,
) -> MaskedBatch:
    """Choose genes of packed cells and hide, replace or keep them. Runs in C++, or in NumPy without the extension: the
    same bits.

    Args:
        batch: cells on the CPU, float32 values, int32 gene ids ascending in each cell; distinct_index is not read.
        cells: (n,) integers from 0, the number of each cell in the data: with seed and epoch, it decides the choice.
        epoch: number of the pass over the data, from 0.
        num_genes: genes of the vocabulary, G.
        rows: (n,) the cell of ``batch`` for each of ``cells``; None for all, in order.
        target: where the true values of the chosen genes come from, cell by cell as ``batch``; None for ``batch``
            itself. With read-depth training it holds the cells before thinning.
        depth: (n, 2) float32 values of the tokens T and S, None for no such tokens.
        num_threads: threads of the C++ code, None for torch.get_num_threads(). The result does not depend on it.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, gene ids that do not ascend or are not below num_genes, negative
            epoch or cell numbers.
    """
    if epoch < 0:
        raise ValueError(f"epoch: expected a number of at least 0, got {epoch}")
    arguments: dict[str, Any] = {
        "cells": np.asarray(cells),
        **dataclasses.asdict(masking),
        "epoch": epoch,
        "num_genes": num_genes,
        "rows": rows,
        "target": None if target is None else _arrays(target),
        "depth": None if depth is None else depth.numpy(),
    }
    extension = dispatch.extension()
    if extension is None:
        masked = mask_cells_numpy(*_arrays(batch), **arguments)
    else:
        threads = torch.get_num_threads() if num_threads is None else num_threads
        masked = extension.mask_cells(*_arrays(batch), **arguments, num_threads=threads)
    tensors = {name: torch.from_numpy(array) for name, array in masked.items()}
    encoded = {name: tensors.pop(name) for name in ("values", "gene_ids", "cu_seqlens", "distinct_index")}
    lengths = np.diff(masked["cu_seqlens"])
    return MaskedBatch(
        batch=RaggedBatch(**encoded, max_seqlen=int(lengths.max(initial=0))),
        cells=torch.from_numpy(np.asarray(cells).astype(np.int64)),
        **tensors,
    )


def pack_masked(
    rows_csr: CsrArrays,
    column_gene_ids: npt.NDArray[np.int32],
    cells: Array,
    masking: MaskingConfig,
    *,
    epoch: int,
    num_genes: int,
    rows: npt.NDArray[np.int64] | None = None,
    normalized: bool = False,
    depth_tokens: bool = False,
    target_sum: float = 1e4,
    num_threads: int | None = None,
    first_row: int = 0,
) -> MaskedBatch:
    """CSR rows as a MaskedBatch on the CPU: pack_rows and mask_cells in one.

    Args:
        cells: number of each packed row in the data.
        depth_tokens: read-depth training, see mask_counts. Needs raw counts.

    The other arguments and the errors are those of pack_rows and mask_cells.
    """
    if depth_tokens and normalized:
        raise ValueError(
            "normalized: expected raw counts with depth_tokens=True, which are thinned; got normalized=True"
        )
    packed, _ = pack_rows_and_totals(
        rows_csr,
        column_gene_ids,
        rows=rows,
        normalized=normalized or depth_tokens,
        target_sum=target_sum,
        distinct=False,
        num_threads=num_threads,
        first_row=first_row,
    )
    if depth_tokens:
        return mask_counts(
            packed, cells, masking, epoch=epoch, num_genes=num_genes, target_sum=target_sum, num_threads=num_threads
        )
    return mask_cells(packed, cells, masking, epoch=epoch, num_genes=num_genes, num_threads=num_threads)


def mask_counts(
    counts: RaggedBatch,
    cells: Tensor | Array,
    masking: MaskingConfig,
    *,
    epoch: int,
    num_genes: int,
    target_sum: float = 1e4,
    num_threads: int | None = None,
) -> MaskedBatch:
    """Read-depth training of scFoundation (Hao et al., Nature Methods 2024) on packed raw counts.

    With probability 1/2 the input is a thinned copy of the cell: each count is drawn from a binomial distribution, with
    one rate for the cell from Beta(2, 2). Cells of fewer than 1,000 counts are never thinned. Input and target are
    normalised each by its own total. Genes are chosen among the non-zero and zero genes of the input; the target is
    always the whole cell. Tokens T = log10 of the target's total and S = log10 of the input's end every cell (totals
    over the genes of the vocabulary; a total of 0, which no cell in training has, counts as 1).

    What is thinned is a function of (masking.seed, epoch, number of the cell), too; NumPy's generators draw it.

    Args:
        counts: whole counts as float32 (pack_rows with normalized=True), genes ascending in each cell.

    The other arguments are those of mask_cells. Raises ValueError for counts that are not whole, naming the cell.
    """
    numbers = counts.values.numpy()
    cu_seqlens = counts.cu_seqlens.numpy()
    broken = np.flatnonzero(numbers != np.rint(numbers))
    if len(broken):
        cell = int(np.asarray(cells)[np.searchsorted(cu_seqlens, broken[0], side="right") - 1])
        raise ValueError(
            f"cell {cell}, gene {int(counts.gene_ids[broken[0]])}: value {numbers[broken[0]]}; expected whole counts, "
            "which read-depth training thins"
        )
    thinned = thin_counts(numbers, cu_seqlens, np.asarray(cells), seed=masking.seed, epoch=epoch)
    columns = np.arange(num_genes, dtype=np.int32)
    (target, target_totals), (batch, totals) = (
        pack_rows_and_totals(
            (cu_seqlens, counts.gene_ids.numpy(), data),
            columns,
            target_sum=target_sum,
            distinct=False,
            num_threads=num_threads,
        )
        for data in (numbers, thinned)
    )
    depth = torch.log10(torch.stack([target_totals, totals], dim=1).clamp(min=1)).float()
    return mask_cells(
        batch, cells, masking, epoch=epoch, num_genes=num_genes, target=target, depth=depth, num_threads=num_threads
    )


def thin_counts(counts: Array, cu_seqlens: Array, cells: Array, *, seed: int, epoch: int) -> Array:
    """Binomially thinned copies of some cells' counts, the others as they are; see mask_counts."""
    thinned = counts.copy()
    for row, stream in enumerate(hash_words(seed, epoch, cells, _DRAW).tolist()):
        own = slice(int(cu_seqlens[row]), int(cu_seqlens[row + 1]))
        if counts[own].sum(dtype=np.float64) < MIN_COUNTS_TO_THIN:
            continue
        generator = np.random.Generator(np.random.Philox(key=stream))
        if generator.random() < 0.5:
            thinned[own] = generator.binomial(counts[own].astype(np.int64), generator.beta(2, 2))
    return thinned


def mix(words: UInt64) -> UInt64:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014; constants of Stafford's mix 13): a bijection of 64-bit
    words whose every output bit depends on every input bit."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def hash_words(*words: Array | int) -> UInt64:
    """A 64-bit hash of words from 0 to 2^64 - 1; arrays are taken element by element. Always an array."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = mix(state + np.asarray(word).astype(np.uint64) + np.uint64(_STEP))
    return state


def hashed_keys(stream: int | np.uint64, count: int) -> UInt64:
    """(count,) keys of 0 ... count - 1, all distinct: the outputs of splitmix64 from the state ``stream``."""
    return mix(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(stream))


def mask_cells_numpy(
    values: Array,
    gene_ids: Array,
    cu_seqlens: Array,
    *,
    cells: Array,
    num_genes: int,
    nonzero_rate: float,
    zero_rate: float,
    mask_share: float,
    random_share: float,
    seed: int,
    epoch: int,
    rows: Array | None = None,
    target: tuple[Array, Array, Array] | None = None,
    depth: Array | None = None,
) -> dict[str, Array]:
    """What the C++ function ``xtg_kernels._C.mask_cells`` computes, in NumPy: the same arguments, the same bits."""
    rows = np.arange(len(cu_seqlens) - 1) if rows is None else np.asarray(rows)
    truth = (values, gene_ids, cu_seqlens) if target is None else target
    _check_cells(cu_seqlens, truth[2], cells, rows, depth)
    parts: dict[str, list[Array]] = {name: [] for name in ("values", "gene_ids", "masked", "chosen", "chosen_values")}
    for position, (row, stream) in enumerate(zip(rows.tolist(), hash_words(seed, epoch, cells).tolist(), strict=True)):
        own, true = (slice(int(bounds[row]), int(bounds[row + 1])) for bounds in (cu_seqlens, truth[2]))
        genes, numbers = gene_ids[own], values[own]
        for name, ids in (("batch", genes), ("target", truth[1][true])):
            if np.any(np.diff(ids, prepend=-1) <= 0) or (len(ids) and ids[-1] >= num_genes):
                raise ValueError(f"{name} gene_ids: expected ids ascending in each cell, from 0 to {num_genes - 1}")
        keys = hashed_keys(stream, num_genes)
        expressed = np.zeros(num_genes, bool)
        expressed[genes] = True
        masked, replaced, chosen = (np.zeros(num_genes, bool) for _ in range(3))
        for group, rate in ((genes, nonzero_rate), (np.flatnonzero(~expressed), zero_rate)):
            num_chosen = int(np.rint(rate * len(group)))
            num_masked = int(np.rint(mask_share * num_chosen))
            num_random = min(int(np.rint(random_share * num_chosen)), num_chosen - num_masked)
            in_order = group[np.argsort(keys[group])]
            chosen[in_order[:num_chosen]] = True
            masked[in_order[:num_masked]] = True
            replaced[in_order[num_masked : num_masked + num_random]] = len(genes) > 0

        seen, true_values = np.zeros(num_genes, np.float32), np.zeros(num_genes, np.float32)
        seen[genes] = numbers
        true_values[truth[1][true]] = truth[0][true]
        if replaced.any():
            draws = mix(keys[replaced] ^ np.uint64(_DRAW))
            seen[replaced] = numbers[(draws % np.uint64(len(genes))).astype(np.int64)]
        tokens = np.flatnonzero(expressed & ~masked | replaced)
        depth_values = np.zeros(0, np.float32) if depth is None else depth[position]
        parts["values"].append(np.concatenate([seen[tokens], depth_values]))
        parts["gene_ids"].append(np.concatenate([tokens, num_genes + np.arange(len(depth_values))]))
        parts["masked"].append(np.flatnonzero(masked))
        parts["chosen"].append(np.flatnonzero(chosen))
        parts["chosen_values"].append(true_values[chosen])

    def joined(name: str, dtype: type) -> Array:
        return np.concatenate([np.zeros(0, dtype), *parts[name]]).astype(dtype)

    def bounds(name: str) -> Array:
        return np.concatenate([[0], np.cumsum([len(part) for part in parts[name]], dtype=np.int64)]).astype(np.int32)

    lengths = [len(part) for part in parts["values"]]
    packed = joined("values", np.float32)
    return {
        "values": packed,
        "gene_ids": joined("gene_ids", np.int32),
        "cu_seqlens": bounds("values"),
        "distinct_index": first_of_equal_values(np.repeat(np.arange(len(rows)), lengths), packed),
        "masked_ids": joined("masked", np.int32),
        "masked_cu_seqlens": bounds("masked"),
        "chosen_ids": joined("chosen", np.int32),
        "chosen_cu_seqlens": bounds("chosen"),
        "chosen_values": joined("chosen_values", np.float32),
    }


def _check_cells(cu_seqlens: Array, true_cu_seqlens: Array, cells: Array, rows: Array, depth: Array | None) -> None:
    num_cells = len(cu_seqlens) - 1
    if cells.ndim != 1 or cells.dtype.kind not in "iu":
        raise TypeError(f"cells: expected 1 dimension of integers, got dtype {cells.dtype} and shape {cells.shape}")
    if len(cells) != len(rows):
        raise ValueError(f"cells: expected one number for each of the {len(rows)} rows, got {len(cells)}")
    if len(cells) and cells.min() < 0:
        raise ValueError(f"cells: expected numbers of at least 0, got {cells.min()}")
    if len(true_cu_seqlens) - 1 != num_cells:
        raise ValueError(f"target: expected {num_cells} cells as the batch has, got {len(true_cu_seqlens) - 1}")
    if len(rows) and not (rows.min() >= 0 and rows.max() < num_cells):
        raise ValueError(f"rows: expected row numbers in 0 .. {num_cells - 1}, got {rows.min()} .. {rows.max()}")
    if depth is not None and depth.shape != (len(cells), 2):
        raise ValueError(f"depth: expected shape ({len(cells)}, 2), got {depth.shape}")


def _arrays(batch: RaggedBatch) -> tuple[Array, Array, Array]:
    if batch.values.device.type != "cpu" or batch.values.dtype != torch.float32:
        raise TypeError(f"values: expected float32 on the CPU, got {batch.values.dtype} on {batch.values.device}")
    if batch.gene_ids.dtype != torch.int32:
        raise TypeError(f"gene_ids: expected int32, got {batch.gene_ids.dtype}")
    return batch.values.detach().numpy(), batch.gene_ids.numpy(), batch.cu_seqlens.numpy()
