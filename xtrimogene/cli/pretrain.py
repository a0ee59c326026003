"""xtrimogene pretrain: a model trained on the cells of many files."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from xtrimogene.cli.failures import out_of_memory, status_of
from xtrimogene.cli.messages import pointer_to_inspect, show_error, tell
from xtrimogene.cli.options import Commands, fields_of, set_threads

# The names of xtrimogene.training.config.RECIPES, which would bring torch along.
RECIPES = ("small", "tune", "published")
_CHANGE = re.compile(r"[a-z_][a-z_0-9]*(\.[a-z_0-9]+)?=")


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "pretrain",
        help="train a model on many cells",
        usage="%(prog)s --data PATH [PATH ...] --output DIR [--recipe NAME] [--config FILE] [key=value ...] [--resume]",
        description="Train the masked auto-encoder on the cells of files, stores and folders of them. The "
        "config is a YAML file with the keys of PretrainConfig; key=value changes single ones (model.dim=64 one of a "
        "section); checkpoint=DIR begins with the weights of a model. SIGTERM and SIGINT save a checkpoint and stop; "
        "an interrupted or killed run goes on with --resume. "
        "With several processes: torchrun --nproc-per-node N -m xtrimogene pretrain ...",
        epilog="Exit status: 0 trained to the end; 1 training had begun and cannot go on; 2 something was wrong before "
        "it began; 143 or 130 stopped by SIGTERM or SIGINT, with a checkpoint of the steps made.",
    )
    command.set_defaults(
        run=_run, kept=_kept, smaller="; try a smaller batch_cells and a larger accumulate", changes=[]
    )
    command.add_argument("--config", metavar="FILE", help="YAML file of PretrainConfig's keys, over the recipe's")
    command.add_argument(
        "--recipe",
        choices=RECIPES,
        help="keys to begin with: small, for up to a million cells, tune, to go on with checkpoint=DIR, or published "
        "(default: small; with checkpoint=DIR tune; with --config published, since what it leaves out has always been "
        "that)",
    )
    command.add_argument("--data", required=True, nargs="+", metavar="PATH", help="files of cells, or folders of them")
    command.add_argument("--output", required=True, metavar="DIR", help="folder to make: log, checkpoints, model")
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the folder, if there is one, with the config that it has there",
    )
    command.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, ... (default: the GPU if any)")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    command.add_argument("--no-progress", action="store_true", help="no progress bar")


def take_changes(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Move key=value words, which may stand anywhere, from where argparse has put them to arguments.changes.

    argparse has no way to say that positional words may stand between options, and --data takes those that follow it.
    """
    for words in (arguments.data, rest):
        changes = [word for word in words if _CHANGE.match(word) and not Path(word).exists()]
        arguments.changes += changes
        words[:] = [word for word in words if word not in changes]


def _kept(arguments: argparse.Namespace) -> bool:
    """Whether there is a checkpoint to go on with."""
    return any((Path(arguments.output) / "checkpoints").glob("step-*/complete.json"))


def _config_file(arguments: argparse.Namespace) -> Path | None:
    """The file of the config: the one that is named, else that of the run to go on with."""
    if arguments.config is not None:
        return Path(arguments.config)
    own = Path(arguments.output) / "config.yaml"
    return own if arguments.resume and arguments.recipe is None and own.exists() else None


def _recipe(arguments: argparse.Namespace, config: Path | None) -> str:
    """The recipe asked for, else the one that fits what else is given."""
    if arguments.recipe is not None:
        return str(arguments.recipe)
    if config is not None:
        return "published"
    return "tune" if any(change.startswith("checkpoint=") for change in arguments.changes) else "small"


def _run(arguments: argparse.Namespace) -> int:
    from xtrimogene.training.config import PretrainConfig
    from xtrimogene.training.log import LOG_FILE
    from xtrimogene.training.pretrain import pretrain
    from xtrimogene.training.ranks import FirstRankFailed
    from xtrimogene.training.run import TrainingFailed

    set_threads(arguments)
    config = _config_file(arguments)
    try:
        report = pretrain(
            PretrainConfig.from_yaml(config, arguments.changes, recipe=_recipe(arguments, config)),
            arguments.data,
            arguments.output,
            resume=arguments.resume,
            device=arguments.device,
            progress=not arguments.no_progress,
        )
    except FirstRankFailed:
        return 2
    except TrainingFailed as error:
        show_error(f"{error}{pointer_to_inspect(error, arguments)}")
        return 1
    except Exception as error:
        if out_of_memory(error) and (Path(arguments.output) / LOG_FILE).exists():
            status_of(error, arguments)
            return 1
        raise
    if report.rank == 0:
        if report.model is None:
            with_what = f"with a checkpoint of step {report.steps:,}" if report.steps else "before the first step"
            end = f"{report.output}: stopped, {with_what}; --resume goes on"
        else:
            end = f"{report.model}: the trained model"
        tell(arguments, f"{report}\n{end}", fields_of(report))
    return 128 + report.signal if report.signal else 0
