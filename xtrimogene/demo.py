"""The demo: goes on training the model in the package on scanpy's shipped PBMC, and sees what it knows of them.

    python -m xtrimogene.demo --output demo_output

Runs offline, in a minute or so. Writes report.md, report.json, loss.png, umap.png and the run itself, with the model,
into run/. A fifth of the 700 real cells is held out; how well their labels can be read off the embedding is set beside
the model as it comes, an untrained one and PCA.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import torch

import xtrimogene
from xtg_kernels.info import info
from xtrimogene.bench.tasks import CELL_LENGTHS
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.evaluation.report import table
from xtrimogene.evaluation.spaces import COMPONENTS, NEIGHBOURS, agreement, largest_label, pca
from xtrimogene.network.config import PRESETS, XTrimoGeneConfig
from xtrimogene.network.flops import Counts, FlopCount, dense_flops, encoder_flops, padded_flops
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.log import LOG_FILE, read_log
from xtrimogene.training.pretrain import pretrain
from xtrimogene.training.run_folder import RUN_FILE

LABELS = "bulk_labels"
REAL_GENES = 19_264  # genes of the released vocabulary, the one the committed lengths were counted on
PADDED_BATCH = 64

MODEL = "pbmc-tiny"
STEPS = 1000
CONFIG: dict[str, Any] = {
    "checkpoint": MODEL,
    "normalized": True,
    "min_genes": 0,
    "validation_share": 0.2,
    "tensorboard": False,
}

# Key in obsm -> how the report calls it.
SPACES = {
    "X_xtrimogene": f"{MODEL}, trained on here",
    "X_untrained": "the same network, untrained",
    "X_pca": f"PCA, {COMPONENTS} components",
    "X_shipped": f"{MODEL} as it comes",
}


def load_cells() -> anndata.AnnData:
    """700 PBMC x 765 genes from inside the scanpy package: log-normalised (.raw; X itself is scaled), with labels."""
    import scanpy

    return scanpy.datasets.pbmc68k_reduced().raw.to_adata()


def load_lengths() -> dict[str, Any]:
    """The committed list of expressed genes per cell of a real data set: keys `source` and `lengths`."""
    lengths: dict[str, Any] = json.loads(CELL_LENGTHS.read_text(encoding="utf-8"))
    return lengths


def flop_row(
    cells: str, preset: str, num_genes: int, lengths: Counts, distinct: Counts | None = None
) -> dict[str, Any]:
    """One row of the FLOP table: forward FLOPs of the encoder, ragged, padded and dense, on cells of these lengths."""
    config = XTrimoGeneConfig.preset(preset, num_genes=num_genes)
    ragged: FlopCount = encoder_flops(config, lengths, distinct)
    dense = dense_flops(config, len(lengths))
    return {
        "cells": cells,
        "preset": preset,
        "num_cells": len(lengths),
        "num_genes": num_genes,
        "mean_length": float(np.mean(lengths)),
        "embedding": ragged.embedding,
        "linear": ragged.linear,
        "attention": ragged.attention,
        "total": ragged.total,
        "padded": padded_flops(config, lengths, PADDED_BATCH).total,
        "dense": dense.total,
        "share_of_dense": ragged.total / dense.total,
    }


def train(cells: anndata.AnnData, folder: Path, steps: int) -> dict[str, Any]:
    """Go on training the model for so many steps, into a folder that is replaced if it holds an earlier run."""
    if (folder / RUN_FILE).exists():
        shutil.rmtree(folder)
    changes = {
        "max_steps": steps,
        "validate_every": max(1, steps // 10),
        "checkpoint_every": steps,
    }
    report = pretrain(PretrainConfig.from_dict({**CONFIG, **changes}, recipe="tune"), cells, folder)
    lines = list(read_log(folder / LOG_FILE))
    return {
        "steps": report.steps,
        "epochs": report.epochs,
        "cells": report.cells,
        "seconds": report.seconds,
        "cells_per_second": report.cells / report.seconds,
        "hidden": [[line["step"], line["hidden_loss"]] for line in lines if line["event"] == "validation"],
        "training": [[line["step"], line["loss"]] for line in lines if line["event"] == "train"],
        "ridge": report.ridge_hidden_loss,
    }


def split(cells: anndata.AnnData) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Numbers of the cells that training sees, and of those that it does not."""
    with TrainingCells(
        cells,
        xtrimogene.XTrimoGene.from_pretrained(MODEL).vocabulary,
        normalized=True,
        min_genes=CONFIG["min_genes"],
        validation_share=CONFIG["validation_share"],
        progress=False,
    ) as data:
        return data.training, data.validation_cells


