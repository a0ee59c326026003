"""Triton kernels of masked_head and masked_mse, in the interpreter where there is no GPU: error, edges, determinism.

The interpreter shows what the kernels compute; it shows nothing of speed, of races or of the launcher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.interpreter import bf16_interpreter
from tests.xtg_kernels.ragged_cases import relative_error
from tests.xtg_kernels.test_masked_head import (
    CHOICES,
    OPS,
    PARAMS,
    chosen_rows,
    exactly,
    gradient_like,
    leaves_of,
    plain,
    target_of,
)
from tests.xtg_kernels.test_masked_head import run as run_on_cpu
from xtg_kernels import masked_head, masked_mse, use_backend
from xtg_kernels.ops.masked_head import triton_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    # NumPy warns of the inf and NaN that masked elements of a tile run into; a GPU does not.
    with use_backend("triton"), np.errstate(all="ignore"), bf16_interpreter() if DEVICE == "cpu" else nullcontext():
        yield


def run(op: str, leaves: list[Tensor], rows: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients, brought back to the CPU."""
    x, *params = moved = [leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves]
    rows = None if rows is None else rows.to(DEVICE)
    if op == "masked_head":
        out = masked_head(x, rows, *params)
    else:
        target = target_of(len(x) if rows is None else len(rows)).to(DEVICE)
        out = masked_mse(x, rows, target, *params, reduction=op.split()[1])
    grads = torch.autograd.grad(out, moved, gradient_like(out.cpu()).to(DEVICE))
    return out.detach().cpu(), [grad.cpu() for grad in grads]


@pytest.mark.parametrize("op", ["masked_head", "masked_mse mean"])
@pytest.mark.parametrize("dim", [192, 33])
@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_error_within_plain_pytorch(dtype: torch.dtype, param_dtype: torch.dtype, dim: int, op: str) -> None:
    """Error against float64: at most 2x (forward) and 3x (gradients) that of plain PyTorch in the same dtype."""
    leaves = leaves_of(120, dim, dtype, param_dtype)
    rows = torch.randint(0, 120, (100,), generator=torch.Generator().manual_seed(2))
    out, grads = run(op, leaves, rows)
    plain_out, plain_grads = run_on_cpu(plain, op, leaves, rows, dtype)
    exact_out, exact_grads = exactly(op, leaves, rows)
    floor = 2e-6 if dtype == torch.float32 else 0.0
    assert relative_error(out, exact_out) <= max(2 * relative_error(plain_out, exact_out), floor)
    for what, leaf, got, plain_grad, want in zip(("x", *PARAMS), leaves, grads, plain_grads, exact_grads, strict=True):
        assert got.dtype == leaf.dtype
        assert relative_error(got, want) <= max(3 * relative_error(plain_grad, want), floor), what


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_choices_of_rows(choice: list[int] | None, op: str) -> None:
    """Rows that are not chosen hold NaN: none is read, and their gradient is zero."""
    leaves = leaves_of(40, 20)
    idle = sorted(set(range(40)) - set(range(40) if choice is None else choice))
    exact_out, exact = exactly(op, leaves, chosen_rows(choice))
    with torch.no_grad():
        leaves[0][idle] = math.nan
    out, grads = run(op, leaves, chosen_rows(choice, torch.int32))
    assert not grads[0][idle].any()
    if choice == []:
        assert torch.equal(out.isnan(), exact_out.isnan())
        assert out.nan_to_num().sum() == 0
        assert not any(g.any() for g in grads)
        return
    # One prediction is a sum over channels that may cancel: it is judged by the size of such sums.
    assert (out - exact_out).abs().max() <= 2e-6 * max(exact_out.abs().max().item(), 20**0.5)
    for what, got, want in zip(("x", *PARAMS), grads, exact, strict=True):
        assert relative_error(got, want) < 5e-6, what


def test_wide_rows() -> None:
    """One row a program, and the last width that the kernels take."""
    for dim in (600, 4096):
        leaves = leaves_of(5, dim)
        rows = torch.tensor([4, 0, 4])
        out, grads = run("masked_head", leaves, rows)
        exact_out, exact = exactly("masked_head", leaves, rows)
        assert relative_error(out, exact_out) < 2e-6
        for what, got, want in zip(("x", *PARAMS), grads, exact, strict=True):
            assert relative_error(got, want) < 2e-6, what
    x, *params = (leaf.detach().to(DEVICE) for leaf in leaves_of(2, 4097))
    with pytest.raises(ValueError, match="dim is 4097, Triton kernels take at most 4096"):
        masked_head(x, None, *params)


