"""xtrimogene convert: a checkpoint of a released scFoundation file."""

from __future__ import annotations

import argparse
from pathlib import Path

from xtrimogene.cli.messages import tell
from xtrimogene.cli.options import Commands, numbers_of, size_of
from xtrimogene.interop import PARTS


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "convert",
        help="make a checkpoint of a released scFoundation file",
        description="Make a checkpoint folder of one part of a released scFoundation file that you have. Their weights "
        "have a licence of their own.",
    )
    command.set_defaults(run=_run, smaller="")
    command.add_argument("--from-scfoundation", required=True, metavar="FILE", help="the file, such as models.ckpt")
    command.add_argument("--part", required=True, choices=PARTS, help="part of the file")
    command.add_argument(
        "--vocabulary", required=True, metavar="TSV", help="genes of its positions: two columns gene_name, index"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write")


def _run(arguments: argparse.Namespace) -> None:
    from xtrimogene.interop.scfoundation import from_scfoundation
    from xtrimogene.network.vocabulary import Vocabulary

    vocabulary = Vocabulary.from_tsv(arguments.vocabulary)
    model = from_scfoundation(arguments.from_scfoundation, arguments.part, vocabulary)
    model.save_pretrained(Path(arguments.output))
    text = f"{arguments.output}: scFoundation {arguments.part}, {size_of(model)}"
    tell(arguments, text, {"output": arguments.output, "part": arguments.part, **numbers_of(model)})
