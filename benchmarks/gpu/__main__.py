"""The day a GPU is there: python -m benchmarks.gpu [--quick] [--out FOLDER] [--device cpu]

Checks every op on the device against float64, runs the op tests there and compute-sanitizer where there is one, tunes
the launch configs, times the ops beside what others offer, and measures the 100m encoder and a pre-training step.
Writes gpu.csv, gpu.md, gpu.png and the tuned configs into the folder. Cut off at any moment, the same command goes on
with what is missing. --quick is done within ten minutes: what does not fit is left to the next call. --device cpu is a
rehearsal: the same steps with tiny shapes, the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtrimogene.bench.measured import digits

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
QUICK_MINUTES = 9.0
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
    tuning: Any


@dataclass(frozen=True)
class Item:
    """One piece of work, done whole or not at all: its name, and what makes its rows."""

    name: str
    rows: Callable[[], Iterable[Row]]


def plan_of(device: str, quick: bool) -> Plan:
    """What is measured where."""
    from benchmarks.gpu import tune
    from xtrimogene.bench.tasks import NUM_GENES, real_lengths, short_lengths

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
    import torch

    from benchmarks.static.launches import OPS

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


def _task(op: str, case: str, lengths: tuple[int, ...], dtype: str, device: Any, plan: Plan) -> tuple[Any, dict]:
    """The task of an op, and the rivals that are not in it with their reasons."""
    from benchmarks.gpu import tasks as gpu_tasks

    if op == "ragged_attention":
        return gpu_tasks.attention(case, lengths, dtype, device, **plan.heads)
    if op == "expression_embedding":
        return gpu_tasks.embedding(case, lengths, dtype, device, **plan.rows), {}
    if op == "favor_attention":
        return gpu_tasks.favor(case, lengths, dtype, device, **plan.heads), {}
    if op == "masked_decoder_gather":
        # The rows of all genes of every cell: a few cells are as many as thousands of tokens.
        cells = tuple(min(n, plan.num_genes) for n in lengths[:8])
        return gpu_tasks.gather(case, cells, dtype, device, num_genes=plan.num_genes, **plan.rows), {}
    return gpu_tasks.head(case, lengths, dtype, device, **plan.rows), {}


def _check(op: str, lengths: tuple[int, ...], dtype: str, device: Any, plan: Plan) -> Iterator[Row]:
    """Errors of every provider against float64, and their limits."""
    from xtrimogene.bench import runner

    task, absent = _task(op, "ragged", lengths, dtype, device, plan)
    for provider, found in runner.check(task).items():
        for direction, (error, limit) in found.items():
            if direction != runner.BOTH:
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


def _tune(op: str, device: Any, plan: Plan, folder: Path) -> Iterator[Row]:
    """Candidates of every kernel, timed; the fastest go to FOLDER/configs."""
    from benchmarks.gpu import tune

    tables = tune.read_tables(op)
    for row in tune.tune(op, device, plan.tuning, tables):
        # A candidate that does not fit is an answer, no failure.
        note = row.pop("refused", "")
        if note:
            row.pop("correct")
        yield {**row, "note": note or ("chosen" if row["chosen"] else "")}
    tune.write_tables(op, tables, folder / "configs")


def _time(op: str, case: str, lengths: tuple[int, ...], dtype: str, device: Any, plan: Plan) -> Iterator[Row]:
    """Times of every provider that is right, forward (as inference runs it) and backward."""
    import torch

    from benchmarks.gpu.timing import milliseconds
    from xtrimogene.bench import runner

    task, absent = _task(op, case, lengths, dtype, device, plan)
    checked = runner.check(task)
    medians: dict[tuple[str, str], float] = {}
    rows = []
    for name, provider in task.providers.items():
        for direction in (runner.FORWARD, runner.BACKWARD):
            error, limit = checked[name][direction]
            row: Row = {
                "op": op, "case": case, "cells": len(lengths), "tokens": sum(lengths), "dtype": dtype,
                "direction": direction, "provider": name, "correct": runner.right(checked[name]),
                "error": f"{error:.2e}", "error_limit": f"{limit:.2e}",
            }  # fmt: skip
            if row["correct"]:
                if direction == runner.FORWARD:
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


def _outputs(provider: Any) -> tuple[Any]:
    return (provider.run(),)


def _gradients(provider: Any, grad_out: Any, out: Any) -> None:
    import torch

    torch.autograd.grad(out, provider.inputs, grad_out)


def _speed(times: Sequence[float]) -> Row:
    quantiles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else list(times) * 9
    return {
        "runs": len(times),
        "median_ms": digits(statistics.median(times)),
        "q20_ms": digits(quantiles[1]),
        "q80_ms": digits(quantiles[7]),
    }


def _share(flops: int, median_ms: float, dtype: str, device: Any) -> Row:
    """TFLOP/s by the closed form, and their share of the card's peak as benchmarks.static.cards has it."""
    from benchmarks.static.cards import CARDS
    from xtg_kernels.triton_launch import architecture

    tflops = flops / (1e9 * median_ms)
    card = CARDS[architecture(device)]
    peak = card.float32_tflops if dtype == "float32" else card.half_tflops
    if not flops:
        return {}
    return {"tflops": digits(tflops)} | ({"share_of_peak": digits(tflops / peak)} if device.type == "cuda" else {})


