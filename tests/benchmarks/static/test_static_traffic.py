"""Bytes that the static model has its launches move: by hand, and by the tensors of the kernels' arguments."""

from __future__ import annotations

import pytest

from benchmarks.static.cards import CARDS
from benchmarks.static.launches import OPS
from benchmarks.static.model import Shape, Work

SHAPE = Shape((1024, 2048), 64, 2, CARDS["sm_90"], heads=2)
TENSOR = 3072 * 2 * 64 * 2  # bytes of one like q
CONFIG = {"BLOCK_Q": 64, "BLOCK_K": 32, "BLOCK_T": 64, "BLOCK_F": 32, "num_warps": 4, "num_stages": 2}


def _work(op: str, kernel: str) -> Work:
    model = OPS[op].kernels[kernel].work
    assert model is not None
    return model(CONFIG, SHAPE)


@pytest.mark.parametrize(
    ("kernel", "own"), [("query", 3), ("grad_query", 3), ("grad_key_value", 4)]  # rows of the program's own tokens
)  # fmt: skip
def test_rows_of_a_favor_program_cross_the_cache_once(kernel: str, own: int) -> None:
    """Nine blocks of 32 of the 266 features, of two tensors each, and the rows of 64 tokens, of two bytes."""
    work = _work("favor_attention", kernel)
    assert set(work.iterations) == {9}
    assert set(work.cache) == {9 * 2 * 32 * 64 * 2 + own * 64 * 64 * 2}
    assert len(work.cache) == 3072 // 64 * 2


@pytest.mark.parametrize("kernel", ["context", "grad_context"])
def test_features_of_a_favor_program_cross_the_cache_once(kernel: str) -> None:
    """A chunk is 16 blocks of 64 tokens of two tensors; 32 features come in half and leave in single precision."""
    work = _work("favor_attention", kernel)
    assert set(work.iterations) == {16}
    assert set(work.cache) == {16 * 2 * 64 * 64 * 2 + 32 * 64 * (2 + 4)}
    assert len(work.cache) == 3 * 9 * 2


@pytest.mark.parametrize(
    ("op", "kernel", "tensors"),
    [
        ("ragged_attention", "forward", "q k v out"),
        ("ragged_attention", "grad_query", "grad_out q k v out grad_q"),
        ("ragged_attention", "grad_key_value", "grad_out q k v grad_k grad_v"),
        ("favor_attention", "query", "q out"),
        ("favor_attention", "grad_query", "grad_out q out grad_q"),
        ("favor_attention", "grad_key_value", "k v grad_k grad_v"),
    ],
)
def test_memory_is_that_of_the_tensors_of_a_kernel(op: str, kernel: str, tensors: str) -> None:
    assert _work(op, kernel).memory == len(tensors.split()) * TENSOR


@pytest.mark.parametrize("kernel", ["context", "grad_context"])
def test_memory_of_favor_sums_has_the_sums_of_each_chunk(kernel: str) -> None:
    """Three chunks of 1,024 tokens, two heads, 266 features of 64, float32."""
    assert _work("favor_attention", kernel).memory == 2 * TENSOR + 3 * 2 * 266 * 64 * 4