def draw_loss(training: dict[str, Any], path: Path) -> None:
    """Write a picture of the losses of a run and of the ridge."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training["training"], strict=True), color="tab:gray", lw=0.5, label="training, chosen genes")
    axes.plot(
        *zip(*training["hidden"], strict=True), color="tab:blue", marker="o", ms=3, label="held out, hidden genes"
    )
    axes.axhline(training["ridge"], color="tab:orange", ls="--", label="ridge, the same genes")
    top = max(loss for _, loss in training["hidden"])
    axes.set(xlabel="step", ylabel="mean squared error", ylim=(0, 1.25 * max(top, training["ridge"])))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def draw(cells: anndata.AnnData, spaces: dict[str, str], path: Path) -> None:
    """Write a picture with one UMAP of the cells per space: obsm key -> title."""
    import scanpy
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(spaces) + 2.5, 5.5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(spaces)), spaces.items(), strict=True):
        scanpy.pp.neighbors(cells, n_neighbors=NEIGHBOURS, use_rep=key, random_state=0)
        scanpy.tl.umap(cells, random_state=0)
        for index, label in enumerate(cells.obs[LABELS].cat.categories):
            points = cells.obsm["X_umap"][(cells.obs[LABELS] == label).to_numpy()]
            axes.scatter(points[:, 0], points[:, 1], s=8, color=colormaps["tab10"](index), label=label)
        axes.set(title=title, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)


def flop_table(rows: Sequence[dict[str, Any]]) -> str:
    """The FLOP rows as a table, in GFLOP per cell."""
    header = ["cells", "model", "genes", "mean length", "ragged", "padded", "dense", "ragged / dense"]
    cells = [
        [row["cells"], row["preset"], f"{row['num_genes']:,}", f"{row['mean_length']:,.0f}"]
        + [f"{row[name] / row['num_cells'] / 1e9:,.2f}" for name in ("total", "padded", "dense")]
        + [f"{100 * row['share_of_dense']:.1f} %"]
        for row in rows
    ]
    return table(header, cells)


def loss_table(training: dict[str, Any]) -> str:
    """The losses at hidden genes of held-out cells, at a few steps of the run, and the ridge's."""
    losses = training["hidden"]
    shown = sorted({round(i * (len(losses) - 1) / 4) for i in range(5)})
    rows = [[f"after step {losses[i][0]:,}", f"{losses[i][1]:.4f}"] for i in shown]
    rows.append(["ridge on depth and principal components", f"{training['ridge']:.4f}"])
    return table(["hidden genes of held-out cells", "mean squared error"], rows)


def loss_verdict(training: dict[str, Any]) -> str:
    """What the losses say, in words."""
    began, ended, ridge = training["hidden"][0][1], training["hidden"][-1][1], training["ridge"]

    def against(loss: float) -> str:
        return f"{100 * abs(loss / ridge - 1):.1f} % {'less' if loss < ridge else 'more'}"

    return (
        "A ridge for each gene, on how deep a cell is and on its principal components, fitted to the training cells, "
        f"is what a network has to pass: the model has {against(began)} squared error as it comes, {against(ended)} "
        "after training on."
    )


