"""Perturbation effects on screens whose truth is known: each gene adds its own effect to the logarithms."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from xtrimogene.cli import main
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.network.vocabulary import Vocabulary
from xtrimogene.tasks import effects, fitting, folder, perturbation_training
from xtrimogene.tasks.conditions import name_of
from xtrimogene.tasks.perturbation import fit, predict
from xtrimogene.tasks.perturbation_model import LEARNED, OURS, SHUFFLED, TASK, PerturbationModel
from xtrimogene.tasks.perturbation_network import PerturbationNetwork
from xtrimogene.tasks.perturbation_parts import parts_of
from xtrimogene.tasks.perturbation_report import NETWORK, REPLICATE, PerturbationEvaluation, evaluate, verdict
from xtrimogene.tasks.screen import open_screen

GENES = [f"G{number}" for number in range(30)]
# P0 ... P7 are perturbed and not measured; P7 only together with others, and the checkpoint knows P0 ... P6.
PERTURBED = [f"P{number}" for number in range(8)]
SINGLES = PERTURBED[:7]
PAIRS = ["P0+P1", "P2+P3", "P4+P5", "P5+P6", "P0+P7"]
VOCABULARY = Vocabulary([*GENES, *PERTURBED[:7], "unused"])
TEST = "P0+P1\ttest\nP2+P3\ttest\nP4+P5\ttest\nP0+P7\ttest\n"


TOTAL = 20000


def screen_of(conditions: Sequence[str], cells: int = 60, seed: int = 0, shift: float = 0.0) -> AnnData:
    """Counts of cells under each condition, in logarithms the sum of what each gene does."""
    effect_of = {gene: np.random.default_rng(number).normal(size=30) for number, gene in enumerate(PERTURBED)}
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(99).normal(loc=3.0, scale=0.5, size=30) + shift
    labels = np.repeat(list(conditions), cells)
    rates = np.array([np.exp(base + 0.6 * sum(effect_of.get(g, 0) for g in each.split("+"))) for each in labels])
    counts = rng.poisson(rates)
    obs = pd.DataFrame({"condition": labels, "total": TOTAL}, index=[f"c{i}" for i in range(len(labels))])
    return AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))


READING: dict[str, Any] = {"condition": "condition", "total_counts": "total"}
FIT: dict[str, Any] = {**READING, "epochs": 12, "patience": 4, "control_cells": 16, "progress": False}


@pytest.fixture(scope="module")
def network() -> XTrimoGeneNetwork:
    return XTrimoGeneNetwork.from_preset("tiny", VOCABULARY, seed=0)


@pytest.fixture(scope="module")
def screen() -> AnnData:
    return screen_of(["ctrl", *SINGLES, *PAIRS])


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("split") / "split.tsv"
    path.write_text(f"condition\tpart\n{TEST}")
    return str(path)


@pytest.fixture(scope="module")
def fitted(network: XTrimoGeneNetwork, screen: AnnData, split: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fitted") / "model"
    report = fit(network, screen, path, split=split, compare=True, **FIT)
    assert report.control == "ctrl"
    assert sorted(report.parts["test"]) == ["P0+P1", "P0+P7", "P2+P3", "P4+P5"]
    assert report.unknown == ["P7"]
    assert report.genes == {"measured": 30, "measured, known": 30, "perturbed": 8, "perturbed, known": 7}
    return path


@pytest.fixture(scope="module")
def evaluation(fitted: Path, screen: AnnData) -> PerturbationEvaluation:
    return evaluate(fitted, screen, progress=False)


def test_pairs_of_genes_that_were_seen_are_predicted_and_baselines_stand_beside(
    evaluation: PerturbationEvaluation,
) -> None:
    groups = evaluation.groups()
    assert {group: int(own.sum()) for group, own in groups.items()} == {"all": 4, "pair, 2 seen": 3, "pair, 1 seen": 1}
    assert evaluation.unknown == ["P7"]

    def error(guess: str, group: str = "pair, 2 seen") -> float:
        return evaluation.mean(guess, effects.MSE_TOP, group)

    for version in NETWORK.values():
        assert error(version) < 0.2 * min(error(effects.NO_CHANGE), error(effects.MEAN))
        # The truth is additive, and the noise of a half is as it is.
        assert error(version) < 3 * max(error(effects.ADDITIVE), error(REPLICATE))
    assert error(NETWORK[OURS], "pair, 1 seen") < error(effects.NO_CHANGE, "pair, 1 seen")
    told = dict(line[2:].split(" (", 1) for line in verdict(evaluation).splitlines())
    assert list(told) == list(groups)
    for group, words in told.items():
        ours = error(NETWORK[OURS], group)
        for part in words.split(", is ")[1].split("; "):
            for guess in [name for name in effects.BASELINES if f"`{name}`" in part]:
                ratio = ours / error(guess, group)
                assert {"above": ratio > 1.005, "the same as": 0.995 <= ratio <= 1.005, "below": ratio < 0.995}[
                    part.split(" that of ")[0]
                ]
        assert all(f"`{name}` ({error(name, group):.4f})" in words for name in effects.BASELINES)


def test_predictions_are_judged_by_the_test_part_and_the_mean_of_the_fitted_one(
    evaluation: PerturbationEvaluation, fitted: Path, screen: AnnData
) -> None:
    model = PerturbationModel.load(fitted)
    values, labels = np.log1p(screen.X.toarray() / TOTAL * 1e4), screen.obs["condition"].to_numpy()

    def changes(names: Sequence[str]) -> np.ndarray:
        return np.array([values[labels == name].mean(0) - values[labels == "ctrl"].mean(0) for name in names])

    truth, predicted = evaluation.changes
    np.testing.assert_allclose(truth, changes(evaluation.perturbations), atol=1e-5)
    np.testing.assert_array_equal(
        predicted, model.mean_changes([tuple(n.split("+")) for n in evaluation.perturbations])
    )
    common = changes([name_of(each) for each in model.fitted]).mean(0)
    for metric, expected in effects.judge(predicted, truth, common).items():
        np.testing.assert_allclose(evaluation.metrics[NETWORK[OURS]][metric], expected, rtol=1e-3, atol=1e-6)


def test_a_gene_of_which_nothing_is_known_does_what_an_average_gene_does(fitted: Path) -> None:
    model = PerturbationModel.load(fitted)
    assert model.unknown(["P7", "P0", "unheard", "unused"]) == ["P7", "unheard"]
    # Every gene of a pair does half of what the pair does.
    shares = np.array([len(each) for each in model.fitted])[:, None]
    expected = (model.changes / shares).mean(0)
    np.testing.assert_allclose(model.mean_changes([("P7",)])[0], expected, atol=1e-5)
    both = model.mean_changes([("P0", "P1"), ("P0",), ("P1",)])
    np.testing.assert_allclose(both[0], both[1] + both[2], atol=1e-5)


def test_what_is_known_of_genes_stays_zero_where_it_says_nothing_of_genes_left_out(fitted: Path) -> None:
    # What each gene does was drawn at random.
    model = PerturbationModel.load(fitted)
    assert model.settings["epochs"][OURS]["others"] == 0
    assert not model._networks[OURS].known.any()
    assert not model._networks[OURS].likeness.any()


def test_versions_differ_in_their_rows_alone(fitted: Path) -> None:
    model = PerturbationModel.load(fitted)
    assert model.versions == [OURS, LEARNED, SHUFFLED]
    rows = {version: model.inputs.rows(version) for version in model.versions}
    assert rows[OURS].shape == rows[SHUFFLED].shape == (16, 30, 64)
    networks = [model._networks[version] for version in model.versions]
    shapes = [{name: tuple(each.shape) for name, each in net.named_parameters() if name != "table"} for net in networks]
    assert shapes[0] == shapes[1] == shapes[2]
    assert tuple(networks[1].table.shape) == (30, 64)  # type: ignore[union-attr]
    assert not np.array_equal(rows[OURS], rows[SHUFFLED])
    # Those of other genes in the same cell
    np.testing.assert_array_equal(np.sort(rows[OURS].numpy(), axis=1), np.sort(rows[SHUFFLED].numpy(), axis=1))
    # And of perturbed genes: of all that the checkpoint knows, in another order
    known = {version: model.inputs.of(VOCABULARY.genes, model.trained, version)[2] for version in model.versions}
    assert not known[LEARNED].any()
    assert not torch.equal(known[OURS], known[SHUFFLED])
    np.testing.assert_array_equal(np.sort(known[OURS].numpy(), axis=0), np.sort(known[SHUFFLED].numpy(), axis=0))


def _decoded(cells: AnnData, network: XTrimoGeneNetwork, genes: Sequence[str]) -> np.ndarray:
    """(cells, genes, D) the decoder's rows, standardised over cells and genes."""
    from xtrimogene import gene_embeddings

    given = gene_embeddings(cells, network, genes, total_counts="total", progress=False)[1]
    assert given is not None
    flat = given.reshape(-1, given.shape[-1])
    return np.asarray((given - flat.mean(0)) / flat.std(0))


