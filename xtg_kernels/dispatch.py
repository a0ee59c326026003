"""Backends: which implementation of an op runs, why the others do not, and how an op enters torch.library.

Every op has three overloads in namespace xtg: ``default`` (C++ on CPU tensors, Triton on GPU tensors; the reference on
CPU where the extension was not built), ``reference`` (any device, any dtype) and ``triton`` (GPU tensors, or CPU
tensors under TRITON_INTERPRET=1). The public functions check their arguments and choose the overload. The backend
"varlen" is PyTorch's own attention for ragged_attention; the other ops then run as under "auto".

Kernels know values and first derivatives. Whatever else is asked of an op comes from its reference, which PyTorch can
differentiate like any other code: second derivatives from the reference of the backward; forward mode and the
transforms of torch.func (jvp, grad, vmap, hessian) from the reference of the op, whatever the backend.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

BACKENDS = ("auto", "reference", "cpp", "triton", "varlen")


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend = _checked_backend(os.environ.get("XTG_BACKEND", "auto"), "environment variable XTG_BACKEND")


def _load_extension() -> tuple[ModuleType | None, ImportError | None]:
    # Absent and broken are two things: the first falls back, the second must be heard at first use. One of another
    # folder is absent: the finder of an editable install serves that of its source tree to every other one.
    spec = importlib.util.find_spec("xtg_kernels._C")
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != Path(__file__).resolve().parent:
        return None, None
    try:
        return importlib.import_module("xtg_kernels._C"), None
    except ImportError as error:
        return None, error


def _source_tree() -> Path | None:
    """The root of the source tree that this package was imported from; None for an installed one."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "setup.py").is_file() and (root / "csrc").is_dir() else None


