"""Pre-trains on two PBMC data sets and says what masked prediction reaches: python examples/pretrain_pbmc/run.py DATA

DATA is a folder with zheng_pbmc_facs.h5ad and pbmc3k_counts_labelled.h5ad (raw counts; gene symbols in var["symbol"] of
the first, in var_names of the second). Writes into --output, this folder by default: log.jsonl, results.json,
curve.png and results.md. The run itself, with its checkpoints, is in OUTPUT/run; started again it goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch

from xtg_kernels.info import info
from xtrimogene import XTrimoGene
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.pretrain import pretrain
from xtrimogene.training.validation import gene_means

HERE = Path(__file__).parent
FILES = ("zheng_pbmc_facs.h5ad", "pbmc3k_counts_labelled.h5ad")
MASK_EPOCHS = 4
Values = npt.NDArray[np.float64]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, or goes on training, then evaluates and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder with " + " and ".join(FILES))
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of config.yaml")
    options = parser.parse_intermixed_args(arguments)
    config = PretrainConfig.from_yaml(HERE / "config.yaml", options.changes)
    run = options.output / "run"
    data = with_symbols(options.data, options.output / "data")
    report = pretrain(config, data, run, resume=True)
    print(report)
    if report.model is None:
        return
    model = XTrimoGene.from_pretrained(report.model)
    with TrainingCells(
        data,
        model.vocabulary,
        gene_symbols=config.gene_symbols,
        masking=config.masking,
        min_genes=config.min_genes,
        seed=config.seed,
        split_seed=config.split_seed,
        validation_share=config.validation_share,
        max_validation_cells=config.validation_cells,
        batch_cells=8,
        progress=False,
    ) as cells:
        results = {
            "cells": {"training": len(cells.training), "validation": len(cells.validation_cells)},
            "genes": len(model.vocabulary),
            "steps": report.steps,
            "epochs": report.epochs,
            "seconds": report.seconds,
            "masked prediction": evaluated(model, cells),
            "measured": where(),
        }
    shutil.copy(run / "log.jsonl", options.output / "log.jsonl")
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "results.md").write_text(as_table(results), encoding="utf-8")
    draw(run / "log.jsonl", options.output / "curve.png")
    print(as_table(results))


def with_symbols(folder: Path, target: Path) -> list[Path]:
    """Copies of the files whose genes are all named by var["symbol"]."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (target / name).exists():
            continue
        cells = anndata.read_h5ad(folder / name)
        if "symbol" not in cells.var:
            cells.var["symbol"] = cells.var_names
        cells.write_h5ad(target / f"{name}.partial")
        (target / f"{name}.partial").rename(target / name)
    return [target / name for name in FILES]


def evaluated(model: XTrimoGene, cells: TrainingCells) -> dict[str, Any]:
    """Error and correlation of the predictions at the hidden genes of the validation cells, and of three baselines.

    Of the chosen genes, those that the encoder sees, with their own or a random value, do not count. "beyond the gene's
    mean" correlates what is left of truth and prediction when the gene's mean where it is chosen is taken off both
    (among non-zero genes: its mean over the cells that express it): what is known of the cell, not of the gene.
    """
    mean, nonzero_mean = gene_means(cells, len(cells.training))
    chosen_mean = chosen_means(cells)
    truths, predictions, hidden_genes = [], [], []
    with torch.no_grad():
        for masked in cells.validation():
            hidden = is_hidden(masked, len(cells.vocabulary))
            hidden_genes.append(masked.chosen_ids.numpy()[hidden])
            truths.append(masked.chosen_values.double().numpy()[hidden])
            predictions.append(model.masked_predictions(masked).double().numpy()[hidden])
    genes, truth = np.concatenate(hidden_genes), np.concatenate(truths)
    guesses = {
        "model": np.concatenate(predictions),
        "gene mean": mean[genes],
        "gene mean where chosen": chosen_mean[genes],
        "told the zeros": np.where(truth > 0, nonzero_mean[genes], 0.0),
    }
    parts = {"all": truth >= 0, "non-zero": truth > 0, "zero": truth == 0}
    means = {"all": chosen_mean[genes], "non-zero": nonzero_mean[genes]}
    results: dict[str, Any] = {}
    for name, predicted in guesses.items():
        results[name] = {}
        for part, chosen in parts.items():
            results[name][part] = {
                "mean squared error": float(np.square(predicted - truth)[chosen].mean()),
                "correlation": correlation(predicted[chosen], truth[chosen]),
                "genes": int(chosen.sum()),
            }
            if name == "model" and part in means:
                of_gene = means[part][chosen]
                results[name][part]["beyond the gene's mean"] = correlation(
                    predicted[chosen] - of_gene, truth[chosen] - of_gene
                )
    return results


