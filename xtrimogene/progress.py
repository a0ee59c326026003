"""The progress bar of everything that takes its time: a bar in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress_bar(total: int, *, unit: str, desc: str, initial: int = 0, disable: bool = False) -> tqdm:
    """A tqdm bar on the standard error.

    In a log, where nothing can be written over, it is one line at the start, at most one every ten seconds, and one at
    the end.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, desc=desc, initial=initial, disable=disable)
    return tqdm(
        total=total,
        unit=unit,
        desc=desc,
        initial=initial,
        disable=disable,
        file=_Lines(sys.stderr),
        mininterval=_SECONDS_BETWEEN_LINES,
        maxinterval=_SECONDS_BETWEEN_LINES,
        bar_format=_LINE,
    )


class _Lines:
    """What tqdm writes over and over, as lines of their own: a file that it can write to."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        self._file.flush()
