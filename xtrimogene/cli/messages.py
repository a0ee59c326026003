"""How the command line speaks: one line on the standard error for an error or a warning."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TextIO


def show_error(error: BaseException | str) -> None:
    """One line, whatever line breaks the message has."""
    print(f"xtrimogene: error: {' '.join(str(error).split())}", file=sys.stderr)


def pointer_to_inspect(error: BaseException, arguments: argparse.Namespace) -> str:
    """Where to look next when the cells of an input were refused, else "": such a message begins with the path."""
    if not isinstance(error, ValueError) or arguments.run.__module__.endswith(".inspect"):
        return ""
    given = [getattr(arguments, "input", None), *(getattr(arguments, "data", None) or [])]
    for path in given:
        if path is None:
            continue
        told = str(error)
        refused = str(Path(path))
        if told.startswith(f"{refused}/"):  # one of a folder
            refused = told.partition(": ")[0]
        if told.startswith(f"{refused}: "):
            return f"; xtrimogene inspect {shlex.quote(refused)} tells what it holds"
    return ""


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
