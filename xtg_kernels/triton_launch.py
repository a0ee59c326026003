"""What the Triton kernels share at launch: tile sizes for the card at hand, and the flat work list over (cell, block).

Tile sizes are data, ``ops/<op>/configs.json``: architecture -> kernel -> precision -> width -> sizes, num_warps and
num_stages. ``python -m benchmarks.static.configs`` chooses them from compiled candidates and ``python -m
benchmarks.gpu.tune`` on a card. Nothing is tuned while a model runs, and no choice depends on lengths: a cell's bits do
not depend on its batch.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# "default" keeps to the small shared memory of consumer cards (sm_86, sm_89, sm_120) and of what nobody has named yet.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950", "default")

Config = dict[str, int]
# kernel -> precision ("half" for bfloat16 and float16, "float32") -> width -> config
Table = Mapping[str, Mapping[str, Mapping[str, Config]]]

_forced_architecture: str | None = None
_forced_configs: dict[tuple[str, str], Config] = {}
_forced_tables: dict[str, Mapping[str, Table]] = {}


@functools.lru_cache
def _architecture_of(device_index: int) -> str:
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip is not None:
        # Every other AMD card has the 64 KiB of shared memory of gfx942 too.
        return "gfx950" if properties.gcnArchName.startswith("gfx950") else "gfx942"
    if properties.major == 10:
        return "sm_100"
    name = f"sm_{properties.major}{properties.minor}"
    return name if name in ARCHITECTURES else "default"


def architecture(device: torch.device) -> str:
    """Which of ARCHITECTURES serves a device; CPU tensors (the interpreter) get "default"."""
    if _forced_architecture is not None:
        return _forced_architecture
    if device.type != "cuda":
        return "default"
    return _architecture_of(torch.cuda.current_device() if device.index is None else device.index)


@contextlib.contextmanager
def overriding(
    *,
    architecture: str | None = None,
    tables: Mapping[str, Mapping[str, Table]] | None = None,
    configs: Mapping[tuple[str, str], Config] | None = None,
) -> Iterator[None]:
    """Launches inside the block take other configs: those of another architecture, of another configs.json for an op,
    or one for an (op, kernel) whatever its precision and width.

    For whatever compiles, tests, tunes or times launches that the device at hand would not choose.
    """
    global _forced_architecture, _forced_tables, _forced_configs
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    before = _forced_architecture, _forced_tables, _forced_configs
    _forced_architecture = architecture or _forced_architecture
    _forced_tables = {**_forced_tables, **(tables or {})}
    _forced_configs = {**_forced_configs, **(configs or {})}
    try:
        yield
    finally:
        _forced_architecture, _forced_tables, _forced_configs = before


def precision(dtype: torch.dtype) -> str:
    """The key of a dtype in configs.json: bfloat16 and float16 take the same instructions, tiles and registers."""
    return "float32" if dtype == torch.float32 else "half"


class LaunchConfigs:
    """The configs.json of one op."""

    def __init__(self, op: str, path: Path) -> None:
        self.op = op
        self.tables: Mapping[str, Table] = json.loads(path.read_text(encoding="utf-8"))

    def __call__(self, kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> dict[str, Any]:
        """Tile sizes, num_warps and num_stages of one kernel for one precision and padded width on one device."""
        config = _forced_configs.get((self.op, kernel))
        if config is None:
            tables = _forced_tables.get(self.op, self.tables)
            config = tables[architecture(device)][kernel][precision(dtype)][str(width)]
        # Fusing multiply and add was Triton's default up to 3.9; said here, because the default changes.
        return {"enable_fp_fusion": True, **config}


# cu_seqlens -> (its version, block and stream -> list). A batch is attended once a layer, forward and backward, always
# with the same cu_seqlens: its lists are made once and die with it.
_work_lists: Any = WeakTensorKeyDictionary()
WorkList = tuple[Tensor, Tensor, int]


def work_list(cu_seqlens: Tensor, total_nnz: int, block: int) -> WorkList:
    """Flat list of the blocks of all segments, those of long segments first, made on the device without waiting for it.

    A segment of n rows has ceil(n / block) slots, one after the other; a launch runs ``num_slots * num_heads`` programs
    and ``locate_block`` tells each its part. Long segments go first, so that what is left at the end, when processors
    run out of work, is short. Rows past cu_seqlens[-1] are one more segment, the last of the list. The number of slots
    follows from total_nnz and the batch size alone, at most batch + 1 too many; those in excess hold no work.

    Returns:
        segment_of_slot (num_slots,) int32; segments (batch + 1, 3) int32: first row, length, first slot; num_slots.
    """
    # Not kept: what a CUDA graph records has to be recorded again in every graph, and a tensor made in inference mode
    # does not count its changes.
    if cu_seqlens.is_inference() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _make_work_list(cu_seqlens, total_nnz, block)
    stream = torch.cuda.current_stream(cu_seqlens.device).cuda_stream if cu_seqlens.is_cuda else 0
    version, lists = _work_lists.get(cu_seqlens, (None, {}))
    if version != cu_seqlens._version:
        lists = {}
        _work_lists[cu_seqlens] = (cu_seqlens._version, lists)
    key = (total_nnz, block, stream)
    if key not in lists:
        lists[key] = _make_work_list(cu_seqlens, total_nnz, block)
    return lists[key]


def _make_work_list(cu_seqlens: Tensor, total_nnz: int, block: int) -> WorkList:
    batch_size, device = cu_seqlens.numel() - 1, cu_seqlens.device
    num_slots = total_nnz // block + batch_size + 1
    bounds = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), total_nnz)])
    lengths = bounds.diff()
    by_length = torch.argsort(lengths[:batch_size], descending=True, stable=True)
    order = torch.cat([by_length, by_length.new_full((1,), batch_size)])
    blocks = (lengths[order] + (block - 1)) // block
    ends = blocks.cumsum(0)
    first_slot = torch.empty_like(lengths).scatter_(0, order, (ends - blocks).to(torch.int32))
    segments = torch.stack([bounds[:-1], lengths, first_slot], 1)
    slots = torch.arange(num_slots, device=device)
    # Slots past the last block fall to the slack segment, where locate_block finds them to be past its end.
    place = torch.searchsorted(ends, slots, right=True).clamp_(max=batch_size)
    return order[place].to(torch.int32), segments, num_slots


@triton.jit
def locate_block(segment_of_slot, segments, batch_size, num_heads, BLOCK: tl.constexpr):
    """This program's segment (first row, length), head, first row of its block inside the segment, and the number of
    rows that take part (none in the last segment, which is the slack past cu_seqlens[-1]).

    Programs of one segment follow each other head by head, so that those that run together share rows of k and v.
    A program without work gets a block that starts at or past the segment's length.
    """
    program = tl.program_id(0)
    segment = tl.load(segment_of_slot + program // num_heads)
    start = tl.load(segments + segment * 3)
    length = tl.load(segments + segment * 3 + 1)
    first_program = tl.load(segments + segment * 3 + 2) * num_heads
    num_blocks = tl.maximum(tl.cdiv(length, BLOCK), 1)
    head = (program - first_program) // num_blocks
    block_start = tl.where(head < num_heads, (program - first_program) % num_blocks * BLOCK, length)
    num_rows = tl.where(segment == batch_size, 0, length)
    return start.to(tl.int64), length, head.to(tl.int64), block_start, num_rows


@triton.jit
def block_range(length, BLOCK: tl.constexpr, IS_TAIL: tl.constexpr):
    """First and end of a loop over the whole blocks of a length, or, for IS_TAIL, over the block of what is left.

    A kernel goes over both with one body, in a loop over IS_TAIL that is unrolled: whole blocks load without masks and
    several stages ahead; the tail has masks and one stage.
    """
    num_whole = length // BLOCK
    first, end = 0, num_whole
    if IS_TAIL:
        first, end = num_whole, tl.cdiv(length, BLOCK)
    return first, end
