"""Checks the providers of a task against float64, times those that are right, and makes rows of it.

Providers of a case run in one process, taking turns, so that a noisy machine is noisy for all of them: ratios inside
one run are what counts. A provider whose result is not right against float64 gets a row that says so and no time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from xtrimogene.bench.measured import digits
from xtrimogene.bench.rows import Row
from xtrimogene.bench.tasks import BACKWARD, BOTH, DTYPES, FORWARD, Provider, Task

GEMM_SIZE = 2048
LONG_ROUND = 10.0  # seconds of a provider
# An approximated exp cannot be as good as a correctly rounded one on inputs where PyTorch is nearly exact.
FLOAT32_FLOOR = 2e-6
# The baseline itself: what its dtype can do. A rounding that moves a row across the kink of a ReLU changes its gradient
# by the whole, and a deep encoder has millions of them.
PLAIN_LIMIT = {
    "float32": {FORWARD: 1e-4, BACKWARD: 1e-2},
    "bfloat16": {FORWARD: 0.05, BACKWARD: 0.5},
    "float16": {FORWARD: 0.01, BACKWARD: 0.1},
}


def check(task: Task) -> dict[str, dict[str, tuple[float, float]]]:
    """Provider -> direction -> (error, limit) against float64; a provider is right where no error exceeds its limit.

    The error is ||x - exact|| / ||exact||, of the output, and for the backward the largest over the gradients. The
    limit is twice (backward: three times) the error of the plain provider, the largest of its several orders of
    summation where the task has them, and for that one itself, and where there is none, a constant of the dtype.
    """
    exact_out, exact_grads = task.exact()
    grad_out = task.grad_out.clone()
    grad_out[task.checked_rows :] = 0

    def errors_of(provider: Provider) -> dict[str, float]:
        with torch.no_grad():
            inferred = provider.run()
        out = provider.run()
        grads = torch.autograd.grad(out, provider.inputs, grad_out)
        # Inference may take another way than training: both are judged.
        forward = max(_error(x.detach()[: task.checked_rows], exact_out) for x in (inferred, out))
        backward = max(_error(_rows_of(g, e), e) for g, e in zip(grads, exact_grads, strict=True))
        return {FORWARD: forward, BACKWARD: backward}

    errors = {name: errors_of(provider) for name, provider in task.providers.items()}
    plain = [errors["plain"], *(errors_of(provider) for provider in task.plain_again)] if "plain" in errors else []
    floor = FLOAT32_FLOOR if task.dtype == "float32" else 0.0
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, by_direction in errors.items():
        found[name] = {}
        for direction, factor in ((FORWARD, 2), (BACKWARD, 3)):
            limit = (
                max(factor * max(error[direction] for error in plain), floor)
                if plain and name != "plain"
                else PLAIN_LIMIT[task.dtype][direction]
            )
            found[name][direction] = (by_direction[direction], limit)
        found[name][BOTH] = max(found[name].values(), key=lambda pair: pair[0] / pair[1])
    return found


def right(found: dict[str, tuple[float, float]]) -> bool:
    """Whether a provider's errors, as ``check`` gives them, are within their limits."""
    return all(error <= limit for error, limit in found.values())


def _rows_of(gradient: Tensor, exact: Tensor) -> Tensor:
    """Gradients to token rows cover all cells, the exact ones only the cells that are checked."""
    return gradient[: len(exact)]


