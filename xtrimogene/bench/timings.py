"""What `xtrimogene bench` measures: encoder, full-length models, scaling, drop-in, pre-training step; time and memory.

Every function yields rows of a CSV file. Providers of a case take turns in one process, and each is checked against
float64, output and gradients, before it gets a time.
Peak memory is that of a process of its own, above its weights and input: python -m xtrimogene.bench.timings JSON
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xtrimogene.bench import baselines
from xtrimogene.bench.baselines import FULL_LENGTH
from xtrimogene.bench.cases import encoder_task, full_length_task
from xtrimogene.bench.cells import Cells
from xtrimogene.bench.counting import AUTO_ENCODERS, counts_of
from xtrimogene.bench.measured import digits, status_mib
from xtrimogene.bench.plain import used_slots
from xtrimogene.bench.pretraining import error_columns, exact_step, mean_loss, step_errors, step_is_right
from xtrimogene.bench.rows import Row
from xtrimogene.bench.runner import check, task_rows
from xtrimogene.bench.tasks import BACKWARD, BOTH, DTYPES, FORWARD, Lengths, Provider, Task, offsets
from xtrimogene.config import XTrimoGeneConfig
from xtrimogene.dropin import ragged_encoder
from xtrimogene.flops import encoder_flops, step_flops
from xtrimogene.masking import MaskedBatch, MaskingConfig, mask_cells
from xtrimogene.model import XTrimoGene
from xtrimogene.vocabulary import Vocabulary


@dataclass(frozen=True)
class Size:
    """How large the measured work is.

    cells           most cells of a batch
    shorter         every measured cell has this many times fewer genes than the real one
    task_gflop      most forward GFLOP of a batch, unless one cell has more
    full_seconds    longest run of a full-length model (forward and backward); beyond, one of its layers is run
    expressed       expressed genes of the scaling series
    rounds          runs of each that count, at least
    step_gflop      most GFLOP of a pre-training step
    exact_gflop     most GFLOP of a check of long cells against float64, see check_layers
    """

    cells: int
    shorter: int
    task_gflop: float
    full_seconds: float
    expressed: tuple[int, ...]
    rounds: int
    step_gflop: float
    exact_gflop: float


FULL = Size(4, 1, 100.0, 30.0, (200, 500, 1000, 2000, 4000, 8000, 15000), 3, 4e3, 400.0)
QUICK = Size(4, 8, 20.0, 1.0, (100, 250, 500, 1000), 2, 300.0, 20.0)


def measured_lengths(cells: Cells, preset: str, size: Size) -> Lengths:
    """Lengths of the cells that are measured with a preset: as many of the shuffled ones as the size allows."""
    config = XTrimoGeneConfig.preset(preset, num_genes=cells.num_genes)
    lengths = [max(1, int(cells.lengths[i]) // size.shorter) for i in cells.shuffled()[: size.cells]]
    return tuple(_within(lengths, lambda n: encoder_flops(config, [n]).total, size.task_gflop))


def _within(lengths: Sequence[int], flops: Callable[[int], int], gflop: float) -> list[int]:
    sums = itertools.accumulate(flops(length) for length in lengths)
    return [n for i, (n, total) in enumerate(zip(lengths, sums, strict=True)) if i == 0 or total <= 1e9 * gflop]


def encoder(presets: Sequence[str], cells: Cells, size: Size, device: str) -> Iterator[Row]:
    """The layers of every preset on real cells: ours, packed plain PyTorch, and padded where there is padding."""
    for preset, dtype in itertools.product(presets, DTYPES):
        lengths = measured_lengths(cells, preset, size)
        # float64 and more orders of summation cost more than what is measured.
        task = encoder_task(preset, lengths, dtype, check_cells=1, orders=(2,), device=device)
        task = dataclasses.replace(task, case=f"{task.case}{_shorter(size)}")
        for row in task_rows(task, 0, rounds_at_least=2 if preset == "100m" else size.rounds):
            yield _with_rates(row) | {"preset": preset}


def full_length(presets: Sequence[str], cells: Cells, size: Size, device: str) -> Iterator[Row]:
    """The models of baselines.FULL_LENGTH on one cell, every gene a token.

    First with one layer (of encoder and decoder each), benchmark "dense layer", then with all, "dense", where that is
    expected to take size.full_seconds at most. Elsewhere the row of all layers has `extrapolated`, and the time of
    one layer by the FLOPs of all: layers are alike, and all genes are there. Where both were run, `scaled_ms` says
    what this would have given.
    """
    genes = max(1, cells.num_genes // size.shorter)
    for preset, model, dtype in itertools.product(presets, FULL_LENGTH, DTYPES):
        make = functools.partial(full_length_task, model, preset, genes, dtype, device=device)
        whole, checked, layers = check_layers(make, preset, size)
        common = {"preset": preset, "checked_layers": layers}
        one = dataclasses.replace(make(layers=1), benchmark="dense layer")
        scaled: dict[str, float] = {}
        for row in task_rows(one, 0, checked=checked, rounds_at_least=2):
            if row["direction"] == BACKWARD:
                continue
            yield _with_rates(row) | common
            if row["correct"]:
                direction = row["direction"]
                scaled[direction] = row["median_ms"] * whole.flops[direction] / one.flops[direction]
        if not scaled:
            continue
        if scaled[BOTH] <= 1e3 * size.full_seconds:
            for row in task_rows(whole, 0, checked=checked, rounds_at_least=2):
                if row["direction"] != BACKWARD:
                    yield _with_rates(row) | common | {"scaled_ms": digits(scaled[row["direction"]])}
            continue
        for direction, milliseconds in scaled.items():
            row = {
                "benchmark": "dense", "case": whole.case, "cells": 1, "tokens": genes, "dtype": dtype,
                "direction": direction, "provider": model, "correct": True, "median_ms": digits(milliseconds),
                "extrapolated": True,
            }  # fmt: skip
            yield _with_rates(row) | common


def check_layers(
    make: Callable[..., Task], preset: str, size: Size
) -> tuple[Task, dict[str, dict[str, tuple[float, float]]], int]:
    """The task that make() gives, its errors and limits against float64, and the number of layers that were checked.

    make(layers=k) gives the task with k layers. As many are checked as size.exact_gflop allows, one at least: a row
    needs all rows of the layer below, so on a long cell fewer layers bound the work, and fewer rows do not.
    """
    task, layers = make(), XTrimoGeneConfig.preset(preset, num_genes=1).num_layers
    number = min(layers, max(1, int(1e9 * size.exact_gflop * layers / task.flops[BOTH])))
    return task, check(task if number == layers else make(layers=number)), number


def _series(
    benchmark: str, preset: str, points: Sequence[tuple[str, float, Lengths]], dtype: str, size: Size, device: str,
    skipped: Callable[[str, Lengths], bool] = lambda provider, lengths: False,
) -> Iterator[Row]:  # fmt: skip
    """Rows of a scaling series: (case, x, lengths) of each point; skipped providers are not timed."""
    for case, x, lengths in points:
        make = functools.partial(encoder_task, preset, lengths, dtype, check_cells=1, orders=(2,), device=device)
        task, checked, layers = check_layers(make, preset, size)
        kept = {name: p for name, p in task.providers.items() if not skipped(name, lengths)}
        task = dataclasses.replace(task, benchmark=benchmark, case=case, providers=kept)
        checked = {name: checked[name] for name in kept}
        # A point of a series needs no more runs than show that it is not an outlier.
        for row in task_rows(task, 0, checked=checked, rounds_at_least=2):
            if row["direction"] != BACKWARD:
                yield _with_rates(row) | {"preset": preset, "x": x, "checked_layers": layers}


def by_length(preset: str, size: Size, device: str) -> Iterator[Row]:
    """Cost against expressed genes: batches of equal cells of about the same number of tokens."""
    tokens = 4096 // size.shorter
    points = [
        (f"{preset}, {n:,} genes", n, (n,) * max(1, tokens // n))
        for n in size.expressed
    ]  # fmt: skip
    # Equal cells have no padding, and plain PyTorch on the longest ones says nothing new.
    for dtype in DTYPES:
        yield from _series(
            "length", preset, points, dtype, size, device,
            lambda provider, lengths: provider == "padded" or (provider == "plain" and sum(lengths) > 4096),
        )  # fmt: skip


def by_unevenness(preset: str, size: Size, device: str) -> Iterator[Row]:
    """Cost against unevenness: 16 cells of 8,000 genes in all, one of them up to eight times as long as the mean."""
    mean, count = 500 // size.shorter, 16
    points = []
    for ratio in (1, 2, 4, 8):
        longest = ratio * mean
        rest = (count * mean - longest) // (count - 1)
        points.append((f"{preset}, longest {ratio} x mean", ratio, (longest, *[rest] * (count - 1))))
    yield from _series("unevenness", preset, points, "float32", size, device)


def by_threads(preset: str, cells: Cells, size: Size) -> Iterator[Row]:
    """Cost against CPU threads: 1, 2, 4 ... all, the same cells."""
    lengths, every = measured_lengths(cells, preset, size), torch.get_num_threads()
    numbers = sorted({*(1 << k for k in range(every.bit_length()) if 1 << k <= every), every})
    try:
        for number, dtype in itertools.product(numbers, DTYPES):
            torch.set_num_threads(number)
            case = f"{preset}, {number} thread{'s' * (number > 1)}"
            points = [(case, number, lengths)]
            yield from _series(
                "threads", preset, points, dtype, size, "cpu", lambda provider, lengths: provider == "padded"
            )
    finally:
        torch.set_num_threads(every)


def dropin(cells: Cells, size: Size, device: str) -> Iterator[Row]:
    """Encoders as other single-cell models have them, with their own weights: padded, one by one, and ragged."""
    for (name, make, dim, layers, ffn, longest), dtype in itertools.product(_others(), DTYPES):

        def flops(n: int, dim: int = dim, layers: int = layers, ffn: int = ffn) -> int:
            return layers * ((8 * dim + 4 * ffn) * dim * n + 4 * dim * n * n)

        lengths = [min(longest, max(1, int(cells.lengths[i]) // size.shorter)) for i in cells.shuffled()[: size.cells]]
        # Two cells at least: one has nothing to pad.
        chosen = lengths[: max(2, len(_within(lengths, flops, size.task_gflop)))]
        task = _dropin_task(name, make, dim, tuple(chosen), dtype, device)
        forward = sum(map(flops, chosen))
        backward = sum(layers * (2 * (8 * dim + 4 * ffn) * dim * n + 10 * dim * n * n) for n in chosen)
        task = dataclasses.replace(
            task, flops={FORWARD: forward, BACKWARD: backward, BOTH: forward + backward},
            case=f"{task.case}{_shorter(size)}",
        )  # fmt: skip
        for row in task_rows(task, 0, rounds_at_least=size.rounds):
            yield _with_rates(row)


def _others() -> list[tuple[str, Callable[[], nn.Module], int, int, int, int]]:
    """Name, module, width, layers, feed-forward width and longest input of encoders of published sizes."""

    def transformer() -> nn.Module:
        layer = nn.TransformerEncoderLayer(512, 8, 512, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)

    found: list[tuple[str, Callable[[], nn.Module], int, int, int, int]] = [
        ("nn.TransformerEncoder, size of scGPT", transformer, 512, 12, 512, 1200)
    ]
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        return found

    def bert() -> nn.Module:
        return BertModel(
            BertConfig(
                hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, hidden_act="relu",
                max_position_embeddings=2048, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        ).encoder  # fmt: skip

    return [("BERT, size of Geneformer", bert, 256, 6, 512, 2048), *found]


def _dropin_task(name: str, make: Callable[[], nn.Module], dim: int, lengths: Lengths, dtype: str, device: str) -> Task:
    torch.manual_seed(0)
    module = make().to(device, DTYPES[dtype]).eval()
    ragged = ragged_encoder(module)
    x = torch.randn(sum(lengths), dim).to(device, DTYPES[dtype]).requires_grad_()
    grad_out = torch.randn(x.shape).to(device, DTYPES[dtype])
    # The bias of the keys shifts all scores of a query alike: its gradient is zero but for rounding, which is no number
    # to compare.
    judged = [not name.endswith("key.bias") for name, _ in ragged.named_parameters()]
    inputs = (x, *itertools.compress(ragged.parameters(), judged))
    cu_seqlens, longest = offsets(lengths).to(device), max(lengths)

    def one_by_one(encoder: nn.Module, rows: Tensor, cells: Lengths) -> Tensor:
        return torch.cat([_padded(encoder, cell, (len(cell),)) for cell in rows.split(list(cells))])

    def exact() -> tuple[Tensor, list[Tensor]]:
        exactly = copy.deepcopy(module).double()
        checked = lengths[:1]
        rows = x[: sum(checked)].detach().double().requires_grad_()
        out = one_by_one(exactly, rows, checked)
        leaves = (rows, *itertools.compress(ragged_encoder(exactly).parameters(), judged))
        return out.detach(), list(torch.autograd.grad(out, leaves, grad_out[: sum(checked)].double()))

    providers = {
        "plain": Provider(lambda: one_by_one(module, x, lengths), inputs),
        "padded": Provider(lambda: _padded(module, x, lengths), inputs),
        "xtg": Provider(lambda: ragged(x, cu_seqlens, longest), inputs),
    }
    case = f"{name}, {len(lengths)} cells"
    return Task("drop-in", case, lengths, dtype, providers, grad_out, exact, lengths[0], {})


def _padded(module: Any, x: Tensor, lengths: Lengths) -> Tensor:
    """(total_nnz, dim): the original module on the batch padded to its longest cell, with its mask if it needs one."""
    if isinstance(module, nn.TransformerEncoder):
        if len(lengths) == 1:
            return baselines.encoder_dense(module, x)
        return baselines.encoder_padded(module, x, lengths, max(lengths))
    rows = nn.utils.rnn.pad_sequence(x.split(list(lengths)), batch_first=True)
    if len(lengths) == 1:
        return module(rows).last_hidden_state[0]
    used = used_slots(lengths, max(lengths), x.device)
    # True where a key may be seen: what transformers makes of an attention mask for its fused attention.
    mask = used[:, None, None].expand(-1, 1, max(lengths), -1)
    return module(rows, attention_mask=mask).last_hidden_state[used]


def step(presets: Sequence[str], cells: Cells, size: Size, device: str) -> Iterator[Row]:
    """A pre-training step of the whole auto-encoder: forward, backward and AdamW, on masked real cells.

    Ours, and the network as it is written down with the same weights, which take turns. Before, the loss of the first
    cell is checked against the model in float64 on the reference backend, and its gradient where size.exact_gflop
    allows a whole step in float64.
    """
    vocabulary = Vocabulary(f"gene{gene}" for gene in range(cells.num_genes))
    for preset in presets:
        config = XTrimoGeneConfig.preset(preset, num_genes=cells.num_genes)
        chosen, masked, flops = _step_cells(config, cells, size)
        if flops[True] > 1e9 * size.step_gflop:
            continue
        model = XTrimoGene.from_preset(preset, vocabulary, dropout=0.0).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        first = mask_cells(cells.batch(chosen[:1]), np.asarray(chosen[:1]), MaskingConfig(), epoch=0,
                           num_genes=cells.num_genes)  # fmt: skip
        whole = _masked_flops(config, first)[True] <= 1e9 * size.exact_gflop
        exact, first = exact_step(model, first.to(device), gradient=whole), first.to(device)
        on_device = masked.to(device)
        ways = {(dtype, name): loss for dtype in DTYPES for name, (loss, _) in AUTO_ENCODERS.items()}
        errors = {(dtype, name): step_errors(model, first, dtype, exact, loss) for (dtype, name), loss in ways.items()}
        right_ways = [way for way in ways if step_is_right(errors[way], way[0])]
        steps = {way: functools.partial(_step, model, on_device, optimizer, way[0], ways[way]) for way in right_ways}
        times = _in_turns(steps, size.rounds if flops[True] < 1e12 else 2, device)
        for dtype, name in ways:
            way, savings = (dtype, name), AUTO_ENCODERS[name][1]
            row: Row = {
                "benchmark": "step", "case": f"{preset}, {len(chosen)} cell{'s' * (len(chosen) > 1)}",
                "cells": len(chosen), "tokens": masked.batch.total_nnz, "dtype": dtype, "direction": "training step",
                "provider": name, "correct": way in steps, "preset": preset, **error_columns(errors[way], dtype),
            }  # fmt: skip
            if way in steps:
                low, median, high = np.quantile(times[way], [0.2, 0.5, 0.8])
                gemm = 2 * 2048**3 / float(np.median(times["gemm", dtype])) / 1e9
                rate = flops[savings] / median / 1e9
                row |= {
                    "runs": len(times[way]), "median_ms": digits(1e3 * median), "q20_ms": digits(1e3 * low),
                    "q80_ms": digits(1e3 * high), "gflops": digits(rate), "gemm_gflops": digits(gemm),
                    "share_of_gemm": digits(rate / gemm),
                }  # fmt: skip
            yield _with_rates(row)


def _step_cells(config: XTrimoGeneConfig, cells: Cells, size: Size) -> tuple[list[int], MaskedBatch, dict[bool, int]]:
    """As many of the shuffled cells as size.step_gflop allows, one at least; their masked batch and its FLOPs."""
    found: tuple[list[int], MaskedBatch, dict[bool, int]] | None = None
    for count in range(1, size.cells + 1):
        chosen = cells.shuffled()[:count]
        masked = mask_cells(
            cells.batch(chosen), np.asarray(chosen), MaskingConfig(), epoch=0, num_genes=cells.num_genes
        )
        flops = _masked_flops(config, masked)
        if found is not None and flops[True] > 1e9 * size.step_gflop / 2:
            break
        found = chosen, masked, flops
    assert found is not None
    return found


def _masked_flops(config: XTrimoGeneConfig, masked: MaskedBatch) -> dict[bool, int]:
    """FLOPs of a step, with the exact savings (True) and without."""
    tokens, distinct, hidden, asked = counts_of(masked)
    return {
        savings: step_flops(config, tokens, distinct=distinct, masked=hidden, asked=asked, savings=savings)
        for savings in (True, False)
    }


def _step(
    model: XTrimoGene,
    masked: MaskedBatch,
    optimizer: torch.optim.Optimizer,
    dtype: str,
    loss: Callable[[XTrimoGene, MaskedBatch], Tensor],
) -> None:
    mean_loss(model, masked, dtype, loss).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _in_turns(
    ways: Mapping[tuple[str, str], Callable[[], object]], rounds: int, device: str
) -> dict[tuple[str, str], list[float]]:
    """(dtype, name) -> seconds; ("gemm", dtype) is the matrix product of runner.measure."""
    times: dict[tuple[str, str], list[float]] = {}
    squares = {dtype: torch.randn(2048, 2048, device=device).to(DTYPES[dtype]) for dtype, _ in ways}
    products = {("gemm", dtype): functools.partial(torch.mm, square, square) for dtype, square in squares.items()}
    every: dict[tuple[str, str], Callable[[], object]] = {**ways, **products}
    for number in range(rounds + 1):
        for name, way in every.items():
            clock = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            # The first round warms caches, allocators and oneDNN's kernels.
            if number:
                times.setdefault(name, []).append(time.perf_counter() - clock)
    return times


def memory(
    presets: Sequence[str],
    cells: Cells,
    size: Size,
    device: str,
    full_length: Mapping[tuple[str, str], float],
    wrong: Collection[tuple[str, str]],
) -> Iterator[Row]:
    """Peak memory of forward and of forward and backward in float32, above weights and input.

    full_length has for each right full-length model, (preset, model), the seconds of a forward and backward over all
    genes. Where these are few it is run, which here takes one run and no check; otherwise a line through an eighth and
    a quarter of the genes says what all take, since fused attention stores no scores. Nothing is said of what is in
    wrong: (preset, provider) whose numbers were not right.
    """
    genes = max(1, cells.num_genes // size.shorter)
    for preset in presets:
        lengths = measured_lengths(cells, preset, size)
        # One cell has no padding, and encoder_task pads no 100m.
        forms = ["xtg"] if len(lengths) == 1 or preset == "100m" else ["xtg", "padded"]
        for form in forms:
            if (preset, form) not in wrong:
                for direction, peak in _memory_of(preset, lengths, form, device).items():
                    yield _memory_row(preset, lengths, form, direction, peak)
        for model in FULL_LENGTH:
            if (preset, model) not in full_length:
                continue
            if full_length[preset, model] <= 4 * size.full_seconds:
                for direction, peak in _memory_of(preset, (genes,), model, device).items():
                    yield _memory_row(preset, (genes,), model, direction, peak)
                continue
            few, many = genes // 8, genes // 4
            below, above = (_memory_of(preset, (n,), model, device) for n in (few, many))
            for direction, peak in above.items():
                slope = (peak - below[direction]) / (many - few)
                row = _memory_row(preset, (genes,), model, direction, peak + slope * (genes - many))
                yield row | {"extrapolated": True, "fit_up_to": many}


def _memory_row(preset: str, lengths: Lengths, provider: str, direction: str, peak: float) -> Row:
    return {
        "benchmark": "peak", "case": f"{preset}, {len(lengths)} cell{'s' * (len(lengths) > 1)}", "cells": len(lengths),
        "tokens": sum(lengths), "dtype": "float32", "direction": direction, "provider": provider, "correct": True,
        "preset": preset, "peak_mib": digits(peak),
    }  # fmt: skip


def _memory_of(preset: str, lengths: Lengths, provider: str, device: str) -> dict[str, float]:
    """Direction -> MiB; nothing where the system does not tell."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return {}
    case = json.dumps([preset, lengths, provider, device])
    # What is freed goes back to the system at once: glibc would keep some of it, and the peak would tell less than
    # what is in use where a run finds such memory, and more where it leaves some.
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "MALLOC_MMAP_THRESHOLD_": str(1 << 16)
    }  # fmt: skip
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "xtrimogene.bench.timings", case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _run_and_tell_memory(preset: str, lengths: list[int], provider: str, device: str) -> None:
    """In a process of its own: one forward, then one forward and backward, and the memory of each at its peak."""
    task = (
        full_length_task(provider, preset, lengths[0], "float32", device=device)
        if provider in FULL_LENGTH
        else encoder_task(preset, tuple(lengths), "float32", orders=(), device=device)
    )
    way = task.providers[provider]
    before = status_mib("VmRSS") if device == "cpu" else torch.cuda.memory_allocated() / 2**20
    peaks = {}
    for direction in (FORWARD, BOTH):
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats()
        if direction == FORWARD:
            with torch.no_grad():
                way.run()
        else:
            torch.autograd.grad(way.run(), way.inputs, task.grad_out)
        peak = status_mib("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
        peaks[direction] = peak - before
    print(json.dumps(peaks))


def _with_rates(row: Row) -> Row:
    """The row with cells and tokens per second, where it has a time."""
    if "median_ms" in row:
        seconds = row["median_ms"] / 1e3
        row |= {
            "cells_per_second": digits(row["cells"] / seconds),
            "tokens_per_second": digits(row["tokens"] / seconds),
        }
    return row


def _shorter(size: Size) -> str:
    return f" / {size.shorter}" if size.shorter > 1 else ""


if __name__ == "__main__":
    _run_and_tell_memory(*json.loads(sys.argv[1]))