def test_rows_are_those_of_the_decoder_in_that_very_cell(
    fitted: Path, network: XTrimoGeneNetwork, screen: AnnData
) -> None:
    model = PerturbationModel.load(fitted)
    cells = screen[model.settings["control_cells"]].copy()
    # They are kept in half precision.
    np.testing.assert_allclose(model.inputs.rows(OURS).numpy(), _decoded(cells, network, model.genes), atol=5e-3)
    expression = np.log1p(cells[:, model.genes].X.toarray() / TOTAL * 1e4)
    np.testing.assert_allclose(model.control, expression, rtol=1e-5)


def test_rows_are_of_the_genes_that_a_checkpoint_knows_and_zero_for_others(
    screen: AnnData, split: str, tmp_path: Path
) -> None:
    known = GENES[::-2]
    network = XTrimoGeneNetwork.from_preset("tiny", Vocabulary([*known, "P0"]), seed=0)
    fit(network, screen, tmp_path / "model", split=split, **{**FIT, "epochs": 1, "max_genes": 20})
    model = PerturbationModel.load(tmp_path / "model")
    asked = [gene for gene in model.genes if gene in known]
    assert len(model.genes) == 20
    assert 0 < len(asked) < 20
    rows = dict(zip(model.genes, model.inputs.rows(OURS).numpy().swapaxes(0, 1), strict=True))
    expected = _decoded(screen[model.settings["control_cells"]].copy(), network, asked)
    np.testing.assert_allclose(np.array([rows[gene] for gene in asked]), expected.swapaxes(0, 1), atol=5e-3)
    assert not np.any([rows[gene] for gene in model.genes if gene not in known])