@pytest.mark.parametrize("op", ["masked_head", "masked_mse sum"])
def test_same_bits_again_and_alone(op: str) -> None:
    """A second run gives the same bits; a row's prediction and gradient do not depend on what else is chosen."""
    leaves = leaves_of(90, 24, torch.bfloat16, torch.float32)
    rows = torch.randint(0, 90, (150,), generator=torch.Generator().manual_seed(2))
    out, grads = run(op, leaves, rows)
    again, again_grads = run(op, leaves, rows)
    for a, b in zip((out, *grads), (again, *again_grads), strict=True):
        assert torch.equal(a, b)
    if op == "masked_head":
        few = rows[[3, 70, 149]]
        positions = torch.isin(rows, few).nonzero()[:, 0]
        x, *params = (leaf.detach().to(DEVICE) for leaf in leaves)
        predictions = masked_head(x.requires_grad_(), rows[positions].to(DEVICE), *params)
        assert torch.equal(predictions.cpu(), out[positions])
        (grad,) = torch.autograd.grad(predictions, x, gradient_like(out)[positions].to(DEVICE))
        assert torch.equal(grad.cpu()[few], grads[0][few])


def test_more_blocks_than_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few chunks of several blocks each give the gradients of many chunks of one block."""
    leaves = leaves_of(150, 20)
    for rows in (None, torch.randint(0, 150, (140,), generator=torch.Generator().manual_seed(2))):
        _, many = run("masked_mse sum", leaves, rows)
        with monkeypatch.context() as patch:
            patch.setattr(triton_kernel, "_CHUNKS", 3)
            _, few = run("masked_mse sum", leaves, rows)
        assert torch.equal(few[0], many[0])
        for what, a, b in zip(PARAMS, few[1:], many[1:], strict=True):
            assert relative_error(a, b) < 2e-6, what


def test_layouts() -> None:
    """Rows of a wider tensor, transposed x, strided parameters and an expanded gradient."""
    x, *params = (leaf.detach().to(DEVICE) for leaf in leaves_of(30, 12))
    rows = torch.tensor([4, 29, 4, 0], device=DEVICE)
    strided = [torch.stack([p, p], 1)[:, 0].requires_grad_() for p in params]
    leaves = [x.requires_grad_(), *(p.requires_grad_() for p in params)]
    out = masked_head(x, rows, *params)
    want = torch.autograd.grad(out, leaves, torch.ones(4, device=DEVICE))
    for view in (torch.cat([x, x], 1)[:, :12], x.mT.contiguous().mT):
        view = view.detach().requires_grad_()
        assert not view.is_contiguous()
        got_out = masked_head(view, torch.stack([rows, rows], 1)[:, 0], *strided)
        got = torch.autograd.grad(got_out, [view, *strided], torch.ones(1, device=DEVICE).expand(4))
        for a, b in zip((got_out, *got), (out, *want), strict=True):
            assert torch.equal(a, b)


def test_opcheck() -> None:
    leaves = [leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves_of(20, 12)]
    for rows in (torch.tensor([3, 19, 3], device=DEVICE), None):
        target = target_of(20 if rows is None else 3).to(DEVICE)
        x, *params = leaves
        torch.library.opcheck(torch.ops.xtg.masked_head.triton, (x, rows, *params, 1e-5))
        torch.library.opcheck(torch.ops.xtg.masked_mse.triton, (x, rows, target, *params, 1e-5, True))
        x, *params = (leaf.detach() for leaf in leaves)
        torch.library.opcheck(torch.ops.xtg.masked_head_backward.triton, (target, x, rows, *params, 1e-5))
        loss_grad = torch.tensor(0.5, device=DEVICE)
        arguments = (loss_grad, x, rows, target, *params, 1e-5, False)
        torch.library.opcheck(torch.ops.xtg.masked_mse_backward.triton, arguments)
