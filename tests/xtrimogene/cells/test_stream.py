"""Tests of TrainingCells: the same batches after any interruption and on any number of ranks; broken files named."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import textwrap
import threading
import time
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

from tests import warm
from xtrimogene.cells import stream
from xtrimogene.cells.data_sets import expand_data, genes_of_data
from xtrimogene.cells.genes import map_genes
from xtrimogene.cells.masking import pack_masked
from xtrimogene.cells.order import Order
from xtrimogene.cells.packing import pack_rows
from xtrimogene.cells.prefetch import prefetched
from xtrimogene.cells.sources import CellSource, open_cells
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.vocabulary import Vocabulary

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning"),
]

N_VARS = 60
GENES = [f"G{i}" for i in range(N_VARS)]
VOCABULARY = Vocabulary([*GENES[::-2], *GENES[2:20:4], "absent"])
OPTIONS: dict[str, Any] = {
    "min_genes": 5, "batch_tokens": 130, "batch_cells": 9, "block_size": 8, "window_blocks": 3, "seed": 4,
    "validation_share": 0.1, "progress": False,
}  # fmt: skip


def counts(n_obs: int, seed: int) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    matrix = sp.random(n_obs, N_VARS, density=0.4, format="csr", random_state=rng)
    matrix.data = rng.geometric(0.3, matrix.nnz)
    return matrix.astype(np.float32)


def adata_of(matrix: Any, genes: list[str] = GENES) -> AnnData:
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(matrix.shape[0])])
    return AnnData(matrix, obs=obs, var=pd.DataFrame(index=genes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets of different forms and gene orders."""
    path = tmp_path_factory.mktemp("cells")
    adata_of(counts(70, 1)).write_h5ad(path / "a.h5ad")
    adata_of(counts(101, 2).astype(np.int32), GENES[::-1]).write_zarr(path / "b.zarr")
    adata_of(counts(40, 3).toarray()).write_h5ad(path / "c.h5ad", compression="gzip")
    return path


def training_cells(data: Any, **options: Any) -> TrainingCells:
    return TrainingCells(data, VOCABULARY, **{**OPTIONS, **options})