def test_predicted_cells_are_the_control_cells_changed(fitted: Path, tmp_path: Path) -> None:
    output = tmp_path / "predicted.h5ad"
    asked = predict(fitted, ["P1+P0", "P3_ctrl", "unused"], output, progress=False)
    assert [name_of(each) for each in asked] == ["P0+P1", "P3", "unused"]
    found = anndata.read_h5ad(output)
    model = PerturbationModel.load(fitted)
    assert found.shape == (48, 30)
    assert list(found.obs["perturbation"].unique()) == ["P0+P1", "P3", "unused"]
    assert list(found.obs["control_cell"][:16]) == model.settings["control_cells"]
    np.testing.assert_array_equal(found.layers["change"][:16], model.in_cells(("P0", "P1")))
    np.testing.assert_allclose(found.X[16:32], np.maximum(model.control + found.layers["change"][16:32], 0), atol=1e-6)
    np.testing.assert_allclose(
        found.layers["change"][:16].mean(0), model.mean_changes([("P0", "P1")])[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["P0+unheard"], "nothing is known of 'unheard'"),
        (["P7"], "nothing is known of 'P7'"),
        (["ctrl"], "'ctrl', the control"),
        (["P0+P1", "P1_P0"], r"each once, got 'P0\+P1'"),
        ([], "at least one"),
    ],
)
def test_conditions_that_cannot_be_predicted_are_refused_by_name(
    fitted: Path, tmp_path: Path, asked: list[str], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        predict(fitted, asked, tmp_path / "p.h5ad", progress=False)
    assert "\n" not in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_the_report_holds_every_guess_and_picture(
    fitted: Path, screen: AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "screen.h5ad"
    screen.write_h5ad(path)
    moved = tmp_path / "elsewhere"
    shutil.copytree(fitted, moved)
    output = tmp_path / "report"
    arguments = ["perturb", "evaluate", "--model", str(moved), "--data", str(path), "--output", str(output), "--quiet"]
    assert main(arguments) == 0
    names = {"report.html", "report.md", "report.json", "errors.png", "errors.svg", "changes.png", "changes.svg"}
    assert {entry.name for entry in output.iterdir()} == names
    text = (output / "report.md").read_text()
    for guess in (*NETWORK.values(), *effects.BASELINES, REPLICATE, "P0+P7", "Nothing is known of 'P7'"):
        assert guess in text
    assert main(arguments) == 2
    assert "exists" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_bits_wherever_the_model_lies(
    fitted: Path, network: XTrimoGeneNetwork, screen: AnnData, split: str, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    fit(network, screen, again, split=split, **FIT)
    moved = tmp_path / "moved"
    again.rename(moved)
    one, two = PerturbationModel.load(fitted), PerturbationModel.load(moved)
    np.testing.assert_array_equal(one.in_cells(("P0", "P2")), two.in_cells(("P0", "P2")))
    assert two.versions == [OURS]


def test_validation_is_by_what_the_first_fit_does_not_see_and_the_second_fit_sees_all(
    network: XTrimoGeneNetwork, screen: AnnData, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[str, tuple[np.ndarray, float]] = {}

    def spied(module: Any, optimizer: Any, batches: Any, loss: Any, validate: Any, **options: Any) -> Any:
        if isinstance(module, PerturbationNetwork):
            with torch.no_grad():
                begun[options["name"]] = module.average.numpy().copy(), validate()
        return fitting.fit(module, optimizer, batches, loss, validate, **options)

    monkeypatch.setattr(perturbation_training, "fit", spied)
    parts = fit(network, screen, tmp_path / "model", split=split, **{**FIT, "epochs": 1}).parts
    fitted = sorted([*parts["training"], *parts["validation"]])
    assert len(fitted) == 8
    with open_screen(screen, control=None, **READING) as opened:
        held = opened.drawn(5, (0, 1)) == 1
    values, labels = np.log1p(screen.X.toarray() / TOTAL * 1e4), screen.obs["condition"].to_numpy()
    assert [int(held[labels == name].sum()) for name in fitted] == [12] * 8
    assert not held[labels == "ctrl"].any()
    every, control = np.ones_like(held), values[labels == "ctrl"].mean(0)

    def changes(names: list[str], cells: np.ndarray) -> np.ndarray:
        return np.array([values[(labels == name) & cells].mean(0) - control for name in names])

    def sizes(names: list[str]) -> np.ndarray:
        return np.array([[name.count("+") + 1] for name in names])

    # Untrained, every gene does what an average one does.
    def error(average: np.ndarray, names: list[str], cells: np.ndarray) -> float:
        scale = (changes(fitted, every) ** 2).mean()
        return float(((sizes(names) * average - changes(names, cells)) ** 2).mean() / scale)

    first = (changes(parts["training"], ~held) / sizes(parts["training"])).mean(0)
    last = (changes(fitted, every) / sizes(fitted)).mean(0)
    judged = (error(first, parts["validation"], every) + error(first, parts["training"], held)) / 2
    for name, average, loss in (("ours_epochs", first, judged), ("ours", last, error(last, fitted, every))):
        np.testing.assert_allclose(begun[name][0], average, atol=1e-5)
        assert begun[name][1] == pytest.approx(loss, rel=1e-4)


def test_of_many_genes_the_perturbed_ones_and_those_that_vary_most_in_training_are_predicted(
    network: XTrimoGeneNetwork, screen: AnnData, split: str, tmp_path: Path
) -> None:
    data = screen.copy()
    labels = data.obs["condition"].astype(str)
    trained = ~labels.isin(["P0+P1", "P2+P3", "P4+P5", "P0+P7"]).to_numpy()
    variances = np.log1p(data.X.toarray() / TOTAL * 1e4)[trained].var(0)
    order = [GENES[number] for number in np.argsort(-variances)]
    data.obs["condition"] = labels.replace("P6", order[-1])
    fit(network, data, tmp_path / "model", split=split, **{**FIT, "epochs": 1, "max_genes": 6})
    genes = PerturbationModel.load(tmp_path / "model").genes
    assert genes == sorted([*order[:5], order[-1]], key=GENES.index)


def test_nothing_that_was_measured_in_the_test_part_goes_into_a_fit(
    network: XTrimoGeneNetwork, screen: AnnData, split: str, tmp_path: Path
) -> None:
    other = screen.copy()
    counts = other.X.toarray()
    left_out = other.obs["condition"].isin(["P0+P1", "P2+P3", "P4+P5", "P0+P7"]).to_numpy()
    counts[left_out] = np.random.default_rng(1).poisson(5 * np.arange(30), (left_out.sum(), 30))
    other.X = sparse.csr_matrix(counts)
    made = []
    for number, data in enumerate((screen, other)):
        fit(network, data, tmp_path / str(number), split=split, **{**FIT, "epochs": 2, "max_genes": 12})
        made.append(folder.load(tmp_path / str(number), TASK))
    one, two = made
    assert one.settings.pop(folder.IDENTITY)["data"] != two.settings.pop(folder.IDENTITY)["data"]
    assert one.settings == two.settings
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=0, atol=0)


_FIT_IN_A_PROCESS = """
import sys, time
import anndata
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.network.vocabulary import Vocabulary
from xtrimogene.tasks import fitting, perturbation
fitting.SAVE_SECONDS = 0.0
fitting.fit.__kwdefaults__["save_seconds"] = 0.0
step = fitting._step
fitting._step = lambda *given: (time.sleep(0.01), step(*given))[1]
data, checkpoint, output, split = sys.argv[1:]
perturbation.fit(checkpoint, data, output, split=split, condition="condition", total_counts="total", epochs=12,
                 patience=4, control_cells=16, progress=False)
"""


def test_a_fit_that_was_killed_goes_on_with_the_same_bits(
    fitted: Path, network: XTrimoGeneNetwork, screen: AnnData, split: str, tmp_path: Path
) -> None:
    from xtrimogene.network import folder as checkpoints

    data, checkpoint, output = tmp_path / "screen.h5ad", tmp_path / "checkpoint", tmp_path / "model"
    screen.write_h5ad(data)
    checkpoints.save(checkpoint, network.state_dict(), network.config, network.vocabulary)
    command = [sys.executable, "-c", _FIT_IN_A_PROCESS, *map(str, (data, checkpoint, output, split))]
    root = str(Path(__file__).parents[3])
    running = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE)
    kept = tmp_path / "model.partial" / "ours_epochs.safetensors"
    for _ in range(3000):
        if kept.exists() or running.poll() is not None:
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGKILL)
    _, told = running.communicate()
    assert kept.exists(), told.decode()
    assert not output.exists()
    with pytest.raises(FileExistsError, match="--resume"):
        fit(checkpoint, data, output, split=split, **FIT)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        fit(checkpoint, data, output, split=split, resume=True, seed=1, **FIT)
    other = XTrimoGeneNetwork.from_preset("tiny", VOCABULARY, seed=1)
    with pytest.raises(ValueError, match="checkpoint was"):
        fit(other, data, output, split=split, resume=True, **FIT)
    with pytest.raises(ValueError, match="data was"):
        fit(checkpoint, screen_of(["ctrl", *SINGLES, *PAIRS], seed=1), output, split=split, resume=True, **FIT)
    fit(checkpoint, data, output, split=split, resume=True, **FIT)
    assert not kept.parent.exists()
    one, two = PerturbationModel.load(fitted), PerturbationModel.load(output)
    np.testing.assert_array_equal(one.in_cells(("P0", "P2")), two.in_cells(("P0", "P2")))
    # And one that is over has nothing to do.
    before = (output / "task.safetensors").stat().st_mtime_ns
    fit(checkpoint, data, output, split=split, resume=True, **FIT)
    assert (output / "task.safetensors").stat().st_mtime_ns == before


def test_a_graph_says_what_genes_do_that_were_never_perturbed(network: XTrimoGeneNetwork, tmp_path: Path) -> None:
    # Each A does what its B does, and the graph says so.
    names = [f"{kind}{number}" for number in range(10) for kind in "AB"]
    effect_of = {name: np.random.default_rng(int(name[1:])).normal(size=30) for name in names}
    base = np.random.default_rng(99).normal(loc=3.0, scale=0.3, size=30)
    labels = np.repeat(["ctrl", *names], 40)
    rng = np.random.default_rng(0)
    counts = rng.poisson([np.exp(base + 0.6 * effect_of.get(label, np.zeros(30))) for label in labels])
    obs = pd.DataFrame({"condition": labels, "total": TOTAL}, index=[f"c{i}" for i in range(len(labels))])
    screen = AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))
    graph, split = tmp_path / "graph.tsv", tmp_path / "split.tsv"
    graph.write_text("".join(f"A{number}\tB{number}\n" for number in range(10)))
    split.write_text("A3\ttest\nA8\ttest\nB5\ttest\n")  # and so B3, B8 and A5 have no neighbour in training
    report = fit(network, screen, tmp_path / "model", split=str(split), graph=graph, **FIT)
    assert report.graph == "graph.tsv, with neighbours for 17 of 20 perturbed genes"
    assert report.unknown == ["A5", "B3", "B8"]
    found = evaluate(tmp_path / "model", screen, progress=False)
    ours = found.mean(NETWORK[OURS], effects.MSE_TOP, "single, unseen")
    assert ours < 0.5 * found.mean(effects.MEAN, effects.MSE_TOP, "single, unseen")


