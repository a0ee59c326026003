"""Validation of a pre-training run: the model's loss at held-out cells beside those of guesses that need no network."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from xtrimogene.cells.masking import MaskingConfig
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.evaluation.bars import MASKINGS, RidgeBar
from xtrimogene.evaluation.hidden import HiddenGenes, is_hidden
from xtrimogene.training.ranks import Ranks, StopSignals

Means = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

# Cells in memory while means are taken.
_READ_CELLS = 1024


@dataclass(frozen=True)
class Losses:
    """Mean squared errors at the chosen genes of the validation cells, or at the hidden ones among them.

    model      the model's
    mean       of guessing each gene's mean
    zero_mean  of a guess that is told which genes are zero, and guesses the mean over the other cells elsewhere
    hidden     the model's at the hidden genes, of which it is shown nothing; NaN where none is hidden
    ridge      that of the strongest bar there, see RidgeBar
    chosen     number of chosen genes
    """

    model: float
    mean: float
    zero_mean: float
    hidden: float
    ridge: float
    chosen: int


def validate(
    network: nn.Module,
    cells: TrainingCells,
    ranks: Ranks,
    signals: StopSignals,
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
    means: Means,
    bar: RidgeBar,
) -> Losses | int:
    """The losses at the validation cells, of all ranks together.

    Or the number of a signal: a validation of many cells takes longer than a batch system waits, and a resumed run
    does it again.
    """
    mean, nonzero_mean = means
    squares = np.zeros(7)
    network.eval()
    batches = cells.validation(rank=ranks.rank, world_size=ranks.world_size)
    with torch.no_grad(), contextlib.closing(batches):
        for masked in batches:
            with autocast():
                predicted = network(masked.to(ranks.device), predictions=True)
            genes, values = masked.chosen_ids.numpy(), masked.chosen_values.numpy().astype(np.float64)
            told = np.where(values > 0, nonzero_mean[genes], 0.0)
            errors = np.square(predicted.double().cpu().numpy() - values)
            hidden = HiddenGenes.of([masked], len(cells.vocabulary))
            squares += [
                errors.sum(),
                np.square(values - mean[genes]).sum(),
                np.square(values - told).sum(),
                errors[is_hidden(masked, len(cells.vocabulary))].sum(),
                np.square(bar.predict(hidden) - hidden.values).sum(),
                len(hidden.values),
                len(genes),
            ]
            # Every rank has as many batches.
            if number := signals.first(ranks.sums(signals.counts())):
                return number
    *sums, num_hidden, chosen = ranks.sums(squares.tolist())
    model, mean_loss, zero_mean_loss = (each / max(chosen, 1) for each in sums[:3])
    hidden_loss, ridge_loss = (each / num_hidden if num_hidden else math.nan for each in sums[3:])
    return Losses(model, mean_loss, zero_mean_loss, hidden_loss, ridge_loss, int(chosen))


def evenly_spaced(numbers: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """At most so many of them, from the first to the last."""
    return numbers[np.linspace(0, len(numbers) - 1, min(most, len(numbers))).astype(int)]


def gene_means(cells: TrainingCells, most: int) -> Means:
    """(genes,) mean log-normalised value of each gene over at most so many training cells, evenly spaced, and its mean
    over those of them where it is not zero (0 where there is none)."""
    sample = evenly_spaced(cells.training, most)
    genes = len(cells.vocabulary)
    sums, counts = np.zeros(genes), np.zeros(genes)
    for start in range(0, len(sample), _READ_CELLS):
        batch = cells.read(sample[start : start + _READ_CELLS])
        gene_ids = batch.gene_ids.numpy()
        sums += np.bincount(gene_ids, weights=batch.values.numpy(), minlength=genes)
        counts += np.bincount(gene_ids, minlength=genes)
    return sums / len(sample), sums / np.maximum(counts, 1)


def chosen_means(means: Means, masking: MaskingConfig) -> npt.NDArray[np.float32]:
    """(genes,) mean value of each gene over the cells in which it is chosen, as the plan chooses, from gene_means."""
    mean, nonzero_mean = means
    share = np.divide(mean, nonzero_mean, out=np.zeros_like(mean), where=nonzero_mean > 0)
    chosen = masking.nonzero_rate * share + masking.zero_rate * (1 - share)
    values = masking.nonzero_rate * mean
    return np.divide(values, chosen, out=np.zeros_like(mean), where=chosen > 0).astype(np.float32)


def ridge_bar(cells: TrainingCells, masking: MaskingConfig, most: int) -> RidgeBar:
    """The strongest bar, of at most so many training cells, evenly spaced."""
    sample = evenly_spaced(cells.training, most)
    genes = len(cells.vocabulary)
    return RidgeBar.fit([HiddenGenes.of(cells.masked(sample, epoch), genes) for epoch in range(MASKINGS)], masking)
