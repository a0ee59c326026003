"""Fixtures of the tests of other people's models."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["by blocks", "through the modules"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches go by blocks of 16 rows as large ones do, in float32 too, or through the modules."""
    if request.param == "by blocks":
        for name, value in (("_LARGE_BYTES", 0), ("_UNIT_ROWS", 16), ("_MIN_UNITS", 1), ("_BLOCK_BYTES", 1)):
            monkeypatch.setattr(f"xtrimogene.network.linear.{name}", value)
        monkeypatch.setattr("xtrimogene.network.linear._mkl_is_slow", lambda: True)
