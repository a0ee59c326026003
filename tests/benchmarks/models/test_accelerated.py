"""The benchmark of other people's models: cells per second of every way that is right, and none of the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import readme
from benchmarks.models import accelerated, others
from xtrimogene.bench.rows import write_csv
from xtrimogene.bench.tasks import BOTH, FORWARD

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def make(layers: int) -> Any:
        return others.ScGPT(genes=19_264, dim=16, heads=2, ffn_dim=16, layers=layers, dropout=0.0)

    small = dataclasses.replace(accelerated.MODELS["scGPT"], make=make)
    monkeypatch.setattr(accelerated, "MODELS", {"scGPT": small})
    monkeypatch.setattr(accelerated, "RUNS", [("scGPT", 1, 2, "float32", way) for way in (FORWARD, BOTH)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_way_is_beside_the_best_of_pytorch(tmp_path: Path) -> None:
    rows = list(accelerated.accelerated(quick=True))
    assert all(row["correct"] for row in rows), rows
    plain = ["as it is", "as it is, fused path off"]
    ours = ["accelerate", "accelerate, padded_rows=False", "packed"]
    for direction, ways in ((FORWARD, {*plain, *ours}), (BOTH, {*plain[:1], *ours})):
        found = {row["provider"]: row for row in rows if row["direction"] == direction}
        assert set(found) == ways
        best = min(found[way]["median_ms"] for way in plain if way in found)
        for row in found.values():
            assert row["cells_per_second"] == pytest.approx(2 / row["median_ms"] * 1e3, rel=1e-2)
            assert row["speedup"] == pytest.approx(best / row["median_ms"], rel=1e-2)
    where = {"machine": "M", "isa": "avx2", "threads": 2, "torch": "2", "commit": "a", "dirty": False, "date": "D"}
    write_csv(tmp_path / "accelerated.csv", [{**row, "quick": False, **where} for row in rows])
    lines = readme.accelerated(tmp_path).splitlines()
    packed = next(row for row in rows if row["provider"] == "packed")
    assert lines[2].startswith("| scGPT, 1 layer, 2 cells, 0% padding | float32 | inference | ")
    assert lines[2].endswith(f" {packed['cells_per_second']:.3g} ({packed['speedup']:.2f}x) |")
    assert " | training step | " in lines[3]


def test_a_wrong_way_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = accelerated.MODELS["scGPT"]
    wrong = dataclasses.replace(right, packed=lambda model, batch: 1.001 * right.packed(model, batch))  # type: ignore
    monkeypatch.setattr(accelerated, "MODELS", {"scGPT": wrong})
    rows = {row["provider"]: row for row in accelerated.accelerated(quick=True) if row["direction"] == FORWARD}
    assert [way for way, row in rows.items() if not row["correct"]] == ["packed"]
    assert "median_ms" not in rows["packed"]
    assert "median_ms" in rows["accelerate"]