def test_changes_are_taken_within_groups() -> None:
    # Cells of the second line are shifted, and a perturbation has most of its cells there.
    first = screen_of(["ctrl"] * 3 + ["P0"], seed=1)
    second = screen_of(["ctrl"] + ["P0"] * 3 + ["P1"] * 4, seed=2, shift=1.0)
    both = anndata.concat({"one": first, "two": second}, label="line", index_unique="-")
    changes = {}
    for group in (None, "line"):
        with open_screen(both, condition="condition", control=None, group=group, total_counts="total") as screen:
            sums = screen.sums(np.zeros(both.n_obs, int), 1, progress=False)
            assert screen.groups == (["0"] if group is None else ["one", "two"])
            changes[group] = dict(zip(map(name_of, screen.perturbations), sums.changes((0,)), strict=True))
    values = np.log1p(both.X.toarray() / TOTAL * 1e4)
    line, condition = both.obs["line"].to_numpy(), both.obs["condition"].to_numpy()

    def mean(label: str, of: str) -> np.ndarray:
        return values[(condition == label) & (line == of)].mean(0)

    expected = 0.25 * (mean("P0", "one") - mean("ctrl", "one")) + 0.75 * (mean("P0", "two") - mean("ctrl", "two"))
    # Each cell is rounded to float32.
    close = {"rtol": 0, "atol": 4 * float(np.finfo(np.float32).eps * values.max())}
    np.testing.assert_allclose(changes["line"]["P0"], expected, **close)
    np.testing.assert_allclose(changes["line"]["P1"], mean("P1", "two") - mean("ctrl", "two"), **close)
    whole = values[condition == "P1"].mean(0) - values[condition == "ctrl"].mean(0)
    np.testing.assert_allclose(changes[None]["P1"], whole, **close)
    lost = both[~((condition == "ctrl") & (line == "one"))]
    opening = open_screen(lost, condition="condition", control=None, group="line", total_counts="total")
    with pytest.raises(ValueError, match=r"control cells in every group, got none in obs\['line'\] == 'one'"):
        opening.__enter__()


