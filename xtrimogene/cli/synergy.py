"""xtrimogene synergy: how drug pairs act together, learned from measured pairs, predicted, and judged in folds."""

from __future__ import annotations

import argparse
from typing import Any

from xtrimogene.cells.kinds import VALUES
from xtrimogene.cli.messages import tell
from xtrimogene.cli.options import Commands, add_counts, add_parts, fields_of, kept_in_part, set_threads
from xtrimogene.inference.options import DEFAULT_TARGET_DEPTH

_LEARNED = ("columns", "target", "synergy_above", "antagonism_below", "fold_column", "folds")


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "synergy",
        help="drug pairs: fit a model to measured pairs, predict, evaluate",
        description="Fit a model to measured drug pairs, predict the score of others and whether it is one of synergy, "
        "judge it by pairs, lines and drugs that were held out, beside models that need no network.",
    )
    add_parts(command, _add_fit, _add_predict, _add_evaluate)


def _add_fit(parts: Commands) -> None:
    fit = parts.add_parser(
        "fit",
        help="fit a model to measured pairs",
        description="Fit a network after DeepDDS, over molecular graphs of drugs and embeddings of cell lines by a "
        "checkpoint, and write the model's folder. Pairs, lines or drugs are held out for evaluate, and others kept "
        "for validation, which decides how long is trained. A killed fit goes on with --resume.",
    )
    fit.set_defaults(run=_fit, kept=kept_in_part, smaller="; try a smaller table of expression")
    fit.add_argument("--checkpoint", required=True, metavar="DIR", help="folder or name of the pre-trained model")
    _add_pairs(fit)
    fit.add_argument("--smiles", required=True, metavar="FILE", help="table of drug and smiles")
    fit.add_argument(
        "--cell-lines", required=True, metavar="FILE", help="table of expression, genes by lines or lines by genes"
    )
    fit.add_argument("--output", required=True, metavar="MODEL", help="folder to write")
    fit.add_argument(
        "--split",
        default="pair",
        metavar="S",
        help="what is held out: pair, line, drug, none, or a table of pairs with a column fold (default: %(default)s)",
    )
    _add_learned(fit, "10", "0", "5")
    fit.add_argument(
        "--values", choices=VALUES, default="tpm", help="what the expression is (default: %(default)s, or proportional)"
    )
    fit.add_argument(
        "--aliases",
        metavar="FILE",
        help="table of other names of genes, such as Ensembl ids: old<tab>new, or HGNC's complete set",
    )
    fit.add_argument(
        "--target-depth",
        metavar="T",
        help=f"for models with depth tokens, as for embed (default: {DEFAULT_TARGET_DEPTH}; with --values tpm: fold:1)",
    )
    add_counts(
        fit,
        ("epochs", 30, "most epochs"),
        ("patience", 10, "epochs without a better validation"),
        ("seed", 0, "of folds that are made, of the validation part and of the network"),
    )
    _add_running(fit)
    fit.add_argument("--resume", action="store_true", help="go on with an interrupted fit, if there is one")


def _add_predict(parts: Commands) -> None:
    predict = parts.add_parser(
        "predict",
        help="predict the scores of pairs",
        description="Write a table of pairs with xtrimogene_score, xtrimogene_synergy_probability and what of each row "
        "the model was not fitted to. The order of two drugs makes no difference.",
    )
    predict.set_defaults(run=_predict, smaller="; give fewer pairs")
    predict.add_argument("--model", required=True, metavar="MODEL", help="folder that fit has written")
    _add_pairs(predict)
    predict.add_argument("--output", required=True, metavar="FILE", help="table to write, CSV")
    _add_new(predict)
    _add_running(predict)


