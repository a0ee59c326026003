"""Tests of what numbers are taken for: every cell is checked for what it is said to be, and honest data left alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from xtrimogene.cells.depth import TargetDepth
from xtrimogene.cells.kinds import ValueKind
from xtrimogene.cells.mapped import MappedCells
from xtrimogene.cells.numbers import BadNumbers
from xtrimogene.cells.sources import open_cells
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.inference.embed import embed
from xtrimogene.inference.gene_level import gene_embeddings, predict_expression
from xtrimogene.inference.model_cells import ModelCells
from xtrimogene.model import XTrimoGene
from xtrimogene.network.vocabulary import Vocabulary

N_OBS, N_VARS = 600, 80
GENES = [f"G{i}" for i in range(N_VARS)]
VOCABULARY = Vocabulary(GENES)
Rows = npt.NDArray[np.float64]


def counts(n_obs: int = N_OBS, seed: int = 0) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    rates = rng.lognormal(0, 1, N_VARS) * rng.lognormal(0, 0.5, (n_obs, 1))
    matrix = sp.csr_matrix(rng.poisson(rates).astype(np.float64))
    assert np.diff(matrix.indptr).min() > 0
    return matrix


def scaled(matrix: sp.csr_matrix, total: float = 1e4, log: Callable[[Rows], Rows] = np.log1p) -> sp.csr_matrix:
    """log(count / total of the cell * total), cell by cell."""
    result = matrix.astype(np.float64)
    sums = np.repeat(np.asarray(result.sum(axis=1)).ravel(), np.diff(result.indptr))
    result.data = log(result.data / sums * total)
    return result


def adata_of(matrix: Any, **obs: Any) -> AnnData:
    index = [f"cell{i}" for i in range(matrix.shape[0])]
    return AnnData(matrix, obs=pd.DataFrame(obs, index=index), var=pd.DataFrame(index=GENES[: matrix.shape[1]]))


def as_it_is(numbers: Rows) -> Rows:
    return numbers


def packed(
    data: Any, vocabulary: Vocabulary = VOCABULARY, kind: ValueKind | None = None, **options: Any
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """All cells, in windows: their values and totals."""
    columns = {name: options.pop(name) for name in ("layer", "gene_symbols") if name in options}
    with open_cells(data, **columns) as source:
        cells = MappedCells.checked(source, vocabulary, kind or ValueKind(), **options)
        pieces = [
            cells.pack(source.read_rows(start, min(start + 128, source.n_obs)), first_row=start)
            for start in range(0, source.n_obs, 128)
        ]
    return (
        np.concatenate([batch.values.numpy() for batch, _ in pieces]),
        np.concatenate([totals.numpy() for _, totals in pieces]),
    )


def told(data: Any, vocabulary: Vocabulary = VOCABULARY, kind: ValueKind | None = None, **options: Any) -> list[str]:
    """The warnings about numbers; those about the names of genes are another matter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        packed(data, vocabulary, kind, **options)
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "old name" not in text and "counts of columns added up" not in text]


@pytest.fixture(scope="module")
def model() -> XTrimoGene:
    return XTrimoGene.from_preset("3m", VOCABULARY, num_layers=1, dim=16, num_heads=2)


@pytest.fixture(scope="module")
def depth_model() -> XTrimoGene:
    return XTrimoGene.from_preset("3m", VOCABULARY, num_layers=1, dim=16, num_heads=2, depth_tokens=True)


