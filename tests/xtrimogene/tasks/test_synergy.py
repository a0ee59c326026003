"""Drug pairs on scores whose truth is known: what each drug does on each line, and both add up."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import Ridge

from xtrimogene.cli import main
from xtrimogene.network import folder as checkpoints
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.network.vocabulary import Vocabulary
from xtrimogene.tasks import fitting, folder, synergy_baselines, synergy_training
from xtrimogene.tasks.molecules import Graphs, maccs_keys, read_molecule
from xtrimogene.tasks.synergy import PROBABILITY_COLUMN, SCORE_COLUMN, UNSEEN_COLUMN, fit, predict
from xtrimogene.tasks.synergy_baselines import (
    AUROC,
    BASELINES,
    BOOSTING,
    FOREST,
    LINEAR,
    METRICS,
    PEARSON,
    RMSE,
    Guess,
    judge,
)
from xtrimogene.tasks.synergy_evaluation import evaluate
from xtrimogene.tasks.synergy_lines import OURS, RAW, SHUFFLED, VERSIONS, vectors
from xtrimogene.tasks.synergy_model import TASK, TEST, SynergyModel
from xtrimogene.tasks.synergy_network import PairNetwork
from xtrimogene.tasks.synergy_report import NETWORK, SynergyEvaluation, verdict
from xtrimogene.tasks.synergy_tables import Drugs, Expression, Pairs
from xtrimogene.tasks.synergy_triples import (
    DRUG,
    KINDS,
    LINE,
    PAIR,
    TRIPLE,
    Folds,
    Measured,
    Target,
    folds_of,
    validation_of,
)

GENES = [f"G{number}" for number in range(30)]
SMILES = {
    "ethanol": "CCO",
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "urea": "NC(N)=O",
    "fluorouracil": "O=c1[nH]cc(F)c(=O)[nH]1",
    "metformin": "CN(C)C(=N)NC(N)=N.Cl",
    "benzene": "c1ccccc1",
    "glycine": "NCC(=O)O",
    "carboplatin": "N.N.O=C(O)C1(C(=O)O)CCC1.[Pt]",
}
DRUGS = list(SMILES)
CELL_LINES = [f"L{number}" for number in range(6)]
EPOCHS = 40


def score_of(first: str, second: str, line: str) -> float:
    """Each drug does on each line what it does; together the sum."""
    effects = np.random.default_rng(3).normal(scale=15.0, size=(len(DRUGS), 1)) + np.random.default_rng(4).normal(
        scale=8.0, size=(len(DRUGS), len(CELL_LINES))
    )
    return 3.0 + sum(float(effects[DRUGS.index(drug), CELL_LINES.index(line)]) for drug in (first, second))


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]], separator: str = ",") -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([header, *rows])
    return str(path)


ROWS = [
    [first, second, line, round(score_of(first, second, line), 4)]
    for first, second in itertools.combinations(DRUGS, 2)
    for line in CELL_LINES
]
HEADER = ["drug_a", "drug_b", "cell_line", "loewe"]


@pytest.fixture(scope="module")
def network() -> XTrimoGeneNetwork:
    return XTrimoGeneNetwork.from_preset("tiny", Vocabulary([*GENES, "unused"]), seed=5)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("tables")
    rates = np.random.default_rng(1).lognormal(4.0, 1.5, size=(len(GENES), len(CELL_LINES)))
    expression = [[gene, *np.round(row, 3)] for gene, row in zip(GENES, rates.tolist(), strict=True)]
    return {
        "pairs": write_rows(path / "pairs.csv", HEADER, ROWS),
        "smiles": write_rows(path / "smiles.csv", ["drug", "smiles"], list(SMILES.items())),
        "cell_lines": write_rows(path / "lines.csv", ["gene", *CELL_LINES], expression),
    }


FIT: dict[str, Any] = {"epochs": EPOCHS, "patience": EPOCHS, "progress": False}


@pytest.fixture(scope="module")
def fitted(network: XTrimoGeneNetwork, tables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fitted") / "model"
    report = fit(network, output=path, **tables, **FIT)
    assert report.drugs == 8
    assert report.lines == 6
    assert sum(report.triples[name] for name in ("training", "validation", "test")) == len(ROWS)
    return path


@pytest.fixture(scope="module")
def evaluation(
    fitted: Path, tables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[SynergyEvaluation, Path]:
    path = tmp_path_factory.mktemp("evaluated") / "report"
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(synergy_baselines, "_TREES", 10)
        changed.setattr(synergy_baselines, "_ROUNDS", 20)
        changed.setattr(SynergyModel, "load", _short_schedule(SynergyModel.load))
        found = evaluate(fitted, tables["pairs"], output=path, splits=[PAIR, LINE], folds=2, progress=False)
    return found, path


def _short_schedule(load: Any) -> Any:
    def loaded(path: Any) -> SynergyModel:
        model = load(path)
        model.settings["schedule"] = {**model.settings["schedule"], "epochs": 2}
        return model

    return loaded


def measured_of(tables: dict[str, str], **changed: Any) -> tuple[Measured, Drugs, Expression]:
    """The tables as fit reads them."""
    pairs = Pairs.read(tables["pairs"], changed.pop("columns", None))
    drugs = Drugs()
    drugs.add(tables["smiles"], set(pairs.drugs.ravel().tolist()))
    expression = Expression.read(tables["cell_lines"], set(pairs.lines.tolist()))
    target = Target.found(pairs.table, changed.pop("target", None), 10.0, 0.0)
    return Measured.of(pairs, drugs, expression.lines, target), drugs, expression


def with_pairs(
    tables: dict[str, str], path: Path, rows: Sequence[Sequence[Any]], header: Sequence[str] = HEADER
) -> Any:
    return {**tables, "pairs": write_rows(path / "other.csv", header, rows)}


# Molecules


def test_of_a_salt_the_largest_part_is_kept_and_of_a_complex_of_platinum_all() -> None:
    assert read_molecule("CN(C)C(=N)NC(N)=N.Cl").smiles == read_molecule("CN(C)C(=N)NC(N)=N").smiles
    assert "Cl left out" in read_molecule("CN(C)C(=N)NC(N)=N.Cl").parts
    assert read_molecule("[Na+].CC(=O)[O-]").smiles == "CC(=O)[O-]"
    complexed = read_molecule(SMILES["carboplatin"])
    assert complexed.smiles.count(".") == 3
    assert complexed.parts == "all 4 parts are kept, a complex of Pt"
    assert read_molecule("CCO").parts == ""
    for wrong in ("C1CC", "", "no molecule"):
        with pytest.raises(ValueError, match="RDKit reads no molecule"):
            read_molecule(wrong)


def test_graphs_hold_every_bond_in_both_directions_and_some_molecules_are_those_alone() -> None:
    smiles = [read_molecule(each).smiles for each in SMILES.values()]
    graphs = Graphs.of(smiles)
    bonds = {tuple(bond) for bond in graphs.bonds.T.tolist()}
    assert all((second, first) in bonds for first, second in bonds)
    assert all(graphs.molecule[first] == graphs.molecule[second] for first, second in bonds)
    chosen = torch.tensor([1, 4, 7])
    some, alone = graphs.take(chosen), Graphs.of([smiles[number] for number in chosen])
    for name in ("atoms", "bonds", "molecule"):
        assert torch.equal(getattr(some, name), getattr(alone, name)), name


def test_mirror_images_are_different_drugs() -> None:
    left, right = (Graphs.of([read_molecule(each).smiles]) for each in ("N[C@@H](C)C(=O)O", "N[C@H](C)C(=O)O"))
    assert not torch.equal(left.atoms, right.atoms)


# Tables


def test_a_triple_in_either_order_is_one_and_its_measurements_are_averaged(
    tables: dict[str, str], tmp_path: Path
) -> None:
    rows = [["urea", "aspirin", "L1", 20], ["aspirin", "urea", "L1", 40], ["urea", "ethanol", "L1", -7],
            ["urea", "ethanol", "nowhere", 9]]  # fmt: skip
    measured, drugs, expression = measured_of(with_pairs(tables, tmp_path, rows))
    assert sorted(measured.values.tolist()) == [-7.0, 30.0]
    place = measured.values.tolist().index(30.0)
    codes = sorted(drugs.code_of[name] for name in ("urea", "aspirin"))
    assert measured.triples.codes[place].tolist() == [*codes, expression.lines.index("L1")]
    assert any("1 triples are measured more than once" in each and "off by 10 " in each for each in measured.told)
    assert any("lines without expression: 1 rows, 'nowhere'" in each for each in measured.told)


def test_two_names_of_one_molecule_are_one_drug(tables: dict[str, str], tmp_path: Path) -> None:
    smiles = write_rows(tmp_path / "smiles.csv", ["drug", "smiles"], [*SMILES.items(), ("spirit", "OCC")])
    rows = [["spirit", "urea", "L1", 20], ["urea", "ethanol", "L1", 30], ["urea", "glycine", "L1", -7]]
    measured, drugs, _ = measured_of({**with_pairs(tables, tmp_path, rows), "smiles": smiles})
    assert drugs.code_of["spirit"] == drugs.code_of["ethanol"]
    assert sorted(measured.values.tolist()) == [-7.0, 25.0]
    assert "'spirit' is the same molecule as 'ethanol': one drug under two names" in measured.told
    with pytest.raises(ValueError, match="row 2: 'spirit' and 'ethanol', one molecule"):
        measured_of({**with_pairs(tables, tmp_path, [["spirit", "ethanol", "L1", 20]]), "smiles": smiles})


def test_tables_are_read_however_they_lie(tables: dict[str, str], tmp_path: Path) -> None:
    measured, _, expression = measured_of(tables)
    turned = [[line, *column] for line, column in zip(expression.lines, expression.values.tolist(), strict=True)]
    other = {
        "pairs": write_rows(tmp_path / "p.tsv", ["Cell line", "Drug1", "Drug2", "loewe"],
                            [[line, second, first, score] for first, second, line, score in ROWS], "\t"),
        "smiles": write_rows(tmp_path / "s.csv", ["SMILES", "name"], [(b, a) for a, b in SMILES.items()], ";"),
        "cell_lines": write_rows(tmp_path / "l.csv", ["", *GENES], turned),
    }  # fmt: skip
    packed = tmp_path / "p.tsv.gz"
    packed.write_bytes(gzip.compress(Path(other["pairs"]).read_bytes()))
    again, _, found = measured_of({**other, "pairs": str(packed)})
    np.testing.assert_array_equal(again.triples.codes, measured.triples.codes)
    np.testing.assert_array_equal(again.values, measured.values)
    assert (found.lines, found.genes) == (expression.lines, expression.genes)
    np.testing.assert_array_equal(found.values, expression.values)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"pairs .*p\.tsv\.gz: expected a table of text: Compressed file ended"):
        measured_of({**other, "pairs": str(packed)})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pairs": [["urea", "urea", "L1", 3]]}, "row 2: 'urea' twice"),
        ({"pairs": [["urea", "", "L1", 3]]}, "row 2: an empty name"),
        ({"pairs": [["urea", "aspirin", "L1", "high"]]}, "'loewe' of every row, got row 2: 'high'"),
        ({"pairs": [["urea", "aspirin", "L1", ""]]}, "got row 2: ''"),
        ({"pairs": [["urea", "aspirin", "L1"]]}, "row 2: expected 4 cells as in the header, got 3"),
        ({"pairs": [["urea", "unheard", "L1", 3]]}, "whose SMILES are known, got row 2: 'unheard'"),
        ({"pairs": [["urea", "aspirin", "L1", 30], ["urea", "ethanol", "L1", 20]]}, "got 2 and 0; give others"),
        ({"pairs": [["urea", "aspirin", "elsewhere", 30]]}, "got 0 of them as columns and 0 as rows"),
        ({"header": ["drug_a", "drug_b", "where", "loewe"]}, "one column for the cell line, got none; name all three"),
        ({"header": ["drug1", "drug_b", "cell", "cell_line"]}, "got 'cell', 'cell_line'"),
        ({"header": ["drug_a", "drug_b", "cell_line", "zip"]}, "a column 'loewe' or 'label'"),
        ({"target": "zip"}, "one column 'zip', got none; it has 'drug_a'"),
        ({"smiles": [("urea", "NC(N)=O"), ("aspirin", "C1CC")]}, "row 3: 'aspirin', and RDKit reads no molecule"),
        ({"smiles": [("urea", "NC(N)=O"), ("urea", "CCO")]}, "row 3: 'urea' as another molecule"),
        ({"lines": [["G0", 1, "x"]]}, r"row 2 \('G0'\): expected numbers of 0 and more, got 'x' in column 'L1'"),
        ({"lines": [["G0", 1, -2]]}, "got '-2' in column 'L1'"),
        ({"lines": [["G0", 1, 2], ["G0", 1, 2]]}, "a name of its own in each of the rows, got 'G0'"),
    ],
)
def test_tables_that_do_not_fit_are_refused_by_name_and_row(
    changed: dict[str, Any], words: str, tables: dict[str, str], tmp_path: Path
) -> None:
    given = dict(tables)
    if "pairs" in changed or "header" in changed:
        given["pairs"] = write_rows(tmp_path / "p.csv", changed.get("header", HEADER), changed.get("pairs", ROWS[:3]))
    if "smiles" in changed:
        given["smiles"] = write_rows(tmp_path / "s.csv", ["drug", "smiles"], changed["smiles"])
    if "lines" in changed:
        given["cell_lines"] = write_rows(tmp_path / "l.csv", ["gene", "L0", "L1"], changed["lines"])
    with pytest.raises(ValueError, match=words) as refused:
        measured_of(given, target=changed.get("target"))
    assert "\n" not in str(refused.value)


def test_classes_are_by_two_bounds_or_given(tables: dict[str, str], tmp_path: Path) -> None:
    rows = [["urea", drug, "L1", score] for drug, score in (("aspirin", 10), ("ethanol", 10.1), ("glycine", -0.1))]
    found = measured_of(with_pairs(tables, tmp_path, rows))[0]
    assert dict(zip(found.values.tolist(), found.classes.tolist(), strict=True)) == {10.0: -1, 10.1: 1, -0.1: 0}
    assert found.scores is not None
    assert measured_of(with_pairs(tables, tmp_path, rows), target="label")[0].scores is None
    labelled = [[*row[:3], int(row[3] > 10)] for row in rows]
    given = with_pairs(tables, tmp_path, labelled, ["drug_a", "drug_b", "cell_line", "label"])
    found = measured_of(given)[0]
    assert sorted(found.classes.tolist()) == [0, 0, 1]
    assert found.scores is None


# Folds


@pytest.mark.parametrize("kind", KINDS)
def test_folds_that_are_made_hold_out_what_they_say_and_so_does_validation(kind: str, tables: dict[str, str]) -> None:
    codes = measured_of(tables)[0].triples.codes
    folds = Folds.made(kind, codes, 3, seed=1)

    def groups(of: Any) -> list[set[Any]]:
        rows = codes[of].tolist()
        return [set(row[:2]) if kind == DRUG else {row[2]} if kind == LINE else {tuple(row[:2])} for row in rows]

    assert folds.test.any(0).all()
    for test, train in zip(folds.test, folds.train, strict=True):
        learned, validation = validation_of(kind, codes, train, seed=1)
        assert not (test & train).any()
        np.testing.assert_array_equal(learned | validation, train)
        assert validation.any()
        known = set.union(*groups(train))
        assert not any(each <= known for each in groups(test))
        known = set.union(*groups(learned))
        assert not any(each <= known for each in groups(validation))


def test_a_column_of_folds_is_checked_for_what_it_is_said_to_hold_out(tables: dict[str, str], tmp_path: Path) -> None:
    def folds(split: str, fold_of: Any, **options: Any) -> Folds:
        rows = [[*row, fold_of(number, row)] for number, row in enumerate(ROWS)]
        given = with_pairs(tables, tmp_path, rows, [*HEADER, "fold"])
        measured, drugs, expression = measured_of(given)
        return folds_of(split, measured, drugs, expression.lines, **options)

    by_line = folds("line", lambda _, row: int(row[2][1]) % 2, fold_column="fold")
    assert by_line.test.sum(1).tolist() == [len(ROWS) // 2] * 2
    assert "no test line is in a training triple" in by_line.told
    assert "folds made here" in folds("line", lambda number, _: number % 2).told
    by_pair = folds("pair", lambda number, _: "" if number < 6 else number // 6 % 2)
    assert "6 triples without a fold are trained on and not tested" in by_pair.told
    assert by_pair.train.all(0).sum() == 6
    for split, words in (("line", "leave lines out, got"), ("drug", "leave drugs out, got")):
        with pytest.raises(ValueError, match=words) as refused:
            folds(split, lambda number, _: number // 6 % 2, fold_column="fold")
        assert f"--split {split}" in str(refused.value)
    with pytest.raises(ValueError, match=r"leave pairs out, got .* they leave lines out"):
        folds("pair", lambda _, row: int(row[2][1]) % 2)
    with pytest.raises(ValueError, match="at least two folds, got 1"):
        folds("pair", lambda *_: 1)
    with pytest.raises(
        ValueError, match="split drug: expected triples of synergy and of antagonism to fit to, got none"
    ):
        folds("drug", lambda *_: 1, count=2)
    with pytest.raises(ValueError, match="at least 9 drugs for as many folds, got 8"):
        folds("drug", lambda *_: 1, count=9)
    with pytest.raises(ValueError, match="folds: expected at least 2, got 0"):
        folds("drug", lambda *_: 1, count=0)


def test_a_table_of_folds_says_what_it_holds_out(tables: dict[str, str], tmp_path: Path) -> None:
    measured, drugs, expression = measured_of(tables)

    def kind(fold_of: Any) -> str:
        rows = [[second, first, line, fold_of(n, line)] for n, (first, second, line, _) in enumerate(ROWS)]
        path = write_rows(tmp_path / "folds.csv", ["drug_a", "drug_b", "cell_line", "fold"], rows)
        return folds_of(path, measured, drugs, expression.lines).kind

    assert kind(lambda _, line: line[1]) == LINE
    assert kind(lambda number, _: number // 6 % 3) == PAIR
    assert kind(lambda number, _: number % 7) == TRIPLE
    with pytest.raises(FileNotFoundError, match="expected pair, line, drug or a table with a column 'fold', got 'x'"):
        folds_of("x", measured, drugs, expression.lines)


# The network and the fit


def test_the_order_of_the_drugs_makes_no_difference_to_the_last_bit(fitted: Path, tmp_path: Path) -> None:
    model = SynergyModel.load(fitted)
    codes = torch.from_numpy(model.codes)
    lines = torch.from_numpy(model.known[OURS])[codes[:, 2]]
    with torch.no_grad():
        one, other = (model._network(model.graphs, codes[:, a], codes[:, b], lines) for a, b in ((0, 1), (1, 0)))
    assert torch.equal(one, other)
    assert one.std() > 0
    rows = [*([a, b, line] for a, b, line, _ in ROWS), *([b, a, line] for a, b, line, _ in ROWS)]
    asked = write_rows(tmp_path / "asked.csv", HEADER[:3], rows)
    predict(fitted, asked, tmp_path / "scored.csv")
    found = [row[3:] for row in csv.reader((tmp_path / "scored.csv").open())][1:]
    assert found[: len(ROWS)] == found[len(ROWS) :]


def test_pairs_that_were_held_out_are_predicted_and_the_file_says_what_is_unseen(
    fitted: Path, tables: dict[str, str], tmp_path: Path
) -> None:
    model = SynergyModel.load(fitted)
    held_out = model.codes[model.parts == TEST]
    scores, probabilities = model.predict(held_out)
    truth = model.scores[model.parts == TEST]
    figures = judge(Guess(scores, probabilities), truth, model.classes[model.parts == TEST])
    assert figures[AUROC] > 0.8
    assert figures[PEARSON] > 0.6
    counts = predict(fitted, tables["pairs"], tmp_path / "scored.csv")
    assert counts == {"nothing": int((model.parts != TEST).sum()), "pair": len(held_out)}
    rows = list(csv.DictReader((tmp_path / "scored.csv").open()))
    assert [row["loewe"] for row in rows] == [str(row[3]) for row in ROWS]
    place = {tuple(code): number for number, code in enumerate(held_out.tolist())}
    for row in rows:
        drugs = sorted(model.drugs.code_of[row[name]] for name in ("drug_a", "drug_b"))
        number = place.get((*drugs, model.lines.index(row["cell_line"])))
        assert row[UNSEEN_COLUMN] == ("" if number is None else "pair")
        if number is not None:
            assert float(row[SCORE_COLUMN]) == pytest.approx(scores[number], rel=1e-4, abs=1e-4)
            assert float(row[PROBABILITY_COLUMN]) == pytest.approx(probabilities[number], rel=1e-4, abs=1e-6)


def test_drugs_and_lines_that_the_model_does_not_have_come_from_tables(
    fitted: Path, tables: dict[str, str], tmp_path: Path
) -> None:
    asked = write_rows(tmp_path / "asked.csv", HEADER[:3], [["urea", "propane", "L1"], ["urea", "aspirin", "new"]])
    with pytest.raises(ValueError, match="SMILES are known, got row 2: 'propane'"):
        predict(fitted, asked, tmp_path / "scored.csv")
    smiles = write_rows(tmp_path / "s.csv", ["drug", "smiles"], [("propane", "CCC")])
    with pytest.raises(ValueError, match=r"lines whose expression is known, got row 3: 'new'; give .*--cell-lines"):
        predict(fitted, asked, tmp_path / "scored.csv", smiles=smiles)
    assert not (tmp_path / "scored.csv").exists()
    known = Expression.read(tables["cell_lines"], CELL_LINES)
    values = zip(known.genes, known.values[1].tolist(), strict=True)
    lines = write_rows(tmp_path / "l.csv", ["gene", "new"], [[gene, value] for gene, value in values][::-1])
    counts = predict(fitted, asked, tmp_path / "scored.csv", smiles=smiles, cell_lines=lines)
    assert counts == {"line": 1, "one drug": 1}
    model = SynergyModel.load(fitted)
    extended = model.extended(Pairs.read(asked, None), smiles, lines, torch.device("cpu"))
    # Genes may come in another order than those of the model.
    np.testing.assert_allclose(extended.known[RAW][-1], model.known[RAW][1], atol=2e-3)
    of = {name: extended.drugs.code_of[name] for name in ("urea", "propane")} | {"another": len(DRUGS) + 1}
    assert extended.unseen(np.array([[of["another"], of["propane"], 6], [of["urea"], of["propane"], 6]])) == [
        "both drugs and line", "one drug and line",
    ]  # fmt: skip
    extended.parts = np.where(np.arange(len(model.parts)) == 7, TEST, 0)
    assert extended.unseen(model.codes[6:8]) == ["", "triple"]
    # The new line has the expression of L1.
    same = write_rows(tmp_path / "same.csv", HEADER[:3], [["urea", "aspirin", "L1"]])
    predict(fitted, same, tmp_path / "same_scored.csv")
    one, other = (
        float(list(csv.DictReader((tmp_path / name).open()))[-1][SCORE_COLUMN])
        for name in ("scored.csv", "same_scored.csv")
    )
    assert one == pytest.approx(other, rel=1e-4)


def test_nothing_that_was_measured_in_the_test_part_goes_into_a_fit(
    fitted: Path, network: XTrimoGeneNetwork, tables: dict[str, str], tmp_path: Path
) -> None:
    model = SynergyModel.load(fitted)
    held_out = {tuple(code) for code in model.codes[model.parts == TEST].tolist()}
    rows = []
    for first, second, line, score in ROWS:
        drugs = sorted((model.drugs.code_of[first], model.drugs.code_of[second]))
        changed = (*drugs, model.lines.index(line)) in held_out
        rows.append([first, second, line, -3 * score + 5 if changed else score])
    fit(network, output=tmp_path / "model", **with_pairs(tables, tmp_path, rows), **FIT)
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "model", moved)
    one, other = (folder.load(path, TASK).tensors for path in (fitted, moved))
    assert not torch.equal(one["scores"], other["scores"])
    for name, tensor in one.items():
        if name not in ("scores", "classes"):
            assert torch.equal(tensor, other[name]), name


def test_the_expression_of_lines_that_are_held_out_goes_into_no_fit(
    network: XTrimoGeneNetwork, tables: dict[str, str], tmp_path: Path
) -> None:
    options = {**FIT, "epochs": 2, "split": "line", "folds": 3}
    fit(network, output=tmp_path / "model", **tables, **options)
    model = SynergyModel.load(tmp_path / "model")
    held_out = np.unique(model.codes[model.parts == TEST, 2])
    known = Expression.read(tables["cell_lines"], CELL_LINES)
    values = known.values.copy()
    values[held_out] = values[held_out][:, ::-1]
    rows = [[gene, *column] for gene, column in zip(known.genes, values.T.tolist(), strict=True)]
    changed = {**tables, "cell_lines": write_rows(tmp_path / "l.csv", ["gene", *CELL_LINES], rows)}
    fit(network, output=tmp_path / "other", **changed, **options)
    one, other = (folder.load(tmp_path / name, TASK).tensors for name in ("model", "other"))
    assert not torch.equal(one[f"lines.{OURS}"], other[f"lines.{OURS}"])
    for name, tensor in one.items():
        if not name.startswith("lines."):
            assert torch.equal(tensor, other[name]), name


def test_sums_over_atoms_are_in_one_order_whatever_the_threads(
    network: XTrimoGeneNetwork, tables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With so few atoms threads do not come to add at once. Tests run in one order anyway.
    torch.use_deterministic_algorithms(False)
    seen = []
    forward = PairNetwork.forward

    def spied(*given: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return forward(*given)

    monkeypatch.setattr(PairNetwork, "forward", spied)
    fit(network, output=tmp_path / "model", **tables, **{**FIT, "epochs": 1})
    during_fit = len(seen)
    predict(tmp_path / "model", tables["pairs"], tmp_path / "scored.csv")
    assert 0 < during_fit < len(seen)
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


class Interrupted(Exception):
    pass


def test_a_fit_that_was_broken_off_goes_on_with_the_same_bits(
    fitted: Path, network: XTrimoGeneNetwork, tables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = fitting._step, 0

    def broken(*given: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 25:
            raise Interrupted
        return step(*given)

    output = tmp_path / "model"
    monkeypatch.setattr(fitting, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(fitting, "_step", broken)
    with pytest.raises(Interrupted):
        fit(network, output=output, **tables, **FIT)
    monkeypatch.setattr(fitting, "_step", step)
    assert not output.exists()
    with pytest.raises(FileExistsError, match="--resume"):
        fit(network, output=output, **tables, **FIT)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        fit(network, output=output, **tables, **FIT, seed=1, resume=True)
    fit(network, output=output, **tables, **FIT, resume=True)
    one, other = (folder.load(path, TASK).tensors for path in (fitted, output))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    before = (output / folder.TENSORS_FILE).stat().st_mtime_ns
    fit(network, output=output, **tables, **FIT, resume=True)
    assert (output / folder.TENSORS_FILE).stat().st_mtime_ns == before


def test_classes_alone_are_learned_where_there_are_no_scores(
    network: XTrimoGeneNetwork, tables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**FIT, "epochs": 2, "target": "label", "split": "none"}
    some = with_pairs(tables, tmp_path, ROWS[:-12])
    report = fit(network, output=tmp_path / "model", **some, **options)
    assert report.triples["test"] == 0
    assert "classes alone" in report.target
    predict(tmp_path / "model", tables["pairs"], tmp_path / "scored.csv")
    rows = list(csv.DictReader((tmp_path / "scored.csv").open()))
    assert {row[SCORE_COLUMN] for row in rows} == {""}
    assert all(0 < float(row[PROBABILITY_COLUMN]) < 1 for row in rows)
    with pytest.raises(ValueError, match="one split that its folds are for, got pair, line, drug"):
        evaluate(tmp_path / "model", tables["pairs"], fold_column="fold", progress=False)
    with pytest.raises(ValueError, match="one column 'fold', got none"):
        evaluate(tmp_path / "model", tables["pairs"], fold_column="fold", splits=["line"], progress=False)
    with pytest.raises(ValueError, match="triples that the model was not fitted to, got none"):
        evaluate(tmp_path / "model", some["pairs"], splits=["none"], progress=False)
    # The network's other output, which nothing taught, is no prediction of scores.
    monkeypatch.setattr(synergy_baselines, "_TREES", 10)
    monkeypatch.setattr(synergy_baselines, "_ROUNDS", 20)
    judged = tmp_path / "judged"
    found = evaluate(tmp_path / "model", tables["pairs"], output=judged, splits=["none"], progress=False)
    assert found.counts == {"pair": 12}
    assert all(np.isnan(figures[RMSE]) for figures in found.model["pair"].values())
    assert {entry.name for entry in judged.iterdir()} == {"report.html", "report.md", "report.json"}
    assert "predicted scores" not in (judged / "report.md").read_text()


@pytest.mark.parametrize(
    ("values", "power", "words"),
    [
        ("tpm", "log2", r"expected TPM, got numbers of at most .* of log2\(TPM \+ 1\) as 2\^x - 1"),
        ("counts", "", "expected whole counts, got numbers that are not; pass values='tpm'"),
    ],
)
def test_expression_that_is_not_what_it_is_said_to_be_is_refused(
    values: str, power: str, words: str, network: XTrimoGeneNetwork, tables: dict[str, str], tmp_path: Path
) -> None:
    known = Expression.read(tables["cell_lines"], CELL_LINES)
    numbers = np.log2(known.values + 1) if power else known.values
    rows = [[gene, *column] for gene, column in zip(known.genes, numbers.T.tolist(), strict=True)]
    given = {**tables, "cell_lines": write_rows(tmp_path / "l.csv", ["gene", *CELL_LINES], rows)}
    with pytest.raises(ValueError, match=words):
        fit(network, output=tmp_path / "model", **given, **FIT, values=values)
    assert [entry.name for entry in tmp_path.iterdir()] == ["l.csv"]


def test_what_to_install_is_said_where_a_package_is_missing(
    network: XTrimoGeneNetwork, tables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = metadata.version

    def version(name: str) -> str:
        if name == "rdkit":
            raise metadata.PackageNotFoundError
        return found(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match=r"synergy needs rdkit.*pip install 'xtrimogene\[synergy\]'"):
        fit(network, output=tmp_path / "model", **tables, **FIT)


# What is compared


def test_versions_of_lines_are_as_wide_and_differ_in_what_they_say(fitted: Path) -> None:
    model = SynergyModel.load(fitted)
    own = np.arange(5)
    found = {version: vectors(version, model.known, own, 0).numpy() for version in VERSIONS}
    assert len({each.shape for each in found.values()}) == 1
    assert len({each.tobytes() for each in found.values()}) == len(VERSIONS)
    # Each line has the embedding of another one.
    ours, other = found[OURS], found[SHUFFLED]
    np.testing.assert_array_equal(np.sort(ours, axis=0), np.sort(other, axis=0))
    assert not any(np.array_equal(one, two) for one, two in zip(ours, other, strict=True))
    # Nothing is lost of the expression of the lines that are trained on.
    raw, expression = found[RAW][own], model.known[RAW][own]
    apart = [np.linalg.norm(each[:, None] - each[None], axis=2) for each in (raw, expression)]
    np.testing.assert_allclose(apart[0], apart[1], rtol=1e-4, atol=1e-4)


def test_lines_are_whitened_by_those_that_are_trained_on() -> None:
    lines = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 8)
    network = PairNetwork(8)
    network.whiten(lines)
    white = ((lines - network.line_mean) @ network.line_axes).double()
    moments = white.T @ white / len(lines)
    expected = torch.diag(torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64))
    torch.testing.assert_close(moments, expected, atol=1e-4, rtol=0)
    network.whiten(lines[:1])
    assert not network.line_axes.any()


def test_figures_of_a_guess() -> None:
    classes = np.array([1, 1, 0, 0, -1])
    scores = np.array([20.0, 12.0, -3.0, -5.0, 4.0])
    found = judge(Guess(scores + 2.0, np.array([0.9, 0.4, 0.45, 0.1, 0.7])), scores, classes)
    assert found == pytest.approx(
        {AUROC: 0.75, "average precision": 5 / 6, "balanced accuracy": 0.75, "kappa": 0.5, PEARSON: 1.0, RMSE: 2.0}
    )
    one_class = judge(Guess(None, np.full(2, 0.5)), None, np.array([1, 1]))
    assert np.isnan(list(one_class.values())).all()


def test_every_way_is_judged_in_every_fold_and_the_winner_is_named_first(
    evaluation: tuple[SynergyEvaluation, Path], fitted: Path, tables: dict[str, str]
) -> None:
    found, path = evaluation
    ways = [*NETWORK.values(), *BASELINES]
    for compared in found.compared.values():
        assert list(compared.figures) == ways
        assert all(len(compared.figures[way][metric]) == 2 for way in ways for metric in METRICS)
    lines = verdict(found).splitlines()
    for line, compared in zip(lines, found.compared.values(), strict=False):
        auroc = {way: compared.mean(way, AUROC) for way in (NETWORK[OURS], *BASELINES)}
        best = max(BASELINES, key=auroc.__getitem__)
        assert f"`{best}`" in line.split(": ")[0]
        wins = auroc[NETWORK[OURS]] > auroc[best]
        assert (f"the network is better than `{best}`" in line) == wins
        assert all(f"`{way}` {auroc[way]:.3f}" in line for way in BASELINES)
        added = auroc[NETWORK[OURS]] - compared.mean(NETWORK[SHUFFLED], AUROC)
        assert f"{added:+.3f} over the embedding of another line" in line
    assert {entry.name for entry in path.iterdir()} == {
        "report.html", "report.md", "report.json", "auroc.png", "auroc.svg", "scores.png", "scores.svg"
    }  # fmt: skip
    numbers = json.loads((path / "report.json").read_text())
    assert numbers["folds"]["pair"]["figures"][BOOSTING][AUROC]["mean"] == pytest.approx(
        found.compared["pair"].mean(BOOSTING, AUROC)
    )
    assert not (path.parent / "report.partial").exists()
    # The model itself, by the part that was held out of its fit.
    model = SynergyModel.load(fitted)
    test = model.parts == TEST
    own = judge(Guess(*model.predict(model.codes[test])), model.scores[test], model.classes[test])
    assert found.model["pair"][NETWORK[OURS]] == pytest.approx(own)


def test_ways_without_a_network_are_fitted_to_what_is_not_held_out(
    evaluation: tuple[SynergyEvaluation, Path], fitted: Path, tables: dict[str, str]
) -> None:
    found, _ = evaluation
    model = SynergyModel.load(fitted)
    rows = np.zeros((len(model.codes), len(DRUGS) + len(CELL_LINES)))
    for row, (first, second, line) in zip(rows, model.codes.tolist(), strict=True):
        row[[first, second, len(DRUGS) + line]] = 1

    def error(train: Any, test: Any) -> float:
        found = Ridge().fit(rows[train], model.scores[train]).predict(rows[test])
        return float(np.sqrt(np.mean((found - model.scores[test]) ** 2)))

    test = model.parts == TEST
    assert found.model["pair"][LINEAR][RMSE] == pytest.approx(error(~test, test))
    expected = [error(~test, test) for test in Folds.made(LINE, model.codes, 2, 0).test]
    assert found.compared["line"].figures[LINEAR][RMSE] == pytest.approx(expected)


def test_in_folds_of_lines_components_are_those_of_lines_that_are_trained_on(
    evaluation: tuple[SynergyEvaluation, Path], fitted: Path
) -> None:
    found = evaluation[0].compared["line"].figures
    model = SynergyModel.load(fitted)
    codes, scores = model.codes, model.scores
    folds = Folds.made(LINE, codes, 2, 0)
    train, test = folds.train[0], folds.test[0]

    def error(predicted: Any) -> float:
        return float(np.sqrt(np.mean((predicted - scores[test]) ** 2)))

    keys, lines = maccs_keys(model.drugs.smiles), vectors(RAW, model.known, np.unique(codes[train, 2]), 0).numpy()
    rows = np.concatenate([keys[codes[:, 0]] + keys[codes[:, 1]], lines[codes[:, 2]]], 1)
    forest = RandomForestRegressor(10, max_features="sqrt", random_state=0).fit(rows[train], scores[train])
    assert found[FOREST][RMSE][0] == pytest.approx(error(forest.predict(rows[test])))

    learned, validation = validation_of(LINE, codes, train, 0)
    raw = vectors(RAW, model.known, np.unique(codes[learned, 2]), 0)
    module, _ = synergy_training.fit_network(
        synergy_training.Examples(codes, scores, model.classes, model.graphs, raw), learned, validation,
        synergy_training.Schedule(2, EPOCHS, 0), device=torch.device("cpu"), work=None, progress=False, name="raw",
        desc="raw",
    )  # fmt: skip
    again = synergy_training.predicted(module, model.graphs, raw, codes[test])[0]
    assert found[NETWORK[RAW]][RMSE][0] == pytest.approx(error(again))


def test_an_evaluation_that_was_broken_off_goes_on_without_what_is_finished(
    evaluation: tuple[SynergyEvaluation, Path],
    fitted: Path,
    tables: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(synergy_baselines, "_TREES", 10)
    monkeypatch.setattr(synergy_baselines, "_ROUNDS", 20)
    monkeypatch.setattr(SynergyModel, "load", _short_schedule(SynergyModel.load))
    began: list[str] = []
    fitted_anew = synergy_training.fit

    def counted(*given: Any, name: str, **options: Any) -> Any:
        if len(began) == 5 and name not in began:
            raise Interrupted
        began.append(name)
        return fitted_anew(*given, name=name, **options)

    options: dict[str, Any] = {"output": tmp_path / "report", "splits": [PAIR], "folds": 2, "progress": False}
    monkeypatch.setattr(synergy_training, "fit", counted)
    with pytest.raises(Interrupted):
        evaluate(fitted, tables["pairs"], **options)
    assert len(began) == 5
    first = began[:4]
    began.clear()
    monkeypatch.setattr(
        synergy_training,
        "fit",
        lambda *given, name, **all: (began.append(name), fitted_anew(*given, name=name, **all))[1],
    )
    with pytest.raises(FileExistsError, match="--resume"):
        evaluate(fitted, tables["pairs"], **options)
    again = evaluate(fitted, tables["pairs"], **options, resume=True)
    assert not set(began) & set(first)
    assert again.compared["pair"].figures == evaluation[0].compared["pair"].figures


def test_the_command_fits_predicts_and_judges(
    network: XTrimoGeneNetwork, tables: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, model, report = (str(tmp_path / name) for name in ("checkpoint", "model", "report"))
    checkpoints.save(checkpoint, network.state_dict(), network.config, network.vocabulary)
    given = ["--pairs", tables["pairs"], "--smiles", tables["smiles"], "--cell-lines", tables["cell_lines"]]
    fit_it = ["synergy", "fit", "--checkpoint", checkpoint, *given, "--output", model, "--no-progress"]
    assert main([*fit_it, "--split", "line", "--folds", "3", "--epochs", "2", "--synergy-above", "5"]) == 0
    told = capsys.readouterr().out
    assert "3 folds made here, of 6 lines; the first is held out" in told
    assert "above 5 synergy, below 0 antagonism" in told
    assert "metformin" in told
    asked = ["--model", model, "--pairs", tables["pairs"]]
    scored = str(tmp_path / "scored.csv")
    assert main(["synergy", "predict", *asked, "--output", scored]) == 0
    assert "112 nothing, 56 line" in capsys.readouterr().out
    judged = ["synergy", "evaluate", *asked, "--output", report, "--splits", "none", "--no-progress"]
    assert main(judged) == 0
    assert "on 56 triples whose line it was not fitted to" in capsys.readouterr().out
    assert main(["synergy", "predict", *asked, "--output", scored]) == 2
    assert main([model + "2" if word == model else word for word in [*fit_it, "--target", "zip"]]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "exists; name another file" in errors[0]
    assert "expected one column 'zip', got none" in errors[1]