SINGLE_NAMES = [("A",), ("B",), ("C",), ("D",), ("E",), ("F",), ("G",), ("H",)]
PAIR_NAMES = [("A", "B"), ("C", "D"), ("E", "F"), ("G", "H")]


def _read(label: str) -> tuple[str, ...]:
    return tuple(sorted(label.split("+")))


@pytest.mark.parametrize("seed", range(5))
def test_a_split_leaves_out_what_it_says(seed: int) -> None:
    perturbations = [*SINGLE_NAMES, *PAIR_NAMES]
    parts = parts_of(perturbations, "unseen-single", seed=seed, read=_read)
    known = {gene for number in parts.fitted for gene in perturbations[number]}
    left_out = {perturbations[number][0] for number in parts.test if len(perturbations[number]) == 1}
    assert len(left_out) == 2
    assert not left_out & known
    others = [pair for pair in PAIR_NAMES if not left_out & set(pair)]
    assert sum(perturbations[number] in others for number in parts.test) == round(0.25 * len(others))
    assert sorted([*parts.training, *parts.validation, *parts.test]) == list(range(12))
    assert parts.validation
    parts = parts_of(perturbations, "unseen-double", seed=seed, read=_read)
    assert {len(perturbations[number]) for number in parts.test} == {2}
    assert len(parts.test) == 2
    assert parts_of(perturbations, "unseen-double", test_share=1.0, seed=seed, read=_read).test == [8, 9, 10, 11]
    assert parts_of(perturbations, None, seed=seed, read=_read) == parts
    assert parts_of(SINGLE_NAMES, None, seed=seed, read=_read).test
    assert parts_of(perturbations, "none", seed=seed, read=_read).test == []


