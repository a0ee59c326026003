"""Trains pbmc-tiny, the model in the package, and judges it by held-out cells: python examples/pbmc_tiny/run.py DATA

DATA is a folder with zheng_pbmc_facs.h5ad (BSD-2-Clause), pbmc3k_counts_labelled.h5ad (MIT) and
scp1884_gut_1020cells.h5ad (Apache-2.0): raw counts, cell types in obs["celltype"]. A tenth of the cells of each is held
out. Writes the model with its card into xtrimogene/models/pbmc-tiny, the evaluations, the log of the run and a UMAP of
cells that scanpy ships, which are not among these, into this folder. What is trained is in OUTPUT/run; started again it
goes on.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import numpy.typing as npt
import torch

import xtrimogene
from xtrimogene import Vocabulary, XTrimoGene, embed
from xtrimogene.demo import draw, load_cells
from xtrimogene.evaluation.evaluate import Evaluation, evaluate
from xtrimogene.evaluation.report import masked_table, spaces_table, verdict, write
from xtrimogene.network import folder
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.pretrain import pretrain
from xtrimogene.training.run import PretrainReport

HERE = Path(__file__).parent
NAME = "pbmc-tiny"
SOURCES = {
    "zheng_pbmc_facs.h5ad": "bead-purified PBMC (Zheng et al. 2017, 10x; stephenslab/fastTopics, BSD-2-Clause)",
    "pbmc3k_counts_labelled.h5ad": "10x PBMC3k (rnabioco/clustifyrdata, MIT)",
    "scp1884_gut_1020cells.h5ad": "gut biopsies (SCP1884; BiomedSciAI/biomed-multi-omic, Apache-2.0)",
}
LABELLED = "zheng_pbmc_facs.h5ad"
LABEL = "celltype"
GENES = 4000
HELD_OUT = 0.1
MIN_GENES = 100
# Beside the recipe "small".
CHANGES = {
    "min_genes": MIN_GENES,
    "gene_symbols": "symbol",
    "precision": "bfloat16",
    "max_steps": 4600,
    "validation_cells": 300,
    "log_every": 10,
    "validate_every": 500,
    "checkpoint_every": 250,
    "tensorboard": False,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, or goes on training, then evaluates and writes the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder with " + ", ".join(SOURCES))
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the run and of the evaluations")
    parser.add_argument(
        "--model", type=Path, default=Path(xtrimogene.__file__).parent / "models" / NAME, help="folder of the model"
    )
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of the config")
    options = parser.parse_intermixed_args(arguments)
    train, held_out = split(options.data, options.output / "data")
    vocabulary = options.output / "data" / "genes.tsv"
    if not vocabulary.exists():
        common_genes(train, GENES).save(vocabulary)
    changes = [f"{key}={value}" for key, value in {**CHANGES, "vocabulary": vocabulary}.items()]
    config = PretrainConfig.from_yaml(None, [*changes, *options.changes], recipe="small")
    report = pretrain(config, train, options.output / "run", resume=True)
    print(report)
    if report.model is None:
        return
    shutil.copy(options.output / "run" / "log.jsonl", options.output / "log.jsonl")
    model = rounded(XTrimoGene.from_pretrained(report.model))
    reading = {"gene_symbols": "symbol", "min_genes": MIN_GENES, "progress": False}
    number = list(SOURCES).index(LABELLED)
    everything = evaluate(model, held_out, train_data=train, **reading)
    labelled = evaluate(model, held_out[number], train_data=train[number], label=LABEL, **reading)
    for evaluation, name in ((everything, "masked"), (labelled, "labels")):
        write(evaluation, options.output / name)
    tensors = dict(model.state_dict())
    tensors["embedding.gene_table"] = tensors["embedding.gene_table"].bfloat16()
    card = card_of(report, config, everything, labelled)
    folder.save(options.model, tensors, model.config, model.vocabulary, card=card, overwrite=True)
    cells = load_cells()
    embed(cells, model, normalized=True, progress=False)
    draw(cells, {"X_xtrimogene": NAME, "X_pca": "principal components"}, options.output / "umap.png")
    print(masked_table(everything), verdict(everything), spaces_table(labelled), sep="\n\n")


def split(data: Path, target: Path) -> tuple[list[Path], list[Path]]:
    """Copies of the data sets, genes named by var["symbol"]: nine tenths of each to train on, and one to judge by."""
    files: tuple[list[Path], list[Path]] = ([], [])
    for name in SOURCES:
        parts = [target / part / name for part in ("train", "held_out")]
        if not all(part.exists() for part in parts):
            cells = anndata.read_h5ad(data / name)
            if "symbol" not in cells.var:
                cells.var["symbol"] = [str(symbol).split("_ENSG")[0] for symbol in cells.var_names]
            held = np.random.default_rng(0).random(cells.n_obs) < HELD_OUT
            for part, rows in zip(parts, (~held, held), strict=True):
                part.parent.mkdir(parents=True, exist_ok=True)
                cells[rows].write_h5ad(part.with_suffix(".partial"))
                part.with_suffix(".partial").rename(part)
        for found, part in zip(files, parts, strict=True):
            found.append(part)
    return files


def common_genes(files: Sequence[Path], count: int) -> Vocabulary:
    """The genes that most training cells express, in alphabetical order."""
    expressed: dict[str, int] = {}
    for path in files:
        cells = anndata.read_h5ad(path)
        counts: npt.NDArray[np.int64] = np.asarray((cells.X > 0).sum(axis=0)).ravel()
        for symbol, number in zip(cells.var["symbol"].astype(str), counts.tolist(), strict=True):
            expressed[symbol] = expressed.get(symbol, 0) + number
    commonest = sorted(expressed, key=lambda symbol: (-expressed[symbol], symbol))[:count]
    return Vocabulary(sorted(commonest))


def rounded(model: XTrimoGene) -> XTrimoGene:
    """The model as it will be read: its gene table rounded to bfloat16."""
    with torch.no_grad():
        table = model.embedding.gene_table
        table.copy_(table.bfloat16())
    return model


def card_of(
    report: PretrainReport, config: PretrainConfig, everything: Evaluation, labelled: Evaluation
) -> dict[str, str]:
    """The sections of the model card."""
    assert labelled.spaces is not None
    cells = everything.cells
    return {
        "Data": "\n".join(
            [
                f"{cells['known']:,} cells to train on and {cells['judged']:,} held out, a tenth of each data set:",
                "",
                *(f"- {what}" for what in SOURCES.values()),
                "",
                f"Genes: the {everything.genes['vocabulary']:,} that most training cells express, by symbol.",
            ]
        ),
        "Recipe": "`python examples/pbmc_tiny/run.py DATA` (`pretrain --recipe small`), "
        f"{report.steps:,} steps, {report.epochs:.1f} epochs, {report.cells:,} cells in {report.seconds / 60:.0f} "
        f"minutes on a CPU; learning rate {config.learning_rate:g}, {config.precision}, seed {config.seed}. The gene "
        "table is kept in bfloat16.",
        "Figures": "\n\n".join(
            [
                "By `xtrimogene evaluate`, on the held-out cells; the bars are fitted to the training cells.",
                masked_table(everything),
                verdict(everything),
                f"Cell types of the {labelled.cells['judged']:,} held-out bead-purified PBMC:",
                spaces_table(labelled),
            ]
        ),
        "Limits": "Human blood and a little gut, all of it 10x; other tissues, species and platforms were not tried. "
        "The held-out cells are of the donors and laboratories that it was trained on: at deeper cells of another "
        "laboratory, its predictions of hidden genes are worse than each gene's mean there, until it is trained on "
        "with them (examples/pbmc_tiny/other_laboratory.py). It is small: for trying things out, for tests, and to go "
        "on training from.",
    }


if __name__ == "__main__":
    main()
