"""What is done on a GPU, item by item: checks, op tests, sanitizer, tuning, times, and the measured model."""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import tasks, tune
from benchmarks.gpu.timing import milliseconds
from benchmarks.static.cards import CARDS
from benchmarks.static.launches import OPS
from xtg_kernels import use_backend
from xtg_kernels.triton_launch import architecture
from xtrimogene.bench import runner
from xtrimogene.bench.measured import digits
from xtrimogene.bench.rows import Row
from xtrimogene.bench.tasks import (
    BACKWARD,
    BOTH,
    FORWARD,
    NUM_GENES,
    Provider,
    Task,
    offsets,
    real_lengths,
    short_lengths,
)

ROOT = Path(__file__).parents[2]
OP_TESTS = "tests/xtg_kernels"


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    small, cells   lengths of the checked and of the timed batches
    heads, rows    of the attentions and of all other ops, what differs from the 100m model's sizes
    num_genes      vocabulary of the gather and of the pre-training step
    dtypes         those that are checked; the first is timed
    preset         model whose encoder and training step are measured, and expressed genes of a cell in that step
    seconds, runs  time for each measurement, and the fewest runs
    tuning         what benchmarks.gpu.tune does
    """

    small: tuple[int, ...]
    cells: dict[str, tuple[int, ...]]
    heads: dict[str, int]
    rows: dict[str, int]
    num_genes: int
    dtypes: tuple[str, ...]
    preset: str
    expressed: int
    step_cells: int
    seconds: float
    runs: int
    tuning: tune.Plan


@dataclass(frozen=True)
class Item:
    """One piece of work, done whole or not at all: its name, and what makes its rows."""

    name: str
    rows: Callable[[], Iterable[Row]]


def plan_of(device: str, quick: bool) -> Plan:
    """What is measured where."""
    if device == "cpu":
        tiny = tune.Plan((20, 9), "smallest", ("float32",), 2, 0.0)
        return Plan(
            small=(17, 1, 33), cells={"2 cells": (20, 9)}, heads={"heads": 2, "head_dim": 16}, rows={"dim": 64},
            num_genes=50,
            # bfloat16 is wrong in the interpreter.
            dtypes=("float32", "float16"),
            preset="tiny", expressed=40, step_cells=1, seconds=0.0, runs=1, tuning=tiny,
        )  # fmt: skip
    small = (300, 1, 64, 129, 2, 700)
    cells = {"32 cells": real_lengths(32), "128 short cells": short_lengths(128)}
    if not quick:
        cells |= {"1 x 4096": (4096,), "15,000 genes among short cells": (15_000, *short_lengths(64))}
    dtypes = ("bfloat16", "float16", "float32")
    tuning = tune.QUICK if quick else tune.FULL
    return Plan(small, cells, {}, {}, NUM_GENES, dtypes, "100m", 2000, 4, 0.1 if quick else 0.5, 5, tuning)


def items(plan: Plan, device: str, folder: Path) -> Iterator[Item]:
    """All work, in the order in which it is wanted most."""
    where = torch.device(device)
    for dtype in plan.dtypes:
        for op in OPS:
            if op != "favor_attention" or dtype != "float16":
                yield Item(f"check {op} {dtype}", functools.partial(_check, op, plan.small, dtype, where, plan))
    if device != "cpu":
        yield Item("op tests", _op_tests)
    yield from (
        Item(f"sanitizer {tool}", functools.partial(_sanitize, tool, device)) for tool in ("memcheck", "racecheck")
    )
    for op in OPS:
        yield Item(f"tune {op}", functools.partial(_tune, op, where, plan, folder))
    for case, lengths in plan.cells.items():
        for op in OPS:
            yield Item(f"time {op}, {case}", functools.partial(_time, op, case, lengths, plan.dtypes[0], where, plan))
    lengths = next(iter(plan.cells.values()))
    for training in (False, True):
        name = "training" if training else "inference"
        yield Item(f"encoder {name}", functools.partial(_encoder, plan, lengths, training, where))
    yield Item("pre-training step", functools.partial(_step, plan, where))


def _task(
    op: str, case: str, lengths: tuple[int, ...], dtype: str, device: torch.device, plan: Plan
) -> tuple[Task, dict[str, str]]:
    """The task of an op, and the rivals that are not in it with their reasons."""
    if op == "ragged_attention":
        return tasks.attention(case, lengths, dtype, device, **plan.heads)
    if op == "expression_embedding":
        return tasks.embedding(case, lengths, dtype, device, **plan.rows), {}
    if op == "favor_attention":
        return tasks.favor(case, lengths, dtype, device, **plan.heads), {}
    if op == "masked_decoder_gather":
        # The rows of all genes of every cell: a few cells are as many as thousands of tokens.
        cells = tuple(min(n, plan.num_genes) for n in lengths[:8])
        return tasks.gather(case, cells, dtype, device, num_genes=plan.num_genes, **plan.rows), {}
    if op == "dropout":
        return tasks.dropped(case, lengths, dtype, device, **plan.rows), {}
    return tasks.head(case, lengths, dtype, device, **plan.rows), {}


def _check(op: str, lengths: tuple[int, ...], dtype: str, device: torch.device, plan: Plan) -> Iterator[Row]:
    """Errors of every provider against float64, and their limits."""
    task, absent = _task(op, "ragged", lengths, dtype, device, plan)
    for provider, found in runner.check(task).items():
        for direction, (error, limit) in found.items():
            if direction != BOTH:
                yield {
                    "op": op, "case": "ragged", "dtype": dtype, "direction": direction, "provider": provider,
                    "correct": error <= limit, "error": f"{error:.2e}", "error_limit": f"{limit:.2e}",
                }  # fmt: skip
    yield from ({"op": op, "dtype": dtype, "provider": name, "note": reason} for name, reason in absent.items())


def _op_tests() -> Iterator[Row]:
    """The tests of the Triton kernels, which take the GPU where there is one."""
    names = [str(path.relative_to(ROOT)) for path in sorted((ROOT / OP_TESTS).glob("test_triton_*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    yield {"op": "all", "correct": done.returncode == 0, "note": last}


def _sanitize(tool: str, device: str) -> Iterator[Row]:
    """compute-sanitizer over one launch of every kernel, with allocations of their own for all tensors."""
    program = shutil.which("compute-sanitizer")
    if device == "cpu" or program is None:
        yield {"op": "all", "provider": tool, "note": "no GPU" if device == "cpu" else "compute-sanitizer not found"}
        return
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.static.launches"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        last = (done.stdout + done.stderr).strip().splitlines()[-1]
        yield {"op": "all", "provider": tool, "correct": done.returncode == 0, "note": last}
    except subprocess.TimeoutExpired:
        yield {"op": "all", "provider": tool, "note": "not done within ten minutes"}


def _tune(op: str, device: torch.device, plan: Plan, folder: Path) -> Iterator[Row]:
    """Candidates of every kernel, timed; the fastest go to FOLDER/configs."""
    tables = tune.read_tables(op)
    for row in tune.tune(op, device, plan.tuning, tables):
        # A candidate that does not fit is an answer, no failure.
        note = row.pop("refused", "")
        if note:
            row.pop("correct")
        yield {**row, "note": note or ("chosen" if row["chosen"] else "")}
    tune.write_tables(op, tables, folder / "configs")


def _time(op: str, case: str, lengths: tuple[int, ...], dtype: str, device: torch.device, plan: Plan) -> Iterator[Row]:
    """Times of every provider that is right, forward (as inference runs it) and backward."""
    task, absent = _task(op, case, lengths, dtype, device, plan)
    checked = runner.check(task)
    medians: dict[tuple[str, str], float] = {}
    rows = []
    for name, provider in task.providers.items():
        for direction in (FORWARD, BACKWARD):
            error, limit = checked[name][direction]
            row: Row = {
                "op": op, "case": case, "cells": len(lengths), "tokens": sum(lengths), "dtype": dtype,
                "direction": direction, "provider": name, "correct": runner.right(checked[name]),
                "error": f"{error:.2e}", "error_limit": f"{limit:.2e}",
            }  # fmt: skip
            if row["correct"]:
                if direction == FORWARD:
                    with torch.no_grad():
                        times = milliseconds(provider.run, device, seconds=plan.seconds, least=plan.runs)
                else:
                    times = milliseconds(
                        functools.partial(_gradients, provider, task.grad_out),
                        device,
                        prepare=functools.partial(_outputs, provider),
                        seconds=plan.seconds,
                        least=plan.runs,
                    )
                medians[name, direction] = statistics.median(times)
                row |= _speed(times) | _share(task.flops[direction], medians[name, direction], dtype, device)
            rows.append(row)
    for row in rows:
        if row["correct"] and ("plain", row["direction"]) in medians:
            row["speedup"] = digits(medians["plain", row["direction"]] / row["median_ms"])
        yield row
    yield from ({"op": op, "case": case, "provider": name, "note": reason} for name, reason in absent.items())


def _outputs(provider: Provider) -> tuple[Tensor]:
    return (provider.run(),)


def _gradients(provider: Provider, grad_out: Tensor, out: Tensor) -> None:
    torch.autograd.grad(out, provider.inputs, grad_out)


def _speed(times: Sequence[float]) -> Row:
    quantiles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else list(times) * 9
    return {
        "runs": len(times),
        "median_ms": digits(statistics.median(times)),
        "q20_ms": digits(quantiles[1]),
        "q80_ms": digits(quantiles[7]),
    }


def _share(flops: int, median_ms: float, dtype: str, device: torch.device) -> Row:
    """TFLOP/s by the closed form, and their share of the card's peak as benchmarks.static.cards has it."""
    tflops = flops / (1e9 * median_ms)
    card = CARDS[architecture(device)]
    peak = card.float32_tflops if dtype == "float32" else card.half_tflops
    if not flops:
        return {}
    return {"tflops": digits(tflops)} | ({"share_of_peak": digits(tflops / peak)} if device.type == "cuda" else {})


