"""Triton backend of expression_embedding: value -> bin_weights -> bin_table row (+ gene row), forward and backward.

    hidden = LeakyReLU(w1 * value + b1)        logits = alpha * hidden + w2 hidden + b2
    bin_weights = softmax(logits)              row = bin_weights @ bin_table  (+ gene_table[gene id])

A program owns a block of tokens; hidden, logits and bin_weights live in registers only, padded to a power of two of
bins. The backward recomputes them. Parameter gradients are sums over tokens: the tokens are cut into a number of chunks
that depends on total_nnz alone, each chunk has accumulators of its own, and the chunks are added in order. A row of
gene_table has one owner, which adds its tokens in batch order. So there are no atomics, and the same bits every time.

Each token is computed on its own: distinct_index is used only to see which rows are slack (negative).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtg_kernels.triton_launch import LaunchConfigs

_configs = LaunchConfigs("expression_embedding", Path(__file__).with_name("configs.json"))
# Upper bounds on the chunks of the two parameter-gradient kernels: enough programs to fill a large GPU, few enough that
# the partial sums stay small (the table's partial sums are num_bins x dim each, and its grid also covers dim).
_WEIGHT_CHUNKS = 256
_TABLE_CHUNKS = 64


@triton.jit
def _load_rows(pointers, mask):
    """Operand tile of a dot; zero where masked."""
    tile = tl.load(pointers, mask=mask, other=0.0)
    if tile.dtype == tl.float32:
        # A float32 dot is a loop of FMAs over operands in shared memory. Without a barrier behind a new tile the
        # compiler reads the other, loop-invariant operand into registers ahead of it, and spills.
        tl.debug_barrier()
    return tile


@triton.jit
def _load_tokens(values, distinct_index, token_start, total_nnz, HAS_DISTINCT: tl.constexpr, BLOCK_T: tl.constexpr):
    """Token numbers, values (0 where not in use) and whether each token exists and is no slack row."""
    tokens = token_start + tl.arange(0, BLOCK_T)
    in_use = tokens < total_nnz
    if HAS_DISTINCT:
        in_use = in_use & (tl.load(distinct_index + tokens, mask=in_use, other=-1) >= 0)
    return tokens, tl.load(values + tokens, mask=in_use, other=0.0), in_use


@triton.jit
def _load_vector(pointer, index, NUM_BINS: tl.constexpr):
    return tl.load(pointer + index, mask=index < NUM_BINS, other=0.0).to(tl.float32)


@triton.jit
def _pre_activation(value, w1, b1, units, NUM_BINS: tl.constexpr):
    """w1 * value + b1, (tokens, units) in float32; zero for units past NUM_BINS."""
    weight, bias = _load_vector(w1, units, NUM_BINS), _load_vector(b1, units, NUM_BINS)
    return value[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def _leaky_slope(pre):
    return tl.where(pre > 0.0, 1.0, 0.1)


@triton.jit
def _bin_weights(
    value,
    w1,
    b1,
    w2,
    b2,
    alpha,
    NUM_BINS: tl.constexpr,
    BIN_BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """bin_weights (tokens, BIN_BLOCK) in float32: 0 for bins past NUM_BINS."""
    bins = tl.arange(0, BIN_BLOCK)
    pre = _pre_activation(value, w1, b1, bins, NUM_BINS)
    logits = alpha * (pre * _leaky_slope(pre)) + _load_vector(b2, bins, NUM_BINS)[None, :]
    for hidden_block in range(0, tl.cdiv(NUM_BINS, BLOCK_H)):
        units = hidden_block * BLOCK_H + tl.arange(0, BLOCK_H)
        pre_block = _pre_activation(value, w1, b1, units, NUM_BINS)
        hidden = pre_block * _leaky_slope(pre_block)
        weight = _load_rows(
            w2 + bins[:, None] * NUM_BINS + units[None, :], (bins < NUM_BINS)[:, None] & (units < NUM_BINS)[None, :]
        )
        high = hidden.to(weight.dtype)
        logits = tl.dot(high, tl.trans(weight), logits, input_precision="ieee")
        if weight.dtype != tl.float32:
            # An error in a logit is a relative error of the weight: keep what rounding hidden to half precision lost.
            low = (hidden - high.to(tl.float32)).to(weight.dtype)
            logits = tl.dot(low, tl.trans(weight), logits)
    logits = tl.where((bins < NUM_BINS)[None, :], logits, float("-inf"))
    row_max = tl.max(logits, 1)
    unnormalised = tl.exp(logits - row_max[:, None])
    return unnormalised / tl.sum(unnormalised, 1)[:, None]


@triton.jit(do_not_specialize=["total_nnz"])
def _forward_kernel(
    values,
    w1,
    b1,
    w2,
    b2,
    bin_table,
    gene_ids,
    gene_table,
    distinct_index,
    out,
    alpha,
    total_nnz,
    dim,
    HAS_GENES: tl.constexpr,
    HAS_DISTINCT: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BIN_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token_start = tl.program_id(0).to(tl.int64) * BLOCK_T
    tokens, value, in_use = _load_tokens(values, distinct_index, token_start, total_nnz, HAS_DISTINCT, BLOCK_T)
    bin_weights = _bin_weights(value, w1, b1, w2, b2, alpha, NUM_BINS, BIN_BLOCK, BLOCK_H)
    bin_weights = bin_weights.to(bin_table.dtype.element_ty)
    bins = tl.arange(0, BIN_BLOCK)
    gene = tokens
    if HAS_GENES:
        gene = tl.load(gene_ids + tokens, mask=in_use, other=0).to(tl.int64)
    for dim_block in range(0, tl.cdiv(dim, BLOCK_D)):
        dims = dim_block * BLOCK_D + tl.arange(0, BLOCK_D)
        table = _load_rows(
            bin_table + bins[:, None] * dim + dims[None, :], (bins < NUM_BINS)[:, None] & (dims < dim)[None, :]
        )
        rows = tl.dot(bin_weights, table, input_precision="ieee")
        if HAS_GENES:
            gene_rows = tl.load(
                gene_table + gene[:, None] * dim + dims[None, :],
                mask=in_use[:, None] & (dims < dim)[None, :],
                other=0.0,
            )
            rows += gene_rows.to(tl.float32)
        rows = tl.where(in_use[:, None], rows, 0.0)
        tl.store(
            out + tokens[:, None] * dim + dims[None, :],
            rows.to(out.dtype.element_ty),
            mask=(tokens < total_nnz)[:, None] & (dims < dim)[None, :],
        )


@triton.jit(do_not_specialize=["total_nnz", "blocks_per_chunk"])
def _grad_bin_table_kernel(
    grad_out,
    values,
    w1,
    b1,
    w2,
    b2,
    distinct_index,
    partial_bin_table,
    alpha,
    total_nnz,
    dim,
    blocks_per_chunk,
    HAS_DISTINCT: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BIN_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_bin_table = bin_weights^T grad_out: one chunk of tokens, one block of dim."""
    chunk = tl.program_id(0)
    bins = tl.arange(0, BIN_BLOCK)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_table = tl.zeros((BIN_BLOCK, BLOCK_D), tl.float32)
    last_block = tl.minimum((chunk + 1) * blocks_per_chunk, tl.cdiv(total_nnz, BLOCK_T))
    for token_block in tl.range(chunk * blocks_per_chunk, last_block, disable_licm=True):
        token_start = tl.cast(token_block, tl.int64) * BLOCK_T
        tokens, value, in_use = _load_tokens(values, distinct_index, token_start, total_nnz, HAS_DISTINCT, BLOCK_T)
        bin_weights = _bin_weights(value, w1, b1, w2, b2, alpha, NUM_BINS, BIN_BLOCK, BLOCK_H)
        grad_rows = _load_rows(
            grad_out + tokens[:, None] * dim + dims[None, :], in_use[:, None] & (dims < dim)[None, :]
        )
        weights = tl.trans(bin_weights.to(grad_rows.dtype))
        grad_table = tl.dot(weights, grad_rows, grad_table, input_precision="ieee")
    tl.store(
        partial_bin_table + (chunk.to(tl.int64) * NUM_BINS + bins)[:, None] * dim + dims[None, :],
        grad_table,
        mask=(bins < NUM_BINS)[:, None] & (dims < dim)[None, :],
    )


