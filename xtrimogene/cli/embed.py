"""xtrimogene embed: the cells of a file, embedded."""

from __future__ import annotations

import argparse

from xtrimogene.cli.messages import tell
from xtrimogene.cli.options import Commands, add_reading_options, fields_of, kept_in_part, reading_options, set_threads
from xtrimogene.inference.options import DEFAULT_KEY, DEFAULT_MAX_TOKENS, DTYPES
from xtrimogene.network.config import POOLINGS


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "embed",
        help="embed the cells of a file",
        description="Embed every cell of a file and write a copy of the file with the embedding in obsm (of a format "
        "that is not AnnData's: an h5ad file with the cells and the embedding). The input is only read. An interrupted "
        "run goes on with --resume.",
        epilog="Exit status: 0 all cells are embedded; 2 wrong input or options, a disk that fails, or no memory left; "
        "130 interrupted; 1 an error that nobody has thought of, whose traceback is in the file that is named.",
    )
    command.set_defaults(run=_run, kept=kept_in_part, smaller="; try a smaller --max-tokens")
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of the model")
    command.add_argument(
        "--input", required=True, metavar="FILE", help="file, store or folder of cells, raw counts in X"
    )
    command.add_argument("--output", required=True, metavar="FILE", help="file to write: .zarr for .zarr, else .h5ad")
    command.add_argument("--embed-key", default=DEFAULT_KEY, metavar="KEY", help="key in obsm (default: %(default)s)")
    command.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="default: product (the vector of the product head) for models that have it, else mean; all (S, T, max, "
        "mean): only for models with depth tokens, as scFoundation's",
    )
    command.add_argument(
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="most expressed genes in a batch; at least those of the longest cell (default: %(default)s)",
    )
    command.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="arithmetic of the encoder; auto: bfloat16 where the machine has it and a sample of cells comes out "
        "alike, else float32 (default: %(default)s)",
    )
    add_reading_options(command)
    command.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")


def _run(arguments: argparse.Namespace) -> None:
    from xtrimogene.inference.embed import embed

    set_threads(arguments)
    report = embed(
        arguments.input,
        arguments.checkpoint,
        output=arguments.output,
        pooling=arguments.pooling,
        max_tokens=arguments.max_tokens,
        key_added=arguments.embed_key,
        dtype=arguments.dtype,
        resume=arguments.resume,
        **reading_options(arguments),
    )
    text = f"{report}\n{arguments.output}: obsm[{arguments.embed_key!r}]"
    tell(arguments, text, {"output": arguments.output, **fields_of(report)})
