"""Triton kernel of dropout, in the interpreter where there is no GPU: the bits of the reference in every form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.interpreter import bf16_interpreter
from tests.xtg_kernels.test_dropout import DTYPES, SEED, assert_kept_up_to_its_bits, ids, random
from xtg_kernels import dropout, use_backend
from xtg_kernels.ops.dropout import dropout_backward
from xtg_kernels.ops.dropout.reference import kept

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    with np.errstate(all="ignore"), bf16_interpreter() if DEVICE == "cpu" else nullcontext():
        yield


def _forms(backend: str, device: str, *tensors: Tensor) -> list[Tensor]:
    """Dropout alone, after ReLU, and with a residual; gradients of each."""
    x, residual, grad_out, row_ids = (tensor.to(device) for tensor in tensors)
    x.requires_grad_()
    residual.requires_grad_()
    mask = (0.3, row_ids, SEED.to(device), 2**32 - 1)
    with use_backend(backend):
        alone, relu, total = dropout(x, *mask), dropout(x, *mask, relu=True), dropout(x, *mask, residual=residual)
        narrow = grad_out.to(x.dtype)
        found = [*torch.autograd.grad(total, (x, residual), grad_out)]
        found += [torch.autograd.grad(out, x, narrow)[0] for out in (alone, relu)]
        found += [alone, relu, total, dropout_backward(narrow, *mask, out=relu)]
    return [out.detach().cpu() for out in found]


@pytest.mark.parametrize("dim", [5, 128, 200])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_bits_of_the_reference(dtypes: tuple[torch.dtype, torch.dtype], dim: int) -> None:
    """19 rows are two blocks of them; the ids need all 64 bits."""
    dtype, wide = dtypes
    tensors = (random(19, dim, dtype), random(19, dim, wide, 1), random(19, dim, wide, 2), ids(19))
    for got, want in zip(_forms("triton", DEVICE, *tensors), _forms("reference", "cpu", *tensors), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_a_channel_is_kept_while_p_is_at_most_its_bits() -> None:
    with use_backend("triton"):
        assert_kept_up_to_its_bits(DEVICE)


def test_what_is_dropped_is_not_seen() -> None:
    mask = kept(ids(20), SEED, 0, 0.5, 48)
    x = torch.where(mask, 1.0, math.nan).to(DEVICE)
    with use_backend("triton"):
        assert torch.equal(dropout(x, 0.5, ids(20).to(DEVICE), SEED.to(DEVICE)).cpu(), torch.where(mask, 2.0, 0.0))
        every = dropout(torch.full_like(x, math.nan), 0.5, ids(20).to(DEVICE), SEED.to(DEVICE), relu=True)
    assert torch.equal(every.isnan().cpu(), mask)


def test_edges() -> None:
    with use_backend("triton"):
        for shape in ((0, 7), (3, 0)):
            out = dropout(torch.ones(shape, device=DEVICE), 0.1, ids(shape[0]).to(DEVICE), SEED.to(DEVICE))
            assert out.shape == shape
        x, row_ids, seed = random(4, 50).to(DEVICE), ids(4).to(DEVICE), SEED.to(DEVICE)
        assert torch.equal(dropout(x, 0.0, row_ids, seed), x)
        assert not dropout(x, 1.0, row_ids, seed).any()
