"""Fits the network of perturbation effects: early stopping by perturbations that are held out, then all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xtrimogene.tasks.conditions import Perturbation
from xtrimogene.tasks.fitting import fit
from xtrimogene.tasks.perturbation_model import Inputs, hot, perturbed_genes
from xtrimogene.tasks.perturbation_network import PerturbationNetwork
from xtrimogene.tasks.work import WorkFolder

_RATE, _WEIGHT_DECAY = 1e-2, 1e-2
# What is known of a gene beside its own perturbation is learned so much more slowly: it is what overfits, and early
# stopping can only choose how long all of it is trained.
_SLOWER = 0.03
# Weight of the loss in which no gene has an identity, as one that was never perturbed has none.
_NAMELESS = 0.2
_CELLS_A_STEP, _PERTURBATIONS_A_STEP, _STEPS_AN_EPOCH = 4, 32, 10
_VALIDATION_CELLS = 8


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
) -> tuple[PerturbationNetwork, int]:
    """The network fitted to training and validation perturbations (positions) and the number of its epochs.

    First it is fitted to the training part alone, and judged after every epoch by two errors, each relative to
    predicting no change: of the validation perturbations, which it has not seen, and of cells of the training
    perturbations that were kept back. Then a fresh one is fitted to both parts, all cells of them, for as many epochs as
    were best: a screen has few perturbations, and what a gene does is known from its own alone.
    """
    fitted = sorted([*training, *validation])
    first = _Fit(inputs, version, [perturbations[n] for n in training], changes.seen[list(training)], schedule.seed)
    judges = [
        _Judge(inputs, version, first.trained, [perturbations[n] for n in part], truth[list(part)])
        for part, truth in ((validation, changes.whole), (training, changes.held))
    ]
    desc = f"fit {version}"
    chosen = fit(
        first.network, first.optimizer, first.batches, first.loss,
        lambda: sum(judge(first.network) for judge in judges) / len(judges),
        epochs=schedule.epochs, patience=schedule.patience, seed=schedule.seed, work=work, progress=progress,
        desc=f"{desc}, epochs", name=f"{version}_epochs",
    ).best_epoch  # fmt: skip
    whole = [perturbations[n] for n in fitted]
    last = _Fit(inputs, version, whole, changes.whole[fitted], schedule.seed)
    own = _Judge(inputs, version, last.trained, whole, changes.whole[fitted])
    fit(
        last.network, last.optimizer, last.batches, last.loss, lambda: own(last.network),
        epochs=chosen, patience=chosen, seed=schedule.seed, work=work, progress=progress, desc=desc, name=version,
    )  # fmt: skip
    return last.network, chosen


class _Fit:
    """A fresh network, and the steps by which it is fitted to changes of perturbations."""

    def __init__(
        self, inputs: Inputs, version: str, perturbations: list[Perturbation], changes: Tensor, seed: int
    ) -> None:
        self.trained = perturbed_genes(perturbations)
        self.network = inputs.network(self.trained, version, seed)
        slow = [self.network.neighbours, self.network.known]
        others = [each for each in self.network.parameters() if all(each is not one for one in slow)]
        self.optimizer = torch.optim.AdamW(
            [{"params": others}, {"params": slow, "lr": _RATE * _SLOWER}], lr=_RATE, weight_decay=_WEIGHT_DECAY
        )
        self.rows, self.changes, self.seed = inputs.rows(version), changes, seed
        self.identity, self.neighbours, self.known = inputs.of(self.trained, self.trained, version)
        self.hot = hot(perturbations, self.trained)
        # A perturbation of n genes may be off by what each of them is off. And the loss is 1 for no change.
        self.weights = 1 / self.hot.sum(1) ** 2
        self.scale = float((self.weights[:, None] * changes**2).mean()) or 1.0

    def batches(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """Perturbations and control cells of each step."""
        rng = np.random.default_rng((self.seed, epoch))
        count, cells = len(self.hot), len(self.rows)
        steps = max(_STEPS_AN_EPOCH, -(-count // _PERTURBATIONS_A_STEP))
        order = np.concatenate([rng.permutation(count) for _ in range(-(-steps * _PERTURBATIONS_A_STEP // count))])
        size = min(count, _PERTURBATIONS_A_STEP)
        return [
            (
                torch.from_numpy(np.sort(order[step * size : (step + 1) * size])),
                torch.from_numpy(np.sort(rng.permutation(cells)[:_CELLS_A_STEP])),
            )
            for step in range(steps)
        ]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        chosen, cells = batch
        used = torch.nonzero(self.hot[chosen].sum(0))[:, 0]
        of_cells = self.network.of_cells(self.rows[cells])
        found = torch.zeros(())
        for weight, identity in ((1.0, self.identity), (_NAMELESS, torch.zeros_like(self.identity))):
            perturbed = self.network.of_perturbed(identity[used], self.neighbours[used], self.known[used])
            changes = self.hot[chosen][:, used] @ self.network(of_cells, perturbed).mean(1)
            errors = (changes - self.changes[chosen]) ** 2
            found = found + weight * (self.weights[chosen, None] * errors).mean() / self.scale
        return found


class _Judge:
    """The squared error of a network's changes of some perturbations, relative to that of no change."""

    def __init__(
        self, inputs: Inputs, version: str, trained: list[str], perturbations: list[Perturbation], truth: Tensor
    ) -> None:
        genes = perturbed_genes(perturbations)
        self.rows = inputs.rows(version)[:_VALIDATION_CELLS]
        self.inputs, self.hot, self.truth = inputs.of(genes, trained, version), hot(perturbations, genes), truth

    def __call__(self, network: PerturbationNetwork) -> float:
        alone = network(network.of_cells(self.rows), network.of_perturbed(*self.inputs)).mean(1)
        return float(((self.hot @ alone - self.truth) ** 2).sum() / (self.truth**2).sum().clamp(min=1e-12))
