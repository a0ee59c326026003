"""evaluate: masked prediction and embeddings of held-out cells, beside guesses and spaces that need no training."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import torch
from anndata import AnnData
from scipy import sparse

from xtrimogene.cells.data_sets import Data, expand_data
from xtrimogene.cells.masking import MaskingConfig
from xtrimogene.cells.sources import is_anndata_file, open_cells
from xtrimogene.cells.stream import VALIDATION_EPOCH, TrainingCells
from xtrimogene.evaluation.bars import MASKINGS, RIDGE, Bars, figures
from xtrimogene.evaluation.hidden import HiddenGenes
from xtrimogene.evaluation.scib import SCIB, need_scib, scib_figures
from xtrimogene.evaluation.spaces import (
    COMPONENTS,
    agreement,
    batch_mixing,
    largest_label,
    pca,
    random_projection,
    silhouette,
)
from xtrimogene.inference.embed import embed
from xtrimogene.inference.model_cells import WINDOW, opened
from xtrimogene.network.devices import choose_device
from xtrimogene.network.model import XTrimoGeneNetwork

# Without training data, one cell in so many of the held-out ones is judged, and the others are what bars are fitted to.
_JUDGED_IN = 5
_BATCH_CELLS = 32
# At least so large a share of a model's genes has to be in the data.
_LEAST_FOUND = 0.05
_KEY = "X_evaluated"
_READING = ("layer", "gene_symbols", "normalized", "progress")
MODEL, UNTRAINED = "model", "untrained network"


@dataclass(frozen=True)
class Evaluation:
    """What a model was found to know.

    cells          numbers of cells: "judged", and "known", which bars, PCA and readers of labels are fitted to
    genes          genes of the vocabulary, and those of them that the data have
    known          where the known cells are from: "train_data", or "data" where they are the other cells of the data
    masked         prediction -> part -> figure, see bars.figures; MODEL and bars.BARS
    spaces         space -> figure, see spaces; None without labels
    largest_label  share of the judged cells that have the commonest label; None without labels
    label          the column, None without
    batch          the column of batches, None without
    """

    cells: dict[str, int]
    genes: dict[str, int]
    known: str
    masked: dict[str, dict[str, dict[str, float | None]]]
    spaces: dict[str, dict[str, float | None]] | None
    largest_label: float | None
    label: str | None
    batch: str | None = None

    @property
    def passes_ridge(self) -> bool:
        """Whether the model's error at hidden genes is below that of the strongest bar."""
        ours, ridge = (self.masked[name]["all"]["mean squared error"] for name in (MODEL, RIDGE))
        return ours is not None and ridge is not None and ours < ridge


def evaluate(
    model: XTrimoGeneNetwork | str | os.PathLike[str],
    data: Data | Sequence[Data],
    *,
    label: str | None = None,
    batch: str | None = None,
    scib: bool = False,
    train_data: Data | Sequence[Data] | None = None,
    layer: str | None = None,
    gene_symbols: str | None = None,
    normalized: bool = False,
    min_genes: int = 200,
    max_cells: int = 20_000,
    masking: MaskingConfig | None = None,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> Evaluation:
    """Judge a model by cells that it has not been trained on.

    Args:
        model: a model, its checkpoint folder, its name on the Hub or that of a model in the package.
        data: held-out cells: AnnData, h5ad files, zarr stores or folders of them. They are read into memory.
        label: column of obs by which embeddings are judged; None to judge masked prediction alone.
        batch: column of obs that says which batch (donor, laboratory, chemistry) a cell of data is of, to judge by how
            little the embeddings tell batches of one label apart; it needs label.
        scib: also judge each space by scib-metrics, see scib_figures; it needs label, batch and that package.
        train_data: cells that bars, PCA and readers of labels are fitted to, as for data; they have the label too.
            None: a fixed four fifths of data, and the other fifth is judged.
        layer, gene_symbols, normalized: as for embed, the same for all data sets.
        min_genes: cells with at most so many expressed genes of the vocabulary are left out.
        max_cells: of more cells, of data and of train_data each, evenly spaced ones are taken.
        masking: which genes are hidden; the default of pre-training.
        device: where the model runs.
        progress: show a progress bar while cells are read and embedded.

    Raises:
        ValueError, OSError: bad data, labels that are missing or all the same, cells of train_data among the held-out
            ones (by content), a vocabulary that does not fit; one line says what and what to do, before any work.
        ImportError: scikit-learn is missing, and label is given; scib-metrics is missing, and scib is asked for.
    """
    if batch is not None and label is None:
        raise ValueError(f"batch: expected a label too, by which cells of {batch!r} can be alike; give label")
    if scib:
        if batch is None:
            raise ValueError("scib: expected label and batch too, which its figures compare; give both")
        need_scib()
    if label is not None:
        _need_sklearn()
    torch_device = choose_device(device)
    network = opened(model).to(torch_device).eval()
    masking = MaskingConfig() if masking is None else masking
    sets = [("data", _in_memory(data, max_cells))]
    if train_data is not None:
        sets.append(("train_data", _in_memory(train_data, max_cells)))
    options: dict[str, Any] = {
        "layer": layer, "gene_symbols": gene_symbols, "normalized": normalized, "masking": masking,
        "min_genes": min_genes, "batch_cells": _BATCH_CELLS, "depth_tokens": network.config.depth_tokens,
        "target_sum": network.config.target_sum, "validation_share": 0.0, "progress": progress,
    }  # fmt: skip
    for kind, column, checked in (("label", label, sets), ("batch", batch, sets[:1])):
        for name, adata in ((name, adata) for name, adatas in checked for adata in adatas):
            if column is not None:
                _check_column(adata, column, kind, name)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(TrainingCells(adatas, network.vocabulary, **options)) for _, adatas in sets]
        for (name, _), stream in zip(sets, streams, strict=True):
            _check_vocabulary(stream, name)
        judged = _Cells(streams[0], streams[0].training, sets[0][1])
        if train_data is None:
            own = _judged(len(judged.numbers))
            known = dataclasses.replace(judged, numbers=judged.numbers[~own])
            _check_distinct(judged)
            judged = dataclasses.replace(judged, numbers=judged.numbers[own])
        else:
            known = _Cells(streams[1], streams[1].training, sets[1][1])
            _check_held_out(judged, known)
        if label is not None:
            labels = [_labels(cells, label, "label", name) for cells, name in ((known, "known"), (judged, "judged"))]
            batches = None if batch is None else _labels(judged, batch, "batch", "judged")
        bars = Bars.fit([known.masked(epoch) for epoch in range(MASKINGS)], masking)
        hidden = judged.masked(VALIDATION_EPOCH, network)
        assert hidden.predictions is not None
        guesses = {MODEL: hidden.predictions, **bars.predict(hidden)}
        spaces = None
        if label is not None:
            reading: dict[str, Any] = {name: options[name] for name in _READING}
            spaces = _spaces(network, known, judged, labels, batches, scib, {**reading, "device": torch_device})
    return Evaluation(
        cells={"judged": len(judged.numbers), "known": len(known.numbers)},
        genes={"vocabulary": len(network.vocabulary), "found": judged.stream.genes_found},
        known="data" if train_data is None else "train_data",
        masked={name: figures(guess, hidden, bars.ridge.means) for name, guess in guesses.items()},
        spaces=spaces,
        largest_label=None if label is None else largest_label(*labels),
        label=label,
        batch=batch,
    )


