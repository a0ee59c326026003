"""The numbers of a data set: whether they are what they are said to be, counts, log-normalised values or others."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from xtrimogene.cells.genes import columns_left_out
from xtrimogene.cells.instead import matrix_instead
from xtrimogene.cells.kinds import ValueKind
from xtrimogene.cells.matrix import Array, CsrArrays
from xtrimogene.cells.sources import CellSource

# How far a sum may be from the total that it should have.
_TOLERANCE = 0.01
# A matrix of so many columns is not cut to variable genes, and its obs, which may be large, need not be read.
_MANY_COLUMNS = 10_000
# How far a number may be from the whole one that it stands for, as in the packer.
_NOISE = 1e-6
# log1p of a total of a hundred million counts.
_LARGEST_LOGARITHM = 18.5
# Where tools write a cell's total: scanpy, Seurat, and older ones.
_TOTALS = ("n_counts", "total_counts", "nCount_RNA", "total_umis", "n_umi", "nUMI", "n_UMIs", "raw_sum")


_THINS = "thins counts: round those that are estimated or corrected, or train without depth tokens"


class BadNumbers(ValueError):
    """A cell holds numbers that are not what they are said to be: it stays so until the input or an option changes."""


class Look(NamedTuple):
    """What the numbers of some cells look like.

    text    in words
    values  "counts", "log1p" (of the total asked for), "logged" (otherwise), "scaled" (not logged) or "unknown"
    """

    text: str
    values: str


def looks_like_counts(source: CellSource) -> bool:
    """Whether a sample of cells from all over the data set holds whole numbers only, but for rounding.

    Raises ValueError that names cell, gene and value for a negative, NaN or infinite number in the sample.
    """
    return all(_all_whole(data) for _, (_, _, data) in _sample(source))


def check_numbers(
    source: CellSource,
    kind: ValueKind,
    *,
    target_sum: float = 1e4,
    depth_tokens: bool = False,
    thinned: bool = False,
    total_counts: str | None = None,
) -> LogScale | None:
    """Look at a sample of cells: refuse counts that are not whole and say which other matrix of the data set holds
    counts; warn of numbers of another kind or scale than they are said to be, and of counts cut to some genes.

    ``depth_tokens``: the model reads each cell's total; ``thinned``: and is trained so, which takes whole counts only.

    Returns, for values that are log-normalised already, what goes on to look at every cell.

    Raises:
        ValueError: names the data set and what to do.
    """
    sample = list(_sample(source))
    rows = [rows_csr for _, rows_csr in sample]
    whole = all(_all_whole(data) for _, _, data in rows)
    look = looks(rows, target_sum)
    if kind.whole and not whole:
        _refuse_fractions(source, look, depth_tokens, thinned)
    if not kind.logged and look is not None and look.values == "log1p":
        wanted = "counts" if kind.fractional else "values that are not logged"
        raise ValueError(
            f"{source.name}: expected {wanted}, got numbers that look like {look.text}; pass values='log1p' "
            "(--values log1p), or give the counts"
        )
    doubt = _doubt(kind, look, rows, target_sum, depth_tokens and total_counts is None)
    if doubt is not None:
        warnings.warn(f"{source.name}: {doubt}", stacklevel=4)
    if kind.values == "counts" and total_counts is None:
        _warn_of_cut_cells(source, sample)
    return LogScale(source, target_sum, rows, told=doubt is not None) if kind.logged else None


def _doubt(
    kind: ValueKind, look: Look | None, rows: list[CsrArrays], target_sum: float, without_totals: bool
) -> str | None:
    """What is to be told of numbers that look like others than they are said to be, None for nothing."""
    values = None if look is None else look.values
    if kind.logged and values in (None, "log1p", "unknown"):
        text = _two_scales(rows, target_sum)
        if text is not None:
            return f"expected {_log1p(target_sum)}, got {text}; give all cells on one scale"
    if look is None or kind.whole:
        return None
    if kind.logged and values == "counts":
        return "normalized=True, but the matrix holds whole numbers only, as raw counts do"
    seen = f"got numbers that look like {look.text}"
    if kind.logged and values != "log1p":
        return f"expected {_log1p(target_sum)}, {seen}; give values of that scale, or the raw counts"
    if kind.fractional and values == "logged":
        return f"expected counts, {seen}; give the raw counts"
    if kind.values == "tpm" and values == "logged":
        return f"expected values that are not logged, {seen}; undo the logarithm"
    if kind.fractional and values == "scaled" and without_totals:
        return (
            f"{seen}, and this model reads each cell's total (config depth_tokens): name the obs column of the totals "
            "with total_counts (--total-counts)"
        )
    return None


def without(left_out: npt.NDArray[np.bool_], rows_csr: CsrArrays) -> CsrArrays:
    """CSR rows without some columns."""
    if not left_out.any():
        return rows_csr
    indptr, indices, data = rows_csr
    kept = ~np.take(left_out, indices, mode="clip")  # the packer refuses columns outside the matrix
    before = np.concatenate([[0], np.cumsum(kept)])
    return before[indptr], indices[kept], data[kept]


def refused(source: CellSource, error: ValueError, thinned: bool, rows_csr: CsrArrays, first_row: int) -> BadNumbers:
    """The packer's refusal with the names of data set, cell and column, and what the cell looks like."""
    row, column = getattr(error, "row", None), getattr(error, "column", None)
    if row is None:
        return BadNumbers(f"{source.name}: {error}")
    place = f"cell {source.cell_name(row)!r}"
    if isinstance(column, int) and 0 <= column < source.n_vars:
        place += f", {str(source.var.index[column])!r}"
    text = f"{source.name}: {error} ({place})"
    if getattr(error, "fault", None) == "not_whole":
        indptr, indices, data = rows_csr
        own = slice(int(indptr[row - first_row]), int(indptr[row - first_row + 1]))
        left_out = columns_left_out(source.var)
        cell = without(left_out, (np.array([0, own.stop - own.start]), indices[own], data[own]))
        look = looks([cell], 1e4)
        if look is not None and look.values != "unknown":
            text += f"; the cell looks like {look.text} in a matrix of counts: give all cells as counts"
        elif thinned:
            text += f"; depth_tokens=True {_THINS}"
        else:
            text += (
                "; counts that are estimated or corrected need not be whole: pass fractional_counts=True "
                "(--fractional-counts)"
            )
    return BadNumbers(text)


