"""Tests of xtrimogene.training.log: lines, what is cut when a run goes on, and TensorBoard beside them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from xtrimogene.training.log import TrainingLog, read_log


def test_lines_are_whole_and_in_order(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, tensorboard=False) as log:
        log.write("train", 1, loss=0.5, cells=3)
        assert list(read_log(tmp_path / "log.jsonl")) == [{"event": "train", "step": 1, "loss": 0.5, "cells": 3}]
        log.write("validation", 1, loss=float("nan"))
        assert log.has("validation", 1)
        assert not log.has("validation", 2)
    assert [entry["event"] for entry in read_log(tmp_path / "log.jsonl")] == ["train", "validation"]


def test_lines_are_on_disk_after_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync
    flushed: list[tuple[int, int]] = []

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    with TrainingLog(tmp_path, tensorboard=False) as log:
        log.write("train", 1, loss=0.5)
        monkeypatch.setattr(os, "fsync", flush)
        log.sync()
    written = log.path.stat()
    assert flushed == [(written.st_ino, written.st_size)]
    assert written.st_size > 0


def test_going_on_cuts_what_came_later(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 6):
            log.write("train", step, loss=1.0)
        log.write("validation", 5, loss=2.0)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "train", "st')  # a killed run stops anywhere
    with TrainingLog(tmp_path, after_step=3, tensorboard=False) as log:
        assert not log.has("validation", 5)
        log.write("train", 4, loss=3.0)
    assert [(entry["step"], entry["loss"]) for entry in read_log(tmp_path / "log.jsonl")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 3.0),
    ]
    with TrainingLog(tmp_path, tensorboard=False):
        pass
    assert list(read_log(tmp_path / "log.jsonl")) == []


@pytest.mark.parametrize(
    ("old", "new"), [('"loss": 0.5', '"loss": 0.6'), ('"event"', '"evenu"'), ("{", "x{"), ('{"event', '[{"event')]
)
def test_damaged_lines_are_left_out_with_a_warning(old: str, new: str, tmp_path: Path) -> None:
    with TrainingLog(tmp_path, tensorboard=False) as log:
        for step, loss in ((1, 1.5), (2, 0.5), (3, 1.5)):
            log.write("train", step, loss=loss)
    path = tmp_path / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace(old, new, 1) + lines[2])
    assert path.read_text() != "".join(lines)
    with pytest.warns(UserWarning, match=r"log\.jsonl: line 2 is damaged and left out"):
        assert [entry["step"] for entry in read_log(path)] == [1, 3]


def test_lines_of_earlier_versions_have_no_checksum(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event": "train", "step": 1}\n\0\0\0\n{"event": "train", "step": 2}\n')
    with pytest.warns(UserWarning, match="line 2 is damaged"):
        assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == [1, 2]
    assert list(read_log(tmp_path / "none.jsonl")) == []


def test_tensorboard_has_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # A run that was killed before its first checkpoint begins again.
    for loss in (9.0, 1.0):
        with TrainingLog(tmp_path) as log:
            for step in range(1, 5):
                log.write("train", step, loss=loss, cells=7)
    with TrainingLog(tmp_path, after_step=2) as log:
        log.write("train", 3, loss=2.0)
        log.sync()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_without_tensorboard_the_lines_stay_and_a_hint_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (
        pytest.warns(UserWarning, match=r"pip install 'xtrimogene\[train\]' adds it"),
        TrainingLog(tmp_path) as log,
    ):
        log.write("train", 1, loss=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
