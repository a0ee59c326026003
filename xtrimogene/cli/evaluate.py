"""xtrimogene evaluate: what a model knows of held-out cells, beside guesses that need no network."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from xtrimogene.cli.messages import tell
from xtrimogene.cli.options import Commands, set_threads

_READING = ("layer", "gene_symbols", "normalized", "min_genes", "max_cells")


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "evaluate",
        help="judge a model by held-out cells, as a report",
        description="Predict hidden genes of held-out cells and read their labels off their embeddings, beside guesses "
        "and spaces that need no training: gene mean, depth, PCA, nearest neighbours, ridge; PCA, a random projection "
        "and the untrained network. Writes report.json, report.md and pictures.",
    )
    command.set_defaults(run=_run, smaller="; try a smaller --max-cells")
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of the model")
    command.add_argument(
        "--data", required=True, nargs="+", metavar="PATH", help="held-out cells: .h5ad, .zarr, or folders"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    command.add_argument("--label", metavar="COL", help="column of obs that embeddings are judged by (default: none)")
    command.add_argument(
        "--batch",
        metavar="COL",
        help="column of obs with the batch of a held-out cell: also judge how little batches of one label are told "
        "apart (default: none)",
    )
    command.add_argument(
        "--scib",
        action="store_true",
        help="also judge each space by scib-metrics, with --label and --batch (pip install 'xtrimogene[scib]')",
    )
    command.add_argument(
        "--train-data",
        nargs="+",
        metavar="PATH",
        help="cells that bars, PCA and readers of labels are fitted to (default: four fifths of the held-out cells, "
        "and the other fifth is judged)",
    )
    command.add_argument("--layer", metavar="L", help="layer that holds the counts (default: X; raw: .raw)")
    command.add_argument("--gene-symbols", metavar="COL", help="var column with gene names (default: var_names)")
    command.add_argument(
        "--normalized", action="store_true", help="the matrix holds log1p(count / total * 10,000) already"
    )
    command.add_argument(
        "--min-genes",
        type=int,
        default=200,
        metavar="N",
        help="cells with at most so many expressed genes are left out (default: %(default)s)",
    )
    command.add_argument(
        "--max-cells",
        type=int,
        default=20_000,
        metavar="N",
        help="most cells of each kind; of more, evenly spaced ones are taken (default: %(default)s)",
    )
    command.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, ... (default: the GPU if any)")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation in the folder")
    command.add_argument("--no-progress", action="store_true", help="no progress bar")


def _run(arguments: argparse.Namespace) -> None:
    from xtrimogene.evaluation.evaluate import evaluate
    from xtrimogene.evaluation.report import check_output, text, write

    set_threads(arguments)
    output = Path(arguments.output)
    check_output(output, arguments.overwrite)
    names = (
        "label",
        "batch",
        "scib",
        "train_data",
        "layer",
        "gene_symbols",
        "normalized",
        "min_genes",
        "max_cells",
        "device",
    )
    options = {name: getattr(arguments, name) for name in names}
    evaluation = evaluate(arguments.checkpoint, arguments.data, **options, progress=not arguments.no_progress)
    write(evaluation, output)
    told = {"output": arguments.output, **dataclasses.asdict(evaluation)}
    tell(arguments, f"{text(evaluation)}\n{arguments.output}: report.json, report.md, pictures", told)
