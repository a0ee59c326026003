"""The benchmarks of packing, embed and memory: they run on cells that ship with scanpy, and refuse wrong results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xtrimogene
from benchmarks.models import end_to_end
from xtg_kernels import RaggedBatch, dispatch
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.network.masked_batch import MaskedBatch


@pytest.fixture
def scanpy_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No shared data, twenty of scanpy's cells, and one thread, which other work on the machine disturbs least."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(end_to_end, "SHARED_DATA", tmp_path / "nothing")
    name, cells, vocabulary = end_to_end.real_counts("any.h5ad")
    monkeypatch.setattr(end_to_end, "real_counts", lambda *_: (name, cells[:20].copy(), vocabulary))
    yield
    torch.set_num_threads(threads)


def test_scanpy_cells_come_back_as_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(end_to_end, "SHARED_DATA", tmp_path)
    name, cells, vocabulary = end_to_end.real_counts("any.h5ad")
    assert (name, cells.shape, len(vocabulary)) == ("scanpy_pbmc", (700, 765), 765)
    assert np.array_equal(cells.X.data, np.rint(cells.X.data))
    assert cells.X.data.min() == 1


def test_pack_tells_cells_per_second() -> None:
    rows = list(end_to_end.pack(quick=True))
    assert {row["provider"] for row in rows} == {"numpy"} | ({"xtg"} if dispatch.extension() else set())
    for row in rows:
        assert row["correct"], row
        assert row["cells_per_second"] == pytest.approx(row["cells"] / row["median_ms"] * 1e3, rel=1e-2)


@pytest.mark.skipif(dispatch.extension() is None, reason="the C++ extension was not built (XTG_BUILD_CPP=0)")
@pytest.mark.parametrize("fault", ["values", "gene_ids", "distinct_index"])
def test_a_wrong_packer_gets_no_speed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_rows = end_to_end.pack_rows

    def broken(*arguments: Any, **options: Any) -> RaggedBatch:
        batch = pack_rows(*arguments, **options)
        tensor = getattr(batch, fault).clone()
        tensor[7] = tensor[7] + 1
        return dataclasses.replace(batch, **{fault: tensor})

    monkeypatch.setattr(end_to_end, "pack_rows", broken)
    (row,) = (row for row in end_to_end.pack(quick=True) if row["provider"] == "xtg")
    assert not row["correct"]
    assert "median_ms" not in row
    assert "cells_per_second" not in row


def test_loader_tells_cells_per_second() -> None:
    rows = list(end_to_end.loader(quick=True))
    assert {row["provider"] for row in rows} == {"numpy", "xtg"}
    assert len({row["case"] for row in rows}) == 7
    for row in rows:
        assert row["correct"], row
        assert row["cells_per_second"] == pytest.approx(row["cells"] / row["median_ms"] * 1e3, rel=1e-2)


def test_a_wrong_loader_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(batch: MaskedBatch) -> MaskedBatch:
        return dataclasses.replace(batch, chosen_values=batch.chosen_values + 1)

    iterate, mask_cells = TrainingCells.iterate, end_to_end.mask_cells
    monkeypatch.setattr(TrainingCells, "iterate", lambda *arguments: map(broken, iterate(*arguments)))
    monkeypatch.setattr(end_to_end, "mask_cells", lambda *a, **options: broken(mask_cells(*a, **options)))
    rows = [row for row in end_to_end.loader(quick=True) if row["provider"] == "xtg"]
    assert rows
    for row in rows:
        assert not row["correct"], row
        assert "cells_per_second" not in row


@pytest.mark.usefixtures("scanpy_only")
def test_embed_tells_where_its_time_goes() -> None:
    rows = list(end_to_end.embed_share(quick=True))
    assert len(rows) == 2
    for row in rows:
        assert row["correct"], row
        assert row["cells"] == 20
        shares = [row[f"{part}_share"] for part in ("encoder", "packing", "reading")]
        assert all(0 < share < 1 for share in shares)
        assert sum(shares) < 1.01


@pytest.mark.usefixtures("scanpy_only")
def test_wrong_embeddings_are_found() -> None:
    _, cells, vocabulary = end_to_end.real_counts("any.h5ad")
    model = xtrimogene.XTrimoGene.from_preset("3m", vocabulary)
    written = xtrimogene.embed(cells, model, dtype="float32", progress=False).embedding
    assert written is not None
    assert end_to_end._embeds(written, cells, model, "float32")
    assert not end_to_end._embeds(written * np.float32(1.001), cells, model, "float32")
    assert not end_to_end._embeds(written[::-1], cells, model, "float32")


@pytest.mark.usefixtures("scanpy_only")
def test_wrong_embeddings_get_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "_embeds", lambda *_: False)
    monkeypatch.setattr(end_to_end, "MEMORY_CELLS", (5,))
    for row in (*end_to_end.embed_share(quick=True), *end_to_end.memory(quick=True)):
        assert not row["correct"]
        assert not {"median_ms", "cells_per_second", "encoder_share", "peak_mib"} & set(row)


@pytest.mark.usefixtures("scanpy_only")
def test_memory_is_that_of_embed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "MEMORY_CELLS", (30,))
    (row,) = end_to_end.memory(quick=True)
    assert row["correct"], row
    assert row["cells"] == 30
    # Thirty small cells take more than nothing, and far less than the imports did.
    assert 0 < row["peak_mib"] < row["loaded_mib"]
