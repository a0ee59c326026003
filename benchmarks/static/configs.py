"""Chooses launch configs of the Triton kernels without a GPU: python -m benchmarks.static.configs [--table] [OP ...]

For every architecture, kernel, precision and width the candidates of benchmarks.static.launches are compiled. Those
that spill, do not fit, or leave the tensor cores are dropped; of the rest the static model's best on real cell lengths
goes to ``ops/<op>/configs.json``, and what the compiler made of it to ``benchmarks/results/triton_static.csv``, with
which the tests compare. Where two candidates are too close for the model, the first in the list stays.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.static.aot import Case, Report, reports
from benchmarks.static.cards import CARDS
from benchmarks.static.launches import OPS
from benchmarks.static.model import Shape, microseconds
from xtg_kernels.triton_launch import ARCHITECTURES, Config
from xtrimogene.bench.rows import write_csv
from xtrimogene.bench.tasks import real_lengths

TABLE = RESULTS / "triton_static.csv"
OPS_FOLDER = Path(__file__).parents[2] / "xtg_kernels" / "ops"
DTYPES = {"half": "bfloat16", "float32": "float32"}
# Whose candidates are all compiled. The others take the order that these give, and the first candidate that is good
# for themselves: sm_89 has the tensor cores of sm_80, and float32 code is much the same on all cards of one maker.
_BORROWED = {
    "half": {"default": "sm_80", "gfx950": "gfx942"},
    "float32": {"sm_90": "sm_80", "sm_100": "sm_80", "default": "sm_80", "gfx950": "gfx942"},
}
# The instructions that an architecture brought: what runs on older ones is left to kernels that have no better.
_NATIVE = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
_CLOSE = 1.03
Key = tuple[str, str, str, str, int]  # op, kernel, architecture, precision, width


def keys(ops: Iterable[str]) -> list[Key]:
    """All entries of the configs of these ops."""
    return [
        (op, kernel, architecture, precision, width)
        for op in ops
        for architecture in ARCHITECTURES
        for kernel in OPS[op].kernels
        for precision in DTYPES
        for width in OPS[op].sizes
    ]


def case_of(key: Key, config: Config | None = None) -> Case:
    """What is compiled for one entry; without a config, what configs.json says."""
    op, kernel, architecture, precision, width = key
    chosen = None if config is None else tuple(config.items())
    return Case(op, kernel, architecture, DTYPES[precision], width, OPS[op].sizes[width], chosen)


def shape_of(key: Key) -> Shape:
    """The batch by which candidates are ranked: real cells, enough for several waves of programs."""
    _, _, architecture, precision, width = key
    return Shape(real_lengths(24), width, 2 if precision == "half" else 4, CARDS[architecture])


def faults(report: Report) -> list[str]:
    """Why a compiled kernel must not be shipped; empty where it may."""
    if "error" in report:
        return [report["error"]]
    kernel = OPS[report["op"]].kernels[report["kernel"]]
    found = [f"{name} {report[name]}" for name in ("stack", "spills", "atomics") if report[name]]
    if report["resident_programs"] < 1:
        found.append(
            f"does not fit a processor: {report['shared']} bytes of shared memory, {report['registers']} registers"
        )
    if kernel.has_dot and report["dtype"] != "float32":
        if report["fma_dots"]:
            found.append(f"{report['fma_dots']} products without tensor cores")
        if not report["hot_loop_tensor_core"]:
            found.append("no tensor-core instruction in the hot loop")
    return found


def shortfalls(report: Report) -> list[str]:
    """What the card could do and a compiled kernel of half precision does not: it runs, and could run better."""
    if "error" in report or report["dtype"] == "float32":
        return []
    kernel, found = OPS[report["op"]].kernels[report["kernel"]], []
    native = _NATIVE.get(report["architecture"], "")
    if kernel.has_dot and native not in report["tensor_core_opcodes"]:
        found.append(f"{report['tensor_core_opcodes']} in place of {native}")
    if kernel.has_dot and CARDS[report["architecture"]].target[0] == "cuda" and not report["async_copies"]:
        found.append("no asynchronous copies")
    if kernel.has_rows and not report["hot_loop_wide_loads"]:
        found.append("no loads of 16 bytes in the hot loop")
    return found


def order(key: Key, candidates: Sequence[Config], found: Sequence[Sequence[Report]]) -> list[int]:
    """Numbers of the candidates, the best first: good ones before faulty ones, then by what falls short, then by the
    static model.

    found: the reports of each candidate, one for each set of flags.
    """

    def rank(number: int) -> tuple[bool, int, float]:
        variants = found[number]
        if any(faults(report) for report in variants):
            return True, 0, 0.0
        return (
            False,
            sum(len(shortfalls(report)) for report in variants),
            max(model_microseconds(key, candidates[number], report) for report in variants),
        )

    ranks = [rank(number) for number in range(len(candidates))]
    best = min(ranks)
    close = next(n for n, r in enumerate(ranks) if r[:2] == best[:2] and r[2] <= _CLOSE * best[2])
    return [close, *(n for n in sorted(range(len(ranks)), key=ranks.__getitem__) if n != close)]


def model_microseconds(key: Key, config: Config, report: Report) -> float:
    """The static model's time; 0 where there is no model."""
    work, shape = OPS[key[0]].kernels[key[1]].work, shape_of(key)
    return 0.0 if work is None else microseconds(work(config, shape), shape, config, report["resident_programs"])