def assert_same_bits(one: MaskedBatch, other: MaskedBatch) -> None:
    for field in dataclasses.fields(MaskedBatch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "batch":
            for name in ("values", "gene_ids", "cu_seqlens", "distinct_index"):
                assert getattr(a, name).numpy().tobytes() == getattr(b, name).numpy().tobytes(), name
        else:
            assert a.numpy().tobytes() == b.numpy().tobytes(), field.name


def numbers(batches: list[MaskedBatch]) -> list[int]:
    return [cell for batch in batches for cell in batch.cells.tolist()]


@pytest.fixture(params=[{}, {"depth_tokens": True}, {"prefetch": 0}], ids=["plain", "depth", "no threads"])
def cells(request: pytest.FixtureRequest, folder: Path) -> Generator[TrainingCells, None, None]:
    with training_cells(folder, **request.param) as opened:
        yield opened


def test_every_batch_is_what_its_cells_give(folder: Path) -> None:
    """Against each file packed and masked on its own; genes are counted and cells are left out by hand."""
    paths = [folder / name for name in ("a.h5ad", "b.zarr", "c.h5ad")]
    whole: list[tuple[Any, Any]] = []
    lengths: list[int] = []
    for path in paths:
        with open_cells(path) as source:
            columns = map_genes(source, VOCABULARY).gene_ids
            rows = source.read_rows(0, source.n_obs)
            whole.append((rows, columns))
            lengths += pack_rows(rows, columns).lengths.tolist()
    assert min(lengths) <= 8 < max(lengths)
    with training_cells(folder, min_genes=8) as cells:
        assert cells.genes_per_cell.tolist() == lengths
        assert cells.num_cells == 211
        kept = {cell for cell, length in enumerate(lengths) if length > 8}
        assert set(cells.training.tolist()) | set(cells.validation_cells.tolist()) == kept
        assert not set(cells.training.tolist()) & set(cells.validation_cells.tolist())
        batches = list(cells.iterate(2))
        assert sorted(numbers(batches)) == cells.training.tolist()
        for batch in batches:
            for row, cell in enumerate(batch.cells.tolist()):
                file = int(np.searchsorted([70, 171], cell, side="right"))
                csr, columns = whole[file]
                local = np.array([cell - (0, 70, 171)[file]])
                alone = pack_masked(
                    csr, columns, np.array([cell]), cells.masking, epoch=2, num_genes=len(VOCABULARY), rows=local
                )
                start, stop = batch.batch.cu_seqlens[row : row + 2].tolist()
                assert torch.equal(alone.batch.values, batch.batch.values[start:stop])
                assert torch.equal(alone.batch.gene_ids, batch.batch.gene_ids[start:stop])
                start, stop = batch.chosen_cu_seqlens[row : row + 2].tolist()
                assert torch.equal(alone.chosen_values, batch.chosen_values[start:stop])
                assert torch.equal(alone.chosen_ids, batch.chosen_ids[start:stop])
        assert str(cells).startswith("211 cells of 3 data sets: ")
        assert f"{len(VOCABULARY) - 1} of {len(VOCABULARY)} vocabulary genes found" in str(cells)


def test_batches_keep_to_their_limits(cells: TrainingCells) -> None:
    sizes = []
    for batch in cells.iterate(0):
        tokens = cells.genes_per_cell[batch.cells].sum()
        assert batch.batch_size <= 9
        assert tokens <= 130
        sizes.append((batch.batch_size, tokens))
    # Filled as far as they go: one more cell would not have fitted.
    assert sum(size == 9 or tokens > 130 - 35 for size, tokens in sizes) >= len(sizes) - 1
    assert any(size == 9 for size, _ in sizes)
    assert any(size < 9 for size, _ in sizes[:-1])


def test_the_order_is_of_seed_and_epoch(folder: Path) -> None:
    with training_cells(folder) as cells, training_cells(folder, seed=5) as other:
        first = numbers(list(cells.iterate(0)))
        assert first != numbers(list(cells.iterate(1)))
        assert first != numbers(list(other.iterate(0)))
        assert first == numbers(list(cells.iterate(0)))
        assert sorted(first) == sorted(numbers(list(other.iterate(1)))) == cells.training.tolist()
        # A window holds whole blocks of 8 rows, 3 of them, and mixes their cells.
        blocks = [(cell - (0, 70, 171)[file]) // 8 + 100 * file for cell in first
                  for file in [int(np.searchsorted([70, 171], cell, side="right"))]]  # fmt: skip
        order = list(dict.fromkeys(blocks))
        assert len(order) == 9 + 13 + 5
        window_of = {block: min(i for i, b in enumerate(order) if b == block) // 3 for block in order}
        assert [window_of[block] for block in blocks] == sorted(window_of[block] for block in blocks)
        assert sum(a != b for a, b in itertools.pairwise(blocks)) > 0.5 * len(blocks)


def test_a_resumed_epoch_has_the_same_batches(cells: TrainingCells) -> None:
    whole = list(cells.iterate(3))
    steps = cells.num_steps(3)
    assert len(whole) == steps > 12
    for start in (0, 1, 5, steps - 1):
        resumed = list(cells.iterate(3, start))
        assert len(resumed) == steps - start
        for one, other in zip(whole[start:], resumed, strict=True):
            assert_same_bits(one, other)
    assert list(cells.iterate(3, steps)) == []


def test_resuming_reads_nothing_of_what_came_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with training_cells(folder, prefetch=0) as cells:
        whole = list(cells.iterate(0))
        read: list[int] = []
        original = CellSource.read_rows

        def spy(self: Any, start: int, stop: int) -> Any:
            read.append(stop - start)
            return original(self, start, stop)

        monkeypatch.setattr(CellSource, "read_rows", spy)
        start = len(whole) - 2
        next(cells.iterate(0, start))
        # The window of the step, and one more that it may reach into.
        assert 0 < sum(read) <= 2 * 3 * 8


def test_few_windows_are_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def window(*arguments: Any) -> Any:
        nonlocal most
        made = original(*arguments)
        alive.add(made)
        most = max(most, len(alive))
        return made

    original = stream._Window
    monkeypatch.setattr(stream, "_Window", window)
    with training_cells(folder) as cells:
        assert sum(len(batch.cells) for batch in cells.iterate(0)) == len(cells.training)
    assert 2 <= most <= 3


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (3, 1), (2, 3)])
def test_ranks_share_the_cells(cells: TrainingCells, world_size: int, accumulate: int) -> None:
    parts = world_size * accumulate
    by_rank = [
        list(cells.iterate(1, rank=rank, world_size=world_size, accumulate=accumulate)) for rank in range(world_size)
    ]
    steps = cells.num_steps(1, world_size=world_size, accumulate=accumulate)
    assert {len(batches) for batches in by_rank} == {steps * accumulate}
    assert sorted(numbers([batch for batches in by_rank for batch in batches])) == cells.training.tolist()
    for batches in by_rank:
        for batch in batches:
            assert 1 <= batch.batch_size <= 9
            assert cells.genes_per_cell[batch.cells].sum() <= 130
    # The batches of a step are the same, however many ranks share them; all but the last steps have the cells of the
    # batches of one rank alone.
    alone = list(cells.iterate(1, rank=0, world_size=1, accumulate=parts))
    single = list(cells.iterate(1))
    for step in range(steps):
        shared = [batch for batches in by_rank for batch in batches[step * accumulate : (step + 1) * accumulate]]
        for one, other in zip(alone[step * parts : (step + 1) * parts], shared, strict=True):
            assert_same_bits(one, other)
        if step < steps - 2:
            assert sorted(numbers(shared)) == sorted(numbers(single[step * parts : (step + 1) * parts]))
    resumed = list(cells.iterate(1, 2, rank=world_size - 1, world_size=world_size, accumulate=accumulate))
    for one, other in zip(by_rank[-1][2 * accumulate :], resumed, strict=True):
        assert_same_bits(one, other)


