"""Argument checks shared by the public functions: errors name the argument, what was expected and what came."""

from __future__ import annotations

import itertools
import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Checks that read values on a GPU synchronise it: XTG_DEBUG=1 turns them on.
debug_checks = os.environ.get("XTG_DEBUG") == "1"


def check_tensor(name: str, x: object, shape: tuple[int | str, ...], like: Tensor | None = None) -> Tensor:
    """``x`` is a tensor of ``shape`` (strings stand for free sizes), on the device of ``like``.

    Raises:
        TypeError: not a tensor. ValueError: another rank, size or device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() != len(shape) or any(
        not isinstance(want, str) and size != want for size, want in zip(x.shape, shape, strict=True)
    ):
        expected = "(" + ", ".join(str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {x.device}")
    return x


def check_floating(name: str, x: Tensor, dtype: torch.dtype | None = None) -> None:
    """``x`` is floating point, and of ``dtype`` where one is given.

    Raises:
        TypeError: another dtype.
    """
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {x.dtype}")
    if not x.is_floating_point() or x.element_size() < 2:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")


def values_are_readable(x: Tensor) -> bool:
    """Whether to look at the numbers of ``x``: not while tracing, and on a GPU only with XTG_DEBUG=1."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    return x.device.type == "cpu" or debug_checks


def check_cu_seqlens(
    cu_seqlens: object,
    like: Tensor,
    total_nnz: int,
    max_seqlen: int | None = None,
    *,
    name: str = "cu_seqlens",
    total: str = "total_nnz",
) -> None:
    """``cu_seqlens`` (batch + 1,) int32 starts at 0, does not decrease and ends within total_nnz.

    The values are checked on CPU; on a GPU that would synchronise, so it takes XTG_DEBUG=1. ``name`` and ``total`` are
    what the caller calls cu_seqlens and total_nnz.

    Raises:
        TypeError: not a tensor, or not int32. ValueError: any other violation.
    """
    x = check_tensor(name, cu_seqlens, ("batch + 1",), like)
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {x.dtype} (use {name}.int())")
    if x.shape[0] < 1:
        raise ValueError(f"{name}: expected at least one entry (batch + 1,), got none")
    if not values_are_readable(x):
        return
    bounds = x.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{name}: expected to start at 0, got {bounds[0]}")
    if bounds[-1] > total_nnz:
        raise ValueError(f"{name}: expected to end at or before {total} = {total_nnz}, got {bounds[-1]}")
    longest = 0
    for c, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(f"{name}: expected non-decreasing values, got {start} then {end} at segment {c}")
        longest = max(longest, end - start)
    if max_seqlen is not None and longest > max_seqlen:
        limit = name.replace("cu_seqlens", "max_seqlen")
        raise ValueError(f"{limit}: expected at least the longest segment, {longest}, got {max_seqlen}")


def check_ids_dtype(name: str, ids: Tensor) -> None:
    """``ids`` is int32 or int64.

    Raises:
        TypeError: another dtype.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32 or int64, got {ids.dtype}")


def check_ascending_ids(name: str, ids: Tensor, cu_seqlens: Tensor, rows: int, table: str) -> None:
    """``ids`` are rows of ``table`` that ascend strictly in each segment; checked where the values can be read.

    Raises:
        ValueError: an id outside [0, rows), or one that does not exceed the id before it, with its position.
    """
    if not values_are_readable(ids):
        return
    used = ids[: int(cu_seqlens[-1])]
    outside = (used < 0) | (used >= rows)
    if bool(outside.any()):
        t = int(outside.nonzero()[0, 0])
        raise ValueError(f"{name}: expected rows of {table}, [0, {rows}), got {int(used[t])} at {t}")
    falls = used[1:] <= used[:-1]
    starts = cu_seqlens[1:-1].long()
    falls[starts[(starts > 0) & (starts < used.shape[0])] - 1] = False
    if bool(falls.any()):
        t = int(falls.nonzero()[0, 0])
        raise ValueError(
            f"{name}: expected strictly ascending ids in each segment, got {int(used[t])} then {int(used[t + 1])} "
            f"at {t + 1} (sort the genes of each cell)"
        )


def check_gene_ids(gene_ids: Tensor, rows: int, in_use: Tensor | None) -> None:
    """``gene_ids`` lie in [0, rows) wherever ``in_use`` (None: everywhere); checked where the values can be read.

    Raises:
        ValueError: an id outside the table, with its position.
    """
    if not values_are_readable(gene_ids):
        return
    outside = (gene_ids < 0) | (gene_ids >= rows)
    if in_use is not None:
        outside &= in_use
    if bool(outside.any()):
        t = int(outside.nonzero()[0, 0])
        raise ValueError(f"gene_ids: expected rows of gene_table, [0, {rows}), got {int(gene_ids[t])} at {t}")
