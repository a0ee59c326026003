"""PerturbationModel: a fitted model of perturbation effects, with the control cells that it predicts changes of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtrimogene.network.vocabulary import Vocabulary
from xtrimogene.tasks import folder
from xtrimogene.tasks.conditions import Perturbation, name_of
from xtrimogene.tasks.effects import Guesses
from xtrimogene.tasks.gene_graphs import between
from xtrimogene.tasks.perturbation_network import PerturbationNetwork

Array = npt.NDArray[Any]

TASK = "perturbation"
# What the rows of genes are: the checkpoint's, a table that is learned, the checkpoint's of other genes. All as wide.
OURS, LEARNED, SHUFFLED = "ours", "learned", "shuffled"
VERSIONS = (OURS, LEARNED, SHUFFLED)
_HIDDEN = 32


class Inputs:
    """What the network reads, made of what is kept: the same in a fit and ever after.

    genes         names of the measured genes
    num_known     measured genes that the checkpoint knows
    values        (cells, G) log-normalised expression of the control cells
    width         of the rows of genes, D
    """

    def __init__(self, settings: dict[str, Any], tensors: dict[str, Tensor], vocabulary: Vocabulary) -> None:
        self.genes: list[str] = settings["genes"]
        self.graph: dict[str, dict[str, float]] = settings["graph"]
        self.vocabulary = vocabulary
        self._place, given = tensors["row_genes"], tensors["control_rows"].float()
        self.num_known, self.width = given.shape[1:]
        self.values = tensors["control_values"]
        self.gene_graph = torch.sparse_coo_tensor(
            tensors["graph_places"], tensors["graph_weights"], (len(self.genes),) * 2, check_invariants=False
        ).coalesce()
        moments = given.flatten(0, 1)
        self._given = (given - moments.mean(0)) / moments.std(0, correction=0).clamp(min=1e-6)
        means = tensors["vocabulary_rows"].float()
        # Of length about 1, so that a rate means the same for every width.
        known = (means - means.mean(0)) / means.std(0, correction=0).clamp(min=1e-6) / means.shape[1] ** 0.5
        rng = np.random.default_rng(settings["seed"])
        self._shuffled = torch.from_numpy(rng.permutation(self.num_known))
        # Nothing is known of genes beside a table that is learned.
        self._known = {
            OURS: known,
            LEARNED: torch.zeros_like(known),
            SHUFFLED: known[torch.from_numpy(rng.permutation(len(known)))],
        }

    def rows(self, version: str) -> Tensor:
        """(cells, G, D) the control cells' embeddings of the genes, standardised; 0 where the checkpoint knows none."""
        found = torch.zeros(*self.values.shape, self.width)
        found[:, self._place] = self._given[:, self._shuffled] if version == SHUFFLED else self._given
        return found

    def network(self, trained: Sequence[str], average: Tensor, version: str, seed: int) -> PerturbationNetwork:
        """A fresh network for genes that are perturbed in training, and what an average gene does (G,)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return PerturbationNetwork(
                self.gene_graph, average, len(trained), self.width, _HIDDEN, learned=version == LEARNED
            )

    def of(self, genes: Sequence[str], trained: Sequence[str], version: str) -> tuple[Tensor, Tensor, Tensor]:
        """identity, neighbours and known of PerturbationNetwork.of_perturbed, for perturbed genes."""
        place = {gene: number for number, gene in enumerate(trained)}
        identity = torch.zeros(len(genes), len(trained))
        known = torch.zeros(len(genes), self.width)
        for number, (gene, gene_id) in enumerate(zip(genes, self.gene_ids(genes), strict=True)):
            if gene in place:
                identity[number, place[gene]] = 1.0
            if gene_id >= 0:
                known[number] = self._known[version][gene_id]
        return identity, torch.from_numpy(between(self.graph, genes, trained)), known

    def gene_ids(self, genes: Sequence[str]) -> list[int]:
        """Their rows in the vocabulary, -1 for none."""
        return self.vocabulary.map_columns(list(genes), merge_duplicates=True).gene_ids.tolist() if genes else []


def perturbed_genes(perturbations: Iterable[Perturbation]) -> list[str]:
    """The genes of perturbations, in alphabetical order."""
    return sorted({gene for each in perturbations for gene in each})


def hot(perturbations: Sequence[Perturbation], genes: Sequence[str]) -> Tensor:
    """(perturbations, genes) float32: 1 where a gene is perturbed."""
    place = {gene: number for number, gene in enumerate(genes)}
    found = torch.zeros(len(perturbations), len(genes))
    for number, each in enumerate(perturbations):
        found[number, [place[gene] for gene in each]] = 1.0
    return found


class PerturbationModel:
    """What a fit has made, loaded from its folder by PerturbationModel.load.

    genes          names of the G measured genes that it predicts
    fitted         the perturbations that it was fitted to, those of validation with them
    changes        (fitted, G) their measured mean changes
    trained        the genes that are perturbed in them
    versions       the versions of the network that are there
    control        (cells, G) float32 log-normalised expression of the control cells
    settings       see perturbation.fit
    """

    def __init__(self, settings: dict[str, Any], tensors: dict[str, Tensor], vocabulary: Vocabulary) -> None:
        self.settings, self.vocabulary = settings, vocabulary
        self.inputs = Inputs(settings, tensors, vocabulary)
        self.genes = self.inputs.genes
        parts = settings["parts"]
        self.fitted: list[Perturbation] = sorted(
            (tuple(each) for each in parts["training"] + parts["validation"]), key=name_of
        )
        self.trained = perturbed_genes(self.fitted)
        self.changes: Array = tensors["changes"].double().numpy()
        self.control: npt.NDArray[np.float32] = tensors["control_values"].numpy()
        self._tensors = tensors
        self.versions = [version for version in VERSIONS if f"{version}.average" in tensors]
        self._networks: dict[str, PerturbationNetwork] = {}
        for version in self.versions:
            network = self.inputs.network(self.trained, torch.zeros(len(self.genes)), version, 0)
            prefix = f"{version}."
            network.load_state_dict(
                {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            )
            self._networks[version] = network.eval()
        self._cells: dict[str, Tensor] = {}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PerturbationModel:
        """Raises FileNotFoundError or ValueError for a folder that is none of such a model."""
        loaded = folder.load(path, TASK)
        return cls(loaded.settings, loaded.tensors, loaded.network.vocabulary)

    @property
    def known_names(self) -> set[str]:
        """Names of genes by which conditions are read."""
        return {*self.genes, *self.vocabulary.genes, *self.inputs.graph, *self.trained}

    def unknown(self, genes: Iterable[str]) -> list[str]:
        """The genes of which nothing is known: never perturbed in what it was fitted to, no gene of the checkpoint, and
        without a neighbour in the graph."""
        names = sorted(set(genes))
        return [
            gene
            for gene, gene_id in zip(names, self.inputs.gene_ids(names), strict=True)
            if gene_id < 0 and gene not in self.trained and not set(self.inputs.graph.get(gene, ())) & set(self.trained)
        ]

    def seen(self, perturbation: Perturbation) -> int:
        """How many of its genes are perturbed in what the model was fitted to."""
        return sum(gene in self.trained for gene in perturbation)

    @torch.inference_mode()
    def in_cells(self, perturbation: Perturbation, version: str = OURS) -> npt.NDArray[np.float32]:
        """(cells, G) float32: the predicted change of each control cell."""
        network = self._networks[version]
        if version not in self._cells:
            self._cells[version] = network.of_cells(self.inputs.rows(version))
        perturbed = network.of_perturbed(*self.inputs.of(list(perturbation), self.trained, version))
        changes = torch.zeros(self.control.shape)
        for number in range(len(perturbed)):  # one after the other: a screen of all genes fits into memory
            changes += network(self._cells[version], perturbed[number : number + 1])[0]
        return changes.numpy()

    def mean_changes(self, perturbations: Sequence[Perturbation], version: str = OURS) -> Array:
        """(perturbations, G) float64: the predicted changes, in the mean over the control cells."""
        alone = {
            gene: self.in_cells((gene,), version).mean(0, dtype=np.float64) for gene in perturbed_genes(perturbations)
        }
        return np.array([sum((alone[gene] for gene in each), np.zeros(len(self.genes))) for each in perturbations])

    def guesses(self, perturbations: Sequence[Perturbation]) -> dict[str, Array]:
        """(perturbations, G) changes by each guess that needs no network, fitted to the same perturbations."""
        rows = self._tensors["vocabulary_rows"].float().numpy()
        names = list(dict.fromkeys([*self.genes, *self.trained, *perturbed_genes(perturbations)]))
        model = {name: rows[row] for name, row in zip(names, self.inputs.gene_ids(names), strict=True) if row >= 0}
        own = dict(zip(self.genes, self._tensors["own_rows"].numpy(), strict=True))
        return Guesses(self.fitted, self.changes, self.genes, own, model).predict(perturbations)
