"""The command line: ``xtrimogene COMMAND ...``, a file a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from xtrimogene.cli import bench, convert, embed, genes, init, pretrain
from xtrimogene.cli.failures import one_line_each, status_of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 after one line on stderr that says what was wrong and what to do.

    130 after Ctrl-C, 1 for an error that nobody has thought of: the line names the file with its traceback.
    ``pretrain`` also returns 1 when training cannot go on, and 128 + the number of the signal that stopped it.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if "changes" in arguments:
        pretrain.take_changes(arguments, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with one_line_each():
            status = arguments.run(arguments)
    except BaseException as error:  # libraries raise some that are no Exception
        return status_of(error, arguments)
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xtrimogene", description="xTrimoGene single-cell models: cells in, embeddings of cells and genes out."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (embed, genes, convert, pretrain, init, bench):
        command.add_to(commands)
    return parser
