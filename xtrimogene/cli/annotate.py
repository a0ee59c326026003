"""xtrimogene annotate: cell types learned from labelled cells, predicted for new ones, judged by held-out ones."""

from __future__ import annotations

import argparse
import dataclasses

from xtrimogene.cli.messages import tell
from xtrimogene.cli.options import (
    Commands,
    add_counts,
    add_parts,
    add_reading_options,
    fields_of,
    kept_in_part,
    reading_options,
    set_threads,
)
from xtrimogene.inference.options import DEFAULT_MAX_TOKENS, FIXED_DTYPES
from xtrimogene.tasks.options import CONFIDENCE_COLUMN, MAJORITY_COLUMN, PROBABILITIES_KEY, TUNES, TYPE_COLUMN


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "annotate",
        help="cell types: fit a model to labelled cells, predict, evaluate",
        description="Fit a model of cell types to labelled cells, predict the types of new ones, judge it by held-out "
        "ones beside models that need no network.",
    )
    add_parts(command, _add_fit, _add_predict, _add_evaluate)


def _add_fit(parts: Commands) -> None:
    fit = parts.add_parser(
        "fit",
        help="fit a model to labelled cells",
        description="Fit linear layers on the encoder of a checkpoint, and as much of the encoder as --tune says, to "
        "labelled cells, and write the model's folder. A part of the cells is kept for validation, which ends the fit "
        "and calibrates its probabilities. A killed fit goes on with --resume.",
    )
    fit.set_defaults(run=_fit, kept=kept_in_part, smaller="; try a smaller --batch-tokens")
    fit.add_argument("--checkpoint", required=True, metavar="DIR", help="folder or name of the pre-trained model")
    fit.add_argument("--data", required=True, nargs="+", metavar="PATH", help="files of labelled cells, or folders")
    fit.add_argument("--label", required=True, metavar="COL", help="column of obs with the types")
    fit.add_argument(
        "--group",
        metavar="COL",
        help="column of obs with what cells come from, such as donors: none is trained on and validated on (default: "
        "cells are drawn one by one)",
    )
    fit.add_argument(
        "--tune",
        choices=TUNES,
        default="all",
        help="published: frozen but for the last block but one; all: everything is trained; head: the encoder is "
        "frozen and run once, fast (default: %(default)s)",
    )
    fit.add_argument("--output", required=True, metavar="MODEL", help="folder to write")
    fit.add_argument("--epochs", type=int, metavar="N", help="most passes over the cells (default: 30; head: 200)")
    fit.add_argument("--patience", type=int, metavar="N", help="passes without a better one (default: 5; head: 20)")
    fit.add_argument("--learning-rate", type=float, metavar="R", help="default: 2e-3; published: 1e-3")
    fit.add_argument(
        "--validation-share",
        type=float,
        default=0.1,
        metavar="S",
        help="share kept for validation (default: %(default)s)",
    )
    add_counts(
        fit,
        ("batch-cells", 32, "most cells of a step"),
        ("batch-tokens", DEFAULT_MAX_TOKENS, "most expressed genes of a step"),
        ("seed", 0, "of the split, the linear layers, the order of the cells and dropout"),
    )
    fit.add_argument(
        "--dtype", default="float32", choices=FIXED_DTYPES, help="arithmetic of the encoder (default: %(default)s)"
    )
    add_reading_options(fit, depth=False)
    fit.add_argument("--resume", action="store_true", help="go on with an interrupted fit, if there is one")