def _add_evaluate(parts: Commands) -> None:
    evaluate = parts.add_parser(
        "evaluate",
        help="judge a model by measured pairs, as a report",
        description="Judge a model by pairs that it was not fitted to, and fit it anew in folds that hold pairs, lines "
        "and drugs out, beside the same network with other vectors of lines, one-hot models and a forest on "
        "fingerprints. Writes report.html, report.md, report.json and pictures. A killed evaluation goes on with "
        "--resume.",
    )
    evaluate.set_defaults(run=_evaluate, kept=kept_in_part, smaller="; give fewer pairs")
    evaluate.add_argument("--model", required=True, metavar="MODEL", help="folder that fit has written")
    _add_pairs(evaluate)
    evaluate.add_argument("--output", required=True, metavar="REPORT", help="folder to write")
    evaluate.add_argument(
        "--splits",
        nargs="+",
        default=["pair", "line", "drug"],
        metavar="S",
        help="what is held out in folds: pair, line, drug, tables of pairs with a column fold, or none for the model "
        "alone (default: pair line drug)",
    )
    _add_new(evaluate)
    _add_learned(evaluate, *["as in the fit"] * 3)
    _add_running(evaluate)
    evaluate.add_argument("--resume", action="store_true", help="go on with an interrupted evaluation, if there is one")


def _add_pairs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pairs", required=True, metavar="FILE", help="table of pairs: two drugs and a cell line in a row"
    )
    command.add_argument(
        "--columns",
        nargs=3,
        metavar=("DRUG", "DRUG", "LINE"),
        help="columns of the pairs (default: the only ones such as drug_a, drug_b, cell_line)",
    )


def _add_new(command: argparse.ArgumentParser) -> None:
    command.add_argument("--smiles", metavar="FILE", help="table of drugs that the model does not have")
    command.add_argument("--cell-lines", metavar="FILE", help="table of expression of lines that it does not have")


def _add_learned(command: argparse.ArgumentParser, above: str, below: str, folds: str) -> None:
    """Options of what was measured; they are None where they are not given."""
    command.add_argument(
        "--target",
        metavar="COL",
        help="column with scores, or with 0 and 1; label: classes alone (default: loewe, or else label)",
    )
    command.add_argument(
        "--synergy-above", type=float, metavar="X", help=f"a score above it is synergy (default: {above})"
    )
    command.add_argument(
        "--antagonism-below", type=float, metavar="X", help=f"a score below it is antagonism (default: {below})"
    )
    command.add_argument(
        "--fold-column",
        metavar="COL",
        help="column of the pairs with folds, checked for what they hold out (default: for pairs the column fold, if "
        "there is one; else folds are made)",
    )
    command.add_argument("--folds", type=int, metavar="N", help=f"folds that are made (default: {folds})")


def _add_running(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, ... (default: the GPU if any)")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    command.add_argument("--no-progress", action="store_true", help="no progress bar")


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _fit(arguments: argparse.Namespace) -> None:
    set_threads(arguments)
    from xtrimogene.tasks.synergy import fit

    options = _given(
        arguments, *_LEARNED, "split", "values", "aliases", "target_depth", "epochs", "patience", "seed", "resume",
        "overwrite", "device",
    )  # fmt: skip
    report = fit(
        arguments.checkpoint, arguments.pairs, arguments.smiles, arguments.cell_lines, arguments.output,
        progress=not arguments.no_progress, **options,
    )  # fmt: skip
    tell(arguments, f"{report}\n{arguments.output}: the model", fields_of(report))


def _predict(arguments: argparse.Namespace) -> None:
    set_threads(arguments)
    from xtrimogene.tasks.synergy import predict

    options = _given(arguments, "smiles", "cell_lines", "columns", "overwrite", "device")
    unseen = predict(arguments.model, arguments.pairs, arguments.output, **options)
    counts = ", ".join(f"{count:,} {name}" for name, count in unseen.items())
    text = f"{sum(unseen.values()):,} rows; of what the model was not fitted to: {counts}\n{arguments.output}"
    tell(arguments, text, {"output": arguments.output, "unseen": unseen})


def _evaluate(arguments: argparse.Namespace) -> None:
    set_threads(arguments)
    from xtrimogene.tasks.synergy_evaluation import evaluate
    from xtrimogene.tasks.synergy_report import verdict

    options = _given(arguments, *_LEARNED, "splits", "smiles", "cell_lines", "resume", "overwrite", "device")
    evaluation = evaluate(
        arguments.model,
        arguments.pairs,
        output=arguments.output,
        progress=not arguments.no_progress,
        **options,
    )
    text = f"{verdict(evaluation)}\n{arguments.output}: report.html, report.md, report.json, pictures"
    tell(arguments, text, {"output": arguments.output, **evaluation.numbers()})