def test_a_table_says_what_is_kept_for_validation_and_for_the_test(tmp_path: Path) -> None:
    (tmp_path / "split.tsv").write_text("condition\tpart\nC\tvalidation\nB+A\ttest\n\nD\ttest\nE\ttrain\n")
    parts = parts_of([*SINGLE_NAMES, *PAIR_NAMES], str(tmp_path / "split.tsv"), read=_read)
    assert (parts.validation, parts.test) == ([2], [3, 8])
    assert parts.training == [0, 1, 4, 5, 6, 7, 9, 10, 11]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"split": "unseen-double", "perturbations": SINGLE_NAMES}, "the screen has none; pass 'unseen-single'"),
        ({"split": "unseen-single", "test_share": 0.9}, "at least 3 perturbations to fit to"),
        ({"split": "unseen-single", "test_share": 1.5}, "a share above 0 and up to 1, got 1.5"),
        ({"split": "none", "test_share": 0.5}, "expected none with split='none'"),
        ({"split": "unseen-gene"}, "expected unseen-single, unseen-double, none or a file, got 'unseen-gene'"),
        ({"table": "A\ttested\n"}, "line 1: expected condition<tab>train|validation|test"),
        ({"table": "A\ttest\nX+Y\ttest\n"}, "got 'X\\+Y'"),
        ({"table": "A+B\ttest\nB+A\ttrain\n"}, "line 2: A\\+B is in two parts"),
    ],
)
def test_splits_that_do_not_fit_are_refused_in_a_line(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    perturbations = given.pop("perturbations", [*SINGLE_NAMES, *PAIR_NAMES])
    if "table" in given:
        (tmp_path / "split.tsv").write_text(given.pop("table"))
        given["split"] = str(tmp_path / "split.tsv")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refused:
        parts_of(perturbations, read=_read, **given)
    assert "\n" not in str(refused.value)


def _without(**changed: Any) -> AnnData:
    data = screen_of(["ctrl", "P0", "P1", "P2", "P3"], cells=12)
    data.obs["condition"] = data.obs["condition"].astype(object)
    for name, value in changed.items():
        if name == "labels":
            data.obs.loc[data.obs["condition"] == value[0], "condition"] = value[1]
    return data


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (_without(), {"condition": "perturbation"}, "expected a column of obs, got 'perturbation'; columns: condition"),
        (_without(labels=("P0", None)), {}, "expected a value for every cell, got none for 12"),
        (_without(labels=("ctrl", "cells")), {}, "none goes by a name of controls"),
        (_without(), {"control": "cntrl"}, "got 'cntrl'; it has 'ctrl'"),
        (_without(), {"min_cells": 50}, "at least two perturbations of at least 50 cells"),
        (_without(), {"min_cells": 1}, "min_cells: expected at least 2"),
        (_without(), {"group": "line"}, "group: expected a column of obs, got 'line'"),
        (_without(), {"epochs": 0}, "epochs: expected at least 1"),
        (_without(), {"split": "unseen-double"}, "the screen has none"),
        (_without(), {"total_counts": "n"}, "total_counts: expected a column of obs, got 'n'"),
        (_without(), {"graph": "nowhere.tsv"}, "graph nowhere.tsv: no such file"),
    ],
)
def test_screens_and_options_that_do_not_fit_are_refused_before_the_work(
    data: AnnData, options: dict[str, Any], words: str, network: XTrimoGeneNetwork, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, OSError), match=words) as refused:
            fit(network, data, tmp_path / "model", **{**FIT, **options})
    assert "\n" not in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_screens_that_cannot_judge_a_model_are_refused(fitted: Path, screen: AnnData) -> None:
    for data, words in (
        (screen[:, GENES[:20]].copy(), "expected the genes that the model predicts, such as G0, G1, G2, got 20 of 30"),
        (screen[screen.obs["condition"].isin(["ctrl", "P0", "P1"])].copy(), "got none among 2; fit with a split"),
    ):
        with pytest.raises(ValueError, match=words) as refused:
            evaluate(fitted, data, progress=False)
        assert "\n" not in str(refused.value)


