"""Triton kernels compiled ahead of time for GPUs that are not here: no spills, memory in bounds, tensor cores used.

Compilation shows what the interpreter cannot (it accepts code that the compiler rejects, and knows no registers); it
says nothing about speed, races or the launcher.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# One set of launch configs serves all cards, so the small shared memory of consumer cards (sm_86, sm_89, sm_120) binds.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 99 * 1024, "gfx942": 64 * 1024}
# Kernels without a matrix product.
NO_DOT = {"grad_gene_table_kernel"}

CASES: list[dict[str, Any]] = [
    *(
        {"op": "ragged_attention", "target": target, "dtype": dtype, "head_dim": head_dim}
        for target, dtype, head_dim in [
            ("sm_80", "bfloat16", 128),
            ("sm_80", "float16", 40),
            ("sm_80", "float32", 128),
            ("sm_90", "bfloat16", 64),
            ("sm_90", "bfloat16", 128),
            ("sm_90", "float32", 64),
            ("gfx942", "bfloat16", 128),
        ]
    ),
    *(
        {"op": "expression_embedding", "target": target, "dtype": dtype, "num_bins": num_bins, "dim": dim}
        for target, dtype, num_bins, dim in [
            ("sm_80", "bfloat16", 100, 768),
            ("sm_80", "float32", 100, 128),
            ("sm_90", "bfloat16", 100, 768),
            ("sm_90", "float32", 256, 768),
            ("sm_90", "bfloat16", 256, 128),
            ("gfx942", "bfloat16", 100, 768),
        ]
    ),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One report for each kernel of each case, from a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.compile_kernels"],
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _failing(reports: list[dict[str, Any]], key: str, limit: int = 0) -> list[str]:
    return [f"{r['kernel']} ({r['case']}): {key} {r[key]}" for r in reports if r[key] > limit]


def test_every_kernel_is_compiled(reports: list[dict[str, Any]]) -> None:
    kernels = Counter((r["op"], r["kernel"]) for r in reports)
    attention = sum(case["op"] == "ragged_attention" for case in CASES)
    assert kernels == {
        **{("ragged_attention", f"{name}_kernel"): attention for name in ("forward", "grad_query", "grad_key_value")},
        **{
            ("expression_embedding", f"{name}_kernel"): len(CASES) - attention
            for name in ("forward", "grad_bin_table", "grad_weights", "grad_gene_table")
        },
    }


def test_nothing_spills(reports: list[dict[str, Any]]) -> None:
    assert not _failing(reports, "spills")
    assert not _failing(reports, "stack")


def test_shared_memory_is_within_limits(reports: list[dict[str, Any]]) -> None:
    assert not [failing for r in reports for failing in _failing([r], "shared", SHARED_LIMIT[r["target"]])]


def test_half_precision_products_use_tensor_cores(reports: list[dict[str, Any]]) -> None:
    half = [r for r in reports if "float32" not in r["case"] and r["kernel"] not in NO_DOT]
    assert not [f"{r['kernel']} ({r['case']})" for r in half if r["tensor_core"] == 0]
    assert not _failing(half, "fma_dots")
    assert any(r["fma_dots"] for r in reports if "float32" in r["case"]), "float32 products are exact"
    hopper_attention = [r for r in half if r["target"] == "sm_90" and r["op"] == "ragged_attention"]
    assert hopper_attention
    assert not [f"{r['kernel']} ({r['case']})" for r in hopper_attention if r["wgmma"] == 0]


def test_half_precision_attention_streams_its_tiles(reports: list[dict[str, Any]]) -> None:
    """Tiles come by asynchronous 16-byte copies, also where head_dim is no multiple of 16."""
    half = [
        r for r in reports if r["op"] == "ragged_attention" and r["target"] != "gfx942" and "float32" not in r["case"]
    ]
    assert any(r["case"].endswith(" 40") for r in half)
    assert not [f"{r['kernel']} ({r['case']})" for r in half if r["async_copies"] == 0]


def test_no_atomics(reports: list[dict[str, Any]]) -> None:
    """Sums whose order the hardware chooses would differ from run to run."""
    assert not _failing(reports, "atomics")