def test_ranks_have_batches_of_like_cost(folder: Path) -> None:
    cost = (30.0, 1.0, 0.5)
    with training_cells(folder, cost=cost, batch_tokens=400, batch_cells=None) as cells:
        lengths = cells.genes_per_cell.astype(float)
        costs = cost[0] + cost[1] * lengths + cost[2] * lengths**2
        spent = np.array(
            [[costs[batch.cells].sum() for batch in cells.iterate(0, rank=rank, world_size=3)] for rank in range(3)]
        )
        assert spent.shape[1] > 2
        assert np.all(spent.max(0) - spent.min(0) < costs.max())
        assert np.median(spent.max(0) / spent.min(0)) < 1.1


@pytest.mark.parametrize("batch_tokens", [27, 30, 40])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_batches_of_a_cell_or_two(folder: Path, batch_tokens: int, parts: int) -> None:
    """Where no balanced batches keep to the limits, and where the last step has to borrow cells."""
    with training_cells(folder, batch_tokens=batch_tokens, batch_cells=2) as cells:
        batches = list(cells.iterate(0, accumulate=parts))
        assert len(batches) == cells.num_steps(0, accumulate=parts) * parts
        seen = numbers(batches)
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(cells.training.tolist())
        assert len(seen) > len(cells.training) - parts
        for batch in batches:
            assert 1 <= batch.batch_size <= 2
            assert cells.genes_per_cell[batch.cells].sum() <= batch_tokens


@pytest.mark.parametrize(
    ("lengths", "batch_cells", "steps", "parts"),
    [
        # The step before gives the last one two cells.
        ([1] * 7, 2, [0, 4, 7], None),
        # It has none to give: one cell is left out.
        ([1] * 4, 1, [0, 3], None),
        # Of like cost, the first three cells would go to three batches, and none of them has room for the last.
        ([32, 32, 32, 70], None, [0, 4], [0, 1, 1, 2]),
    ],
)
def test_steps_of_three_batches(
    lengths: list[int], batch_cells: int | None, steps: list[int], parts: list[int] | None
) -> None:
    order = Order(
        np.arange(len(lengths)), np.array([0, len(lengths)]), np.array(lengths), 100, batch_cells, (1.0, 0.0, 0.0)
    )
    assert order.steps(3).tolist() == steps
    for start, stop in itertools.pairwise(steps):
        part_of = order.parts(start, stop, 3)
        assert set(part_of.tolist()) == {0, 1, 2}
        assert parts is None or part_of.tolist() == parts


def test_split(folder: Path) -> None:
    with (
        training_cells(folder, validation_share=0.3) as cells,
        training_cells(folder, validation_share=0.3, split_seed=1) as other,
        training_cells(folder, validation_share=0.3, max_validation_cells=10, seed=77) as few,
        training_cells(folder, validation_share=0.0) as none,
        training_cells(folder / "a.h5ad", validation_share=0.3) as first,
    ):
        assert 40 < len(cells.validation_cells) < 90
        assert cells.validation_cells.tolist() != other.validation_cells.tolist()
        # What is trained on does not depend on how many cells validation looks at, nor on the files that follow.
        assert few.training.tolist() == cells.training.tolist()
        assert len(few.validation_cells) == 10
        assert set(few.validation_cells.tolist()) < set(cells.validation_cells.tolist())
        assert first.training.tolist() == [cell for cell in cells.training.tolist() if cell < 70]
        assert len(none.validation_cells) == 0
        assert list(none.validation()) == []