def test_perturbations_of_few_cells_are_left_out_and_named(network: XTrimoGeneNetwork, tmp_path: Path) -> None:
    data = anndata.concat([screen_of(["ctrl", *SINGLES], cells=20), screen_of(["P0+P1"], cells=3)], index_unique="-")
    report = fit(network, data, tmp_path / "model", **{**FIT, "epochs": 1, "split": "none"})
    assert report.parts["few"] == ["P0+P1"]
    assert "too few cells: 'P0+P1'" in str(report)
    with pytest.raises(ValueError, match=r"fit with a split that leaves some out \(--split\)"):
        evaluate(tmp_path / "model", data, progress=False)
    # Another screen has perturbations that it was not fitted to.
    other = evaluate(tmp_path / "model", screen_of(["ctrl", "P0", "P0+P1", "P2+P3"], seed=5), progress=False)
    assert other.perturbations == ["P0+P1", "P2+P3"]
    turned = screen_of(["ctrl", "P0", "P0+P1", "P2+P3"], seed=5)[:, GENES[::-1]].copy()
    again = evaluate(tmp_path / "model", turned, progress=False)
    assert again.metrics[NETWORK[OURS]][effects.MSE_ALL] == pytest.approx(
        other.metrics[NETWORK[OURS]][effects.MSE_ALL], rel=1e-6
    )


