"""One run over all that is done on a GPU: what is there already is kept, and written anew after every item."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import triton

from benchmarks.gpu import tune, work
from xtg_kernels.triton_launch import overriding
from xtrimogene.bench import rows as bench_rows
from xtrimogene.bench.rows import Row, read_rows, write_csv


def machine(device: str) -> Row:
    """What every row says of where and when it was measured."""
    here = bench_rows.machine()
    return {
        "machine": torch.cuda.get_device_name() if device != "cpu" else f"rehearsal on {here['machine']}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        **{name: here[name] for name in ("commit", "dirty", "date")},
    }


def go(plan: work.Plan, device: str, folder: Path, here: Row, minutes: float | None) -> int:
    """Does what is not done yet, writing after every item; returns how many items are left for lack of time."""
    path = folder / "gpu.csv"
    rows: list[Row] = list(read_rows(path)) if path.is_file() else []
    for row in rows:
        other = [f"{name} {row[name]}" for name in ("machine", "commit", "dirty") if row[name] != str(here[name])]
        if other:
            raise ValueError(f"{path} was made elsewhere ({', '.join(other)}): choose another --out, or --fresh")
    done = {row["item"] for row in rows}
    started, left = time.monotonic(), 0
    for item in work.items(plan, device, folder):
        if item.name in done:
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            left += 1
            continue
        print(item.name, end=" ", flush=True)
        clock = time.monotonic()
        tuned = {op.name: tune.read_tables(op.name, op.parent) for op in sorted((folder / "configs").glob("*"))}
        try:
            with overriding(tables=tuned):
                made = list(item.rows())
        except Exception as error:
            # One failure must not keep the rest from being known.
            made = [{"correct": False, "note": f"{type(error).__name__}: {error}".splitlines()[0][:300]}]
        print(f"({time.monotonic() - clock:.1f} s)", *(f"WRONG: {row}" for row in made if wrong(row)), flush=True)
        rows += [{"item": item.name, **row, **here} for row in made]
        waiting = path.with_suffix(".tmp")
        write_csv(waiting, rows)
        waiting.replace(path)
    return left


def wrong(row: Row) -> bool:
    """Whether a row says that something was not right."""
    return str(row.get("correct", "True")) == "False"
