"""Reference of expression_embedding: plain PyTorch, any dtype, any device, written to be read.

Auto-discretization (xTrimoGene, arXiv 2311.15156): a value is a softmax mixture of learned bin rows,
    hidden = LeakyReLU(w1 * value + b1)        logits = alpha * hidden + w2 hidden + b2
    bin_weights = softmax(logits)              row = bin_weights @ bin_table  (+ gene_table[gene id])
The tiled kernels (csrc/cpu/expression_embedding.h, triton_kernel.py) do this for a block of values at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAKY_SLOPE = 0.1


def _compute_dtype(bin_table: Tensor) -> torch.dtype:
    return torch.float64 if bin_table.dtype == torch.float64 else torch.float32


def distinct_index(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(total_nnz,) int32: position of the first token of the same segment with the same bits; -1 in slack rows."""
    total = values.numel()
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).long()
    position = torch.arange(total, device=values.device)
    segment = torch.searchsorted(cu_seqlens[1:].long(), position, right=True)
    _, group = torch.unique(torch.stack([segment, bits]), dim=1, return_inverse=True)
    first = torch.full_like(position, total).scatter_reduce(0, group, position, "amin")
    in_segment = position < cu_seqlens[-1]
    return torch.where(in_segment, first[group], -1).int()


def _distinct_rows(values: Tensor, distinct: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in use, the first token of each distinct value, and for each token in use the row of its value."""
    position = torch.arange(values.numel(), device=values.device)
    if distinct is None:
        return position, position, position
    distinct = distinct.long()
    in_use = torch.nonzero(distinct >= 0).squeeze(1)
    is_first = distinct == position
    row = is_first.cumsum(0) - 1
    return in_use, torch.nonzero(is_first).squeeze(1), row[distinct[in_use]]


def forward(
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
) -> Tensor:
    """(total_nnz, d) in the dtype of bin_table."""
    dtype = _compute_dtype(bin_table)
    w1, b1, w2, b2, table = (x.to(dtype) for x in (w1, b1, w2, b2, bin_table))
    in_use, first, row = _distinct_rows(values, distinct_index)
    hidden = torch.nn.functional.leaky_relu(values[first].to(dtype)[:, None] * w1 + b1, LEAKY_SLOPE)
    logits = alpha * hidden + hidden @ w2.T + b2
    bin_weights = logits.softmax(dim=-1)
    rows = (bin_weights @ table)[row]
    if gene_ids is not None and gene_table is not None:
        rows = rows + gene_table[gene_ids[in_use].long()].to(dtype)
    out = rows.new_zeros((values.numel(), bin_table.shape[1]))
    out[in_use] = rows
    return out.to(bin_table.dtype)


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to values, w1, b1, w2, b2, bin_table and gene_table (empty where not asked for or not given)."""
    dtype = _compute_dtype(bin_table)
    params = (w1, b1, w2, b2, bin_table)
    w1, b1, w2, b2, table = (x.to(dtype) for x in params)
    in_use, first, row = _distinct_rows(values, distinct_index)
    grad_rows = grad_out[in_use].to(dtype)
    x = values[first].to(dtype)[:, None]
    pre = x * w1 + b1
    slope = torch.where(pre > 0, 1.0, LEAKY_SLOPE).to(dtype)
    hidden = pre * slope
    logits = alpha * hidden + hidden @ w2.T + b2
    bin_weights = logits.softmax(dim=-1)

    # Tokens of one value share a row: their gradients are summed before the parameters see them.
    grad_row = grad_rows.new_zeros((first.numel(), table.shape[1])).index_add_(0, row, grad_rows)
    grad_bin_table = bin_weights.T @ grad_row
    grad_bin_weights = grad_row @ table.T
    grad_logits = bin_weights * (grad_bin_weights - (grad_bin_weights * bin_weights).sum(dim=-1, keepdim=True))
    grad_b2 = grad_logits.sum(dim=0)
    grad_w2 = grad_logits.T @ hidden
    grad_pre = slope * (alpha * grad_logits + grad_logits @ w2)
    grad_b1 = grad_pre.sum(dim=0)
    grad_w1 = (grad_pre * x).sum(dim=0)

    grad_values = values.new_empty((0,))
    if needs_values_grad:
        # d row / d value, pushed forward once per distinct value, then one dot product per token.
        d_hidden = slope * w1
        d_logits = alpha * d_hidden + d_hidden @ w2.T
        d_weights = bin_weights * (d_logits - (d_logits * bin_weights).sum(dim=-1, keepdim=True))
        d_row = d_weights @ table
        grad_values = values.new_zeros(values.shape)
        grad_values[in_use] = (grad_rows * d_row[row]).sum(dim=-1).to(values.dtype)

    grad_gene_table = bin_table.new_empty((0,))
    if gene_ids is not None and gene_table is not None:
        summed = torch.zeros(gene_table.shape, dtype=dtype, device=grad_out.device)
        grad_gene_table = summed.index_add_(0, gene_ids[in_use].long(), grad_rows).to(gene_table.dtype)
    grads = (grad_w1, grad_b1, grad_w2, grad_b2, grad_bin_table)
    grad_w1, grad_b1, grad_w2, grad_b2, grad_bin_table = (g.to(p.dtype) for g, p in zip(grads, params, strict=True))
    return grad_values, grad_w1, grad_b1, grad_w2, grad_b2, grad_bin_table, grad_gene_table
