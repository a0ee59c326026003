"""Fits the network of drug pairs: scores and classes together, early stopping by what is held out of the training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from xtrimogene.tasks.fitting import Fitted, fit
from xtrimogene.tasks.molecules import Graphs
from xtrimogene.tasks.synergy_network import PairNetwork
from xtrimogene.tasks.synergy_triples import BETWEEN, SYNERGY, Mask
from xtrimogene.tasks.work import WorkFolder

Array = npt.NDArray[Any]

_RATE, _WEIGHT_DECAY = 4e-3, 1e-4
_BATCH = 512
_AT_ONCE = 8192


@dataclass(frozen=True)
class Schedule:
    """epochs, patience, seed: see fitting.fit."""

    epochs: int
    patience: int
    seed: int


@dataclass(frozen=True)
class Examples:
    """What a fit is of.

    codes    (n, 3) int64 two molecules and a line
    scores   (n,) float64, None where only classes are learned
    classes  (n,) int64 1 synergy, 0 antagonism, -1 neither
    graphs   of all molecules
    lines    (lines, L) float32 their vectors
    """

    codes: Array
    scores: Array | None
    classes: Array
    graphs: Graphs
    lines: Tensor


def fit_network(
    examples: Examples,
    train: Mask,
    validation: Mask,
    schedule: Schedule,
    *,
    device: torch.device,
    work: WorkFolder | None,
    progress: bool,
    name: str,
    desc: str,
) -> tuple[PairNetwork, Fitted]:
    """The network fitted to a training part, as after the epoch of the least loss in the validation part.

    The loss is the Huber loss of the standardised score and the cross-entropy of the class, where there are such.
    """
    codes = torch.from_numpy(examples.codes).to(device)
    graphs = examples.graphs.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        network = PairNetwork(examples.lines.shape[1])
    network.whiten(examples.lines[torch.from_numpy(np.unique(examples.codes[train, 2]))])
    scores: Tensor | None = None
    if examples.scores is not None:
        mean, deviation = examples.scores[train].mean(), max(float(examples.scores[train].std()), 1e-6)
        network.score_mean.fill_(mean)
        network.score_deviation.fill_(deviation)
        scores = torch.from_numpy((examples.scores - mean) / deviation).float().to(device)
    classes = torch.from_numpy(examples.classes).to(device)
    network = network.to(device)
    lines = examples.lines.to(device)
    trained, held = np.flatnonzero(train), torch.from_numpy(np.flatnonzero(validation)).to(device)

    def batches(epoch: int) -> list[Tensor]:
        order = np.random.default_rng((schedule.seed, epoch)).permutation(trained)
        return [torch.from_numpy(order[start : start + _BATCH]) for start in range(0, len(order), _BATCH)]

    def losses(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) losses of the scores, and of those triples that have a class."""
        found = _forward(network, graphs, lines, codes[chosen])
        classed = classes[chosen] != BETWEEN
        wanted = (classes[chosen][classed] == SYNERGY).float()
        of_class = nn.functional.binary_cross_entropy_with_logits(found[classed, 1], wanted, reduction="none")
        if scores is None:
            return found.new_zeros(0), of_class
        return nn.functional.smooth_l1_loss(found[:, 0], scores[chosen], reduction="none"), of_class

    def loss(batch: Tensor) -> Tensor:
        return _mean_of([losses(batch.to(device))])

    def validate() -> float:
        return float(_mean_of([losses(part) for part in held.split(_AT_ONCE)]))

    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_WEIGHT_DECAY)
    with _in_one_order():
        fitted = fit(
            network, optimizer, batches, loss, validate, epochs=schedule.epochs, patience=schedule.patience,
            seed=schedule.seed, work=work, progress=progress, desc=desc, name=name,
        )  # fmt: skip
    return network.cpu(), fitted


@contextlib.contextmanager
def _in_one_order() -> Iterator[None]:
    """Sums over the atoms of a graph in one order: threads would add them up as they come."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _mean_of(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """() the mean loss of scores and that of classes, added; nothing where there are none of one."""
    found = [torch.cat(list(each)) for each in zip(*parts, strict=True)]
    return sum((each.mean() for each in found if len(each)), found[0].sum() * 0.0)


def _forward(network: PairNetwork, graphs: Graphs, lines: Tensor, codes: Tensor) -> Tensor:
    """(n, 2) of PairNetwork.forward; only the molecules that are asked for are computed, each once."""
    asked, place = torch.unique(codes[:, :2], return_inverse=True)
    found: Tensor = network(graphs.take(asked), place[:, 0], place[:, 1], lines[codes[:, 2]])
    return found


@torch.inference_mode()
def predicted(network: PairNetwork, graphs: Graphs, lines: Tensor, codes: Array) -> tuple[Array, Array]:
    """(n,) scores and (n,) probabilities of synergy against antagonism, float64, of triples (n, 3).

    A pair's numbers are the same, to the last bit, in both orders of its drugs.
    """
    ordered = np.column_stack([np.sort(codes[:, :2], axis=1), codes[:, 2]])
    distinct, place = np.unique(ordered, axis=0, return_inverse=True)
    network.eval()
    with _in_one_order():
        parts = [_forward(network, graphs, lines, part) for part in torch.from_numpy(distinct).split(_AT_ONCE)]
    found = torch.cat([torch.zeros(0, 2), *parts]).double()
    scores = network.score_mean + network.score_deviation * found[:, 0]
    return scores.numpy()[place], torch.sigmoid(found[:, 1]).numpy()[place]