@dataclass(frozen=True)
class _Cells:
    """Some cells of a stream, by their numbers, ascending, and the data sets that it reads."""

    stream: TrainingCells
    numbers: npt.NDArray[np.int64]
    adatas: list[AnnData]

    def masked(self, epoch: int, network: XTrimoGeneNetwork | None = None) -> HiddenGenes:
        """The cells masked as in an epoch, with what a network predicts."""
        return HiddenGenes.of(self.stream.masked(self.numbers, epoch), len(self.stream.vocabulary), network)

    def whole(self) -> sparse.csr_matrix:
        """(n, genes) log-normalised values."""
        batch = self.stream.read(self.numbers)
        return sparse.csr_matrix(
            (batch.values.numpy(), batch.gene_ids.numpy(), batch.cu_seqlens.numpy()),
            shape=(len(self.numbers), len(self.stream.vocabulary)),
        )

    def embedded(self, network: XTrimoGeneNetwork, reading: dict[str, Any]) -> npt.NDArray[np.float32]:
        """(n, dim) embeddings."""
        found = []
        for adata in self.adatas:
            copy = adata.copy()  # the caller's stays as it is
            embed(copy, network, key_added=_KEY, **reading)
            found.append(copy.obsm[_KEY])
        return np.concatenate(found)[self.numbers]


def _spaces(
    network: XTrimoGeneNetwork,
    known: _Cells,
    judged: _Cells,
    labels: list[npt.NDArray[Any]],
    batches: npt.NDArray[Any] | None,
    scib: bool,
    reading: dict[str, Any],
) -> dict[str, dict[str, float | None]]:
    """The figures of each space, labels being those of the known and of the judged cells, batches of the latter."""
    points: dict[str, list[npt.NDArray[Any]]] = {
        name: [cells.embedded(each, reading) for cells in (known, judged)]
        for name, each in ((MODEL, network), (UNTRAINED, _untrained(network)))
    }
    wholes = [known.whole(), judged.whole()]
    points[f"PCA, {COMPONENTS} components"] = pca(*wholes)
    points["random projection"] = random_projection(wholes, points[MODEL][0].shape[1])
    found: dict[str, dict[str, float | None]] = {}
    for name, pair in points.items():
        found[name] = {**agreement(*pair, *labels), "silhouette": silhouette(pair[1], labels[1])}
        if batches is not None:
            found[name]["batch mixing"] = batch_mixing(pair[1], labels[1], batches)
            if scib:
                found[name] |= {
                    f"{SCIB}{figure}": value for figure, value in scib_figures(pair[1], labels[1], batches).items()
                }
    return found


def _need_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "label: needs scikit-learn, which is not installed: pip install 'xtrimogene[scanpy]', or leave label out"
        ) from error


