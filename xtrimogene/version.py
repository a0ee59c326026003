"""The version of the package, with the commit that it is of where that is known."""

from __future__ import annotations

import functools
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def version() -> str:
    """The version as packages spell it, with the commit: ``0.1.0+g273e0fa``, ``.dirty`` where files differ from it.

    The number is that of ``pyproject.toml`` in a checkout, of the installed package elsewhere.
    """
    if _is_checkout():
        number = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    else:
        try:
            number = metadata.version("xtrimogene")
        except metadata.PackageNotFoundError:
            number = "0"
    found = commit()
    return f"{number}+{found}" if found else number


def commit() -> str:
    """``g`` and the commit's short name, from git in a checkout, elsewhere as the build wrote it; "" if unknown."""
    if _is_checkout():
        git = ["git", "--no-optional-locks", "-C", str(_ROOT)]
        command = [*git, "describe", "--always", "--dirty=.dirty", "--exclude=*"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""
        return f"g{told}" if told else ""
    written = Path(__file__).with_name("commit.txt")
    return written.read_text(encoding="utf-8").strip() if written.is_file() else ""


def _is_checkout() -> bool:
    # A package installed somewhere inside another project's checkout is not of that one's commit.
    return (_ROOT / ".git").exists() and (_ROOT / "pyproject.toml").is_file()


def __getattr__(name: str) -> Any:
    # Asked of git when it is asked for, not whenever the package is imported.
    if name == "__version__":
        return version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