def _encoder(plan: Plan, lengths: tuple[int, ...], training: bool, device: torch.device) -> Iterator[Row]:
    """Cells a second of the encoder layers of a preset, forward alone or with the backward, and peak memory."""
    # The ops need none of what a model does: where that is missing, this item fails and says so.
    from xtrimogene.network.config import XTrimoGeneConfig
    from xtrimogene.network.encoder import RaggedTransformerEncoder
    from xtrimogene.network.flops import encoder_backward_flops, encoder_flops

    config = XTrimoGeneConfig.preset(plan.preset, num_genes=NUM_GENES, dropout=0.0)
    dtype = getattr(torch, plan.dtypes[0])
    torch.manual_seed(0)
    encoder = RaggedTransformerEncoder(
        config.dim, config.num_heads, config.num_layers, ffn_dim=config.ffn_dim, dropout=0.0
    ).to(device, dtype)
    encoder.train(training)
    total, cu_seqlens, longest = sum(lengths), offsets(lengths).to(device), max(lengths)
    x = torch.randn(total, config.dim).to(device, dtype).requires_grad_(training)
    forward = encoder_flops(config, lengths)
    flops = forward.linear + forward.attention
    if training:
        backward = encoder_backward_flops(config, lengths)
        flops += backward.linear + backward.attention

    def run() -> None:
        with torch.set_grad_enabled(training), use_backend("triton"):
            out = encoder(x, cu_seqlens, longest)
            if training:
                out.backward(out.detach())

    _reset_memory(device)
    before = _memory(device)
    run()
    peak = _memory(device, peak=True) - before
    times = milliseconds(run, device, seconds=plan.seconds, least=plan.runs)
    median = statistics.median(times)
    yield {
        "op": f"encoder {plan.preset}", "case": f"{len(lengths)} cells", "cells": len(lengths), "tokens": total,
        "dtype": plan.dtypes[0], "direction": "forward+backward" if training else "forward", "provider": "xtg",
        **_speed(times), **_share(flops, median, plan.dtypes[0], device),
        "cells_per_second": digits(1e3 * len(lengths) / median), "peak_mib": digits(peak),
    }  # fmt: skip


