"""bfloat16 for the Triton interpreter, which stores it as uint16 and computes on the bits without a word; and less work
for each function that a kernel calls.

Operations on bfloat16 go through float32 with round-to-nearest-even, as on the GPU; reductions over bfloat16, which
our kernels do not use, raise. For tests only: tests/xtg_kernels/test_triton_interpreter.py holds it against
PyTorch's own bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16 bits (uint16), ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrowed(handle: TensorHandle) -> TensorHandle:
    # Comparisons come back as bool and stay what they are.
    if handle.data.dtype != np.float32:
        return handle
    return TensorHandle(to_bfloat16(handle.data), tl.bfloat16)


def _elementwise(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """binary_op or unary_op, whose last argument is the NumPy function."""

    def wrapped(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        *handles, function = operands
        if not any(_is_bfloat16(handle) for handle in handles):
            return original(self, *operands)
        return _narrowed(original(self, *(_widened(handle) for handle in handles), function))

    return wrapped


def _cast(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """cast_impl or create_fp_to_fp."""

    def wrapped(self: InterpreterBuilder, source: TensorHandle, target: Any, *rounding: Any) -> TensorHandle:
        source_type, target_type = source.dtype.scalar, target.scalar
        if source_type != tl.bfloat16 and target_type != tl.bfloat16:
            return original(self, source, target, *rounding)
        if tl.float64 in (source_type, target_type):
            raise NotImplementedError("bfloat16 <-> float64 in the interpreter: it would round twice")
        wide = _widened(source)
        if target_type != tl.bfloat16:
            return TensorHandle(self.cast_impl(wide, target).data, target_type)
        return TensorHandle(to_bfloat16(wide.data.astype(np.float32)), tl.bfloat16)

    return wrapped


def _dot(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def wrapped(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, _widened(a), _widened(b), *rest)

    return wrapped


def _refuse_reduction(original: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: ReduceScanOpInterface, tensors: Any) -> None:
        original(self, tensors)
        if any(tensor.dtype == tl.bfloat16 for tensor in tensors):
            raise NotImplementedError("reduction over bfloat16 in the interpreter: convert to float32 first")

    return wrapped


@contextmanager
def bf16_interpreter() -> Iterator[None]:
    """Kernels interpreted inside the block compute with bfloat16 as the hardware does."""
    builder = InterpreterBuilder
    patched: dict[str, Any] = {
        "binary_op": _elementwise(builder.binary_op),
        "unary_op": _elementwise(builder.unary_op),
        "cast_impl": _cast(builder.cast_impl),
        "create_fp_to_fp": _cast(builder.create_fp_to_fp),
        "create_dot": _dot(builder.create_dot),
    }
    refuse = _refuse_reduction(ReduceScanOpInterface.check_tensor)
    with mock.patch.multiple(builder, **patched), mock.patch.object(ReduceScanOpInterface, "check_tensor", refuse):
        yield


def replace_language_once_a_launch() -> None:
    """Triton's language is replaced by the interpreter's once for each launch.

    The interpreter does it again for every function that a kernel calls, in every program, which changes nothing and
    took two fifths of its time.
    """
    replace = interpreter._patch_lang
    replaced: set[frozenset[str]] = set()

    def replace_once(function: Callable[..., Any]) -> Any:
        seen = frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)
        if seen in replaced:
            return interpreter._LangPatchScope()
        scope = replace(function)
        if not replaced:  # the kernel itself, at whose end all is put back

            def restore() -> None:
                replaced.clear()
                type(scope).restore(scope)

            scope.restore = restore
        replaced.add(seen)
        return scope

    interpreter._patch_lang = replace_once
