"""The command line: ``xtrimogene embed``, ``genes``, ``impute``, ``convert``, ``pretrain``, ``init`` and ``bench``."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from xtrimogene.config import PRESETS
from xtrimogene.convert import PARTS, from_scfoundation
from xtrimogene.embed import DEFAULT_KEY, DEFAULT_MAX_TOKENS, DTYPES, embed
from xtrimogene.gene_level import DEFAULT_BATCH_SIZE, EMBEDDINGS_KEY, IMPUTED_LAYER, gene_embeddings, predict_expression
from xtrimogene.gene_level import DTYPES as GENE_DTYPES
from xtrimogene.model import POOLINGS, XTrimoGene
from xtrimogene.model_cells import DEFAULT_TARGET_DEPTH
from xtrimogene.vocabulary import Vocabulary


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 after one line on stderr that says what was wrong and what to do.

    ``pretrain`` also returns 1 when training cannot go on, and 128 + the number of the signal that stopped it.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if "changes" in arguments:
        _take_changes(arguments, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        _show_error(error)
        return 2
    except (MemoryError, torch.OutOfMemoryError) as error:
        _show_error(f"out of memory ({error}){arguments.smaller}")
        return 2
    except KeyboardInterrupt:
        print("xtrimogene: interrupted; --resume goes on where it was", file=sys.stderr)
        return 130
    return status or 0


def _show_error(error: Exception | str) -> None:
    print(f"xtrimogene: error: {' '.join(str(error).split())}", file=sys.stderr)


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
        prog="xtrimogene", description="xTrimoGene single-cell models: cells in, embeddings of cells and genes out."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "embed",
        help="embed the cells of an h5ad file or zarr store",
        description="Embed every cell of a file and write a copy of the file with the embedding in obsm. "
        "The input is only read. An interrupted run goes on with --resume.",
    )
    command.set_defaults(run=_embed, smaller="; try a smaller --max-tokens, with --resume")
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of the model")
    command.add_argument("--input", required=True, metavar="FILE", help="cells, .h5ad or .zarr, raw counts in X")
    command.add_argument("--output", required=True, metavar="FILE", help="file to write, of the same kind")
    command.add_argument("--embed-key", default=DEFAULT_KEY, metavar="KEY", help="key in obsm (default: %(default)s)")
    command.add_argument(
        "--pooling",
        default="mean",
        choices=POOLINGS,
        help="default: %(default)s; all (S, T, max, mean): only for models with depth tokens, as scFoundation's",
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
    _add_reading_options(command)
    command.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")

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

    command = commands.add_parser(
        "convert",
        help="make a checkpoint of a released scFoundation file",
        description="Make a checkpoint folder of one part of a released scFoundation file that you have. Their weights "
        "have a licence of their own.",
    )
    command.set_defaults(run=_convert, smaller="")
    command.add_argument("--from-scfoundation", required=True, metavar="FILE", help="the file, such as models.ckpt")
    command.add_argument("--part", required=True, choices=PARTS, help="part of the file")
    command.add_argument(
        "--vocabulary", required=True, metavar="TSV", help="genes of its positions: two columns gene_name, index"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write")

    command = commands.add_parser(
        "pretrain",
        help="train a model on many cells",
        usage="%(prog)s --data PATH [PATH ...] --output DIR [--config FILE] [key=value ...] [--resume]",
        description="Train the masked auto-encoder on the cells of h5ad files, zarr stores and folders of them. The "
        "config is a YAML file with the keys of PretrainConfig; key=value changes single ones (model.dim=64 one of a "
        "section); checkpoint=DIR begins with the weights of a model. SIGTERM and SIGINT save a checkpoint and stop; "
        "an interrupted or killed run goes on with --resume. "
        "With several processes: torchrun --nproc-per-node N -m xtrimogene pretrain ...",
        epilog="Exit status: 0 trained to the end; 1 training had begun and cannot go on; 2 something was wrong before "
        "it began; 143 or 130 stopped by SIGTERM or SIGINT, with a checkpoint of the steps made.",
    )
    command.set_defaults(run=_pretrain, smaller="; try a smaller batch_cells and a larger accumulate", changes=[])
    command.add_argument("--config", metavar="FILE", help="YAML file of PretrainConfig's keys (default: its defaults)")
    command.add_argument("--data", required=True, nargs="+", metavar="PATH", help="cells: .h5ad, .zarr, or folders")
    command.add_argument("--output", required=True, metavar="DIR", help="folder to make: log, checkpoints, model")
    command.add_argument("--resume", action="store_true", help="go on with the run in the folder, if there is one")
    command.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, ... (default: the GPU if any)")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    command.add_argument("--no-progress", action="store_true", help="no progress bar")

    command = commands.add_parser(
        "init",
        help="make a fresh, untrained checkpoint",
        description="Make a checkpoint folder with random weights for the genes of a vocabulary.",
    )
    command.set_defaults(run=_init, smaller="")
    command.add_argument("--preset", required=True, choices=tuple(PRESETS), help="size of the model")
    command.add_argument(
        "--vocabulary", required=True, metavar="FILE", help="one gene a line, or two columns gene_name, index"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (default: %(default)s)")

    command = commands.add_parser(
        "bench",
        help="FLOPs, time and memory against dense and padded Transformers, as a report",
        description="Count and measure what a model costs on this machine, against dense and padded Transformers of "
        "the same size, on the project's cell lengths or on your cells. Writes report.html, report.md, results.csv and "
        "pictures, and prints the short table.",
    )
    command.set_defaults(run=_bench, smaller="; try a smaller --preset, or --quick")
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    command.add_argument("--input", metavar="FILE", help="cells, .h5ad or .zarr (default: lengths of real cells)")
    command.add_argument(
        "--vocabulary", metavar="FILE", help="genes of the model, one a line (default: those of the input)"
    )
    command.add_argument("--layer", metavar="L", help="layer of the input (default: X; raw: .raw)")
    command.add_argument("--gene-symbols", metavar="COL", help="var column with gene names (default: var_names)")
    command.add_argument(
        "--preset", choices=("3m", "10m", "100m", "all"), default="3m", help="size to measure (default: %(default)s)"
    )
    command.add_argument("--device", default="cpu", metavar="D", help="cpu or cuda (default: %(default)s)")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    command.add_argument("--quick", action="store_true", help="small shapes and few runs: does it work, not how fast")
    return parser


def _take_changes(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Move key=value words, which may stand anywhere, from where argparse has put them to arguments.changes.

    argparse has no way to say that positional words may stand between options, and --data takes those that follow it.
    """
    for words in (arguments.data, rest):
        changes = [word for word in words if _CHANGE.match(word) and not Path(word).exists()]
        arguments.changes += changes
        words[:] = [word for word in words if word not in changes]


