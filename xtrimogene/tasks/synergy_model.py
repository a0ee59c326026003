"""SynergyModel: a fitted model of drug pairs, with the drugs and the cell lines that it knows."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.tasks import folder
from xtrimogene.tasks.molecules import Graphs
from xtrimogene.tasks.splits import need
from xtrimogene.tasks.synergy_lines import OURS, RAW, UNTRAINED, embedded, log_expression
from xtrimogene.tasks.synergy_network import PairNetwork
from xtrimogene.tasks.synergy_tables import Drugs, Expression, Pairs
from xtrimogene.tasks.synergy_training import predicted
from xtrimogene.tasks.synergy_triples import Target

Array = npt.NDArray[Any]
TASK = "synergy"
# Parts of the triples that a fit has seen.
TRAINING, VALIDATION, TEST = 0, 1, 2


def check_packages() -> None:
    """Raises ImportError, which says what to install, for what the task needs."""
    for package in ("rdkit", "torch-geometric", "scikit-learn"):
        need(package, TASK, TASK)


class SynergyModel:
    """What a fit has made, loaded from its folder by SynergyModel.load.

    drugs       names of drugs, and their molecules
    lines       names of cell lines
    known       what vectors of the lines are made of: OURS and UNTRAINED, (lines, D) float32 embeddings, and RAW,
                (lines, genes) float32 log1p(number / sum * 10,000)
    target      what the scores are
    codes       (n, 3) triples that were measured: two molecules and a line
    parts       (n,) 0 trained on, 1 validation, 2 test
    scores      (n,) float64 means of the measurements
    classes     (n,) 1 synergy, 0 antagonism, -1 neither
    settings    see synergy.fit
    """

    def __init__(self, settings: dict[str, Any], tensors: dict[str, Tensor], network: XTrimoGeneNetwork) -> None:
        self.settings, self.network = settings, network
        self.drugs = Drugs.kept(settings["drugs"], settings["molecules"])
        self.lines: list[str] = list(settings["lines"])
        self.known: dict[str, Array] = {
            version: tensors[f"lines.{version}"].float().numpy() for version in (OURS, UNTRAINED, RAW)
        }
        self.target = Target(**settings["target"])
        self.codes: Array = tensors["codes"].long().numpy()
        self.parts: Array = tensors["parts"].long().numpy()
        self.scores: Array = tensors["scores"].double().numpy()
        self.classes: Array = tensors["classes"].long().numpy()
        self._network = PairNetwork(self.known[OURS].shape[1])
        self._network.load_state_dict(
            {name.removeprefix(f"{OURS}."): each for name, each in tensors.items() if name.startswith(f"{OURS}.")}
        )
        self._network.eval()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SynergyModel:
        """Raises FileNotFoundError or ValueError for a folder that is none of such a model, ImportError as fit does."""
        check_packages()
        loaded = folder.load(path, TASK)
        return cls(loaded.settings, loaded.tensors, loaded.network)

    def extended(
        self,
        pairs: Pairs,
        smiles: str | os.PathLike[str] | None,
        cell_lines: str | os.PathLike[str] | None,
        device: torch.device,
    ) -> SynergyModel:
        """The model with what further tables hold of the drugs and cell lines of pairs; lines that it has stay as they
        are.

        Raises ValueError as Drugs.add and embedded do.
        """
        found = copy.copy(self)
        if smiles is not None:
            found.drugs = Drugs.kept(self.drugs.content, self.drugs.names)
            found.drugs.add(smiles, set(pairs.drugs.ravel().tolist()))
        if cell_lines is not None:
            asked = set(pairs.lines.tolist())
            given = Expression.read(cell_lines, asked)
            new = [name for name in given.lines if name not in self.lines and name in asked]
            reading = self.settings["reading"]
            if new:
                added = given.of(new)
                seed = self.settings["schedule"]["seed"]
                of_new = embedded(added, self.network, reading, seed, device)[0]
                of_new[RAW] = self._in_my_genes(added, reading)
                found.known = {name: np.concatenate([each, of_new[name]]) for name, each in self.known.items()}
                found.lines = [*self.lines, *new]
        return found

    def _in_my_genes(self, expression: Expression, reading: dict[str, Any]) -> Array:
        """(lines, genes) log expression of the model's genes, 0 for those that are not measured."""
        place = {gene: number for number, gene in enumerate(expression.genes)}
        found = np.zeros((len(expression.lines), len(self.settings["genes"])), np.float32)
        values = log_expression(expression, reading["values"])
        for number, gene in enumerate(self.settings["genes"]):
            if gene in place:
                found[:, number] = values[:, place[gene]]
        return found

    @property
    def fitted(self) -> Array:
        """(m, 3) the triples that it was fitted to, those of validation with them."""
        return self.codes[self.parts != TEST]

    @property
    def graphs(self) -> Graphs:
        return Graphs.of(self.drugs.smiles)

    def predict(self, codes: Array) -> tuple[Array, Array]:
        """(n,) scores and probabilities of synergy against antagonism, of triples (n, 3)."""
        return predicted(self._network, self.graphs, torch.from_numpy(self.known[OURS]), codes)

    def unseen(self, codes: Array) -> list[str]:
        """(n,) what of a triple the model was not fitted to: "both drugs", "one drug" and "line", joined by " and ";
        "pair", "triple", or "" for nothing."""
        fitted = self.fitted
        drugs, lines = set(fitted[:, :2].ravel().tolist()), set(fitted[:, 2].tolist())
        pairs, triples = set(map(tuple, fitted[:, :2].tolist())), set(map(tuple, fitted.tolist()))
        found = []
        for first, second, line in np.column_stack([np.sort(codes[:, :2], axis=1), codes[:, 2]]).tolist():
            new = (first not in drugs) + (second not in drugs)
            parts = [("", "one drug", "both drugs")[new]] if new else []
            parts += ["line"] if line not in lines else []
            if not parts and (first, second) not in pairs:
                parts = ["pair"]
            if not parts and (first, second, line) not in triples:
                parts = ["triple"]
            found.append(" and ".join(parts))
        return found