def test_validation_is_always_the_same(cells: TrainingCells) -> None:
    first = list(cells.validation())
    assert numbers(first) == cells.validation_cells.tolist()
    assert len(first) > 1
    list(cells.iterate(5))
    for one, other in zip(first, cells.validation(), strict=True):
        assert_same_bits(one, other)
    by_rank = [list(cells.validation(rank=rank, world_size=2)) for rank in range(2)]
    assert len(by_rank[0]) == len(by_rank[1])
    assert sorted(numbers([batch for batches in by_rank for batch in batches])) == cells.validation_cells.tolist()


def test_data_in_memory_and_of_one_file(folder: Path) -> None:
    paths = [folder / name for name in ("a.h5ad", "b.zarr", "c.h5ad")]
    in_memory = [anndata.read_h5ad(paths[0]), anndata.read_zarr(paths[1]), anndata.read_h5ad(paths[2])]
    with (
        training_cells(folder) as cells,
        training_cells(in_memory) as other,
        training_cells([str(path) for path in paths]) as third,
    ):
        assert cells.fingerprint == other.fingerprint == third.fingerprint
        for one, two, three in zip(cells.iterate(0), other.iterate(0), third.iterate(0), strict=True):
            assert_same_bits(one, two)
            assert_same_bits(one, three)
        assert [source.name for source in other.sources] == ["AnnData 1", "AnnData 2", "AnnData 3"]
    with training_cells(folder, batch_cells=8) as other:
        assert other.fingerprint != cells.fingerprint


def test_counting_is_done_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with training_cells(folder) as cells:
        found = cells.genes_per_cell
    monkeypatch.setattr(TrainingCells, "_count_genes", None)
    with training_cells(folder, genes_per_cell=found) as again:
        assert again.fingerprint == cells.fingerprint
    with pytest.raises(ValueError, match="genes_per_cell: expected one number for each of the 211 cells"):
        training_cells(folder, genes_per_cell=found[1:])


def test_normalised_values_as_they_are() -> None:
    matrix = counts(50, 1)
    matrix.data = np.log1p(matrix.data)
    with training_cells(adata_of(matrix), normalized=True, validation_share=0.0) as cells:
        batches = list(cells.iterate(0))
        dense = matrix.toarray()
        for batch in batches:
            columns = [GENES.index(VOCABULARY.genes[g]) if VOCABULARY.genes[g] in GENES else None
                       for g in batch.chosen_ids.tolist()]  # fmt: skip
            rows = np.repeat(batch.cells.numpy(), batch.chosen_cu_seqlens.diff().numpy())
            truth = [0.0 if c is None else dense[r, c] for r, c in zip(rows.tolist(), columns, strict=True)]
            assert batch.chosen_values.tolist() == truth
    with pytest.raises(ValueError, match="got numbers that are not whole; if they are log1p"):
        training_cells(adata_of(matrix))
    with pytest.raises(ValueError, match="normalized: expected raw counts with depth_tokens=True"):
        training_cells(adata_of(matrix), normalized=True, depth_tokens=True)


def test_values_of_cells(folder: Path) -> None:
    with training_cells(folder) as cells, open_cells(folder / "b.zarr") as source:
        batch = cells.read(np.array([100, 3, 90, 100]))
        assert batch.batch_size == 4
        rows = source.read_rows(0, source.n_obs)
        alone = pack_rows(rows, map_genes(source, VOCABULARY).gene_ids, rows=np.array([30, 20, 30]))
        assert torch.equal(batch.values[: batch.cu_seqlens[1]], alone.values[: alone.cu_seqlens[1]])
        assert torch.equal(batch.values[batch.cu_seqlens[2] :], alone.values[alone.cu_seqlens[1] :])
        assert cells.read(np.zeros(0, np.int64)).batch_size == 0
        with pytest.raises(ValueError, match="cells: expected numbers from 0 to 210, got 3 to 211"):
            cells.read(np.array([3, 211]))


