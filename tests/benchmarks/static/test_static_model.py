"""What launch configs are chosen by: occupancy, the cost model, and the order of candidates. Truths are loops and hand
counts; what the compiler says is made up here (tests/aot has the compiler)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.static import configs as static_configs
from benchmarks.static import model as static_model
from benchmarks.static.cards import CARDS, resident_programs
from benchmarks.static.configs import Key, choose, config_text, faults, keys, model_microseconds, order, shortfalls
from benchmarks.static.launches import OPS
from benchmarks.static.model import Shape, Work, makespan, microseconds
from xtg_kernels.triton_launch import ARCHITECTURES

GOOD: dict[str, Any] = {
    "op": "ragged_attention", "kernel": "forward", "architecture": "sm_90", "dtype": "bfloat16", "width": 64,
    "size": 64, "flags": "", "config": "", "registers": 128, "stack": 0, "shared": 32_768, "tensor_memory": 0,
    "resident_programs": 2, "fma_dots": 0, "spills": 0, "tensor_core": 8, "tensor_core_opcodes": "HGMMA",
    "hot_loop_instructions": 300, "hot_loop_tensor_core": 4, "hot_loop_wide_loads": 4, "wide_loads": 8,
    "async_copies": 4, "exp2": 16, "atomics": 0,
}  # fmt: skip
KEY: Key = ("ragged_attention", "forward", "sm_90", "half", 64)


@pytest.mark.parametrize(
    ("card", "registers", "shared", "warps", "programs"),
    [
        ("sm_80", 64, 0, 8, 4),  # 65,536 registers / (64 x 256 threads)
        ("sm_80", 32, 0, 8, 8),  # 64 warps
        ("sm_80", 255, 0, 8, 1),  # 256 each after rounding up to 8
        ("sm_80", 41, 0, 4, 10),  # 48 registers each: ten warps to a scheduler
        ("sm_90", 32, 114 * 1024, 4, 1),  # 228 KiB / (114 + 1)
        ("sm_90", 32, 100 * 1024, 4, 2),  # 228 KiB / (100 + 1)
        ("sm_90", 32, 228 * 1024, 4, 0),  # more than one program may have
        ("sm_80", 168, 0, 4, 3),  # 12 warps: three to each scheduler
        ("gfx942", 128, 0, 4, 4),  # 131,072 / (128 x 64 x 4)
        ("gfx942", 64, 40 * 1024, 4, 1),  # 64 KiB
    ],
)
def test_resident_programs_by_hand(card: str, registers: int, shared: int, warps: int, programs: int) -> None:
    assert resident_programs(CARDS[card], registers, shared, warps) == programs


def test_tensor_memory_bounds_programs() -> None:
    assert resident_programs(CARDS["sm_100"], 32, 1024, 4, tensor_memory=256) == 2


@given(times=st.lists(st.floats(0.1, 100), min_size=1, max_size=30), places=st.integers(1, 8))
def test_makespan_is_that_of_a_list_schedule(times: list[float], places: int) -> None:
    free = [0.0] * places
    for time in times:
        place = free.index(min(free))
        free[place] += time
    assert makespan(np.array(times), places) == pytest.approx(max(free))


def _attention_by_loops(lengths: Sequence[int], heads: int, rows: int, columns: int, width: int, products: int) -> Any:
    """FLOPs and trips of every program, those of long cells first."""
    flops, trips = [], []
    for length in sorted(lengths, reverse=True):
        for _ in itertools.product(range(0, length, rows), range(heads)):
            blocks = len(range(0, length, columns))
            trips.append(blocks)
            flops.append(blocks * products * 2 * rows * columns * width)
    return flops, trips


@pytest.mark.parametrize(
    ("kernel", "owned", "products"),
    [("forward", "BLOCK_Q", 2), ("grad_query", "BLOCK_Q", 3), ("grad_key_value", "BLOCK_K", 4)],
)
def test_attention_work_is_what_loops_count(kernel: str, owned: str, products: int) -> None:
    shape = Shape((100, 7, 300), 64, 2, CARDS["sm_90"], heads=3)
    config = {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    walked = "BLOCK_K" if owned == "BLOCK_Q" else "BLOCK_Q"
    model = OPS["ragged_attention"].kernels[kernel].work
    assert model is not None
    work = model(config, shape)
    flops, trips = _attention_by_loops(shape.lengths, 3, config[owned], config[walked], 64, products)
    assert work.products.tolist() == flops
    assert work.iterations.tolist() == trips
    assert work.exp2.tolist() == [64 * 32 * n for n in trips]


@pytest.mark.parametrize("kernel", ["context", "query", "grad_query", "grad_context", "grad_key_value"])
def test_favor_products_cover_the_closed_form(kernel: str) -> None:
    """At whole blocks a kernel has the products of its formula: so many of tokens x features x width for a head."""
    products = {"context": 2, "query": 2, "grad_query": 3, "grad_context": 2, "grad_key_value": 4}
    shape = Shape((1024, 2048), 64, 2, CARDS["sm_90"], heads=2)
    config = {"BLOCK_T": 64, "BLOCK_F": 38, "num_warps": 4, "num_stages": 2}  # 266 features are seven blocks of 38
    model = OPS["favor_attention"].kernels[kernel].work
    assert model is not None
    exact = products[kernel] * 2 * 3072 * 266 * 64 * 2
    assert model(config, shape).products.sum() == pytest.approx(exact, rel=1e-6)


def test_embedding_products_by_hand() -> None:
    shape = Shape((64, 64), 128, 2, CARDS["sm_90"], dim=768)
    config = {"BLOCK_T": 64, "BLOCK_H": 32, "BLOCK_D": 64, "BLOCK_W": 128, "num_warps": 4, "num_stages": 2}
    # Hidden units times w2, split in two in half precision; weights of bins times the table.
    assert static_model.embedding_forward(config, shape).products.sum() == 128 * (2 * 2 * 128 * 128 + 2 * 128 * 768)
    single = Shape((64, 64), 128, 4, CARDS["sm_90"], dim=768)
    assert static_model.embedding_forward(config, single).products.sum() == 128 * (2 * 128 * 128 + 2 * 128 * 768)


def _work(**amounts: float) -> Work:
    names = ("products", "vector", "exp2", "shared", "cache", "iterations")
    return Work(**{name: np.full(132, amounts.get(name, 0.0)) for name in names}, memory=amounts.get("memory", 0.0))


def test_time_by_hand() -> None:
    """132 programs on the 132 processors of an H100, one each."""
    shape, config = Shape((1,), 64, 2, CARDS["sm_90"]), {"num_warps": 4, "num_stages": 2}
    card = shape.card
    # 1 GFLOP for each processor at the peak of the card.
    assert microseconds(_work(products=1e9), shape, config, 1) == pytest.approx(132e9 / 989.4e12 * 1e6)
    assert microseconds(_work(exp2=16e3), shape, config, 1) == pytest.approx(1e3 / (1e3 * card.ghz))
    # One warp to a scheduler waits for each unit in turn, two overlap them.
    both = _work(products=1e9, exp2=16e3)
    products, exp2 = card.clocks_of_half(1e9), 1e3
    assert microseconds(both, shape, config, 1) == pytest.approx((products + exp2) / (1e3 * card.ghz))
    wide = {"num_warps": 8, "num_stages": 2}
    assert microseconds(both, shape, wide, 1) == pytest.approx(max(products, (products + exp2) / 2) / (1e3 * card.ghz))
    # Nothing is faster than its bytes.
    assert microseconds(_work(exp2=1, memory=3.35e6), shape, config, 1) == pytest.approx(1.0)
    # One stage waits for the memory on every trip.
    waiting = microseconds(_work(exp2=16, iterations=10), shape, {"num_warps": 4, "num_stages": 1}, 1)
    assert waiting == pytest.approx((1 + 7000) / (1e3 * card.ghz))


def test_no_kernel_beats_its_floor() -> None:
    """Products at the peak of the card and bytes at its bandwidth are a lower bound of the modelled time."""
    for key in keys(OPS):
        op, kernel, architecture, precision, width = key
        spec = OPS[op].kernels[kernel]
        if spec.work is None:
            continue
        shape = static_configs.shape_of(key)
        for config in spec.candidates(precision, width):
            work, card = spec.work(config, shape), CARDS[architecture]
            peak = card.half_tflops if precision == "half" else card.float32_tflops
            floor = max(work.products.sum() / (1e6 * peak), work.memory / (1e6 * card.terabytes_per_s))
            assert microseconds(work, shape, config, 1) >= 0.999 * floor


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"error": "OutOfResources: no"}, "OutOfResources: no"),
        ({"stack": 8}, "stack 8"),
        ({"spills": 2}, "spills 2"),
        ({"atomics": 1}, "atomics 1"),
        ({"resident_programs": 0, "shared": 300_000}, "does not fit a processor"),
        ({"fma_dots": 1}, "1 products without tensor cores"),
        ({"hot_loop_tensor_core": 0}, "no tensor-core instruction in the hot loop"),
    ],
)
def test_faults_are_named(change: dict[str, Any], fault: str) -> None:
    assert faults(GOOD) == []
    assert [why for why in faults(GOOD | change) if why.startswith(fault)]


def test_products_of_float32_need_no_tensor_cores() -> None:
    assert faults(GOOD | {"dtype": "float32", "fma_dots": 2, "hot_loop_tensor_core": 0}) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tensor_core_opcodes": "HMMA"}, "HMMA in place of HGMMA"),
        ({"architecture": "sm_100", "tensor_core_opcodes": "HMMA"}, "HMMA in place of UTCHMMA"),
        ({"async_copies": 0}, "no asynchronous copies"),
        ({"hot_loop_wide_loads": 0}, "no loads of 16 bytes"),
    ],
)
def test_shortfalls_are_named(change: dict[str, Any], reason: str) -> None:
    assert shortfalls(GOOD) == []
    assert [why for why in shortfalls(GOOD | change) if why.startswith(reason)]
    assert faults(GOOD | change) == [], "it runs"


def test_older_cards_and_amd_have_no_better_instruction() -> None:
    assert shortfalls(GOOD | {"architecture": "sm_80", "tensor_core_opcodes": "HMMA"}) == []
    amd = {"architecture": "gfx942", "tensor_core_opcodes": "v_mfma_f32_16x16x16_bf16", "async_copies": 0}
    assert shortfalls(GOOD | amd) == []


def test_good_candidates_come_first_then_whole_ones_then_fast_ones() -> None:
    candidates = OPS["ragged_attention"].kernels["forward"].candidates("half", 64)
    assert len(candidates) == 4
    times = [model_microseconds(KEY, config, GOOD) for config in candidates]
    by_time = sorted(range(4), key=times.__getitem__)
    fast, slow = by_time[0], by_time[-1]
    assert times[slow] > 1.1 * times[fast], "the test needs candidates that differ"
    good = [[GOOD]] * 4
    chosen = order(KEY, candidates, good)[0]
    assert times[chosen] <= 1.03 * times[fast]
    assert all(times[n] > 1.03 * times[fast] for n in range(chosen)), "of those that are close the first in the list"

    crowded = [[GOOD | {"resident_programs": 1 if n == chosen else 4}] for n in range(4)]
    alone = model_microseconds(KEY, candidates[chosen], crowded[chosen][0])
    assert 1.03 < alone / min(model_microseconds(KEY, candidates[n], crowded[n][0]) for n in range(4)) < 3
    assert order(KEY, candidates, crowded)[0] != chosen, "three in a hundred are close, more is slower"

    def but(number: int, **change: Any) -> list[list[dict[str, Any]]]:
        return [[GOOD | change] if n == number else [GOOD] for n in range(4)]

    assert order(KEY, candidates, but(chosen, spills=1))[-1] == chosen
    assert order(KEY, candidates, but(chosen, async_copies=0))[-1] == chosen
    only_slow = [[GOOD] if n == slow else [GOOD | {"async_copies": 0}] for n in range(4)]
    assert order(KEY, candidates, only_slow)[0] == slow
    # One bad set of flags is enough.
    assert (
        order(KEY, candidates, [[GOOD, GOOD | {"spills": 1}] if n == chosen else [GOOD] for n in range(4)])[-1]
        == chosen
    )


def _compiler(bad: dict[str, Sequence[int]]) -> Any:
    """A compiler that makes spills of some candidates (by number) on some architectures."""

    def compiled(cases: Sequence[static_configs.Case]) -> list[list[dict[str, Any]]]:
        found = []
        for case in cases:
            assert case.config is not None
            candidates = OPS[case.op].kernels[case.kernel].candidates("half", case.width)
            number = candidates.index(dict(case.config))
            opcode = {"sm_100": "UTCHMMA", "sm_90": "HGMMA"}.get(case.architecture, "HMMA")
            where = {"architecture": case.architecture, "kernel": case.kernel, "tensor_core_opcodes": opcode}
            found.append([GOOD | where | {"spills": int(number in bad.get(case.architecture, ()))}])
        return found

    return compiled


WANTED = [("ragged_attention", "forward", architecture, "half", 64) for architecture in ARCHITECTURES]


def test_each_card_gets_a_candidate_that_is_good_there(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = OPS["ragged_attention"].kernels["forward"].candidates("half", 64)
    bad = {"default": (0, 1, 3), "sm_80": (2,), "gfx950": (1, 2, 3), "gfx942": (0,)}
    monkeypatch.setattr(static_configs, "_compile", _compiler(bad))
    chosen = {key[2]: candidates.index(config) for key, config in choose(WANTED).items()}
    assert chosen["default"] == 2, "what it borrows from sm_80 in order, until one is good for itself"
    assert chosen["gfx950"] == 0
    assert not [name for name, number in chosen.items() if number in bad.get(name, ())]


def test_entries_without_a_good_candidate_are_all_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_configs, "_compile", _compiler({"gfx950": range(4), "sm_90": range(4)}))
    with pytest.raises(RuntimeError, match=r"(?s)forward (sm_90|gfx950) half 64: spills 1.*forward (sm_90|gfx950)"):
        choose(WANTED)


@pytest.mark.parametrize("op", OPS)
def test_committed_configs_are_as_the_program_writes_them(op: str) -> None:
    """And every one of them is a candidate: none was typed by hand."""
    text = (static_configs.OPS_FOLDER / op / "configs.json").read_text(encoding="utf-8")
    tables = json.loads(text)
    assert config_text(tables) == text
    for _, kernel, architecture, precision, width in keys([op]):
        config = tables[architecture][kernel][precision][str(width)]
        assert config in OPS[op].kernels[kernel].candidates(precision, width), (architecture, kernel, precision, width)


def test_configs_come_back_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_configs, "OPS_FOLDER", tmp_path)
    (tmp_path / "masked_head").mkdir()
    chosen = {key: {"BLOCK_N": n + 1, "num_warps": 4, "num_stages": 2} for n, key in enumerate(keys(["masked_head"]))}
    static_configs.write_configs(chosen)
    tables = json.loads((tmp_path / "masked_head" / "configs.json").read_text(encoding="utf-8"))
    for (_, kernel, architecture, precision, width), config in chosen.items():
        assert tables[architecture][kernel][precision][str(width)] == config
