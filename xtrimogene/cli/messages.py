"""How the command line speaks: one line on the standard error for an error or a warning."""

from __future__ import annotations

import sys
from typing import TextIO


def show_error(error: BaseException | str) -> None:
    """One line, whatever line breaks the message has."""
    print(f"xtrimogene: error: {' '.join(str(error).split())}", file=sys.stderr)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In place of warnings.showwarning: without the place in the code, which tells a user nothing."""
    print(f"xtrimogene: warning: {message}", file=sys.stderr)
