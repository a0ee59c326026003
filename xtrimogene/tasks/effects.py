"""How predicted changes of expression are judged, and the guesses that need no network and stand beside a network's.

A change is the mean log-normalised expression of a perturbation's cells less that of control cells, (genes,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xtrimogene.tasks.conditions import Perturbation

Array = npt.NDArray[Any]

TOP_GENES = 20
# Of the low-rank linear model, as in Ahlmann-Eltze et al. (Nature Methods 2025).
RANK, RIDGE = 10, 0.1

NO_CHANGE, MEAN = "no change", "mean of training"
ADDITIVE, ADDITIVE_MEAN = "additive", "additive, mean for unseen"
LINEAR_OWN, LINEAR_MODEL = "linear, PCA of training", "linear, our embeddings"
BASELINES = (NO_CHANGE, MEAN, ADDITIVE, ADDITIVE_MEAN, LINEAR_OWN, LINEAR_MODEL)

MSE_TOP, MSE_ALL = "mse, top 20", "mse, all"
R_TOP, R_ALL, R_TOP_MEAN, R_ALL_MEAN = "r, top 20", "r, all", "r beyond mean, top 20", "r beyond mean, all"
RANK_SCORE = "centroid accuracy"
METRICS = (MSE_TOP, MSE_ALL, R_TOP, R_ALL, R_TOP_MEAN, R_ALL_MEAN, RANK_SCORE)

_RESAMPLES = 1000


class Guesses:
    """The guesses, fitted to training perturbations.

    perturbations  those of training
    changes        (perturbations, genes) their changes
    own            gene -> (rank,), embeddings of genes by the principal components of training cells; measured genes
    model          gene -> (width,), the checkpoint's mean embedding of genes in control cells
    genes          names of the measured genes, the columns of changes
    """

    def __init__(
        self,
        perturbations: Sequence[Perturbation],
        changes: Array,
        genes: Sequence[str],
        own: Mapping[str, Array],
        model: Mapping[str, Array],
    ) -> None:
        self.mean = changes.mean(0)
        self.alone = {each[0]: change for each, change in zip(perturbations, changes, strict=True) if len(each) == 1}
        self.linear = {
            name: _LinearModel(perturbations, changes - self.mean, genes, rows)
            for name, rows in ((LINEAR_OWN, own), (LINEAR_MODEL, model))
        }

    def predict(self, perturbations: Sequence[Perturbation]) -> dict[str, Array]:
        """(perturbations, genes) changes by each guess.

        "additive" adds the changes of the genes that were perturbed alone in training, and nothing for others;
        "additive, mean for unseen" adds the mean change for others.
        """
        nothing = np.zeros_like(self.mean)
        return {
            NO_CHANGE: np.tile(nothing, (len(perturbations), 1)),
            MEAN: np.tile(self.mean, (len(perturbations), 1)),
            ADDITIVE: np.array([sum((self.alone.get(g, nothing) for g in each), nothing) for each in perturbations]),
            ADDITIVE_MEAN: np.array(
                [sum((self.alone.get(g, self.mean) for g in each), nothing) for each in perturbations]
            ),
            **{name: self.mean + linear.predict(perturbations) for name, linear in self.linear.items()},
        }


class _LinearModel:
    """changes (P, G) = X W Y^T of embeddings of perturbations X (P, k) and of measured genes Y (G, k), with a ridge on
    W. Embeddings of genes are their leading principal components, in units of their spread; that of a perturbation is
    the sum over its genes, and genes without one add nothing."""

    def __init__(
        self, perturbations: Sequence[Perturbation], changes: Array, genes: Sequence[str], rows: Mapping[str, Array]
    ) -> None:
        table = np.array([rows[gene] for gene in genes if gene in rows], np.float64)
        self.rows: dict[str, Array] = {}
        self.map = np.zeros((1, changes.shape[1]))
        if len(table) < 2:
            return
        center = table.mean(0)
        axes = np.linalg.svd(table - center, full_matrices=False)[2][:RANK]
        spread = np.sqrt(np.mean(((table - center) @ axes.T) ** 2)) or 1.0
        self.rows = {gene: (np.asarray(row, np.float64) - center) @ axes.T / spread for gene, row in rows.items()}
        zero = np.zeros(len(axes))
        measured = np.array([self.rows.get(gene, zero) for gene in genes])
        perturbed = self._embedded(perturbations)
        ridge = RIDGE * np.eye(len(axes))
        weights = np.linalg.solve(perturbed.T @ perturbed + ridge, perturbed.T @ changes @ measured)
        self.map = np.linalg.solve(measured.T @ measured + ridge, weights.T).T @ measured.T

    def _embedded(self, perturbations: Sequence[Perturbation]) -> Array:
        zero = np.zeros(len(next(iter(self.rows.values()), (0.0,))))
        return np.array([sum((self.rows.get(gene, zero) for gene in each), zero) for each in perturbations])

    def predict(self, perturbations: Sequence[Perturbation]) -> Array:
        """(perturbations, genes) changes beyond the mean."""
        return self._embedded(perturbations) @ self.map


def judge(predicted: Array, truth: Array, common: Array) -> dict[str, Array]:
    """The metrics of each perturbation, (perturbations,) each.

    Args:
        predicted, truth: (perturbations, genes) changes against control.
        common: (genes,) mean change of the training perturbations. "beyond mean" is against the mean of the perturbed
            cells: it is taken off both, so that what all perturbations share earns nothing.

    The top genes are the 20 that truly change most, against control. A correlation with something constant is 0.
    Centroid accuracy: of the predictions for the other perturbations, the share that lies further from the true
    profile than the one for it, ties half; 0.5 for predictions that are all the same. NaN for a single perturbation.
    """
    top = np.argsort(-np.abs(truth), axis=1, kind="stable")[:, :TOP_GENES]
    rows = np.arange(len(truth))[:, None]
    errors = (predicted - truth) ** 2
    beyond = predicted - common, truth - common
    further = np.empty(len(truth))
    for number, profile in enumerate(truth):
        distances = ((predicted - profile) ** 2).sum(1)
        further[number] = (distances > distances[number]).sum() + 0.5 * ((distances == distances[number]).sum() - 1)
    others = max(len(truth) - 1, 0)
    return {
        MSE_TOP: errors[rows, top].mean(1),
        MSE_ALL: errors.mean(1),
        R_TOP: _correlations(predicted[rows, top], truth[rows, top]),
        R_ALL: _correlations(predicted, truth),
        R_TOP_MEAN: _correlations(beyond[0][rows, top], beyond[1][rows, top]),
        R_ALL_MEAN: _correlations(*beyond),
        RANK_SCORE: further / others if others else np.full(len(truth), np.nan),
    }


def _correlations(left: Array, right: Array) -> Array:
    left = left - left.mean(1, keepdims=True)
    right = right - right.mean(1, keepdims=True)
    norms = np.sqrt((left**2).sum(1) * (right**2).sum(1))
    # Of numbers that are the same but for rounding, too, there is nothing to correlate.
    products = (left * right).sum(1)
    return np.where(norms > 1e-12, products / np.where(norms > 1e-12, norms, 1.0), 0.0)


def interval(values: Array, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of a mean over perturbations, by bootstrap; None for fewer than three of them."""
    if len(values) < 3:
        return None
    drawn = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)
