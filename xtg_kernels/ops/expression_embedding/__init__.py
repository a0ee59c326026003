"""expression_embedding: auto-discretized embedding of expression values, fused with the gene-table row."""

from __future__ import annotations

import torch
from torch import Tensor

from xtg_kernels import checks, dispatch
from xtg_kernels.ops.expression_embedding import library

__all__ = ["distinct_index", "expression_embedding"]


def distinct_index(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """For each token, the position of the first token of the same segment with the same value (the same bits).

    Args:
        values: (total_nnz,) float32 or float64.
        cu_seqlens: (batch + 1,) int32.

    Returns:
        (total_nnz,) int32; -1 in slack rows past cu_seqlens[-1].

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, or bad cu_seqlens.
    """
    checks.check_tensor("values", values, ("total_nnz",))
    _check_values_dtype(values)
    checks.check_cu_seqlens(cu_seqlens, values, values.shape[0])
    op = dispatch.choose_overload(
        "distinct_index", lambda backend: library.distinct_not_supported_reasons(backend, values)
    )
    return op(values, cu_seqlens)


def expression_embedding(
    values: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    bin_table: Tensor,
    *,
    alpha: float = 1.0,
    gene_ids: Tensor | None = None,
    gene_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    distinct_index: Tensor | None = None,
) -> Tensor:
    """Embeds expression values by auto-discretization and adds the gene's row; no (total_nnz, num_bins) tensor is made.

    Auto-discretization of xTrimoGene (Gong et al. 2023, arXiv 2311.15156), per value v::

        hidden = LeakyReLU_0.1(w1 * v + b1)
        logits = alpha * hidden + w2 @ hidden + b2
        out    = softmax(logits) @ bin_table  (+ gene_table[gene_id])

    Args:
        values: (total_nnz,) float32 (float64: reference backend), log-normalised expression.
        w1, b1, b2: (num_bins,).  w2: (num_bins, num_bins), as torch.nn.Linear holds it.
        bin_table: (num_bins, dim); its dtype (float32, bfloat16, float16; float64: reference) is that of all weights
            and of the output. The arithmetic is float32.
        alpha: the residual factor on ``hidden``.
        gene_ids: (total_nnz,) int32 or int64, rows of gene_table; given together with gene_table (rows, dim).
        cu_seqlens: (batch + 1,) int32: equal values of a segment are computed once, with the same bits as without it.
        distinct_index: (total_nnz,) int32 from ``distinct_index`` or a RaggedBatch, instead of cu_seqlens: the same,
            without looking for equal values again.

    Returns:
        (total_nnz, dim); zero in slack rows (past cu_seqlens[-1], or where distinct_index is negative). Gradients go to
        values, w1, b1, w2, b2, bin_table and gene_table. FLOPs forward: 2 * (b + b * b + b * dim) per distinct value.

    Raises:
        TypeError: not a tensor, or a wrong dtype. ValueError: a wrong shape or device, a gene id outside gene_table,
        bad cu_seqlens, or a backend asked for by name that declines (all its reasons are shown).
    """
    total = checks.check_tensor("values", values, ("total_nnz",)).shape[0]
    _check_values_dtype(values)
    checks.check_tensor("bin_table", bin_table, ("num_bins", "dim"), values)
    checks.check_floating("bin_table", bin_table)
    bins, dim = bin_table.shape
    if bins < 1 or dim < 1:
        raise ValueError(f"bin_table: expected at least one bin and one channel, got shape {tuple(bin_table.shape)}")
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "w1": (w1, (bins,)),
        "b1": (b1, (bins,)),
        "w2": (w2, (bins, bins)),
        "b2": (b2, (bins,)),
    }
    for name, (x, shape) in shapes.items():
        checks.check_tensor(name, x, shape, values)
        checks.check_floating(name, x, bin_table.dtype)
    if cu_seqlens is not None and distinct_index is not None:
        raise ValueError("distinct_index: expected only one of cu_seqlens and distinct_index, got both")
    if cu_seqlens is not None:
        distinct_index = _distinct_index(values.detach(), cu_seqlens)
    elif distinct_index is not None:
        checks.check_tensor("distinct_index", distinct_index, (total,), values)
        if distinct_index.dtype != torch.int32:
            raise TypeError(f"distinct_index: expected dtype torch.int32, got {distinct_index.dtype}")
    if (gene_ids is None) != (gene_table is None):
        missing = "gene_ids" if gene_ids is None else "gene_table"
        raise ValueError(f"{missing}: expected together with the other of gene_ids and gene_table, got None")
    if gene_ids is not None and gene_table is not None:
        checks.check_tensor("gene_ids", gene_ids, (total,), values)
        checks.check_ids_dtype("gene_ids", gene_ids)
        checks.check_tensor("gene_table", gene_table, ("rows", dim), values)
        checks.check_floating("gene_table", gene_table, bin_table.dtype)
        checks.check_gene_ids(gene_ids, gene_table.shape[0], None if distinct_index is None else distinct_index >= 0)
    op = dispatch.choose_overload(
        "expression_embedding", lambda backend: library.not_supported_reasons(backend, values, bin_table)
    )
    return op(values, w1, b1, w2, b2, bin_table, float(alpha), gene_ids, gene_table, distinct_index)


_distinct_index = distinct_index  # the argument of that name hides the function above


def _check_values_dtype(values: Tensor) -> None:
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"values: expected dtype torch.float32 (or float64), got {values.dtype}")
