"""Fits and judges models of perturbation effects: python examples/perturbation/run.py DATA [--parts ...] [--seeds ...]

DATA is a folder with norman_k562_500genes.h5ad (BSD-3-Clause; counts, conditions in obs["condition"], totals in
obs["n_counts"]) and papalexi_lowmoi_299genes.h5ad (MIT; obs["target"], obs["bio_rep"]). Parts:

  pairs    norman, fitted to the 18 single perturbations, judged by the 15 pairs, by two checkpoints: pbmc-tiny, and one
           that is trained here on control cells and single perturbations; beside learned and shuffled embeddings
  splits   norman, fitted to the singles and half of the pairs, judged by the other half, a split for each seed
  unseen   papalexi, a quarter of the genes left out, a split for each seed

Each run writes its figures into results.json as they come, and is taken from there when it is run again; results.md is
made anew from it. Text and pictures of the reports of "pairs" lie beside it, models and the whole reports in
OUTPUT/work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np

from xtrimogene.document import markdown_table
from xtrimogene.tasks.effects import ADDITIVE, BASELINES, MSE_TOP, R_ALL_MEAN, R_TOP, RANK_SCORE, TOP_GENES
from xtrimogene.tasks.perturbation import fit
from xtrimogene.tasks.perturbation_report import ALL, NETWORK, REPLICATE, evaluate
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.pretrain import pretrain

HERE = Path(__file__).parent
NORMAN, PAPALEXI = "norman_k562_500genes.h5ad", "papalexi_lowmoi_299genes.h5ad"
PACKAGED, OWN = "pbmc-tiny", "trained on the screen"
READING: dict[str, dict[str, Any]] = {
    NORMAN: {"condition": "condition", "control": "control", "total_counts": "n_counts"},
    PAPALEXI: {"condition": "target", "control": "non-targeting", "group": "bio_rep"},
}
# Beside the recipe "small".
PRETRAINING = {
    "total_counts": "n_counts", "min_genes": 3, "max_steps": 1500, "warmup_steps": 100, "validate_every": 500,
    "checkpoint_every": 250, "log_every": 50, "tensorboard": False,
}  # fmt: skip
METRICS = {MSE_TOP: 4, R_TOP: 2, R_ALL_MEAN: 2, RANK_SCORE: 2}
Figures = dict[str, dict[str, dict[str, float]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts that have no figures yet, and writes all that is shown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder with the two files")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--parts", nargs="+", default=["pairs", "splits", "unseen"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    options = parser.parse_args(arguments)
    results = options.output / "results.json"
    known: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    (options.output / "work").mkdir(exist_ok=True)
    runs: list[tuple[str, dict[str, Any]]] = []
    if "pairs" in options.parts:
        pairs = {"file": NORMAN, "split": "unseen-double", "test_share": 1.0, "compare": True}
        runs += [(f"pairs, {PACKAGED}", {**pairs, "report": "pairs"}), (f"pairs, {OWN}", {**pairs, "report": "own"})]
    if "splits" in options.parts:
        runs += [
            (f"splits, seed {seed}", {"file": NORMAN, "split": "unseen-double", "seed": seed}) for seed in options.seeds
        ]
    if "unseen" in options.parts:
        runs += [
            (f"unseen, seed {seed}", {"file": PAPALEXI, "split": "unseen-single", "seed": seed})
            for seed in options.seeds
        ]
    for name, run in runs:
        if name not in known:
            checkpoint = _own_checkpoint(options.data, options.output) if name.endswith(OWN) else PACKAGED
            known[name] = _measured(name, run, checkpoint, options.data, options.output)
            results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    (options.output / "results.md").write_text(text(known), encoding="utf-8")
    print(text(known))


def _measured(name: str, run: dict[str, Any], checkpoint: str, data: Path, output: Path) -> dict[str, Any]:
    """Fits and judges: what the fit says, its seconds of processor time, and group -> guess -> metric -> mean."""
    file = run.pop("file")
    report = run.pop("report", None)
    model = output / "work" / name.replace(", ", "_").replace(" ", "_")
    started = time.process_time()
    fitted = fit(checkpoint, data / file, model, **run, **READING[file], resume=True, overwrite=True)
    seconds = time.process_time() - started
    written = None if report is None else output / "work" / f"{report}_report"
    judged = evaluate(model, data / file, output=written, overwrite=True)
    if written is not None:
        target = output / report
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for file in ("report.md", "errors.png", "changes.png"):
            shutil.copy(written / file, target / file)
    figures: Figures = {
        group: {guess: {metric: judged.mean(guess, metric, group) for metric in METRICS} for guess in judged.metrics}
        for group in judged.groups()
    }
    counts = {group: int(own.sum()) for group, own in judged.groups().items()}
    return {"fit": str(fitted), "fitted": judged.fitted, "seconds": seconds, "judged": counts, "figures": figures}


def _own_checkpoint(data: Path, output: Path) -> str:
    """A network trained on the control cells and the single perturbations of norman, and on no pair."""
    cells = anndata.read_h5ad(data / NORMAN)
    single = ~cells.obs["condition"].astype(str).str.contains("+", regex=False)
    path = output / "work" / "singles.h5ad"
    if not path.exists():
        cells[single.to_numpy()].write_h5ad(path)
    config = PretrainConfig.from_yaml(None, [f"{key}={value}" for key, value in PRETRAINING.items()], recipe="small")
    trained = pretrain(config, [path], output / "work" / "pretrained", resume=True)
    assert trained.model is not None
    return str(trained.model)


def text(known: dict[str, Any]) -> str:
    """results.md: in short, then each part's figures."""
    parts = [*_short(known), "<!-- figures -->"]
    for name, told in known.items():
        if name.startswith("pairs"):
            checkpoint = name.split(", ", 1)[1]
            parts += [
                f"**{NORMAN}, fitted to the single perturbations, judged by the pairs; checkpoint {checkpoint}**",
                _table([told["figures"]], told["judged"]),
            ]
    for part, words in (
        (
            "splits",
            f"**{NORMAN}, half of the pairs left out; mean over %d splits, in brackets the least and the most**",
        ),
        ("unseen", f"**{PAPALEXI}, a quarter of the genes left out; mean over %d splits**"),
    ):
        runs = [told for name, told in known.items() if name.startswith(part)]
        if runs:
            parts += [words % len(runs), _table([run["figures"] for run in runs], runs[0]["judged"])]
            parts += [_wins(runs)]
    seconds = [told["seconds"] for told in known.values()]
    parts.append(
        f"A fit took {min(seconds):.0f} to {max(seconds):.0f} seconds of one core, with those of learned and shuffled "
        "embeddings where they are shown."
    )
    return "\n\n".join(parts) + "\n"


