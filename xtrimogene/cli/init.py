"""xtrimogene init: a fresh, untrained checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from xtrimogene.cli.messages import tell
from xtrimogene.cli.options import Commands, numbers_of, size_of
from xtrimogene.network.config import PRESETS


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "init",
        help="make a fresh, untrained checkpoint",
        description="Make a checkpoint folder with random weights for the genes of a vocabulary.",
    )
    command.set_defaults(run=_run, smaller="")
    command.add_argument("--preset", required=True, choices=tuple(PRESETS), help="size of the model")
    command.add_argument(
        "--vocabulary", required=True, metavar="FILE", help="one gene a line, or two columns gene_name, index"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (default: %(default)s)")


def _run(arguments: argparse.Namespace) -> None:
    from xtrimogene.model import XTrimoGene
    from xtrimogene.network.vocabulary import Vocabulary

    model = XTrimoGene.from_preset(arguments.preset, Vocabulary.from_tsv(arguments.vocabulary), seed=arguments.seed)
    model.save_pretrained(Path(arguments.output))
    text = f"{arguments.output}: untrained {arguments.preset} model, {size_of(model)}"
    tell(arguments, text, {"output": arguments.output, "preset": arguments.preset, **numbers_of(model)})
