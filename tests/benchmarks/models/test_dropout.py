"""The benchmark of dropout: with the same seed, the masks of float64 are those of what is timed."""

from __future__ import annotations

import pytest

from benchmarks.models import dropout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_with_dropout_is_judged_by_its_own_masks(dtype: str) -> None:
    ways, errors, tokens = dropout._encoders("3m", 1, dtype, quick=True)
    without, with_dropout = dropout._rows_of("encoder", dtype, ways, errors, tokens, quick=True)
    assert without["correct"]
    assert with_dropout["correct"]
    assert with_dropout["error"] != without["error"], "it does drop"
    assert (without["provider"], with_dropout["provider"]) == ("dropout 0", "dropout 0.1")
    assert with_dropout["cost_q25_percent"] <= with_dropout["cost_percent"] <= with_dropout["cost_q75_percent"]
    assert "cost_percent" not in without
