"""Options and words that several commands share. What is slow to import, torch above all, is imported late."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from xtrimogene.cells.kinds import VALUES
from xtrimogene.inference.options import DEFAULT_TARGET_DEPTH, partial_folder

if TYPE_CHECKING:
    from xtrimogene.network.model import XTrimoGeneNetwork

    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = object

# Where threads cannot be made, OpenMP ends the process.
_MOST_THREADS = 1024


def add_reading_options(command: argparse.ArgumentParser, *, depth: bool = True) -> None:
    """Options of every command that reads cells and runs a model, and of those that give it depth tokens."""
    command.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, ... (default: the GPU if any)")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    command.add_argument("--layer", metavar="L", help="layer that holds the counts (default: X; raw: .raw)")
    command.add_argument("--gene-symbols", metavar="COL", help="var column with gene names (default: var_names)")
    command.add_argument(
        "--aliases",
        metavar="FILE",
        help="table of old and new gene names, for names that the model lacks: old<tab>new, or HGNC's complete set",
    )
    command.add_argument(
        "--normalized",
        action="store_true",
        help="the matrix holds log1p(count / total * 10,000) already: the same as --values log1p",
    )
    command.add_argument(
        "--values",
        choices=VALUES,
        help="what the matrix holds; tpm: TPM or other numbers proportional to counts, not logged (default: counts)",
    )
    command.add_argument(
        "--fractional-counts",
        action="store_true",
        help="counts need not be whole: estimated ones, or corrected for ambient RNA",
    )
    command.add_argument(
        "--total-counts",
        metavar="COL",
        help="obs column with the total of each whole cell, for a matrix cut to some genes (default: the sum over the "
        "genes of the model)",
    )
    if depth:
        command.add_argument(
            "--target-depth",
            metavar="T",
            help="for models with depth tokens: log10 total to aim at, above 0, or fold:N times the cell's own total, "
            f"or offset:X added to its log10 (default: {DEFAULT_TARGET_DEPTH}; with --values tpm: fold:1)",
        )
    command.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    command.add_argument("--no-progress", action="store_true", help="no progress bar")


def reading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What add_reading_options has read, as the keyword arguments of embed, of the gene level and of the tasks."""
    names = (
        "layer", "gene_symbols", "aliases", "normalized", "values", "fractional_counts", "total_counts", "target_depth",
        "device", "overwrite",
    )  # fmt: skip
    given = {name: getattr(arguments, name) for name in names if name in arguments}
    return {**given, "progress": not arguments.no_progress}


def add_counts(command: argparse.ArgumentParser, *counts: tuple[str, int, str]) -> None:
    """Options that are whole numbers: the name, the default and what is counted."""
    for name, default, told in counts:
        command.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{told} (default: %(default)s)")


def kept_in_part(arguments: argparse.Namespace) -> bool:
    """Whether there is something beside --output that --resume goes on with: finished cells, or a state of a fit."""
    folder = partial_folder(Path(os.path.realpath(arguments.output)))
    return any(folder.glob("shard-*.npy")) or any(folder.glob("*.safetensors"))


def set_threads(arguments: argparse.Namespace) -> None:
    """--threads, where it is given."""
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {arguments.threads}")
        if arguments.threads > _MOST_THREADS:
            raise ValueError(f"--threads: expected at most {_MOST_THREADS:,}, got {arguments.threads}")
        import torch

        torch.set_num_threads(arguments.threads)


def add_telling_options(command: argparse.ArgumentParser) -> None:
    """Options of every command: how much it says, and to whom."""
    command.add_argument("--quiet", action="store_true", help="no report and no progress bar, only warnings and errors")
    command.add_argument("--json", metavar="REPORT", help="also write the numbers of the report to this file, as JSON")


def add_parts(command: argparse.ArgumentParser, *adders: Callable[[Commands], None]) -> None:
    """The parts of a command, such as fit and predict: each adder adds one, with the options of every command."""
    parts = command.add_subparsers(required=True, metavar="PART", dest="part")
    for add in adders:
        add(parts)
    for part in parts.choices.values():
        add_telling_options(part)


def fields_of(report: Any) -> dict[str, Any]:
    """The fields of a report that its repr shows: all but the arrays."""
    return {field.name: getattr(report, field.name) for field in dataclasses.fields(report) if field.repr}


def numbers_of(model: XTrimoGeneNetwork) -> dict[str, int]:
    """A model's parameters and genes, for a report."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "genes": len(model.vocabulary),
    }


def size_of(model: XTrimoGeneNetwork) -> str:
    """A model's parameters and genes, in words."""
    return ", ".join(f"{number:,} {name}" for name, number in numbers_of(model).items())
