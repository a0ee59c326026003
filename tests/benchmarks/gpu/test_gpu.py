"""benchmarks.gpu, the command for the day a GPU is there: a whole rehearsal on the CPU, and what it does when it is cut
off, out of time or finds wrong numbers. No time that is measured here means anything. The rehearsal runs with `make
test-gpu-static`."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report, session, tasks, tune, work
from benchmarks.gpu.work import Item
from benchmarks.static import launches
from tests import warm
from xtg_kernels import triton_launch
from xtrimogene.bench.rows import Row, read_rows
from xtrimogene.bench.tasks import Provider

CPU = torch.device("cpu")
HERE: Row = {"machine": "here", "torch": "2", "triton": "3", "commit": "abc", "dirty": False, "date": "2026-01-01"}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run on the CPU, in Triton's interpreter."""
    folder = tmp_path_factory.mktemp("rehearsal")
    script = """
import sys
from benchmarks.gpu.__main__ import main
from tests.interpreter import replace_language_once_a_launch
replace_language_once_a_launch()
sys.exit(main(["--device", "cpu", "--out", *sys.argv[1:]]))
"""
    command = [*warm.python(cells=True), "-c", script, str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.mark.gpu_static
def test_a_rehearsal_does_every_item_and_all_is_right(rehearsal: Path) -> None:
    rows = read_rows(rehearsal / "gpu.csv")
    plan = work.plan_of("cpu", quick=False)
    assert list(dict.fromkeys(row["item"] for row in rows)) == [
        item.name
        for item in work.items(plan, "cpu", rehearsal)
        if item.name not in ("tune masked_decoder_gather", "tune dropout")
    ], "the gather and dropout have one candidate, and no row"
    assert not [row for row in rows if row["correct"] == "False"]
    for op in launches.OPS:
        checked = [r for r in rows if r["item"].startswith(f"check {op}") and r["provider"] == "xtg"]
        assert {row["direction"] for row in checked} == {"forward", "backward"}
        assert all(0 <= float(row["error"]) <= float(row["error_limit"]) for row in checked)
        timed = [r for r in rows if r["item"].startswith(f"time {op}") and r["provider"] == "xtg"]
        assert all(float(row["median_ms"]) > 0 and float(row["speedup"]) > 0 for row in timed)
        assert len(timed) == 2
    absent = {row["provider"]: row["note"] for row in rows if row["item"].startswith("time ragged_attention")}
    assert all(absent[name] for name in ("varlen", "flex", "flash-attn")), "who is missing says why"
    assert {row["machine"][:9] for row in rows} == {"rehearsal"}
    assert all(float(r["cells_per_second"]) > 0 for r in rows if r["item"].startswith(("encoder", "pre-training")))


def test_a_rehearsal_begins_again_with_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu.subprocess, "call", lambda command, **options: begun.append((command, options)) or 7)
    assert gpu.main(["--device", "cpu", "--fresh"]) == 7
    ((command, options),) = begun
    assert command == [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--fresh"]
    assert options == {"cwd": gpu.ROOT, "env": {**os.environ, "TRITON_INTERPRET": "1"}}


@pytest.mark.gpu_static
def test_a_rehearsal_writes_table_picture_and_tuned_configs(rehearsal: Path) -> None:
    text = (rehearsal / "gpu.md").read_text(encoding="utf-8")
    for title in ("Errors against float64", "Times", "Model", "Chosen by tuning", "Other findings"):
        assert f"## {title}" in text
    assert "WRONG" not in text
    assert (rehearsal / "gpu.png").read_bytes().startswith(b"\x89PNG")
    tables = tune.read_tables("ragged_attention", rehearsal / "configs")
    candidates = launches.OPS["ragged_attention"].kernels["forward"].candidates("float32", 16)
    assert tables["default"]["forward"]["float32"]["16"] in candidates


def _go(monkeypatch: pytest.MonkeyPatch, folder: Path, made: dict[str, Any], minutes: float | None = None) -> int:
    """Runs items that return their rows or raise."""

    def rows(found: Any) -> Sequence[Row]:
        if isinstance(found, BaseException):
            raise found
        return found

    items = [Item(name, functools.partial(rows, found)) for name, found in made.items()]
    monkeypatch.setattr(work, "items", lambda *_: iter(items))
    return session.go(work.plan_of("cpu", quick=True), "cpu", folder, HERE, minutes)


def test_cut_off_it_goes_on_with_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _go(monkeypatch, tmp_path, {"a": [{"note": "first"}], "b": KeyboardInterrupt(), "c": [{"note": "third"}]})
    assert [row["item"] for row in read_rows(tmp_path / "gpu.csv")] == ["a"]
    left = _go(monkeypatch, tmp_path, {"a": AssertionError("done"), "b": [{"note": "2"}], "c": [{"note": "3"}]})
    assert left == 0
    assert [(row["item"], row["note"]) for row in read_rows(tmp_path / "gpu.csv")] == [
        ("a", "first"), ("b", "2"), ("c", "3"),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.csv"]


def test_one_failure_does_not_keep_the_rest_from_being_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _go(monkeypatch, tmp_path, {"a": RuntimeError("no such kernel\nand more"), "b": [{"note": "fine"}]})
    first, second = read_rows(tmp_path / "gpu.csv")
    assert (first["correct"], first["note"]) == ("False", "RuntimeError: no such kernel")
    assert second["note"] == "fine"


def test_out_of_time_says_how_much_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _go(monkeypatch, tmp_path, {"a": [{"note": "1"}], "b": [{"note": "2"}]}, minutes=-1.0) == 2
    assert not (tmp_path / "gpu.csv").exists()


def test_results_of_another_commit_are_not_mixed_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _go(monkeypatch, tmp_path, {"a": [{"note": "1"}]})
    monkeypatch.setitem(HERE, "commit", "def")
    with pytest.raises(ValueError, match=r"made elsewhere \(commit abc\): choose another --out, or --fresh"):
        _go(monkeypatch, tmp_path, {"b": [{"note": "2"}]})


@pytest.mark.parametrize(("rows", "status"), [([{"correct": False, "note": "bad"}], 1), ([{"note": "fine"}], 0)])
def test_the_exit_status_tells(rows: list[Row], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(work, "items", lambda *_: iter([Item("a", lambda: rows)]))
    monkeypatch.setattr(report, "write", lambda *_: None)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == status


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU found by this torch; --device cpu rehearses" in capsys.readouterr().err


def test_a_wrong_provider_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    head = tasks.head

    def with_fault(*args: Any, **kwargs: Any) -> Any:
        task = head(*args, **kwargs)
        right = task.providers["xtg"]
        task.providers["xtg"] = Provider(lambda: 1.001 * right.run(), right.inputs)
        return task

    monkeypatch.setattr(tasks, "head", with_fault)
    plan = work.plan_of("cpu", quick=True)
    rows = list(work._time("masked_head", "2 cells", (20, 9), "float32", CPU, plan))
    by_provider = {(row["provider"], row["direction"]): row for row in rows}
    assert by_provider["plain", "forward"]["correct"]
    assert "median_ms" in by_provider["plain", "forward"]
    assert not by_provider["xtg", "forward"]["correct"]
    assert not {"median_ms", "speedup", "tflops"} & by_provider["xtg", "forward"].keys()
    text = report.markdown([{name: str(value) for name, value in row.items()} for row in _full(rows)])
    assert "| masked_head | 2 cells | float32 | forward | xtg | wrong |" in text


def _full(rows: list[Row]) -> Iterator[Row]:
    names = dict.fromkeys(name for row in rows for name in row)
    empty = dict.fromkeys((*names, "provider", "note", "cells_per_second", "peak_mib", "share_of_peak"), "")
    yield from (empty | {"item": "time masked_head, 2 cells"} | row | HERE for row in rows)


CONFIGS = [{"BLOCK": size, "num_warps": 4, "num_stages": 1} for size in (1, 2, 3)]


def _op(result: Callable[[dict[str, int]], Tensor]) -> launches.Op:
    """An op with one kernel, whose result depends on its config."""

    def calls(dtype: Any, size: int, lengths: Any, device: Any) -> dict[str, launches.Call]:
        return {"forward": lambda: [result(triton_launch._forced_configs.get(("fake", "forward"), CONFIGS[0]))]}

    kernel = launches.Kernel("forward", lambda precision, width: CONFIGS)
    return launches.Op(kernels={"forward": kernel}, sizes={16: 16}, usual=16, calls=calls)


def _tuned(monkeypatch: pytest.MonkeyPatch, result: Callable[[dict[str, int]], Tensor]) -> tuple[list[Row], Any]:
    monkeypatch.setitem(launches.OPS, "fake", _op(result))
    milliseconds = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(tune, "milliseconds", lambda *_, **__: [next(milliseconds)])
    tables: dict[str, Any] = {"default": {"forward": {"float32": {"16": CONFIGS[0]}}}}
    plan = tune.Plan((4,), "all", ("float32",), 99, 0.0)
    return list(tune.tune("fake", CPU, plan, tables)), tables["default"]["forward"]["float32"]["16"]


def test_tuning_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, chosen = _tuned(monkeypatch, lambda config: torch.ones(3))
    assert chosen == CONFIGS[1]
    assert [row["chosen"] for row in rows] == [False, True, False]


def test_tuning_takes_no_candidate_with_other_results(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, chosen = _tuned(monkeypatch, lambda config: torch.ones(3) * (1.01 if config["BLOCK"] == 2 else 1))
    assert chosen == CONFIGS[2], "it takes the time that the second would have had"
    assert [row["correct"] for row in rows] == [True, False, True]
    assert "median_ms" not in rows[1]


def test_tuning_leaves_out_what_cannot_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def result(config: dict[str, int]) -> Tensor:
        if config["BLOCK"] == 3:
            raise RuntimeError("out of resources: shared memory")
        return torch.ones(3)

    rows, chosen = _tuned(monkeypatch, result)
    assert chosen == CONFIGS[1]
    assert rows[2]["refused"] == "RuntimeError: out of resources: shared memory"