def _in_memory(data: Data | Sequence[Data], most: int) -> list[AnnData]:
    """The data sets, evenly thinned to about so many cells in all."""
    if most < 1:
        raise ValueError(f"max_cells: expected at least 1, got {most}")
    found = [each if isinstance(each, AnnData) else _read(each) for each in expand_data(data)]
    total = sum(adata.n_obs for adata in found)
    if total <= most:
        return found
    return [adata[np.arange(0, adata.n_obs, -(-total // most))].copy() for adata in found]


def _read(path: Path) -> AnnData:
    with open_cells(path) as source:  # says what is wrong with a file that is none of cells
        kind = source.kind
    if not is_anndata_file(path):
        raise ValueError(
            f"{path}: expected an h5ad file or a zarr store of AnnData, got {kind}; write its cells as h5ad"
        )
    return anndata.read_zarr(path) if path.is_dir() else anndata.read_h5ad(path)


def _check_column(adata: AnnData, column: str, kind: str, name: str) -> None:
    """Refuses a column of labels or batches that is not there or has gaps."""
    if column not in adata.obs.columns:
        known = ", ".join(map(str, adata.obs.columns)) or "none"
        raise ValueError(f"{kind}: expected a column of obs of {name}, got {column!r}; columns: {known}")
    values = adata.obs[column]
    if values.isna().any():
        raise ValueError(
            f"{kind}: expected a {kind} for every cell of {name}, got none for {int(values.isna().sum()):,} of "
            f"{adata.n_obs:,} in obs[{column!r}]; take these cells out"
        )


def _labels(cells: _Cells, column: str, kind: str, name: str) -> npt.NDArray[Any]:
    """Labels or batches of some cells, at least two different ones."""
    found = np.concatenate([adata.obs[column].astype(str).to_numpy() for adata in cells.adatas])[cells.numbers]
    if len(np.unique(found)) < 2:
        kinds = "labels" if kind == "label" else "batches"
        raise ValueError(
            f"{kind}: expected at least two different {kinds}, got {found[:1].tolist()} for all {len(found):,} {name} "
            f"cells in obs[{column!r}]; name another column"
        )
    return found.astype(str)


def _check_vocabulary(stream: TrainingCells, name: str) -> None:
    found, genes = stream.genes_found, len(stream.vocabulary)
    if found < _LEAST_FOUND * genes:
        raise ValueError(
            f"{name}: expected at least {_LEAST_FOUND:.0%} of the model's {genes:,} genes, got {found:,} of them; give "
            "cells with the genes that the model was made for, or name the var column that has them: gene_symbols"
        )


def _check_held_out(judged: _Cells, known: _Cells) -> None:
    """Refuses cells that are judged and known, by their genes and values."""
    _refuse(
        judged,
        np.isin(_hashes(judged), _hashes(known)),
        "are in train_data too, by their genes and values; judge by cells that were held out",
    )


def _check_distinct(cells: _Cells) -> None:
    """Refuses cells that are in the data twice, which is about to be split."""
    hashes = _hashes(cells)
    distinct, counts = np.unique(hashes, return_counts=True)
    _refuse(
        cells,
        np.isin(hashes, distinct[counts > 1]),
        "are there more than once, by their genes and values, and would be known and judged; take the copies out",
    )


def _refuse(cells: _Cells, wrong: npt.NDArray[np.bool_], what: str) -> None:
    if wrong.any():
        first = int(cells.numbers[np.argmax(wrong)])
        raise ValueError(f"data: {int(wrong.sum()):,} of {len(wrong):,} cells, such as number {first:,} from 0, {what}")


def _hashes(cells: _Cells) -> npt.NDArray[np.uint64]:
    """(n,) a hash of each cell's genes and values."""
    hashes = np.empty(len(cells.numbers), np.uint64)
    for start in range(0, len(hashes), WINDOW):
        batch = cells.stream.read(cells.numbers[start : start + WINDOW])
        bounds, genes, values = batch.cu_seqlens.numpy(), batch.gene_ids.numpy(), batch.values.numpy()
        for row in range(batch.batch_size):
            own = slice(bounds[row], bounds[row + 1])
            digest = hashlib.blake2b(genes[own].tobytes() + values[own].tobytes(), digest_size=8).digest()
            hashes[start + row] = np.frombuffer(digest, np.uint64)[0]
    return hashes


def _judged(cells: int) -> npt.NDArray[np.bool_]:
    """(cells,) whether each cell is judged, always the same ones, where the others are known."""
    chosen = np.zeros(cells, bool)
    chosen[np.random.default_rng(0).permutation(cells)[: cells // _JUDGED_IN]] = True
    if min(chosen.sum(), len(chosen) - chosen.sum()) < 2:
        raise ValueError(f"data: expected at least {2 * _JUDGED_IN} cells, got {cells}; give more")
    return chosen


def _untrained(network: XTrimoGeneNetwork) -> XTrimoGeneNetwork:
    """A fresh network of the same config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(network)(network.config, network.vocabulary).eval()
