"""The patches of the Triton interpreter (tests/interpreter.py): bfloat16 against PyTorch's own, one replacement of the
language a launch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter import bf16_interpreter, to_bfloat16, to_float32

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")


@triton.jit
def _arithmetic_kernel(x, y, cast, total, product, negated, larger, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    a = tl.load(x + index)
    tl.store(cast + index, a.to(tl.bfloat16))
    a, b = a.to(tl.bfloat16), tl.load(y + index)
    tl.store(total + index, a + b)
    tl.store(product + index, a * b)
    tl.store(negated + index, -a)
    tl.store(larger + index, (a > b).to(tl.int32))


@triton.jit
def _dot_kernel(a, b, out, N: tl.constexpr):
    index = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + index, tl.dot(tl.load(a + index), tl.load(b + index)))


@triton.jit
def _sum_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))


def _every_kind_of_float() -> torch.Tensor:
    """float32 with ties, subnormals, infinities and NaN among ordinary numbers."""
    x = torch.randn(2048, generator=torch.Generator().manual_seed(0)) * torch.logspace(-40, 38, 2048)
    ties = torch.arange(0x3F800000, 0x3F800000 + 64 * 0x8000, 0x8000, dtype=torch.int32).view(torch.float32)
    x[:64] = ties
    x[64:70] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38])
    return x


def test_rounding_is_that_of_pytorch() -> None:
    x = _every_kind_of_float()
    want = x.bfloat16()
    got = torch.from_numpy(to_bfloat16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    wide = torch.from_numpy(to_float32(want.view(torch.int16).numpy().view(np.uint16)))
    torch.testing.assert_close(wide, want.float(), rtol=0, atol=0, equal_nan=True)


@needs_interpreter
def test_operations_are_those_of_pytorch() -> None:
    x = _every_kind_of_float()
    y = x.flip(0).bfloat16()
    a = x.bfloat16()
    cast, total, product, negated = (torch.zeros(2048, dtype=torch.bfloat16) for _ in range(4))
    larger = torch.zeros(2048, dtype=torch.int32)
    with bf16_interpreter(), np.errstate(all="ignore"):
        _arithmetic_kernel[(1,)](x, y, cast, total, product, negated, larger, BLOCK=2048)
    for got, want in ((cast, a), (total, a + y), (product, a * y), (negated, -a)):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(larger.bool(), a > y)


@needs_interpreter
def test_dot_multiplies_numbers_and_not_bits() -> None:
    a, b = torch.randn((2, 32, 32), generator=torch.Generator().manual_seed(1)).bfloat16()
    out = torch.zeros((32, 32))
    with bf16_interpreter():
        _dot_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@needs_interpreter
def test_a_reduction_over_bfloat16_is_refused() -> None:
    out = torch.zeros(1, dtype=torch.bfloat16)
    with bf16_interpreter(), pytest.raises(triton.runtime.errors.InterpreterError, match="convert to float32 first"):
        _sum_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), out, BLOCK=16)


@triton.jit
def _twice(x):
    return tl.sum(x, 0) * 2


@triton.jit
def _sums_kernel(x, out, BLOCK: tl.constexpr):
    total = _twice(tl.load(x + tl.arange(0, BLOCK))) + _twice(tl.load(x + tl.arange(0, BLOCK)))
    tl.store(out + tl.program_id(0), total)


@needs_interpreter
def test_the_language_is_replaced_once_a_launch_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: list[object] = []
    replace = interpreter._patch_builtin
    monkeypatch.setattr(
        interpreter, "_patch_builtin", lambda module, *rest: (modules.append(module), replace(module, *rest))
    )
    asked = []
    # The first launch also rewrites the functions, whose modules have more names afterwards.
    for programs in (1, 1, 5):
        out = torch.zeros(programs)
        _sums_kernel[(programs,)](torch.arange(16.0), out, BLOCK=16)
        assert out.tolist() == [480.0] * programs
        asked.append(len(modules))
        modules.clear()
        assert tl.core.is_builtin(tl.load)
        assert "range" in str(tl.range)
    assert asked[1] == asked[2] > 0
