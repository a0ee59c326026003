"""Run: the steps, validations and checkpoints of one pre-training run on one rank.

A step adds up the gradients of `accumulate` batches of every rank and divides them by the number of chosen genes in all
of them, so that it minimises the mean over all these genes however unequally they are spread. Everything that is random
is a function of (seed, step, batch, rank) or (seed, epoch, cell): a run that goes on from a checkpoint does what it
would have done without the interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from xtrimogene.cells.stream import TrainingCells
from xtrimogene.evaluation.bars import RidgeBar
from xtrimogene.network.folder import Checkpoint, save
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.progress import progress_bar
from xtrimogene.training.checkpoints import Checkpoints
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.log import TrainingLog
from xtrimogene.training.parallel import exchanging, parallel
from xtrimogene.training.ranks import Ranks, StopSignals
from xtrimogene.training.run_folder import MODEL_FOLDER, RunFolder
from xtrimogene.training.validation import Losses, chosen_means, evenly_spaced, gene_means, ridge_bar, validate

# Streams of random numbers: different first words for different uses of one seed.
_WEIGHTS, _DROPOUT, _PROJECTIONS = 1, 2, 3
# What is summed between two lines of the log: squared errors, chosen genes, cells, tokens, seconds.
_SINCE_LOG = ("squares", "chosen", "cells", "tokens", "seconds")
# The product head's norm takes the moments of at most so many training cells, every so many steps.
_SETTLED_CELLS = 512
_SETTLE_EVERY = 200
# Training cells that the baselines' means are taken over, and that the ridge is fitted to, at most.
_BASELINE_CELLS = 20_000
_RIDGE_CELLS = 5000


class TrainingFailed(RuntimeError):
    """Training had begun and cannot go on; the message says why. What the last checkpoint holds is safe."""


@dataclass
class PretrainReport:
    """What one call of pretrain did.

    output              the run's folder
    model               checkpoint folder of the trained model, for from_pretrained; None when the run was stopped
    steps, epochs       optimizer steps and passes over the training cells so far, of all calls together
    cells               cells that these steps trained on, repetitions counted
    resumed_steps       steps that earlier calls had done
    loss                mean squared error over the chosen genes, last line of the log
    validation_loss     the same for the validation cells, at the last validation
    baseline_mean       that of predicting each gene's mean over the training cells
    baseline_zero_mean  that of a guess that is told which genes are zero: zero there, else the gene's mean where it is
                        not zero
    hidden_loss         that of the model at those of the genes that are hidden from it
    ridge_hidden_loss   that of the strongest bar there, see xtrimogene.evaluation.bars.RidgeBar
    seconds             wall time of all calls together
    rank                number of this process
    signal              number of the signal that stopped the run, 0 if none did
    """

    output: Path
    model: Path | None
    steps: int
    epochs: float
    cells: int
    resumed_steps: int
    loss: float
    validation_loss: float
    baseline_mean: float
    baseline_zero_mean: float
    hidden_loss: float
    ridge_hidden_loss: float
    seconds: float
    rank: int
    signal: int

    def __str__(self) -> str:
        resumed = f" ({self.resumed_steps:,} of them by an earlier run)" if self.resumed_steps else ""
        return (
            f"{self.steps:,} steps{resumed}, {self.epochs:.2f} epochs, {self.cells:,} cells, {self.seconds:.1f} s\n"
            f"loss {self.loss:.4f}, validation {self.validation_loss:.4f}, at its hidden genes {self.hidden_loss:.4f}; "
            f"there, a ridge on depth and principal components {self.ridge_hidden_loss:.4f}"
        )


@dataclass
class _Progress:
    """Where a run is; it is saved with every checkpoint.

    step        optimizer steps done
    epoch       pass over the training cells, and epoch_step steps of it done
    cells       cells trained on, by all ranks
    seconds     wall time
    since_log   sums since the last line of the log
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    cells: int = 0
    seconds: float = 0.0
    since_log: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SINCE_LOG, 0.0))


