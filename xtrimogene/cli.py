"""The command line: ``xtrimogene embed`` and ``xtrimogene init``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from xtrimogene.config import PRESETS
from xtrimogene.embed import DEFAULT_KEY, DEFAULT_MAX_TOKENS, DTYPES, embed
from xtrimogene.model import POOLINGS, XTrimoGene
from xtrimogene.vocabulary import Vocabulary


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 after one line on stderr that says what was wrong and what to do."""
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"xtrimogene: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"xtrimogene: error: out of memory ({error}); try a smaller --max-tokens, with --resume", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("xtrimogene: interrupted; `embed` goes on where it was with --resume", file=sys.stderr)
        return 130
    return 0


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"xtrimogene: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xtrimogene", description="xTrimoGene single-cell encoders: cells in, cell embeddings out."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "embed",
        help="embed the cells of an h5ad file or zarr store",
        description="Embed every cell of a file and write a copy of the file with the embedding in obsm. "
        "The input is only read. An interrupted run goes on with --resume.",
    )
    command.set_defaults(run=_embed)
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of the model")
    command.add_argument("--input", required=True, metavar="FILE", help="cells, .h5ad or .zarr, raw counts in X")
    command.add_argument("--output", required=True, metavar="FILE", help="file to write, of the same kind")
    command.add_argument("--embed-key", default=DEFAULT_KEY, metavar="KEY", help="key in obsm (default: %(default)s)")
    command.add_argument("--pooling", default="mean", choices=POOLINGS, help="default: %(default)s")
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
    command.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, ... (default: the GPU if any)")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    command.add_argument("--layer", metavar="L", help="layer that holds the counts (default: X; raw: .raw)")
    command.add_argument("--gene-symbols", metavar="COL", help="var column with gene names (default: var_names)")
    command.add_argument(
        "--normalized", action="store_true", help="the matrix holds log1p(count / total * 10,000) already"
    )
    command.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")
    command.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    command.add_argument("--no-progress", action="store_true", help="no progress bar")

    command = commands.add_parser(
        "init",
        help="make a fresh, untrained checkpoint",
        description="Make a checkpoint folder with random weights for the genes of a vocabulary.",
    )
    command.set_defaults(run=_init)
    command.add_argument("--preset", required=True, choices=tuple(PRESETS), help="size of the model")
    command.add_argument(
        "--vocabulary", required=True, metavar="FILE", help="one gene a line, or two columns gene_name, index"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (default: %(default)s)")
    return parser


def _embed(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    report = embed(
        arguments.input,
        arguments.checkpoint,
        output=arguments.output,
        layer=arguments.layer,
        pooling=arguments.pooling,
        max_tokens=arguments.max_tokens,
        key_added=arguments.embed_key,
        dtype=arguments.dtype,
        device=arguments.device,
        normalized=arguments.normalized,
        gene_symbols=arguments.gene_symbols,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        progress=not arguments.no_progress,
    )
    print(report)
    print(f"{arguments.output}: obsm[{arguments.embed_key!r}]")


def _init(arguments: argparse.Namespace) -> None:
    model = XTrimoGene.from_preset(arguments.preset, Vocabulary.from_tsv(arguments.vocabulary), seed=arguments.seed)
    model.save_pretrained(Path(arguments.output))
    size = f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(model.vocabulary):,} genes"
    print(f"{arguments.output}: untrained {arguments.preset} encoder, {size}")
