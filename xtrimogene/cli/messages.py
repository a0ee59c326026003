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
    """In place of warnings.showwarning: without the place in the code, which tells a user nothing.

    Only what this project says itself, wherever its stacklevel points: a user can do nothing about the others.
    """
    caller = sys._getframe(1)
    while caller.f_back is not None and caller.f_globals.get("__name__") == "warnings":
        caller = caller.f_back
    ours = str(caller.f_globals.get("__name__")).partition(".")[0] in ("xtrimogene", "xtg_kernels")
    # PyTorch's C++ warns in the name of whoever calls it.
    if ours and "warn" in caller.f_code.co_names:
        print(f"xtrimogene: warning: {' '.join(str(message).split())}", file=sys.stderr)
