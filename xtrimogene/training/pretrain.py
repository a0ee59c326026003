"""pretrain: the masked auto-encoder trained on many cells, by one process or several, killed and resumed at will.

A step adds up the gradients of `accumulate` batches of every rank and divides them by the number of chosen genes in all
of them, so that it minimises the mean over all these genes however unequally they are spread. Everything that is random
is a function of (seed, step, batch, rank) or (seed, epoch, cell): a run that goes on from a checkpoint does what it
would have done without the interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from xtg_kernels import dispatch
from xtrimogene.cells.masking import MaskedBatch
from xtrimogene.cells.stream import Data, TrainingCells, genes_of_data
from xtrimogene.inference.model_cells import choose_device
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.model import XTrimoGene
from xtrimogene.network.vocabulary import Vocabulary
from xtrimogene.training.checkpoints import Checkpoints, write_whole
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.log import TrainingLog
from xtrimogene.training.ranks import Ranks, StopSignals

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
VOCABULARY_FILE = "vocabulary.tsv"
CHECKPOINT_FOLDER = "checkpoints"
MODEL_FOLDER = "model"
_LOCK_FILE = "lock"

# What a run writes before run.json says that it is one.
_FIRST_FILES = {_LOCK_FILE, CONFIG_FILE, VOCABULARY_FILE, RUN_FILE + ".tmp"}

# Streams of random numbers: different first words for different uses of one seed.
_WEIGHTS, _DROPOUT, _PROJECTIONS = 1, 2, 3

# What is summed between two lines of the log: squared errors, chosen genes, cells, tokens, seconds.
_SINCE_LOG = ("squares", "chosen", "cells", "tokens", "seconds")

# Cells in memory while means are taken.
_READ_CELLS = 1024

# Cells whose values a resumed run compares, and what messages call the comparison.
_SAMPLED_CELLS = 256
_CONTENT = "cells, genes and values"

# Training cells that the baselines' means are taken over, at most.
_BASELINE_CELLS = 20_000


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
    seconds: float
    rank: int
    signal: int

    def __str__(self) -> str:
        resumed = f" ({self.resumed_steps:,} of them by an earlier run)" if self.resumed_steps else ""
        return (
            f"{self.steps:,} steps{resumed}, {self.epochs:.2f} epochs, {self.cells:,} cells, {self.seconds:.1f} s\n"
            f"loss {self.loss:.4f}, validation {self.validation_loss:.4f}; predicting each gene's mean "
            f"{self.baseline_mean:.4f}, told the zeros {self.baseline_zero_mean:.4f}"
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


def pretrain(
    config: PretrainConfig,
    data: Data | Sequence[Data],
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> PretrainReport:
    """Train a masked auto-encoder on the cells of one or many data sets.

    Writes into the folder `output`: `run.json` and `config.yaml`, what the run is; `vocabulary.tsv`; `log.jsonl` and
    `tensorboard/`; `checkpoints/`, the newest of which a run goes on with; and at the end `model/`, a checkpoint folder
    for XTrimoGene.from_pretrained. SIGTERM and SIGINT end the run after the step at work, or
    in the middle of a validation, with a checkpoint of the steps made.

    A run that was killed at any moment goes on with `resume=True` from its newest whole checkpoint, or without one from
    the start. On the same machine with the same number of threads it ends with the weights of an uninterrupted run: on
    one CPU process in float32, bit for bit.

    Under torchrun every rank calls this. The ranks share the batches of a step: a run of 2 ranks has the batches of a
    run of 1 rank with twice as many to accumulate.

    Args:
        config: what to do, see PretrainConfig.
        data: AnnData, h5ad files, zarr stores, folders of these, or several of them; see TrainingCells.
        output: folder to make.
        resume: go on with the run in `output`; without such a run, start one.
        device: "cpu", "cuda", ... or "auto": the GPU if there is one.
        progress: show progress bars.

    Raises:
        ValueError, OSError: bad data, config or output, or another run in the folder; the message names what it is.
            Nothing is written then.
        TrainingFailed: training had begun and cannot go on: unreadable data, or a loss that is not finite.
        FirstRankFailed: on other ranks, where the first one raises one of the former two.
    """
    chosen = choose_device(device)
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(Ranks.joined(chosen))
        stack.enter_context(torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []))
        folder = _RunFolder(Path(output), resume)
        ranks.first(folder.check)
        cells = stack.enter_context(_opened(config, data, ranks, progress))
        run = _Run(config, cells, folder, ranks, progress)
        stack.callback(folder.unlock)
        stack.callback(run.drop_parallel)
        identity = _identity(config, cells, ranks)
        newest = ranks.first(lambda: folder.begin(config, cells.vocabulary, identity))
        return run.finish_from(newest)


def _opened(config: PretrainConfig, data: Data | Sequence[Data], ranks: Ranks, progress: bool) -> TrainingCells:
    """The cells on every rank; only the first one counts their genes."""

    def opened(vocabulary: Vocabulary, genes_per_cell: npt.NDArray[np.int32] | None) -> TrainingCells:
        model = config.model_config(len(vocabulary))
        return TrainingCells(
            data,
            vocabulary,
            layer=config.layer,
            gene_symbols=config.gene_symbols,
            normalized=config.normalized,
            masking=config.masking,
            depth_tokens=model.depth_tokens,
            target_sum=model.target_sum,
            min_genes=config.min_genes,
            seed=config.seed,
            validation_share=config.validation_share,
            split_seed=config.split_seed,
            max_validation_cells=config.validation_cells,
            batch_tokens=config.batch_tokens,
            batch_cells=config.batch_cells,
            cost=_cost(model),
            genes_per_cell=genes_per_cell,
            progress=progress,
        )

    own: list[TrainingCells] = []

    def counted() -> tuple[Vocabulary, npt.NDArray[np.int32]]:
        if config.checkpoint is not None:
            vocabulary = XTrimoGene.from_pretrained(config.checkpoint).vocabulary
        elif config.vocabulary is not None:
            vocabulary = Vocabulary.from_tsv(config.vocabulary)
        else:
            vocabulary = genes_of_data(data, layer=config.layer, gene_symbols=config.gene_symbols)
        own.append(opened(vocabulary, None))
        own[0].num_steps(0, world_size=ranks.world_size, accumulate=config.accumulate)
        if 0 < len(own[0].validation_cells) < ranks.world_size:
            raise ValueError(
                f"config validation_share, validation_cells: expected a validation cell for each of {ranks.world_size} "
                f"ranks, or none, got {len(own[0].validation_cells)} of {own[0].num_cells} cells"
            )
        return vocabulary, own[0].genes_per_cell

    vocabulary, genes_per_cell = ranks.first(counted)
    return own[0] if own else opened(vocabulary, genes_per_cell)


def _cost(model: XTrimoGeneConfig) -> tuple[float, float, float]:
    """Multiply-adds of a cell with L expressed genes, as constant, factor of L and factor of L^2."""
    decoder = model.decoder_layers * (12 * model.decoder_dim**2 + 4 * model.num_features * model.decoder_dim)
    encoder = model.num_layers * 12 * model.dim**2
    return float(model.num_positions * decoder), float(encoder), float(2 * model.num_layers * model.dim)


def _identity(config: PretrainConfig, cells: TrainingCells, ranks: Ranks) -> dict[str, Any]:
    """What a run must share with the one that it goes on with, by the names that messages call it."""
    sample = cells.read(cells.training[:: max(1, len(cells.training) // _SAMPLED_CELLS)][:_SAMPLED_CELLS])
    content = hashlib.sha256(cells.fingerprint.encode())
    content.update(sample.values.numpy().tobytes())
    fixed = config.fixed()
    # The first is told by another name, the second by its genes, wherever the file lies.
    del fixed["accumulate"], fixed["vocabulary"]
    return {
        **fixed,
        "data sets": [[Path(source.name).name, source.n_obs] for source in cells.sources],
        "genes": len(cells.vocabulary),
        _CONTENT: content.hexdigest()[:16],
        "batches a step (ranks times accumulate)": ranks.world_size * config.accumulate,
    }


class _RunFolder:
    """The output folder of a run, on the first rank the only one that writes to it but for checkpoints."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.resume = resume
        self._lock: Any = None

    def check(self) -> None:
        """Refuse, before any work, a folder that cannot be the output."""
        path = self.path
        if path.exists() and not self.resume:
            raise FileExistsError(f"output {path}: exists; name another folder, or go on with its run: --resume")
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"output {path}: expected the folder of a run, got a file")
        if path.exists() and not (path / RUN_FILE).exists():
            foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in _FIRST_FILES)
            if foreign:
                raise FileExistsError(
                    f"output {path}: expected the folder of a run, got one without {RUN_FILE} (it holds "
                    f"{', '.join(foreign[:3])}); name another folder"
                )
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(f"output {path}: the folder {nearest} cannot be written to; choose another one")

    def begin(
        self, config: PretrainConfig, vocabulary: Vocabulary, identity: dict[str, Any]
    ) -> tuple[Path, int, dict[str, Any]] | None:
        """Make the folder, or take up its run; the checkpoint to go on with, if any."""
        try:
            self.path.mkdir(parents=True, exist_ok=self.resume)
        except OSError as error:
            raise PermissionError(
                f"output {self.path}: the folder cannot be made ({error.strerror}); choose another one"
            ) from error
        self._lock = open(self.path / _LOCK_FILE, "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileExistsError(f"output {self.path}: another run is at work in it; wait for it") from None
        run_file = self.path / RUN_FILE
        machine = _machine()
        if run_file.exists():
            try:
                earlier = json.loads(run_file.read_text(encoding="utf-8"))
                earlier_run, earlier_machine = dict(earlier["run"]), dict(earlier["machine"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{run_file}: expected what a run writes there, got a damaged file ({error}); name another folder"
                ) from error
            self._check_same(earlier_run, identity)
            changed = [
                f"{name} was {earlier_machine.get(name)}, is {value}"
                for name, value in machine.items()
                if earlier_machine.get(name) != value
            ]
            if changed:
                warnings.warn(
                    f"{self.path}: {'; '.join(changed)}: the run goes on, but its weights can differ in their last "
                    "bits from those of an uninterrupted one",
                    stacklevel=2,
                )
        else:
            config.to_yaml(self.path / CONFIG_FILE)
            vocabulary.save(self.path / VOCABULARY_FILE)
            write_whole(run_file, json.dumps({"run": identity, "machine": machine}, indent=1))
        checkpoints = self.checkpoints(config)
        checkpoints.remove_leftovers()
        return checkpoints.newest()

    def _check_same(self, earlier: dict[str, Any], identity: dict[str, Any]) -> None:
        # As JSON gives it back: tuples as lists.
        wanted = json.loads(json.dumps(identity))
        changed = [
            f"{name} was {earlier.get(name)!r}, is {wanted.get(name)!r}"
            for name in {**earlier, **wanted}
            if earlier.get(name) != wanted.get(name)
        ]
        if len(changed) > 1:
            # Options decide what is read: another content need not mean other cells.
            changed = [change for change in changed if not change.startswith(_CONTENT)]
        if changed:
            raise ValueError(
                f"resume: expected the config and data of the run in {self.path}, got others: {'; '.join(changed)}; "
                "give the same, or name another folder"
            )

    def checkpoints(self, config: PretrainConfig) -> Checkpoints:
        return Checkpoints(self.path / CHECKPOINT_FOLDER, config.keep_checkpoints)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()


def _machine() -> dict[str, Any]:
    extension = dispatch.extension()
    return {
        "torch": str(torch.__version__),
        "kernels": "reference" if extension is None else extension.active_isa(),
        "threads": torch.get_num_threads(),
    }


class _LossOf(nn.Module):
    """The model's summed loss as a module's forward, which is what DDP and FSDP act on."""

    def __init__(self, model: XTrimoGene) -> None:
        super().__init__()
        self.model = model

    def forward(self, masked: MaskedBatch) -> Tensor:
        return self.model.loss(masked, reduction="sum")


class _Run:
    """One run on one rank."""

    def __init__(
        self, config: PretrainConfig, cells: TrainingCells, folder: _RunFolder, ranks: Ranks, show_progress: bool
    ) -> None:
        self.config, self.cells, self.folder, self.ranks = config, cells, folder, ranks
        self.show_progress = show_progress and ranks.is_first
        self.progress = _Progress()
        torch.manual_seed(_seed_of(config.seed, _WEIGHTS))
        if config.checkpoint is None:
            self.model = XTrimoGene(config.model_config(len(cells.vocabulary)), cells.vocabulary)
        else:
            self.model = XTrimoGene.from_pretrained(config.checkpoint)
        self.model.to(ranks.device)
        self.model.checkpoint_activations = config.activation_checkpointing
        self.network: nn.Module = self._parallel(_LossOf(self.model))
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.log: TrainingLog | None = None
        self._means: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None
        self._counted: tuple[int, int] | None = None
        self._clock = 0.0
        self.rate = self.norm = math.nan

    def _parallel(self, network: _LossOf) -> nn.Module:
        if self.ranks.world_size == 1:
            return network
        if self.config.parallel == "ddp":
            # Projections are drawn alike on all ranks: there is nothing to broadcast.
            return DistributedDataParallel(network, broadcast_buffers=False)
        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.world_size,))
        for layer in (*network.model.encoder.layers, *network.model.decoder.layers):
            fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
        return network

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
            tqdm(
                total=config.max_steps,
                initial=progress.step,
                unit="step",
                desc="pretrain",
                disable=not self.show_progress,
            ) as bar,
        ):
            self._clock = time.perf_counter()
            # Broken off here, a run has nothing to save: it has made no step, or is where its checkpoint is.
            number = self._validate_where_due(bar, signals)
            while not (number or self._is_over()):
                number = self._step(batches, signals)
                bar.update()
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
        for part in range(config.accumulate):
            masked = next(batches)
            # Numbered through all ranks, as the batches of a step are: dropout does not depend on who computes one.
            number = ranks.rank * config.accumulate + part
            torch.manual_seed(_seed_of(config.seed, _DROPOUT, progress.step, number))
            with self._exchanging(part + 1 == config.accumulate):
                with self._autocast():
                    loss = self.network(masked.to(ranks.device))
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
            if parameter.grad is not None:
                # DDP and FSDP give the mean over the ranks of each one's sum.
                parameter.grad.mul_(ranks.world_size / sums[1])
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
        self.norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(self.norm):
            raise TrainingFailed(
                f"step {progress.step + 1:,}: the norm of the gradient is {self.norm}; lower learning_rate, or raise "
                "warmup_steps, and start again, or look at the data"
            )
        self.rate = config.rate(progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.epoch_step += 1
        progress.cells += int(sums[2])
        progress.seconds += passed
        for name, value in zip(_SINCE_LOG, sums, strict=True):
            progress.since_log[name] += value
        return signals.first([term, interrupt])

    def _exchanging(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Whether the ranks exchange gradients in the backward pass of a batch: in the last one of a step."""
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(now)
        if isinstance(self.network, DistributedDataParallel) and not now:
            return self.network.no_sync()
        return contextlib.nullcontext()

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
        loss, baseline_mean, baseline_zero_mean = validated
        if self.log is not None:
            self.log.write(
                "validation",
                step,
                loss=loss,
                baseline_mean=baseline_mean,
                baseline_zero_mean=baseline_zero_mean,
                seconds=self.progress.seconds,
            )
        if self.show_progress:
            bar.write(f"step {step:,}: validation loss {loss:.4f}", file=sys.stderr)
        return 0

    def _validate(self, signals: StopSignals) -> tuple[float, float, float] | int:
        """Mean squared errors at the chosen genes of the validation cells: the model's, and those of two baselines.

        Or the number of a signal: a validation of many cells takes longer than a batch system waits, and a resumed run
        does it again.
        """
        mean, nonzero_mean = self._gene_means()
        squares = np.zeros(4)
        self.network.eval()
        batches = self.cells.validation(rank=self.ranks.rank, world_size=self.ranks.world_size)
        with torch.no_grad(), contextlib.closing(batches):
            for masked in batches:
                with self._autocast():
                    loss = self.network(masked.to(self.ranks.device))
                genes, values = masked.chosen_ids.numpy(), masked.chosen_values.numpy().astype(np.float64)
                told = np.where(values > 0, nonzero_mean[genes], 0.0)
                squares += [
                    float(loss), np.square(values - mean[genes]).sum(), np.square(values - told).sum(), len(genes)
                ]  # fmt: skip
                # Every rank has as many batches.
                if number := signals.first(self.ranks.sums(signals.counts())):
                    return number
        *sums, chosen = self.ranks.sums(squares.tolist())
        if not chosen:
            raise TrainingFailed("validation: no gene was chosen; raise masking.nonzero_rate or masking.zero_rate")
        loss, baseline_mean, baseline_zero_mean = (each / chosen for each in sums)
        return loss, baseline_mean, baseline_zero_mean

    def _gene_means(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(genes,) mean of each gene over training cells, and over those of them where it is not zero."""
        if self._means is None:
            self._means = self.ranks.first(lambda: gene_means(self.cells, _BASELINE_CELLS))
        return self._means

    def _save_model(self) -> Path:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = get_model_state_dict(self.model, options=options)

        def save() -> Path:
            target = self.folder.path / MODEL_FOLDER
            with torch.device("meta"):
                model = XTrimoGene(self.model.config, self.model.vocabulary)
            model.load_state_dict(tensors, assign=True)
            model.save_pretrained(target, overwrite=True)
            return target

        return self.ranks.first(save)


def gene_means(cells: TrainingCells, most: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(genes,) mean log-normalised value of each gene over at most so many training cells, evenly spaced, and its mean
    over those of them where it is not zero (0 where there is none)."""
    sample = cells.training[np.linspace(0, len(cells.training) - 1, min(most, len(cells.training))).astype(int)]
    genes = len(cells.vocabulary)
    sums, counts = np.zeros(genes), np.zeros(genes)
    for start in range(0, len(sample), _READ_CELLS):
        batch = cells.read(sample[start : start + _READ_CELLS])
        gene_ids = batch.gene_ids.numpy()
        sums += np.bincount(gene_ids, weights=batch.values.numpy(), minlength=genes)
        counts += np.bincount(gene_ids, minlength=genes)
    return sums / len(sample), sums / np.maximum(counts, 1)


def _seed_of(*words: int) -> int:
    """A seed for torch that is a hash of some numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