def test_real_cells() -> None:
    import scanpy

    adata = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    vocabulary = Vocabulary.from_adata(adata)
    with TrainingCells(
        adata, vocabulary, normalized=True, min_genes=100, batch_tokens=4000, block_size=32, window_blocks=4,
        progress=False,
    ) as cells:  # fmt: skip
        lengths = np.diff(adata.X.indptr)
        assert cells.genes_per_cell.tolist() == lengths.tolist()
        batches = list(cells.iterate(0))
        assert sorted(numbers(batches)) == cells.training.tolist()
        assert len(cells.training) + len(cells.validation_cells) == int((lengths > 100).sum())
        for batch in batches:
            kept = lengths[batch.cells]
            want = [round(0.3 * n) + round(0.03 * (765 - n)) for n in kept.tolist()]
            assert batch.chosen_cu_seqlens.diff().tolist() == want


def test_real_files(shared_data: Path) -> None:
    vocabulary = Vocabulary.from_tsv(shared_data / "gene_vocabulary_19264.tsv")
    with TrainingCells(shared_data / "pbmc3k_counts_labelled.h5ad", vocabulary, progress=False) as cells:
        assert cells.genes_found > 11_000
        batches = list(cells.iterate(0, cells.num_steps(0) - 2))
        assert len(batches) == 2
        assert all(batch.batch.gene_ids.max() < 19264 for batch in batches)


