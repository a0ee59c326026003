"""The command line: ``xtrimogene COMMAND ...``, a file a command."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from xtrimogene.cli import annotate, bench, convert, embed, evaluate, genes, init, inspect, perturb, pretrain, synergy
from xtrimogene.cli.failures import one_line_each, status_of
from xtrimogene.cli.messages import check_json
from xtrimogene.cli.options import add_telling_options


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
        with one_line_each(), _quiet(arguments):
            check_json(arguments)
            status = arguments.run(arguments)
    except BaseException as error:  # libraries raise some that are no Exception
        return status_of(error, arguments)
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xtrimogene", description="xTrimoGene single-cell models: cells in, embeddings of cells and genes out."
    )
    parser.add_argument(
        "--version",
        action=_ShowVersion,
        default=argparse.SUPPRESS,
        help="show the version, with the commit where it is known, and exit",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in (embed, genes, inspect, convert, pretrain, evaluate, annotate, perturb, synergy, init, bench):
        command.add_to(commands)
    for each in commands.choices.values():
        if each.get_default("run") is None:  # its parts have them
            continue
        add_telling_options(each)
    return parser


class _ShowVersion(argparse.Action):
    """argparse's own would have the version, and so git asked, for every command."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from xtrimogene.version import version

        print(f"xtrimogene {version()}")
        parser.exit()


@contextlib.contextmanager
def _quiet(arguments: argparse.Namespace) -> Iterator[None]:
    """--quiet: the standard output leads nowhere, and there is no bar; warnings and errors are still seen."""
    if not arguments.quiet:
        yield
        return
    arguments.no_progress = True
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
