"""Drug pairs on synthetic scores whose truth is known: what each drug does on each line adds up."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xtrimogene.cli import main
from xtrimogene.network import folder as checkpoints
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.network.vocabulary import Vocabulary
from xtrimogene.tasks import fitting, folder, splits
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
    Guess,
    judge,
)
from xtrimogene.tasks.synergy_evaluation import evaluate
from xtrimogene.tasks.synergy_lines import OURS, RAW, SHUFFLED, UNTRAINED, VERSIONS, components, shuffled, vectors
from xtrimogene.tasks.synergy_model import TASK, TEST, TRAINING, VALIDATION, SynergyModel
from xtrimogene.tasks.synergy_network import PairNetwork
from xtrimogene.tasks.synergy_report import NETWORK, SynergyEvaluation, verdict
from xtrimogene.tasks.synergy_tables import Drugs, Expression, Pairs, Table
from xtrimogene.tasks.synergy_triples import DRUG, LINE, PAIR, Folds, Measured, Target, Triples, validation_of

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
EPOCHS = 14


def score_of(first: str, second: str, line: str) -> float:
    """Each drug does on each line what it does; together the sum."""
    effects = np.random.default_rng(3).normal(scale=15.0, size=(len(DRUGS), len(CELL_LINES)))
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
    return XTrimoGeneNetwork.from_preset("tiny", Vocabulary([*GENES, "unused"]), seed=0)


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
    found = evaluate(fitted, tables["pairs"], output=path, splits=["pair", "line", "drug"], folds=2, progress=False)
    return found, path


def test_x(evaluation: Any) -> None:
    print(verdict(evaluation[0]))
    print((evaluation[1] / "report.md").read_text())