# Row 300 is in no window of the sample that is looked at before the work.
def with_row(matrix: sp.csr_matrix, other: sp.csr_matrix, row: int = 300) -> AnnData:
    mixed = matrix.copy()
    mixed.data[mixed.indptr[row] : mixed.indptr[row + 1]] = other.data[other.indptr[row] : other.indptr[row + 1]]
    return adata_of(mixed)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            scaled(counts()),
            r"the cell looks like log1p\(count / total \* 10,000\) in a matrix of counts: give all cells",
        ),
        (
            scaled(counts(), 1e6, as_it_is),
            r"the cell looks like counts scaled to a total of 1,000,000 \(counts per mill",
        ),
        (scaled(counts(), 1e6), "the cell looks like log1p of counts scaled to a total of 1,000,000"),
        (
            counts() * 0.93,
            r"counts that are estimated or corrected need not be whole: pass fractional_counts=True",
        ),
    ],
)
def test_a_cell_of_other_numbers_among_counts_is_refused_by_name(
    model: XTrimoGene, other: sp.csr_matrix, message: str
) -> None:
    adata = with_row(counts(), other)
    refused = (
        rf"row 300, column \d+: value [\d.]+ is not whole; expected raw counts \(cell 'cell300', 'G\d+'\); {message}"
    )
    with pytest.raises(BadNumbers, match=refused):
        packed(adata)
    runs: list[Callable[[], Any]] = [
        lambda: embed(adata, model, progress=False),
        lambda: gene_embeddings(adata, model, ["G1"], progress=False),
        lambda: predict_expression(adata, model, ["G1"], progress=False),
        lambda: TrainingCells(adata, VOCABULARY, min_genes=0, progress=False),
    ]
    for run in runs:
        with pytest.raises(BadNumbers, match=refused):
            run()


def test_all_cells_of_other_numbers_are_refused_before_the_work() -> None:
    with pytest.raises(
        ValueError, match=r"pass normalized=True .* pass fractional_counts=True .*; they look like log1p"
    ):
        packed(adata_of(scaled(counts())))
    with pytest.raises(ValueError, match=r"if they are TPM or the like, pass values='tpm' \(--values tpm\); they look"):
        packed(adata_of(scaled(counts(), 1e6, as_it_is)))
    with pytest.raises(ValueError, match="expected values that are not logged, got numbers that look like log1p"):
        packed(adata_of(scaled(counts())), kind=ValueKind("tpm"))
    with pytest.raises(ValueError, match="expected counts, got numbers that look like log1p"):
        packed(adata_of(scaled(counts())), kind=ValueKind(fractional=True))


def test_counts_but_for_rounding_are_the_counts() -> None:
    matrix = counts()
    noisy = matrix.copy()
    noisy.data = np.expm1(np.log1p(noisy.data))
    assert 0 < np.abs(noisy.data - matrix.data).max() < 1e-9
    with pytest.warns(UserWarning, match="whole but for rounding") as caught:
        values, totals = packed(adata_of(noisy))
    assert len(caught) == 1
    want_values, want_totals = packed(adata_of(matrix))
    np.testing.assert_array_equal(values, want_values)
    np.testing.assert_array_equal(totals, want_totals)
    # float32, as most files have it, scaled back from a total of 10,000
    for_log = scaled(matrix, 1e4).astype(np.float32)
    sums = np.repeat(want_totals.astype(np.float32), np.diff(matrix.indptr))
    for_log.data = np.expm1(for_log.data) / np.float32(1e4) * sums
    with pytest.warns(UserWarning, match="whole but for rounding"):
        np.testing.assert_array_equal(packed(adata_of(for_log))[0], want_values)


def test_fractional_counts_are_taken_where_asked() -> None:
    matrix = counts() * 0.93
    values, totals = packed(adata_of(matrix), kind=ValueKind(fractional=True))
    np.testing.assert_allclose(totals, np.asarray(matrix.sum(axis=1)).ravel())
    np.testing.assert_allclose(values, scaled(matrix).data, rtol=1e-6)
    assert not told(adata_of(matrix), kind=ValueKind(fractional=True))
    # One cell that is logged is no count either, nor among TPM.
    with pytest.raises(
        BadNumbers, match=r"row 300 \(cell300\): expected values that are not logged, got values that l"
    ):
        packed(with_row(matrix, scaled(matrix)), kind=ValueKind(fractional=True))
    with pytest.raises(BadNumbers, match=r"row 300 \(cell300\): expected values that are not logged"):
        packed(with_row(scaled(matrix, 1e6, as_it_is), scaled(matrix)), kind=ValueKind("tpm"))


def test_tpm_are_divided_by_their_sum() -> None:
    matrix = scaled(counts(), 1e6, as_it_is)
    values, totals = packed(adata_of(matrix), kind=ValueKind("tpm"))
    np.testing.assert_allclose(totals, 1e6)
    np.testing.assert_allclose(values, scaled(counts()).data, rtol=1e-6)
    assert not told(adata_of(matrix), kind=ValueKind("tpm"))


