"""Rows of a matrix, sparse or dense, by rows or by columns, in memory or on disk, as CSR. Nothing is densified."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from typing import Any, Protocol

import anndata
import numpy as np
import numpy.typing as npt
from scipy import sparse

Array = npt.NDArray[Any]
# (indptr (rows + 1,), indices (nnz,), data (nnz,)): the SciPy words, here of a window of rows
CsrArrays = tuple[Array, Array, Array]
# Stored numbers in memory at a time while a dense or column-major matrix on disk is turned into rows.
_BLOCK_ENTRIES = 1 << 23


class Rows(Protocol):
    shape: tuple[int, int]

    def read(self, start: int, stop: int) -> CsrArrays: ...

    def stored_entries(self) -> npt.NDArray[np.int64] | None: ...


@dataclass
class SparseRows:
    """CSR arrays, in memory, in an HDF5 or zarr group, or in a memory map."""

    shape: tuple[int, int]
    indptr: Array
    indices: Any
    data: Any

    def __post_init__(self) -> None:
        entries = self.indices.shape[0]
        if (
            self.indptr.shape != (self.shape[0] + 1,)
            or self.data.shape[0] != entries
            or self.indptr[0] < 0
            or self.indptr[-1] > entries
            or bool(np.any(np.diff(self.indptr) < 0))
        ):
            raise ValueError(
                f"expected CSR arrays of {self.shape[0]} rows, got indptr {self.indptr.shape}, indices "
                f"{self.indices.shape} and data {self.data.shape} that do not fit together; the matrix is damaged"
            )

    def read(self, start: int, stop: int) -> CsrArrays:
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        indptr = self.indptr[start : stop + 1] - first
        return indptr, np.asarray(self.indices[first:last]), np.asarray(self.data[first:last])

    def stored_entries(self) -> npt.NDArray[np.int64]:
        return np.diff(self.indptr).astype(np.int64, copy=False)


@dataclass
class DenseRows:
    """A dense matrix, in memory or on disk, read a block of rows at a time."""

    shape: tuple[int, int]
    matrix: Any

    def read(self, start: int, stop: int) -> CsrArrays:
        step = max(1, _BLOCK_ENTRIES // max(1, self.shape[1]))
        blocks = []
        for begin in range(start, stop, step):
            block = np.asarray(self.matrix[begin : min(begin + step, stop)])
            # NaN is not zero: it stays, and the packer names it.
            rows, columns = np.nonzero(block)
            blocks.append((np.bincount(rows, minlength=block.shape[0]), columns, block[rows, columns]))
        if not blocks:
            return np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        lengths, columns, values = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        return np.concatenate([[0], np.cumsum(lengths)]), columns, values

    def stored_entries(self) -> npt.NDArray[np.int64] | None:
        return np.count_nonzero(self.matrix, axis=1) if isinstance(self.matrix, np.ndarray) else None


def rows_of(matrix: Any, closing: contextlib.ExitStack) -> Rows:
    if isinstance(matrix, anndata.abc.CSRDataset | anndata.abc.CSCDataset):
        matrix = matrix.group
    if sparse.issparse(matrix):
        _check_numbers(matrix.dtype)
        csr = matrix if matrix.format == "csr" else matrix.tocsr()
        return SparseRows(csr.shape, csr.indptr, csr.indices, csr.data)
    if isinstance(matrix, np.ndarray):
        _check_numbers(matrix.dtype)
        return DenseRows(matrix.shape, np.asarray(matrix))
    encoding = matrix.attrs.get("encoding-type") if hasattr(matrix, "attrs") else None
    if encoding in ("csr_matrix", "csc_matrix"):
        _check_numbers(matrix["data"].dtype)
        n_obs, n_vars = (int(size) for size in matrix.attrs["shape"])
        indptr = np.asarray(matrix["indptr"][:])
        if encoding == "csc_matrix":
            columns = SparseRows((n_vars, n_obs), indptr, matrix["indices"], matrix["data"])
            return _transposed_on_disk(columns, closing)
        return SparseRows((n_obs, n_vars), indptr, matrix["indices"], matrix["data"])
    if hasattr(matrix, "shape") and hasattr(matrix, "dtype") and len(matrix.shape) == 2 and not hasattr(matrix, "dask"):
        _check_numbers(matrix.dtype)
        return DenseRows((int(matrix.shape[0]), int(matrix.shape[1])), matrix)
    raise ValueError(
        f"expected a sparse or dense matrix in memory or on disk, got {type(matrix).__name__}; "
        "load it with adata.to_memory() or give the path of the file"
    )


def _check_numbers(dtype: Any) -> None:
    if np.dtype(dtype).kind not in "biuf":
        raise ValueError(f"expected a matrix of integers or floats, got dtype {dtype}")


def _transposed_on_disk(columns: SparseRows, closing: contextlib.ExitStack) -> SparseRows:
    """CSR of a matrix that is stored by columns, written to temporary files that vanish when closed.

    Column-major files cannot be read by rows, and the whole matrix may not fit in memory: entries are read in stored
    order, a block at a time, and each goes to the next free place of its row, so that rows come out sorted.
    """
    n_vars, n_obs = columns.shape
    entries = int(columns.indptr[-1])
    blocks = [(a, min(a + _BLOCK_ENTRIES, entries)) for a in range(0, entries, _BLOCK_ENTRIES)]
    lengths = np.zeros(n_obs, np.int64)
    for start, stop in blocks:
        rows = np.asarray(columns.indices[start:stop])
        if rows.min() < 0 or rows.max() >= n_obs:
            raise ValueError(f"expected row indices 0 to {n_obs - 1}, got {rows.min()} to {rows.max()}")
        lengths += np.bincount(rows, minlength=n_obs)
    indptr = np.concatenate([[0], np.cumsum(lengths)])

    def temporary(dtype: Any) -> Array:
        if entries == 0:
            return np.zeros(0, dtype)
        file = closing.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        return np.memmap(file, dtype=dtype, mode="w+", shape=(entries,))

    indices, data = temporary(np.int32), temporary(columns.data.dtype)
    free = indptr[:-1].copy()
    for start, stop in blocks:
        rows = np.asarray(columns.indices[start:stop])
        column_of = np.repeat(np.arange(n_vars, dtype=np.int32), np.diff(np.clip(columns.indptr, start, stop)))
        order = np.argsort(rows, kind="stable")
        lengths = np.bincount(rows, minlength=n_obs)
        place = np.repeat(free - np.cumsum(lengths) + lengths, lengths) + np.arange(len(rows))
        indices[place] = column_of[order]
        data[place] = np.asarray(columns.data[start:stop])[order]
        free += lengths
    return SparseRows((n_obs, n_vars), indptr, indices, data)
