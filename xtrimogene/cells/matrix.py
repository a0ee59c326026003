"""Rows of a matrix, sparse or dense, by rows or by columns, in memory or on disk, as CSR. Nothing is densified."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import anndata
import numpy as np
import numpy.typing as npt
from scipy import sparse

from xtrimogene.cells.hdf5 import MachineLimit, check_filters, more_open_files, text

Array = npt.NDArray[Any]
# (indptr (rows + 1,), indices (nnz,), data (nnz,)): the SciPy words, here of a window of rows
CsrArrays = tuple[Array, Array, Array]
# Stored numbers in memory at a time while a dense or column-major matrix on disk is turned into rows.
_BLOCK_ENTRIES = 1 << 23
_LARGER_FOLDER = "name a larger one with the environment variable TMPDIR"
# What temporary files may fail for, and the cure.
_LIMITS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _LARGER_FOLDER),
    errno.EMFILE: "raise the limit of open files with `ulimit -n 4096` in this shell",
}


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
        return indptr, _integers("indices", self.indices[first:last]), np.asarray(self.data[first:last])

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


def rows_of(matrix: Any, lasting: Callable[[Any], Any] = lambda stored: stored) -> Rows:
    """Rows of a matrix, whatever it is and wherever it lies.

    lasting(data set) is what to read it through.
    Raises ValueError for what is no matrix of numbers.
    """
    if isinstance(matrix, SparseRows | DenseRows) or hasattr(matrix, "stored_entries"):
        return matrix
    if isinstance(matrix, anndata.abc.CSRDataset | anndata.abc.CSCDataset):
        matrix = matrix.group
    if sparse.issparse(matrix):
        check_numbers(matrix.dtype)
        csr = matrix if matrix.format == "csr" else matrix.tocsr()
        return SparseRows(csr.shape, csr.indptr, csr.indices, csr.data)
    if isinstance(matrix, np.ndarray):
        check_numbers(matrix.dtype)
        return DenseRows(matrix.shape, np.asarray(matrix))
    encoding = text(matrix.attrs.get("encoding-type")) if hasattr(matrix, "attrs") else None
    if encoding in ("csr_matrix", "csc_matrix"):
        n_obs, n_vars = (int(size) for size in matrix.attrs["shape"])
        if encoding == "csc_matrix":
            return _transposed_on_disk(sparse_rows((n_vars, n_obs), matrix, lasting))
        return sparse_rows((n_obs, n_vars), matrix, lasting)
    if hasattr(matrix, "shape") and hasattr(matrix, "dtype") and len(matrix.shape) == 2 and not hasattr(matrix, "dask"):
        check_numbers(matrix.dtype)
        check_filters(matrix)
        return DenseRows((int(matrix.shape[0]), int(matrix.shape[1])), lasting(matrix))
    if hasattr(matrix, "keys"):
        raise ValueError(f"expected a matrix of encoding csr_matrix, csc_matrix or array, got {encoding or 'none'}")
    raise ValueError(
        f"expected a sparse or dense matrix in memory or on disk, got {type(matrix).__name__}"
        f"{f' of encoding {encoding!r}' if encoding else ''}; load it with adata.to_memory(), or give the path of the "
        "file"
    )


def sparse_rows(shape: tuple[int, int], group: Any, lasting: Callable[[Any], Any]) -> SparseRows:
    """CSR of a group that holds indptr, indices and data."""
    for name in ("indptr", "indices", "data"):
        check_filters(group[name])
    check_numbers(group["data"].dtype)
    indptr = _integers("indptr", group["indptr"][:])
    return SparseRows(shape, indptr, lasting(group["indices"]), lasting(group["data"]))


def check_numbers(dtype: Any) -> None:
    """Raises ValueError for a matrix of anything but numbers."""
    if np.dtype(dtype).kind not in "biuf":
        raise ValueError(f"expected a matrix of integers or floats, got dtype {dtype}")


def _integers(name: str, stored: Any) -> Array:
    """Offsets or indices as signed integers: R writes them as floats, others as uint64, which NumPy makes floats of."""
    array = np.asarray(stored)
    if array.dtype.kind == "i":
        return array
    if array.dtype.kind not in "uf" or (array.dtype.kind == "f" and not np.array_equal(array, np.rint(array))):
        raise ValueError(f"expected whole numbers as {name} of a sparse matrix, got dtype {array.dtype}")
    return array.astype(np.int64)


def _transposed_on_disk(columns: SparseRows) -> SparseRows:
    """CSR of a matrix that is stored by columns.

    Column-major files cannot be read by rows, and the whole matrix may not fit in memory: entries are read in stored
    order, a block at a time.
    """
    n_vars, n_obs = columns.shape
    entries = int(columns.indptr[-1])
    bounds = [(a, min(a + _BLOCK_ENTRIES, entries)) for a in range(0, entries, _BLOCK_ENTRIES)]

    def rows_of_block(start: int, stop: int) -> Array:
        return _integers("indices", columns.indices[start:stop])

    lengths = np.zeros(n_obs, np.int64)
    for start, stop in bounds:
        rows = rows_of_block(start, stop)
        if rows.min() < 0 or rows.max() >= n_obs:
            raise ValueError(f"expected row indices 0 to {n_obs - 1}, got {rows.min()} to {rows.max()}")
        lengths += np.bincount(rows, minlength=n_obs)
    blocks = (
        (
            rows_of_block(start, stop),
            np.repeat(np.arange(n_vars, dtype=np.int32), np.diff(np.clip(columns.indptr, start, stop))),
            np.asarray(columns.data[start:stop]),
        )
        for start, stop in bounds
    )
    return csr_on_disk((n_obs, n_vars), lengths, blocks, columns.data.dtype)


def csr_on_disk(
    shape: tuple[int, int],
    lengths: npt.NDArray[np.int64],
    blocks: Iterable[tuple[Array, Array, Array]],
    dtype: Any,
) -> SparseRows:
    """CSR of entries in any order, in temporary files that vanish with the arrays.

    lengths  (rows,) entries of each row
    blocks   (row, column, value) of some entries at a time; each goes to the next free place of its row, so that
             entries that come by columns come out sorted
    """
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices, data = (scratch_array(int(indptr[-1]), kind) for kind in (np.int32, dtype))
    free = indptr[:-1].copy()
    for rows, columns, values in blocks:
        order = np.argsort(rows, kind="stable")
        added = np.bincount(rows, minlength=shape[0])
        place = np.repeat(free - np.cumsum(added) + added, added) + np.arange(len(rows))
        indices[place] = columns[order]
        data[place] = values[order]
        free += added
    return SparseRows(shape, indptr, indices, data)


def scratch_array(size: int, dtype: Any) -> Array:
    """(size,) numbers in a temporary file that vanishes with the array.

    Raises MachineLimit where the temporary folder has no room for it: without asking for the room first, a full disk
    would end the process at the first write into the map (SIGBUS).
    """
    if size == 0:
        return np.zeros(0, dtype)
    try:
        return _mapped(size, dtype)
    except OSError as error:
        if error.errno == errno.EMFILE and more_open_files():
            return _mapped(size, dtype)
        if error.errno not in _LIMITS:
            raise
        raise MachineLimit(
            f"no room for {size * np.dtype(dtype).itemsize / 1e9:,.1f} GB in the temporary folder "
            f"{tempfile.gettempdir()} ({error.strerror}), where a matrix that is not stored by cells is turned around; "
            f"{_LIMITS[error.errno]}"
        ) from error


def _mapped(size: int, dtype: Any) -> Array:
    num_bytes = size * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno in _LIMITS:
                raise
            file.truncate(num_bytes)  # a file system that cannot say
        return np.memmap(file, dtype=dtype, mode="r+", shape=(size,))
