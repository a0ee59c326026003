"""Reference of masked_decoder_gather: plain PyTorch, any dtype, any device, written to be read.

Row g of cell c is table[g] + added, where added is the encoder's row of the token that holds g, mask_row where g is
masked, and zero_row for every other gene. The kernels (csrc/cpu/masked_decoder_gather.h, triton_kernel.py) find the
source of a row by walking or searching the cell's ascending ids; here a (batch, genes) map of sources is filled.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cell_of(cu_seqlens: Tensor) -> Tensor:
    """(cu_seqlens[-1],) int64: the cell of each entry in use."""
    cells = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return cells.repeat_interleave(cu_seqlens.diff())


def _genes_and_sources(
    cu_seqlens: Tensor,
    gene_ids: Tensor,
    masked_ids: Tensor | None,
    masked_cu_seqlens: Tensor | None,
    out_genes: Tensor | None,
    out_cu_seqlens: Tensor | None,
    num_genes: int,
) -> tuple[Tensor, Tensor]:
    """Gene and source of each output row in use, in order. A source is a token, or one of the two numbers after the
    last: total_nnz for zero_row, total_nnz + 1 for mask_row."""
    batch, total_nnz = cu_seqlens.numel() - 1, gene_ids.numel()
    source = torch.full((batch, num_genes), total_nnz, device=gene_ids.device)
    cell = _cell_of(cu_seqlens)
    source[cell, gene_ids[: cell.numel()].long()] = torch.arange(cell.numel(), device=gene_ids.device)
    if masked_ids is not None and masked_cu_seqlens is not None:
        cell = _cell_of(masked_cu_seqlens)
        source[cell, masked_ids[: cell.numel()].long()] = total_nnz + 1
    if out_genes is None or out_cu_seqlens is None:
        genes = torch.arange(num_genes, device=gene_ids.device).expand(batch, num_genes)
        return genes.reshape(-1), source.reshape(-1)
    cell = _cell_of(out_cu_seqlens)
    genes = out_genes[: cell.numel()].long()
    return genes, source[cell, genes]


def forward(
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
    """(batch, num_genes, dim), or (total_out, dim) with out_genes, in the dtype of table."""
    dtype = _compute_dtype(table)
    num_genes, dim = table.shape
    genes, source = _genes_and_sources(
        cu_seqlens, gene_ids, masked_ids, masked_cu_seqlens, out_genes, out_cu_seqlens, num_genes
    )
    added = torch.cat([encoded, zero_row[None], mask_row[None]])
    rows = (table[genes].to(dtype) + added[source].to(dtype)).to(table.dtype)
    if out_genes is None:
        return rows.view(-1, num_genes, dim)
    out = rows.new_zeros((out_genes.numel(), dim))
    out[: rows.shape[0]] = rows
    return out


def backward(
    grad_out: Tensor,
    cu_seqlens: Tensor,
    gene_ids: Tensor,
    masked_ids: Tensor | None,
    masked_cu_seqlens: Tensor | None,
    out_genes: Tensor | None,
    out_cu_seqlens: Tensor | None,
    num_genes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to table, zero_row, mask_row and encoded."""
    total_nnz, dim = gene_ids.numel(), grad_out.shape[-1]
    genes, source = _genes_and_sources(
        cu_seqlens, gene_ids, masked_ids, masked_cu_seqlens, out_genes, out_cu_seqlens, num_genes
    )
    grad_rows = grad_out.reshape(-1, dim)[: genes.numel()].to(_compute_dtype(grad_out))
    grad_table = grad_rows.new_zeros((num_genes, dim)).index_add_(0, genes, grad_rows)
    grad_zero_row = grad_rows[source == total_nnz].sum(dim=0)
    grad_mask_row = grad_rows[source == total_nnz + 1].sum(dim=0)
    grad_encoded = grad_rows.new_zeros((total_nnz, dim))
    encoded = source < total_nnz
    grad_encoded[source[encoded]] = grad_rows[encoded]
    grad_table, grad_zero_row, grad_mask_row, grad_encoded = (
        g.to(grad_out.dtype) for g in (grad_table, grad_zero_row, grad_mask_row, grad_encoded)
    )
    return grad_table, grad_zero_row, grad_mask_row, grad_encoded
