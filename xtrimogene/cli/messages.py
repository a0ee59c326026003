"""How the command line speaks: what was done on the standard output and as JSON, errors and warnings in one line."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

_COMMAND = "xtrimogene"


def check_json(arguments: argparse.Namespace) -> None:
    """Refuses, before any work, a --json REPORT that could not be written at the end or is something else's file."""
    if arguments.json is None:
        return
    path = Path(arguments.json)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--json {path}: expected an existing folder, got {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"--json {path}: the folder {path.parent} cannot be written to; choose another one")
    if path.exists() and not _is_report(path):
        raise FileExistsError(f"--json {path}: exists and is no report of an earlier run; name another file")


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _COMMAND in json.loads(file.read(1 << 24))
    except (OSError, ValueError, TypeError):
        return False


def tell(arguments: argparse.Namespace, text: str, report: Mapping[str, Any]) -> None:
    """What a command did: a text for people, and the numbers for --json REPORT, written whole or not at all.

    Numbers that are not finite are null in JSON; paths are text.
    """
    print(text)
    if arguments.json is None:
        return
    from xtrimogene.version import version

    path = Path(arguments.json)
    told = {_COMMAND: version(), "command": arguments.command, **report}
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        written.write_text(json.dumps(_plain(told), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """A value as JSON knows it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)


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
