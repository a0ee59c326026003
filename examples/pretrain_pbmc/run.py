"""Pre-trains on two PBMC data sets, once for each seed, and judges it: python examples/pretrain_pbmc/run.py DATA

DATA is a folder with zheng_pbmc_facs.h5ad and pbmc3k_counts_labelled.h5ad (raw counts; gene symbols in var["symbol"] of
the first, in var_names of the second; cell types of the first in obs["celltype"]). A tenth of the cells of each is held
out. Writes results.json, results.md and the log of each run into --output, this folder by default. The runs, with their
checkpoints, are in OUTPUT/runs; started again it goes on, and what was judged is not judged again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np

from xtg_kernels.info import info
from xtrimogene import XTrimoGene
from xtrimogene.evaluation.evaluate import evaluate
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.pretrain import pretrain

HERE = Path(__file__).parent
FILES = ("zheng_pbmc_facs.h5ad", "pbmc3k_counts_labelled.h5ad")
LABEL = "celltype"
HELD_OUT = 0.1
PARTS = ("all", "non-zero")
FIGURES = ("mean squared error", "beyond the mean", "within genes")
READERS = ("neighbours", "probe")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, or goes on training, then judges and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder with " + " and ".join(FILES))
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of config.yaml")
    options = parser.parse_intermixed_args(arguments)
    train, held_out = split(options.data, options.output / "data")
    judged = []
    for seed in options.seeds:
        folder = options.output / "runs" / f"seed-{seed}"
        if not (folder / "judged.json").exists():
            found = of_seed(seed, options.changes, folder, train, held_out)
            (folder / "judged.json").write_text(json.dumps(found), encoding="utf-8")
        judged.append(json.loads((folder / "judged.json").read_text(encoding="utf-8")))
        shutil.copy(folder / "log.jsonl", options.output / f"log-{seed}.jsonl")
    results = {"seeds": options.seeds, "runs": judged}
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "results.md").write_text(as_table(results), encoding="utf-8")
    print(as_table(results))


def split(data: Path, target: Path) -> tuple[list[Path], list[Path]]:
    """Copies of the data sets, genes named by var["symbol"]: nine tenths of each to train on, and one to judge by."""
    files: tuple[list[Path], list[Path]] = ([], [])
    for name in FILES:
        parts = [target / part / name for part in ("train", "held_out")]
        if not all(part.exists() for part in parts):
            cells = anndata.read_h5ad(data / name)
            if "symbol" not in cells.var:
                cells.var["symbol"] = cells.var_names
            held = np.random.default_rng(0).random(cells.n_obs) < HELD_OUT
            for part, rows in zip(parts, (~held, held), strict=True):
                part.parent.mkdir(parents=True, exist_ok=True)
                cells[rows].write_h5ad(part.with_suffix(".partial"))
                part.with_suffix(".partial").rename(part)
        for found, part in zip(files, parts, strict=True):
            found.append(part)
    return files


def of_seed(seed: int, changes: list[str], folder: Path, train: list[Path], held_out: list[Path]) -> dict[str, Any]:
    """What one run took, and what its model knows of the held-out cells."""
    config = PretrainConfig.from_yaml(HERE / "config.yaml", [*changes, f"seed={seed}"], recipe="small")
    began = time.process_time()
    report = pretrain(config, train, folder, resume=True)
    seconds = time.process_time() - began
    print(report)
    if report.model is None:
        raise SystemExit(report.signal + 128)
    model = XTrimoGene.from_pretrained(report.model)
    reading = {"gene_symbols": config.gene_symbols, "min_genes": config.min_genes, "progress": False}
    masked = evaluate(model, held_out, train_data=train, **reading)
    labelled = evaluate(model, held_out[0], train_data=train[0], label=LABEL, **reading)
    return {
        "seed": seed,
        "steps": report.steps,
        "steps of the head alone": config.head_steps_of(model.config),
        "cpu seconds": None if report.resumed_steps else seconds,
        "wall seconds": report.seconds,
        "cells": masked.cells,
        "genes": masked.genes,
        "masked prediction": masked.masked,
        "spaces": labelled.spaces,
        "label cells": labelled.cells,
        "measured": where(),
        "config": dataclasses.asdict(config)["masking"] | {"max_steps": config.max_steps},
    }


def as_table(results: dict[str, Any]) -> str:
    """Mean and spread over the seeds, as Markdown."""
    runs = results["runs"]
    first = runs[0]
    taken = [run["cpu seconds"] for run in runs if run["cpu seconds"] is not None]
    cost = f"{np.mean(taken) / 60:.0f} CPU minutes a run" if taken else "CPU time not counted, the runs were resumed"
    lines = [
        f"{first['steps']:,} steps, {first['steps of the head alone']:,} of them of the product head alone; "
        f"{first['cells']['known']:,} training cells, {first['cells']['judged']:,} held out, "
        f"{first['genes']['vocabulary']:,} genes; {cost}. Mean over {len(runs)} seeds and, after ±, half of what lies "
        "between the least and the largest. Bars depend on the masks alone.",
        "",
        "| prediction of hidden genes | " + " | ".join(f"{part}: {name}" for part in PARTS for name in FIGURES) + " |",
        "|---|" + "---:|" * (len(PARTS) * len(FIGURES)),
    ]
    for name in first["masked prediction"]:
        row = [
            spread([run["masked prediction"][name][part][figure] for run in runs], 4 if "error" in figure else 3)
            for part in PARTS
            for figure in FIGURES
        ]
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines += [
        "",
        f"Cell types of the {first['label cells']['judged']:,} held-out bead-purified cells:",
        "",
        "| space | " + " | ".join(READERS) + " |",
        "|---|" + "---:|" * len(READERS),
    ]
    for name in first["spaces"]:
        row = [spread([run["spaces"][name][reader] for run in runs], 3) for reader in READERS]
        lines.append(f"| {name} | {' | '.join(row)} |")
    places = sorted({tuple(run["measured"][name] for name in ("commit", "cpu", "isa", "threads")) for run in runs})
    lines += ["", *(f"Measured at commit {c}: {cpu}, {isa} kernels, {n} threads." for c, cpu, isa, n in places)]
    return "\n".join(lines) + "\n"


def spread(values: list[float | None], digits: int) -> str:
    """Mean, and half of the range where there is one."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    half = (max(known) - min(known)) / 2
    return f"{np.mean(known):.{digits}f}" + (f" ± {half:.{digits}f}" if half > 10**-digits / 2 else "")


def where() -> dict[str, Any]:
    """Machine, commit and day."""
    found = info()
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit or "unknown",
        **{name: found[name] for name in ("cpu", "isa", "threads", "torch")},
    }


if __name__ == "__main__":
    main()
