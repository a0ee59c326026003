"""What the Triton kernels share at launch: the work list over (cell, block) and the configs of the card at hand."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.xtg_kernels.ragged_cases import cu_seqlens_of
from xtg_kernels import triton_launch
from xtg_kernels.triton_launch import ARCHITECTURES, LaunchConfigs, overriding, work_list

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGE = Path(triton_launch.__file__).parent


@triton.jit
def _record_kernel(found, segment_of_slot, segments, batch_size, num_heads, BLOCK: tl.constexpr):
    start, length, head, block_start, num_rows = triton_launch.locate_block(
        segment_of_slot, segments, batch_size, num_heads, BLOCK
    )
    found += tl.program_id(0) * 5
    tl.store(found, start)
    tl.store(found + 1, length)
    tl.store(found + 2, head)
    tl.store(found + 3, block_start)
    tl.store(found + 4, num_rows)


def blocks_by_formula(segment_of_slot: list[int], segments: list[list[int]], num_heads: int, block: int) -> list[tuple]:
    """(segment, head, first row of the block) of every program that has work, in the order of the programs."""
    found = []
    for program in range(len(segment_of_slot) * num_heads):
        segment = segment_of_slot[program // num_heads]
        _, length, first_slot = segments[segment]
        head, place = divmod(program - first_slot * num_heads, max(-(-length // block), 1))
        if head < num_heads and place * block < length:
            found.append((segment, head, place * block))
    return found


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), max_size=8),
    slack=st.integers(0, 150),
    block=st.sampled_from([16, 32, 128]),
    num_heads=st.integers(1, 3),
)
def test_every_block_of_every_head_once_long_segments_first(
    lengths: list[int], slack: int, block: int, num_heads: int
) -> None:
    total = sum(lengths) + slack
    segment_of_slot, segments, num_slots = work_list(cu_seqlens_of(lengths), total, block)
    assert (segment_of_slot.shape, segment_of_slot.dtype) == ((num_slots,), torch.int32)
    assert num_slots <= sum(-(-n // block) for n in (*lengths, slack)) + len(lengths) + 1
    starts = [0, *itertools.accumulate(lengths)]
    assert segments[:, :2].tolist() == [list(pair) for pair in zip(starts, [*lengths, slack], strict=True)]
    found = blocks_by_formula(segment_of_slot.tolist(), segments.tolist(), num_heads, block)
    order = [*sorted(range(len(lengths)), key=lambda i: -lengths[i]), len(lengths)]
    rows = [*lengths, slack]
    assert found == [(i, head, start) for i in order for head in range(num_heads) for start in range(0, rows[i], block)]


def test_programs_find_their_blocks() -> None:
    """locate_block in a kernel gives what the formula above gives; programs in excess get no rows to do."""
    lengths, slack, block, num_heads = [40, 0, 100, 33], 5, 32, 3
    segment_of_slot, segments, num_slots = work_list(cu_seqlens_of(lengths).to(DEVICE), sum(lengths) + slack, block)
    found = torch.full((num_slots * num_heads, 5), -1, dtype=torch.int64, device=DEVICE)
    _record_kernel[(num_slots * num_heads,)](found, segment_of_slot, segments, len(lengths), num_heads, BLOCK=block)
    with_work = Counter()
    for start, length, head, block_start, num_rows in found.tolist():
        if block_start < length:
            with_work[start, length, head, block_start, num_rows] += 1
    starts = [0, *itertools.accumulate(lengths)]
    assert with_work == Counter(
        (start, length, head, first, length if i < len(lengths) else 0)
        for i, (start, length) in enumerate(zip(starts, [*lengths, slack], strict=True))
        for head in range(num_heads)
        for first in range(0, length, block)
    )


def _made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Block sizes of the lists made from now on."""
    made: list[int] = []
    make = triton_launch._make_work_list

    def counting(cu_seqlens: Tensor, total_nnz: int, block: int) -> triton_launch.WorkList:
        made.append(block)
        return make(cu_seqlens, total_nnz, block)

    monkeypatch.setattr(triton_launch, "_make_work_list", counting)
    return made


