"""Backend "varlen" of ragged_attention: it says why it declines, and holds to the op's contract.

There is no GPU to run it on: torch's function is replaced by one that keeps its habits, garbage in rows that belong to
no segment included. benchmarks.gpu checks the real one against float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

import xtg_kernels
from tests.xtg_kernels.ragged_cases import cu_seqlens_of
from xtg_kernels import info, ragged_attention, use_backend
from xtg_kernels.ops.ragged_attention import varlen


class _Fake(torch.autograd.Function):
    """The reference with NaN in slack rows of everything that it returns."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> Any:
        out, lse = torch.ops.xtg.ragged_attention.reference(q, k, v, cu, longest, scale)
        ctx.save_for_backward(q, k, v, out, lse, cu)
        ctx.longest, ctx.scale = longest, scale
        out, lse = nan_in_slack(out, cu), nan_in_slack(lse.T, cu).T
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *saved, cu = ctx.saved_tensors
        backward = torch.ops.xtg.ragged_attention_backward.reference
        got = backward(grads[0], None, *saved, cu, ctx.longest, ctx.scale)
        return *(nan_in_slack(grad, cu) for grad in got), None, None, None


def nan_in_slack(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    slack = torch.arange(x.shape[0]) >= cu_seqlens[-1]
    return x.masked_fill(slack.view(-1, *[1] * (x.dim() - 1)), math.nan)


def fake_varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, return_aux: Any, scale: Any
) -> tuple[Tensor, Tensor]:
    assert cu_q is cu_k
    assert max_q == max_k
    assert max_q > 0
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert return_aux.lse
    return _Fake.apply(q, k, v, cu_q, max_q, scale)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backend varlen with the stand-in, which takes CPU tensors."""
    reasons = varlen.not_supported_reasons

    def but_for_the_device(*args: Any) -> list[str]:
        return [reason for reason in reasons(*args) if not reason.startswith("varlen takes GPU tensors")]

    monkeypatch.setattr(varlen, "not_supported_reasons", but_for_the_device)
    monkeypatch.setattr(torch_varlen, "varlen_attn", fake_varlen_attn)
    with use_backend("varlen"):
        yield


def qkv_of(rows: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    packed = torch.randn((rows, 3, 2, 16), generator=generator).to(dtype)
    return [x.clone().requires_grad_() for x in packed.unbind(1)]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("lengths", [[5, 0, 7], [], [0, 0]], ids=["cells", "no cells", "empty cells"])
def test_same_as_the_reference_with_zeros_in_slack_rows(lengths: list[int], slack: int) -> None:
    qkv = qkv_of(sum(lengths) + slack)
    cu_seqlens, longest = cu_seqlens_of(lengths), max(lengths, default=0)
    grad_out = torch.randn(qkv[0].shape).bfloat16()
    out = ragged_attention(*qkv, cu_seqlens, longest, softmax_scale=0.3)
    grads = torch.autograd.grad(out, qkv, grad_out)
    with use_backend("reference"):
        want = ragged_attention(*qkv, cu_seqlens, longest, softmax_scale=0.3)
        want_grads = torch.autograd.grad(want, qkv, grad_out)
    for got, wanted in zip((out, *grads), (want, *want_grads), strict=True):
        assert torch.equal(got, wanted)
    with torch.no_grad():
        _, lse = ragged_attention(*qkv, cu_seqlens, longest, return_lse=True)
        with use_backend("reference"):
            _, want_lse = ragged_attention(*qkv, cu_seqlens, longest, return_lse=True)
    assert torch.equal(lse, want_lse)


@pytest.mark.usefixtures("on_cpu")
def test_autocast_chooses_the_dtype() -> None:
    q, k, v = qkv_of(12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ragged_attention(q, k, v, cu_seqlens_of([12]), 12)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.usefixtures("on_cpu")
def test_under_compile() -> None:
    q, k, v = (x.detach() for x in qkv_of(12))
    cu_seqlens = cu_seqlens_of([5, 7])

    def call() -> Tensor:
        return ragged_attention(q, k, v, cu_seqlens, 7)

    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(), call())


@pytest.mark.usefixtures("on_cpu")
def test_second_derivatives_are_refused() -> None:
    """Also of a sum, whose gradient is a constant: torch would drop the term without a word."""
    q, k, v = qkv_of(12)
    cu_seqlens = cu_seqlens_of([5, 7])
    (grad,) = torch.autograd.grad(ragged_attention(q, k, v, cu_seqlens, 7).sum(), q, create_graph=True)
    penalised = grad.square().sum() + q.sum()
    with pytest.raises(NotImplementedError, match=r'"varlen" has first derivatives only; .* use_backend\("auto"\)'):
        penalised.backward()


@pytest.mark.usefixtures("on_cpu")
def test_forward_mode_is_the_reference() -> None:
    q, k, v = (x.detach() for x in qkv_of(12))
    cu_seqlens = cu_seqlens_of([5, 7])

    def call(q: Tensor) -> Tensor:
        return ragged_attention(q, k, v, cu_seqlens, 7)

    got = torch.func.jvp(call, (q,), (q,))
    with use_backend("reference"):
        want = torch.func.jvp(call, (q,), (q,))
    assert want[1].any()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("on_cpu")
def test_other_ops_run_as_usual() -> None:
    weights = [torch.randn(shape) for shape in ((5,), (5,), (5, 5), (5,), (5, 3))]
    values = torch.rand(4)
    got = xtg_kernels.expression_embedding(values, *weights)
    with use_backend("auto"):
        assert torch.equal(got, xtg_kernels.expression_embedding(values, *weights))


def test_every_reason_is_told() -> None:
    q = torch.zeros((4, 20, 2), requires_grad=True).transpose(1, 2)
    with use_backend("varlen"), pytest.raises(ValueError, match="backend 'varlen' declines: ") as told:
        ragged_attention(q, q, q, cu_seqlens_of([4]), 4, return_lse=True)
    for reason in (
        "varlen takes GPU tensors, got q on cpu, k on cpu, v on cpu",
        "dtype is torch.float32, varlen takes bfloat16 and float16",
        "head_dim is 20, varlen takes multiples of 8 up to 256",
        "the last dimension of q, k, v is not contiguous",
        "return_lse with gradients",
    ):
        assert reason in str(told.value)
    fine = torch.zeros((4, 2, 16), dtype=torch.float16)
    assert varlen.not_supported_reasons(fine, fine, fine) == [
        "varlen takes GPU tensors, got q on cpu, k on cpu, v on cpu"
    ]


def test_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = torch.zeros((4, 2, 16), dtype=torch.float16)
    assert "has no torch.nn.attention.varlen" in varlen._lacking(None)[0]
    older = varlen._lacking(SimpleNamespace(varlen_attn=lambda q, k, v, cu_q, cu_k, max_q, max_k: None))
    assert ["takes no return_aux" in older[0], "takes no scale" in older[1]] == [True, True]
    assert varlen._lacking(torch_varlen) == []
    monkeypatch.setattr(varlen, "_torch_lacks", lambda: tuple(older))
    assert varlen.not_supported_reasons(fine, fine, fine)[:2] == older


def test_info_shows_the_reasons() -> None:
    declined = info.info()["ops"]["cpu"]
    assert any("GPU tensors" in reason for reason in declined["ragged_attention bfloat16"]["declined"]["varlen"])
    assert "varlen" not in declined["expression_embedding bfloat16"]["declined"]
