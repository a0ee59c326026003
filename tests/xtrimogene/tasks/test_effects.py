"""Guesses and metrics of perturbation effects against numbers worked out by hand, and graphs of genes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from xtrimogene.tasks import effects
from xtrimogene.tasks.effects import Guesses, interval, judge
from xtrimogene.tasks.gene_graphs import between, correlations, nearest, normalised, read_graph

GENES = [f"G{number}" for number in range(30)]


def test_guesses_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    changes = rng.normal(size=(3, 30))
    guesses = Guesses([("A",), ("B",), ("A", "C")], changes, GENES, {}, {})
    predicted = guesses.predict([("A", "B"), ("A", "D"), ("C", "D"), ("C",)])
    a, b, mean, none = changes[0], changes[1], changes.mean(0), np.zeros(30)
    for name, expected in {
        effects.NO_CHANGE: [none, none, none, none],
        effects.MEAN: [mean, mean, mean, mean],
        effects.ADDITIVE: [a + b, a, none, none],
        effects.ADDITIVE_MEAN: [a + b, a + mean, mean + mean, mean],
        effects.LINEAR_OWN: [mean, mean, mean, mean],
    }.items():
        np.testing.assert_allclose(predicted[name], expected, atol=1e-12)


def test_the_linear_model_finds_a_linear_law_of_embeddings() -> None:
    rng = np.random.default_rng(1)
    rows = {gene: rng.normal(size=4) for gene in GENES}
    law = rng.normal(size=(4, 4))

    def change(*genes: str) -> np.ndarray:
        return np.array([sum(rows[gene] @ law @ rows[other] for gene in genes) for other in GENES])

    trained = [(gene,) for gene in GENES[:25]]
    guesses = Guesses(trained, np.array([change(*each) for each in trained]), GENES, {}, rows)
    asked = [("G28",), ("G26", "G27")]
    truth = np.array([change(*each) for each in asked])
    predicted = guesses.predict(asked)[effects.LINEAR_MODEL]
    # A ridge of 0.1 against 25 examples; and the mean is not of this law.
    assert np.corrcoef(predicted.ravel(), truth.ravel())[0, 1] > 0.98
    nothing = guesses.predict([("unknown",)])[effects.LINEAR_MODEL]
    np.testing.assert_array_equal(nothing[0], guesses.mean)


def test_metrics_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(2)
    truth, predicted, common = rng.normal(size=(4, 30)), rng.normal(size=(4, 30)), rng.normal(size=30)
    found = judge(predicted, truth, common)
    for number in range(4):
        t, p = truth[number], predicted[number]
        top = sorted(range(30), key=lambda gene: -abs(t[gene]))[:20]
        assert found[effects.MSE_TOP][number] == pytest.approx(np.mean((p - t)[top] ** 2))
        assert found[effects.MSE_ALL][number] == pytest.approx(np.mean((p - t) ** 2))
        assert found[effects.R_TOP][number] == pytest.approx(np.corrcoef(p[top], t[top])[0, 1])
        assert found[effects.R_ALL][number] == pytest.approx(np.corrcoef(p, t)[0, 1])
        beyond = np.corrcoef((p - common)[top], (t - common)[top])[0, 1]
        assert found[effects.R_TOP_MEAN][number] == pytest.approx(beyond)
        assert found[effects.R_ALL_MEAN][number] == pytest.approx(np.corrcoef(p - common, t - common)[0, 1])
        distances = [np.sum((predicted[other] - t) ** 2) for other in range(4)]
        further = sum(distances[other] > distances[number] for other in range(4) if other != number)
        assert found[effects.RANK_SCORE][number] == pytest.approx(further / 3)


def test_what_all_perturbations_share_earns_nothing_beyond_the_mean() -> None:
    rng = np.random.default_rng(3)
    common = rng.normal(size=30)
    truth = common + 0.1 * rng.normal(size=(5, 30))
    found = judge(np.tile(common, (5, 1)), truth, common)
    assert found[effects.R_ALL].min() > 0.9
    assert np.all(found[effects.R_ALL_MEAN] == 0)
    assert np.all(found[effects.R_TOP_MEAN] == 0)
    assert np.all(found[effects.RANK_SCORE] == 0.5)
    perfect = judge(truth, truth, common)
    assert np.all(perfect[effects.RANK_SCORE] == 1)
    assert perfect[effects.R_ALL_MEAN].min() == pytest.approx(1)
    assert np.isnan(judge(truth[:1], truth[:1], common)[effects.RANK_SCORE][0])


def test_intervals_hold_the_mean_and_need_three_perturbations() -> None:
    values = np.random.default_rng(4).normal(loc=2.0, size=200)
    bounds = interval(values)
    assert bounds is not None
    low, high = bounds
    assert low < values.mean() < high
    # 1.96 standard errors on either side
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(200), rel=0.1)
    assert interval(values) == bounds
    assert interval(values[:2]) is None


def test_a_table_of_pairs_is_a_graph_whose_links_go_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "go.tsv"
    path.write_text("gene_a\tgene_b\tweight\nA\tB\t3\nC\tA\t1\nD\tD\t1\n")
    graph = read_graph(path)
    assert graph == {"A": {"B": 3.0, "C": 1.0}, "B": {"A": 3.0}, "C": {"A": 1.0}}
    np.testing.assert_allclose(between(graph, ["A", "B", "X"], ["B", "C"]), [[0.75, 0.25], [0, 0], [0, 0]])
    path.write_text("gene1\tgene2\nA\tB\n")
    assert read_graph(path) == {"A": {"B": 1.0}, "B": {"A": 1.0}}
    for text, words in (
        ("A\tB\nA B\n", "line 2"), ("A\tB\t-1\n", "line 1"), ("A\tB\t1\nA\tC\tx\n", "line 2"), ("", "got none"),
        ("A,B\n", "line 1"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"go\.tsv.*{words}"):
            read_graph(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_graph(tmp_path / "none.tsv")
    path.write_bytes(b"\x89HDF")
    for wrong in (path, tmp_path):
        with pytest.raises(ValueError, match=rf"graph {wrong}: expected a table of tab-separated text"):
            read_graph(wrong)
    path.write_text("x" * 200_000)
    with pytest.raises(ValueError, match=r"go\.tsv: expected a table of tab-separated text: field larger than"):
        read_graph(path)


def test_co_expression_links_genes_that_vary_together() -> None:
    rng = np.random.default_rng(5)
    cells = rng.normal(size=(500, 6)).astype(np.float32)
    cells[:, 1] = cells[:, 0] + 0.5 * cells[:, 1]
    cells[:, 5] = 1.0
    found = correlations(cells)
    np.testing.assert_allclose(found[:5, :5] + np.eye(5), np.corrcoef(cells[:, :5].T), atol=1e-5)
    assert np.all(found[5] == 0)
    linked = nearest(found, 500)
    assert {tuple(pair) for pair in np.argwhere(linked).tolist()} == {(0, 1), (1, 0)}
    # D^-1/2 (A + I) D^-1/2: a gene without links is its own neighbour alone.
    matrix = normalised(linked).to_dense()
    weight = float(linked[0, 1])
    expected = torch.eye(6)
    expected[:2, :2] = torch.tensor([[1, weight], [weight, 1]]) / (1 + weight)
    torch.testing.assert_close(matrix, expected)
