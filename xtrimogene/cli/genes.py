"""xtrimogene genes and xtrimogene impute: embeddings and predicted expression of genes in the cells of a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from xtrimogene.cli.messages import tell
from xtrimogene.cli.options import Commands, add_reading_options, fields_of, reading_options, set_threads
from xtrimogene.inference.options import DEFAULT_BATCH_SIZE, EMBEDDINGS_KEY, FIXED_DTYPES, IMPUTED_LAYER


def add_to(commands: Commands) -> None:
    """Adds the two commands to the parser."""
    command = commands.add_parser(
        "genes",
        help="embed genes in every cell",
        description="Write an h5ad file with the cells as obs, the asked genes as var and their embeddings in every "
        f"cell in obsm[{EMBEDDINGS_KEY!r}], of shape (cells, genes, width).",
    )
    command.set_defaults(run=_genes, smaller="; try a smaller --batch-size")
    _add_gene_level_options(command, genes_required=True)

    command = commands.add_parser(
        "impute",
        help="predict the expression of genes in every cell",
        description="Write an h5ad file with the cells as obs, genes as var, the log-normalised expression that the "
        f"model read in X (sparse) and what it predicts in layers[{IMPUTED_LAYER!r}] (dense).",
    )
    command.set_defaults(run=_impute, smaller="; try a smaller --batch-size")
    _add_gene_level_options(command, genes_required=False)


def _add_gene_level_options(command: argparse.ArgumentParser, *, genes_required: bool) -> None:
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of the model")
    command.add_argument(
        "--input", required=True, metavar="FILE", help="file, store or folder of cells, raw counts in X"
    )
    command.add_argument("--output", required=True, metavar="FILE", help="h5ad file to write")
    genes = command.add_mutually_exclusive_group(required=genes_required)
    default = "" if genes_required else " (default: all)"
    genes.add_argument("--genes", nargs="+", metavar="NAME", help=f"genes of the vocabulary{default}")
    genes.add_argument("--genes-file", metavar="FILE", help="their names, one a line")
    command.add_argument(
        "--batch-size",
        type=int,
        default=DEFAULT_BATCH_SIZE,
        metavar="N",
        help="cells decoded together (default: %(default)s)",
    )
    command.add_argument(
        "--dtype", default="float32", choices=FIXED_DTYPES, help="arithmetic of the model (default: %(default)s)"
    )
    add_reading_options(command)


def _genes(arguments: argparse.Namespace) -> None:
    from xtrimogene.inference.gene_level import gene_embeddings

    report, _ = gene_embeddings(arguments.input, arguments.checkpoint, _asked(arguments) or (), **_options(arguments))
    text = f"{report}\n{arguments.output}: obsm[{EMBEDDINGS_KEY!r}]"
    tell(arguments, text, {"output": arguments.output, **fields_of(report)})


def _impute(arguments: argparse.Namespace) -> None:
    from xtrimogene.inference.gene_level import predict_expression

    report, _ = predict_expression(arguments.input, arguments.checkpoint, _asked(arguments), **_options(arguments))
    text = f"{report}\n{arguments.output}: layers[{IMPUTED_LAYER!r}]"
    tell(arguments, text, {"output": arguments.output, **fields_of(report)})


def _asked(arguments: argparse.Namespace) -> Sequence[str] | None:
    if arguments.genes_file is not None:
        from xtrimogene.network.vocabulary import Vocabulary

        try:
            return Vocabulary.from_tsv(arguments.genes_file).genes
        except ValueError as error:
            raise ValueError(f"--genes-file: {error}") from None
    return arguments.genes


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    set_threads(arguments)
    own = {name: getattr(arguments, name) for name in ("output", "batch_size", "dtype")}
    return {**own, **reading_options(arguments)}