@pytest.mark.parametrize(
    ("numbers", "look"),
    [
        (
            scaled(counts(), 150),
            r"log1p of counts scaled to a total of 150 \(the default of scanpy's normalize_total is",
        ),
        (scaled(counts(), 1e6), r"log1p of counts scaled to a total of 1,000,000"),
        (
            scaled(counts(), 1e6, as_it_is),
            r"counts scaled to a total of 1,000,000 \(counts per million, or TPM\), not l",
        ),
        (scaled(counts(), 1e4, as_it_is), "counts scaled to a total of 10,000, not logged"),
        (scaled(counts(), 1e4, lambda x: np.log2(1 + x)), r"log2\(1 \+ x\) of counts scaled to a total of 10,000"),
        (counts().log1p(), "log1p of counts that were not divided by the cell's total"),
        (scaled(counts()) * 2.5, r"values whose expm1 sums to [\d,]+ a cell"),
    ],
)
def test_what_is_said_to_be_log_normalised_and_is_not_is_told(numbers: sp.csr_matrix, look: str) -> None:
    (text,) = told(adata_of(numbers), kind=ValueKind("log1p"))
    np.testing.assert_equal(
        text.startswith("AnnData: expected log1p(count / total * 10,000), got numbers that look"), True
    )
    with pytest.warns(UserWarning, match=f"look like {look}.*give values of that scale, or the raw counts"):
        packed(adata_of(numbers), kind=ValueKind("log1p"))


def test_whole_numbers_that_are_said_to_be_log_normalised_are_told() -> None:
    assert "holds whole numbers only" in told(adata_of(counts()), kind=ValueKind("log1p"))[0]


@pytest.mark.parametrize("total", [2213.0, 1e5])
def test_cells_of_another_data_set_of_another_scale_are_told(total: float) -> None:
    """Half of the cells each: no sum is that of most cells."""
    matrix = scaled(counts(300))
    mixed = sp.vstack([matrix, scaled(counts(300, 1), total)]).tocsr()
    (text,) = told(adata_of(mixed), kind=ValueKind("log1p"))
    assert "of 256 sampled cells that look like log1p of counts scaled to a total of" in text
    assert f"{total:,.0f}" in text


def test_shares_of_a_total_are_not_taken_for_logarithms() -> None:
    matrix = scaled(counts(), 1.0, as_it_is)
    assert not told(adata_of(matrix), kind=ValueKind("tpm"))
    assert "counts scaled to a total of 1 (" in told(adata_of(matrix), kind=ValueKind("log1p"))[0]


@pytest.mark.parametrize("total", [1.02e4, 0.98e4, 1e6])
def test_one_log_normalised_cell_of_another_total_is_told_once(total: float) -> None:
    adata = with_row(scaled(counts()), scaled(counts(), total))
    with_two = with_row(adata.X, scaled(counts(), total), row=550)
    (text,) = told(with_two, kind=ValueKind("log1p"))
    assert "row 300 (cell300): expected log1p(count / total * 10,000), got values whose expm1 sums to" in text
    assert f"sums to {total:,.0f}"[:-2] in text
    assert not told(with_row(scaled(counts()), scaled(counts(), 1.005e4)), kind=ValueKind("log1p"))
    # In the sample or not: row 0 is.
    (text,) = told(with_row(scaled(counts()), scaled(counts(), total), row=0), kind=ValueKind("log1p"))
    assert "row 0 (cell0): expected log1p" in text


def test_log_normalised_cells_that_are_cut_to_some_genes_are_no_alarm() -> None:
    whole = scaled(counts())
    assert not told(adata_of(whole[:, :50].tocsr()), kind=ValueKind("log1p"))
    # No genes can be missing from a cell that has more than all.
    (text,) = told(with_row(whole[:, :50].tocsr(), scaled(counts()[:, :50].tocsr(), 1.02e4)), kind=ValueKind("log1p"))
    assert "row 300" in text


