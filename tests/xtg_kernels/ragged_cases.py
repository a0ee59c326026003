"""Ragged shapes and error measures that the op tests share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from xtg_kernels import dispatch, use_backend

# Empty segments anywhere, length 1, lengths around block sizes (64 keys, 192 queries), one giant among tiny ones.
EDGE_LENGTHS = {
    "no cells": [],
    "only empty cells": [0, 0, 0],
    "one token": [1],
    "around the key block": [63, 64, 65],
    "around the query block": [191, 192, 193],
    "giant among tiny": [1, 3, 700, 2, 0, 5],
    "empty at both ends": [0, 17, 0, 33, 0],
}

_extension = dispatch.extension()
ISAS = [] if _extension is None else list(_extension.available_isas())
# Every implementation that runs on this machine without an emulator; the Triton kernels have test files of their own.
IMPLEMENTATIONS = ["reference", *(f"cpp-{isa}" for isa in ISAS)]


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Runs the ops on ``reference`` or on the C++ kernels of one ISA (``cpp-avx2``)."""
    backend, _, isa = name.partition("-")
    with use_backend(backend):
        if not isa:
            yield
            return
        assert _extension is not None
        before = _extension.active_isa()
        _extension.use_isa(isa)
        try:
            yield
        finally:
            _extension.use_isa(before)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Runs with n PyTorch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


needs_cpp = pytest.mark.skipif(_extension is None, reason="the C++ extension was not built (XTG_BUILD_CPP=0)")


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """(batch + 1,) int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference|| in float64."""
    reference = reference.double()
    norm = reference.norm().item()
    return (x.double() - reference).norm().item() / (norm if norm > 0 else 1.0)