def _error(x: Tensor, exact: Tensor) -> float:
    error = float((x.double() - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf  # the maximum of NaN and a number depends on their order


def measure(
    task: Task, names: Sequence[str], seconds: float, rounds_at_least: int = 4
) -> dict[str, dict[str, list[float]]]:
    """Provider -> direction -> times (s), the providers taking turns; "gemm" is a matrix product of the same dtype,
    "copy" a copy of the output into new memory."""
    square = torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=DTYPES[task.dtype], device=task.grad_out.device)
    times: dict[str, dict[str, list[float]]] = {name: {FORWARD: [], BACKWARD: [], BOTH: []} for name in names}
    others: dict[str, Callable[[], Tensor]] = {"gemm": lambda: torch.mm(square, square)}
    if task.moves:
        others["copy"] = task.grad_out.clone
    times |= {name: {FORWARD: []} for name in others}
    started, rounds, warm = time.perf_counter(), 0, 1
    while True:
        spent = time.perf_counter() - started
        # Of the rounds that count, two are enough where they are slow.
        enough = warm + (min(2, rounds_at_least) if spent > 60 else rounds_at_least)
        if rounds >= enough and (spent >= seconds or rounds >= 60):
            break
        for name in (*names[rounds % len(names) :], *names[: rounds % len(names)]):
            forward, backward, both = _time_once(task.providers[name], task.grad_out)
            times[name][FORWARD].append(forward)
            times[name][BACKWARD].append(backward)
            times[name][BOTH].append(both)
        for name, run in others.items():
            clock = _now(square)
            run()
            times[name][FORWARD].append(_now(square) - clock)
        rounds += 1
        # The first round warms caches, allocators and oneDNN's kernels, and does not count; where each provider runs
        # for seconds, that is nothing.
        if rounds == 1 and time.perf_counter() - started > LONG_ROUND * len(names):
            warm = 0
    return {
        name: {direction: found[warm:] for direction, found in by_direction.items()}
        for name, by_direction in times.items()
    }


def _now(x: Tensor) -> float:
    """The clock (s) when all that was asked of the device of x is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _time_once(provider: Provider, grad_out: Tensor) -> tuple[float, float, float]:
    """Seconds of a forward for inference, of a backward alone, and of a forward and backward for training."""
    clock = _now(grad_out)
    with torch.no_grad():
        provider.run()
    inference = _now(grad_out) - clock
    clock = _now(grad_out)
    out = provider.run()
    middle = _now(grad_out)
    torch.autograd.grad(out, provider.inputs, grad_out)
    end = _now(grad_out)
    return inference, end - middle, end - clock


def task_rows(
    task: Task,
    seconds: float,
    *,
    checked: dict[str, dict[str, tuple[float, float]]] | None = None,
    rounds_at_least: int = 4,
) -> Iterator[Row]:
    """The rows of one task: every provider and direction, speeds only where the result is right.

    checked are errors and limits that were found already, by default those of check.
    """
    checked = check(task) if checked is None else checked
    good = [name for name, found in checked.items() if right(found)]
    times = measure(task, good, seconds, rounds_at_least) if good else {}
    for name in task.providers:
        for direction in (FORWARD, BACKWARD, BOTH):
            error, limit = checked[name][direction]
            row: Row = {
                "benchmark": task.benchmark,
                "case": task.case,
                "cells": len(task.lengths),
                "tokens": sum(task.lengths),
                "dtype": task.dtype,
                "direction": direction,
                "provider": name,
                "correct": name in good,
                "error": f"{error:.2e}",
                "error_limit": f"{limit:.2e}",
            }
            if name in good:
                row |= _speed(times[name][direction])
                median = statistics.median(times[name][direction])
                gflops = task.flops[direction] / (1e9 * median)
                gemm = 2 * GEMM_SIZE**3 / (1e9 * statistics.median(times["gemm"][FORWARD]))
                row |= {
                    "gflops": digits(gflops),
                    "gemm_gflops": digits(gemm),
                    "share_of_gemm": digits(gflops / gemm),
                }
                if task.moves:
                    row["share_of_copy"] = digits(statistics.median(times["copy"][FORWARD]) / median)
                if "plain" in good:
                    row["speedup"] = digits(statistics.median(times["plain"][direction]) / median)
            yield row


def _speed(times: Sequence[float]) -> Row:
    low, median, high = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return {
        "runs": len(times),
        "median_ms": digits(1e3 * median),
        "q20_ms": digits(1e3 * low),
        "q80_ms": digits(1e3 * high),
    }
