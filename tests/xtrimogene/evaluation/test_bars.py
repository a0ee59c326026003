"""Tests of the bars: each against its definition written out cell by cell, and the figures of predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from xtg_kernels import RaggedBatch
from xtrimogene.cells.masking import MaskingConfig, mask_cells
from xtrimogene.evaluation import bars as module
from xtrimogene.evaluation.bars import BARS, Bars, Components, centred_within, correlation, depth_numbers, figures
from xtrimogene.evaluation.hidden import HiddenGenes

GENES, KNOWN, ASKED = 40, 90, 12
MASKING = MaskingConfig(nonzero_rate=0.4, zero_rate=0.1, mask_share=0.7, random_share=0.2)


def _matrix(cells: int, seed: int) -> np.ndarray:
    """Cells of three kinds that express different genes, more or less deeply."""
    rng = np.random.default_rng(seed)
    kinds = np.random.default_rng(9).gamma(0.5, 2.0, (3, GENES))
    depth = rng.uniform(0.3, 1.5, cells)
    counts = rng.poisson(kinds[rng.integers(3, size=cells)] * depth[:, None])
    counts[:, 0] += 1  # no cell without a gene
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32)


def _hidden(values: np.ndarray, epoch: int, depth_tokens: bool = False) -> tuple[HiddenGenes, list]:
    matrix = sparse.csr_matrix(values)
    cu_seqlens = torch.from_numpy(matrix.indptr.astype(np.int32))
    batch = RaggedBatch(torch.from_numpy(matrix.data), torch.from_numpy(matrix.indices), cu_seqlens, GENES)
    depth = torch.full((len(values), 2), 4.0) if depth_tokens else None
    masked = [
        mask_cells(
            batch, rows, MASKING, epoch=epoch, num_genes=GENES, rows=rows, depth=None if depth is None else depth[rows]
        )
        for rows in np.array_split(np.arange(len(values)), 4)
    ]
    return HiddenGenes.of(masked, GENES), masked


@pytest.mark.parametrize("depth_tokens", [False, True])
def test_hidden_genes_are_those_of_the_batches(depth_tokens: bool) -> None:
    values = _matrix(KNOWN, 0)
    hidden, batches = _hidden(values, 0, depth_tokens)
    np.testing.assert_array_equal(hidden.whole.toarray(), values)
    np.testing.assert_array_equal(hidden.values, values[hidden.cells, hidden.genes])
    assert len(hidden.values) == sum(len(batch.masked_ids) for batch in batches)
    seen = hidden.seen.toarray()
    assert not seen[hidden.cells, hidden.genes].any()
    # What is not hidden is there, but for the tenths that show a random value.
    rest = np.ones_like(values, bool)
    rest[hidden.cells, hidden.genes] = False
    changed = (seen != values) & rest
    assert 0 < changed.sum() < 0.15 * values.size


@pytest.fixture(scope="module")
def fitted() -> tuple[list[HiddenGenes], HiddenGenes, Bars]:
    maskings = [_hidden(_matrix(KNOWN, 0), epoch)[0] for epoch in range(3)]
    return maskings, _hidden(_matrix(ASKED, 1), 0)[0], Bars.fit(maskings, MASKING)


def test_components_are_those_of_the_singular_value_decomposition() -> None:
    values = _matrix(KNOWN, 0).astype(np.float64)
    components = Components.of(sparse.csr_matrix(values), 3)
    centred = values - values.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3].T
    np.testing.assert_allclose(components.axes @ components.axes.T, axes @ axes.T, atol=1e-6)
    np.testing.assert_allclose(components.coordinates(sparse.csr_matrix(values)), centred @ components.axes, atol=1e-8)
    assert Components.of(sparse.csr_matrix(values[:2]), 50).axes.shape == (GENES, 2)


def test_hidden_genes_count_as_their_mean_in_coordinates(fitted: tuple) -> None:
    _, asked, bars = fitted
    filled = asked.seen.toarray().astype(np.float64)
    filled[asked.cells, asked.genes] = bars.ridge.components.mean[asked.genes]
    wanted = (filled - bars.ridge.components.mean) @ bars.ridge.components.axes
    np.testing.assert_allclose(bars.ridge.components.coordinates(asked.seen, asked), wanted, atol=1e-9)


@pytest.mark.parametrize("name", ["depth", "depth + PCA"])
def test_a_ridge_is_the_minimum_of_its_sum(fitted: tuple, name: str) -> None:
    maskings, asked, bars = fitted

    def features(cells: HiddenGenes) -> np.ndarray:
        depth = depth_numbers(cells.seen)
        return depth if name == "depth" else np.hstack([depth, bars.ridge.components.coordinates(cells.seen, cells)])

    stacked = np.concatenate([features(each) for each in maskings])
    values = np.concatenate([each.whole.toarray() for each in maskings]).astype(np.float64)
    z = (stacked - stacked.mean(0)) / stacked.std(0)
    rates = np.where(values > 0, MASKING.nonzero_rate, MASKING.zero_rate)
    asked_z = (features(asked) - stacked.mean(0)) / stacked.std(0)
    wanted = np.empty((ASKED, GENES))
    for gene in range(GENES):
        weighted = z * rates[:, gene : gene + 1]
        matrix = weighted.T @ z + module.PENALTY * np.eye(z.shape[1])
        slope = np.linalg.solve(matrix, weighted.T @ (values[:, gene] - bars.ridge.means[gene]))
        wanted[:, gene] = bars.ridge.means[gene] + asked_z @ slope
    np.testing.assert_allclose(bars.predict(asked)[name], wanted[asked.cells, asked.genes], rtol=1e-8)


def test_each_bar_is_what_it_is_said_to_be(fitted: tuple) -> None:
    maskings, asked, bars = fitted
    predictions = bars.predict(asked)
    assert tuple(predictions) == BARS
    genes = np.concatenate([each.genes for each in maskings])
    values = np.concatenate([each.values for each in maskings])
    means = np.array([values[genes == gene].mean() if (genes == gene).any() else 0.0 for gene in range(GENES)])
    np.testing.assert_allclose(predictions["gene mean"], means[asked.genes])
    coordinates = bars.ridge.components.coordinates(asked.seen, asked)
    rebuilt = (coordinates @ bars.ridge.components.axes.T)[asked.cells, asked.genes]
    np.testing.assert_allclose(predictions["PCA"], means[asked.genes] + bars.slopes["PCA"] * rebuilt)
    known = bars.ridge.components.coordinates(maskings[0].seen, maskings[0])
    whole, count = maskings[0].whole.toarray().astype(np.float64), min(module.NEIGHBOURS, KNOWN)
    for row in range(0, len(asked.genes), 7):
        cell, gene = asked.cells[row], asked.genes[row]
        nearest = np.argsort(np.square(known - coordinates[cell]).sum(1))[:count]
        guess = whole[nearest, gene].mean() - whole[:, gene].mean()
        assert predictions["kNN"][row] == pytest.approx(means[gene] + bars.slopes["kNN"] * guess, abs=1e-9)


def test_a_known_cell_is_not_its_own_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEIGHBOURS", 1)
    maskings = [_hidden(_matrix(KNOWN, 0), 0)[0]]
    bars = Bars.fit(maskings, MASKING)
    guess = bars._of_nearest(maskings[0], True)
    own = maskings[0].values - bars.ridge.components.mean[maskings[0].genes]
    assert np.mean(np.isclose(guess, own)) < 0.9
    assert np.isclose(bars._of_nearest(maskings[0], False), own).all()


def test_bars_know_more_the_more_they_see(fitted: tuple) -> None:
    _, asked, bars = fitted
    errors = [np.square(each - asked.values).mean() for each in bars.predict(asked).values()]
    mean, _, pca, knn, both = errors
    assert max(pca, knn, both) < mean


def test_figures_of_predictions() -> None:
    genes, values = np.array([0, 0, 1, 1, 1, 2]), np.array([1.0, 2.0, 0.0, 4.0, 5.0, 3.0])
    empty = sparse.csr_matrix((1, 3))
    cells = HiddenGenes(empty, empty, np.zeros(6, np.int64), genes, values)
    guess = np.array([1.0, 1.5, 2.0, 3.0, 4.0, 0.0])
    means = np.array([1.0, 2.0, 3.0])
    found = figures(guess, cells, means)
    assert found["all"]["mean squared error"] == pytest.approx((0.25 + 4 + 1 + 1 + 9) / 6)
    assert found["all"]["correlation"] == pytest.approx(np.corrcoef(guess, values)[0, 1])
    assert found["all"]["beyond the mean"] == pytest.approx(
        np.corrcoef(guess - means[genes], values - means[genes])[0, 1]
    )
    # Non-zero: gene 1 is centred over its two non-zero positions, gene 2 says nothing.
    wanted = np.corrcoef([-0.25, 0.25, -0.5, 0.5, 0.0], [-0.5, 0.5, -0.5, 0.5, 0.0])[0, 1]
    assert found["non-zero"]["within genes"] == pytest.approx(wanted)
    # What is said of genes alone is nothing within genes.
    assert figures(means[genes], cells, means)["all"]["within genes"] is None
    assert figures(means[genes], cells, means)["all"]["beyond the mean"] is None


def test_correlation_and_centring() -> None:
    assert correlation(np.array([1.0, 1.0]), np.array([0.0, 1.0])) is None
    assert correlation(np.zeros(0), np.zeros(0)) is None
    np.testing.assert_allclose(centred_within(np.array([1.0, 3.0, 5.0]), np.array([2, 2, 0])), [-1.0, 1.0, 0.0])
