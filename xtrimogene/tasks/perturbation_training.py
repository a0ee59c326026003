"""Fits the network of perturbation effects: early stopping by perturbations that are held out, then all of them.

Two questions are fitted one after the other, since they want to stop at different times: what each perturbed gene
does, which its own cells show, and what a gene does that was never perturbed, for which each perturbation is one
example, and there is more to overfit than to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xtrimogene.tasks.conditions import Perturbation
from xtrimogene.tasks.fitting import fit
from xtrimogene.tasks.perturbation_model import Inputs, hot, perturbed_genes
from xtrimogene.tasks.perturbation_network import PerturbationNetwork
from xtrimogene.tasks.work import WorkFolder

_RATE, _WEIGHT_DECAY = 1e-2, 1e-2
_CELLS_A_STEP, _PERTURBATIONS_A_STEP = 4, 32
# An epoch has every perturbation once, but at least and at most so many steps.
_STEPS = (10, 25)
_VALIDATION_CELLS = 8
# Of the map of what is known of genes, and of their likeness to neighbours, a single number.
_OTHERS_RATES = 1e-4, 3e-2
_OTHERS_EPOCHS, _OTHERS_PATIENCE = 30, 8
_FOLDS = 4


@dataclass(frozen=True)
class Changes:
    """Mean changes of perturbations, (perturbations, G) float32 each: of all their cells, of those that are trained on
    while validation goes on, and of those that are kept for validation then."""

    whole: Tensor
    seen: Tensor
    held: Tensor


@dataclass(frozen=True)
class Schedule:
    """epochs, patience, seed: see fitting.fit."""

    epochs: int
    patience: int
    seed: int


@dataclass(frozen=True)
class Chosen:
    """What validation has chosen: epochs of the network, and of what it knows of genes that were not perturbed in
    training, 0 where that is no better than an average gene."""

    epochs: int
    others: int


def fit_version(
    inputs: Inputs,
    version: str,
    perturbations: Sequence[Perturbation],
    changes: Changes,
    training: Sequence[int],
    validation: Sequence[int],
    schedule: Schedule,
    *,
    work: WorkFolder,
    progress: bool,
) -> tuple[PerturbationNetwork, Chosen]:
    """The network fitted to training and validation perturbations (positions).

    First it is fitted to the training part alone and judged after every epoch by two errors: of the validation
    perturbations, and of cells of the training perturbations that were kept back. Then a fresh one is fitted to both
    parts, all cells of them, for as many epochs as were best, and left as after the one that fits them best: a screen
    has few perturbations, and what a gene does is known from its own alone. Last, with the network as it is, what
    serves genes that were never perturbed: for how long is chosen by leaving genes out, a quarter of them at a time.
    """
    fitted = sorted([*training, *validation])
    first = _Steps(inputs, version, [perturbations[n] for n in training], changes.seen[list(training)], schedule.seed)
    scale = float((changes.whole[fitted] ** 2).mean()) or 1.0
    judges = [
        _Judge(inputs, version, first.trained, [perturbations[n] for n in part], truth[list(part)], scale)
        for part, truth in ((validation, changes.whole), (training, changes.held))
    ]
    desc = f"fit {version}"
    network = inputs.network(first.trained, first.average, version, schedule.seed)
    epochs = fit(
        network, _optimizer(network), first.batches, lambda batch: first.loss(network, batch),
        lambda: sum(judge(network) for judge in judges) / len(judges),
        epochs=schedule.epochs, patience=schedule.patience, seed=schedule.seed, work=work, progress=progress,
        desc=f"{desc}, epochs", name=f"{version}_epochs",
    ).best_epoch  # fmt: skip
    steps = _Steps(inputs, version, [perturbations[n] for n in fitted], changes.whole[fitted], schedule.seed)
    network = inputs.network(steps.trained, steps.average, version, schedule.seed)
    own = _Judge(inputs, version, steps.trained, steps.perturbations, steps.changes, scale)
    fit(
        network, _optimizer(network), steps.batches, lambda batch: steps.loss(network, batch),
        lambda: own(network), epochs=epochs, patience=epochs, seed=schedule.seed, work=work, progress=progress,
        desc=desc, name=version,
    )  # fmt: skip
    return network, Chosen(epochs, _fit_others(steps, network, schedule.seed, version, work, progress))


def _optimizer(network: PerturbationNetwork) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_WEIGHT_DECAY)


def _fit_others(
    steps: _Steps, network: PerturbationNetwork, seed: int, version: str, work: WorkFolder, progress: bool
) -> int:
    """Fits what serves genes that were not perturbed in training, and returns its epochs: 0, and it stays zero, where
    nothing is gained for genes that are left out."""
    network.requires_grad_(False)
    folds = np.random.default_rng((seed, 1)).permutation(len(steps.trained)) % _FOLDS
    in_fold = torch.from_numpy(np.eye(_FOLDS, dtype=np.float32)[folds])  # (genes, folds)
    left_out = (steps.hot @ in_fold > 0).T  # (folds, perturbations)
    options: dict[str, Any] = {"seed": seed, "work": work, "progress": progress}
    trial = _Others(steps, network, ~left_out, left_out)
    untrained = trial.error()
    found = fit(
        trial, trial.optimizer(), steps.batches, trial.loss, trial.error, epochs=_OTHERS_EPOCHS,
        patience=_OTHERS_PATIENCE, desc=f"fit {version}, genes left out", name=f"{version}_left_out", **options,
    )  # fmt: skip
    epochs = found.best_epoch if found.validation_loss < untrained else 0
    if epochs:
        every = torch.ones(1, len(steps.hot), dtype=torch.bool)
        last = _Others(steps, network, every, every)
        fit(
            last, last.optimizer(), steps.batches, last.loss, last.error, epochs=epochs, patience=epochs,
            desc=f"fit {version}, other genes", name=f"{version}_others", **options,
        )  # fmt: skip
        with torch.no_grad():
            network.known.copy_(last.known[0])
            network.likeness.copy_(last.likeness[0])
    network.requires_grad_(True)
    return epochs


class _Steps:
    """The steps in which a network is fitted to the changes of perturbations."""

    def __init__(
        self, inputs: Inputs, version: str, perturbations: list[Perturbation], changes: Tensor, seed: int
    ) -> None:
        self.perturbations, self.changes, self.seed = perturbations, changes, seed
        self.trained = perturbed_genes(perturbations)
        self.rows = inputs.rows(version)
        self.identity, self.neighbours, self.known = inputs.of(self.trained, self.trained, version)
        self.hot = hot(perturbations, self.trained)
        # A perturbation of n genes may be off by what each of them is off. And the loss is 1 for no change.
        self.weights = 1 / self.hot.sum(1) ** 2
        self.scale = float((self.weights[:, None] * changes**2).mean()) or 1.0
        # Of all (G,), the one that makes the least such error if every gene does the same.
        self.average = (changes / self.hot.sum(1, keepdim=True)).mean(0)

    def batches(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """Perturbations and control cells of each step."""
        rng = np.random.default_rng((self.seed, epoch))
        count, cells = len(self.hot), len(self.rows)
        size = min(count, _PERTURBATIONS_A_STEP)
        steps = min(max(-(-count // size), _STEPS[0]), _STEPS[1])
        order = np.concatenate([rng.permutation(count) for _ in range(-(-steps * size // count))])
        return [
            (
                torch.from_numpy(np.sort(order[step * size : (step + 1) * size])),
                torch.from_numpy(np.sort(rng.permutation(cells)[:_CELLS_A_STEP])),
            )
            for step in range(steps)
        ]

    def loss(self, network: PerturbationNetwork, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The error of what the genes do together."""
        chosen, cells = batch
        used = torch.nonzero(self.hot[chosen].sum(0))[:, 0]
        alone = network(network.of_cells(self.rows[cells]), self.identity[used] @ network.identities).mean(1)
        return self.error(self.hot[chosen][:, used] @ alone, chosen)

    def error(self, predicted: Tensor, chosen: Tensor) -> Tensor:
        """() of predictions for some perturbations, relative to that of no change for all."""
        errors = (predicted - self.changes[chosen]) ** 2
        return (self.weights[chosen, None] * errors).mean() / self.scale


