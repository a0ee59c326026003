"""Tests of the CSR packer, in C++ and in NumPy, against plain Python loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtg_kernels import dispatch
from xtrimogene.cells.packing import pack_csr_numpy

Array = npt.NDArray[Any]
KEYS = ("values", "gene_ids", "cu_seqlens", "distinct_index", "totals")
DTYPES = {
    "values": np.float32,
    "gene_ids": np.int32,
    "cu_seqlens": np.int32,
    "distinct_index": np.int32,
    "totals": np.float64,
}
PACKERS = ["numpy"] + (["cpp"] if dispatch.extension() is not None else [])


def packer(name: str) -> Any:
    return pack_csr_numpy if name == "numpy" else dispatch.extension().pack_csr  # type: ignore[union-attr]


def plain_pack(
    indptr: Array, indices: Array, data: Array, gene_ids: Array, rows: Array | None = None, normalize: bool = True
) -> dict[str, list[Any]]:
    """The definition, one number at a time."""
    packed: dict[str, list[Any]] = {key: [] for key in KEYS}
    packed["cu_seqlens"].append(0)
    for row in range(len(indptr) - 1) if rows is None else rows.tolist():
        counts: dict[int, float] = {}
        total = 0.0
        for t in range(indptr[row], indptr[row + 1]):
            gene = int(gene_ids[indices[t]])
            count = float(data[t]) if normalize else float(np.float32(data[t]))
            if gene >= 0 and count != 0:
                counts[gene] = counts.get(gene, 0.0) + count
                total += count
        start = len(packed["values"])
        first_of: dict[float, int] = {}
        for token, gene in enumerate(sorted(counts), start):
            value = float(np.float32(math.log1p(counts[gene] / total * 1e4) if normalize else counts[gene]))
            packed["values"].append(value)
            packed["gene_ids"].append(gene)
            packed["distinct_index"].append(first_of.setdefault(value, token))
        packed["totals"].append(total)
        packed["cu_seqlens"].append(start + len(counts))
    return packed


def assert_packed(packed: dict[str, Any], expected: dict[str, Any], *, exact: bool) -> None:
    for key in KEYS:
        want = np.asarray(expected[key], DTYPES[key])
        assert packed[key].dtype == DTYPES[key], key
        if key == "values" and not exact:
            # NumPy's log1p may differ from the C library's in the last bit.
            np.testing.assert_array_max_ulp(packed[key], want, maxulp=1)
        else:
            np.testing.assert_array_equal(packed[key], want, err_msg=key)


@st.composite
def matrices(draw: st.DrawFn) -> dict[str, Any]:
    """Ragged CSR: empty rows, unsorted and repeated columns, stored zeros, absent and shared genes, any dtype."""
    n_columns = draw(st.integers(1, 90))
    lengths = draw(st.lists(st.integers(0, 70), min_size=0, max_size=7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    entries = sum(lengths)
    indices = rng.integers(0, n_columns, entries)
    if draw(st.booleans()):  # sorted, no repetition
        rows = [np.sort(rng.choice(n_columns, min(length, n_columns), replace=False)) for length in lengths]
        lengths = [len(row) for row in rows]
        indices = np.concatenate([np.zeros(0, np.int64), *rows])
        entries = len(indices)
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64, np.bool_]))
    data: Array = rng.integers(0, draw(st.sampled_from([3, 100])), entries)
    if draw(st.booleans()):
        data = data * 7  # past the small counts that are remembered
    if np.dtype(dtype).kind == "f" and draw(st.booleans()):
        data = data + rng.random(entries)
    offset = draw(st.integers(0, 3))  # a window of a larger matrix
    return {
        "indptr": (np.concatenate([[0], np.cumsum(lengths)]) + offset).astype(
            draw(st.sampled_from([np.int32, np.int64]))
        ),
        "indices": np.concatenate([np.full(offset, -5), indices]).astype(draw(st.sampled_from([np.int32, np.int64]))),
        "data": np.concatenate([np.ones(offset), data]).astype(dtype),
        "column_gene_ids": draw(
            st.sampled_from(
                [
                    np.arange(n_columns, dtype=np.int32),
                    rng.permutation(n_columns).astype(np.int32),
                    rng.integers(-1, n_columns, n_columns).astype(np.int32),
                    np.full(n_columns, -1, np.int32),
                ]
            )
        ),
        "rows": draw(
            st.sampled_from([None, rng.permutation(len(lengths)), rng.permutation(len(lengths))[: len(lengths) // 2]])
        ),
    }


@pytest.mark.parametrize("name", PACKERS)
@given(matrix=matrices(), normalize=st.booleans(), num_threads=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_equals_the_definition(name: str, matrix: dict[str, Any], normalize: bool, num_threads: int) -> None:
    rows = matrix["rows"]
    expected = plain_pack(
        matrix["indptr"], matrix["indices"], matrix["data"], matrix["column_gene_ids"], rows, normalize
    )
    threads = {} if name == "numpy" else {"num_threads": num_threads}
    packed = packer(name)(**matrix, normalize=normalize, **threads)
    assert_packed(packed, expected, exact=name == "cpp" or not normalize)


def random_counts(n_rows: int = 400, n_columns: int = 3000, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 400, n_rows)
    rows = [np.sort(rng.choice(n_columns, length, replace=False)) for length in lengths]
    return {
        "indptr": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "indices": np.concatenate(rows).astype(np.int32),
        "data": rng.geometric(0.4, lengths.sum()).astype(np.float32),
        "column_gene_ids": np.arange(n_columns, dtype=np.int32),
    }


@pytest.mark.skipif("cpp" not in PACKERS, reason="the C++ extension is not built")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("case", ["plain", "unsorted", "fractions"])
def test_same_bits_on_any_number_of_threads(case: str, normalize: bool) -> None:
    matrix = random_counts()
    rng = np.random.default_rng(1)
    if case == "unsorted":
        matrix["column_gene_ids"] = rng.integers(-1, 2000, 3000).astype(np.int32)
    if case == "fractions":
        matrix["data"] = (matrix["data"] * rng.random(len(matrix["data"]))).astype(np.float32)
    one = packer("cpp")(**matrix, normalize=normalize, num_threads=1)
    for threads in (2, 3, 1000):
        many = packer("cpp")(**matrix, normalize=normalize, num_threads=threads)
        for key in KEYS:
            assert one[key].tobytes() == many[key].tobytes(), key


@pytest.mark.skipif("cpp" not in PACKERS, reason="the C++ extension is not built")
def test_nothing_is_copied_where_nothing_changes() -> None:
    matrix = random_counts()
    packed = packer("cpp")(**matrix, normalize=False)
    assert np.shares_memory(packed["values"], matrix["data"])
    assert np.shares_memory(packed["gene_ids"], matrix["indices"])
    window = {**matrix, "indptr": matrix["indptr"][100:201]}
    packed = packer("cpp")(**window, normalize=False)
    assert np.shares_memory(packed["values"], matrix["data"])
    assert_packed(packed, packer("numpy")(**window, normalize=False), exact=True)
    for change in (
        {"normalize": True},
        {"column_gene_ids": matrix["column_gene_ids"][::-1].copy()},
        {"rows": np.arange(400)},
        {"data": np.where(np.arange(len(matrix["data"])) == 7, 0, matrix["data"])},
    ):
        packed = packer("cpp")(**{"normalize": False, **matrix, **change})
        assert not np.shares_memory(packed["values"], matrix["data"]), change


@pytest.mark.parametrize("name", PACKERS)
def test_counts_are_normalised_over_the_vocabulary_only(name: str) -> None:
    packed = packer(name)(
        indptr=np.array([0, 3]),
        indices=np.array([0, 1, 2]),
        data=np.array([1, 3, 96]),
        column_gene_ids=np.array([0, 1, -1], np.int32),
    )
    assert packed["totals"].tolist() == [4.0]
    np.testing.assert_allclose(packed["values"], np.log1p([2500.0, 7500.0]), rtol=1e-6)


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("counts", [[3, 3 + 1e-12, 5, 3], [3 + 1e-12, 3, 3, 5], [300, 300 * (1 + 1e-12), 1, 1]])
def test_counts_that_round_to_one_value_are_one(name: str, counts: list[float]) -> None:
    arrays = np.array([0, 4]), np.arange(4), np.array(counts)
    genes = np.arange(4, dtype=np.int32)
    packed = packer(name)(*arrays, genes)
    assert_packed(packed, plain_pack(*arrays, genes), exact=name == "cpp")
    assert len(np.unique(packed["distinct_index"])) == 2


@pytest.mark.parametrize("name", PACKERS)
def test_a_cell_of_every_gene(name: str) -> None:
    n = 19264
    shuffled = np.random.default_rng(0).permutation(n)
    packed = packer(name)(
        indptr=np.array([0, 0, n, n]),
        indices=shuffled,
        data=np.arange(n) + 1.0,
        column_gene_ids=np.arange(n, dtype=np.int32),
    )
    assert packed["cu_seqlens"].tolist() == [0, 0, n, n]
    assert packed["gene_ids"].tolist() == list(range(n))
    counts = np.empty(n)
    counts[shuffled] = np.arange(n) + 1.0
    np.testing.assert_allclose(packed["values"], np.log1p(counts / counts.sum() * 1e4), rtol=1e-6)


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.array([1.0, 2, -3, 4])}, r"row 11, column 0: negative value -3\.0; expected raw counts"),
        ({"data": np.array([1, 2, -3, 4], np.int16)}, r"row 11, column 0: negative value -3\.0"),
        ({"data": np.array([1.0, 2, np.nan, 4])}, r"row 11, column 0: value nan is not finite"),
        ({"data": np.array([1.0, 2, 3, np.inf], np.float32)}, r"row 11, column 2: value inf is not finite"),
        ({"data": np.array([1.0, 2, 3, -np.inf])}, r"row 11, column 2: value -inf is not finite"),
        ({"indices": np.array([0, 2, 0, 3])}, r"row 11, column 3: column index outside the matrix, expected 0 \.\. 2"),
        ({"indices": np.array([0, -1, 0, 1])}, r"row 10, column -1: column index outside the matrix"),
        # Also in a column that the vocabulary lacks: such a matrix is not what it claims to be.
        ({"column_gene_ids": np.array([-1, -1, -1], np.int32), "data": np.array([1.0, 2, -3, 4])}, "row 11, column 0"),
        ({"data": np.array([1e308, 1e308, 1, 1])}, "row 10: the sum of its values is not finite"),
        (
            {"data": np.array([1, 1, 1, 1e39]), "normalize": False},
            r"row 11, column 2: value 1e\+39 does not fit float32",
        ),
        # The first faulty row of the order asked for.
        ({"data": -np.ones(4), "rows": np.array([1, 0])}, "row 11, column 0"),
    ],
)
def test_faults_are_named(name: str, change: dict[str, Any], message: str) -> None:
    matrix = {
        "indptr": np.array([0, 2, 4]),
        "indices": np.array([0, 1, 0, 2]),
        "data": np.ones(4),
        "column_gene_ids": np.arange(3, dtype=np.int32),
    }
    with pytest.raises(ValueError, match=message):
        packer(name)(**{**matrix, **change}, first_row=10)


def fault_of(name: str, matrix: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    with pytest.raises(ValueError, match="row") as caught:
        packer(name)(**matrix, **options)
    error: Any = caught.value
    return str(error), error.fault, error.row, error.column


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize(
    ("data", "fault", "message"),
    [
        ([1, 2, -3, 4], ("negative", 11, 0), "negative value -3.0"),
        ([1, 2, -1e-3, 4], ("negative", 11, 0), "negative value -0.001"),
        ([1, 2.5, 3, 4], ("not_whole", 10, 1), "row 10, column 1: value 2.5 is not whole; expected raw counts"),
        ([1, 2, 3, 1e5 + 0.2], ("not_whole", 11, 2), "value 100000.2 is not whole"),
        ([1, 2, 3, np.nan], ("not_finite", 11, 2), "value nan is not finite"),
        ([0.5, 2, -3, 4], ("not_whole", 10, 0), "value 0.5 is not whole"),
    ],
)
def test_counts_have_to_be_whole_where_asked(
    name: str, data: list[float], fault: tuple[str, int, int], message: str
) -> None:
    matrix = {"indptr": np.array([0, 2, 4]), "indices": np.array([0, 1, 0, 2]), "data": np.array(data)}
    for genes in ([0, 1, 2], [-1, -1, -1]):  # a matrix is what it is, whatever genes a vocabulary has
        gene_ids = np.array(genes, np.int32)
        told, *where = fault_of(name, {**matrix, "column_gene_ids": gene_ids}, whole=True, first_row=10)
        assert message in told
        assert tuple(where) == fault


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whole_numbers_but_for_rounding_are_the_whole_ones(name: str, dtype: type) -> None:
    counts = random_counts()
    largest = np.float64(2**53) if dtype is np.float64 else np.float32(2**24)
    counts["data"][:7] = [1, 99, 1e4, 123456, 8_388_607, 1e6 + 1, largest]
    counts["data"] = counts["data"].astype(dtype)
    exact = packer(name)(**counts, whole=True)
    assert exact["rounded"] is False
    assert_packed(packer(name)(**counts), exact, exact=True)
    # As a logarithm leaves them that was undone.
    noisy = {**counts, "data": np.expm1(np.log1p(counts["data"][7:]))}
    noisy["data"] = np.concatenate([counts["data"][:7], noisy["data"]]).astype(dtype)
    assert not np.array_equal(noisy["data"], counts["data"])
    for normalize in (True, False):
        packed = packer(name)(**noisy, whole=True, normalize=normalize)
        assert packed["rounded"] is True
        assert_packed(packed, packer(name)(**counts, normalize=normalize), exact=True)
    assert np.any(noisy["data"] != np.rint(noisy["data"]))  # the input is left as it was


@pytest.mark.skipif("cpp" not in PACKERS, reason="the C++ extension is not built")
@given(matrix=matrices(), data=st.data(), normalize=st.booleans(), num_threads=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_both_packers_tell_the_same_of_odd_numbers(
    matrix: dict[str, Any], data: st.DataObject, normalize: bool, num_threads: int
) -> None:
    numbers = matrix["data"].astype(data.draw(st.sampled_from([np.float32, np.float64])))
    odd = [-1.0, -1e-9, 0.5, 1e-9, 3 + 1e-9, 2.00001, np.nan, np.inf, 1e39, 2.0**53, -0.0]
    for _ in range(data.draw(st.integers(0, 3))):
        if len(numbers):
            with np.errstate(over="ignore"):
                numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(st.sampled_from(odd))
    gene_ids = matrix["column_gene_ids"].copy()
    gene_ids[:: data.draw(st.integers(2, 5))] = -2
    options = {**matrix, "data": numbers, "column_gene_ids": gene_ids, "normalize": normalize, "whole": True}
    told = []
    for name in ("numpy", "cpp"):
        try:
            told.append(packer(name)(**options, **({"num_threads": num_threads} if name == "cpp" else {})))
        except ValueError as error:
            told.append((str(error), error.fault, error.row, error.column))  # type: ignore[attr-defined]
    if isinstance(told[0], dict):
        assert_packed(told[1], told[0], exact=not normalize)
        assert told[1]["rounded"] is told[0]["rounded"]
    else:
        assert told[1] == told[0]


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("whole", [False, True])
def test_columns_that_are_left_out_are_not_looked_at(name: str, whole: bool) -> None:
    matrix = random_counts(40, 600)
    gene_ids = np.arange(600, dtype=np.int32)
    gene_ids[::7] = -1
    without = packer(name)(**{**matrix, "column_gene_ids": gene_ids}, whole=whole)
    gene_ids[::7] = -2
    matrix["data"][matrix["indices"] % 7 == 0] = np.resize(
        [np.nan, -1, 0.3, np.inf, 500], np.sum(matrix["indices"] % 7 == 0)
    )
    assert_packed(packer(name)(**{**matrix, "column_gene_ids": gene_ids}, whole=whole), without, exact=True)
    gene_ids[0] = -1
    with pytest.raises(ValueError, match="column 0"):
        packer(name)(**{**matrix, "column_gene_ids": gene_ids}, whole=whole)


@pytest.mark.parametrize("name", PACKERS)
def test_counts_are_divided_by_the_totals_that_are_given(name: str) -> None:
    matrix = {**random_counts(30, 500), "rows": np.array([3, 0, 17])}
    totals = np.array([5e3, 1234.0, 1e6])
    packed, own = packer(name)(**matrix, cell_totals=totals), packer(name)(**matrix, normalize=False)
    cell = np.repeat(np.arange(3), np.diff(own["cu_seqlens"]))
    np.testing.assert_allclose(packed["values"], np.log1p(own["values"] / totals[cell] * 1e4), rtol=1e-6)
    np.testing.assert_array_equal(packed["totals"], own["totals"])  # what is returned is what was counted
    assert_packed(packer(name)(**matrix, cell_totals=own["totals"]), packer(name)(**matrix), exact=True)
    with pytest.raises(ValueError, match="cell_totals: expected one for each of 3 rows, got 2"):
        packer(name)(**matrix, cell_totals=totals[:2])


@pytest.mark.skipif("cpp" not in PACKERS, reason="the C++ extension is not built")
def test_the_first_fault_is_named_on_any_number_of_threads() -> None:
    matrix = random_counts()
    for row in (398, 201, 103, 102):
        matrix["data"][matrix["indptr"][row]] = -1
    for threads in (1, 2, 4, 16):
        for _ in range(20):
            with pytest.raises(ValueError, match="row 102, column"):
                packer("cpp")(**matrix, num_threads=threads)


@pytest.mark.skipif("cpp" not in PACKERS, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"indptr": np.array([0, 3, 2])},
            ValueError,
            "indptr: expected non-decreasing entries, got 3 before 2 at row 1",
        ),
        ({"indptr": np.array([0, 2, 5])}, ValueError, r"indptr: expected entries in 0 \.\. 4, got 0 \.\. 5"),
        ({"indptr": np.array([-1, 2, 4])}, ValueError, "indptr: expected entries in"),
        ({"indptr": np.array([0.0, 2, 4])}, TypeError, "indptr: expected an integer array, got dtype float64"),
        ({"indptr": np.array([], np.int64)}, ValueError, "indptr: expected at least 1 entry"),
        ({"data": np.ones(3)}, ValueError, "data: expected one value for each of the 4 indices"),
        (
            {"data": np.ones(4, complex)},
            TypeError,
            "data: expected integers, float16, float32 or float64, got dtype complex128",
        ),
        ({"column_gene_ids": np.array([0, -3, 1], np.int32)}, ValueError, "got -3 for column 1"),
        ({"rows": np.array([2])}, ValueError, r"rows: expected row numbers in 0 \.\. 1, got 2"),
        ({"num_threads": 0}, ValueError, "num_threads: expected at least 1, got 0"),
        ({"target_sum": 0.0}, ValueError, "target_sum: expected a positive number"),
    ],
)
def test_arrays_that_are_no_matrix_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    matrix = {
        "indptr": np.array([0, 2, 4]),
        "indices": np.array([0, 1, 0, 2]),
        "data": np.ones(4),
        "column_gene_ids": np.arange(3, dtype=np.int32),
    }
    with pytest.raises(error, match=message):
        packer("cpp")(**{**matrix, **change})


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.uint32, np.uint64])
def test_rarer_dtypes(name: str, dtype: type) -> None:
    arrays = np.array([0, 2, 4]), np.array([0, 1, 0, 2]), np.array([1, 2, 3, 100], dtype)
    genes = np.arange(3, dtype=np.int32)
    assert_packed(packer(name)(*arrays, genes), plain_pack(*arrays, genes), exact=name == "cpp")
