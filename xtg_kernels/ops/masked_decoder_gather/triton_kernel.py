"""Triton backend of masked_decoder_gather: table[g] + (encoded[t] | mask_row | zero_row), forward and backward.

The source of every output row (a token, mask_row, zero_row, or none in slack rows) is found first, one number a row, by
binary searches in the ascending ids of its cell. Then one pass writes the rows, or in the backward reads their
gradients. A program's rows are a block of genes of one cell, cells next to each other in the grid, so that the table
comes from memory once and then from the cache.

The backward owns a block of genes and walks over the cells in order: a row of the table's gradient has one owner, the
token's row is handed on, and zero_row and mask_row are summed in parts that depend on shapes alone and then added in
order. So there are no atomics, and the same bits every time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtg_kernels.triton_launch import LaunchConfigs

_configs = LaunchConfigs("masked_decoder_gather", Path(__file__).with_name("configs.json"))
# Upper bound on the parts of zero_row's and mask_row's gradient where only asked genes have rows.
_ROW_CHUNKS = 1024
# Sources that are no token.
_ZERO_ROW, _MASK_ROW, _NO_ROW = (tl.constexpr(-1 - i) for i in range(3))


@triton.jit
def _first_from(values, low, high, wanted, steps):
    """First index in [low, high) of the ascending values that is not below wanted, else high."""
    for _ in range(steps):
        searching = low < high
        middle = (low + high) // 2
        below = tl.load(values + middle, mask=searching, other=0) < wanted
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
    return low


@triton.jit
def _find(ids, cu_seqlens, cell, gene, in_use, steps):
    """Position of the gene among the ids of its cell, or -1."""
    start = tl.load(cu_seqlens + cell, mask=in_use, other=0)
    end = tl.load(cu_seqlens + cell + 1, mask=in_use, other=0)
    place = _first_from(ids, start, end, gene, steps)
    found = tl.load(ids + place, mask=place < end, other=-1) == gene
    return tl.where(found & (place < end), place, -1)


@triton.jit(do_not_specialize=["batch_size", "num_rows", "num_genes", "steps"])
def _source_kernel(
    source,
    cu_seqlens,
    gene_ids,
    masked_cu_seqlens,
    masked_ids,
    out_cu_seqlens,
    out_genes,
    batch_size,
    num_rows,
    num_genes,
    steps,
    HAS_MASKED: tl.constexpr,
    HAS_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Source of each of a block of output rows; steps is enough for the binary search of any of the lists."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_use = row < num_rows
    if HAS_OUT:
        # The cell of a row is the number of cells that end at or before it.
        cell = _first_from(out_cu_seqlens + 1, tl.zeros_like(row), tl.zeros_like(row) + batch_size, row + 1, steps)
        in_use = in_use & (cell < batch_size)
        gene = tl.load(out_genes + row, mask=in_use, other=0).to(tl.int64)
    else:
        cell = row // num_genes
        gene = row % num_genes
    found = _find(gene_ids, cu_seqlens, cell, gene, in_use, steps)
    result = tl.where(found >= 0, found, _ZERO_ROW)
    if HAS_MASKED:
        result = tl.where(_find(masked_ids, masked_cu_seqlens, cell, gene, in_use, steps) >= 0, _MASK_ROW, result)
    tl.store(source + row, tl.where(in_use, result, _NO_ROW), mask=row < num_rows)


@triton.jit
def _rows_and_genes(out_genes, batch_size, num_rows, num_genes, HAS_OUT: tl.constexpr, BLOCK_R: tl.constexpr):
    """Output rows of this program, their genes, and whether they exist."""
    program = tl.program_id(0)
    if HAS_OUT:
        row = program.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        exists = row < num_rows
        gene = tl.load(out_genes + row, mask=exists, other=0).to(tl.int64)
    else:
        cell = program % batch_size
        gene = (program // batch_size).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        exists = gene < num_genes
        row = cell.to(tl.int64) * num_genes + gene
    return row, gene, exists


@triton.jit
def _tile(pointer, row, dims, DIM: tl.constexpr):
    # DIM is a constant, so the compiler knows how rows are aligned and takes 16 bytes at a time where it can.
    return pointer + row[:, None] * DIM + dims[None, :]


@triton.jit(do_not_specialize=["batch_size", "num_rows", "num_genes"])
def _forward_kernel(
    table,
    zero_row,
    mask_row,
    encoded,
    source,
    out_genes,
    out,
    batch_size,
    num_rows,
    num_genes,
    HAS_OUT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, gene, exists = _rows_and_genes(out_genes, batch_size, num_rows, num_genes, HAS_OUT, BLOCK_R)
    origin = tl.load(source + row, mask=exists, other=_NO_ROW).to(tl.int64)
    in_use, is_token = origin != _NO_ROW, origin >= 0
    for first in tl.static_range(0, DIM, BLOCK_D):
        dims = first + tl.arange(0, BLOCK_D)
        in_row = dims < DIM
        gene_rows = tl.load(_tile(table, gene, dims, DIM), mask=in_use[:, None] & in_row[None, :], other=0.0)
        tokens = tl.load(_tile(encoded, origin, dims, DIM), mask=is_token[:, None] & in_row[None, :], other=0.0)
        zero = tl.load(zero_row + dims, mask=in_row, other=0.0).to(tl.float32)
        mask = tl.load(mask_row + dims, mask=in_row, other=0.0).to(tl.float32)
        known = tl.where((origin == _MASK_ROW)[:, None], mask[None, :], zero[None, :])
        added = tl.where(is_token[:, None], tokens.to(tl.float32), known)
        rows = tl.where(in_use[:, None], gene_rows.to(tl.float32) + added, 0.0)
        tl.store(_tile(out, row, dims, DIM), rows.to(out.dtype.element_ty), mask=exists[:, None] & in_row[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_genes", "steps"])
def _backward_kernel(
    grad_out,
    source,
    grad_table,
    grad_encoded,
    partial_sums,
    num_rows,
    num_genes,
    steps,
    HAS_OUT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of genes in all cells (HAS_OUT: a chunk of steps blocks of rows), one block of channels."""
    part = tl.program_id(0) // tl.cdiv(DIM, BLOCK_D)
    dims = tl.program_id(0) % tl.cdiv(DIM, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = dims < DIM
    genes = part.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    grad_genes = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    grad_zero = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    grad_mask = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for step in range(steps):
        if HAS_OUT:
            row = (part.to(tl.int64) * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
            exists = row < num_rows
        else:
            row = tl.cast(step, tl.int64) * num_genes + genes
            exists = genes < num_genes
        origin = tl.load(source + row, mask=exists, other=_NO_ROW).to(tl.int64)
        in_use = (origin != _NO_ROW)[:, None] & in_row[None, :]
        stored = tl.load(_tile(grad_out, row, dims, DIM), mask=in_use, other=0.0)
        tl.store(_tile(grad_encoded, origin, dims, DIM), stored, mask=(origin >= 0)[:, None] & in_row[None, :])
        grad_rows = stored.to(tl.float32)
        if not HAS_OUT:
            grad_genes += grad_rows
        grad_zero += tl.where((origin == _ZERO_ROW)[:, None], grad_rows, 0.0)
        grad_mask += tl.where((origin == _MASK_ROW)[:, None], grad_rows, 0.0)
    if not HAS_OUT:
        tl.store(
            _tile(grad_table, genes, dims, DIM),
            grad_genes.to(grad_table.dtype.element_ty),
            mask=(genes < num_genes)[:, None] & in_row[None, :],
        )
    partial_sums += part.to(tl.int64) * 2 * DIM
    tl.store(partial_sums + dims, tl.sum(grad_zero, 0), mask=in_row)
    tl.store(partial_sums + DIM + dims, tl.sum(grad_mask, 0), mask=in_row)


@triton.jit
def _grad_table_kernel(
    grad_out,
    row_order,
    first_row,
    grad_table,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of the table, one block of channels: grad_out summed over the rows that ask for the gene, in order."""
    gene = (tl.program_id(0) // tl.cdiv(DIM, BLOCK_D)).to(tl.int64)
    dims = tl.program_id(0) % tl.cdiv(DIM, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(first_row + gene)
    count = (tl.load(first_row + gene + 1) - first).to(tl.int32)
    grad_gene = tl.zeros((BLOCK_D,), tl.float32)
    for block in range(0, tl.cdiv(count, BLOCK_R)):
        position = block * BLOCK_R + tl.arange(0, BLOCK_R)
        rows = tl.load(row_order + first + position, mask=position < count, other=0)
        mask = (position < count)[:, None] & (dims < DIM)[None, :]
        grad_rows = tl.load(_tile(grad_out, rows, dims, DIM), mask=mask, other=0.0)
        grad_gene += tl.sum(grad_rows.to(tl.float32), 0)
    tl.store(grad_table + gene * DIM + dims, grad_gene.to(grad_table.dtype.element_ty), mask=dims < DIM)


def _launch_config(kernel: str, rows: Tensor) -> dict[str, Any]:
    """What the kernels take for rows of this dtype and width; a block of channels divides the width where it can."""
    dim = rows.shape[-1]
    config = _configs(kernel, rows.dtype, min(max(triton.next_power_of_2(dim), 64), 256), rows.device)
    block_d = config["BLOCK_D"]
    while block_d > 64 and dim % block_d:
        block_d //= 2
    return {**config, "BLOCK_D": block_d, "DIM": dim}


def _sources(
    cu_seqlens: Tensor,
    gene_ids: Tensor,
    masked_ids: Tensor | None,
    masked_cu_seqlens: Tensor | None,
    out_genes: Tensor | None,
    out_cu_seqlens: Tensor | None,
    rows: Tensor,
    num_genes: int,
) -> Tensor:
    """(rows,) int32: token of each output row, _ZERO_ROW, _MASK_ROW, or _NO_ROW in slack rows."""
    batch_size = cu_seqlens.numel() - 1
    num_rows = batch_size * num_genes if out_genes is None else out_genes.numel()
    source = torch.empty((num_rows,), dtype=torch.int32, device=cu_seqlens.device)
    indices = [cu_seqlens, gene_ids, masked_cu_seqlens, masked_ids, out_cu_seqlens, out_genes]
    longest = max(x.numel() for x in indices if x is not None)
    config = _configs("source", rows.dtype, 64, rows.device)
    _source_kernel[(triton.cdiv(num_rows, config["BLOCK"]),)](
        source,
        *(cu_seqlens if x is None else x.contiguous() for x in indices),
        batch_size,
        num_rows,
        num_genes,
        longest.bit_length(),
        HAS_MASKED=masked_ids is not None,
        HAS_OUT=out_genes is not None,
        **config,
    )
    return source


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
    """Rows of all genes of every cell, or of the asked ones.

    Args:
        table, zero_row, mask_row, encoded: (num_genes, dim), (dim,), (dim,), (total_nnz, dim), one dtype of float32,
            bfloat16 and float16.
        cu_seqlens, gene_ids: (batch + 1,) int32 and (total_nnz,) int32 or int64, ascending in each cell; so are
            masked_cu_seqlens, masked_ids and out_cu_seqlens, out_genes, or both None.

    Returns:
        (batch, num_genes, dim) or (total_out, dim) in the dtype of table, zero in slack rows. Sums are float32.
    """
    batch_size, (num_genes, dim) = cu_seqlens.numel() - 1, table.shape
    shape = (batch_size, num_genes, dim) if out_genes is None else (out_genes.numel(), dim)
    out = torch.empty(shape, dtype=table.dtype, device=table.device)
    if out.numel() == 0:
        return out
    config = _launch_config("forward", table)
    with torch.cuda.device_of(table):
        source = _sources(
            cu_seqlens, gene_ids, masked_ids, masked_cu_seqlens, out_genes, out_cu_seqlens, table, num_genes
        )
        if out_genes is None:
            programs = batch_size * triton.cdiv(num_genes, config["BLOCK_R"])
        else:
            programs = triton.cdiv(source.numel(), config["BLOCK_R"])
        _forward_kernel[(programs,)](
            table.contiguous(),
            zero_row.contiguous(),
            mask_row.contiguous(),
            encoded.contiguous(),
            source,
            source if out_genes is None else out_genes.contiguous(),
            out,
            batch_size,
            source.numel(),
            num_genes,
            HAS_OUT=out_genes is not None,
            **config,
        )
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
    """Gradients of `forward` to table, zero_row, mask_row and encoded, in the dtype of grad_out; slack is not read."""
    dim, total_nnz = grad_out.shape[-1], gene_ids.numel()
    grad_encoded = grad_out.new_zeros((total_nnz, dim))
    if grad_out.numel() == 0:
        return grad_out.new_zeros((num_genes, dim)), grad_out.new_zeros(dim), grad_out.new_zeros(dim), grad_encoded
    grad_out = grad_out.contiguous()
    grad_table = torch.empty((num_genes, dim), dtype=grad_out.dtype, device=grad_out.device)
    config = _launch_config("backward", grad_out)
    with torch.cuda.device_of(grad_out):
        source = _sources(
            cu_seqlens, gene_ids, masked_ids, masked_cu_seqlens, out_genes, out_cu_seqlens, grad_out, num_genes
        )
        parts, steps = triton.cdiv(num_genes, config["BLOCK_R"]), cu_seqlens.numel() - 1
        if out_genes is not None:
            blocks = triton.cdiv(source.numel(), config["BLOCK_R"])
            steps = triton.cdiv(blocks, _ROW_CHUNKS)
            parts = triton.cdiv(blocks, steps)
        dim_blocks = triton.cdiv(dim, config["BLOCK_D"])
        partial_sums = torch.empty((parts, 2, dim), dtype=torch.float32, device=grad_out.device)
        _backward_kernel[(parts * dim_blocks,)](
            grad_out,
            source,
            grad_table,
            grad_encoded,
            partial_sums,
            source.numel(),
            num_genes,
            steps,
            HAS_OUT=out_genes is not None,
            **config,
        )
        if out_genes is not None:
            # Rows sorted by gene (stably, so in the order of cells within a gene; slack rows last).
            genes = torch.where(source == _NO_ROW.value, num_genes, out_genes)
            sorted_genes, row_order = torch.sort(genes, stable=True)
            first_row = torch.searchsorted(
                sorted_genes, torch.arange(num_genes + 1, dtype=genes.dtype, device=genes.device)
            )
            config = _launch_config("grad_table", grad_out)
            programs = num_genes * triton.cdiv(dim, config["BLOCK_D"])
            _grad_table_kernel[(programs,)](grad_out, row_order, first_row, grad_table, **config)
    grad_zero_row, grad_mask_row = (partial.sum(0).to(grad_out.dtype) for partial in partial_sums.unbind(1))
    return grad_table, grad_zero_row, grad_mask_row, grad_encoded