class _Others(nn.Module):
    """What serves genes that were not perturbed, for each fold of genes that are left out, over a network as it is.

    trained, judged  (folds, perturbations) those that it is fitted to in a fold, and judged by
    """

    def __init__(self, steps: _Steps, network: PerturbationNetwork, trained: Tensor, judged: Tensor) -> None:
        super().__init__()
        self.known = nn.Parameter(torch.zeros(len(trained), *network.known.shape))
        self.likeness = nn.Parameter(torch.zeros(len(trained)))
        # In a list: it is not of the module, and stays as it is.
        self._steps, self._network, self._trained, self._judged = steps, [network], trained, judged

    def optimizer(self) -> torch.optim.Optimizer:
        rates = zip((self.known, self.likeness), _OTHERS_RATES, strict=True)
        return torch.optim.AdamW([{"params": [each], "lr": rate} for each, rate in rates], weight_decay=_WEIGHT_DECAY)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        chosen, cells = batch
        parts = [chosen[own[chosen]] for own in self._trained]
        found = [self._error(fold, part, cells) for fold, part in enumerate(parts) if len(part)]
        return torch.stack(found).mean() if found else self.known.sum() * 0.0

    def error(self) -> float:
        """Of the judged perturbations, in the mean over the folds."""
        cells = torch.arange(min(_CELLS_A_STEP, len(self._steps.rows)))
        parts = [torch.nonzero(own)[:, 0] for own in self._judged]
        with torch.no_grad():
            found = [float(self._error(fold, part, cells)) for fold, part in enumerate(parts) if len(part)]
        return sum(found) / len(found)

    def _error(self, fold: int, chosen: Tensor, cells: Tensor) -> Tensor:
        steps, network = self._steps, self._network[0]
        used = torch.nonzero(steps.hot[chosen].sum(0))[:, 0]
        given = steps.neighbours[used], steps.known[used], self.likeness[fold], self.known[fold]
        alone = network(network.of_cells(steps.rows[cells]), network.of_others(*given)).mean(1)
        return steps.error(steps.hot[chosen][:, used] @ alone, chosen)


class _Judge:
    """The squared error of a network's changes of some perturbations, in units of scale."""

    def __init__(
        self,
        inputs: Inputs,
        version: str,
        trained: list[str],
        perturbations: list[Perturbation],
        truth: Tensor,
        scale: float,
    ) -> None:
        genes = perturbed_genes(perturbations)
        self.rows = inputs.rows(version)[:_VALIDATION_CELLS]
        self.inputs, self.hot = inputs.of(genes, trained, version), hot(perturbations, genes)
        self.truth, self.scale = truth, scale

    def __call__(self, network: PerturbationNetwork) -> float:
        alone = network.mean_alone(network.of_cells(self.rows), network.of_perturbed(*self.inputs))
        return float(((self.hot @ alone - self.truth) ** 2).mean()) / self.scale