def damaged(path: Path, key: str, adata: AnnData) -> None:
    """Writes a compressed file and spoils the second of 16 pieces of one of its arrays: no sample of cells sees it."""
    adata.write_h5ad(path, compression="gzip")
    with h5py.File(path, "r+") as file:
        array = file[key][:]
        del file[key]
        file.create_dataset(key, data=array, chunks=(len(array) // 16,), compression="gzip")
    with h5py.File(path) as file:
        chunk = file[key].id.get_chunk_info(1)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(content)


def test_broken_files_are_named_before_training(folder: Path, tmp_path: Path) -> None:
    good = folder / "a.h5ad"
    cut = tmp_path / "cut.h5ad"
    cut.write_bytes(good.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.h5ad: .*truncated"):
        training_cells([good, cut])
    damaged(tmp_path / "broken.h5ad", "X/data", adata_of(counts(4000, 5)))
    with pytest.raises(ValueError, match=r"broken\.h5ad: cannot read rows 0 to 1023: .* damaged or truncated"):
        training_cells([good, tmp_path / "broken.h5ad"])
    with pytest.raises(FileNotFoundError, match=r"none\.h5ad: no such file"):
        training_cells([good, tmp_path / "none.h5ad"])
    adata_of(counts(9, 1), [f"X{i}" for i in range(N_VARS)]).write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(ValueError, match=r"other\.h5ad: expected genes such as .* got none"):
        training_cells([good, tmp_path / "other.h5ad"])
    adata_of(counts(9, 1) * 0.5).write_h5ad(tmp_path / "scaled.h5ad")
    with pytest.raises(ValueError, match=r"scaled\.h5ad: expected raw counts in X"):
        training_cells([good, tmp_path / "scaled.h5ad"])
    # A number that no sample shows: found while genes are counted.
    matrix = counts(2000, 1)
    matrix.data[matrix.indptr[150]] = -1
    with pytest.raises(ValueError, match=r"AnnData 1: row 150, column \d+: negative value -1\.0"):
        training_cells(adata_of(matrix))
    matrix.data[matrix.indptr[150]] = 1.5
    with pytest.raises(
        ValueError, match=r"AnnData 1: row 150, column \d+: value 1\.5 is not whole; .* \(cell 'cell150', "
    ):
        training_cells(adata_of(matrix))
    with training_cells(adata_of(matrix), fractional_counts=True):
        pass


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_breaks_while_training_is_named(tmp_path: Path, prefetch: int) -> None:
    path = tmp_path / "cells.h5ad"
    adata_of(counts(400, 1)).write_h5ad(path)
    with training_cells(path, prefetch=prefetch) as cells:
        whole = len(list(cells.iterate(0)))
    with h5py.File(path, "r+") as file:
        stored = file["X/indices"]
        stored[stored.shape[0] // 2] = N_VARS
    found = cells.genes_per_cell
    with training_cells(path, prefetch=prefetch, genes_per_cell=found) as cells:
        got: list[MaskedBatch] = []
        message = rf"cells\.h5ad: row \d+, column {N_VARS}: column index outside the matrix"
        with pytest.raises(ValueError, match=message):
            got.extend(cells.iterate(0))
        assert len(got) < whole
    assert [thread.name for thread in threading.enumerate() if thread.name == "prefetch"] == []


def test_damage_found_while_training_names_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    adata = adata_of(counts(4000, 5))
    with training_cells(adata) as cells:
        found = cells.genes_per_cell
    damaged(path, "X/data", adata)
    with (
        training_cells(path, genes_per_cell=found) as cells,
        pytest.raises(ValueError, match=r"cells\.h5ad: cannot read rows \d+ to \d+: .* damaged or truncated"),
    ):
        list(cells.iterate(0))


def test_a_broken_piece_of_a_zarr_store_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cells.zarr"
    adata_of(counts(300, 5)).write_zarr(path)
    pieces = [
        entry
        for entry in (path / "X" / "data").rglob("*")
        if entry.is_file() and not entry.name.startswith((".", "zarr"))
    ]
    for piece in pieces:
        piece.write_bytes(b"\xff" * piece.stat().st_size)
    with pytest.raises(ValueError, match=r"cells\.zarr: cannot read rows"):
        training_cells(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_genes": -1}, "min_genes: expected an integer of at least 0, got -1"),
        ({"batch_tokens": 0}, "batch_tokens: expected an integer of at least 1, got 0"),
        (
            {"batch_tokens": 20},
            r"batch_tokens: expected room for the longest cell, got 20, and cell 'cell\d+' \(row \d+\) of",
        ),
        ({"validation_share": 1.0}, "validation_share: expected 0 <= share < 1"),
        ({"cost": (0, 0, 0)}, "cost: expected three numbers of at least 0 and not all 0"),
        ({"min_genes": 100}, "expected cells to train on with more than min_genes = 100 .* got none among 211"),
    ],
)
def test_options_are_checked(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_cells(folder, **change)


def test_places_in_an_epoch_are_checked(cells: TrainingCells) -> None:
    for change, message in (
        ({"epoch": -1}, "epoch: expected an integer of at least 0"),
        ({"start_step": 10**6}, "start_step: expected 0 to"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to 1, got 2"),
        ({"world_size": 1000}, "expected at most as many batches a step as there are cells, got 1000 batches"),
    ):
        with pytest.raises(ValueError, match=message):
            cells.iterate(**{"epoch": 0, **change})


def test_which_files_are_meant(folder: Path, tmp_path: Path) -> None:
    assert expand_data(str(folder)) == [folder / "a.h5ad", folder / "b.zarr", folder / "c.h5ad"]
    assert expand_data([folder / "c.h5ad", folder / "b.zarr"]) == [folder / "c.h5ad", folder / "b.zarr"]
    with pytest.raises(FileNotFoundError, match="expected h5ad files or zarr stores in the folder, got none"):
        expand_data(tmp_path)
    with pytest.raises(ValueError, match=r"expected each file once, got .*a\.h5ad more than once"):
        expand_data([folder, folder / "a.h5ad"])
    with pytest.raises(ValueError, match="data: expected at least one data set"):
        expand_data([])
    assert genes_of_data([folder / "b.zarr", folder / "a.h5ad"]).genes == tuple(GENES[::-1])


def test_prefetching() -> None:
    made: list[int] = []
    closed = threading.Event()

    def items(fail_at: int = -1) -> Generator[int, None, None]:
        try:
            for i in range(100):
                if i == fail_at:
                    raise OSError("broken")
                made.append(i)
                yield i
        finally:
            closed.set()

    assert list(prefetched(items(), 3)) == list(range(100))
    made.clear()
    closed.clear()
    early = prefetched(items(), 3)
    assert next(early) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    early.close()
    assert closed.is_set()
    assert all(thread.name != "prefetch" for thread in threading.enumerate())
    got: list[int] = []
    with pytest.raises(OSError, match="broken"):
        got.extend(prefetched(items(fail_at=5), 2))
    assert got == [0, 1, 2, 3, 4]
    assert all(thread.name != "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_more_files_than_may_be_open(form: str, tmp_path: Path) -> None:
    """In a process whose limit is below the number of files. Matrices that are turned around take temporary files, for
    which the limit is raised."""
    for number in range(60):
        matrix = counts(8, number)
        adata_of(matrix.asformat(form)).write_h5ad(tmp_path / f"{number:02}.h5ad")
    code = textwrap.dedent(f"""
        import resource
        from xtrimogene.cells.stream import TrainingCells
        from xtrimogene.network.vocabulary import Vocabulary

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, {"most" if form == "csc" else 50}))
        options = {OPTIONS!r} | {{"validation_share": 0}}
        with TrainingCells({str(tmp_path)!r}, Vocabulary({GENES!r}), **options) as cells:
            print(sum(batch.batch_size for batch in cells.iterate(0)), cells.num_cells)
    """)
    done = subprocess.run([*warm.python(cells=True), "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["480", "480"], done.stderr