def _built_elsewhere(root: Path) -> Path | None:
    """The first xtg_kernels on sys.path outside ``root`` that has the extension."""
    for entry in map(Path, sys.path):
        package = entry.resolve() / "xtg_kernels"
        if package.parent != root and any((package / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
            return package
    return None


def why_not_built() -> str:
    """Why there is no extension, and what to do."""
    root = _source_tree()
    if root is None:
        return "not built (installed with XTG_BUILD_CPP=0)"
    elsewhere = _built_elsewhere(root)
    instead = f"; or start Python in another folder, which then finds those of {elsewhere}" if elsewhere else ""
    return (
        f"not built for this Python in the source tree {root} that xtg_kernels comes from (make setup there, or python "
        f"setup.py build_ext --inplace{instead})"
    )


_extension, _extension_error = _load_extension()
if _extension is None and _extension_error is None and _source_tree() is not None and _backend == "auto":
    # A clone hides the installed package from a Python that is started in it.
    warnings.warn(f"C++ kernels {why_not_built()}. CPU tensors take the reference, many times slower.", stacklevel=2)
_triton_installed = importlib.util.find_spec("triton") is not None
_interpreting = os.environ.get("TRITON_INTERPRET") == "1"
_fragment = torch.library.Library("xtg", "FRAGMENT")
# Each op in plain PyTorch, with its rule of autocast; and those that have a derivative.
_plain: dict[str, Callable[..., Any]] = {}
_differentiable: set[str] = set()


def extension() -> ModuleType | None:
    """The compiled module, or None where it was not built (``why_not_built``).

    Raises:
        ImportError: the loader's own error, where the file is there and does not load.
    """
    if _extension_error is not None:
        raise _extension_error
    return _extension


def current_backend() -> str:
    """The backend asked for: ``auto`` unless XTG_BACKEND or ``use_backend`` says otherwise."""
    return _backend


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs ops called inside the block on one backend: ``auto``, ``reference``, ``cpp``, ``triton`` or ``varlen``.

    ``varlen`` sends ragged_attention to torch.nn.attention.varlen and leaves the other ops to ``auto``. The choice is
    process-wide, made when an op is called; its backward runs where its forward ran.

    Raises:
        ValueError: an unknown name. An op that the backend cannot take raises ValueError with all reasons when called.
    """
    global _backend
    previous, _backend = _backend, _checked_backend(name, "use_backend")
    try:
        yield
    finally:
        _backend = previous


def cpp_reasons(tensors: dict[str, Tensor]) -> list[str]:
    """Reasons common to all ops why C++ cannot take these tensors."""
    reasons = []
    if _extension_error is not None:
        reasons.append(f"the C++ extension failed to load: {_extension_error}")
    elif _extension is None:
        reasons.append(f"the C++ extension was {why_not_built()}")
    elsewhere = [f"{name} on {x.device}" for name, x in tensors.items() if x.device.type != "cpu"]
    if elsewhere:
        reasons.append(f"C++ kernels take CPU tensors, got {', '.join(elsewhere)}")
    return reasons


def triton_reasons(tensors: dict[str, Tensor]) -> list[str]:
    """Reasons common to all ops why Triton cannot take these tensors."""
    reasons = []
    if not _triton_installed:
        reasons.append("triton is not installed")
    elsewhere = [f"{name} on {x.device}" for name, x in tensors.items() if x.device.type != "cuda"]
    if elsewhere and not _interpreting:
        reasons.append(f"Triton kernels take GPU tensors (or TRITON_INTERPRET=1), got {', '.join(elsewhere)}")
    return reasons


def automatic_backend(reasons: Callable[[str], list[str]]) -> str:
    """The backend that ``auto`` takes: C++ or Triton, whichever device the tensors are on, else the reference.

    Args:
        reasons: backend name -> reasons why that backend declines these arguments (empty: it takes them).

    Raises:
        ImportError: the extension is present and failed to load (the loader's own error).
    """
    if _extension_error is not None:
        raise _extension_error
    if not reasons("cpp"):
        return "cpp"
    # The interpreter is for tests: it runs on CPU tensors only when Triton is asked for by name.
    return "triton" if torch.cuda.is_available() and not reasons("triton") else "reference"


def refuse(op: str, backend: str, reasons: list[str]) -> None:
    """Raises ValueError with all reasons why a backend that was asked for by name declines, if there are any."""
    if reasons:
        raise ValueError(f"{op}: backend {backend!r} declines: " + "; ".join(reasons))


def choose_overload(op: str, reasons: Callable[[str], list[str]]) -> Callable[..., Any]:
    """The overload of ``torch.ops.xtg.<op>`` that runs now; ``reasons`` as for ``automatic_backend``.

    Under forward mode or a transform of torch.func: the op in plain PyTorch.

    Raises:
        ValueError: a backend was asked for by name and declines; the message shows every reason.
        ImportError: the extension is present and failed to load (the loader's own error).
    """
    name = _backend
    if name in ("auto", "varlen"):
        name = automatic_backend(reasons)
    else:
        refuse(op, name, reasons(name))
    if op in _differentiable and is_transformed():
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"{op}: torch.compile cannot trace forward mode or torch.func through it; leave out torch.compile there"
            )
        return _plain[op]
    packet = getattr(torch.ops.xtg, op)
    return {"reference": packet.reference, "cpp": packet.default, "triton": packet.triton}[name]


def is_transformed() -> bool:
    """Whether a level of forward mode (torch.autograd.forward_ad) is open or a transform of torch.func is at work.

    An op of torch.library drops tangents without a word, and torch.func cannot differentiate it.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


OVERLOADS = ("default", "reference", "triton")


def _lazy(target: str) -> Callable[..., Any]:
    """A function that imports ``module:function`` when first called: importing xtg_kernels never imports Triton."""
    module, function = target.split(":")

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return call


def register_op(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    triton: str | None,
    fake: Callable[..., Any],
    plain: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> None:
    """Enters one op into torch.library: its overloads, kernels, fake kernel and FLOP formula.

    Args:
        name: op name in namespace xtg.
        schema: arguments and returns, as in csrc/ops.cpp (used where the extension is not built; a test compares them).
        reference: the kernel in plain PyTorch.
        triton: ``module:function`` of the Triton kernel, or None where plain PyTorch serves on the GPU too.
        fake: shapes and dtypes of the outputs.
        plain: what PyTorch is to differentiate, where that is not the reference as it is.
        flops: formula for torch.utils.flop_counter, called with the raw arguments and ``out_val``.
    """
    if _extension is None:
        _fragment.define(name + schema)
        _fragment.impl(name, reference, "CPU")
    triton_kernel = reference if triton is None else _lazy(triton)
    _fragment.impl(name, triton_kernel, "CUDA")
    _plain[name] = plain or reference
    for overload, kernel in (("reference", reference), ("triton", triton_kernel)):
        _fragment.define(f"{name}.{overload}{schema}")
        _fragment.impl(f"{name}.{overload}", kernel, "CompositeExplicitAutograd")
    for qualname in overload_names(name):
        torch.library.register_fake(qualname, fake, lib=_fragment)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.xtg, name), get_raw=True)(flops)


def no_flops(*args: Any, **kwargs: Any) -> int:
    """The FLOP formula of an op without products: 0, as FlopCounterMode counts."""
    return 0


def overload_names(name: str) -> list[str]:
    """Qualified names of an op's overloads, as torch.library takes them."""
    return [f"xtg::{name}" if overload == "default" else f"xtg::{name}.{overload}" for overload in OVERLOADS]


def register_autograd(
    name: str, setup_context: Callable[..., None], backward: Callable[[Any], Callable[..., Any]]
) -> None:
    """Autograd of an op: ``backward(op)`` makes the backward that calls the backward op ``op`` of the same overload."""
    _differentiable.add(name)
    for overload, qualname in zip(OVERLOADS, overload_names(name), strict=True):
        backward_op = getattr(getattr(torch.ops.xtg, name + "_backward"), overload)
        formula = backward(_differentiable_op(backward_op, _plain[name + "_backward"]))
        torch.library.register_autograd(qualname, formula, setup_context=setup_context, lib=_fragment)


def _differentiable_op(op: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A backward op that can be differentiated itself, for which it saves its arguments with create_graph=True only."""

    def call(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            return plain(*args)
        return _ByPlain.apply(op, plain, *args) if torch.is_grad_enabled() else op(*args)

    return call


class _ByPlain(torch.autograd.Function):
    """An op, whose derivative is that of what it is in plain PyTorch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, plain: Callable[..., Any], *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.plain, *args = inputs
        ctx.others = [None if isinstance(x, Tensor) else x for x in args]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in args))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        args = [other if x is None else x for other, x in zip(ctx.others, ctx.saved_tensors, strict=True)]
        return None, None, *pull_back(ctx.plain, args, ctx.needs_input_grad[2:], grads)


def pull_back(
    function: Callable[..., Any], args: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of a function in plain PyTorch to those of its arguments that are needed (None for the others).

    Args:
        function: returns a tensor or a tuple of tensors.
        args: its arguments.
        needed: for each argument, whether its gradient is.
        grads: the gradient of each tensor that it returns.
    """
    chosen = [i for i, need in enumerate(needed) if need]
    if not chosen:
        return (None,) * len(args)

    def of_chosen(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(chosen, tensors, strict=True))
        out = function(*(given.get(i, x) for i, x in enumerate(args)))
        return out if isinstance(out, tuple) else (out,)

    with torch.autocast(args[chosen[0]].device.type, enabled=False):
        pull: Callable[..., tuple[Tensor, ...]] = torch.func.vjp(of_chosen, *(args[i] for i in chosen))[1]
        found = dict(zip(chosen, pull(tuple(grads)), strict=True))
    return tuple(found.get(i) for i in range(len(args)))


def register_autocast(
    name: str, dtype: torch.dtype | None, *, tensors: int | None = None, instead_of_float16: torch.dtype | None = None
) -> None:
    """Autocast rule of an op: floating tensors, float64 excepted, go to ``dtype`` (None: the dtype of autocast).

    Args:
        name: op name in namespace xtg.
        dtype: where they go.
        tensors: only so many of the first arguments go there (None: all; 0: nothing is cast, autocast is only off
            inside the op).
        instead_of_float16: where they go instead of float16.
    """
    plain = _plain[name]
    of_plain = {}
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        for overload, qualname in zip(OVERLOADS, overload_names(name), strict=True):
            op = getattr(getattr(torch.ops.xtg, name), overload)
            kernel = _autocast_kernel(op, device_type, dtype, tensors, instead_of_float16)
            _fragment.impl(qualname.removeprefix("xtg::"), kernel, key)
        of_plain[device_type] = _autocast_kernel(plain, device_type, dtype, tensors, instead_of_float16)

    def under_autocast(x: Tensor, *args: Any) -> Any:
        in_use = x.device.type in of_plain and torch.is_autocast_enabled(x.device.type)
        return (of_plain[x.device.type] if in_use else plain)(x, *args)

    _plain[name] = under_autocast


def _autocast_kernel(
    op: Any, device_type: str, dtype: torch.dtype | None, tensors: int | None, instead_of_float16: torch.dtype | None
) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        target = torch.get_autocast_dtype(device_type) if dtype is None else dtype
        if target == torch.float16 and instead_of_float16 is not None:
            target = instead_of_float16

        def in_target(x: Any) -> Any:
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
                return x.to(target)
            return x

        args = (*(in_target(x) for x in args[:tensors]), *(args[len(args[:tensors]) :]))
        with torch.autocast(device_type, enabled=False):
            return op(*args)

    return kernel
