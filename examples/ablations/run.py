"""What each part of the recipe "small" is worth: python examples/ablations/run.py DATA [NAME ...]

Trains the product head alone, as the first steps of a run do, on the training cells of examples/pretrain_pbmc, with
one thing changed at a time and all else the same, for three seeds and the same number of steps; then judges it at the
hidden genes of the held-out cells. DATA is the folder that examples/pretrain_pbmc/run.py takes. Each result is appended
to results.jsonl; what is there already is not run again. results.md is the table of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import runpy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xtrimogene.cells.data_sets import genes_of_data
from xtrimogene.cells.stream import VALIDATION_EPOCH, TrainingCells
from xtrimogene.evaluation.bars import RIDGE, figures
from xtrimogene.evaluation.hidden import HiddenGenes
from xtrimogene.evaluation.spaces import agreement
from xtrimogene.network import model as network_module
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.validation import chosen_means, evenly_spaced, gene_means, ridge_bar

HERE = Path(__file__).parent
PRETRAIN_PBMC = runpy.run_path(str(HERE.parent / "pretrain_pbmc" / "run.py"))

STEPS = 1000
SEEDS = (0, 1, 2)
READING: dict[str, Any] = {"gene_symbols": "symbol", "min_genes": 200, "progress": False}
PARTS = ("all", "non-zero")

Changes = dict[str, Any]
# What is changed, by name. Keys: of the model's config; learning_rate, beta2, weight_decay; hiding, FURTHER_HIDDEN of
# the loss; loss; features, channels that the head does not see; linear, without its hidden layer; bias, a factor of
# what it begins with; ema.
VARIANTS: dict[str, Changes] = {
    "the recipe": {},
    "without the depth numbers": {"features": slice(0, 3)},
    "without the sum of values times rows": {"features": slice(3, 67)},
    "without the hidden layer": {"linear": True},
    "the bias begins at zero": {"bias": 0.0},
    "loss at the chosen genes alone": {"loss": "chosen"},
    "no further hiding": {"hiding": 0.0},
    "further hiding up to 0.3": {"hiding": 0.3},
    "further hiding up to 0.9": {"hiding": 0.9},
    "beta2 0.95": {"beta2": 0.95},
    "beta2 0.999": {"beta2": 0.999},
    "rate 2e-3": {"learning_rate": 2e-3},
    "rate 1e-2": {"learning_rate": 1e-2},
    "weight decay 0.1": {"weight_decay": 0.1},
    "no dropout": {"product_dropout": 0.0},
    "dropout 0.4": {"product_dropout": 0.4},
    "gene table drawn at 0.02": {"gene_std": 0.02},
    "gene table drawn at 0.2": {"gene_std": 0.2},
    "gene table drawn at 1": {"gene_std": 1.0},
    "width 32": {"product_head": 32},
    "width 128": {"product_head": 128},
    "dim 128": {"dim": 128},
    "average of the weights (EMA, 0.995)": {"ema": 0.995},
}


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("names", nargs="*", default=list(VARIANTS), help="of the changes; all")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder of the split cells")
    options = parser.parse_args()
    results = HERE / "results.jsonl"
    train, held_out = PRETRAIN_PBMC["split"](options.data, options.work)
    vocabulary = genes_of_data(train, layer=None, gene_symbols="symbol")
    with (
        TrainingCells(train, vocabulary, validation_share=0.0, batch_cells=32, **READING) as cells,
        TrainingCells(held_out, vocabulary, validation_share=0.0, **READING) as asked,
    ):
        bar = ridge_bar(cells, PretrainConfig().masking, len(cells.training))
        hidden = HiddenGenes.of(asked.masked(asked.training, VALIDATION_EPOCH), len(vocabulary))
        ridge = figures(bar.predict(hidden), hidden, bar.means)
        for seed, name in itertools.product(SEEDS, options.names):
            known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
            if any((each["name"], each["seed"], each["steps"]) == (name, seed, options.steps) for each in known):
                continue
            began = time.process_time()
            model = trained(VARIANTS[name], seed, cells, options.steps)
            seconds = time.process_time() - began
            model.eval()
            with torch.no_grad():
                judged = HiddenGenes.of(asked.masked(asked.training, VALIDATION_EPOCH), len(vocabulary), model)
            assert judged.predictions is not None
            found = {
                "name": name,
                "seed": seed,
                "steps": options.steps,
                "cpu seconds": seconds,
                "hidden genes": figures(judged.predictions, judged, bar.means),
                "labels": labels_of(model, cells, asked, train[0], held_out[0]),
                RIDGE: ridge,
                "measured": PRETRAIN_PBMC["where"](),
            }
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(name, seed, f"{seconds:.0f} s", found["hidden genes"]["all"], found["labels"], flush=True)
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    budgets = sorted({line["steps"] for line in lines})
    tables = [as_table([line for line in lines if line["steps"] == steps]) for steps in budgets]
    (HERE / "results.md").write_text("\n".join(tables), encoding="utf-8")


def trained(changes: Changes, seed: int, cells: TrainingCells, steps: int) -> XTrimoGeneNetwork:
    """A network whose product head has learned alone, as in the first steps of a run."""
    config = PretrainConfig.from_dict({"seed": seed}, recipe="small")
    sizes = {key: changes[key] for key in ("product_dropout", "gene_std", "product_head", "dim") if key in changes}
    torch.manual_seed(seed)
    model = XTrimoGeneNetwork(
        PretrainConfig.from_dict({"model": {**config.model, **sizes}}, recipe="small").model_config(
            len(cells.vocabulary)
        ),
        cells.vocabulary,
    )
    head = model.product_head
    assert head is not None
    means = torch.from_numpy(chosen_means(gene_means(cells, 20_000), config.masking))
    head.gene_bias.data[: len(cells.vocabulary)] = means * changes.get("bias", 1.0)
    if "features" in changes:
        blind = torch.ones(head.norm.weight.shape)
        blind[changes["features"]] = 0
        head.norm.register_forward_pre_hook(lambda _, arguments: (arguments[0] * blind,))
    parameters = [model.embedding.gene_table, *head.parameters()]
    if changes.get("linear"):
        head.out.weight.requires_grad_(False).zero_()
    optimizer = torch.optim.AdamW(
        parameters,
        betas=(config.beta1, changes.get("beta2", config.beta2)),
        weight_decay=changes.get("weight_decay", config.weight_decay),
        fused=True,
    )
    average = [parameter.detach().clone() for parameter in parameters] if "ema" in changes else []
    settling = list(cells.masked(evenly_spaced(cells.training, 512), 0))
    masking, loss_of = config.masking, _LOSSES[changes.get("loss", "dense")]
    scale = changes.get("learning_rate", config.head_learning_rate) / config.head_learning_rate
    batches = _batches(cells)
    with mock.patch.object(network_module, "FURTHER_HIDDEN", changes.get("hiding", network_module.FURTHER_HIDDEN)):
        for step in range(steps):
            if step % 200 == 0:
                settle(model, settling)
            model.train()
            masked = next(batches)
            torch.manual_seed(seed * steps + step)
            loss = loss_of(model, masked, masking.nonzero_rate, masking.zero_rate)
            (loss / masked.total_chosen).backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            # One more: there is no step of the whole network after these.
            rate = PretrainConfig.from_dict({"max_steps": steps + 1}, recipe="small").rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = scale * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for kept, parameter in zip(average, parameters, strict=False):
                kept.lerp_(parameter.detach(), 1 - changes["ema"])
    for kept, parameter in zip(average, parameters, strict=False):
        parameter.data.copy_(kept)
    settle(model, settling)
    return model


def _batches(cells: TrainingCells) -> Iterator[MaskedBatch]:
    for epoch in itertools.count():
        yield from cells.iterate(epoch)


def _dense(model: XTrimoGeneNetwork, masked: MaskedBatch, nonzero_rate: float, zero_rate: float) -> Tensor:
    return model.product_loss(masked, nonzero_rate, zero_rate)


def _chosen(model: XTrimoGeneNetwork, masked: MaskedBatch, nonzero_rate: float, zero_rate: float) -> Tensor:
    head, table = model.product_head, model.embedding.gene_table[:-1]
    assert head is not None
    predicted = head(table, model.product_features(masked.batch, None))
    cells = torch.repeat_interleave(masked.chosen_cu_seqlens.diff().long())
    return F.mse_loss(predicted[cells, masked.chosen_ids.long()], masked.chosen_values, reduction="sum")


_LOSSES: dict[str, Callable[[XTrimoGeneNetwork, MaskedBatch, float, float], Tensor]] = {
    "dense": _dense, "chosen": _chosen,
}  # fmt: skip


def settle(model: XTrimoGeneNetwork, batches: list[MaskedBatch]) -> None:
    """Give the head's norm the moments of these cells."""
    assert model.product_head is not None
    model.eval()
    with torch.no_grad():
        model.product_head.norm.settle(torch.cat([model.product_features(each.batch, None) for each in batches]))


