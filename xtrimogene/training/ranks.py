"""Ranks: the processes that torchrun starts for one run, or the single process without it, and what they agree on."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# The first rank reads every cell of the data once while the others wait: NCCL's ten minutes are too short for that.
_LONGEST_WAIT = datetime.timedelta(hours=3)


class FirstRankFailed(RuntimeError):
    """Another rank than the first stops because the first one, which says why, cannot go on."""


def first_rank_does(work: Callable[..., T], *arguments: Any) -> T:
    """The result of `work(*arguments)` on all ranks, which only the first one does while the others wait.

    Where it raises, that error is raised on the first rank and FirstRankFailed on the others.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work(*arguments)
    result: list[Any] = [None, True]
    error = None
    if dist.get_rank() == 0:
        try:
            result[0] = work(*arguments)
        except Exception as raised:
            error, result[1] = raised, False
    dist.broadcast_object_list(result, src=0)
    if error is not None:
        raise error
    if not result[1]:
        raise FirstRankFailed("the first rank says why")
    return result[0]


@dataclass(frozen=True)
class Ranks:
    """One process of a run and its place among all of them.

    rank, world_size   number of the process, and of processes; 0 and 1 without torchrun
    device             where its model and batches are
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    @contextlib.contextmanager
    def joined(cls, device: torch.device) -> Iterator[Ranks]:
        """Join the ranks that torchrun has started: gloo between CPUs, NCCL between GPUs, one for each rank of a node.

        A process group that exists already is used as it is and left open.
        """
        if not dist.is_initialized() and "WORLD_SIZE" not in os.environ:
            yield cls(0, 1, device)
            return
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        joins = not dist.is_initialized()
        if joins:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=_LONGEST_WAIT)
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), device)
        finally:
            if joins:
                dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, work: Callable[..., T], *arguments: Any) -> T:
        """The result of `work(*arguments)`, which only the first rank does; see first_rank_does."""
        return first_rank_does(work, *arguments)

    def sums(self, numbers: Sequence[float | torch.Tensor]) -> list[float]:
        """Each number added up over all ranks, in float64. Waits for what the device has still to compute."""
        own = torch.stack([torch.as_tensor(number, dtype=torch.float64, device=self.device) for number in numbers])
        if self.world_size > 1:
            dist.all_reduce(own)
        return own.tolist()


class StopSignals:
    """Turns SIGTERM and SIGINT into a wish to stop, which a run looks at between two steps.

    Without torchrun a second signal acts as it would without this. torchrun and batch systems may both pass the same
    signal on, so that under torchrun repetitions mean nothing.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, ranks: Ranks, message: str) -> None:
        self.number = 0
        self._ranks = ranks
        self._message = message
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread set handlers; in another one signals act as they did.
        if threading.current_thread() is threading.main_thread():
            for number in self.NUMBERS:
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def counts(self) -> list[float]:
        """For each of NUMBERS 1.0 if this rank has got it, else 0.0: to be added up over all ranks."""
        return [float(self.number == number) for number in self.NUMBERS]

    def first(self, counts: Sequence[float]) -> int:
        """The first of NUMBERS that any rank has got, by the sums of their counts; 0 for none."""
        return next((int(number) for number, count in zip(self.NUMBERS, counts, strict=True) if count), 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number == 0 and self._ranks.is_first:
            # print is not safe in a handler that may have interrupted a print.
            os.write(2, f"\n{signal.Signals(number).name}: {self._message}\n".encode())
        self.number = self.number or number
        if self._ranks.world_size == 1:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}
