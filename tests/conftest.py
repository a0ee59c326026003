"""Shared test set-up: the Triton interpreter where there is no GPU, NaN-poisoned empty tensors, real data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

# Read by Triton when a kernel is decorated, so it has to be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

from tests.interpreter import replace_language_once_a_launch
from xtg_kernels import dispatch

if not torch.cuda.is_available():
    replace_language_once_a_launch()

# The same examples in every run: a test that turns red then means that the program changed, and not that chance has
# found an ill-conditioned sum of a few numbers. HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

SHARED_DATA = Path(os.environ.get("XTG_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
THREADS = torch.get_num_threads()
CPU_BACKENDS = ["reference"] + (["cpp"] if dispatch.extension() is not None else [])


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """torch.empty and friends come filled with NaN (integers: their maximum), so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Each test begins with as many threads as the programs that it starts, whatever one before it has set: some sums
    have other bits on another number."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def shared_data() -> Path:
    """Folder of real cells that do not belong to the repository; skips, saying so, where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real cells not found in {SHARED_DATA}; set XTG_SHARED_DATA")
    return SHARED_DATA