class Run:
    """One run on one rank."""

    def __init__(
        self,
        config: PretrainConfig,
        start: Checkpoint | None,
        cells: TrainingCells,
        folder: RunFolder,
        ranks: Ranks,
        show_progress: bool,
    ) -> None:
        self.config, self.cells, self.folder, self.ranks = config, cells, folder, ranks
        self.show_progress = show_progress and ranks.is_first
        self.progress = _Progress()
        self._means: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None
        torch.manual_seed(_seed_of(config.seed, _WEIGHTS))
        if start is None:
            self.model = XTrimoGeneNetwork(config.model_config(len(cells.vocabulary)), cells.vocabulary)
        else:
            self.model = XTrimoGeneNetwork.from_checkpoint(start)
        self.model.to(ranks.device)
        self.model.checkpoint_activations = config.activation_checkpointing
        if start is None and self.model.product_head is not None:
            # Else the table's small rows would have to learn each gene's mean.
            self.model.product_head.gene_bias.data[: len(cells.vocabulary)] = torch.from_numpy(
                chosen_means(self._gene_means(), config.masking)
            )
        head = self.model.product_head
        self._keeps_moments = start is not None and head is not None and head.norm.is_settled
        self.head_steps = config.head_steps_of(self.model.config)
        self.network: nn.Module = parallel(self.model, ranks, config.parallel, head_alone=self.head_steps > 0)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self._groups(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.log: TrainingLog | None = None
        self._ridge: RidgeBar | None = None
        self._settling: list[MaskedBatch] | None = None
        self._counted: tuple[int, int] | None = None
        self._clock = 0.0
        self.rate = self.norm = math.nan

    def drop_parallel(self) -> None:
        """Let go of DDP before the process group ends.

        DDP's reducer would else be the last to hold the group, and its destructor waits for gloo's threads without
        letting go of the GIL, which such a thread may need to end its last broadcast: a deadlock.
        """
        self.network = self.model

    def finish_from(self, newest: tuple[Path, int, dict[str, Any]] | None) -> PretrainReport:
        """Train from a checkpoint (None: from the start) to the end, or to a signal."""
        checkpoints = self.folder.checkpoints(self.config)
        if newest is not None:
            checkpoints.load(newest[0], self.model, self.optimizer)
            self.progress = _Progress(**newest[2])
        progress, resumed_steps = self.progress, self.progress.step
        with contextlib.ExitStack() as stack:
            if self.ranks.is_first:
                after_step = None if newest is None else resumed_steps
                self.log = stack.enter_context(
                    TrainingLog(self.folder.path, after_step=after_step, tensorboard=self.config.tensorboard)
                )
            try:
                number = self._train(checkpoints)
            except (ValueError, OSError) as error:
                raise TrainingFailed(f"step {progress.step + 1:,}: {error}; go on with --resume") from error
            trained = self.ranks.first(self._last_line, "train")
            validated = self.ranks.first(self._last_line, "validation")
        return PretrainReport(
            output=self.folder.path,
            model=None if number else self._save_model(),
            steps=progress.step,
            epochs=self._epochs(),
            cells=progress.cells,
            resumed_steps=resumed_steps,
            loss=trained.get("loss", math.nan),
            validation_loss=validated.get("loss", math.nan),
            baseline_mean=validated.get("baseline_mean", math.nan),
            baseline_zero_mean=validated.get("baseline_zero_mean", math.nan),
            hidden_loss=validated.get("hidden_loss", math.nan),
            ridge_hidden_loss=validated.get("ridge_hidden_loss", math.nan),
            seconds=progress.seconds,
            rank=self.ranks.rank,
            signal=number,
        )

    def _last_line(self, event: str) -> dict[str, Any]:
        assert self.log is not None
        return self.log.last.get(event, {})

    def _epochs(self) -> float:
        return self.progress.epoch + self.progress.epoch_step / self._steps_of_epoch()

    def _steps_of_epoch(self) -> int:
        # Counting them goes through all batches of the epoch, too long for every line of the log.
        if self._counted is None or self._counted[0] != self.progress.epoch:
            steps = self.cells.num_steps(
                self.progress.epoch, world_size=self.ranks.world_size, accumulate=self.config.accumulate
            )
            self._counted = self.progress.epoch, steps
        return self._counted[1]

    def _is_over(self) -> bool:
        limit = self.config.max_seconds
        return self.progress.step >= self.config.max_steps or (limit is not None and self.progress.seconds >= limit)

    def _train(self, checkpoints: Checkpoints) -> int:
        """Steps, validations and checkpoints in turn; the signal that ended them, or 0."""
        config, progress = self.config, self.progress
        with (
            StopSignals(self.ranks, "stops after this step, or batch of a validation; --resume goes on") as signals,
            contextlib.closing(self._batches()) as batches,
            progress_bar(
                config.max_steps,
                initial=progress.step,
                unit="step",
                desc="pretrain",
                disable=not self.show_progress,
            ) as bar,
        ):
            self._clock = time.perf_counter()
            if not progress.step:
                self._settle_where_due()
            # Broken off here, a run has nothing to save: it has made no step, or is where its checkpoint is.
            number = self._validate_where_due(bar, signals)
            while not (number or self._is_over()):
                number = self._step(batches, signals)
                bar.update()
                self._settle_where_due()
                if progress.step % config.log_every == 0 or self._is_over():
                    self._log_step(bar)
                if not number:
                    number = self._validate_where_due(bar, signals)
                if number or self._is_over() or progress.step % config.checkpoint_every == 0:
                    if self.log is not None:
                        self.log.sync()
                    checkpoints.save(progress.step, self.model, self.optimizer, dataclasses.asdict(progress))
        return number

    def _batches(self) -> Generator[MaskedBatch, None, None]:
        """The batches of this rank from where the run is, epoch after epoch."""
        progress = self.progress
        while True:
            epoch = self.cells.iterate(
                progress.epoch,
                progress.epoch_step,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                accumulate=self.config.accumulate,
            )
            with contextlib.closing(epoch):
                yield from epoch
            progress.epoch, progress.epoch_step = progress.epoch + 1, 0

    def _step(self, batches: Iterator[MaskedBatch], signals: StopSignals) -> int:
        """One optimizer step; the number of a signal that any rank has got, or 0."""
        config, ranks, progress = self.config, self.ranks, self.progress
        began = time.perf_counter()
        if progress.step and progress.step % config.redraw_every == 0:
            seed = _seed_of(config.seed, _PROJECTIONS, progress.step)
            self.model.redraw_projections(torch.Generator().manual_seed(seed))
        self.network.train()
        squares = torch.zeros((), dtype=torch.float64, device=ranks.device)
        chosen = cells = tokens = 0
        # The encoder's masks follow a cell through any batch of any rank.
        dropout_seed = _seed_of(config.seed, _DROPOUT, progress.step)
        for part in range(config.accumulate):
            masked = next(batches)
            # What else is random, in the product head: numbered through all ranks, as the batches of a step are.
            number = ranks.rank * config.accumulate + part
            torch.manual_seed(_seed_of(config.seed, _DROPOUT, progress.step, number))
            with exchanging(self.network, part + 1 == config.accumulate):
                with self._autocast():
                    loss = self.network(masked.to(ranks.device), self._head_alone(), dropout_seed=dropout_seed)
                loss.backward()
            squares += loss.detach()
            chosen += masked.total_chosen
            cells += masked.batch_size
            tokens += masked.batch.total_nnz
        now = time.perf_counter()
        # The first rank's clock and the signals of all: when a run ends has to be the same everywhere.
        seconds, passed = (now - began, now - self._clock) if ranks.is_first else (0.0, 0.0)
        self._clock = now
        got = signals.counts()
        *sums, passed, term, interrupt = ranks.sums([squares, chosen, cells, tokens, seconds, passed, *got])
        if not sums[1]:
            raise TrainingFailed(
                f"step {progress.step + 1:,}: no gene was chosen; raise masking.nonzero_rate, masking.zero_rate or "
                "the number of cells in a step, and start again"
            )
        if not math.isfinite(sums[0]):
            raise TrainingFailed(
                f"step {progress.step + 1:,}: the loss is {sums[0]}; lower learning_rate, or raise warmup_steps, and "
                "start again, or look at the data"
            )
        for parameter in self.parameters:
            if parameter.grad is None:
                # While the head learns alone. The optimizer's state is to be whole in every checkpoint.
                parameter.grad = torch.zeros_like(parameter)
            # DDP and FSDP give the mean over the ranks of each one's sum.
            parameter.grad.mul_(ranks.world_size / sums[1])
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
        self.norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(self.norm):
            raise TrainingFailed(
                f"step {progress.step + 1:,}: the norm of the gradient is {self.norm}; lower learning_rate, or raise "
                "warmup_steps, and start again, or look at the data"
            )
        self.rate = config.rate(progress.step, self.head_steps)
        for group in self.optimizer.param_groups:
            # At rate 0 weights do not decay either.
            group["lr"] = 0.0 if group["waits"] and self._head_alone() else self.rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.epoch_step += 1
        progress.cells += int(sums[2])
        progress.seconds += passed
        for name, value in zip(_SINCE_LOG, sums, strict=True):
            progress.since_log[name] += value
        return signals.first([term, interrupt])

    def _groups(self) -> list[dict[str, Any]]:
        """All parameters: those that the product head learns alone with, and those that wait meanwhile."""
        head: list[nn.Parameter] = []
        if self.model.product_head is not None:
            head = [self.model.embedding.gene_table, *self.model.product_head.parameters()]
        known = {id(parameter) for parameter in head}
        others = [parameter for parameter in self.parameters if id(parameter) not in known]
        groups = [{"params": others, "waits": True}, {"params": head, "waits": False}]
        return [group for group in groups if group["params"]]

    def _head_alone(self) -> tuple[float, float] | None:
        """The rates of the masking plan while the product head learns without encoder and decoder, else None."""
        masking = self.config.masking
        return (masking.nonzero_rate, masking.zero_rate) if self.progress.step < self.head_steps else None

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _log_step(self, bar: tqdm) -> None:
        sums, progress = self.progress.since_log, self.progress
        if self.log is not None:
            loss = sums["squares"] / sums["chosen"]
            self.log.write(
                "train",
                progress.step,
                loss=loss,
                rate=self.rate,
                gradient_norm=self.norm,
                epoch=self._epochs(),
                cells=progress.cells,
                chosen=int(sums["chosen"]),
                tokens=int(sums["tokens"]),
                cells_per_second=sums["cells"] / sums["seconds"],
                seconds=progress.seconds,
            )
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        progress.since_log = dict.fromkeys(_SINCE_LOG, 0.0)

    def _validate_where_due(self, bar: tqdm, signals: StopSignals) -> int:
        """Validate after some steps; the number of a signal that broke it off, or 0."""
        step = self.progress.step
        if not len(self.cells.validation_cells):
            return 0
        if not (self._is_over() or step % self.config.validate_every == 0):
            return 0
        if self.ranks.first(lambda: self.log is not None and self.log.has("validation", step)):
            return 0
        validated = self._validate(signals)
        if isinstance(validated, int):
            return validated
        if self.log is not None:
            self.log.write(
                "validation",
                step,
                loss=validated.model,
                baseline_mean=validated.mean,
                baseline_zero_mean=validated.zero_mean,
                hidden_loss=validated.hidden,
                ridge_hidden_loss=validated.ridge,
                seconds=self.progress.seconds,
            )
        if self.show_progress:
            bar.write(
                f"step {step:,}: validation loss {validated.model:.4f}, at hidden genes {validated.hidden:.4f} (ridge: "
                f"{validated.ridge:.4f})",
                file=sys.stderr,
            )
        return 0

    def _settle_where_due(self) -> None:
        """Give the product head's norm the moments of the cells as the weights make them now, every so many steps.

        Always the same masked cells, evenly spaced over all data sets, all of them on every rank: the moments depend on
        the weights alone. A head that begins with the moments of a checkpoint keeps them: its weights have learned with
        these, and other cells' would make another function of them.
        """
        head, step = self.model.product_head, self.progress.step
        if head is None or self._keeps_moments or not (step % _SETTLE_EVERY == 0 or step == self.head_steps):
            return
        if self._settling is None:
            self._settling = list(self.cells.masked(evenly_spaced(self.cells.training, _SETTLED_CELLS), 0))
        self.network.eval()
        features = []
        with torch.no_grad():
            for masked in self._settling:
                with self._autocast():
                    features.append(self.network(masked.to(self.ranks.device), self._head_alone(), features=True))
        settled = torch.cat(features)
        if len(settled) > 1:
            head.norm.settle(settled)

    def _validate(self, signals: StopSignals) -> Losses | int:
        guesses = self._gene_means(), self._bar()
        losses = validate(self.network, self.cells, self.ranks, signals, self._autocast, *guesses)
        if isinstance(losses, Losses) and not losses.chosen:
            raise TrainingFailed("validation: no gene was chosen; raise masking.nonzero_rate or masking.zero_rate")
        return losses

    def _gene_means(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(genes,) mean of each gene over training cells, and over those of them where it is not zero."""
        if self._means is None:
            self._means = self.ranks.first(lambda: gene_means(self.cells, _BASELINE_CELLS))
        return self._means

    def _bar(self) -> RidgeBar:
        if self._ridge is None:
            self._ridge = self.ranks.first(lambda: ridge_bar(self.cells, self.config.masking, _RIDGE_CELLS))
        return self._ridge

    def _save_model(self) -> Path:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors: dict[str, Any] = get_model_state_dict(self.model, options=options)

        def written() -> Path:
            target = self.folder.path / MODEL_FOLDER
            try:
                save(target, tensors, self.model.config, self.model.vocabulary, card=self._card(), overwrite=True)
            except OSError as error:
                raise TrainingFailed(f"the trained model: {error}; go on with --resume") from error
            return target

        return self.ranks.first(written)

    def _card(self) -> dict[str, str]:
        """What the model card says of the data, the recipe and the figures of this run."""
        config, progress = self.config, self.progress
        names = ", ".join(Path(source.name).name for source in self.cells.sources)
        validated = self._last_line("validation")
        card = {
            "Data": f"{self.cells}. Data sets: {names}.",
            "Recipe": (
                f"`xtrimogene pretrain`, {progress.step:,} steps, {self._epochs():.2f} epochs, {progress.cells:,} "
                f"cells; AdamW, learning rate {config.learning_rate:g}, {config.schedule} after the warm-up, "
                f"{config.precision}, seed {config.seed}. All keys are in config.yaml of the run."
            ),
        }
        if validated:
            card["Figures"] = (
                f"Mean squared error at the hidden genes of held-out cells {validated['hidden_loss']:.4f}; of a ridge "
                f"on depth and principal components {validated['ridge_hidden_loss']:.4f}. At all chosen genes "
                f"{validated['loss']:.4f}; of guessing each gene's mean {validated['baseline_mean']:.4f}. Embeddings "
                "were not judged."
            )
        return card


def _seed_of(*words: int) -> int:
    """A seed for torch that is a hash of some numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
