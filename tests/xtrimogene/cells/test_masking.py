"""Tests of the masking plan, in C++ and in NumPy, against plain Python loops and against what chance should give."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.xtrimogene.real_cells import scanpy_cells, zheng_cells
from xtg_kernels import RaggedBatch, dispatch, distinct_index
from xtrimogene.cells.depth import add_depth_tokens
from xtrimogene.cells.masking import MaskingConfig, mask_cells, mask_cells_numpy, mask_counts, pack_masked, thin_counts
from xtrimogene.cells.packing import pack_rows, pack_rows_and_totals
from xtrimogene.network.masked_batch import MaskedBatch

Array = npt.NDArray[Any]
needs_cpp = pytest.mark.skipif(dispatch.extension() is None, reason="the C++ extension is not built")
MASKERS = ["numpy"] + (["cpp"] if dispatch.extension() is not None else [])
FIELDS = ("masked_ids", "masked_cu_seqlens", "chosen_ids", "chosen_cu_seqlens", "chosen_values", "cells")
BATCH_FIELDS = ("values", "gene_ids", "cu_seqlens", "distinct_index")
ALL_BITS = 2**64 - 1


def masker(name: str) -> Any:
    return mask_cells_numpy if name == "numpy" else dispatch.extension().mask_cells  # type: ignore[union-attr]


def assert_same_bits(one: MaskedBatch, other: MaskedBatch) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in BATCH_FIELDS:
        a, b = getattr(one.batch, name), getattr(other.batch, name)
        assert a.numpy().tobytes() == b.numpy().tobytes(), name
    assert one.batch.max_seqlen == other.batch.max_seqlen


def random_cells(lengths: list[int], num_genes: int, seed: int = 0) -> RaggedBatch:
    """Cells of few distinct values, as counts give."""
    rng = np.random.default_rng(seed)
    genes = [np.sort(rng.choice(num_genes, length, replace=False)) for length in lengths]
    values = np.log1p(rng.geometric(0.4, sum(lengths)) / 3).astype(np.float32)
    return RaggedBatch(
        torch.from_numpy(values),
        torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *genes]).astype(np.int32)),
        torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        max(lengths, default=0),
    )


def arrays(batch: RaggedBatch) -> tuple[Array, Array, Array]:
    return batch.values.numpy(), batch.gene_ids.numpy(), batch.cu_seqlens.numpy()


def split(flat: torch.Tensor, cu_seqlens: torch.Tensor) -> list[list[Any]]:
    values = flat.tolist()
    return [values[start:stop] for start, stop in itertools.pairwise(cu_seqlens.tolist())]


def plain_mix(word: int) -> int:
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & ALL_BITS
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & ALL_BITS
    return word ^ word >> 31


def plain_mask(
    batch: tuple[Array, Array, Array],
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
) -> dict[str, list[Any]]:
    """The definition, one gene at a time."""

    def cell_of(packed: tuple[Array, Array, Array], row: int) -> dict[int, float]:
        values, genes, bounds = packed
        own = range(bounds[row], bounds[row + 1])
        return {int(genes[t]): float(values[t]) for t in own}

    step = 0x9E3779B97F4A7C15
    found: dict[str, list[Any]] = {name: [] for name in (*BATCH_FIELDS, *FIELDS) if name != "cells"}
    for name in ("cu_seqlens", "masked_cu_seqlens", "chosen_cu_seqlens"):
        found[name].append(0)
    for position, cell in enumerate(cells.tolist()):
        row = position if rows is None else int(rows[position])
        seen, truth = cell_of(batch, row), cell_of(batch if target is None else target, row)
        stream = 0
        for word in (seed, epoch, cell):
            stream = plain_mix((stream + word + step) & ALL_BITS)
        keys = [plain_mix((stream + (gene + 1) * step) & ALL_BITS) for gene in range(num_genes)]
        own_values = list(seen.values())
        tokens, masked, chosen = dict(seen), [], []
        for rate, group in (
            (nonzero_rate, list(seen)),
            (zero_rate, [gene for gene in range(num_genes) if gene not in seen]),
        ):
            taken = sorted(group, key=lambda gene: keys[gene])[: round(rate * len(group))]
            hidden = round(mask_share * len(taken))
            for place, gene in enumerate(taken):
                chosen.append(gene)
                if place < hidden:
                    masked.append(gene)
                    tokens.pop(gene, None)
                elif place < hidden + round(random_share * len(taken)) and own_values:
                    draw = plain_mix(keys[gene] ^ 0xD1B54A32D192ED03)
                    tokens[gene] = own_values[draw % len(own_values)]
        row_of_depth = [] if depth is None else depth[position].tolist()
        cell_tokens = sorted(tokens.items()) + [(num_genes + i, value) for i, value in enumerate(row_of_depth)]
        first_of: dict[float, int] = {}
        for gene, value in cell_tokens:
            found["distinct_index"].append(first_of.setdefault(value, len(found["values"])))
            found["values"].append(value)
            found["gene_ids"].append(gene)
        found["masked_ids"] += sorted(masked)
        found["chosen_ids"] += sorted(chosen)
        found["chosen_values"] += [truth.get(gene, 0.0) for gene in sorted(chosen)]
        found["cu_seqlens"].append(len(found["values"]))
        found["masked_cu_seqlens"].append(len(found["masked_ids"]))
        found["chosen_cu_seqlens"].append(len(found["chosen_ids"]))
    return found


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    num_genes = draw(st.integers(1, 60))
    lengths = draw(st.lists(st.integers(0, num_genes), min_size=0, max_size=5))
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    mask_share = draw(st.sampled_from([0.8, 0.0, 1.0, 0.5]))
    rows = draw(st.sampled_from([None, rng.integers(0, max(1, len(lengths)), 4 if lengths else 0)]))
    count = len(lengths) if rows is None else len(rows)
    return {
        "batch": arrays(random_cells(lengths, num_genes, seed)),
        "target": draw(st.sampled_from([None, arrays(random_cells(lengths[::-1], num_genes, seed + 1))])),
        "cells": rng.integers(0, draw(st.sampled_from([10, 2**62])), count),
        "num_genes": num_genes,
        "nonzero_rate": draw(st.sampled_from([0.3, 0.0, 1.0, 0.77])),
        "zero_rate": draw(st.sampled_from([0.03, 0.0, 1.0, 0.4])),
        "mask_share": mask_share,
        "random_share": draw(st.sampled_from([0.1, 0.0, 0.5])) * (mask_share <= 0.8) * min(1, 2 * (1 - mask_share)),
        "seed": draw(st.sampled_from([0, 1, 2**63 - 1])),
        "epoch": draw(st.integers(0, 3)),
        "rows": rows,
        "depth": draw(st.sampled_from([None, rng.integers(0, 3, (count, 2)).astype(np.float32)])),
    }


@pytest.mark.parametrize("name", MASKERS)
@given(problem=problems(), num_threads=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_equals_the_definition(name: str, problem: dict[str, Any], num_threads: int) -> None:
    batch = problem.pop("batch")
    expected = plain_mask(batch, **problem)
    threads = {} if name == "numpy" else {"num_threads": num_threads}
    masked = masker(name)(*batch, **problem, **threads)
    assert set(masked) == set(expected)
    for key, want in expected.items():
        dtype = np.float32 if key in ("values", "chosen_values") else np.int32
        assert masked[key].dtype == dtype, key
        np.testing.assert_array_equal(masked[key], np.asarray(want, dtype), err_msg=key)


@needs_cpp
@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_cpp_has_the_bits_of_numpy(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real sizes, and enough cells of 600 genes that the first guess of the keys' limit is too low for some."""
    for lengths, num_genes in (([2000, 0, 1, 19264, 700], 19264), ([200] * 1500, 600)):
        batch = random_cells(lengths, num_genes)
        options: dict[str, Any] = {"epoch": 4, "num_genes": num_genes}
        cells = np.arange(len(lengths)) * 3
        fast = mask_cells(batch, cells, MaskingConfig(seed=9), num_threads=num_threads, **options)
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "extension", lambda: None)
            assert_same_bits(fast, mask_cells(batch, cells, MaskingConfig(seed=9), **options))