def _add_predict(parts: Commands) -> None:
    predict = parts.add_parser(
        "predict",
        help="predict the types of the cells of a file",
        description=f"Predict the type of every cell and write a copy of the file with obs[{TYPE_COLUMN!r}], "
        f"obs[{CONFIDENCE_COLUMN!r}] and obsm[{PROBABILITIES_KEY!r}]. The input is only read. An interrupted run goes "
        "on with --resume.",
    )
    predict.set_defaults(run=_predict, kept=kept_in_part, smaller="; try a smaller --max-tokens")
    predict.add_argument("--model", required=True, metavar="MODEL", help="folder that fit has written")
    predict.add_argument("--input", required=True, metavar="FILE", help="file, store or folder of cells, as for embed")
    predict.add_argument("--output", required=True, metavar="FILE", help="file to write: .zarr for .zarr, else .h5ad")
    predict.add_argument(
        "--unknown-below",
        type=float,
        default=0.0,
        metavar="P",
        help="cells whose confidence is below P are unknown (default: %(default)s)",
    )
    predict.add_argument(
        "--majority-vote",
        metavar="COL",
        help="column of obs whose groups vote, or auto for small clusters of like cells; the outcome is "
        f"obs[{MAJORITY_COLUMN!r}]",
    )
    add_counts(predict, ("max-tokens", DEFAULT_MAX_TOKENS, "most expressed genes in a batch"))
    predict.add_argument(
        "--dtype", default="float32", choices=FIXED_DTYPES, help="arithmetic of the encoder (default: %(default)s)"
    )
    add_reading_options(predict, depth=False)
    predict.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")


def _add_evaluate(parts: Commands) -> None:
    evaluate = parts.add_parser(
        "evaluate",
        help="judge a model by labelled cells, as a report",
        description="Judge a model by labelled cells that it was not fitted to, beside logistic regressions, "
        "neighbours, a majority vote and the untrained network, fitted to the cells that it was fitted to. Writes "
        "report.html, report.md, report.json and pictures.",
    )
    evaluate.set_defaults(run=_evaluate, smaller="; try a smaller --batch-tokens")
    evaluate.add_argument("--model", required=True, metavar="MODEL", help="folder that fit has written")
    evaluate.add_argument("--input", required=True, nargs="+", metavar="PATH", help="held-out cells: files or folders")
    evaluate.add_argument("--label", required=True, metavar="COL", help="column of obs with the types")
    evaluate.add_argument("--output", required=True, metavar="REPORT", help="folder to write")
    evaluate.add_argument(
        "--reference",
        nargs="+",
        metavar="PATH",
        help="the cells that the model was fitted to (default: where they lay then)",
    )
    evaluate.add_argument(
        "--no-untrained",
        action="store_true",
        help="without the untrained network, whose tuning takes as long as the fit",
    )
    add_counts(evaluate, ("batch-tokens", DEFAULT_MAX_TOKENS, "most expressed genes in a batch"))
    add_reading_options(evaluate, depth=False)


def _fit(arguments: argparse.Namespace) -> None:
    from xtrimogene.tasks.annotation import fit

    set_threads(arguments)
    names = (
        "group", "tune", "epochs", "patience", "learning_rate", "validation_share", "batch_cells", "batch_tokens",
        "dtype", "seed", "resume",
    )  # fmt: skip
    options = {name: getattr(arguments, name) for name in names}
    report = fit(
        arguments.data, arguments.checkpoint, arguments.label, arguments.output, **options, **reading_options(arguments)
    )
    tell(arguments, f"{report}\n{arguments.output}: the model", fields_of(report))


def _predict(arguments: argparse.Namespace) -> None:
    from xtrimogene.tasks.annotation import predict

    set_threads(arguments)
    names = ("output", "unknown_below", "majority_vote", "max_tokens", "dtype", "resume")
    options = {name: getattr(arguments, name) for name in names}
    report = predict(arguments.model, arguments.input, **options, **reading_options(arguments))
    text = (
        f"{report}\n{arguments.output}: obs[{TYPE_COLUMN!r}], obs[{CONFIDENCE_COLUMN!r}], obsm[{PROBABILITIES_KEY!r}]"
    )
    tell(arguments, text, {"output": arguments.output, **fields_of(report)})


def _evaluate(arguments: argparse.Namespace) -> None:
    from xtrimogene.document import text_table
    from xtrimogene.tasks.annotation import evaluate
    from xtrimogene.tasks.annotation_report import methods_table, verdict

    set_threads(arguments)
    evaluation = evaluate(
        arguments.model,
        arguments.input,
        arguments.label,
        output=arguments.output,
        reference=arguments.reference,
        untrained=not arguments.no_untrained,
        batch_tokens=arguments.batch_tokens,
        **reading_options(arguments),
    )
    text = f"{text_table(methods_table(evaluation))}\n{verdict(evaluation)}\n{arguments.output}: report.html, report.md"
    tell(arguments, text, {"output": arguments.output, **dataclasses.asdict(evaluation)})