def _encoder(plan: Plan, lengths: tuple[int, ...], training: bool, device: Any) -> Iterator[Row]:
    """Cells a second of the encoder layers of a preset, forward alone or with the backward, and peak memory."""
    import torch

    from benchmarks.gpu.timing import milliseconds
    from xtg_kernels import use_backend
    from xtrimogene.bench.tasks import NUM_GENES, offsets
    from xtrimogene.config import XTrimoGeneConfig
    from xtrimogene.encoder import RaggedTransformerEncoder
    from xtrimogene.flops import encoder_backward_flops, encoder_flops

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


def _step(plan: Plan, device: Any) -> Iterator[Row]:
    """A step of pre-training: loss over all genes, backward, AdamW."""
    import torch

    from benchmarks.gpu.timing import milliseconds
    from xtg_kernels import use_backend
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


def _reset_memory(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: Any, *, peak: bool = False) -> float:
    """MiB that PyTorch has allocated on the device, now or at most; 0 on a CPU."""
    import torch

    if device.type == "cpu":
        return 0.0
    return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 2**20


def machine(device: str) -> Row:
    """What every row says of where and when it was measured."""
    import torch
    import triton

    from xtrimogene.bench import rows

    here = rows.machine()
    return {
        "machine": torch.cuda.get_device_name() if device != "cpu" else f"rehearsal on {here['machine']}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        **{name: here[name] for name in ("commit", "dirty", "date")},
    }


def go(plan: Plan, device: str, folder: Path, here: Row, minutes: float | None) -> int:
    """Does what is not done yet, writing after every item; returns how many items are left for lack of time."""
    from benchmarks.gpu.tune import read_tables
    from xtg_kernels.triton_launch import overriding
    from xtrimogene.bench.rows import read_rows, write_csv

    path = folder / "gpu.csv"
    rows: list[Row] = list(read_rows(path)) if path.is_file() else []
    for row in rows:
        other = [f"{name} {row[name]}" for name in ("machine", "commit", "dirty") if row[name] != str(here[name])]
        if other:
            raise ValueError(f"{path} was made elsewhere ({', '.join(other)}): choose another --out, or --fresh")
    done = {row["item"] for row in rows}
    started, left = time.monotonic(), 0
    for item in items(plan, device, folder):
        if item.name in done:
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            left += 1
            continue
        print(item.name, end=" ", flush=True)
        clock = time.monotonic()
        tuned = {op.name: read_tables(op.name, op.parent) for op in sorted((folder / "configs").glob("*"))}
        try:
            with overriding(tables=tuned):
                made = list(item.rows())
        except Exception as error:
            # One failure must not keep the rest from being known.
            made = [{"correct": False, "note": f"{type(error).__name__}: {error}".splitlines()[0][:300]}]
        print(f"({time.monotonic() - clock:.1f} s)", *(f"WRONG: {row}" for row in made if _wrong(row)), flush=True)
        rows += [{"item": item.name, **row, **here} for row in made]
        waiting = path.with_suffix(".tmp")
        write_csv(waiting, rows)
        waiting.replace(path)
    return left


def _wrong(row: Row) -> bool:
    return str(row.get("correct", "True")) == "False"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; 1 when anything was wrong, 3 when time ran out first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and runs: ten minutes at most")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal with tiny shapes")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: build/gpu, in a rehearsal build/rehearsal")
    parser.add_argument("--fresh", action="store_true", help="start over")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        # Read when a kernel is decorated, so it has to be there from the start.
        command = [sys.executable, "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.call(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU found by this torch; --device cpu rehearses")
    folder = options.out or ROOT / "build" / ("gpu" if options.device == "cuda" else "rehearsal")
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    here = machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in here.items()), flush=True)
    minutes = QUICK_MINUTES if options.quick and options.device == "cuda" else None
    try:
        left = go(plan_of(options.device, options.quick), options.device, folder, here, minutes)
    except ValueError as error:
        parser.error(str(error))
    from benchmarks.gpu import report as gpu_report
    from xtrimogene.bench.rows import read_rows

    rows = read_rows(folder / "gpu.csv")
    gpu_report.write(rows, folder)
    print(
        f"{folder / 'gpu.csv'}, gpu.md and gpu.png are written"
        + (f"; {left} items are left: run again" if left else "")
    )
    return 1 if any(_wrong(row) for row in rows) else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