def agreement_verdict(scores: dict[str, dict[str, float]], num_asked: int) -> str:
    """What the agreement with labels says, in words; differences within chance are called so."""
    ours, *others = (scores[key] for key in ("X_xtrimogene", "X_untrained", "X_pca"))
    sentences = []
    for name, reader in (("neighbours", "nearest neighbours"), ("probe", "a linear probe")):
        words = []
        for other, called in zip(others, ("the untrained one", "PCA"), strict=True):
            mean = (ours[name] + other[name]) / 2
            # Two standard errors of the difference of two shares of as many cells.
            chance = 2 * (2 * mean * (1 - mean) / num_asked) ** 0.5
            difference = ours[name] - other[name]
            word = (
                "better than" if difference > chance else "worse than" if -difference > chance else "about as well as"
            )
            words.append(f"{word} off {called} ({ours[name]:.3f}, {other[name]:.3f})")
        sentences.append(f"By {reader}, labels are read off the trained embedding {' and '.join(words)}.")
    return " ".join(sentences)


def run(output: Path, steps: int = STEPS) -> dict[str, Any]:
    """Train on, embed, print the figures, write the report to the folder; returns the figures of report.json."""
    lengths_file = load_lengths()
    output.mkdir(parents=True, exist_ok=True)
    cells = load_cells()
    matrix = cells.X.tocsr()
    lengths = np.diff(matrix.indptr)
    distinct = [len(np.unique(matrix[cell].data)) for cell in range(cells.n_obs)]
    known, asked = split(cells)
    print(
        f"{cells.n_obs} cells x {cells.n_vars} genes, {lengths.sum():,} expressed genes (PBMC shipped with scanpy); "
        f"{len(known)} to train on, {len(asked)} held out"
    )

    training = train(cells, output / "run", steps)
    print(
        f"\nTrained {MODEL} on for {training['seconds']:.0f} s: {training['steps']:,} steps, {training['epochs']:.0f} "
        f"epochs, {training['cells_per_second']:,.0f} cells/s\n\n{loss_table(training)}\n{loss_verdict(training)}\n"
    )
    draw_loss(training, output / "loss.png")

    report = xtrimogene.embed(cells, output / "run" / "model", key_added="X_xtrimogene", normalized=True)
    shipped = xtrimogene.XTrimoGene.from_pretrained(MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = xtrimogene.XTrimoGene(shipped.config, shipped.vocabulary).eval()
    for key, model in (("X_shipped", shipped), ("X_untrained", fresh)):
        xtrimogene.embed(cells, model, key_added=key, normalized=True, progress=False)
    speed = {
        "seconds": report.seconds,
        "seconds_encoder": report.seconds_encoder,
        "cells_per_second": report.cells_per_second,
        "tokens_per_second": report.tokens / report.seconds,
        "dtype": report.dtype,
        "backend": report.backend,
    }
    print(f"{report}, {speed['tokens_per_second']:,.0f} tokens/s\n")

    parts = (known, asked)
    spaces = {key: [cells.obsm[key][part] for part in parts] for key in SPACES if key != "X_pca"}
    spaces["X_pca"] = pca(*(matrix[part] for part in parts))
    cells.obsm["X_pca"] = np.empty((cells.n_obs, spaces["X_pca"][0].shape[1]))
    for part, points in zip(parts, spaces["X_pca"], strict=True):
        cells.obsm["X_pca"][part] = points
    labels = [cells.obs[LABELS].astype(str).to_numpy()[part] for part in parts]
    scores = {key: agreement(*spaces[key], *labels) for key in SPACES}
    largest = largest_label(*labels)
    shown = [[SPACES[key], f"{score['neighbours']:.3f}", f"{score['probe']:.3f}"] for key, score in scores.items()]
    shown.append(["always the largest label", f"{largest:.3f}", f"{largest:.3f}"])
    scores_table = table(["space", f"{NEIGHBOURS} nearest neighbours", "linear probe"], shown)
    verdict = agreement_verdict(scores, len(asked))
    print(f"Labels of the {len(asked)} held-out cells, read off by those of the others:\n{scores_table}\n{verdict}\n")

    rows = [flop_row("these", "tiny", cells.n_vars, lengths, distinct)]
    rows += [flop_row("real lengths", preset, REAL_GENES, lengths_file["lengths"]) for preset in PRESETS]
    print("Forward GFLOP a cell of the encoder:\n" + flop_table(rows) + "\n")

    draw(cells, {key: SPACES[key] for key in ("X_untrained", "X_xtrimogene", "X_pca")}, output / "umap.png")
    machine = info()
    figures = {
        "cells": {
            "num_cells": cells.n_obs,
            "num_genes": cells.n_vars,
            "tokens": int(lengths.sum()),
            "training": len(known),
            "held_out": len(asked),
        },
        "machine": machine,
        "training": training,
        "speed": speed,
        "flops": rows,
        "agreement": {**scores, "largest_label": largest},
    }
    (output / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (output / "report.md").write_text(
        _REPORT.format(
            name=MODEL,
            genes=len(shipped.vocabulary),
            genes_found=report.genes_found,
            num_cells=cells.n_obs,
            num_genes=cells.n_vars,
            num_known=len(known),
            num_asked=len(asked),
            mean_length=lengths.mean(),
            mean_distinct=np.mean(distinct),
            source=lengths_file["source"],
            num_real=len(lengths_file["lengths"]),
            padded_batch=PADDED_BATCH,
            training=training,
            masking=PretrainConfig().masking,
            losses=loss_table(training),
            loss_verdict=loss_verdict(training),
            speed=speed,
            machine=machine,
            isa=machine["isa"] or "no ISA: the C++ extension is not built",
            flops=flop_table(rows),
            neighbours=NEIGHBOURS,
            scores=scores_table,
            scores_verdict=verdict,
        ),
        encoding="utf-8",
    )
    print(f"wrote report.md, report.json, loss.png, umap.png and run/ to {output}/")
    return figures


_REPORT = """# Demo: the model in the package, trained on by 700 real cells

The cells are the {num_cells} peripheral blood cells (PBMC, "fresh 68k PBMC" of 10x, donor A) that scanpy ships:
{num_genes} genes, {mean_length:.0f} of them expressed in a cell on average, with {mean_distinct:.0f} distinct values.
Their matrix is log-normalised already (`adata.raw`; scanpy's `X` is scaled), so everything runs with `normalized=True`.
`{name}` was trained on other cells: bead-purified PBMC, some of the same donor, PBMC3k and gut. {genes_found} of its
{genes:,} genes are here. {num_known} cells are trained on, {num_asked} held out: neither the run that made `{name}` nor
this one has seen them before they are judged by.

## Training on

`{name}` and the recipe `tune`: {training[steps]:,} steps, nine tenths of them of the product head alone,
{training[epochs]:.0f} passes over the cells, {training[seconds]:.0f} s, {training[cells_per_second]:,.0f} cells/s. In
each cell {masking.nonzero_rate:.0%} of the expressed and {masking.zero_rate:.0%} of the other genes are chosen, most of
them hidden, and their values predicted.

{losses}

{loss_verdict}

![Loss](loss.png)

## Labels

A cell's embedding is its vector in the product head, through which the prediction of every gene goes. Labels
(`bulk_labels`) of the held-out cells, read off by those of the training cells: accuracy of a vote of the {neighbours}
nearest neighbours (Euclidean), and of a logistic regression. Neither model nor PCA was shown a label; PCA was fitted to
the training cells.

{scores}

{scores_verdict}

![UMAP of the untrained and the trained embedding and of PCA](umap.png)

## Speed of embedding

{speed[cells_per_second]:,.0f} cells/s, {speed[tokens_per_second]:,.0f} tokens/s: {speed[seconds]:.2f} s in all,
{speed[seconds_encoder]:.2f} s of it in the encoder, {speed[dtype]}, backend {speed[backend]},
{machine[threads]} threads on {machine[cpu]} (kernels for {isa}), torch {machine[torch]}.

## FLOPs

Forward GFLOP a cell of the encoder, two for a multiply-add. "Ragged" is what runs here; "padded" is the same encoder
with batches of {padded_batch} cells padded to the longest; "dense" is a Transformer of the same width and depth over
every gene of the vocabulary, its embedding not counted. "Real lengths": {num_real} cells
({source}). Their distinct values are unknown, so each token counts as one.

{flops}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: python -m xtrimogene.demo [--output DIR] [--steps N]."""
    parser = argparse.ArgumentParser(prog="python -m xtrimogene.demo", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the report")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    given = parser.parse_args(arguments)
    run(given.output, given.steps)


if __name__ == "__main__":
    main()
