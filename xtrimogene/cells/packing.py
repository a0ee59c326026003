"""CSR rows as ragged batches: genes mapped, values normalised, in C++ or in NumPy; batches cut by tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtg_kernels import RaggedBatch, dispatch
from xtrimogene.cells.matrix import Array, CsrArrays


def pack_rows(
    rows_csr: CsrArrays,
    column_gene_ids: npt.NDArray[np.int32],
    *,
    rows: npt.NDArray[np.int64] | None = None,
    normalized: bool = False,
    target_sum: float = 1e4,
    num_threads: int | None = None,
    first_row: int = 0,
) -> RaggedBatch:
    """CSR rows as a RaggedBatch on the CPU: log1p(count / total * target_sum), total over the vocabulary's genes.

    Runs in C++, or in NumPy where the extension was not built; see pack_csr_numpy for how the two agree.

    Args:
        rows_csr: (indptr, indices, data) as CellSource.read_rows gives them.
        column_gene_ids: (n_columns,) int32, ColumnMap.gene_ids.
        rows: rows to pack, in the order wanted; None for all.
        normalized: the values are log-normalised already and are taken as they are.
        num_threads: threads of the C++ packer, None for torch.get_num_threads(). The result does not depend on it.
        first_row: number of row 0 in error messages.

    Raises:
        ValueError: a negative, NaN or infinite value or a column index outside the matrix; names row and column.
    """
    return pack_rows_and_totals(
        rows_csr,
        column_gene_ids,
        rows=rows,
        normalized=normalized,
        target_sum=target_sum,
        num_threads=num_threads,
        first_row=first_row,
    )[0]


def pack_rows_and_totals(
    rows_csr: CsrArrays,
    column_gene_ids: npt.NDArray[np.int32],
    *,
    rows: npt.NDArray[np.int64] | None = None,
    normalized: bool = False,
    target_sum: float = 1e4,
    distinct: bool = True,
    num_threads: int | None = None,
    first_row: int = 0,
) -> tuple[RaggedBatch, Tensor]:
    """What pack_rows gives, and the cells' totals: (batch,) float64, the sum of a cell's stored numbers over the genes
    of the vocabulary. add_depth_tokens takes them. ``distinct=False`` leaves ``distinct_index`` out."""
    arguments: dict[str, Any] = {
        "rows": rows,
        "normalize": not normalized,
        "target_sum": target_sum,
        "distinct": distinct,
        "first_row": first_row,
    }
    extension = dispatch.extension()
    if extension is None:
        packed = pack_csr_numpy(*rows_csr, column_gene_ids, **arguments)
    else:
        threads = torch.get_num_threads() if num_threads is None else num_threads
        packed = extension.pack_csr(*rows_csr, column_gene_ids, **arguments, num_threads=threads)
    lengths = np.diff(packed["cu_seqlens"])
    # The packer hands out views of its input where nothing has to change, and torch takes writable arrays only.
    tensors = {
        key: None if array is None else torch.from_numpy(array if array.flags.writeable else array.copy())
        for key, array in packed.items()
    }
    totals = tensors.pop("totals")
    assert totals is not None
    return RaggedBatch(max_seqlen=int(lengths.max(initial=0)), **tensors), totals  # type: ignore[arg-type]


def split_by_tokens(batch: RaggedBatch, max_tokens: int) -> Iterator[tuple[int, int, RaggedBatch]]:
    """Consecutive cells of a CPU batch in groups of at most max_tokens tokens; a longer cell comes alone.

    Yields (first cell, past the last cell, their batch, of views).
    """
    bounds = batch.cu_seqlens.numpy()
    first = 0
    while first < batch.batch_size:
        last = int(np.searchsorted(bounds, bounds[first] + max_tokens, side="right")) - 1
        last = max(last, first + 1)
        start, stop = int(bounds[first]), int(bounds[last])
        cu_seqlens = batch.cu_seqlens[first : last + 1] - start
        distinct_index = None if batch.distinct_index is None else batch.distinct_index[start:stop] - start
        yield (
            first,
            last,
            RaggedBatch(
                batch.values[start:stop],
                batch.gene_ids[start:stop],
                cu_seqlens,
                int(cu_seqlens.diff().max()),
                distinct_index,
            ),
        )
        first = last


def pack_csr_numpy(
    indptr: Array,
    indices: Array,
    data: Array,
    column_gene_ids: Array,
    *,
    rows: Array | None = None,
    normalize: bool = True,
    target_sum: float = 1e4,
    distinct: bool = True,
    first_row: int = 0,
) -> dict[str, Any]:
    """What the C++ packer ``xtg_kernels._C.pack_csr`` computes, in NumPy; arguments, errors and result are the same.

    All bits agree but those of log1p where NumPy's vectorised float64 log1p and the C library's differ in their last
    bit and the value lies on the border of two float32 numbers. Views of the input are never handed out.
    """
    lengths = np.diff(indptr)
    rows = np.arange(len(lengths)) if rows is None else np.asarray(rows)
    lengths = lengths[rows]
    row_of = np.repeat(np.arange(len(rows)), lengths)
    entries = np.arange(len(row_of)) + np.repeat(indptr[rows] - np.cumsum(lengths) + lengths, lengths)
    columns = indices[entries].astype(np.int64, copy=False)
    numbers = data[entries].astype(np.float64)
    _raise_first_fault(row_of, rows, columns, numbers, len(column_gene_ids), first_row, fits_float32=not normalize)
    if not normalize:
        numbers = numbers.astype(np.float32).astype(np.float64)

    genes = column_gene_ids[columns].astype(np.int64)
    kept = (genes >= 0) & (numbers != 0)
    row_of, genes, numbers = row_of[kept], genes[kept], numbers[kept]
    # bincount adds in stored order, as the C++ loop does: float sums have the same bits.
    totals = np.bincount(row_of, weights=numbers, minlength=len(rows)).astype(np.float64)
    if not np.all(np.isfinite(totals)):
        row = first_row + int(rows[int(np.argmin(np.isfinite(totals)))])
        raise ValueError(f"row {row}: the sum of its values is not finite")
    place = row_of * (int(column_gene_ids.max(initial=-1)) + 1) + genes
    if np.any(np.diff(place) <= 0):
        _, first, group = np.unique(place, return_index=True, return_inverse=True)
        numbers = np.bincount(group, weights=numbers)
        row_of, genes = row_of[first], genes[first]
    if len(genes) > np.iinfo(np.int32).max:
        raise ValueError(f"rows: expected at most 2147483647 expressed genes in one batch, got {len(genes)}")
    if normalize:
        numbers = np.log1p(numbers / totals[row_of] * target_sum)
    values = numbers.astype(np.float32)
    return {
        "values": values,
        "gene_ids": genes.astype(np.int32),
        "cu_seqlens": np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=len(rows)))]).astype(np.int32),
        "distinct_index": first_of_equal_values(row_of, values) if distinct else None,
        "totals": totals,
    }


def first_of_equal_values(row_of: Array, values: Array) -> npt.NDArray[np.int32]:
    """(total_nnz,) int32: position of the first token of the same row whose float32 value has the same bits."""
    keys = row_of.astype(np.uint64) << np.uint64(32) | values.view(np.uint32)
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return first[group].astype(np.int32)


def _raise_first_fault(
    row_of: Array, rows: Array, columns: Array, numbers: Array, n_columns: int, first_row: int, *, fits_float32: bool
) -> None:
    outside = (columns < 0) | (columns >= n_columns)
    limit = np.finfo(np.float32).max if fits_float32 else np.inf
    wrong = outside | ~np.isfinite(numbers) | (numbers < 0) | (numbers > limit)
    if not wrong.any():
        return
    entry = int(np.argmax(wrong))
    where = f"row {first_row + int(rows[row_of[entry]])}, column {columns[entry]}"
    value = float(numbers[entry])
    if outside[entry]:
        raise ValueError(f"{where}: column index outside the matrix, expected 0 .. {n_columns - 1}")
    if not np.isfinite(value):
        raise ValueError(f"{where}: value {value} is not finite; expected raw counts")
    if value < 0:
        raise ValueError(
            f"{where}: negative value {value}; expected raw counts (or log-normalised values), not scaled data"
        )
    raise ValueError(f"{where}: value {value} does not fit float32")