def test_two_cells_of_a_perturbation_are_enough_to_fit_and_to_judge(network: XTrimoGeneNetwork, tmp_path: Path) -> None:
    few = screen_of(["P6", "P0+P1", "P2+P3"], cells=2)
    data = anndata.concat([screen_of(["ctrl", *SINGLES[:6]], cells=20), few], index_unique="-")
    options = {**FIT, "epochs": 1, "min_cells": 2, "split": "unseen-double", "test_share": 1.0}
    report = fit(network, data, tmp_path / "model", **options)
    assert report.parts["few"] == []
    found = evaluate(tmp_path / "model", data, progress=False)
    assert found.perturbations == ["P0+P1", "P2+P3"]
    values = np.log1p(data.X.toarray() / TOTAL * 1e4)
    for number, name in enumerate(found.perturbations):
        first, second = values[data.obs["condition"] == name]
        assert found.metrics[REPLICATE][effects.MSE_ALL][number] == pytest.approx(np.mean((first - second) ** 2))


def test_the_command_fits_predicts_and_says_what_was_done(
    network: XTrimoGeneNetwork, screen: AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from xtrimogene.network import folder as checkpoints

    data, checkpoint, model = (str(tmp_path / name) for name in ("screen.h5ad", "checkpoint", "model"))
    screen.write_h5ad(data)
    checkpoints.save(checkpoint, network.state_dict(), network.config, network.vocabulary)
    fit_it = ["perturb", "fit", "--checkpoint", checkpoint, "--data", data, "--condition", "condition"]
    reading = ["--total-counts", "total", "--epochs", "2", "--control-cells", "8", "--no-progress"]
    assert main([*fit_it, "--control", "ctrl", "--split", "unseen-double", "--output", model, *reading]) == 0
    told = capsys.readouterr().out
    assert "control 'ctrl': 60 cells" in told
    assert "2 of 5 perturbations of several genes are left out" in told
    predicted = str(tmp_path / "predicted.h5ad")
    ask = ["perturb", "predict", "--model", model, "--perturbations", "P0+P1", "P2", "--output", predicted]
    assert main([*ask, "--no-progress"]) == 0
    assert anndata.read_h5ad(predicted).shape == (16, 30)
    assert main([*ask, "--no-progress"]) == 2
    assert main(["perturb", "predict", "--model", model, "--perturbations", "X", "--output", predicted + ".h5ad"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "nothing is known of 'X'" in errors[1]
