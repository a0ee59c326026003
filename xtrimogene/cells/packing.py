"""CSR rows as ragged batches: genes mapped, values normalised, in C++ or in NumPy; batches cut by tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtg_kernels import RaggedBatch, dispatch
from xtrimogene.cells.matrix import Array, CsrArrays

# Column of the map whose numbers nobody looks at, such as that of an antibody. -1: a gene that the vocabulary lacks.
LEFT_OUT = -2


class PackingFault(ValueError):
    """A number that the packer refuses; the C++ packer sets the same attributes on a ValueError.

    fault   "column_out_of_range", "negative", "not_finite", "too_large", "not_whole" or "total_not_finite"
    row     row of the cell, first_row included
    column  column of the matrix
    """

    def __init__(self, message: str, fault: str, row: int, column: int) -> None:
        super().__init__(message)
        self.fault, self.row, self.column = fault, row, column


def pack_rows(
    rows_csr: CsrArrays,
    column_gene_ids: npt.NDArray[np.int32],
    *,
    rows: npt.NDArray[np.int64] | None = None,
    normalized: bool = False,
    target_sum: float = 1e4,
    num_threads: int | None = None,
    first_row: int = 0,
    whole: bool = False,
    cell_totals: npt.NDArray[np.float64] | None = None,
) -> RaggedBatch:
    """CSR rows as a RaggedBatch on the CPU: log1p(count / total * target_sum), total over the vocabulary's genes.

    Runs in C++, or in NumPy where the extension was not built; see pack_csr_numpy for how the two agree.

    Args:
        rows_csr: (indptr, indices, data) as CellSource.read_rows gives them.
        column_gene_ids: (n_columns,) int32, ColumnMap.gene_ids; columns of -2 are not looked at.
        rows: rows to pack, in the order wanted; None for all.
        normalized: the values are log-normalised already and are taken as they are.
        num_threads: threads of the C++ packer, None for torch.get_num_threads(). The result does not depend on it.
        first_row: number of row 0 in error messages.
        whole: refuse numbers that are not whole, in any column. Those that are but for the rounding of a logarithm
            that was undone (by at most 1e-6, or a millionth of the number) are rounded.
        cell_totals: (rows packed,) total of each cell to normalise by, in place of the sum of its counts.

    Raises:
        ValueError: a negative, NaN or infinite value, one that is not whole with ``whole``, or a column index outside
            the matrix; names row and column, and has them as attributes (see PackingFault).
    """
    return pack_rows_and_totals(
        rows_csr,
        column_gene_ids,
        rows=rows,
        normalized=normalized,
        target_sum=target_sum,
        num_threads=num_threads,
        first_row=first_row,
        whole=whole,
        cell_totals=cell_totals,
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
    whole: bool = False,
    cell_totals: npt.NDArray[np.float64] | None = None,
    on_rounded: Callable[[], None] | None = None,
) -> tuple[RaggedBatch, Tensor]:
    """What pack_rows gives, and the cells' totals: (batch,) float64, the sum of a cell's stored numbers over the genes
    of the vocabulary. add_depth_tokens takes them.

    ``distinct=False`` leaves ``distinct_index`` out; ``on_rounded`` is called where ``whole`` has rounded numbers.
    """
    arguments: dict[str, Any] = {
        "rows": rows,
        "normalize": not normalized,
        "target_sum": target_sum,
        "distinct": distinct,
        "first_row": first_row,
        "whole": whole,
        "cell_totals": cell_totals,
    }
    extension = dispatch.extension()
    if extension is None:
        packed = pack_csr_numpy(*rows_csr, column_gene_ids, **arguments)
    else:
        threads = torch.get_num_threads() if num_threads is None else num_threads
        packed = extension.pack_csr(*rows_csr, column_gene_ids, **arguments, num_threads=threads)
    if packed.pop("rounded") and on_rounded is not None:
        on_rounded()
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
    whole: bool = False,
    cell_totals: Array | None = None,
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
    outside = (columns < 0) | (columns >= len(column_gene_ids))
    genes = np.full(len(columns), -1, np.int64)
    genes[~outside] = column_gene_ids[columns[~outside]]
    seen = genes != LEFT_OUT
    rounded = np.zeros(len(numbers), bool)
    if whole:
        with np.errstate(invalid="ignore"):
            nearest = np.rint(numbers)
            rounded = seen & (numbers != nearest) & (np.abs(numbers - nearest) <= 1e-6 * np.maximum(1, numbers))
        numbers[rounded] = nearest[rounded]
    _raise_first_fault(
        rows[row_of] + first_row, columns, numbers, outside, seen, len(column_gene_ids), not normalize, whole
    )
    if not normalize:
        numbers = np.where(seen, numbers, 0).astype(np.float32).astype(np.float64)

    kept = (genes >= 0) & (numbers != 0)
    row_of, genes, numbers = row_of[kept], genes[kept], numbers[kept]
    # bincount adds in stored order, as the C++ loop does: float sums have the same bits.
    totals = np.bincount(row_of, weights=numbers, minlength=len(rows)).astype(np.float64)
    if not np.all(np.isfinite(totals)):
        row = first_row + int(rows[int(np.argmin(np.isfinite(totals)))])
        raise PackingFault(f"row {row}: the sum of its values is not finite", "total_not_finite", row, 0)
    if cell_totals is not None and len(cell_totals) != len(rows):
        raise ValueError(f"cell_totals: expected one for each of {len(rows)} rows, got {len(cell_totals)}")
    place = row_of * (int(column_gene_ids.max(initial=-1)) + 1) + genes
    if np.any(np.diff(place) <= 0):
        _, first, group = np.unique(place, return_index=True, return_inverse=True)
        numbers = np.bincount(group, weights=numbers)
        row_of, genes = row_of[first], genes[first]
    if len(genes) > np.iinfo(np.int32).max:
        raise ValueError(f"rows: expected at most 2147483647 expressed genes in one batch, got {len(genes)}")
    if normalize:
        with np.errstate(divide="ignore", invalid="ignore"):
            numbers = np.log1p(numbers / (totals if cell_totals is None else cell_totals)[row_of] * target_sum)
    values = numbers.astype(np.float32)
    return {
        "values": values,
        "gene_ids": genes.astype(np.int32),
        "cu_seqlens": np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=len(rows)))]).astype(np.int32),
        "distinct_index": first_of_equal_values(row_of, values) if distinct else None,
        "totals": totals,
        "rounded": bool(rounded.any()),
    }


def first_of_equal_values(row_of: Array, values: Array) -> npt.NDArray[np.int32]:
    """(total_nnz,) int32: position of the first token of the same row whose float32 value has the same bits."""
    keys = row_of.astype(np.uint64) << np.uint64(32) | values.view(np.uint32)
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return first[group].astype(np.int32)


def _raise_first_fault(
    row_of: Array,
    columns: Array,
    numbers: Array,
    outside: Array,
    seen: Array,
    n_columns: int,
    fits_float32: bool,
    whole: bool,
) -> None:
    limit = float(np.finfo(np.float32).max) if fits_float32 else np.inf
    wrong = outside | seen & (~np.isfinite(numbers) | (numbers < 0) | (numbers > limit))
    if whole:
        wrong |= seen & (numbers != np.rint(numbers))
    if not wrong.any():
        return
    entry = int(np.argmax(wrong))
    row, column, value = int(row_of[entry]), int(columns[entry]), float(numbers[entry])
    if outside[entry]:
        fault, text = "column_out_of_range", f"column index outside the matrix, expected 0 .. {n_columns - 1}"
    elif not np.isfinite(value):
        fault, text = "not_finite", f"value {value} is not finite; expected raw counts"
    elif value < 0:
        fault = "negative"
        text = f"negative value {value}; expected raw counts (or log-normalised values), not scaled data"
    elif value > limit:
        fault, text = "too_large", f"value {value} does not fit float32"
    else:
        fault, text = "not_whole", f"value {value} is not whole; expected raw counts"
    raise PackingFault(f"row {row}, column {column}: {text}", fault, row, column)
