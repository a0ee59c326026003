"""masked_decoder_gather: the decoder's input rows, gene row + encoded, masked or zero row, written in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from xtg_kernels import checks, dispatch
from xtg_kernels.ops.masked_decoder_gather import library

__all__ = ["masked_decoder_gather"]


def masked_decoder_gather(
    table: Tensor,
    zero_row: Tensor,
    mask_row: Tensor,
    encoded: Tensor,
    cu_seqlens: Tensor,
    gene_ids: Tensor,
    masked_ids: Tensor | None,
    masked_cu_seqlens: Tensor | None,
    *,
    out_genes: Tensor | None = None,
    out_cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A row for every gene of every cell: ``table[g]`` plus the row that says what is known of gene g in the cell.

    The input of xTrimoGene's decoder (Gong et al. 2023, arXiv 2311.15156) with its linear bridge W moved in front of
    the gather, which is exact: ``W (x + gene_row) + b = (W gene_row + b) + W x``. Row g of cell c is::

        table[g] + encoded[t]    where a token t of cell c has gene_ids[t] == g
        table[g] + mask_row      where g is among the masked genes of cell c
        table[g] + zero_row      for every other gene

    Args:
        table: (num_genes, dim), one dtype of float32, bfloat16, float16 (float64: reference backend) for all rows.
        zero_row, mask_row: (dim,).
        encoded: (total_nnz, dim), the encoder's output after W.
        cu_seqlens: (batch + 1,) int32, starts at 0, non-decreasing; cell c owns tokens cu_seqlens[c]:cu_seqlens[c + 1].
        gene_ids: (total_nnz,) int32 or int64, rows of table, strictly ascending in each cell.
        masked_ids, masked_cu_seqlens: (total_masked,) and (batch + 1,), in the same form: the masked genes of each
            cell; None, None where no gene is masked.
        out_genes, out_cu_seqlens: (total_out,) and (batch + 1,), in the same form: only these genes of each cell.

    Returns:
        (batch, num_genes, dim), or (total_out, dim) with out_genes; zero in rows past out_cu_seqlens[-1]. Gradients go
        to table, zero_row, mask_row and encoded (zero in tokens past cu_seqlens[-1] and in those that no row is of).
        FLOPs: none, it only adds.

    Raises:
        TypeError: not a tensor, or a wrong dtype. ValueError: a wrong shape or device, bad cu_seqlens, ids outside the
        table or not ascending, a gene both masked and encoded (on a GPU the values are looked at with XTG_DEBUG=1 only,
        and mask_row wins), or a backend asked for by name that declines (all its reasons are shown).
    """
    checks.check_tensor("table", table, ("num_genes", "dim"))
    checks.check_floating("table", table)
    num_genes, dim = table.shape
    if num_genes < 1 or dim < 1:
        raise ValueError(f"table: expected at least one gene and one channel, got shape {tuple(table.shape)}")
    rows: dict[str, tuple[Tensor, tuple[int | str, ...]]] = {
        "zero_row": (zero_row, (dim,)),
        "mask_row": (mask_row, (dim,)),
        "encoded": (encoded, ("total_nnz", dim)),
    }
    for name, (x, shape) in rows.items():
        checks.check_tensor(name, x, shape, table)
        checks.check_floating(name, x, table.dtype)
    checks.check_tensor("gene_ids", gene_ids, (encoded.shape[0],), table)
    _check_genes("gene_ids", gene_ids, "cu_seqlens", cu_seqlens, "total_nnz", table, None)
    batch = cu_seqlens.shape[0] - 1
    if _given("masked_ids", masked_ids, "masked_cu_seqlens", masked_cu_seqlens):
        _check_genes("masked_ids", masked_ids, "masked_cu_seqlens", masked_cu_seqlens, "total_masked", table, batch)
        _check_no_overlap(gene_ids, cu_seqlens, masked_ids, masked_cu_seqlens, num_genes)
    if _given("out_genes", out_genes, "out_cu_seqlens", out_cu_seqlens):
        _check_genes("out_genes", out_genes, "out_cu_seqlens", out_cu_seqlens, "total_out", table, batch)
    op = dispatch.choose_overload(
        "masked_decoder_gather", lambda backend: library.not_supported_reasons(backend, table)
    )
    return op(
        table, zero_row, mask_row, encoded, cu_seqlens, gene_ids, masked_ids, masked_cu_seqlens, out_genes,
        out_cu_seqlens,
    )  # fmt: skip


def _given(ids_name: str, ids: Tensor | None, cu_name: str, cu_seqlens: Tensor | None) -> bool:
    if (ids is None) != (cu_seqlens is None):
        missing = ids_name if ids is None else cu_name
        raise ValueError(f"{missing}: expected together with the other of {ids_name} and {cu_name}, got None")
    return ids is not None


def _check_genes(
    name: str, ids: object, cu_name: str, cu_seqlens: object, total: str, table: Tensor, batch: int | None
) -> None:
    """Genes of each cell: shape, dtype, and where they can be read bounds and order."""
    ids = checks.check_tensor(name, ids, (total,), table)
    checks.check_ids_dtype(name, ids)
    checks.check_cu_seqlens(cu_seqlens, table, ids.shape[0], name=cu_name, total=total)
    assert isinstance(cu_seqlens, Tensor)
    if batch is not None and cu_seqlens.shape[0] != batch + 1:
        raise ValueError(f"{cu_name}: expected the {batch + 1} entries of cu_seqlens, got {cu_seqlens.shape[0]}")
    checks.check_ascending_ids(name, ids, cu_seqlens, table.shape[0], "table")


def _check_no_overlap(
    gene_ids: Tensor, cu_seqlens: Tensor, masked_ids: Tensor | None, masked_cu_seqlens: Tensor | None, num_genes: int
) -> None:
    assert masked_ids is not None
    assert masked_cu_seqlens is not None
    if not checks.values_are_readable(gene_ids):
        return
    encoded, masked = (
        _numbered(ids, bounds, num_genes) for ids, bounds in ((gene_ids, cu_seqlens), (masked_ids, masked_cu_seqlens))
    )
    both = masked[torch.isin(masked, encoded)]
    if both.numel():
        cell, gene = divmod(int(both[0]), num_genes)
        raise ValueError(f"masked_ids: expected genes that are not in gene_ids, got gene {gene} of cell {cell} in both")


def _numbered(ids: Tensor, cu_seqlens: Tensor, num_genes: int) -> Tensor:
    """cell * num_genes + gene of every entry in use."""
    cells = torch.arange(cu_seqlens.numel() - 1, device=ids.device).repeat_interleave(cu_seqlens.diff())
    return cells * num_genes + ids[: cells.numel()]
