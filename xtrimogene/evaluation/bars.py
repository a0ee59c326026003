"""Bars: predictions of hidden values without a network, fitted to training cells, and the figures of any prediction.

A model that does not pass these has not learned what cells are. All of them start from m_g, the mean true value of gene
g over the training cells in which it is chosen (expressed genes are chosen ten times as often as others, which every
model learns without looking at a cell), and see of a cell what the encoder sees:

    gene mean         m_g
    depth             m_g + ridge of the gene on three numbers of the cell: log of its seen genes, mean and sum of their
                      values
    PCA               m_g + s * (the gene in the cell, rebuilt of 20 principal components), s one number for all genes
    kNN               m_g + s * (mean of the gene over the 100 nearest training cells - mean over all), nearest by the
                      principal components
    depth + PCA       m_g + ridge of the gene on the three numbers and the 20 components

Components are those of the whole training cells; a cell's coordinates are taken with its hidden genes at their mean. A
ridge is fitted for each gene over all training cells, each weighted by how often the masking plan chooses the gene
there, on features standardised over the cells, which come from four maskings of each cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from xtrimogene.cells.masking import MaskingConfig
from xtrimogene.evaluation.hidden import HiddenGenes, Values

COMPONENTS = 20
NEIGHBOURS = 100
MASKINGS = 4
# Added to the sums of squares of standardised features, over cells in which a gene is chosen.
PENALTY = 100.0
# Genes whose ridges are solved, and hidden values that are rebuilt, at a time.
_BLOCK = 1 << 11
_DEPTH, _PCA, _KNN, _BOTH, _MEAN = "depth", "PCA", "kNN", "depth + PCA", "gene mean"
BARS = (_MEAN, _DEPTH, _PCA, _KNN, _BOTH)
RIDGE = _BOTH


@dataclass(frozen=True)
class Components:
    """Principal components of cells: the mean (G,) of each gene, and the components (G, k), orthonormal."""

    mean: Values
    axes: Values

    @classmethod
    def of(cls, whole: sparse.csr_matrix, count: int, *, seed: int = 0) -> Components:
        """The first components of cells (n, G), by randomised subspace iteration (Halko et al. 2011), never dense.

        At most min(n, G) of them.
        """
        cells = whole.astype(np.float64)
        mean = np.asarray(cells.mean(axis=0)).ravel()
        count = min(count, *cells.shape)
        width = min(count + 30, *cells.shape)
        axes = np.random.default_rng(seed).normal(size=(cells.shape[1], width))
        for _ in range(8):
            rows, _ = np.linalg.qr(_centred(cells, mean, axes))
            axes, _ = np.linalg.qr(cells.T @ rows - np.outer(mean, rows.sum(axis=0)))
        _, _, turned = np.linalg.svd(_centred(cells, mean, axes), full_matrices=False)
        return cls(mean, (axes @ turned.T)[:, :count])

    def coordinates(self, seen: sparse.csr_matrix, hidden: HiddenGenes | None = None) -> Values:
        """(n, k) of cells (n, G); hidden genes, zero in the matrix, are taken for their mean."""
        coordinates = _centred(seen, self.mean, self.axes)
        if hidden is not None:
            filled = sparse.csr_matrix((self.mean[hidden.genes], (hidden.cells, hidden.genes)), shape=seen.shape)
            coordinates += filled @ self.axes
        return coordinates


def _centred(cells: sparse.csr_matrix, mean: Values, axes: Values) -> Values:
    return cells @ axes - (mean @ axes)[None]


@dataclass(frozen=True)
class RidgeBar:
    """The strongest bar, depth + PCA, by itself: the means, components and ridge of some training cells."""

    means: Values
    components: Components
    ridge: _Ridge

    @classmethod
    def fit(cls, maskings: Sequence[HiddenGenes], masking: MaskingConfig) -> RidgeBar:
        """From some maskings of the training cells, one or more epochs of the same cells."""
        whole = maskings[0].whole
        genes = np.concatenate([each.genes for each in maskings])
        values = np.concatenate([each.values for each in maskings])
        num_genes = whole.shape[1]
        sums, counts = np.bincount(genes, weights=values, minlength=num_genes), np.bincount(genes, minlength=num_genes)
        means = sums / counts.clip(min=1)
        components = Components.of(whole, COMPONENTS)
        features = [_features(components, each) for each in maskings]
        return cls(means, components, _Ridge.fit([each.whole for each in maskings], features, means, masking))

    def predict(self, cells: HiddenGenes) -> Values:
        """(hidden,) of masked cells."""
        return self.means[cells.genes] + self.ridge.predict(_features(self.components, cells), cells)


def _features(components: Components, cells: HiddenGenes) -> Values:
    """(n, 3 + k) depth numbers and coordinates."""
    return np.hstack([depth_numbers(cells.seen), components.coordinates(cells.seen, cells)])


@dataclass(frozen=True)
class Bars:
    """The fitted bars; see the module."""

    ridge: RidgeBar
    depth_ridge: _Ridge
    whole: sparse.csr_matrix
    coordinates: Values
    slopes: dict[str, float]

    @classmethod
    def fit(cls, maskings: Sequence[HiddenGenes], masking: MaskingConfig) -> Bars:
        """From some maskings of the training cells, one or more epochs of the same cells."""
        ridge = RidgeBar.fit(maskings, masking)
        depth = [depth_numbers(each.seen) for each in maskings]
        wholes = [each.whole for each in maskings]
        first = maskings[0]
        fitted = cls(
            ridge,
            _Ridge.fit(wholes, depth, ridge.means, masking),
            first.whole,
            ridge.components.coordinates(first.seen, first),
            {},
        )
        # The slopes are fitted to one masking.
        truth = first.values - ridge.means[first.genes]
        guesses = fitted._rebuilt(first, fitted.coordinates), fitted._of_nearest(first, True)
        for name, guess in zip((_PCA, _KNN), guesses, strict=True):
            fitted.slopes[name] = float(guess @ truth) / max(float(guess @ guess), 1e-12)
        return fitted

    def predict(self, cells: HiddenGenes) -> dict[str, Values]:
        """Each bar's predictions (hidden,) of masked cells, in the order of BARS."""
        base = self.ridge.means[cells.genes]
        coordinates = self.ridge.components.coordinates(cells.seen, cells)
        return {
            _MEAN: base,
            _DEPTH: base + self.depth_ridge.predict(depth_numbers(cells.seen), cells),
            _PCA: base + self.slopes[_PCA] * self._rebuilt(cells, coordinates),
            _KNN: base + self.slopes[_KNN] * self._of_nearest(cells, False),
            _BOTH: self.ridge.predict(cells),
        }

    def _rebuilt(self, cells: HiddenGenes, coordinates: Values) -> Values:
        return _products(coordinates, self.ridge.components.axes, cells)

    def _of_nearest(self, cells: HiddenGenes, are_known: bool) -> Values:
        """(hidden,) mean of the gene over the nearest training cells, less its mean; a known cell is not its own."""
        asked = self.ridge.components.coordinates(cells.seen, cells)
        known = self.coordinates
        count = min(NEIGHBOURS, len(known) - are_known)
        guesses = np.empty(len(cells.genes))
        by_cell = np.argsort(cells.cells, kind="stable")
        bounds = np.searchsorted(cells.cells[by_cell], np.arange(len(asked) + 1))
        for start in range(0, len(asked), 256):
            rows = np.arange(start, min(start + 256, len(asked)))
            distances = np.square(known).sum(1)[None] - 2 * asked[rows] @ known.T
            if are_known:
                distances[np.arange(len(rows)), rows] = np.inf
            nearest = np.argpartition(distances, count - 1, axis=1)[:, :count]
            shares = sparse.csr_matrix(
                (np.full(nearest.size, 1 / count), nearest.ravel(), np.arange(len(rows) + 1) * count),
                shape=(len(rows), len(known)),
            )
            averages = (shares @ self.whole).toarray()
            own = by_cell[bounds[rows[0]] : bounds[rows[-1] + 1]]
            guesses[own] = averages[cells.cells[own] - start, cells.genes[own]]
        return guesses - self.ridge.components.mean[cells.genes]


