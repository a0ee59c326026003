"""xtrimogene inspect: what a file of cells holds."""

from __future__ import annotations

import argparse

from xtrimogene.cli.messages import tell
from xtrimogene.cli.options import Commands


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "inspect",
        help="tell what a file holds: matrices, counts or not, genes, and what a model would take",
        description="Print what a file of cells holds: its matrices and whether their numbers are counts, "
        "log-normalised or scaled, totals and lengths of the cells, the genes that each column of var names, and the "
        "time and memory that embedding would take. Nothing is written.",
    )
    command.set_defaults(run=_run, smaller="")
    command.add_argument("input", metavar="FILE", help="any file, folder or store of cells")
    known = command.add_mutually_exclusive_group()
    known.add_argument("--checkpoint", metavar="DIR", help="folder of a model, whose genes are looked for")
    known.add_argument("--vocabulary", metavar="FILE", help="genes to look for, one a line")


def _run(arguments: argparse.Namespace) -> None:
    from xtrimogene.inference.inspection import inspect_cells
    from xtrimogene.network.vocabulary import Vocabulary

    model = arguments.checkpoint
    if arguments.vocabulary is not None:
        model = Vocabulary.from_tsv(arguments.vocabulary)
    report = inspect_cells(arguments.input, model)
    tell(arguments, str(report), report.to_dict())
