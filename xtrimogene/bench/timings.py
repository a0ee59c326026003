"""Times of `xtrimogene bench`: encoder layers, full-length models and scaling series.

Every function yields rows of a CSV file. Providers of a case take turns in one process, and each is checked against
float64, output and gradients, before it gets a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from xtrimogene.bench.baselines import FULL_LENGTH
from xtrimogene.bench.cases import encoder_task, full_length_task
from xtrimogene.bench.cells import Cells
from xtrimogene.bench.measured import digits
from xtrimogene.bench.rows import Row
from xtrimogene.bench.runner import check, task_rows
from xtrimogene.bench.sizes import Size, measured_lengths, shorter, with_rates
from xtrimogene.bench.tasks import BACKWARD, BOTH, DTYPES, Lengths, Task
from xtrimogene.network.config import XTrimoGeneConfig


def encoder(presets: Sequence[str], cells: Cells, size: Size, device: str) -> Iterator[Row]:
    """The layers of every preset on real cells: ours, packed plain PyTorch, and padded where there is padding."""
    for preset, dtype in itertools.product(presets, DTYPES):
        lengths = measured_lengths(cells, preset, size)
        # float64 and more orders of summation cost more than what is measured.
        task = encoder_task(preset, lengths, dtype, check_cells=1, orders=(2,), device=device)
        task = dataclasses.replace(task, case=f"{task.case}{shorter(size)}")
        for row in task_rows(task, 0, rounds_at_least=2 if preset == "100m" else size.rounds):
            yield with_rates(row) | {"preset": preset}


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
            yield with_rates(row) | common
            if row["correct"]:
                direction = row["direction"]
                scaled[direction] = row["median_ms"] * whole.flops[direction] / one.flops[direction]
        if not scaled:
            continue
        if scaled[BOTH] <= 1e3 * size.full_seconds:
            for row in task_rows(whole, 0, checked=checked, rounds_at_least=2):
                if row["direction"] != BACKWARD:
                    yield with_rates(row) | common | {"scaled_ms": digits(scaled[row["direction"]])}
            continue
        for direction, milliseconds in scaled.items():
            row = {
                "benchmark": "dense", "case": whole.case, "cells": 1, "tokens": genes, "dtype": dtype,
                "direction": direction, "provider": model, "correct": True, "median_ms": digits(milliseconds),
                "extrapolated": True,
            }  # fmt: skip
            yield with_rates(row) | common


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
                yield with_rates(row) | {"preset": preset, "x": x, "checked_layers": layers}


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