def test_a_list_is_made_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second layer, and the backward, find the lists of the first; the same tensor changed in place gets new ones;
    nothing outlives its batch."""
    from xtg_kernels import ragged_attention, use_backend

    made = _made(monkeypatch)
    cu_seqlens = cu_seqlens_of([20, 13]).to(DEVICE)

    def layers(cu_seqlens: Tensor) -> None:
        qkv = torch.randn((33, 3, 1, 16), device=DEVICE, requires_grad=True)
        with use_backend("triton"):
            out = ragged_attention(*qkv.unbind(1), cu_seqlens, 20)
            out = out + ragged_attention(*qkv.unbind(1), cu_seqlens, 20)
        out.sum().backward()

    layers(cu_seqlens)
    assert made
    assert len(made) == len(set(made)), "one list for each size of block"
    first = len(made)
    layers(cu_seqlens)
    assert len(made) == first
    cu_seqlens[1] = 13
    layers(cu_seqlens)
    assert len(made) == 2 * first
    kept = len(triton_launch._work_lists)
    del cu_seqlens
    assert len(triton_launch._work_lists) == kept - 1


def test_a_tensor_of_inference_mode_gets_a_new_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a tensor does not count its changes."""
    made = _made(monkeypatch)
    with torch.inference_mode():
        cu_seqlens = cu_seqlens_of([5, 3])
        work_list(cu_seqlens, 8, 16)
        cu_seqlens[1] = 8
        assert work_list(cu_seqlens, 8, 16)[1].tolist() == [[0, 8, 0], [8, 0, 1], [8, 0, 1]]
    assert len(made) == 2


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("ops/*/configs.json")), ids=lambda path: path.parent.name)
def test_every_architecture_has_every_config(path: Path) -> None:
    tables = json.loads(path.read_text())
    assert tuple(tables) == ARCHITECTURES
    keys = {
        name: {(kernel, kind, width) for kernel, kinds in table.items() for kind, at in kinds.items() for width in at}
        for name, table in tables.items()
    }
    assert len(keys["default"]) > 0
    assert all(found == keys["default"] for found in keys.values())
    for table in tables.values():
        for kinds in table.values():
            assert set(kinds) == {"half", "float32"}
            for config in (config for at in kinds.values() for config in at.values()):
                assert {"num_warps", "num_stages"} < set(config)
                assert all(
                    value > 0 and value & (value - 1) == 0 for name, value in config.items() if name != "num_stages"
                )


@pytest.mark.parametrize(
    ("name", "hip", "want"),
    [
        ((8, 0), None, "sm_80"),
        ((8, 6), None, "default"),
        ((8, 9), None, "default"),
        ((9, 0), None, "sm_90"),
        ((10, 0), None, "sm_100"),
        ((10, 3), None, "sm_100"),
        ((12, 0), None, "default"),
        ("gfx942:sramecc+:xnack-", "7.0", "gfx942"),
        ("gfx950:sramecc+:xnack-", "7.0", "gfx950"),
        ("gfx90a:sramecc+:xnack-", "6.4", "gfx942"),
    ],
)
def test_the_card_chooses_the_config(
    name: tuple[int, int] | str, hip: str | None, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(gcnArchName=name) if hip else SimpleNamespace(major=name[0], minor=name[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.version, "hip", hip)
    triton_launch._architecture_of.cache_clear()
    assert triton_launch.architecture(torch.device("cuda", 0)) == want
    triton_launch._architecture_of.cache_clear()


def test_configs_by_device_precision_and_width(tmp_path: Path) -> None:
    path = tmp_path / "configs.json"
    one, other = {"BLOCK": 16, "num_warps": 4, "num_stages": 1}, {"BLOCK": 64, "num_warps": 8, "num_stages": 2}
    path.write_text(
        json.dumps(
            {
                name: {"forward": {"half": {"16": one}, "float32": {"16": other if name == "sm_90" else one}}}
                for name in ARCHITECTURES
            }
        )
    )
    configs = LaunchConfigs("an_op", path)
    cpu = torch.device("cpu")
    assert configs("forward", torch.bfloat16, 16, cpu) == {"enable_fp_fusion": True, **one}
    assert configs("forward", torch.float16, 16, cpu) == configs("forward", torch.bfloat16, 16, cpu)
    assert configs("forward", torch.float32, 16, cpu)["BLOCK"] == 16
    with overriding(architecture="sm_90"):
        assert configs("forward", torch.float32, 16, cpu)["BLOCK"] == 64
        with overriding(configs={("an_op", "forward"): {"BLOCK": 32, "num_warps": 1, "num_stages": 1}}):
            assert configs("forward", torch.float32, 16, cpu)["BLOCK"] == 32
    tuned = {"default": {"forward": {"float32": {"16": {**one, "BLOCK": 128}}}}}
    with overriding(tables={"an_op": tuned, "another_op": {}}):
        assert configs("forward", torch.float32, 16, cpu)["BLOCK"] == 128
    assert configs("forward", torch.float32, 16, cpu)["BLOCK"] == 16
    with (
        pytest.raises(ValueError, match=r"architecture: expected one of sm_80, .* got 'sm_70'"),
        overriding(architecture="sm_70"),
    ):
        pass
