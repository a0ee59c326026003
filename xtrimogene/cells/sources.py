"""Cells from AnnData objects, h5ad files and zarr stores as CSR rows and ragged batches. Nothing is densified."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from anndata import AnnData
from anndata.io import read_elem
from scipy import sparse
from torch import Tensor

from xtg_kernels import RaggedBatch, dispatch, distinct_index
from xtrimogene.network.vocabulary import ColumnMap, Vocabulary, best_name_column, column_names

Array = npt.NDArray[Any]
# (indptr (rows + 1,), indices (nnz,), data (nnz,)): the SciPy words, here of a window of rows
CsrArrays = tuple[Array, Array, Array]

# Stored numbers in memory at a time while a dense or column-major matrix on disk is turned into rows.
_BLOCK_ENTRIES = 1 << 23


class _Rows(Protocol):
    shape: tuple[int, int]

    def read(self, start: int, stop: int) -> CsrArrays: ...

    def stored_entries(self) -> npt.NDArray[np.int64] | None: ...


@dataclass
class _SparseRows:
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
class _DenseRows:
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


@dataclass
class CellSource:
    """The cells of one matrix of a data set.

    name         how messages call it: the path, or "AnnData"
    n_obs        cells
    n_vars       columns of the matrix
    var          (n_vars rows) annotation of the columns
    var_names    (n_vars,) gene name of each column, from the index of var or its column ``gene_symbols``
    layer        the layer that is read, None for X
    other_layers what ``layer`` could be instead
    """

    name: str
    var: pd.DataFrame
    var_names: list[str]
    gene_symbols: str | None
    layer: str | None
    other_layers: list[str | None]
    rows: _Rows
    cell_name: Callable[[int], str]
    open_layer: Callable[[str | None], CellSource] = field(repr=False)
    _closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    @property
    def n_obs(self) -> int:
        return self.rows.shape[0]

    @property
    def n_vars(self) -> int:
        return self.rows.shape[1]

    @cached_property
    def stored_entries(self) -> npt.NDArray[np.int64] | None:
        """(n_obs,) entries that the matrix stores for each cell, at least its expressed genes; None where only reading
        everything would tell (dense on disk)."""
        return self.rows.stored_entries()

    def read_rows(self, start: int, stop: int) -> CsrArrays:
        """Rows start ... stop - 1 as ``(indptr, indices, data)``, indptr from 0; views where the matrix is in memory.

        Raises ValueError that names the file when it cannot be read.
        """
        try:
            return self.rows.read(start, stop)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{self.name}: cannot read rows {start} to {stop - 1}: {error}; the file is damaged or truncated"
            ) from error

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> CellSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_cells(
    adata_or_path: AnnData | str | os.PathLike[str], *, layer: str | None = None, gene_symbols: str | None = None
) -> CellSource:
    """Open the cells of an AnnData (in memory, view or backed), an h5ad file or a zarr store, without reading them.

    CSR is read by windows of rows; dense matrices are turned into rows block by block; CSC is transposed once, in
    temporary files where the matrix is on disk. Two things are read whole: a view of a backed AnnData, of which anndata
    cannot take a part, and files written by anndata before 0.7.

    Args:
        layer: the layer to read, None for X. "raw" stands for ``.raw`` where no layer has that name.
        gene_symbols: column of ``var`` with the gene names, None for ``var_names``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no h5ad or zarr AnnData, a truncated file, a missing layer or var column, a matrix of no numbers;
            the message names the file.
    """
    if isinstance(adata_or_path, AnnData):
        return _open_adata(adata_or_path, "AnnData", layer, gene_symbols)
    if not isinstance(adata_or_path, str | os.PathLike):
        raise TypeError(f"adata_or_path: expected an AnnData or a path, got {type(adata_or_path).__name__}")
    path = Path(adata_or_path)
    root, closing = open_store(path)
    if is_legacy_store(root):
        closing.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata tells, item by item, how it moves old fields
            return _open_adata(anndata.read_h5ad(path), str(path), layer, gene_symbols)
    try:
        return _open_root(root, path, layer, gene_symbols, closing)
    except (OSError, KeyError, RuntimeError) as error:
        closing.close()
        raise ValueError(f"{path}: cannot be read as AnnData: {error}; the file is damaged or truncated") from error
    except BaseException:
        closing.close()
        raise


def open_store(path: Path) -> tuple[Any, contextlib.ExitStack]:
    """The root group (h5py or zarr) of an AnnData file opened for reading, and what closes it.

    Raises FileNotFoundError, or ValueError that names the file when it is no AnnData file.
    """
    closing = contextlib.ExitStack()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        import zarr

        try:
            root = zarr.open_group(path, mode="r")
        except Exception as error:  # zarr has no common base of what it raises for a folder that is no store
            raise ValueError(f"{path}: expected an h5ad file or a zarr store, got another folder") from error
    else:
        if not h5py.is_hdf5(path):
            raise ValueError(
                f"{path}: expected an h5ad file, got something that is not HDF5, or is cut off at its start; "
                "write one with adata.write_h5ad"
            )
        try:
            root = closing.enter_context(h5py.File(path, "r"))
        except OSError as error:
            raise ValueError(f"{path}: cannot be opened: {error}; the file is damaged or truncated") from error
    missing = [key for key in ("obs", "var") if key not in root]
    if missing:
        hint = "; read a 10x file with scanpy.read_10x_h5 and write it as h5ad" if "matrix" in root else ""
        closing.close()
        raise ValueError(f"{path}: expected an AnnData file, got one without {' and '.join(missing)}{hint}")
    return root, closing


def is_legacy_store(root: Any) -> bool:
    """Whether anndata before 0.7 wrote the file: tables and obsm are compound data sets then, not groups."""
    return isinstance(root["obs"], h5py.Dataset)


def _open_root(
    root: Any, path: Path, layer: str | None, gene_symbols: str | None, closing: contextlib.ExitStack
) -> CellSource:
    layers: list[str | None] = [None] if "X" in root else []
    layers += list(root["layers"]) if "layers" in root else []
    if "raw" in root and "raw" not in layers:
        layers.append("raw")
    _check_layer(layer, layers, str(path))
    from_raw = layer == "raw" and ("layers" not in root or "raw" not in root["layers"])
    matrix = root["raw/X"] if from_raw else root["X"] if layer is None else root[f"layers/{layer}"]
    var = read_elem(root["raw/var"] if from_raw else root["var"])
    obs = root["obs"]

    def cell_name(row: int) -> str:
        names = obs[obs.attrs["_index"]]
        name = names[row] if hasattr(names, "shape") else read_elem(names)[row]
        return name.decode() if isinstance(name, bytes) else str(name)

    return _source(
        str(path), matrix, var, gene_symbols, layer, layers, cell_name,
        lambda other: open_cells(path, layer=other), closing,
    )  # fmt: skip


def _open_adata(adata: AnnData, name: str, layer: str | None, gene_symbols: str | None) -> CellSource:
    layers: list[str | None] = [None] if adata.X is not None or adata.isbacked else []
    layers += list(adata.layers)
    if adata.raw is not None and "raw" not in layers:
        layers.append("raw")
    _check_layer(layer, layers, name)
    from_raw = layer == "raw" and "raw" not in adata.layers
    if from_raw:
        matrix, var = adata.raw.X, adata.raw.var
    else:
        matrix, var = adata.X if layer is None else adata.layers[layer], adata.var
    return _source(
        name, matrix, var, gene_symbols, layer, layers, lambda row: str(adata.obs_names[row]),
        lambda other: _open_adata(adata, name, other, None), contextlib.ExitStack(),
    )  # fmt: skip


def _check_layer(layer: str | None, layers: list[str | None], name: str) -> None:
    if layer not in layers:
        wanted = "X" if layer is None else f"layer {layer!r}"
        known = ", ".join("X" if known is None else str(known) for known in layers) or "none"
        raise ValueError(f"{name}: expected {wanted}, got a data set without it; its matrices: {known}")


def _source(
    name: str,
    matrix: Any,
    var: pd.DataFrame,
    gene_symbols: str | None,
    layer: str | None,
    layers: list[str | None],
    cell_name: Callable[[int], str],
    open_layer: Callable[[str | None], CellSource],
    closing: contextlib.ExitStack,
) -> CellSource:
    try:
        names = column_names(var, gene_symbols)
        rows = _rows_of(matrix, closing)
        if rows.shape[1] != len(var):
            raise ValueError(f"expected {len(var)} columns as var has rows, got {rows.shape[1]}; the file is damaged")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    others = [other for other in layers if other != layer]
    return CellSource(name, var, names, gene_symbols, layer, others, rows, cell_name, open_layer, closing)


def _rows_of(matrix: Any, closing: contextlib.ExitStack) -> _Rows:
    if isinstance(matrix, anndata.abc.CSRDataset | anndata.abc.CSCDataset):
        matrix = matrix.group
    if sparse.issparse(matrix):
        _check_numbers(matrix.dtype)
        csr = matrix if matrix.format == "csr" else matrix.tocsr()
        return _SparseRows(csr.shape, csr.indptr, csr.indices, csr.data)
    if isinstance(matrix, np.ndarray):
        _check_numbers(matrix.dtype)
        return _DenseRows(matrix.shape, np.asarray(matrix))
    encoding = matrix.attrs.get("encoding-type") if hasattr(matrix, "attrs") else None
    if encoding in ("csr_matrix", "csc_matrix"):
        _check_numbers(matrix["data"].dtype)
        n_obs, n_vars = (int(size) for size in matrix.attrs["shape"])
        indptr = np.asarray(matrix["indptr"][:])
        if encoding == "csc_matrix":
            columns = _SparseRows((n_vars, n_obs), indptr, matrix["indices"], matrix["data"])
            return _transposed_on_disk(columns, closing)
        return _SparseRows((n_obs, n_vars), indptr, matrix["indices"], matrix["data"])
    if hasattr(matrix, "shape") and hasattr(matrix, "dtype") and len(matrix.shape) == 2 and not hasattr(matrix, "dask"):
        _check_numbers(matrix.dtype)
        return _DenseRows((int(matrix.shape[0]), int(matrix.shape[1])), matrix)
    raise ValueError(
        f"expected a sparse or dense matrix in memory or on disk, got {type(matrix).__name__}; "
        "load it with adata.to_memory() or give the path of the file"
    )


def _check_numbers(dtype: Any) -> None:
    if np.dtype(dtype).kind not in "biuf":
        raise ValueError(f"expected a matrix of integers or floats, got dtype {dtype}")


def _transposed_on_disk(columns: _SparseRows, closing: contextlib.ExitStack) -> _SparseRows:
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
    return _SparseRows((n_obs, n_vars), indptr, indices, data)


def map_genes(source: CellSource, vocabulary: Vocabulary, *, normalized: bool = False) -> ColumnMap:
    """Find the columns of a data set in a vocabulary.

    Several rows of ``var[gene_symbols]`` with one name are several measured features of one gene, and their counts are
    added; log-normalised values cannot be.

    Raises:
        ValueError: no gene of the vocabulary (names the var column that would fit, if any), or repeated names: of
            ``var_names`` always, of ``gene_symbols`` when the values are normalised.
    """
    can_merge = source.gene_symbols is not None and not normalized
    try:
        column_map = vocabulary.map_columns(source.var_names, merge_duplicates=can_merge)
    except ValueError as error:
        if source.gene_symbols is not None:
            hint = "log-normalised values of one gene cannot be added, counts can: give raw counts"
        else:
            hint = (
                "make them unique with adata.var_names_make_unique() (columns but the first are then unknown), "
                "or keep them in a var column and name it with gene_symbols (counts of one gene are then added)"
            )
        raise ValueError(f"{source.name}: {error}; {hint}") from None
    if column_map.num_found == 0:
        column, found = best_name_column(vocabulary, source.var)
        if found == 0:
            hint = "and none in any other var column; the model was made for other genes or another species"
        elif column is None:
            hint = f"but {found:,} in var_names: leave gene_symbols out"
        else:
            hint = f"but {found:,} in var[{column!r}]: pass gene_symbols={column!r} (--gene-symbols {column})"
        wanted = "var_names" if source.gene_symbols is None else f"var[{source.gene_symbols!r}]"
        raise ValueError(
            f"{source.name}: expected genes such as {', '.join(vocabulary.genes[:3])}, got none of the "
            f"{len(vocabulary):,} vocabulary genes in {wanted} (such as {', '.join(source.var_names[:3])}), {hint}"
        )
    return column_map


def looks_like_counts(source: CellSource) -> bool:
    """Whether a sample of cells from all over the data set holds whole numbers only.

    Raises ValueError that names cell, gene and value for a negative, NaN or infinite number in the sample.
    """
    windows, rows = 8, 32
    starts = np.unique(np.linspace(0, max(0, source.n_obs - rows), windows).astype(int))
    whole = True
    for start in starts.tolist():
        indptr, indices, data = source.read_rows(start, min(start + rows, source.n_obs))
        wrong = ~np.isfinite(data) | (data < 0)
        if wrong.any():
            entry = int(np.argmax(wrong))
            row = int(np.searchsorted(indptr, entry, side="right")) - 1
            raise ValueError(
                f"{source.name}: row {start + row} ({source.cell_name(start + row)}), column {indices[entry]}: value "
                f"{data[entry]}; expected raw counts (or log-normalised values), not negative, NaN or infinite ones"
            )
        whole = whole and bool(np.all(data == np.rint(data)))
    return whole


def check_counts(source: CellSource, normalized: bool) -> None:
    """Refuse numbers that are not whole unless normalized, and say which other matrix of the data set holds counts.

    Looks at a sample of cells; warns of whole numbers that are said to be normalised.

    Raises:
        ValueError: names the data set and what to do.
    """
    counts = looks_like_counts(source)
    if normalized and counts and source.n_obs:
        warnings.warn(
            f"{source.name}: normalized=True, but the matrix holds whole numbers only, as raw counts do", stacklevel=3
        )
    if normalized or counts:
        return
    fitting = []
    for other in source.other_layers:
        with contextlib.suppress(ValueError), source.open_layer(other) as matrix:
            if looks_like_counts(matrix):
                fitting.append("X (no layer)" if other is None else f"layer={other!r} (--layer {other})")
    hint = f"these matrices hold whole numbers: {', '.join(fitting)}; " if fitting else ""
    wanted = "X" if source.layer is None else f"layer {source.layer!r}"
    raise ValueError(
        f"{source.name}: expected raw counts in {wanted}, got numbers that are not whole; {hint}"
        "if they are log1p(count / total * 10,000) already, pass normalized=True (--normalized; of pretrain, "
        "normalized=true)"
    )


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


DEPTH_TARGETS = ("value", "fold", "offset")


def add_depth_tokens(
    batch: RaggedBatch, totals: Tensor, *, num_genes: int, target: float = 4.0, mode: str = "value"
) -> RaggedBatch:
    """The batch with the two read-depth tokens of scFoundation (Hao et al. 2024) at the end of each cell.

    First T, the log10 total that is aimed at, with gene id ``num_genes``; then S = log10(total), the cell's own, with
    gene id ``num_genes + 1``. A cell whose total is 0 has no logarithm and no gene: it gets no tokens and stays empty.

    Args:
        batch: cells without depth tokens and without slack rows.
        totals: (batch,) float, raw counts of each cell summed over the genes of the vocabulary, as
            pack_rows_and_totals gives them: the published code sums after it has mapped the genes, too.
        num_genes: genes of the vocabulary, G.
        target: what T is, by ``mode``: "value" T = target; "fold" T = log10(total * target);
            "offset" T = log10(total) + target.

    Raises:
        ValueError: another mode, a fold that is not positive, a target that is not finite, totals that do not fit.
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
    source = torch.log10(totals)
    if mode == "value":
        aimed = torch.full_like(source, target)
    else:
        aimed = source + (math.log10(target) if mode == "fold" else target)
    has_tokens = totals > 0

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
