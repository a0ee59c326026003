"""The demo: embeds scanpy's shipped PBMC (700 real cells) with a fresh model and reports speed, FLOPs and neighbours.

    python -m xtrimogene.demo --output demo_output

Runs offline from a checkout of the repository, whose benchmarks/cell_lengths.json it reads. Writes report.md,
report.json and umap.png. The model is untrained: the figures say how fast and how cheap it runs, not how good it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np

import xtrimogene
from xtg_kernels.info import info
from xtrimogene.config import PRESETS, XTrimoGeneConfig
from xtrimogene.flops import Counts, FlopCount, dense_flops, encoder_flops, padded_flops

CELL_LENGTHS = Path(__file__).parents[1] / "benchmarks" / "cell_lengths.json"
KEY = "X_xtrimogene"
LABELS = "bulk_labels"
REAL_GENES = 19_264  # genes of the released vocabulary, the one the committed lengths were counted on
PADDED_BATCH = 64
NEIGHBOURS = 15
FOLDS = 5


def load_cells() -> anndata.AnnData:
    """700 PBMC x 765 genes from inside the scanpy package: log-normalised (.raw; X itself is scaled), with labels."""
    import scanpy

    return scanpy.datasets.pbmc68k_reduced().raw.to_adata()


def load_lengths() -> dict[str, Any]:
    """The committed list of expressed genes per cell of a real data set: keys `source` and `lengths`."""
    if not CELL_LENGTHS.is_file():
        raise FileNotFoundError(f"{CELL_LENGTHS}: no such file; run the demo from a checkout of the repository")
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


def neighbour_accuracy(points: np.ndarray, labels: Sequence[str]) -> float:
    """Accuracy of a k-nearest-neighbour vote (Euclidean, k = 15) over 5 stratified folds, shuffled with seed 0."""
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    scores = cross_val_score(KNeighborsClassifier(NEIGHBOURS), points, np.asarray(labels), cv=folds)
    return float(scores.mean())


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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the columns padded, so that it reads well on a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


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


def run(output: Path) -> dict[str, Any]:
    """Embed the cells, print the figures, write the report to the folder; returns the figures of report.json."""
    lengths_file = load_lengths()
    output.mkdir(parents=True, exist_ok=True)
    cells = load_cells()
    matrix = cells.X.tocsr()
    lengths = np.diff(matrix.indptr)
    distinct = [len(np.unique(matrix[cell].data)) for cell in range(cells.n_obs)]
    print(f"{cells.n_obs} cells x {cells.n_vars} genes, {lengths.sum():,} expressed genes (PBMC shipped with scanpy)")

    model = xtrimogene.XTrimoGene.from_preset("3m", xtrimogene.Vocabulary.from_adata(cells), seed=0)
    report = xtrimogene.embed(cells, model, key_added=KEY, normalized=True)
    speed = {
        "seconds": report.seconds,
        "seconds_encoder": report.seconds_encoder,
        "cells_per_second": report.cells_per_second,
        "tokens_per_second": report.tokens / report.seconds,
        "dtype": report.dtype,
        "backend": report.backend,
    }
    print(f"{report}, {speed['tokens_per_second']:,.0f} tokens/s\n")

    real = lengths_file["lengths"]
    rows = [flop_row("these", "3m", cells.n_vars, lengths, distinct)]
    rows += [flop_row("real lengths", preset, REAL_GENES, real) for preset in PRESETS]
    print("Forward GFLOP a cell:\n" + flop_table(rows) + "\n")

    import scanpy

    scanpy.pp.pca(cells, n_comps=50, random_state=0)
    labels = cells.obs[LABELS]
    accuracy = {
        "xtrimogene_3m_untrained": neighbour_accuracy(cells.obsm[KEY], labels),
        "pca_50": neighbour_accuracy(cells.obsm["X_pca"], labels),
        "largest_label": float(labels.value_counts(normalize=True).iloc[0]),
    }
    names = ["xTrimoGene 3m, untrained, mean pooling", "PCA, 50 components", "always the largest label"]
    agreement = table(
        ["space", "accuracy"],
        [[name, f"{value:.3f}"] for name, value in zip(names, accuracy.values(), strict=True)],
    )
    print(f"Agreement of the {NEIGHBOURS} nearest neighbours with the labels (the model is untrained):\n{agreement}\n")

    draw(cells, {KEY: "xTrimoGene 3m, untrained", "X_pca": "PCA, 50 components"}, output / "umap.png")
    machine = info()
    figures = {
        "cells": {"num_cells": cells.n_obs, "num_genes": cells.n_vars, "tokens": int(lengths.sum())},
        "machine": machine,
        "speed": speed,
        "flops": rows,
        "neighbour_accuracy": accuracy,
    }
    (output / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (output / "report.md").write_text(
        _REPORT.format(
            num_cells=cells.n_obs,
            num_genes=cells.n_vars,
            mean_length=lengths.mean(),
            mean_distinct=np.mean(distinct),
            source=lengths_file["source"],
            num_real=len(real),
            padded_batch=PADDED_BATCH,
            speed=speed,
            machine=machine,
            isa=machine["isa"] or "no ISA: the C++ extension is not built",
            flops=flop_table(rows),
            neighbours=NEIGHBOURS,
            folds=FOLDS,
            agreement=agreement,
        ),
        encoding="utf-8",
    )
    print(f"wrote report.md, report.json and umap.png to {output}/")
    return figures


_REPORT = """# Demo: 700 real cells through an xTrimoGene encoder

The cells are the {num_cells} peripheral blood cells (PBMC) that scanpy ships: {num_genes} genes, {mean_length:.0f} of
them expressed in a cell on average, with {mean_distinct:.0f} distinct values. Their matrix is log-normalised already
(`adata.raw`; scanpy's `X` is scaled), so they were embedded with `normalized=True`.

**The model is untrained**: a 3m preset with random weights of seed 0, made for these genes. Its embedding shows that
the machinery works and what it costs. It says nothing about what a trained model is worth.

## Speed

{speed[cells_per_second]:,.0f} cells/s, {speed[tokens_per_second]:,.0f} tokens/s: {speed[seconds]:.2f} s in all,
{speed[seconds_encoder]:.2f} s of it in the encoder, {speed[dtype]}, backend {speed[backend]},
{machine[threads]} threads on {machine[cpu]} (kernels for {isa}), torch {machine[torch]}.

## FLOPs

Forward GFLOP a cell of the encoder, two for a multiply-add. "Ragged" is what runs here; "padded" is the same encoder
with batches of {padded_batch} cells padded to the longest; "dense" is a Transformer of the same width and depth over
every gene of the vocabulary, its embedding not counted. "Real lengths": {num_real} cells
({source}). Their distinct values are unknown, so each token counts as one.

{flops}

## Neighbours

Accuracy of a vote of the {neighbours} nearest neighbours (Euclidean) on `bulk_labels`, {folds} stratified folds.

{agreement}

![UMAP of both spaces](umap.png)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: python -m xtrimogene.demo [--output DIR]."""
    parser = argparse.ArgumentParser(prog="python -m xtrimogene.demo", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the report")
    run(parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
