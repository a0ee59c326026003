"""Times of calls on a GPU (by events on its stream, with a cold cache) and, for rehearsals, on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# More than any second-level cache has; written before every run, so that none finds its inputs there.
_CACHE_BYTES = 256 * 2**20


def milliseconds(
    run: Callable[..., Any],
    device: torch.device,
    *,
    prepare: Callable[[], tuple[Any, ...]] = tuple,
    seconds: float = 0.2,
    least: int = 5,
) -> list[float]:
    """Times of ``run(*prepare())``, without those of ``prepare``, for about so many seconds and at least so many runs.

    The first two runs, which compile and warm up, do not count.
    """
    if device.type == "cpu":
        return _on_cpu(run, prepare, seconds, least)
    flush = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)
    for _ in range(2):
        run(*prepare())
    torch.cuda.synchronize(device)
    times: list[float] = []
    while len(times) < least or sum(times) < 1e3 * seconds:
        arguments = prepare()
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(*arguments)
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return times


def _on_cpu(run: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]], seconds: float, least: int) -> list[float]:
    times: list[float] = []
    while len(times) < least or sum(times) < 1e3 * seconds:
        arguments = prepare()
        clock = time.perf_counter()
        run(*arguments)
        times.append(1e3 * (time.perf_counter() - clock))
    return times
