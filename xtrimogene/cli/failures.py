"""What becomes of an error of a command: one line on the standard error and an exit status, never a traceback there."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator

from xtrimogene.cli.messages import pointer_to_inspect, show_error, show_warning

# What allocators say when there is no memory: PyTorch's of the CPU, C++'s, HDF5's; the last of sizes no memory has.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "memory allocation failed",
    "Storage size calculation overflowed",
)


def status_of(error: BaseException, arguments: argparse.Namespace) -> int:
    """Tells an error in one line; the exit status.

    130 interrupted; 2 wrong input or options, a disk that fails, no memory left; 1 what nobody has thought of: its
    traceback goes into a file, which the line names.
    """
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, KeyboardInterrupt):
        print(f"xtrimogene: interrupted{_kept(arguments)}", file=sys.stderr)
        return 130
    if out_of_memory(error):
        # What libraries have to do when the process ends may want memory too.
        atexit.register(setattr, sys, "unraisablehook", lambda _: None)
        show_error(f"out of memory ({_first_line(error)}){arguments.smaller}{_kept(arguments)}")
        return 2
    if isinstance(error, ValueError | OSError | ImportError):
        show_error(f"{error}{pointer_to_inspect(error, arguments)}")
        return 2
    told = f"unexpected {type(error).__name__}: {_first_line(error)}"
    show_error(f"{told}; please report it with {_traceback_file(error)}{_kept(arguments)}")
    return 1


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted, of the machine or of a GPU."""
    # torch is not imported for the name of its error: where it was raised, it is there.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _OUT_OF_MEMORY)


@contextlib.contextmanager
def one_line_each() -> Iterator[None]:
    """Our warnings are one line, those of libraries off; what fails in a thread or a destructor prints no traceback."""
    hooks = threading.excepthook, sys.unraisablehook
    threading.excepthook = lambda _: None  # what a thread of ours fails with is raised again in the main one
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            yield
    finally:
        threading.excepthook, sys.unraisablehook = hooks


def _kept(arguments: argparse.Namespace) -> str:
    """What an interrupted command can go on with: asked only of commands that can."""
    kept = getattr(arguments, "kept", None)
    with contextlib.suppress(OSError):
        if kept is not None and kept(arguments):
            return "; what is finished is kept, --resume goes on with it"
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _traceback_file(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    for folder in (tempfile.gettempdir, os.getcwd):
        with contextlib.suppress(OSError):
            descriptor, path = tempfile.mkstemp(prefix="xtrimogene-error-", suffix=".txt", dir=folder())
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{' '.join(sys.argv)}\n{text}")
            return f"the traceback in {path}"
    return f"its place, {traceback.extract_tb(error.__traceback__)[-1].filename}"