def real_files(shared_data: Path) -> list[tuple[AnnData, str | None]]:
    names = ["pbmc3k_counts_labelled", "scp1884_gut_1020cells", "norman_k562_500genes", "papalexi_lowmoi_299genes"]
    files = [(anndata.read_h5ad(shared_data / f"{name}.h5ad"), None) for name in names]
    return [*files, (anndata.read_h5ad(shared_data / "zheng_pbmc_facs.h5ad"), "symbol")]


@pytest.mark.filterwarnings("ignore:.*old name:UserWarning")
@pytest.mark.filterwarnings("ignore:.*counts of columns added up:UserWarning")
def test_real_cells_raise_no_alarm(shared_data: Path) -> None:
    vocabulary = Vocabulary.from_tsv(shared_data / "gene_vocabulary_19264.tsv")
    for adata, gene_symbols in real_files(shared_data):
        adata = adata[:1500].copy()
        matrix = sp.csr_matrix(adata.X)
        used = np.asarray(matrix.sum(axis=1)).ravel() > 0
        adata, matrix = adata[used].copy(), matrix[used]
        del adata.obs
        top = np.sort(np.argsort(-np.asarray(matrix.sum(axis=0)).ravel())[: adata.n_vars // 2])
        names = {"gene_symbols": gene_symbols}
        assert not told(adata, vocabulary, **names)
        if gene_symbols is not None:  # repeated symbols cannot be added once they are logged
            adata.var_names = adata.var[gene_symbols].astype(str)
            adata.var_names_make_unique()
            names = {"gene_symbols": None}
        for numbers, kind in (
            (matrix, ValueKind()),
            (matrix * 0.93, ValueKind(fractional=True)),
            (scaled(matrix), ValueKind("log1p")),
            (scaled(matrix).astype(np.float32), ValueKind("log1p")),
            (scaled(matrix, 1e6, as_it_is), ValueKind("tpm")),
        ):
            adata.X = numbers.tocsr()
            assert not told(adata, vocabulary, kind, **names)
            assert not told(adata[:, top].copy(), vocabulary, kind, **names)


def test_shipped_cells_raise_no_alarm() -> None:
    """The raw matrix of scanpy's PBMC is log-normalised, cut to 765 genes and rounded to three decimals."""
    import scanpy

    adata = scanpy.datasets.pbmc68k_reduced()
    vocabulary = Vocabulary(adata.raw.var_names)
    assert not told(adata, vocabulary, ValueKind("log1p"), layer="raw")
    with pytest.raises(ValueError, match="not negative, NaN or infinite ones"):
        packed(adata, vocabulary, ValueKind("log1p"))


def test_a_matrix_cut_to_some_genes_offers_the_totals() -> None:
    matrix = counts()
    total = np.asarray(matrix.sum(axis=1)).ravel()
    cut = matrix[:, :40].tocsr()
    for name in ("n_counts", "total_counts", "nCount_RNA"):
        (text,) = told(adata_of(cut, **{name: total}))
        assert f"of obs['{name}']" in text
        assert f"pass total_counts='{name}' (--total-counts {name})" in text
        assert not told(adata_of(cut, **{name: total}), total_counts=name)
    assert not told(adata_of(cut))
    assert not told(adata_of(cut, age=total))
    assert not told(adata_of(matrix, n_counts=total))
    # Totals of other cells say nothing of these, nor do names in a column of numbers.
    assert not told(adata_of(cut, n_counts=total[::-1] * 0.5))
    assert not told(adata_of(cut, n_counts=total.astype(str)))


def test_counts_are_divided_by_the_totals_of_obs(depth_model: XTrimoGene) -> None:
    matrix = counts()
    total = np.asarray(matrix.sum(axis=1)).ravel()
    cut = matrix[:, :40].tocsr()
    values, totals = packed(adata_of(cut, n_counts=total.astype(np.int64)), total_counts="n_counts")
    np.testing.assert_array_equal(totals, total)
    np.testing.assert_allclose(values, scaled(matrix)[:, :40].tocsr().data, rtol=1e-6)
    # The same bits as from the sums, where these are the totals.
    for one, other in zip(
        packed(adata_of(matrix, n_counts=total), total_counts="n_counts"), packed(adata_of(matrix)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    tokens = depth_tokens(depth_model, adata_of(cut, n_counts=total), total_counts="n_counts")
    np.testing.assert_allclose(tokens[:, 1], np.log10(total), rtol=1e-6)
    np.testing.assert_allclose(tokens[:, 0], 4.0)
    rows = TrainingCells(adata_of(cut, n=total), VOCABULARY, total_counts="n", min_genes=0, progress=False)
    with rows:
        batch = rows.read(np.array([7, 3]))
    np.testing.assert_allclose(batch.values.numpy()[: int(batch.lengths[0])], scaled(matrix)[7, :40].data, rtol=1e-6)


def test_batches_are_told_apart_by_the_totals_they_are_divided_by() -> None:
    matrix = counts()
    total = np.asarray(matrix.sum(axis=1)).ravel() + 5
    other = total.copy()
    other[300] += 1

    def fingerprint(totals: Rows, **options: Any) -> str:
        with TrainingCells(adata_of(matrix, n=totals), VOCABULARY, min_genes=0, progress=False, **options) as cells:
            return cells.fingerprint

    assert fingerprint(total, total_counts="n") == fingerprint(total.astype(np.int64), total_counts="n")
    assert fingerprint(total, total_counts="n") != fingerprint(other, total_counts="n")
    assert fingerprint(total) == fingerprint(other) == fingerprint(total, fractional_counts=True)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("depth", r"expected a column of obs, got 'depth'; such as n_counts"),
        ("names", r"expected numbers in obs\['names'\], got (object|str|category|string) values"),
        ("flags", r"expected numbers in obs\['flags'\], got bool values"),
        ("holes", r"expected finite numbers of at least 0 in obs\['holes'\], got nan in row 7 \(cell7\)"),
        (
            "below",
            r"expected each cell's total in obs\['below'\], got 2 in row 300 \(cell300\), whose counts sum to \d+",
        ),
    ],
)
def test_columns_of_obs_that_hold_no_totals_are_refused(column: str, message: str) -> None:
    matrix = counts()
    total = np.asarray(matrix.sum(axis=1)).ravel()
    holes, below = total.copy(), total.copy()
    holes[7], below[300] = np.nan, 2
    obs = {"n_counts": total, "names": total.astype(str), "flags": total > 5, "holes": holes, "below": below}
    with pytest.raises(ValueError, match=f"AnnData: total_counts: {message}"):
        packed(adata_of(matrix, **obs), total_counts=column)


def test_logarithms_of_totals_are_told_where_counts_cannot_refuse_them() -> None:
    matrix = counts()
    total = np.asarray(matrix.sum(axis=1)).ravel()
    adata = adata_of(scaled(matrix), log=np.log10(total), total=total)
    (text,) = told(adata, kind=ValueKind("log1p"), total_counts="log")
    assert "as if they were logarithms of totals" in text
    assert not told(adata, kind=ValueKind("log1p"), total_counts="total")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("counts per million", False, False), "values: expected one of counts, log1p, tpm, got 'counts per million'"),
        (("counts", True, False), "normalized: expected False with values='counts', got True, which is 'log1p'"),
        (
            ("tpm", False, True),
            "fractional_counts: expected False where values are not counts, got True with values='tpm'",
        ),
        ((None, True, True), "fractional_counts: expected False where values are not counts"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: tuple[Any, bool, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValueKind.checked(*options)
    assert ValueKind.checked(None, True, False) == ValueKind.checked("log1p", True, False) == ValueKind("log1p")
    assert ValueKind.checked(None, False, True) == ValueKind("counts", True)


def depth_tokens(model: XTrimoGene, adata: AnnData, **options: Any) -> npt.NDArray[np.float32]:
    """(cells, 2) the tokens T and S."""
    with open_cells(adata) as source:
        cells = ModelCells.checked(source, model, **options)
        batch = cells.pack(source.read_rows(0, source.n_obs), first_row=0)
    ends = batch.cu_seqlens.numpy()[1:]
    assert np.all(batch.gene_ids.numpy()[ends - 2] == N_VARS)
    assert np.all(batch.gene_ids.numpy()[ends - 1] == N_VARS + 1)
    return np.stack([batch.values.numpy()[ends - 2], batch.values.numpy()[ends - 1]], axis=1)


def test_log_normalised_cells_with_their_totals_for_a_model_with_depth_tokens(depth_model: XTrimoGene) -> None:
    matrix = counts(50)
    total = np.asarray(matrix.sum(axis=1)).ravel()
    adata = adata_of(scaled(matrix), n_counts=total)
    with pytest.raises(
        ValueError, match=r"or name the obs column of the totals .* \(--total-counts; there is n_counts\)"
    ):
        depth_tokens(depth_model, adata, values="log1p")
    want = depth_tokens(depth_model, adata_of(matrix))
    np.testing.assert_array_equal(depth_tokens(depth_model, adata, values="log1p", total_counts="n_counts"), want)
    from_logs = embed(adata, depth_model, values="log1p", total_counts="n_counts", progress=False, dtype="float32")
    from_counts = embed(adata_of(matrix), depth_model, progress=False, dtype="float32")
    np.testing.assert_allclose(from_logs.embedding, from_counts.embedding, atol=1e-5)


def test_bulk_samples_for_a_model_with_depth_tokens(depth_model: XTrimoGene) -> None:
    """T and S are both log10 of the sum, as the published code has bulk samples."""
    matrix = counts(6)
    tpm = adata_of(scaled(matrix, 1e6, as_it_is))
    np.testing.assert_allclose(depth_tokens(depth_model, tpm, values="tpm"), 6.0, rtol=1e-6)
    want = np.log10(matrix.sum(axis=1)) @ np.ones((1, 2))
    asked = depth_tokens(depth_model, adata_of(matrix), values="counts", target_depth="fold:1")
    np.testing.assert_allclose(asked, want, rtol=1e-6)
    logged = adata_of(scaled(matrix), total=np.asarray(matrix.sum(axis=1)).ravel())
    asked = depth_tokens(depth_model, logged, values="log1p", total_counts="total", target_depth="fold:1")
    np.testing.assert_allclose(asked, want, rtol=1e-6)
    np.testing.assert_allclose(depth_tokens(depth_model, tpm, values="tpm", target_depth=5.0)[:, 0], 5.0)


@pytest.mark.parametrize("target", [0, -1.5, "fold:0", "fold:-2"])
def test_a_target_depth_that_the_published_code_would_drop_is_refused(target: float | str) -> None:
    with pytest.raises(ValueError, match="target_depth: expected the log10 total to aim at, above 0"):
        TargetDepth.parse(target)


def test_a_depth_below_zero_is_refused_by_cell(depth_model: XTrimoGene) -> None:
    matrix = counts(40)
    matrix.data[matrix.indptr[33] : matrix.indptr[34]] *= 1e-4
    with pytest.raises(
        BadNumbers, match=r"row 33 \(cell33\): the token S, the log10 of its total, would be -[\d.]+: exp"
    ):
        depth_tokens(depth_model, adata_of(matrix), fractional_counts=True)
    with pytest.raises(BadNumbers, match=r"row 0 \(cell0\): the token T, the log10 total that is aimed at, would be -"):
        depth_tokens(depth_model, adata_of(counts(40)), target_depth="offset:-5")


def test_training_with_depth_tokens_is_not_sent_to_options_that_it_refuses() -> None:
    advice = (
        "depth_tokens=True thins counts: round those that are estimated or corrected, or train without depth tokens"
    )
    for adata in (adata_of(counts() * 0.93), with_row(counts(), counts() * 0.93)):
        with pytest.raises(ValueError, match=advice) as refused:
            TrainingCells(adata, VOCABULARY, depth_tokens=True, min_genes=0, progress=False)
        assert "fractional_counts" not in str(refused.value)
        assert "log1p" not in str(refused.value)


@pytest.mark.parametrize(
    "options", [{"values": "log1p"}, {"values": "tpm"}, {"fractional_counts": True}, {"total_counts": "n"}]
)
def test_training_with_depth_tokens_thins_whole_counts_of_whole_cells(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected .* with depth_tokens=True"):
        TrainingCells(adata_of(counts(), n=np.full(N_OBS, 1e6)), VOCABULARY, depth_tokens=True, **options)
