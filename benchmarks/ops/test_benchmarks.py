"""pytest-benchmark cases over the registry: python -m pytest benchmarks [--benchmark-compare ...]

The same tasks as `python -m benchmarks.run`, in its quick shapes and checked in the same way before they are timed.
`make test` does not collect this file.
"""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.cases import TASKS
from xtrimogene.bench.runner import check, right
from xtrimogene.bench.tasks import BACKWARD, FORWARD, Task

CASES = {f"{task.benchmark}, {task.case}, {task.dtype}": task for tasks in TASKS.values() for task in tasks(True)}


@functools.cache
def checked(case: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Errors and limits of the providers of a case; float64 is slow, and many tests ask."""
    return check(CASES[case])


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize(
    ("case", "provider"), [(case, provider) for case, task in CASES.items() for provider in task.providers]
)
def test_speed(case: str, provider: str, direction: str, benchmark: BenchmarkFixture) -> None:
    task: Task = CASES[case]
    assert right(checked(case)[provider]), checked(case)[provider]
    benchmark.group = f"{case}, {direction}"
    run, inputs = task.providers[provider].run, task.providers[provider].inputs
    if direction == FORWARD:
        with torch.no_grad():
            benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    else:
        benchmark.pedantic(
            torch.autograd.grad, setup=lambda: ((run(), inputs, task.grad_out), {}), rounds=3, warmup_rounds=1
        )