_CHANGE = re.compile(r"[a-z_][a-z_0-9]*(\.[a-z_0-9]+)?=")


def _add_reading_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, ... (default: the GPU if any)")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    command.add_argument("--layer", metavar="L", help="layer that holds the counts (default: X; raw: .raw)")
    command.add_argument("--gene-symbols", metavar="COL", help="var column with gene names (default: var_names)")
    command.add_argument(
        "--normalized", action="store_true", help="the matrix holds log1p(count / total * 10,000) already"
    )
    command.add_argument(
        "--target-depth",
        default=DEFAULT_TARGET_DEPTH,
        metavar="T",
        help="for models with depth tokens: log10 total to aim at, or fold:N times the cell's own total, or offset:X "
        "added to its log10 (default: %(default)s)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    command.add_argument("--no-progress", action="store_true", help="no progress bar")


def _add_gene_level_options(command: argparse.ArgumentParser, *, genes_required: bool) -> None:
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of the model")
    command.add_argument("--input", required=True, metavar="FILE", help="cells, .h5ad or .zarr, raw counts in X")
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
        "--dtype", default="float32", choices=GENE_DTYPES, help="arithmetic of the model (default: %(default)s)"
    )
    _add_reading_options(command)


def _embed(arguments: argparse.Namespace) -> None:
    _set_threads(arguments)
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
        target_depth=arguments.target_depth,
        gene_symbols=arguments.gene_symbols,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        progress=not arguments.no_progress,
    )
    print(report)
    print(f"{arguments.output}: obsm[{arguments.embed_key!r}]")