@needs_cpp
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16])
@pytest.mark.parametrize("form", ["sorted", "unsorted", "duplicated"])
def test_packing_and_masking_in_one(form: str, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    lengths = [40, 0, 150, 1]
    rows = [np.sort(rng.choice(400, length, replace=False)) for length in lengths]
    indices = np.concatenate([rng.permutation(row) if form != "sorted" else row for row in rows])
    if form == "duplicated":
        indices[20:30] = indices[10:20]
    csr = (np.concatenate([[0], np.cumsum(lengths)]), indices, rng.integers(0, 5, sum(lengths)).astype(dtype))
    columns = rng.integers(-1, 300, 400).astype(np.int32)
    order = np.array([2, 0, 1, 3])
    options: dict[str, Any] = {"epoch": 0, "num_genes": 300, "rows": order, "normalized": False}
    masked = pack_masked(csr, columns, order + 50, MaskingConfig(), **options)
    packed = pack_rows(csr, columns, rows=order)
    assert_same_bits(masked, mask_cells(packed, order + 50, MaskingConfig(), epoch=0, num_genes=300))
    monkeypatch.setattr(dispatch, "extension", lambda: None)
    plain = pack_masked(csr, columns, order + 50, MaskingConfig(), **options)
    # NumPy's log1p may differ from the C library's in the last bit.
    np.testing.assert_array_max_ulp(plain.batch.values.numpy(), masked.batch.values.numpy(), maxulp=1)
    for name in ("gene_ids", "cu_seqlens", "distinct_index"):
        assert torch.equal(getattr(plain.batch, name), getattr(masked.batch, name)), name
    assert_same_bits(dataclasses.replace(plain, chosen_values=masked.chosen_values, batch=masked.batch), masked)


def test_any_batch_gives_the_same_cell() -> None:
    batch = random_cells([50, 300, 7, 120], 500)
    whole = mask_cells(batch, [8, 3, 5, 1], MaskingConfig(), epoch=2, num_genes=500)
    for row, cell in ((3, 1), (0, 8), (1, 3)):
        alone = mask_cells(batch, [cell], MaskingConfig(), epoch=2, num_genes=500, rows=np.array([row]))
        assert split(whole.masked_ids, whole.masked_cu_seqlens)[row] == alone.masked_ids.tolist()
        assert split(whole.chosen_ids, whole.chosen_cu_seqlens)[row] == alone.chosen_ids.tolist()
        assert split(whole.chosen_values, whole.chosen_cu_seqlens)[row] == alone.chosen_values.tolist()
        assert split(whole.batch.values, whole.batch.cu_seqlens)[row] == alone.batch.values.tolist()
        assert split(whole.batch.gene_ids, whole.batch.cu_seqlens)[row] == alone.batch.gene_ids.tolist()


def chosen_matrix(num_cells: int, num_genes: int, *, first_cell: int = 0, epoch: int = 0, seed: int = 0) -> Array:
    """(num_cells, num_genes) bool: chosen genes of cells that express the even genes; half of each kind is taken."""
    genes = np.arange(0, num_genes, 2)
    batch = RaggedBatch(
        torch.ones(num_cells * len(genes)),
        torch.from_numpy(np.tile(genes, num_cells).astype(np.int32)),
        torch.arange(num_cells + 1, dtype=torch.int32) * len(genes),
        len(genes),
    )
    config = MaskingConfig(nonzero_rate=0.5, zero_rate=0.5, seed=seed)
    cells = np.arange(first_cell, first_cell + num_cells)
    masked = mask_cells(batch, cells, config, epoch=epoch, num_genes=num_genes)
    chosen = np.zeros((num_cells, num_genes), bool)
    chosen[np.repeat(np.arange(num_cells), masked.chosen_cu_seqlens.diff().numpy()), masked.chosen_ids] = True
    return chosen


def test_every_gene_is_chosen_as_often() -> None:
    """Chi-square over genes: its mean is the degrees of freedom, and five standard deviations are never reached."""
    cells, genes = 4000, 200
    for parity in (0, 1):
        counts = chosen_matrix(cells, genes)[:, parity::2].sum(0)
        assert counts.sum() == cells * genes // 4
        # Each cell takes half of 100 genes, without repetition: the variance of a count is cells / 4 * 100 / 99.
        chi_square = ((counts - cells / 2) ** 2 / (cells / 4 * 100 / 99)).sum()
        assert abs(chi_square - 99) < 5 * math.sqrt(2 * 99)


@pytest.mark.parametrize("other", ["epoch", "seed", "next cell", "next gene", "gene and cell"])
def test_neighbours_are_independent(other: str) -> None:
    cells, genes = 2000, 400
    one = chosen_matrix(cells, genes)
    same: Array = {
        "epoch": lambda: one == chosen_matrix(cells, genes, epoch=1),
        "seed": lambda: one == chosen_matrix(cells, genes, seed=1),
        "next cell": lambda: one == chosen_matrix(cells, genes, first_cell=1),
        "next gene": lambda: one[:, :-1] == one[:, 1:],
        "gene and cell": lambda: one[:-1, 1:] == one[1:, :-1],
    }[other]()
    expected = 0.5
    assert abs(same.mean() - expected) < 5 * 0.5 / math.sqrt(same.size)


def test_shares_and_draws_on_many_cells() -> None:
    num_genes, lengths = 1000, [200, 317, 85] * 300
    batch = random_cells(lengths, num_genes, seed=2)
    # All values of a cell are distinct here, so that each draw can be told.
    batch = dataclasses.replace(batch, values=torch.rand(batch.total_nnz) + 0.1)
    masked = mask_cells(batch, np.arange(len(lengths)), MaskingConfig(), epoch=0, num_genes=num_genes)
    original = zip(split(batch.gene_ids, batch.cu_seqlens), split(batch.values, batch.cu_seqlens), strict=True)
    tokens = zip(
        split(masked.batch.gene_ids, masked.batch.cu_seqlens),
        split(masked.batch.values, masked.batch.cu_seqlens),
        strict=True,
    )
    places = []
    for (genes, values), (seen_genes, seen_values), hidden, chosen in zip(
        original,
        tokens,
        split(masked.masked_ids, masked.masked_cu_seqlens),
        split(masked.chosen_ids, masked.chosen_cu_seqlens),
        strict=True,
    ):
        before, after = dict(zip(genes, values, strict=True)), dict(zip(seen_genes, seen_values, strict=True))
        for group in (set(before), set(range(num_genes)) - set(before)):
            rate = 0.3 if group == set(before) else 0.03
            count = round(rate * len(group))
            assert len(group & set(chosen)) == count
            assert len(group & set(hidden)) == round(0.8 * count)
            changed = {gene for gene in group & set(chosen) - set(hidden) if after.get(gene) != before.get(gene)}
            # A draw may hit the gene's own value.
            assert round(0.1 * count) - 1 <= len(changed) <= round(0.1 * count)
            places += [values.index(after[gene]) / len(values) for gene in changed]
        assert not set(hidden) & set(after)
        assert all(after[gene] == before[gene] for gene in set(before) - set(chosen))
    # Replacements are taken evenly from the whole of the cell.
    counts = np.histogram(places, bins=20, range=(0, 1))[0]
    expected = len(places) / 20
    assert len(places) > 7000
    assert abs(((counts - expected) ** 2 / expected).sum() - 19) < 5 * math.sqrt(2 * 19)


def test_true_values_and_distinct_index_on_real_cells() -> None:
    batch = scanpy_cells(slice(0, 60))
    masked = mask_cells(batch, np.arange(60), MaskingConfig(), epoch=1, num_genes=765)
    assert torch.equal(distinct_index(masked.batch.values, masked.batch.cu_seqlens), masked.batch.distinct_index)
    dense = np.zeros((60, 765), np.float32)
    row_of = np.repeat(np.arange(60), batch.lengths.numpy())
    dense[row_of, batch.gene_ids] = batch.values
    chosen_rows = np.repeat(np.arange(60), masked.chosen_cu_seqlens.diff().numpy())
    np.testing.assert_array_equal(dense[chosen_rows, masked.chosen_ids], masked.chosen_values)
    expressed = dense != 0
    want = [round(0.3 * n) + round(0.03 * (765 - n)) for n in expressed.sum(1).tolist()]
    assert masked.chosen_cu_seqlens.diff().tolist() == want
    assert masked.total_chosen == sum(want)
    assert masked.to("cpu").batch_size == masked.batch_size == 60


def test_deep_real_cells(shared_data: Path) -> None:
    batch = zheng_cells(shared_data, slice(0, 40))
    masked = mask_cells(batch, np.arange(40), MaskingConfig(), epoch=0, num_genes=19264)
    want = [round(0.3 * n) + round(0.03 * (19264 - n)) for n in batch.lengths.tolist()]
    assert masked.chosen_cu_seqlens.diff().tolist() == want
    assert torch.equal(distinct_index(masked.batch.values, masked.batch.cu_seqlens), masked.batch.distinct_index)


def test_edges() -> None:
    batch = random_cells([0, 1, 10], 10)
    every = MaskingConfig(nonzero_rate=1.0, zero_rate=1.0, mask_share=1.0, random_share=0.0)
    masked = mask_cells(batch, [0, 1, 2], every, epoch=0, num_genes=10)
    assert masked.batch.cu_seqlens.tolist() == [0, 0, 0, 0]
    assert masked.batch.max_seqlen == 0
    assert masked.masked_ids.tolist() == masked.chosen_ids.tolist() == list(range(10)) * 3

    none = mask_cells(batch, [0, 1, 2], MaskingConfig(nonzero_rate=0, zero_rate=0), epoch=0, num_genes=10)
    assert none.total_chosen == 0
    assert torch.equal(none.batch.values, batch.values)

    replaced = MaskingConfig(nonzero_rate=1.0, zero_rate=1.0, mask_share=0.0, random_share=1.0)
    masked = mask_cells(batch, [0, 1, 2], replaced, epoch=0, num_genes=10)
    # An empty cell has no value to give to its genes; a cell of one gene gives that one's to all.
    assert masked.batch.lengths.tolist() == [0, 10, 10]
    assert masked.batch.values[:10].unique().tolist() == batch.values[:1].tolist()
    assert masked.batch.distinct_index is not None
    assert masked.batch.distinct_index[:10].tolist() == [0] * 10

    nothing = mask_cells(random_cells([], 10), np.zeros(0, np.int64), every, epoch=0, num_genes=10)
    assert (nothing.batch_size, nothing.total_chosen) == (0, 0)


@pytest.mark.parametrize("name", MASKERS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_genes": 9}, ValueError, "batch gene_ids: expected ids ascending in each cell, from 0 to 8"),
        ({"swap": True}, ValueError, "batch gene_ids: expected ids ascending"),
        ({"cells": np.array([1, 2])}, ValueError, "cells: expected one number for each of the 3 rows, got 2"),
        ({"cells": np.array([1, -2, 3])}, ValueError, "cells: expected numbers of at least 0, got -2"),
        ({"cells": np.array([1.0, 2, 3])}, TypeError, "cells: expected .*integer.*got dtype float64"),
        ({"rows": np.array([0, 3, 1])}, ValueError, r"rows: expected row numbers in 0 \.\. 2, got"),
        ({"target": arrays(random_cells([1], 10))}, ValueError, "target: expected 3 cells as the batch has, got 1"),
        ({"depth": np.zeros((2, 2), np.float32)}, ValueError, r"depth: expected shape \(3, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    values, gene_ids, cu_seqlens = arrays(random_cells([0, 1, 10], 10))
    if change.get("swap"):
        gene_ids = gene_ids.copy()
        gene_ids[[3, 4]] = gene_ids[[4, 3]]
    options = {
        **{"cells": np.arange(3), "num_genes": 10, "epoch": 0, **dataclasses.asdict(MaskingConfig())},
        **{key: value for key, value in change.items() if key != "swap"},
    }
    with pytest.raises(error, match=message):
        masker(name)(values, gene_ids, cu_seqlens, **options)


def test_options_are_checked() -> None:
    for change, message in (
        ({"nonzero_rate": 1.5}, "masking nonzero_rate: expected a number from 0 to 1, got 1.5"),
        ({"zero_rate": True}, "masking zero_rate: expected a number"),
        ({"mask_share": math.nan}, "masking mask_share"),
        ({"random_share": 0.3}, "masking mask_share, random_share: expected shares of together at most 1"),
        ({"seed": -1}, "masking seed: expected an integer from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskingConfig(**change)  # type: ignore[arg-type]
    batch = random_cells([3], 10)
    with pytest.raises(ValueError, match="epoch: expected a number of at least 0, got -1"):
        mask_cells(batch, [0], MaskingConfig(), epoch=-1, num_genes=10)
    with pytest.raises(TypeError, match=r"values: expected float32 on the CPU, got torch\.float64"):
        mask_cells(
            dataclasses.replace(batch, values=batch.values.double()), [0], MaskingConfig(), epoch=0, num_genes=10
        )
    with pytest.raises(TypeError, match=r"gene_ids: expected int32, got torch\.int64"):
        mask_cells(
            dataclasses.replace(batch, gene_ids=batch.gene_ids.long()), [0], MaskingConfig(), epoch=0, num_genes=10
        )


def counts_of(num_cells: int, genes: int, num_genes: int = 500, mean: float = 5.0) -> RaggedBatch:
    batch = random_cells([genes] * num_cells, num_genes)
    rng = np.random.default_rng(3)
    return dataclasses.replace(batch, values=torch.from_numpy(1.0 + rng.poisson(mean - 1, batch.total_nnz)).float())


def test_thinning() -> None:
    counts, cells = counts_of(3000, 250), np.arange(3000)
    values, _, cu_seqlens = arrays(counts)
    thinned = thin_counts(values, cu_seqlens, cells, seed=0, epoch=0)
    totals, kept = (np.add.reduceat(numbers, cu_seqlens[:-1]) for numbers in (values, thinned))
    assert np.all(thinned == np.rint(thinned))
    assert np.all((thinned >= 0) & (thinned <= values))
    assert totals.min() >= 1000
    rates = (kept / totals)[kept != totals]
    # Half of the cells, at rates from Beta(2, 2): mean 1/2, variance 1/20, fourth central moment 3/560.
    assert abs(len(rates) / 3000 - 0.5) < 5 * 0.5 / math.sqrt(3000)
    assert abs(rates.mean() - 0.5) < 5 * math.sqrt(0.05 / len(rates))
    assert abs(rates.var() - 0.05) < 5 * math.sqrt((3 / 560 - 0.05**2) / len(rates)) + 0.002
    # Given the rate, each count is binomial: the variance of a count of n is n r (1 - r).
    row = int(np.argmin(abs(kept / totals - 0.5) + (kept == totals)))
    own = slice(cu_seqlens[row], cu_seqlens[row + 1])
    rate = kept[row] / totals[row]
    spread = ((thinned[own] - rate * values[own]) ** 2).sum() / (rate * (1 - rate) * totals[row])
    assert abs(spread - 1) < 5 * math.sqrt(2 / 250)

    again = thin_counts(*arrays(counts)[::2], cells, seed=0, epoch=0)
    assert np.array_equal(again, thinned)
    for other in ({"seed": 1, "epoch": 0}, {"seed": 0, "epoch": 1}):
        assert not np.array_equal(thin_counts(values, cu_seqlens, cells, **other), thinned)
    alone = thin_counts(values[own], np.array([0, 250]), cells[[row]], seed=0, epoch=0)
    assert np.array_equal(alone, thinned[own])
    shallow = counts_of(200, 199)
    values, _, cu_seqlens = arrays(shallow)
    few = np.add.reduceat(values, cu_seqlens[:-1]) < 1000
    assert 20 < few.sum() < 180
    changed = thin_counts(values, cu_seqlens, cells[:200], seed=0, epoch=0) != values
    assert not changed[np.repeat(few, 199)].any()
    assert changed[np.repeat(~few, 199)].any()


def test_read_depth_training() -> None:
    """Masks and tokens are of the thinned cell, the loss is against the whole one, and T and S tell the totals."""
    counts, cells = counts_of(40, 250), np.arange(40) + 7
    masked = mask_counts(counts, cells, MaskingConfig(), epoch=3, num_genes=500)
    thinned = thin_counts(*arrays(counts)[::2], cells, seed=0, epoch=3)
    csr = counts.cu_seqlens.numpy(), counts.gene_ids.numpy()
    columns = np.arange(500, dtype=np.int32)
    whole, totals = pack_rows_and_totals((*csr, counts.values.numpy()), columns)
    seen, seen_totals = pack_rows_and_totals((*csr, thinned), columns)
    assert int((totals != seen_totals).sum()) > 5

    plain = mask_cells(seen, cells, MaskingConfig(), epoch=3, num_genes=500)
    assert torch.equal(plain.chosen_ids, masked.chosen_ids)
    assert torch.equal(plain.masked_ids, masked.masked_ids)
    dense = np.zeros((40, 500), np.float32)
    dense[np.repeat(np.arange(40), whole.lengths.numpy()), whole.gene_ids] = whole.values
    np.testing.assert_array_equal(
        masked.chosen_values,
        dense[np.repeat(np.arange(40), masked.chosen_cu_seqlens.diff().numpy()), masked.chosen_ids],
    )
    ends = masked.batch.cu_seqlens[1:].long()
    assert masked.batch.gene_ids[ends - 2].tolist() == [500] * 40
    assert masked.batch.gene_ids[ends - 1].tolist() == [501] * 40
    assert torch.equal(masked.batch.values[ends - 2], totals.log10().float())
    assert torch.equal(masked.batch.values[ends - 1], seen_totals.log10().float())
    assert torch.equal(masked.batch.lengths, plain.batch.lengths + 2)
    is_gene = masked.batch.gene_ids < 500
    assert torch.equal(masked.batch.values[is_gene], plain.batch.values)
    assert torch.equal(distinct_index(masked.batch.values, masked.batch.cu_seqlens), masked.batch.distinct_index)
    in_one = pack_masked(
        (*csr, counts.values.numpy()), columns, cells, MaskingConfig(), epoch=3, num_genes=500, depth_tokens=True
    )
    assert_same_bits(in_one, masked)


def test_what_cannot_be_thinned() -> None:
    counts = counts_of(3, 250)
    counts.values[300] = 2.5
    with pytest.raises(
        ValueError, match=rf"cell 8, gene {int(counts.gene_ids[300])}: value 2\.5; expected whole counts"
    ):
        mask_counts(counts, [7, 8, 9], MaskingConfig(), epoch=0, num_genes=500)
    csr = counts.cu_seqlens.numpy(), counts.gene_ids.numpy(), counts.values.numpy()
    with pytest.raises(ValueError, match="normalized: expected raw counts with depth_tokens=True"):
        pack_masked(
            csr, np.arange(500, dtype=np.int32), np.arange(3), MaskingConfig(), epoch=0, num_genes=500,
            depth_tokens=True, normalized=True,
        )  # fmt: skip


def test_depth_tokens_for_inference() -> None:
    csr = np.array([0, 2, 2, 3]), np.array([1, 4, 0]), np.array([30.0, 70.0, 1000.0])
    packed, totals = pack_rows_and_totals(csr, np.arange(5, dtype=np.int32))
    assert totals.tolist() == [100, 0, 1000]
    for mode, target, expected in (
        ("value", 4.0, [4.0, 4.0]),
        ("fold", 10.0, [3.0, 4.0]),
        ("offset", -0.5, [1.5, 2.5]),
    ):
        batch = add_depth_tokens(packed, totals, num_genes=5, target=target, mode=mode)
        # The cell without counts stays empty: it has no logarithm.
        assert batch.cu_seqlens.tolist() == [0, 4, 4, 7]
        assert batch.gene_ids.tolist() == [1, 4, 5, 6, 0, 5, 6]
        assert batch.max_seqlen == 4
        torch.testing.assert_close(batch.values[[2, 5]], torch.tensor(expected))
        torch.testing.assert_close(batch.values[[3, 6]], torch.tensor([2.0, 3.0]))
        assert torch.equal(batch.values[[0, 1, 4]], packed.values)
        assert batch.distinct_index is not None
        assert torch.equal(distinct_index(batch.values, batch.cu_seqlens), batch.distinct_index)
    bare = dataclasses.replace(packed, distinct_index=None)
    assert add_depth_tokens(bare, totals, num_genes=5).distinct_index is None
    for options, message in (
        ({"mode": "ratio"}, "mode: expected one of value, fold, offset, got 'ratio'"),
        ({"mode": "fold", "target": 0.0}, "target: expected a positive number for mode 'fold', got 0.0"),
        ({"target": math.inf}, "target: expected a finite number, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            add_depth_tokens(packed, totals, num_genes=5, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"totals: expected shape \(3,\), one a cell, got \(2,\)"):
        add_depth_tokens(packed, totals[:2], num_genes=5)
    with pytest.raises(ValueError, match="totals: expected finite numbers of at least 0"):
        add_depth_tokens(packed, -totals, num_genes=5)
