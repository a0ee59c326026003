"""The tasks of the ops: their truth is the reference's, and a wrong kernel gets no speed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ops import baselines, cases
from xtg_kernels.ops.ragged_attention import reference
from xtrimogene.bench import runner
from xtrimogene.bench.cases import encoder_task
from xtrimogene.bench.tasks import BACKWARD, BOTH, DTYPES, FORWARD, Provider, Task, offsets

LENGTHS = (30, 1, 17)


@pytest.fixture(autouse=True)
def _small_and_quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small matrix product, and one thread: on a busy machine the threads of small work wait for each other."""
    monkeypatch.setattr(runner, "GEMM_SIZE", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _tasks(dtype: str = "float32") -> list[Task]:
    return [
        cases.attention_task("small", LENGTHS, dtype),
        cases.favor_task("small", LENGTHS, (5, 2, 40), dtype),
        cases.embedding_task("small", LENGTHS, dtype, "3m"),
        encoder_task("3m", LENGTHS, dtype, check_cells=2),
        cases.gather_task("small", LENGTHS, dtype, 8),
        cases.head_task("small", LENGTHS, dtype, 8),
    ]


def _with_provider(task: Task, name: str, provider: Provider) -> Task:
    return dataclasses.replace(task, providers={**task.providers, name: provider})


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_provider_is_right_on_small_cells(dtype: str) -> None:
    for task in _tasks(dtype):
        for name, found in runner.check(task).items():
            assert runner.right(found), (task.benchmark, name, found)


def test_exact_attention_is_the_reference_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_QUERY_ROWS", 8)
    q, k, v, grad_out = torch.randn(4, sum(LENGTHS), 2, 16, dtype=torch.float64).unbind(0)
    cu_seqlens = offsets(LENGTHS)
    out, softmax_lse = reference.forward(q, k, v, cu_seqlens, max(LENGTHS), 0.25)
    expected = reference.backward(grad_out, None, q, k, v, out, softmax_lse, cu_seqlens, max(LENGTHS), 0.25)
    exact_out, exact_grads = baselines.exact_attention(q, k, v, grad_out, LENGTHS)
    torch.testing.assert_close(exact_out, out, rtol=1e-12, atol=1e-12)
    for gradient, wanted in zip(exact_grads, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_only_the_checked_cells_are_judged() -> None:
    task = encoder_task("3m", LENGTHS, "float32", check_cells=2)
    assert task.checked_rows == 31
    assert len(task.exact()[0]) == 31


class _WrongBackward(torch.autograd.Function):
    """Right forward, gradients a hundredth too large."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 1.01 * grad


@pytest.mark.parametrize("fault", ["forward", "inference", "backward", "nan", "one row"])
def test_a_wrong_provider_gets_no_speed(fault: str) -> None:
    def broken(task: Task) -> Tensor:
        out = task.providers["xtg"].run()
        if fault == "forward":
            return out * 1.01
        if fault == "inference":
            return out if torch.is_grad_enabled() else out * 1.01
        if fault == "backward":
            return _WrongBackward.apply(out)
        factor = torch.ones(len(out), *(1 for _ in out.shape[1:]))
        factor[2] = torch.nan if fault == "nan" else 1.5
        return out * factor

    for task in _tasks():
        faulty = _with_provider(task, "broken", Provider(functools.partial(broken, task), task.providers["xtg"].inputs))
        rows = list(runner.task_rows(faulty, seconds=0))
        wrong = [row for row in rows if row["provider"] == "broken"]
        assert len(wrong) == 3
        assert not any(row["correct"] or "median_ms" in row or "speedup" in row for row in wrong), task.benchmark
        assert all(row["correct"] and row["median_ms"] > 0 for row in rows if row["provider"] == "xtg")


def test_flops_of_a_task_are_those_that_the_counter_counts() -> None:
    for task in _tasks():
        provider = task.providers["xtg"]
        with FlopCounterMode(display=False) as counter:
            out = provider.run()
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(out, provider.inputs, task.grad_out)
        assert task.flops == {
            FORWARD: forward,
            BACKWARD: counter.get_total_flops(),
            BOTH: forward + counter.get_total_flops(),
        }, task.benchmark


def test_cases_are_the_real_lengths() -> None:
    found = cases.cells(quick=False)
    assert [len(lengths) for lengths in found.values()] == [8, 1, 64, 65]
    assert 8 * 800 < sum(found["8 cells"]) < 8 * 3000
    assert all(20 <= length <= 120 for length in found["64 short cells"])
    assert max(found["15,000 genes among short cells"]) == 15_000
    assert found == cases.cells(quick=False)


def test_no_provider_is_padded_where_that_is_hopeless() -> None:
    assert "padded" in cases.attention_task("even", (30, 20), "float32").providers
    assert "padded" not in cases.attention_task("uneven", (500, *[5] * 20), "float32").providers
    assert "padded" not in cases.attention_task("one cell", (500,), "float32").providers