def choose(wanted: Sequence[Key]) -> dict[Key, Config]:
    """The config of every entry.

    Raises:
        RuntimeError: entries none of whose candidates is good.
    """
    candidates = {key: OPS[key[0]].kernels[key[1]].candidates(key[3], key[4]) for key in wanted}
    lender = {key: (*key[:2], _BORROWED[key[3]].get(key[2], key[2]), *key[3:]) for key in wanted}
    full = list(dict.fromkeys(lender.values()))
    compiled = iter(_compile([case_of(key, config) for key in full for config in candidates[key]]))
    orders = {key: order(key, candidates[key], [next(compiled) for _ in candidates[key]]) for key in full}
    chosen: dict[Key, Config] = {}
    pending = {key: list(orders[lender[key]]) for key in wanted}
    hopeless = []
    while pending:
        trial = {key: candidates[key][left.pop(0)] for key, left in pending.items()}
        # Compiled a moment ago for those who lend: the cache has them.
        for (key, config), variants in zip(
            trial.items(), _compile([case_of(*item) for item in trial.items()]), strict=True
        ):
            if not any(faults(report) for report in variants):
                chosen[key] = config
                del pending[key]
            elif not pending[key]:
                why = dict.fromkeys(fault for report in variants for fault in faults(report))
                hopeless.append(f"{' '.join(map(str, key))}: {'; '.join(why)}")
                del pending[key]
    if hopeless:
        raise RuntimeError("no candidate is good, the last of each:\n" + "\n".join(hopeless))
    return {key: chosen[key] for key in wanted}


def _compile(cases: Sequence[Case]) -> list[list[Report]]:
    def progress(done: int) -> None:
        print(f"\r{done} of {len(cases)} compiled", end="\n" if done == len(cases) else "", file=sys.stderr, flush=True)

    return reports(cases, progress=progress)


def write_configs(chosen: dict[Key, Config]) -> None:
    """Rewrites configs.json of the ops of these entries."""
    for op in dict.fromkeys(key[0] for key in chosen):
        tree: dict[str, Any] = {}
        for (_, kernel, architecture, precision, width), config in ((k, c) for k, c in chosen.items() if k[0] == op):
            kinds = tree.setdefault(architecture, {}).setdefault(kernel, {})
            kinds.setdefault(precision, {})[str(width)] = config
        (OPS_FOLDER / op / "configs.json").write_text(config_text(tree), encoding="utf-8")


def config_text(tables: dict[str, Any]) -> str:
    """The text of a configs.json, one config a line."""
    return _json(tables, 0) + "\n"


def _json(tree: dict[str, Any], depth: int) -> str:
    if depth == 4:
        return json.dumps(tree)
    inner = "  " * (depth + 1)
    body = ",\n".join(f"{inner}{json.dumps(name)}: {_json(value, depth + 1)}" for name, value in tree.items())
    return "{\n" + body + "\n" + "  " * depth + "}"


def source_hash() -> str:
    """Of the code that all kernels are compiled from; one for all, since ops share functions."""
    files = [*sorted(OPS_FOLDER.glob("*/triton_kernel.py")), OPS_FOLDER.parent / "triton_launch.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def table_rows(ops: Iterable[str]) -> list[Report]:
    """What the compiler makes of every config that is shipped, with the static model's time in microseconds."""
    import triton

    wanted = keys(ops)
    rows = []
    for key, variants in zip(wanted, _compile([case_of(key) for key in wanted]), strict=True):
        for report in variants:
            config = {name: int(value) for name, value in (pair.split("=") for pair in report["config"].split())}
            time = "" if "error" in report else f"{model_microseconds(key, config, report):.4g}"
            rows.append({**report, "model_microseconds": time, "triton": triton.__version__, "source": source_hash()})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Chooses and writes the configs (unless --table), then the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.configs", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to choose configs for (default: all)")
    parser.add_argument("--table", action="store_true", help="keep the configs, write only the table of all ops")
    options = parser.parse_args(arguments)
    unknown = set(options.ops) - set(OPS)
    if unknown:
        parser.error(f"OP: expected some of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    if not options.table:
        write_configs(choose(keys(options.ops or OPS)))
    rows = table_rows(OPS)
    write_csv(TABLE, rows)
    bad = [(row, why) for row in rows if (why := faults(row) + shortfalls(row))]
    for row, why in bad:
        names = ("op", "kernel", "architecture", "dtype", "width", "flags", "config")
        where = " ".join(str(row[name]) for name in names)
        print(f"{where}: {'; '.join(why)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
