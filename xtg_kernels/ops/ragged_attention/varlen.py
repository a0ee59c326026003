"""Backend "varlen" of ragged_attention: torch.nn.attention.varlen, the FlashAttention that PyTorch brings along.

Chosen by name only, to compare with and for whoever prefers it: its gradients may differ from run to run in the last
bits, and its results with the batch. Rows past cu_seqlens[-1], which it leaves unwritten, are zeroed here: a pass over
the output and one over each gradient.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor


def torch_varlen() -> Any:
    """torch.nn.attention.varlen, or None; imported when it is asked for, since it brings all of torch._dynamo along."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return varlen


def _lacking(module: Any) -> list[str]:
    """What a torch.nn.attention.varlen lacks that is needed here, if anything."""
    if module is None:
        return [f"torch {torch.__version__} has no torch.nn.attention.varlen (2.11 has)"]
    parameters = inspect.signature(module.varlen_attn).parameters
    return [
        f"varlen_attn of torch {torch.__version__} takes no {name} (2.11's does)"
        for name in ("return_aux", "scale")
        if name not in parameters
    ]


@functools.cache
def _torch_lacks() -> tuple[str, ...]:
    return tuple(_lacking(torch_varlen()))


def not_supported_reasons(q: Tensor, k: Tensor, v: Tensor, lse_with_gradient: bool = False) -> list[str]:
    """Every reason why torch's varlen attention cannot take these arguments; empty when it can."""
    reasons = list(_torch_lacks())
    tensors = {"q": q, "k": k, "v": v}
    elsewhere = [f"{name} on {x.device}" for name, x in tensors.items() if x.device.type != "cuda"]
    if elsewhere:
        reasons.append(f"varlen takes GPU tensors, got {', '.join(elsewhere)}")
    elif torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        name = torch.cuda.get_device_name(q.device)
        reasons.append(f"{name} has compute capability below 8.0, the least that FlashAttention runs on")
    dtype = _autocast_dtype(q)
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype is {dtype}, varlen takes bfloat16 and float16")
    head_dim = q.shape[2]
    if head_dim % 8 or head_dim > 256:
        reasons.append(f"head_dim is {head_dim}, varlen takes multiples of 8 up to 256")
    strided = [name for name, x in tensors.items() if x.stride(2) != 1]
    if strided:
        reasons.append(f"the last dimension of {', '.join(strided)} is not contiguous (use contiguous())")
    if lse_with_gradient:
        reasons.append("return_lse with gradients: softmax_lse of varlen is not differentiable (use torch.no_grad())")
    return reasons


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out and softmax_lse as ragged_attention's; out is differentiable, softmax_lse is not."""
    dtype = _autocast_dtype(q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    slack = (torch.arange(q.shape[0], device=q.device) >= cu_seqlens[-1])[:, None, None]
    if q.shape[0] == 0 or cu_seqlens.shape[0] == 1 or max_seqlen == 0:
        nothing = (q + k + v).masked_fill(torch.ones_like(slack), 0.0)
        return nothing, torch.zeros((q.shape[1], q.shape[0]), device=q.device)
    q, k, v = (_ZeroGradient.apply(x, slack) for x in (q, k, v))
    module = torch_varlen()
    out, softmax_lse = module.varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        return_aux=module.AuxRequest(lse=True),
        scale=softmax_scale,
    )
    return out.masked_fill(slack, 0.0), softmax_lse.detach().masked_fill(slack[None, :, 0, 0], 0.0)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would have the op take x."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


class _ZeroGradient(torch.autograd.Function):
    """x as it is, with a gradient that is zero in the marked rows, whatever comes back there; differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(x, rows)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, rows = ctx.saved_tensors
        return _NoDerivative.apply(grads[0].masked_fill(rows, 0.0), x), None


class _NoDerivative(torch.autograd.Function):
    """grad as it is. It depends on x, which torch's varlen attention does not say: its derivative is refused."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            'ragged_attention: backend "varlen" has first derivatives only; take second ones under use_backend("auto")'
        )