class LogScale:
    """Whether cells are log1p(count / total * target_sum), one by one.

    The sum of expm1 over all genes of a cell is then target_sum, or less where the matrix is cut to some genes. Which
    of the two holds is seen in a sample of the cells.
    """

    def __init__(self, source: CellSource, target_sum: float, sample: list[CsrArrays], *, told: bool) -> None:
        self.source, self.target_sum, self.silent = source, target_sum, told
        sums = np.concatenate([np.zeros(0), *(log_sums(indptr, data) for indptr, _, data in sample)])
        sums = sums[sums > 0]
        self.complete = bool(len(sums)) and float(np.mean(_near(sums, target_sum))) >= 0.9

    def check(self, rows_csr: CsrArrays, first_row: int) -> None:
        """Warns, once for a data set, of a cell of another scale; rows without columns that are no genes."""
        if self.silent:
            return
        indptr, _, data = rows_csr
        sums = log_sums(indptr, data)
        off = sums > self.target_sum * (1 + _TOLERANCE)
        if self.complete:
            off |= (sums > 0) & (sums < self.target_sum * (1 - _TOLERANCE))
        if not off.any():
            return
        self.silent = True
        row = int(np.argmax(off))
        own = data[indptr[row] : indptr[row + 1]]
        look = looks([(np.array([0, len(own)]), np.zeros(len(own), int), own)], self.target_sum)
        warnings.warn(
            f"{self.source.name}: row {first_row + row} ({self.source.cell_name(first_row + row)}): expected "
            f"log1p(count / total * {self.target_sum:,.0f}), got values whose expm1 sums to {sums[row]:,.1f}"
            f"{f'; they look like {look.text}' if look else ''}; other cells may be off as well",
            stacklevel=4,
        )


