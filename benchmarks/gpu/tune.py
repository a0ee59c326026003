"""Chooses launch configs on the GPU at hand: python -m benchmarks.gpu.tune [OP ...] [--quick] [--out FOLDER]

Times the candidates of benchmarks.static.launches, kernel by kernel on real cell lengths, and writes the fastest for
the card's architecture to ``FOLDER/<op>/configs.json`` (default: the package itself). A candidate that cannot be
launched, or whose results are not those of the config in use, is left out. Configs of other architectures stay as they
are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import milliseconds
from benchmarks.static.configs import DTYPES, OPS_FOLDER, config_text
from benchmarks.static.launches import OPS
from xtg_kernels.triton_launch import architecture, overriding
from xtrimogene.bench.tasks import Lengths, real_lengths

Row = dict[str, Any]
# How far two tilings of one sum may be apart: ||a - b|| / ||b||.
_SAME = {"half": 2e-2, "float32": 1e-4}


@dataclass(frozen=True)
class Plan:
    """What is tuned: batch, widths ("all", "usual" or "smallest"), precisions, most candidates of a kernel, and for how
    many seconds each."""

    lengths: Lengths
    widths: str
    precisions: tuple[str, ...]
    candidates: int
    seconds: float


FULL = Plan(real_lengths(64), "all", ("half", "float32"), 99, 0.2)
QUICK = Plan(real_lengths(32), "usual", ("half",), 99, 0.05)


def tune(op: str, device: torch.device, plan: Plan, tables: dict[str, Any]) -> Iterator[Row]:
    """A row for every candidate with its time; ``tables``, a copy of the op's configs.json, takes the fastest."""
    spec, here = OPS[op], architecture(device)
    for precision in plan.precisions:
        dtype = getattr(torch, DTYPES[precision]) if device.type == "cuda" else torch.float32
        for width in {"all": [*spec.sizes], "usual": [spec.usual], "smallest": [min(spec.sizes)]}[plan.widths]:
            calls = spec.calls(dtype, spec.sizes[width], plan.lengths, device)
            for kernel, known in spec.kernels.items():
                candidates = known.candidates(precision, width)[: plan.candidates]
                if len(candidates) == 1:
                    continue
                where = {"op": op, "kernel": kernel, "architecture": here, "precision": precision, "width": width}
                # All else runs with the configs chosen so far.
                with overriding(tables={op: tables}):
                    calls["forward"]()
                    call = calls[known.direction]
                    expected = _tensors(call())
                    rows: list[Row] = [
                        {
                            **where,
                            **_time_candidate((op, kernel), call, expected, config, device, plan, _SAME[precision]),
                        }
                        for config in candidates
                    ]
                good = [(row["median_ms"], number) for number, row in enumerate(rows) if row["correct"]]
                if good:
                    best = min(good)[1]
                    tables[here][kernel][precision][str(width)] = candidates[best]
                    rows[best]["chosen"] = True
                yield from rows


def _time_candidate(
    kernel: tuple[str, str],
    call: Callable[[], Any],
    expected: Sequence[Tensor],
    config: dict[str, int],
    device: torch.device,
    plan: Plan,
    same: float,
) -> Row:
    """One candidate of an op's kernel in the call that launches it, and whether its results are those expected."""
    row: Row = {"config": " ".join(f"{name}={value}" for name, value in config.items()), "chosen": False}
    with overriding(configs={kernel: config}):
        try:
            got = _tensors(call())
            row["error"] = max(_difference(a, b) for a, b in zip(got, expected, strict=True))
            row["correct"] = row["error"] <= same
            if row["correct"]:
                times = milliseconds(call, device, seconds=plan.seconds, least=3 if plan.seconds else 1)
                row["median_ms"] = statistics.median(times)
        except Exception as refused:
            # Too much shared memory, too many registers: the launcher says which.
            row |= {"correct": False, "refused": f"{type(refused).__name__}: {refused}".splitlines()[0]}
    return row


def _tensors(results: Any) -> list[Tensor]:
    return [x.detach() for x in results if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30))


def read_tables(op: str, folder: Path = OPS_FOLDER) -> dict[str, Any]:
    """The contents of FOLDER/<op>/configs.json."""
    return json.loads((folder / op / "configs.json").read_text(encoding="utf-8"))


def write_tables(op: str, tables: dict[str, Any], folder: Path) -> None:
    """FOLDER/<op>/configs.json."""
    path = folder / op / "configs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config_text(tables), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Tunes the ops given, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tune", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"some of {', '.join(OPS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="the 100m model's sizes in half precision, shorter runs")
    parser.add_argument("--out", type=Path, default=OPS_FOLDER, metavar="FOLDER", help="default: the package")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"OP: expected some of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("no GPU found: tuning times kernels on one (python -m benchmarks.static.configs needs none)")
    for op in options.ops or OPS:
        tables = read_tables(op)
        for row in tune(op, torch.device("cuda"), QUICK if options.quick else FULL, tables):
            print("  ".join(str(value) for value in row.values()), flush=True)
        write_tables(op, tables, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
