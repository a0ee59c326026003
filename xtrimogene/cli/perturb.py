"""xtrimogene perturb: what perturbing genes changes, learned from a screen, predicted, and judged by held-out ones."""

from __future__ import annotations

import argparse
from typing import Any

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

_SCREEN = ("condition", "control", "group", "min_cells")
_NOT_OF_SCREENS = ("device", "overwrite", "progress", "aliases", "target_depth")


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "perturb",
        help="perturbation effects: fit a model to a screen, predict, evaluate",
        description="Fit a model to a perturbation screen, predict what perturbing genes changes, judge the model by "
        "perturbations that it was not fitted to, beside guesses that need no network.",
    )
    add_parts(command, _add_fit, _add_predict, _add_evaluate)


def _add_fit(parts: Commands) -> None:
    fit = parts.add_parser(
        "fit",
        help="fit a model to a screen",
        description="Fit a network after GEARS to the mean changes of a screen's perturbations, over embeddings of "
        "genes by a checkpoint in the screen's control cells, and write the model's folder. Perturbations are left out "
        "for evaluate, and others kept for validation, which decides how long is trained. A killed fit goes on with "
        "--resume.",
    )
    fit.set_defaults(run=_fit, kept=kept_in_part, smaller="; try a smaller --max-genes or --control-cells")
    fit.add_argument("--checkpoint", required=True, metavar="DIR", help="folder or name of the pre-trained model")
    fit.add_argument("--data", required=True, metavar="FILE", help="cells of the screen, with control cells")
    fit.add_argument(
        "--condition", required=True, metavar="COL", help="column of obs with perturbed genes: A, A+B, A_B, A+ctrl"
    )
    fit.add_argument("--output", required=True, metavar="MODEL", help="folder to write")
    fit.add_argument(
        "--control",
        metavar="NAME",
        help="label of the control cells (default: the only one such as ctrl, control or NT)",
    )
    fit.add_argument(
        "--split",
        metavar="S",
        help="what is left out: unseen-single (genes), unseen-double (perturbations of several genes), none, or a "
        "table, condition<tab>train|validation|test (default: unseen-double where there are such, else unseen-single)",
    )
    fit.add_argument(
        "--test-share",
        type=float,
        metavar="X",
        help="share that is left out (default: half of those of several genes, a quarter of genes)",
    )
    fit.add_argument(
        "--graph",
        metavar="FILE",
        help="graph of perturbed genes, gene<tab>gene or gene<tab>gene<tab>weight (default: co-expression in the "
        "training cells)",
    )
    fit.add_argument(
        "--group",
        metavar="COL",
        help="column of obs, such as a cell line: changes are taken within each (default: none)",
    )
    fit.add_argument(
        "--compare",
        action="store_true",
        help="also fit the network with learned and with shuffled embeddings of the same width, for evaluate",
    )
    add_counts(
        fit,
        ("min-cells", 10, "perturbations of fewer cells are left out"),
        ("max-genes", 2000, "of more measured genes, those that vary most are predicted"),
        ("control-cells", 64, "most control cells that are embedded and kept"),
        ("epochs", 60, "most epochs"),
        ("patience", 15, "epochs without a better validation"),
        ("seed", 0, "of the split, the cells and the network"),
    )
    add_reading_options(fit)
    fit.add_argument("--resume", action="store_true", help="go on with an interrupted fit, if there is one")


def _add_predict(parts: Commands) -> None:
    predict = parts.add_parser(
        "predict",
        help="predict what perturbations do to the control cells",
        description="Write an h5ad file with the model's control cells under each perturbation: log-normalised "
        "expression in X, the predicted change in layers['change'], obs['perturbation'] and obs['control_cell'].",
    )
    predict.set_defaults(run=_predict, smaller="; name fewer perturbations")
    predict.add_argument("--model", required=True, metavar="MODEL", help="folder that fit has written")
    predict.add_argument(
        "--perturbations", required=True, nargs="+", metavar="NAME", help="genes, or several in one: A, A+B"
    )
    predict.add_argument("--output", required=True, metavar="FILE", help="h5ad file to write")
    predict.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    predict.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    predict.add_argument("--no-progress", action="store_true", help="no progress bar")


def _add_evaluate(parts: Commands) -> None:
    evaluate = parts.add_parser(
        "evaluate",
        help="judge a model by a screen, as a report",
        description="Judge a model by the perturbations of a screen that it was not fitted to, beside no change, the "
        "mean, sums of single perturbations and low-rank linear models. Writes report.html, report.md, report.json and "
        "pictures. How the screen is read is known from the fit; options say what is otherwise.",
    )
    evaluate.set_defaults(run=_evaluate, smaller="; name a screen of fewer genes")
    evaluate.add_argument("--model", required=True, metavar="MODEL", help="folder that fit has written")
    evaluate.add_argument(
        "--data", required=True, metavar="FILE", help="the screen, or another one, with control cells"
    )
    evaluate.add_argument("--output", required=True, metavar="REPORT", help="folder to write")
    evaluate.add_argument(
        "--condition", metavar="COL", help="column of obs with perturbed genes (default: as in the fit)"
    )
    evaluate.add_argument("--control", metavar="NAME", help="label of the control cells (default: as in the fit)")
    evaluate.add_argument("--group", metavar="COL", help="column of obs, such as a cell line (default: as in the fit)")
    evaluate.add_argument("--min-cells", type=int, metavar="N", help="perturbations of fewer cells are left out")
    add_reading_options(evaluate)


def _fit(arguments: argparse.Namespace) -> None:
    from xtrimogene.tasks.perturbation import fit

    set_threads(arguments)
    names = (
        *_SCREEN, "split", "test_share", "graph", "compare", "max_genes", "control_cells", "epochs", "patience", "seed",
        "resume",
    )  # fmt: skip
    options = {name: getattr(arguments, name) for name in names}
    report = fit(arguments.checkpoint, arguments.data, arguments.output, **options, **reading_options(arguments))
    tell(arguments, f"{report}\n{arguments.output}: the model", fields_of(report))


def _predict(arguments: argparse.Namespace) -> None:
    from xtrimogene.tasks.conditions import name_of
    from xtrimogene.tasks.perturbation import predict

    set_threads(arguments)
    asked = predict(
        arguments.model,
        arguments.perturbations,
        arguments.output,
        overwrite=arguments.overwrite,
        progress=not arguments.no_progress,
    )
    names = [name_of(each) for each in asked]
    text = f"{len(names):,} perturbations: {', '.join(names)}\n{arguments.output}: X, layers['change']"
    tell(arguments, text, {"output": arguments.output, "perturbations": names})


def _evaluate(arguments: argparse.Namespace) -> None:
    from xtrimogene.tasks.perturbation_report import evaluate, verdict

    set_threads(arguments)
    given = {**{name: getattr(arguments, name) for name in _SCREEN}, **reading_options(arguments)}
    options: dict[str, Any] = {
        name: value for name, value in given.items() if name not in _NOT_OF_SCREENS and value not in (None, False)
    }
    evaluation = evaluate(
        arguments.model,
        arguments.data,
        output=arguments.output,
        overwrite=arguments.overwrite,
        progress=not arguments.no_progress,
        **options,
    )
    text = f"{verdict(evaluation)}\n{arguments.output}: report.html, report.md, report.json, pictures"
    tell(arguments, text, {"output": arguments.output, **evaluation.numbers()})
