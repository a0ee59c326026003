"""Fits and judges a model of drug pairs: python examples/synergy/run.py DATA [--splits ...] [--seed N]

DATA is a folder with oneil_loewe.csv.gz and oneil_smiles.csv (O'Neil et al. 2016, MIT: Loewe synergy of 522 pairs of
36 drugs on 35 cell lines), cell_lines_954_tpm.csv (TPM of 954 genes in 31 lines, by Ensembl ids) and
zheng_pbmc_facs.h5ad, of which only the symbols of Ensembl ids are taken. pbmc-tiny's embeddings of the lines are used.
In each fold of each split the network is fitted anew, beside ways that need none, and ways of knowing a
line that need no checkpoint.

Figures go to results.json, results.md is made from it, text and pictures of the report lie in oneil/; the model and
what is finished of a killed run in OUTPUT/work. Run again, it goes on, or makes results.md anew.
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

from xtrimogene.document import markdown_table
from xtrimogene.tasks.report import shown
from xtrimogene.tasks.synergy import fit
from xtrimogene.tasks.synergy_baselines import AUROC, BASELINES, METRICS, RMSE
from xtrimogene.tasks.synergy_evaluation import evaluate
from xtrimogene.tasks.synergy_lines import OURS, RAW, SHUFFLED, UNTRAINED
from xtrimogene.tasks.synergy_report import NETWORK

HERE = Path(__file__).parent
CHECKPOINT = "pbmc-tiny"
PAIRS, SMILES, LINES, NAMES = (
    "oneil_loewe.csv.gz", "oneil_smiles.csv", "cell_lines_954_tpm.csv", "zheng_pbmc_facs.h5ad",
)  # fmt: skip
PICTURES = ("auroc.png", "scores.png")
HELD_OUT = {"pair": "whole pairs", "line": "cell lines", "drug": "drugs"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fits and judges, where there are no figures yet, and writes all that is shown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder with the four files")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--splits", nargs="+", choices=list(HELD_OUT), default=list(HELD_OUT))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    results = options.output / "results.json"
    if not results.exists():
        (options.output / "work").mkdir(exist_ok=True)
        told = _measured(options.data, options.output, options.splits, options.seed)
        results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    told = json.loads(results.read_text(encoding="utf-8"))
    (options.output / "results.md").write_text(text(told), encoding="utf-8")
    print(text(told))


def _measured(data: Path, output: Path, splits: Sequence[str], seed: int) -> dict[str, Any]:
    """What fit and evaluate say, and seconds of processor time of both."""
    work = output / "work"
    names = anndata.read_h5ad(data / NAMES, backed="r").var["symbol"].astype(str)
    (work / "names.tsv").write_text("".join(f"{old}\t{new}\n" for old, new in names.items()), encoding="utf-8")
    begun = time.process_time()
    fitted = fit(
        CHECKPOINT, data / PAIRS, data / SMILES, data / LINES, work / "model", aliases=work / "names.tsv", seed=seed,
        resume=True,
    )  # fmt: skip
    of_fit = time.process_time() - begun
    evaluate(work / "model", data / PAIRS, output=work / "report", splits=splits, resume=True, overwrite=True)
    seconds = {"fit": of_fit, "evaluate": time.process_time() - begun - of_fit}
    target = output / "oneil"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in ("report.md", *PICTURES):
        shutil.copy(work / "report" / name, target / name)
    found: dict[str, Any] = json.loads((work / "report" / "report.json").read_text(encoding="utf-8"))
    told = str(fitted).replace(f"{data}/", "").splitlines()
    return {"fit": told, "seed": seed, "seconds": seconds, **found}


def text(told: dict[str, Any]) -> str:
    """results.md: in short, then the figures of each split."""
    parts = [_short(told), "<!-- figures -->"]
    for split, found in told["folds"].items():
        figures = found["figures"]
        body = []
        for guess, metrics in figures.items():
            cells = [shown(metrics[metric]["mean"], 2 if metric == RMSE else 3) for metric in METRICS]
            cells[0] += f" ± {shown(metrics[AUROC]['spread'])}"
            body.append([guess, *cells])
        count = len(found["tested"])
        parts += [
            f"**Leaving {HELD_OUT[split]} out, {count} folds**",
            markdown_table(["mean over the folds", *METRICS], body),
        ]
    seconds = told["seconds"]
    parts.append(
        f"A fit took {seconds['fit']:.0f} seconds of one core, all fits of the folds with the other ways "
        f"{seconds['evaluate'] / 60:.0f} minutes; seed {told['seed']}."
    )
    parts.append("What the fit said:")
    parts.append("```text\n" + "\n".join(told["fit"]) + "\n```")
    return "\n\n".join(parts) + "\n"


def _short(told: dict[str, Any]) -> str:
    """Who wins where, the ways without a network first, and what the embedding adds."""
    sentences = []
    ours = NETWORK[OURS]
    for split, found in told["folds"].items():
        mean = {guess: metrics[AUROC]["mean"] for guess, metrics in found["figures"].items()}
        best = max(BASELINES, key=mean.__getitem__)
        wins = mean[ours] > mean[best]
        first, second = (ours, best) if wins else (best, ours)
        others = ", ".join(f"`{name}` {mean[name]:.3f}" for name in BASELINES if name != best)
        who = "the network wins" if wins else f"`{best}` wins, not the network"
        sentences.append(
            f"Leaving {HELD_OUT[split]} out, {who}: AUROC of `{first}` {mean[first]:.3f}, of `{second}` "
            f"{mean[second]:.3f} ({others})."
        )
    for split, found in told["folds"].items():
        mean = {guess: metrics[AUROC]["mean"] for guess, metrics in found["figures"].items()}
        gaps = ", ".join(
            f"{mean[ours] - mean[NETWORK[version]]:+.3f} over {words}"
            for version, words in (
                (SHUFFLED, "the embedding of another line"),
                (RAW, "raw expression"),
                (UNTRAINED, "an untrained encoder"),
            )
        )
        sentences.append(f"What the line's embedding adds, leaving {HELD_OUT[split]} out: {gaps}.")
    lost = [each for each in sentences if "not the network" in each]
    return " ".join([*lost, *(each for each in sentences if each not in lost)])


if __name__ == "__main__":
    main()