def labels_of(
    model: XTrimoGeneNetwork, cells: TrainingCells, asked: TrainingCells, train: Path, held_out: Path
) -> dict[str, float]:
    """Cell types of the held-out cells of the first data set, read off the head's vectors by those of the others."""
    import anndata

    vectors, labels = [], []
    for stream, path in ((cells, train), (asked, held_out)):
        names = anndata.read_h5ad(path, backed="r").obs[PRETRAIN_PBMC["LABEL"]].astype(str).to_numpy()
        own = stream.training[stream.training < len(names)]
        assert model.product_head is not None
        with torch.no_grad():
            found = [
                model.product_head.cells(model.product_features(stream.read(own[start : start + 256]), None))
                for start in range(0, len(own), 256)
            ]
        vectors.append(torch.cat(found).numpy())
        labels.append(names[own])
    return agreement(*vectors, *labels)


def as_table(lines: list[dict[str, Any]]) -> str:
    """Mean and half of the range over the seeds, the best first, as Markdown."""

    def cell(values: list[float], digits: int) -> str:
        return f"{np.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"

    first = lines[0]
    rows = []
    for name in {line["name"] for line in lines}:
        own = [line for line in lines if line["name"] == name]
        error = [line["hidden genes"]["all"]["mean squared error"] for line in own]
        row = [f"**{name}**" if name == "the recipe" else name, cell(error, 4)]
        row += [cell([line["hidden genes"][part]["beyond the mean"] for line in own], 3) for part in PARTS]
        row += [cell([line["labels"][reader] for line in own], 3) for reader in ("neighbours", "probe")]
        rows.append((np.mean(error), [*row, f"{np.median([line['cpu seconds'] for line in own]):.0f}"]))
    ridge = first[RIDGE]
    rows.append(
        (
            ridge["all"]["mean squared error"],
            ["ridge on depth and 20 components", f"{ridge['all']['mean squared error']:.4f}"]
            + [f"{ridge[part]['beyond the mean']:.3f}" for part in PARTS]
            + ["", "", ""],
        )
    )
    head = ["changed", "error", "beyond the mean", "the same, non-zero", "labels, neighbours", "labels, probe", "CPU s"]
    table = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    table += [f"| {' | '.join(row)} |" for _, row in sorted(rows, key=lambda pair: pair[0])]
    seeds = sorted({line["seed"] for line in lines})
    commits = ", ".join(sorted({line["measured"]["commit"] for line in lines}))
    note = (
        f"{first['steps']:,} steps of the head alone, one change at a time, {len(seeds)} seeds: mean and half of the "
        "range. "
        f"Error is the mean squared one at hidden genes. Commit {commits}; {first['measured']['cpu']}, "
        f"{first['measured']['threads']} thread."
    )
    return "\n".join([note, "", *table]) + "\n"


if __name__ == "__main__":
    main()