def chosen_means(cells: TrainingCells) -> Values:
    """(genes,) mean true value of each gene over the training cells in which it is chosen, in a few epochs of masks.

    Expressed genes are chosen ten times as often as others. A model learns that of each gene without looking at the
    cell, so this, not the mean over all cells, is what it has to beat.
    """
    sums, counts = np.zeros(len(cells.vocabulary)), np.zeros(len(cells.vocabulary))
    for epoch in range(MASK_EPOCHS):
        for masked in cells.iterate(epoch):
            genes = masked.chosen_ids.numpy()
            sums += np.bincount(genes, weights=masked.chosen_values.numpy(), minlength=len(sums))
            counts += np.bincount(genes, minlength=len(counts))
    return sums / np.maximum(counts, 1)


def is_hidden(masked: MaskedBatch, num_genes: int) -> npt.NDArray[np.bool_]:
    """(total_chosen,) whether each chosen gene is hidden from the encoder."""

    def numbers(ids: torch.Tensor, cu_seqlens: torch.Tensor) -> npt.NDArray[np.int64]:
        cells = np.repeat(np.arange(masked.batch_size), cu_seqlens.diff().numpy())
        return cells * num_genes + ids.numpy()

    chosen = numbers(masked.chosen_ids, masked.chosen_cu_seqlens)
    return np.isin(chosen, numbers(masked.masked_ids, masked.masked_cu_seqlens))


def correlation(x: Values, y: Values) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    if not len(x) or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def as_table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    measured = results["measured"]
    lines = [
        f"{results['steps']:,} steps, {results['epochs']:.1f} epochs of {results['cells']['training']:,} cells and "
        f"{results['genes']:,} genes in {results['seconds'] / 60:.0f} minutes; validated on "
        f"{results['cells']['validation']:,} cells that were not trained on.",
        "",
        "| prediction | hidden genes | mean squared error | correlation | beyond the gene's mean |",
        "|---|---|---:|---:|---:|",
    ]
    for name, parts in results["masked prediction"].items():
        for part, figures in parts.items():
            correlations = (figures.get(key) for key in ("correlation", "beyond the gene's mean"))
            shown = ["" if r is None else f"{r:.3f}" for r in correlations]
            row = [name, f"{part} ({figures['genes']:,})", f"{figures['mean squared error']:.4f}", *shown]
            lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "`gene mean` predicts each gene's mean over the training cells, `gene mean where chosen` over those in which",
        "it is chosen: expressed genes are chosen ten times as often, so this is the one to beat. `told the zeros`",
        "knows which genes are zero and predicts the mean over expressing cells elsewhere: a mark, no prediction.",
        "Beyond the gene's mean: the correlation when the mean where chosen (among non-zero genes: that over",
        "expressing cells) is taken off both sides, what is known of the cell and not of the gene.",
        "Where truth or prediction does not vary there is no correlation.",
        "",
        f"Measured on {measured['date']} at commit {measured['commit']}: {measured['cpu']}, {measured['isa']} kernels, "
        f"{measured['threads']} threads, torch {measured['torch']}.",
    ]
    return "\n".join(lines) + "\n"


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


def draw(log: Path, path: Path) -> None:
    """Training and validation loss by step, with the baselines."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["event"] == "train"]
    validation = [line for line in lines if line["event"] == "validation"]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([x["step"] for x in train], [x["loss"] for x in train], color="0.75", label="training")
    axes.plot([x["step"] for x in validation], [x["loss"] for x in validation], marker="o", label="validation")
    for key, name, style in (("baseline_mean", "gene mean", "--"), ("baseline_zero_mean", "told the zeros", ":")):
        axes.axhline(validation[-1][key], color="black", linestyle=style, label=name)
    top = max(x["loss"] for x in validation[1:]) if len(validation) > 1 else validation[0]["loss"]
    axes.set(xlabel="step", ylabel="mean squared error, chosen genes", ylim=(0, 1.5 * top))
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
