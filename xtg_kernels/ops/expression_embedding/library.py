"""torch.library registration of expression_embedding and distinct_index: schema, fake, autograd, autocast, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xtg_kernels import dispatch
from xtg_kernels.ops.expression_embedding import reference

_ARGUMENTS = (
    "Tensor values, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor bin_table, float alpha,"
    " Tensor? gene_ids, Tensor? gene_table, Tensor? distinct_index"
)
SCHEMA = f"({_ARGUMENTS}) -> Tensor"
BACKWARD_SCHEMA = (
    f"(Tensor grad_out, {_ARGUMENTS}, bool needs_values_grad) -> (Tensor grad_values, Tensor grad_w1, Tensor grad_b1,"
    " Tensor grad_w2, Tensor grad_b2, Tensor grad_bin_table, Tensor grad_gene_table)"
)
DISTINCT_SCHEMA = "(Tensor values, Tensor cu_seqlens) -> Tensor"
MAX_BINS_TRITON = 256


def not_supported_reasons(backend: str, values: Tensor, bin_table: Tensor) -> list[str]:
    """Every reason why ``backend`` declines these arguments; empty when it takes them."""
    if backend == "reference":
        return []
    tensors = {"values": values, "bin_table": bin_table}
    if backend == "cpp":
        reasons = dispatch.cpp_reasons(tensors)
    else:
        reasons = dispatch.triton_reasons(tensors)
        if bin_table.shape[0] > MAX_BINS_TRITON:
            reasons.append(f"num_bins is {bin_table.shape[0]}, Triton kernels take at most {MAX_BINS_TRITON}")
    for name, x in tensors.items():
        if x.dtype == torch.float64:
            reasons.append(f"{name} is {x.dtype}, the kernels compute in float32 (the reference takes it)")
    return reasons


def distinct_not_supported_reasons(backend: str, values: Tensor) -> list[str]:
    """Every reason why ``backend`` declines to look for equal values; Triton leaves it to plain PyTorch."""
    if backend != "cpp":
        return []
    reasons = dispatch.cpp_reasons({"values": values})
    if values.dtype != torch.float32:
        reasons.append(f"values is {values.dtype}, C++ kernels take float32 (the reference takes it)")
    return reasons


def _fake(values: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, bin_table: Tensor, *args: Any) -> Tensor:
    return bin_table.new_empty((values.shape[0], bin_table.shape[1]))


def _fake_backward(
    grad_out: Tensor,
    values: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    bin_table: Tensor,
    alpha: float,
    gene_ids: Tensor | None,
    gene_table: Tensor | None,
    distinct_index: Tensor | None,
    needs_values_grad: bool,
) -> tuple[Tensor, ...]:
    grad_values = torch.empty_like(values) if needs_values_grad else values.new_empty((0,))
    grad_gene_table = bin_table.new_empty((0,)) if gene_table is None else gene_table.new_empty(gene_table.shape)
    weights = (x.new_empty(x.shape) for x in (w1, b1, w2, b2, bin_table))
    return grad_values, *weights, grad_gene_table


def _fake_distinct(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, w1, b1, w2, b2, bin_table, ctx.alpha, gene_ids, gene_table, distinct = inputs
    ctx.save_for_backward(values, w1, b1, w2, b2, bin_table, gene_ids, gene_table, distinct)


def _backward(op: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *weights, gene_ids, gene_table, distinct = ctx.saved_tensors
        needs_values_grad = ctx.needs_input_grad[0]
        grad_values, *grad_weights, grad_gene_table = op(
            grad_out, *weights, ctx.alpha, gene_ids, gene_table, distinct, needs_values_grad
        )
        return (
            grad_values if needs_values_grad else None,
            *grad_weights,
            None,
            None,
            None if gene_table is None else grad_gene_table,
            None,
        )

    return backward


def _each_by_itself(distinct: Tensor | None) -> Tensor | None:
    """Every token in use as a distinct value: PyTorch would have a shared row depend on the first token alone."""
    if distinct is None:
        return None
    return torch.where(distinct >= 0, torch.arange(distinct.numel(), device=distinct.device), -1)


def _plain(*args: Any) -> Tensor:
    given = [*args]
    given[-1] = _each_by_itself(given[-1])
    return reference.forward(*given)


def _plain_backward(*args: Any) -> tuple[Tensor, ...]:
    given = [*args]
    given[-2] = _each_by_itself(given[-2])
    return reference.backward(*given)


def _distinct_count(values: Tensor, distinct: Tensor | None) -> int:
    if distinct is None:
        return values.numel()
    return int((distinct == torch.arange(values.numel(), device=values.device)).sum())


def _flops(
    values: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    bin_table: Tensor,
    alpha: float,
    gene_ids: Tensor | None,
    gene_table: Tensor | None,
    distinct_index: Tensor | None,
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    """The three linear maps, once per distinct value: 2 (b + b b + b d)."""
    bins, dim = bin_table.shape
    return 2 * (bins + bins * bins + bins * dim) * _distinct_count(values, distinct_index)


def _flops_backward(
    grad_out: Tensor,
    values: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    bin_table: Tensor,
    alpha: float,
    gene_ids: Tensor | None,
    gene_table: Tensor | None,
    distinct_index: Tensor | None,
    needs_values_grad: bool,
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    """Per distinct value: bin weights again 2 (b + b b), the two products of each map backwards 2 (b + 2 b b + 2 b d).

    With the gradient to values, the pushed-forward derivative adds 2 (b b + b d) per distinct value and 2 d per token.
    """
    bins, dim = bin_table.shape
    flops = 2 * (2 * bins + 3 * bins * bins + 2 * bins * dim) * _distinct_count(values, distinct_index)
    if needs_values_grad:
        tokens = values.numel() if distinct_index is None else int((distinct_index >= 0).sum())
        flops += 2 * (bins * bins + bins * dim) * _distinct_count(values, distinct_index) + 2 * dim * tokens
    return flops


_HOME = "xtg_kernels.ops.expression_embedding.triton_kernel"
dispatch.register_op(
    "expression_embedding",
    SCHEMA,
    reference=reference.forward,
    plain=_plain,
    triton=f"{_HOME}:forward",
    fake=_fake,
    flops=_flops,
)
dispatch.register_op(
    "expression_embedding_backward",
    BACKWARD_SCHEMA,
    reference=reference.backward,
    plain=_plain_backward,
    triton=f"{_HOME}:backward",
    fake=_fake_backward,
    flops=_flops_backward,
)
dispatch.register_op(
    "distinct_index", DISTINCT_SCHEMA, reference=reference.distinct_index, triton=None, fake=_fake_distinct
)
dispatch.register_autograd("expression_embedding", _setup_context, _backward)
# Values are log-normalised counts with more digits than a half type holds: under autocast the op stays in float32.
dispatch.register_autocast("expression_embedding", torch.float32)