@dataclass(frozen=True)
class _Ridge:
    """A ridge for every gene on the same features: their mean and spread (k,), coefficients (G, k)."""

    mean: Values
    spread: Values
    coefficients: Values

    @classmethod
    def fit(
        cls,
        wholes: Sequence[sparse.csr_matrix],
        features: Sequence[Values],
        means: Values,
        masking: MaskingConfig,
    ) -> _Ridge:
        """Minimises, for each gene, the sum over cells and maskings of p (value - mean - coefficients . features)^2,
        plus PENALTY |coefficients|^2; p is the rate at which the masking plan chooses the gene in the cell."""
        stacked = np.concatenate(features)
        mean, spread = stacked.mean(axis=0), np.maximum(stacked.std(axis=0), 1e-9)
        size = stacked.shape[1]
        upper = np.triu_indices(size)
        zero, nonzero = masking.zero_rate, masking.nonzero_rate
        squares = np.zeros((len(means), len(upper[0])))
        sums = np.zeros((len(means), size))
        for whole, numbers in zip(wholes, features, strict=True):
            z = (numbers - mean) / spread
            products = z[:, upper[0]] * z[:, upper[1]]
            columns = whole.tocsc()
            of_gene = np.repeat(np.arange(len(means)), np.diff(columns.indptr))
            expressed, weighted = columns.astype(np.float64), columns.astype(np.float64)
            expressed.data = np.full(columns.nnz, nonzero - zero)
            weighted.data = nonzero * (columns.data - means[of_gene]) + zero * means[of_gene]
            # What all cells would give if the gene were zero everywhere, and what expressing cells change. Of the sums
            # the former is nothing: standardised features add up to 0.
            squares += zero * products.sum(axis=0) + expressed.T @ products
            sums += weighted.T @ z
        coefficients = np.empty_like(sums)
        for start in range(0, len(means), _BLOCK):
            block = slice(start, start + _BLOCK)
            matrices = np.zeros((len(squares[block]), size, size))
            matrices[:, upper[0], upper[1]] = matrices[:, upper[1], upper[0]] = squares[block]
            matrices[:, np.arange(size), np.arange(size)] += PENALTY
            coefficients[block] = np.linalg.solve(matrices, sums[block][:, :, None])[:, :, 0]
        return cls(mean, spread, coefficients)

    def predict(self, features: Values, cells: HiddenGenes) -> Values:
        """(hidden,) predictions at the hidden genes of cells with these features (n, k)."""
        return _products((features - self.mean) / self.spread, self.coefficients, cells)