def _step(plan: Plan, device: torch.device) -> Iterator[Row]:
    """A step of pre-training: loss over all genes, backward, AdamW."""
    # As for the encoder.
    from xtrimogene.bench import pretraining

    model, masked = pretraining.prepared(
        plan.preset, plan.step_cells, expressed=plan.expressed, num_genes=plan.num_genes
    )
    model, masked = model.to(device), masked.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step() -> None:
        with use_backend("triton"):
            pretraining.mean_loss(model, masked, plan.dtypes[0]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    _reset_memory(device)
    before = _memory(device)
    step()
    peak = _memory(device, peak=True) - before
    times = milliseconds(step, device, seconds=plan.seconds, least=plan.runs)
    yield {
        "op": f"pre-training step {plan.preset}", "case": f"{plan.step_cells} cells of {plan.expressed}",
        "cells": plan.step_cells, "tokens": masked.batch.total_nnz, "dtype": plan.dtypes[0],
        "direction": "forward+backward", "provider": "xtg", **_speed(times),
        "cells_per_second": digits(1e3 * plan.step_cells / statistics.median(times)), "peak_mib": digits(peak),
    }  # fmt: skip


def _reset_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device, *, peak: bool = False) -> float:
    """MiB that PyTorch has allocated on the device, now or at most; 0 on a CPU."""
    if device.type == "cpu":
        return 0.0
    return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 2**20
