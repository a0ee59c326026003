"""The runner's command: a wrong provider fails it, and rows say all they should."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.ops import cases
from xtrimogene.bench import runner
from xtrimogene.bench.rows import read_rows
from xtrimogene.bench.tasks import BACKWARD, BOTH, DTYPES, FORWARD, Provider

LENGTHS = (30, 1, 17)
COLUMNS = {
    "benchmark", "case", "cells", "tokens", "dtype", "direction", "provider", "correct", "error", "error_limit",
    "runs", "median_ms", "q20_ms", "q80_ms", "gflops", "gemm_gflops", "share_of_gemm", "speedup",
}  # fmt: skip
MACHINE = {"machine", "isa", "threads", "torch", "commit", "dirty", "date"}


@pytest.fixture(autouse=True)
def _small_and_quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small matrix product, and one thread: on a busy machine the threads of small work wait for each other."""
    monkeypatch.setattr(runner, "GEMM_SIZE", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_with_a_wrong_provider_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = cases.attention_task("small", LENGTHS, "float32")
    zero = Provider(lambda: task.providers["xtg"].run() * 0, task.providers["xtg"].inputs)
    monkeypatch.setitem(
        run.TASKS, "attention", lambda quick: iter([replace(task, providers={**task.providers, "zero": zero})])
    )
    assert run.main(["attention", "--quick", "--out", str(tmp_path / "a.csv")]) == 1
    assert "WRONG" in capsys.readouterr().err


def test_only_runs_the_cases_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tasks = [cases.attention_task(case, (5,), dtype) for case in ("one", "other") for dtype in DTYPES]
    monkeypatch.setitem(run.TASKS, "attention", lambda quick: iter(tasks))
    assert run.main(["attention", "--quick", "--only", "other, bfloat16", "--out", str(tmp_path / "a.csv")]) == 0
    rows = read_rows(tmp_path / "a.csv")
    assert {(row["case"], row["dtype"]) for row in rows} == {("other", "bfloat16")}


def test_rows_say_what_where_and_when(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = cases.attention_task("small", LENGTHS, "float32")
    monkeypatch.setitem(run.TASKS, "attention", lambda quick: iter([task]))
    assert run.main(["attention", "--quick", "--out", str(tmp_path / "new" / "a.csv")]) == 0
    rows = read_rows(tmp_path / "new" / "a.csv")
    assert set(rows[0]) == COLUMNS | MACHINE | {"quick"}
    assert {(row["provider"], row["direction"]) for row in rows} == set(
        itertools.product(task.providers, (FORWARD, BACKWARD, BOTH))
    )
    assert all(value for row in rows for value in row.values())
    assert all(float(r["q20_ms"]) <= float(r["median_ms"]) <= float(r["q80_ms"]) for r in rows)
    assert all(float(row["speedup"]) == 1.0 for row in rows if row["provider"] == "plain")
