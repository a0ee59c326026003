"""xtrimogene bench: what a model costs on this machine, as a report."""

from __future__ import annotations

import argparse

from xtrimogene.cli.messages import show_error, tell
from xtrimogene.cli.options import Commands, set_threads


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "bench",
        help="FLOPs, time and memory against dense and padded Transformers, as a report",
        description="Count and measure what a model costs on this machine, against dense and padded Transformers of "
        "the same size, on the project's cell lengths or on your cells. Writes report.html, report.md, results.csv and "
        "pictures, and prints the short table.",
    )
    command.set_defaults(run=_run, smaller="; try a smaller --preset, or --quick")
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


def _run(arguments: argparse.Namespace) -> int:
    from xtrimogene.bench.bench import WrongNumbers, bench
    from xtrimogene.bench.report import short_text
    from xtrimogene.network.vocabulary import Vocabulary

    set_threads(arguments)
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
        show_error(error)
        return 1
    text = f"\n{short_text(report)}\n\n{arguments.output}: report.html, report.md, results.csv, pictures"
    tell(arguments, text, {"output": arguments.output, "machine": report.where, "rows": report.rows})
    return 0
