"""Triton kernels compiled ahead of time for GPUs that are not here: no spills, memory in bounds, tensor cores used, and
the figures of the committed table.

Compilation shows what the interpreter cannot (it accepts code that the compiler rejects, and knows no registers); it
says nothing about speed, races or the launcher. ``make test-gpu-static`` (pytest -m gpu_static) compiles the kernels,
with all shipped configs for all architectures, in CI with a seventh of them; with the other tests runs what looks at
the table alone.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import triton

from benchmarks.gpu.tune import read_tables
from benchmarks.static.aot import Case, Report, reports
from benchmarks.static.cards import CARDS
from benchmarks.static.configs import TABLE, case_of, faults, keys, shortfalls, source_hash
from benchmarks.static.launches import OPS
from xtrimogene.bench.rows import read_rows

# One case of each architecture and each op, sizes that are no power of two, and float16.
FAST = [
    Case("ragged_attention", "", "sm_90", "bfloat16", 64),
    Case("ragged_attention", "", "gfx942", "bfloat16", 64),
    Case("ragged_attention", "forward", "sm_80", "float16", 64, size=40),
    Case("ragged_attention", "forward", "gfx950", "bfloat16", 128),
    Case("ragged_attention", "forward", "sm_80", "float32", 64),
    Case("expression_embedding", "", "sm_90", "bfloat16", 128, size=100),
    Case("expression_embedding", "forward", "gfx942", "float32", 128, size=100),
    Case("favor_attention", "", "sm_90", "bfloat16", 64),
    Case("masked_decoder_gather", "", "sm_90", "bfloat16", 256, size=512),
    Case("masked_decoder_gather", "", "gfx942", "float16", 64, size=40),
    Case("masked_decoder_gather", "forward", "sm_80", "float32", 256, size=192),
    Case("dropout", "", "sm_90", "bfloat16", 128),
    Case("dropout", "", "gfx942", "float32", 128, size=40),
    Case("masked_head", "", "sm_80", "bfloat16", 512),
    Case("masked_head", "", "gfx942", "float32", 512, size=192),
    Case("masked_head", "backward", "sm_90", "bfloat16", 4096),
]
# "default" serves consumer cards with the code of sm_80; it is compiled when the table is made.
SHIPPED = [case_of(key) for key in keys(OPS) if key[2] != "default"]
# XTG_GPU_STATIC_PART=2/7 takes every seventh of them, from the second on.
PART, PARTS = map(int, os.environ.get("XTG_GPU_STATIC_PART", "0/1").split("/"))


@pytest.fixture(scope="module", params=["fast", "shipped"])
def compiled(request: pytest.FixtureRequest) -> list[Report]:
    """The reports of all cases, one for each kernel and set of flags."""
    return [report for found in reports(FAST if request.param == "fast" else SHIPPED[PART::PARTS]) for report in found]


def _name(report: Report) -> str:
    return " ".join(str(report[key]) for key in ("op", "kernel", "architecture", "dtype", "size", "config"))


@pytest.mark.gpu_static
def test_every_kernel_is_compiled(compiled: list[Report]) -> None:
    counts = Counter((report["op"], report["kernel"]) for report in compiled)
    assert set(counts) == {(op, kernel) for op, spec in OPS.items() for kernel in spec.kernels}
    if len(compiled) >= len(SHIPPED):
        assert all(count % (2 * (len(CARDS) - 1) * len(OPS[op].sizes)) == 0 for (op, _), count in counts.items())


@pytest.mark.gpu_static
def test_nothing_spills_and_all_fits(compiled: list[Report]) -> None:
    """No stack, no spills, shared memory within the card's limit, no atomics (whose order the hardware chooses), and
    products of half precision on tensor cores."""
    assert not [f"{_name(report)}: {'; '.join(found)}" for report in compiled if (found := faults(report))]
    assert not [_name(r) for r in compiled if r["shared"] > CARDS[r["architecture"]].shared_limit]
    assert any(report["fma_dots"] for report in compiled if report["dtype"] == "float32"), "float32 products are exact"


@pytest.mark.gpu_static
def test_cards_do_what_they_can(compiled: list[Report]) -> None:
    """Warpgroup products on sm_90 and products into tensor memory on sm_100, where older ones would run too; tiles that
    stream in by asynchronous copies (NVIDIA); loads of 16 bytes in the hot loop, for rows of any length."""
    assert not [f"{_name(report)}: {'; '.join(found)}" for report in compiled if (found := shortfalls(report))]


def test_the_table_has_every_shipped_config() -> None:
    """Of each kernel, card, precision and width, as configs.json has it, and made from the code that is here; nothing
    in the table is faulty."""
    rows = read_rows(TABLE)
    assert {row["source"] for row in rows} == {source_hash()}, "python -m benchmarks.static.configs --table"
    found = {tuple(row[name] for name in ("op", "kernel", "architecture", "dtype", "width")): row for row in rows}
    shipped = {(case.op, case.kernel, case.architecture, case.dtype, str(case.width)): key
               for key in keys(OPS) for case in [case_of(key)]}  # fmt: skip
    assert found.keys() == shipped.keys()
    for row in rows:
        op, kernel, architecture, precision, width = shipped[
            row["op"], row["kernel"], row["architecture"], row["dtype"], row["width"]
        ]
        config = read_tables(op)[architecture][kernel][precision][str(width)]
        # Beside what is chosen a launch has sizes that follow from its shapes.
        assert {f"{name}={value}" for name, value in config.items()} <= set(row["config"].split())
        typed = {name: int(value) if value.isdigit() else value for name, value in row.items()}
        assert faults(typed) + shortfalls(typed) == []


@pytest.mark.gpu_static
def test_the_committed_table_is_what_the_compiler_says(compiled: list[Report]) -> None:
    """Every figure of every kernel that is in the table; python -m benchmarks.static.configs --table makes it anew."""
    columns = ("op", "kernel", "architecture", "dtype", "width", "size", "flags")
    rows = {tuple(row[name] for name in columns): row for row in read_rows(TABLE)}
    assert {row["triton"] for row in rows.values()} == {triton.__version__}, "made by another Triton"
    found = {tuple(str(report[name]) for name in columns): report for report in compiled}
    if len(compiled) >= len(SHIPPED):
        assert set(found) == {name for name in rows if name[2] != "default"}
    both = set(found) & set(rows)
    assert len(both) > len(found) // 2
    for name in both:
        assert {key: str(value) for key, value in found[name].items()} == {key: rows[name][key] for key in found[name]}