def _products(of_cells: Values, of_genes: Values, cells: HiddenGenes) -> Values:
    """(hidden,) product of the cell's row (n, k) and the gene's row (G, k)."""
    products = np.empty(len(cells.genes))
    for start in range(0, len(products), 1 << 18):
        block = slice(start, start + (1 << 18))
        np.einsum("ij,ij->i", of_cells[cells.cells[block]], of_genes[cells.genes[block]], out=products[block])
    return products


def depth_numbers(seen: sparse.csr_matrix) -> Values:
    """(n, 3) of each cell: log(1 + seen genes), mean and sum of their log-normalised values; all say how deep it is."""
    lengths = np.diff(seen.indptr).astype(np.float64)
    sums = np.asarray(seen.sum(axis=1), dtype=np.float64).ravel()
    return np.stack([np.log1p(lengths), sums / np.maximum(lengths, 1), sums], axis=1)


def figures(predicted: Values, cells: HiddenGenes, means: Values) -> dict[str, dict[str, float | None]]:
    """Figures of predictions at the hidden genes, "all" of them and the "non-zero" ones.

    mean squared error    of prediction and truth
    correlation           Pearson's, of prediction and truth
    beyond the mean       the same after means (G,), each gene's mean where it is chosen, is taken off both
    within genes          the same after both are centred within each gene over the very positions that count

    None where one side does not vary. Only the last is free of what is known of genes alone, among non-zero values too.
    """
    found = {}
    for part, chosen in (("all", np.ones(len(predicted), bool)), ("non-zero", cells.values > 0)):
        guess, truth, genes = predicted[chosen], cells.values[chosen], cells.genes[chosen]
        found[part] = {
            "mean squared error": float(np.square(guess - truth).mean()) if len(truth) else None,
            "correlation": correlation(guess, truth),
            "beyond the mean": correlation(guess - means[genes], truth - means[genes]),
            "within genes": correlation(centred_within(guess, genes), centred_within(truth, genes)),
        }
    return found


def correlation(x: Values, y: Values) -> float | None:
    """Pearson's; None where one of the two does not vary, but for rounding."""
    if len(x) < 2 or any(each.std() <= 1e-9 * max(1.0, float(np.abs(each).max())) for each in (x, y)):
        return None
    return float(np.corrcoef(x, y)[0, 1])


def centred_within(values: Values, groups: npt.NDArray[Any]) -> Values:
    """The values less the mean of each one's group (integers from 0)."""
    return values - (np.bincount(groups, weights=values) / np.maximum(np.bincount(groups), 1))[groups]
