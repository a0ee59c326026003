"""Progress bars: one that is written over in a terminal, few lines in a log."""

from __future__ import annotations

import io
import time

import pytest

from xtrimogene import progress
from xtrimogene.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_at_the_start_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with progress_bar(700, unit="cell", desc="embed") as bar:
        for _ in range(175):
            bar.update(4)
    first, last = log.getvalue().splitlines()
    assert first.startswith("embed: 0 of 700 cells")
    assert last.startswith("embed: 700 of 700 cells")
    assert "\r" not in log.getvalue()
    assert log.getvalue().endswith("]\n")


def test_a_log_gets_lines_in_between_as_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress._SECONDS_BETWEEN_LINES == 10
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.2)
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with progress_bar(50, unit="step", desc="pretrain", initial=10) as bar:
        for step in range(40):
            time.sleep(0.02)
            bar.set_postfix(loss=f"{step}", refresh=False)
            bar.update()
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("pretrain: 10 of 50 steps")
    assert "loss=39" in lines[-1]
    assert 3 <= len(lines) <= 2 + 40 / (0.2 / 0.02) + 1


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar(2, unit="cell", desc="embed") as bar:
        bar.update(2)
    assert terminal.getvalue().startswith("\rembed:   0%|")


def test_no_bar_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with progress_bar(2, unit="cell", desc="embed", disable=True) as bar:
        bar.update(2)
    assert log.getvalue() == ""
