"""The command line: ``xtrimogene COMMAND ...``, a file a command."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from xtrimogene.cli import bench, convert, embed, genes, init, inspect, pretrain
from xtrimogene.cli.messages import pointer_to_inspect, show_error, show_warning


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 after one line on stderr that says what was wrong and what to do.

    ``pretrain`` also returns 1 when training cannot go on, and 128 + the number of the signal that stopped it.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if "changes" in arguments:
        pretrain.take_changes(arguments, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            status = arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        show_error(f"{error}{pointer_to_inspect(error, arguments)}")
        return 2
    except KeyboardInterrupt:
        print("xtrimogene: interrupted; --resume goes on where it was", file=sys.stderr)
        return 130
    except BaseException as error:
        # torch is not imported for the name of its error: where it was raised, it is there.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        show_error(f"out of memory ({error}){arguments.smaller}")
        return 2
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xtrimogene", description="xTrimoGene single-cell models: cells in, embeddings of cells and genes out."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (embed, genes, inspect, convert, pretrain, init, bench):
        command.add_to(commands)
    return parser
