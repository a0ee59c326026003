"""Spaces: embeddings of cells beside PCA, a random projection and the untrained network, by the cells' labels.

A space is judged by how well labels of held-out cells are read off it, given the labels of known cells, and by how
compact labels are in it:

    neighbours   share of right labels by a vote of the 15 nearest known cells (Euclidean)
    probe        share of right labels by a logistic regression on standardised coordinates
    silhouette   mean silhouette width of the held-out cells (Euclidean) by label, from -1 to 1

and, where cells are of several batches, by how little these are told apart in it:

    batch mixing  1 - |silhouette width| of a cell by batch among the held-out cells of its label, mean over the cells
                  of a label, then over labels; 1 where batches lie alike (batch ASW of scIB, Luecken et al. 2022)

No space is shown a label; PCA is fitted to the known cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from xtrimogene.evaluation.bars import Components

NEIGHBOURS = 15
COMPONENTS = 50


def agreement(
    known: npt.NDArray[Any],
    asked: npt.NDArray[Any],
    known_labels: npt.NDArray[Any],
    asked_labels: npt.NDArray[Any],
) -> dict[str, float]:
    """The figures "neighbours" and "probe", from points (n, k) and labels (n,) of known cells to asked ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    readers = {
        "neighbours": KNeighborsClassifier(min(NEIGHBOURS, len(known))),
        "probe": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    }
    return {name: float(reader.fit(known, known_labels).score(asked, asked_labels)) for name, reader in readers.items()}


def silhouette(points: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float | None:
    """Mean silhouette width of points (n, k) by label; None where each label has one cell."""
    from sklearn.metrics import silhouette_score

    distinct = len(np.unique(labels))
    return float(silhouette_score(points, labels)) if 1 < distinct < len(points) else None


def batch_mixing(points: npt.NDArray[Any], labels: npt.NDArray[Any], batches: npt.NDArray[Any]) -> float | None:
    """The figure "batch mixing" of points (n, k); labels of which all cells are of one batch, or each of another, say
    nothing; None where all labels are such."""
    from sklearn.metrics import silhouette_samples

    found = []
    for label in np.unique(labels):
        own = labels == label
        if 1 < len(np.unique(batches[own])) < own.sum():
            found.append(1 - np.abs(silhouette_samples(points[own], batches[own])).mean())
    return float(np.mean(found)) if found else None


def largest_label(known_labels: npt.NDArray[Any], asked_labels: npt.NDArray[Any]) -> float:
    """Share of the asked cells that have the commonest label of the known ones: what a guess gets right."""
    names, counts = np.unique(known_labels, return_counts=True)
    return float(np.mean(asked_labels == names[np.argmax(counts)]))


def pca(known: sparse.csr_matrix, asked: sparse.csr_matrix) -> list[npt.NDArray[np.float64]]:
    """(n, 50) coordinates of known and of asked cells (n, genes) on the principal components of the known ones."""
    components = Components.of(known, COMPONENTS)
    return [components.coordinates(cells) for cells in (known, asked)]


def random_projection(
    wholes: Sequence[sparse.csr_matrix], width: int, *, seed: int = 0
) -> list[npt.NDArray[np.float64]]:
    """(n, width) of each (n, genes): one Gaussian random projection."""
    axes = np.random.default_rng(seed).normal(size=(wholes[0].shape[1], width)) / np.sqrt(width)
    return [whole @ axes for whole in wholes]