def _short(known: dict[str, Any]) -> list[str]:
    """What the figures of "pairs" say, the plainest first."""
    told = known.get(f"pairs, {OWN}")
    if told is None:
        return []
    ours, learned, shuffled = NETWORK.values()
    errors = {guess: figures[MSE_TOP] for guess, figures in told["figures"][ALL].items()}
    better = [guess for guess in BASELINES if errors[ours] < errors[guess]]
    worse = [guess for guess in BASELINES if guess not in better]
    others = min(errors[learned], errors[shuffled])
    what = "adds nothing" if errors[ours] > 0.95 * others else "lowers the error"
    seen = {guess: figures[MSE_TOP] for guess, figures in told["figures"]["pair, 2 seen"].items()}
    return [
        f"On {told['judged'][ALL]} pairs of a screen to whose {told['fitted']} single perturbations it was fitted, the "
        f"network has a squared error of {errors[ours]:.3f} on the {TOP_GENES} most changed genes: less than "
        f"{_listed(better, errors)}{f', and not less than {_listed(worse, errors)}' if worse else ''}. What the "
        f"checkpoint knows of genes {what} there: with learned embeddings the error is {errors[learned]:.3f}, with "
        f"those of other genes {errors[shuffled]:.3f}. Where both genes were seen alone, the sum of their changes has "
        f"an error of {seen[ADDITIVE]:.4f} and the network {seen[ours]:.4f}, and half of a pair's cells, taken for the "
        f"other half, {seen[REPLICATE]:.4f}."
    ]


def _listed(guesses: Sequence[str], errors: dict[str, float]) -> str:
    return ", ".join(f"`{guess}` ({errors[guess]:.3f})" for guess in guesses)


def _table(runs: Sequence[Figures], judged: dict[str, int]) -> str:
    """Error, correlations and centroid accuracy of each guess, a row for each group and guess."""
    groups = [ALL, *(group for group in judged if group != ALL)] if ALL in judged else list(judged)
    body = []
    for group in groups:
        own = [run[group] for run in runs if group in run]
        for guess in own[0]:
            cells = [f"{np.mean([run[guess][metric] for run in own]):.{digits}f}" for metric, digits in METRICS.items()]
            if len(runs) > 1:
                errors = [run[guess][MSE_TOP] for run in own]
                cells[0] += f" ({min(errors):.4f} to {max(errors):.4f})"
            count = f" ({judged[group]})" if len(runs) == 1 else ""
            body.append([f"{group}{count}", guess, *cells])
    return markdown_table(["perturbations", "guess", *METRICS], body)


def _wins(runs: Sequence[dict[str, Any]]) -> str:
    """In how many splits the network's error is below that of each guess."""
    ours = NETWORK["ours"]
    group = ALL if ALL in runs[0]["figures"] else next(iter(runs[0]["figures"]))
    words = [
        f"{sum(run['figures'][group][ours][MSE_TOP] < run['figures'][group][guess][MSE_TOP] for run in runs)} of "
        f"{len(runs)} against `{guess}`"
        for guess in BASELINES
    ]
    return (
        f"Splits in which the network's error is the smaller one, over all perturbations left out: {'; '.join(words)}."
    )


if __name__ == "__main__":
    main()
