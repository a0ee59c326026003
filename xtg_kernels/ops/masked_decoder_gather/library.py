"""torch.library registration of masked_decoder_gather: schema, fake, autograd, autocast, FLOPs, backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from xtg_kernels import dispatch
from xtg_kernels.ops.masked_decoder_gather import reference

_INDICES = (
    "Tensor cu_seqlens, Tensor gene_ids, Tensor? masked_ids, Tensor? masked_cu_seqlens, Tensor? out_genes,"
    " Tensor? out_cu_seqlens"
)
SCHEMA = f"(Tensor table, Tensor zero_row, Tensor mask_row, Tensor encoded, {_INDICES}) -> Tensor"
BACKWARD_SCHEMA = (
    f"(Tensor grad_out, {_INDICES}, SymInt num_genes)"
    " -> (Tensor grad_table, Tensor grad_zero_row, Tensor grad_mask_row, Tensor grad_encoded)"
)


def not_supported_reasons(backend: str, table: Tensor) -> list[str]:
    """Every reason why ``backend`` declines these arguments; empty when it takes them."""
    if backend == "reference":
        return []
    find = dispatch.cpp_reasons if backend == "cpp" else dispatch.triton_reasons
    reasons = find({"table": table})
    if table.dtype.itemsize == 8:
        reasons.append(
            f"dtype is {table.dtype}, the kernels take float32, bfloat16 and float16 (the reference takes it)"
        )
    return reasons


def _fake(
    table: Tensor,
    zero_row: Tensor,
    mask_row: Tensor,
    encoded: Tensor,
    cu_seqlens: Tensor,
    gene_ids: Tensor,
    masked_ids: Tensor | None,
    masked_cu_seqlens: Tensor | None,
    out_genes: Tensor | None,
    out_cu_seqlens: Tensor | None,
) -> Tensor:
    if out_genes is None:
        return table.new_empty((cu_seqlens.shape[0] - 1, *table.shape))
    return table.new_empty((out_genes.shape[0], table.shape[1]))


def _fake_backward(
    grad_out: Tensor,
    cu_seqlens: Tensor,
    gene_ids: Tensor,
    masked_ids: Tensor | None,
    masked_cu_seqlens: Tensor | None,
    out_genes: Tensor | None,
    out_cu_seqlens: Tensor | None,
    num_genes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dim = grad_out.shape[-1]
    return (
        grad_out.new_empty((num_genes, dim)),
        grad_out.new_empty((dim,)),
        grad_out.new_empty((dim,)),
        grad_out.new_empty((gene_ids.shape[0], dim)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, _, _, _, *indices = inputs
    ctx.num_genes = table.shape[0]
    ctx.save_for_backward(*indices)


def _backward(op: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return *op(grad_out, *ctx.saved_tensors, ctx.num_genes), *[None] * 6

    return backward


_HOME = "xtg_kernels.ops.masked_decoder_gather.triton_kernel"
dispatch.register_op(
    "masked_decoder_gather",
    SCHEMA,
    reference=reference.forward,
    triton=f"{_HOME}:forward",
    fake=_fake,
    flops=dispatch.no_flops,
)
dispatch.register_op(
    "masked_decoder_gather_backward",
    BACKWARD_SCHEMA,
    reference=reference.backward,
    triton=f"{_HOME}:backward",
    fake=_fake_backward,
    flops=dispatch.no_flops,
)
dispatch.register_autograd("masked_decoder_gather", _setup_context, _backward)
dispatch.register_autocast("masked_decoder_gather", None)