@triton.jit(do_not_specialize=["total_nnz", "blocks_per_chunk", "num_chunks"])
def _grad_weights_kernel(
    grad_out,
    values,
    w1,
    b1,
    w2,
    b2,
    bin_table,
    distinct_index,
    partial_values,
    partial_w2,
    partial_vectors,
    alpha,
    total_nnz,
    dim,
    blocks_per_chunk,
    num_chunks,
    NEEDS_VALUES_GRAD: tl.constexpr,
    HAS_DISTINCT: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BIN_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Gradients that pass through the logits: one chunk of tokens, one block of BLOCK_W hidden units.

    The way back from logits to hidden has two arms, w2^T grad_logits and alpha * grad_logits. A program takes the w2
    arm of its own hidden units; the alpha arm, and grad_b2, belong to the first block of units alone.
    partial_vectors (5, num_chunks, NUM_BINS) holds grad_w1, grad_b1 by the w2 arm, the same by the alpha arm, grad_b2.
    """
    chunk = tl.program_id(0)
    unit_block = tl.program_id(1)
    bins = tl.arange(0, BIN_BLOCK)
    units = unit_block * BLOCK_W + tl.arange(0, BLOCK_W)
    grad_w2 = tl.zeros((BIN_BLOCK, BLOCK_W), tl.float32)
    grad_w1 = tl.zeros((BLOCK_W,), tl.float32)
    grad_b1 = tl.zeros((BLOCK_W,), tl.float32)
    grad_w1_alpha = tl.zeros((BIN_BLOCK,), tl.float32)
    grad_b1_alpha = tl.zeros((BIN_BLOCK,), tl.float32)
    grad_b2 = tl.zeros((BIN_BLOCK,), tl.float32)
    last_block = tl.minimum((chunk + 1) * blocks_per_chunk, tl.cdiv(total_nnz, BLOCK_T))
    for token_block in tl.range(chunk * blocks_per_chunk, last_block, disable_licm=True):
        token_start = tl.cast(token_block, tl.int64) * BLOCK_T
        tokens, value, in_use = _load_tokens(values, distinct_index, token_start, total_nnz, HAS_DISTINCT, BLOCK_T)
        grad_bin_weights = tl.zeros((BLOCK_T, BIN_BLOCK), tl.float32)
        for dim_block in range(0, tl.cdiv(dim, BLOCK_D)):
            dims = dim_block * BLOCK_D + tl.arange(0, BLOCK_D)
            grad_rows = _load_rows(
                grad_out + tokens[:, None] * dim + dims[None, :], in_use[:, None] & (dims < dim)[None, :]
            )
            table = _load_rows(
                bin_table + bins[:, None] * dim + dims[None, :], (bins < NUM_BINS)[:, None] & (dims < dim)[None, :]
            )
            grad_bin_weights = tl.dot(grad_rows, tl.trans(table), grad_bin_weights, input_precision="ieee")
        bin_weights = _bin_weights(value, w1, b1, w2, b2, alpha, NUM_BINS, BIN_BLOCK, BLOCK_H)
        # Rows not in use have grad_out = 0, hence grad_logits = 0.
        mean_grad = tl.sum(bin_weights * grad_bin_weights, 1)
        grad_logits = bin_weights * (grad_bin_weights - mean_grad[:, None])

        pre = _pre_activation(value, w1, b1, units, NUM_BINS)
        slope = _leaky_slope(pre)
        rounded = grad_logits.to(w2.dtype.element_ty)
        grad_w2 = tl.dot(tl.trans(rounded), (pre * slope).to(rounded.dtype), grad_w2, input_precision="ieee")
        w2_columns = _load_rows(
            w2 + bins[:, None] * NUM_BINS + units[None, :], (bins < NUM_BINS)[:, None] & (units < NUM_BINS)[None, :]
        )
        grad_pre = slope * tl.dot(rounded, w2_columns, input_precision="ieee")
        grad_w1 += tl.sum(grad_pre * value[:, None], 0)
        grad_b1 += tl.sum(grad_pre, 0)
        grad_value = tl.sum(grad_pre * _load_vector(w1, units, NUM_BINS)[None, :], 1)
        if unit_block == 0:
            pre_alpha = _pre_activation(value, w1, b1, bins, NUM_BINS)
            grad_pre_alpha = _leaky_slope(pre_alpha) * (alpha * grad_logits)
            grad_w1_alpha += tl.sum(grad_pre_alpha * value[:, None], 0)
            grad_b1_alpha += tl.sum(grad_pre_alpha, 0)
            grad_b2 += tl.sum(grad_logits, 0)
            grad_value += tl.sum(grad_pre_alpha * _load_vector(w1, bins, NUM_BINS)[None, :], 1)
        if NEEDS_VALUES_GRAD:
            tl.store(partial_values + unit_block.to(tl.int64) * total_nnz + tokens, grad_value, mask=tokens < total_nnz)

    chunk_offset = chunk.to(tl.int64) * NUM_BINS
    tl.store(
        partial_w2 + (chunk_offset + bins)[:, None] * NUM_BINS + units[None, :],
        grad_w2,
        mask=(bins < NUM_BINS)[:, None] & (units < NUM_BINS)[None, :],
    )
    vector_stride = num_chunks.to(tl.int64) * NUM_BINS
    partial_vectors += chunk_offset
    tl.store(partial_vectors + units, grad_w1, mask=units < NUM_BINS)
    tl.store(partial_vectors + vector_stride + units, grad_b1, mask=units < NUM_BINS)
    if unit_block == 0:
        tl.store(partial_vectors + 2 * vector_stride + bins, grad_w1_alpha, mask=bins < NUM_BINS)
        tl.store(partial_vectors + 3 * vector_stride + bins, grad_b1_alpha, mask=bins < NUM_BINS)
        tl.store(partial_vectors + 4 * vector_stride + bins, grad_b2, mask=bins < NUM_BINS)


@triton.jit
def _grad_gene_table_kernel(
    grad_out,
    token_order,
    first_token,
    grad_gene_table,
    dim,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of gene_table, one block of dim: the sum of grad_out over the row's tokens, in batch order."""
    row = tl.program_id(0)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(first_token + row)
    count = (tl.load(first_token + row + 1) - first).to(tl.int32)
    grad_row = tl.zeros((BLOCK_D,), tl.float32)
    for block in range(0, tl.cdiv(count, BLOCK_T)):
        position = block * BLOCK_T + tl.arange(0, BLOCK_T)
        tokens = tl.load(token_order + first + position, mask=position < count, other=0)
        grad_rows = tl.load(
            grad_out + tokens[:, None] * dim + dims[None, :],
            mask=(position < count)[:, None] & (dims < dim)[None, :],
            other=0.0,
        )
        grad_row += tl.sum(grad_rows.to(tl.float32), 0)
    tl.store(
        grad_gene_table + row.to(tl.int64) * dim + dims, grad_row.to(grad_gene_table.dtype.element_ty), mask=dims < dim
    )


def _bin_block(num_bins: int) -> int:
    """The padded number of bins. Few paddings keep what has to be compiled and tuned small; 100 bins are usual."""
    return next(block for block in (32, 128, 256) if num_bins <= block)


def _chunks(total_nnz: int, block: int, max_chunks: int) -> tuple[int, int]:
    """Number of chunks of tokens, token blocks per chunk; a function of total_nnz alone, so sums keep their order."""
    blocks = triton.cdiv(total_nnz, block)
    blocks_per_chunk = triton.cdiv(blocks, max_chunks)
    return triton.cdiv(blocks, blocks_per_chunk), blocks_per_chunk


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
    """Value embedding (+ gene row) of every token.

    Args:
        values: (total_nnz,) float32.
        w1, b1, b2: (num_bins,); w2: (num_bins, num_bins); bin_table: (num_bins, dim). One dtype, float32, bfloat16 or
            float16; num_bins at most 256.
        alpha: factor of the skip connection from hidden to logits.
        gene_ids, gene_table: (total_nnz,) int32 and (rows, dim), or both None.
        distinct_index: (total_nnz,) int32, negative in slack rows, or None when there are none.

    Returns:
        (total_nnz, dim) in the dtype of bin_table; zero in slack rows. Arithmetic and sums are float32; with bfloat16
        or float16 weights the operands of matrix products have the weights' dtype.
    """
    total_nnz, (num_bins, dim) = values.numel(), bin_table.shape
    values, w1, b1, w2, b2, bin_table = (x.contiguous() for x in (values, w1, b1, w2, b2, bin_table))
    out = torch.empty((total_nnz, dim), dtype=bin_table.dtype, device=values.device)
    if out.numel() == 0:
        return out
    bin_block = _bin_block(num_bins)
    with torch.cuda.device_of(values):
        config = _configs("forward", bin_table.dtype, bin_block, values.device)
        _forward_kernel[(triton.cdiv(total_nnz, config["BLOCK_T"]),)](
            values,
            w1,
            b1,
            w2,
            b2,
            bin_table,
            values if gene_ids is None else gene_ids.contiguous(),
            bin_table if gene_table is None else gene_table.contiguous(),
            values if distinct_index is None else distinct_index.contiguous(),
            out,
            alpha,
            total_nnz,
            dim,
            HAS_GENES=gene_ids is not None,
            HAS_DISTINCT=distinct_index is not None,
            NUM_BINS=num_bins,
            BIN_BLOCK=bin_block,
            **config,
        )
    return out


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
    """Gradients of `forward` to values, w1, b1, w2, b2, bin_table and gene_table, each in its own dtype.

    Args:
        grad_out: (total_nnz, dim), gradient of the output; slack rows are not read.
        needs_values_grad: whether grad_values is wanted; an empty (0,) tensor stands for it if not, as for
            grad_gene_table without a gene_table.
    """
    total_nnz, (num_bins, dim) = values.numel(), bin_table.shape
    params = (w1, b1, w2, b2, bin_table)
    grad_values = values.new_zeros(total_nnz if needs_values_grad else 0)
    grad_gene_table = bin_table.new_empty(0)
    if grad_out.numel() == 0:
        if gene_table is not None:
            grad_gene_table = torch.zeros_like(gene_table)
        grad_w1, grad_b1, grad_w2, grad_b2, grad_bin_table = (torch.zeros_like(x) for x in params)
        return grad_values, grad_w1, grad_b1, grad_w2, grad_b2, grad_bin_table, grad_gene_table

    grad_out, values, w1, b1, w2, b2, bin_table = (x.contiguous() for x in (grad_out, values, *params))
    distinct = values if distinct_index is None else distinct_index.contiguous()
    bin_block = _bin_block(num_bins)
    shape = {
        "HAS_DISTINCT": distinct_index is not None,
        "NUM_BINS": num_bins,
        "BIN_BLOCK": bin_block,
    }
    with torch.cuda.device_of(values):
        config = _configs("grad_bin_table", bin_table.dtype, bin_block, values.device)
        num_chunks, blocks_per_chunk = _chunks(total_nnz, config["BLOCK_T"], _TABLE_CHUNKS)
        partial_bin_table = torch.empty((num_chunks, num_bins, dim), dtype=torch.float32, device=values.device)
        _grad_bin_table_kernel[(num_chunks, triton.cdiv(dim, config["BLOCK_D"]))](
            grad_out,
            values,
            w1,
            b1,
            w2,
            b2,
            distinct,
            partial_bin_table,
            alpha,
            total_nnz,
            dim,
            blocks_per_chunk,
            **shape,
            **config,
        )
        config = _configs("grad_weights", bin_table.dtype, bin_block, values.device)
        num_chunks, blocks_per_chunk = _chunks(total_nnz, config["BLOCK_T"], _WEIGHT_CHUNKS)
        unit_blocks = triton.cdiv(num_bins, config["BLOCK_W"])
        partial_w2 = torch.empty((num_chunks, num_bins, num_bins), dtype=torch.float32, device=values.device)
        partial_vectors = torch.empty((5, num_chunks, num_bins), dtype=torch.float32, device=values.device)
        partial_values = torch.empty((unit_blocks, grad_values.numel()), dtype=torch.float32, device=values.device)
        _grad_weights_kernel[(num_chunks, unit_blocks)](
            grad_out,
            values,
            w1,
            b1,
            w2,
            b2,
            bin_table,
            distinct,
            partial_values,
            partial_w2,
            partial_vectors,
            alpha,
            total_nnz,
            dim,
            blocks_per_chunk,
            num_chunks,
            NEEDS_VALUES_GRAD=needs_values_grad,
            **shape,
            **config,
        )
        if gene_ids is not None and gene_table is not None:
            config = _configs("grad_gene_table", bin_table.dtype, bin_block, values.device)
            grad_gene_table = _grad_gene_table(grad_out, gene_ids, gene_table, distinct_index, config)
    grads = (
        (partial_vectors[0] + partial_vectors[2]).sum(0),
        (partial_vectors[1] + partial_vectors[3]).sum(0),
        partial_w2.sum(0),
        partial_vectors[4].sum(0),
        partial_bin_table.sum(0),
    )
    grad_w1, grad_b1, grad_w2, grad_b2, grad_bin_table = (g.to(p.dtype) for g, p in zip(grads, params, strict=True))
    return partial_values.sum(0), grad_w1, grad_b1, grad_w2, grad_b2, grad_bin_table, grad_gene_table


def _grad_gene_table(
    grad_out: Tensor,
    gene_ids: Tensor,
    gene_table: Tensor,
    distinct_index: Tensor | None,
    config: dict[str, Any],
) -> Tensor:
    """Tokens sorted by gene (stably, so in batch order within a gene; slack rows last), then one owner per row."""
    num_rows, dim = gene_table.shape
    row_of_token = gene_ids if distinct_index is None else torch.where(distinct_index < 0, num_rows, gene_ids)
    sorted_rows, token_order = torch.sort(row_of_token, stable=True)
    rows = torch.arange(num_rows + 1, dtype=sorted_rows.dtype, device=sorted_rows.device)
    first_token = torch.searchsorted(sorted_rows, rows)
    grad_gene_table = torch.empty((num_rows, dim), dtype=gene_table.dtype, device=gene_table.device)
    if num_rows > 0:
        _grad_gene_table_kernel[(num_rows, triton.cdiv(dim, config["BLOCK_D"]))](
            grad_out,
            token_order,
            first_token,
            grad_gene_table,
            dim,
            **config,
        )
    return grad_gene_table
