"""fit: epochs of optimizer steps with early stopping on a validation part; killed at any moment, it goes on.

Everything that is random is a function of (seed, epoch, step), and what a step begins with is kept on disk: a fit that
goes on does, bit for bit, what it would have done without the interruption (on one CPU process in float32, with the
same number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from xtrimogene.progress import progress_bar
from xtrimogene.tasks.work import WorkFolder

Batch = TypeVar("Batch")
# Seconds of work that a kill may cost, about.
SAVE_SECONDS = 10.0
CLIP_NORM = 1.0
# The share of the steps of a fit over which the rate rises.
WARMUP_SHARE = 0.05
# The moments of batch norms and the like are kept beside the parameters; the frozen rest is not.
_MODEL, _BEST, _OPTIMIZER = "model.", "best.", "optimizer."


class FitFailed(ValueError):
    """A fit had begun and cannot go on; the message says why."""


@dataclass(frozen=True)
class Fitted:
    """What a fit did: a line for each epoch ("epoch", "rate", "training loss", "validation loss"), and the epoch, from
    1, whose weights the module has now."""

    history: list[dict[str, float]]
    best_epoch: int

    @property
    def validation_loss(self) -> float:
        return self.history[self.best_epoch - 1]["validation loss"]


def fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Sequence[Batch]],
    loss: Callable[[Batch], Tensor],
    validate: Callable[[], float],
    *,
    epochs: int,
    patience: int,
    seed: int,
    work: WorkFolder | None = None,
    progress: bool = True,
    desc: str = "fit",
    save_seconds: float | None = None,
    name: str = "state",
) -> Fitted:
    """Train a module and leave it, in evaluation mode, with the weights of the epoch of the least validation loss.

    Args:
        module: its parameters that require gradients, and its buffers, are what a fit changes.
        optimizer: with the parameter groups' rates; each is multiplied by a warm-up and a cosine over all epochs.
            Its state has to be tensors, as that of Adam and AdamW is.
        batches: (epoch, from 0) -> what the steps of the epoch take; the same for the same epoch.
        loss: (batch) -> () mean loss, called in training mode, with gradients.
        validate: () -> the number to make small, called in evaluation mode, without gradients.
        epochs, patience: most epochs, and most of them in turn without a new best.
        seed: of what is random in the module, such as dropout; torch's global state is left as it was.
        work: where the fit is kept; None to keep nothing. It goes on with what it finds there.
        save_seconds: seconds of work between two saves; None for SAVE_SECONDS.
        name: under which work keeps it, another one for each fit of a work folder.

    Raises FitFailed for a loss that is not finite.
    """
    save_seconds = SAVE_SECONDS if save_seconds is None else save_seconds
    state = _State.found(module, optimizer, work, name) or _State()
    total = epochs * len(batches(0))
    rates = [group["lr"] for group in optimizer.param_groups]
    saved = time.perf_counter()
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with (
        torch.random.fork_rng(list(devices)),
        progress_bar(total, unit="step", desc=desc, initial=state.steps_done, disable=not progress) as bar,
    ):
        while state.epoch < epochs and state.epoch - state.best_epoch < patience:
            module.train()
            parts = batches(state.epoch)
            for number in range(state.step, len(parts)):
                share = _schedule(state.steps_done, total)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                torch.manual_seed(int(np.random.SeedSequence((seed, state.epoch, number)).generate_state(1)[0]))
                value = _step(module, optimizer, loss, parts[number])
                if not math.isfinite(value):
                    raise FitFailed(
                        f"the loss is {value} in step {state.steps_done + 1:,}; lower the learning rate, or look at "
                        "the data"
                    )
                state.losses += value
                state.step = number + 1
                state.steps_done += 1
                bar.update()
                if work is not None and time.perf_counter() - saved >= save_seconds:
                    state.save(module, optimizer, work, name)
                    saved = time.perf_counter()
            module.eval()
            with torch.no_grad():
                score = float(validate())
            if not math.isfinite(score):
                raise FitFailed(
                    f"the validation loss is {score} after epoch {state.epoch + 1:,}; lower the learning rate, or look "
                    "at the data"
                )
            state.end_epoch(module, score, _schedule(state.steps_done - 1, total) * max(rates), len(parts))
            bar.set_postfix_str(f"epoch {state.epoch}, validation {score:.4f}", refresh=False)
        if work is not None:
            state.save(module, optimizer, work, name)
    _put(module, state.best)
    module.eval()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return Fitted(state.history, state.best_epoch)


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Batch], Tensor], batch: Batch) -> float:
    optimizer.zero_grad(set_to_none=True)
    value = loss(batch)
    value.backward()
    nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], CLIP_NORM)
    optimizer.step()
    return float(value.detach())


def _schedule(step: int, total: int) -> float:
    """What a rate is multiplied by in a step, from 0: a linear rise, then a cosine down to a hundredth."""
    warmup = max(1, round(WARMUP_SHARE * total))
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


class _State:
    """Where a fit is: epochs and steps done, the sum of this epoch's losses, the best weights so far."""

    def __init__(self) -> None:
        self.epoch = self.step = self.steps_done = self.best_epoch = 0
        self.losses = 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}

    def end_epoch(self, module: nn.Module, score: float, rate: float, steps: int) -> None:
        line = {"training loss": self.losses / steps, "validation loss": score}
        if not self.history or score < min(each["validation loss"] for each in self.history):
            self.best_epoch = self.epoch + 1
            self.best = {name: tensor.detach().clone() for name, tensor in _moving(module).items()}
        self.history.append({"epoch": self.epoch + 1, "rate": rate, **line})
        self.epoch, self.step, self.losses = self.epoch + 1, 0, 0.0

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, work: WorkFolder, file: str) -> None:
        tensors = {_MODEL + name: tensor for name, tensor in _moving(module).items()}
        tensors |= {_BEST + name: tensor for name, tensor in self.best.items()}
        for number, kept in optimizer.state_dict()["state"].items():
            tensors |= {f"{_OPTIMIZER}{number}.{name}": torch.as_tensor(value) for name, value in kept.items()}
        numbers: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "best"}
        work.save(file, tensors, numbers)

    @classmethod
    def found(
        cls, module: nn.Module, optimizer: torch.optim.Optimizer, work: WorkFolder | None, file: str
    ) -> _State | None:
        kept = None if work is None else work.load(file)
        if kept is None:
            return None
        tensors, numbers = kept
        self = cls()
        vars(self).update(numbers)
        of = {
            prefix: {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
            for prefix in (_MODEL, _BEST, _OPTIMIZER)
        }
        _put(module, of[_MODEL])
        self.best = of[_BEST]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in of[_OPTIMIZER].items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return self


def _moving(module: nn.Module) -> dict[str, Tensor]:
    """What a fit changes of a module: parameters that require gradients, and buffers."""
    trained: dict[str, Tensor] = {name: each for name, each in module.named_parameters() if each.requires_grad}
    return {**trained, **dict(module.named_buffers())}


def _put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = _moving(module)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