def _pretrain(arguments: argparse.Namespace) -> int:
    # Here, because torch's distributed checkpoints and FSDP take longer to import than the other commands to begin.
    from xtrimogene.pretrain import TrainingFailed, pretrain
    from xtrimogene.pretrain_config import PretrainConfig
    from xtrimogene.ranks import FirstRankFailed

    _set_threads(arguments)
    try:
        report = pretrain(
            PretrainConfig.from_yaml(arguments.config, arguments.changes),
            arguments.data,
            arguments.output,
            resume=arguments.resume,
            device=arguments.device,
            progress=not arguments.no_progress,
        )
    except FirstRankFailed:
        return 2
    except TrainingFailed as error:
        _show_error(error)
        return 1
    if report.rank == 0:
        print(report)
        if report.model is None:
            with_what = f"with a checkpoint of step {report.steps:,}" if report.steps else "before the first step"
            print(f"{report.output}: stopped, {with_what}; --resume goes on")
        else:
            print(f"{report.model}: the trained model")
    return 128 + report.signal if report.signal else 0


def _genes(arguments: argparse.Namespace) -> None:
    report, _ = gene_embeddings(arguments.input, arguments.checkpoint, _asked(arguments) or (), **_options(arguments))
    print(report)
    print(f"{arguments.output}: obsm[{EMBEDDINGS_KEY!r}]")


def _impute(arguments: argparse.Namespace) -> None:
    report, _ = predict_expression(arguments.input, arguments.checkpoint, _asked(arguments), **_options(arguments))
    print(report)
    print(f"{arguments.output}: layers[{IMPUTED_LAYER!r}]")


def _asked(arguments: argparse.Namespace) -> Sequence[str] | None:
    if arguments.genes_file is not None:
        try:
            return Vocabulary.from_tsv(arguments.genes_file).genes
        except ValueError as error:
            raise ValueError(f"--genes-file: {error}") from None
    return arguments.genes


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    _set_threads(arguments)
    names = ("output", "layer", "gene_symbols", "normalized", "target_depth", "batch_size", "dtype", "device")
    options = {name: getattr(arguments, name) for name in (*names, "overwrite")}
    return {**options, "progress": not arguments.no_progress}


def _set_threads(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)


def _convert(arguments: argparse.Namespace) -> None:
    vocabulary = Vocabulary.from_tsv(arguments.vocabulary)
    model = from_scfoundation(arguments.from_scfoundation, arguments.part, vocabulary)
    model.save_pretrained(Path(arguments.output))
    print(f"{arguments.output}: scFoundation {arguments.part}, {_size(model)}")


def _init(arguments: argparse.Namespace) -> None:
    model = XTrimoGene.from_preset(arguments.preset, Vocabulary.from_tsv(arguments.vocabulary), seed=arguments.seed)
    model.save_pretrained(Path(arguments.output))
    print(f"{arguments.output}: untrained {arguments.preset} model, {_size(model)}")


def _bench(arguments: argparse.Namespace) -> int:
    # Measuring takes pictures and baselines with it, which no other command needs.
    from xtrimogene.bench.bench import WrongNumbers, bench
    from xtrimogene.bench.report import short_text

    _set_threads(arguments)
    if arguments.input is None:
        for name in ("vocabulary", "layer", "gene_symbols"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: says how to read --input FILE, which is not given")
    vocabulary = None if arguments.vocabulary is None else Vocabulary.from_tsv(arguments.vocabulary)
    names = ("input", "layer", "gene_symbols", "preset", "device", "quick")
    options = {name: getattr(arguments, name) for name in names}
    try:
        report = bench(arguments.output, vocabulary=vocabulary, **options)
    except WrongNumbers as error:
        _show_error(error)
        return 1
    print(f"\n{short_text(report)}\n\n{arguments.output}: report.html, report.md, results.csv, pictures")
    return 0


def _size(model: XTrimoGene) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(model.vocabulary):,} genes"