def check_logged(source: CellSource, rows_csr: CsrArrays, first_row: int, target_sum: float) -> None:
    """Refuse, among numbers that need not be whole, cells that are log1p(count / total * target_sum); rows without
    columns that are no genes.

    Raises BadNumbers that names the cell.
    """
    indptr, _, data = rows_csr
    if data.dtype.kind != "f":
        return
    for row in np.flatnonzero(_near(log_sums(indptr, data), target_sum)).tolist():
        own = data[indptr[row] : indptr[row + 1]]
        if not _all_whole(own):
            raise BadNumbers(
                f"{source.name}: row {first_row + row} ({source.cell_name(first_row + row)}): expected values that are "
                f"not logged, got values that look like {_log1p(target_sum)}; give all cells on one scale"
            )


def log_sums(indptr: Array, data: Array) -> npt.NDArray[np.float64]:
    """(rows,) sum over each row of expm1: the total that log1p was taken of."""
    return _row_sums(indptr, _expm1(data if data.dtype == np.float64 else data.astype(np.float32, copy=False)))


def read_totals(source: CellSource, column: str) -> npt.NDArray[np.float64]:
    """(n_obs,) totals of the cells from a column of obs.

    Raises ValueError for a missing column, or one that holds something else than finite numbers of at least 0.
    """
    obs = source.obs()
    if column not in obs.columns:
        likely = columns_of_totals(obs)
        known = (
            f"such as {', '.join(likely)}" if likely else f"its columns: {', '.join(map(str, obs.columns)) or 'none'}"
        )
        raise ValueError(f"{source.name}: total_counts: expected a column of obs, got {column!r}; {known}")
    totals = _numbers_of(obs[column])
    if totals is None:
        raise ValueError(
            f"{source.name}: total_counts: expected numbers in obs[{column!r}], got {obs[column].dtype} values"
        )
    wrong = ~(np.isfinite(totals) & (totals >= 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{source.name}: total_counts: expected finite numbers of at least 0 in obs[{column!r}], got {totals[row]} "
            f"in row {row} ({source.cell_name(row)})"
        )
    if 0 < totals.max(initial=0) < _LARGEST_LOGARITHM:
        warnings.warn(
            f"{source.name}: total_counts: no total in obs[{column!r}] is above {totals.max():.3g}, as if they were "
            "logarithms of totals; give the totals themselves",
            stacklevel=5,
        )
    return totals


def check_totals(
    source: CellSource, column: str, given: Array, sums: Array, row_numbers: npt.NDArray[np.int64]
) -> None:
    """Refuse totals of cells that are below the sums of their counts: the column is another one.

    Raises BadNumbers that names the cell.
    """
    wrong = given < sums * (1 - _NOISE)
    if wrong.any():
        place = int(np.argmax(wrong))
        row = int(row_numbers[place])
        raise BadNumbers(
            f"{source.name}: total_counts: expected each cell's total in obs[{column!r}], got {given[place]:g} in row "
            f"{row} ({source.cell_name(row)}), whose counts sum to {sums[place]:g}; name the column of the totals"
        )


def columns_of_totals(obs: pd.DataFrame) -> list[str]:
    """Columns of obs that are likely to hold the cells' totals."""
    return [column for column in _TOTALS if column in obs.columns and _numbers_of(obs[column]) is not None]


def _numbers_of(column: pd.Series) -> npt.NDArray[np.float64] | None:
    """The numbers of a column of obs, NaN where there is none; None for a column of other things."""
    if not pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_bool_dtype(column.dtype):
        return None
    return column.to_numpy(np.float64, na_value=np.nan)


def _sample(source: CellSource) -> Iterator[tuple[int, CsrArrays]]:
    """(first row, rows) of eight windows of 32 rows from all over the data set, without columns that are no genes.

    Raises ValueError that names cell, gene and value for a negative, NaN or infinite number.
    """
    windows, rows = 8, 32
    left_out = columns_left_out(source.var)
    starts = np.unique(np.linspace(0, max(0, source.n_obs - rows), windows).astype(int))
    for start in starts.tolist():
        rows_csr = without(left_out, source.read_rows(start, min(start + rows, source.n_obs)))
        indptr, indices, data = rows_csr
        wrong = ~np.isfinite(data) | (data < (-_NOISE if data.dtype.kind == "f" else 0))
        if wrong.any():
            entry = int(np.argmax(wrong))
            row = int(np.searchsorted(indptr, entry, side="right")) - 1
            raise ValueError(
                f"{source.name}: row {start + row} ({source.cell_name(start + row)}), column {indices[entry]}: value "
                f"{data[entry]}; expected raw counts (or log-normalised values), not negative, NaN or infinite ones"
                f"{matrix_instead(source)}"
            )
        yield start, rows_csr


def _all_whole(data: Array) -> bool:
    """Whether numbers are whole but for the rounding of a logarithm that was undone, as the packer sees it."""
    if data.dtype.kind != "f":
        return True
    numbers = data.astype(np.float64)
    return bool(np.all(np.abs(numbers - np.rint(numbers)) <= _NOISE * np.maximum(1, numbers)))


def _near(numbers: Array, wanted: float) -> Array:
    return np.abs(numbers - wanted) <= _TOLERANCE * wanted


def _log1p(target_sum: float) -> str:
    return f"log1p(count / total * {target_sum:,.0f})"


def looks(rows: list[CsrArrays], target_sum: float) -> Look | None:
    """What the numbers of some cells look like, None where nothing stands out or there is no number.

    Values of a known scale have a known sum over the cell once the logarithm is undone; of an unknown scale, the same
    sum in all cells.
    """
    plain, natural, binary = (
        np.concatenate([np.zeros(0), *(_row_sums(indptr, undone(data.astype(np.float64))) for indptr, _, data in rows)])
        for undone in (np.asarray, _expm1, _exp2m1)
    )
    used = plain > 0
    if not used.any():
        return None
    plain, natural, binary = plain[used], natural[used], binary[used]
    if all(_all_whole(data) for _, _, data in rows):
        return Look("raw counts", "counts")
    if np.mean(_near(natural, target_sum)) >= 0.9:
        return Look(_log1p(target_sum), "log1p")
    if _one_scale(plain):
        return Look(f"counts scaled to a total of {_scale(plain)}, not logged", "scaled")
    if _one_scale(natural):
        return Look(f"log1p of counts scaled to a total of {_scale(natural)}", "logged")
    if _one_scale(binary):
        return Look(f"log2(1 + x) of counts scaled to a total of {_scale(binary)}", "logged")
    if np.isfinite(natural).all() and all(_all_whole(_expm1(data.astype(np.float64))) for _, _, data in rows):
        return Look("log1p of counts that were not divided by the cell's total", "logged")
    middle = float(np.median(natural))
    if middle > target_sum * (1 + _TOLERANCE):
        return Look(f"values whose expm1 sums to {middle:,.0f} a cell", "unknown")
    return None


def _expm1(numbers: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.expm1(numbers)


def _exp2m1(numbers: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp2(numbers) - 1


def _row_sums(indptr: Array, numbers: Array) -> npt.NDArray[np.float64]:
    sums = np.zeros(len(indptr) - 1)
    used = np.flatnonzero(np.diff(indptr))
    if len(used):
        dtype = np.float32 if numbers.dtype == np.float32 else np.float64
        with np.errstate(over="ignore", invalid="ignore"):
            sums[used] = np.add.reduceat(numbers[: indptr[-1]], indptr[used], dtype=dtype)
    return sums


def _one_scale(sums: Array) -> bool:
    """Whether all cells have one sum: about one that people scale to, or any other to four digits, as the sums of cells
    that have lost some of their genes are not."""
    middle = float(np.median(sums))
    if not np.isfinite(middle):
        return False
    usual = bool(_near(np.array([1e4, 1e5, 1e6]), middle).any())
    tolerance = _TOLERANCE if usual else 1e-4
    near = np.abs(np.where(np.isfinite(sums), sums, 0) - middle) <= tolerance * middle
    return (usual or len(sums) > 1) and float(np.mean(near)) >= 0.9


def _scale(sums: Array) -> str:
    middle = float(np.median(sums))
    if abs(middle - 1e6) <= 1e4:
        return "1,000,000 (counts per million, or TPM)"
    if abs(middle - 1e4) <= 1e2:
        return "10,000"
    return f"{middle:,.0f} (the default of scanpy's normalize_total is the median total)"


def _refuse_fractions(source: CellSource, look: Look | None, depth_tokens: bool, thinned: bool) -> None:
    fitting = []
    for other in source.other_layers:
        with contextlib.suppress(ValueError), source.open_layer(other) as matrix:
            if looks_like_counts(matrix):
                fitting.append("X (no layer)" if other is None else f"layer={other!r} (--layer {other})")
    wanted = "X" if source.layer is None else f"layer {source.layer!r}"
    hint = f"these matrices hold whole numbers: {', '.join(fitting)}; " if fitting else ""
    seen = f"; they look like {look.text}" if look is not None and look.values != "unknown" else ""
    if thinned:
        raise ValueError(
            f"{source.name}: expected raw counts in {wanted}, got numbers that are not whole; {hint}depth_tokens=True "
            f"{_THINS}{seen}"
        )
    if depth_tokens:
        option = (
            "values='log1p' (--values log1p) with the obs column of the cells' totals, total_counts (--total-counts)"
        )
    else:
        option = "normalized=True (--normalized; of pretrain, normalized=true)"
    scaled = ""
    if look is not None and look.values == "scaled":
        scaled = "; if they are TPM or the like, pass values='tpm' (--values tpm)"
    raise ValueError(
        f"{source.name}: expected raw counts in {wanted}, got numbers that are not whole; {hint}if they are "
        f"log1p(count / total * 10,000) already, pass {option}; if they are counts that are estimated or corrected, "
        f"pass fractional_counts=True (--fractional-counts){scaled}{seen}"
    )


def _two_scales(rows: list[CsrArrays], target_sum: float) -> str | None:
    """What the cells look like that are none of target_sum, where these are all of one other total: those of another
    data set, say."""
    sums = np.concatenate([log_sums(indptr, data.astype(np.float64)) for indptr, _, data in rows])
    others = sums[(sums > 0) & ~_near(sums, target_sum)]
    if len(others) < 8 or len(others) == len(sums) or not _one_scale(others):
        return None
    share = f"{len(others)} of {len(sums)} sampled cells"
    return f"{share} that look like log1p of counts scaled to a total of {_scale(others)}"


def _warn_of_cut_cells(source: CellSource, sample: list[tuple[int, CsrArrays]]) -> None:
    """Offer the column of totals that far exceed the counts at hand: the matrix is cut to some genes then."""
    if not source.n_obs or source.n_vars >= _MANY_COLUMNS:
        return
    sums = np.concatenate([_row_sums(indptr, data) for _, (indptr, _, data) in sample])
    row_numbers = np.concatenate([start + np.arange(len(indptr) - 1) for start, (indptr, _, _) in sample])
    obs = source.obs()
    for column in columns_of_totals(obs):
        totals = _numbers_of(obs[column].iloc[row_numbers])
        assert totals is not None
        used = (totals > 0) & (sums > 0)
        if not used.any() or np.any(sums[used] > totals[used] * (1 + _NOISE)):
            continue
        share = float(np.median(sums[used] / totals[used]))
        if share < 0.9:
            warnings.warn(
                f"{source.name}: the counts of a cell sum to {share:.0%} of obs[{column!r}]: the matrix is cut to some "
                f"of its genes; to divide by the whole cell's total, pass total_counts={column!r} (--total-counts "
                f"{column})",
                stacklevel=5,
            )
            return
