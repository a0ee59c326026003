"""Triton backend of ragged_attention: softmax attention inside each segment, forward and backward.

The algorithm is the one of FlashAttention-2 (Dao 2023, arXiv 2307.08691): a program owns one query block of one head
and walks over the key blocks of its segment with an online softmax; the backward walks twice, once per query block
(delta, grad_q, and softmax_lse in base 2) and once per key block (grad_k, grad_v), so that every element has one owner
and one summation order.

Blocks are counted from the first row of their segment, so a segment's result does not depend on its neighbours.
Scores live in base 2 (the scale carries log2 e, and exp2 is what the hardware has); softmax_lse is a natural log.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtg_kernels.triton_launch import LaunchConfigs, block_range, locate_block, work_list

_LOG2_E = math.log2(math.e)
_configs = LaunchConfigs("ragged_attention", Path(__file__).with_name("configs.json"))


@triton.jit
def _tile_mask(block_start, num_rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr):
    rows = block_start + tl.arange(0, BLOCK)
    return (rows < num_rows)[:, None] & (tl.arange(0, HEAD_BLOCK) < HEAD_DIM)[None, :]


@triton.jit
def _tile_pointers(
    segment_pointer,
    block_start,
    row_stride,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    # The block's own offset is 64-bit; offsets inside a tile fit in 32 bits.
    block_pointer = segment_pointer + block_start.to(tl.int64) * row_stride
    pointers = block_pointer + tl.arange(0, BLOCK)[:, None] * row_stride + tl.arange(0, HEAD_BLOCK)[None, :]
    if HEAD_DIM * segment_pointer.dtype.element_ty.primitive_bitwidth % 128 == 0:
        # _aligned has seen to it. The compiler finds it out by itself only when strides are multiples of 16 elements.
        pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


@triton.jit
def _load_tile(
    segment_pointer,
    block_start,
    num_rows,
    row_stride,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """(BLOCK, HEAD_BLOCK) rows of one head, zero past head_dim and (in a tail block) past num_rows."""
    pointers = _tile_pointers(segment_pointer, block_start, row_stride, BLOCK, HEAD_DIM, HEAD_BLOCK)
    if IS_TAIL:
        tile = tl.load(pointers, mask=_tile_mask(block_start, num_rows, BLOCK, HEAD_DIM, HEAD_BLOCK), other=0.0)
    elif HEAD_DIM < HEAD_BLOCK:
        tile = tl.load(pointers, mask=(tl.arange(0, HEAD_BLOCK) < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    if tile.dtype == tl.float32:
        # A float32 dot is a loop of FMAs over operands in shared memory. Without a barrier behind a new tile the
        # compiler reads the other, loop-invariant operand into registers ahead of it, and spills.
        tl.debug_barrier()
    return tile


@triton.jit
def _store_tile(
    segment_pointer,
    block_start,
    num_rows,
    row_stride,
    tile,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    pointers = _tile_pointers(segment_pointer, block_start, row_stride, BLOCK, HEAD_DIM, HEAD_BLOCK)
    mask = _tile_mask(block_start, num_rows, BLOCK, HEAD_DIM, HEAD_BLOCK)
    tl.store(pointers, tile.to(segment_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _attend_key_block(
    query,
    row_max,
    row_sum,
    acc,
    k,
    v,
    key_start,
    num_keys,
    k_row_stride,
    v_row_stride,
    scale_log2,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """One online-softmax step: fold one key block into (row_max, row_sum, acc)."""
    key = _load_tile(k, key_start, num_keys, k_row_stride, BLOCK_K, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    if IS_TAIL:
        scores = tl.where((key_start + tl.arange(0, BLOCK_K) < num_keys)[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    probs = tl.exp2(scores - new_max[:, None])
    correction = tl.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(probs, 1)
    value = _load_tile(v, key_start, num_keys, v_row_stride, BLOCK_K, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    acc = tl.dot(probs.to(value.dtype), value, acc * correction[:, None], input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["batch_size", "num_heads", "total_nnz"])
def _forward_kernel(
    q,
    k,
    v,
    out,
    softmax_lse,
    segment_of_slot,
    segments,
    batch_size,
    num_heads,
    total_nnz,
    scale_log2,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start, length, head, query_start, num_keys = locate_block(segment_of_slot, segments, batch_size, num_heads, BLOCK_Q)
    if query_start >= length:
        return
    q += start * q_row_stride + head * q_head_stride
    k += start * k_row_stride + head * k_head_stride
    v += start * v_row_stride + head * v_head_stride
    out += start * out_row_stride + head * HEAD_DIM
    softmax_lse += head * total_nnz + start

    query = _load_tile(q, query_start, length, q_row_stride, BLOCK_Q, HEAD_DIM, HEAD_BLOCK, True)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, HEAD_BLOCK), tl.float32)
    for IS_TAIL in tl.static_range(2):
        first, end = block_range(num_keys, BLOCK_K, IS_TAIL)
        for key_block in tl.range(first, end, num_stages=1 if IS_TAIL else None):
            key_start = key_block * BLOCK_K
            row_max, row_sum, acc = _attend_key_block(
                query,
                row_max,
                row_sum,
                acc,
                k,
                v,
                key_start,
                num_keys,
                k_row_stride,
                v_row_stride,
                scale_log2,
                BLOCK_K,
                HEAD_DIM,
                HEAD_BLOCK,
                IS_TAIL,
            )

    # Slack rows have no keys, and get out = 0 and softmax_lse = 0.
    has_keys = num_keys > 0
    row_sum = tl.where(has_keys, row_sum, 1.0)
    # The compiler may subtract new_max, which is rounded, from scores that are not yet. From 2^30 on this can leave a
    # remainder that has no exponential.
    row_sum = tl.where(has_keys & (tl.abs(row_max) >= 1073741824.0), float("nan"), row_sum)
    lse = tl.where(has_keys, (row_max + tl.log2(row_sum)) * 0.6931471805599453, 0.0)
    rows = query_start + tl.arange(0, BLOCK_Q)
    tl.store(softmax_lse + rows, lse, mask=rows < length)
    _store_tile(out, query_start, length, out_row_stride, acc / row_sum[:, None], BLOCK_Q, HEAD_DIM, HEAD_BLOCK)


@triton.jit
def _grad_query_step(
    query,
    grad_output,
    lse_log2,
    delta,
    acc,
    k,
    v,
    key_start,
    num_keys,
    k_row_stride,
    v_row_stride,
    scale_log2,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Add one key block's share of grad_q (still without the softmax scale) to acc."""
    key = _load_tile(k, key_start, num_keys, k_row_stride, BLOCK_K, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    probs = tl.exp2(scores - lse_log2[:, None])
    if IS_TAIL:
        probs = tl.where((key_start + tl.arange(0, BLOCK_K) < num_keys)[None, :], probs, 0.0)
    value = _load_tile(v, key_start, num_keys, v_row_stride, BLOCK_K, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    grad_probs = tl.dot(grad_output, tl.trans(value), input_precision="ieee")
    grad_scores = probs * (grad_probs - delta[:, None])
    return tl.dot(grad_scores.to(key.dtype), key, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["batch_size", "num_heads", "total_nnz"])
def _grad_query_kernel(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    softmax_lse,
    delta,
    lse_log2_out,
    grad_q,
    segment_of_slot,
    segments,
    batch_size,
    num_heads,
    total_nnz,
    softmax_scale,
    scale_log2,
    grad_out_row_stride,
    grad_out_head_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    HAS_GRAD_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start, length, head, query_start, num_keys = locate_block(segment_of_slot, segments, batch_size, num_heads, BLOCK_Q)
    if query_start >= length:
        return
    grad_out += start * grad_out_row_stride + head * grad_out_head_stride
    q += start * q_row_stride + head * q_head_stride
    k += start * k_row_stride + head * k_head_stride
    v += start * v_row_stride + head * v_head_stride
    out += start * out_row_stride + head * HEAD_DIM
    grad_q += start * out_row_stride + head * HEAD_DIM
    row_offset = head * total_nnz + start

    rows = query_start + tl.arange(0, BLOCK_Q)
    grad_output = _load_tile(grad_out, query_start, length, grad_out_row_stride, BLOCK_Q, HEAD_DIM, HEAD_BLOCK, True)
    output = _load_tile(out, query_start, length, out_row_stride, BLOCK_Q, HEAD_DIM, HEAD_BLOCK, True)
    delta_rows = tl.sum(grad_output.to(tl.float32) * output.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta_rows -= tl.load(grad_lse + row_offset + rows, mask=rows < length, other=0.0)
    tl.store(delta + row_offset + rows, delta_rows, mask=rows < length)

    query = _load_tile(q, query_start, length, q_row_stride, BLOCK_Q, HEAD_DIM, HEAD_BLOCK, True)
    lse = tl.load(softmax_lse + row_offset + rows, mask=rows < length, other=0.0)
    # NaN from 2^16 on, where probs would be wrong by a hundredth and more: a float has too few digits for both.
    lse_log2 = tl.where(tl.abs(lse) < 65536.0, lse * 1.4426950408889634, float("nan"))
    tl.store(lse_log2_out + row_offset + rows, lse_log2, mask=rows < length)
    acc = tl.zeros((BLOCK_Q, HEAD_BLOCK), tl.float32)
    for IS_TAIL in tl.static_range(2):
        first, end = block_range(num_keys, BLOCK_K, IS_TAIL)
        for key_block in tl.range(first, end, num_stages=1 if IS_TAIL else None):
            key_start = key_block * BLOCK_K
            acc = _grad_query_step(
                query,
                grad_output,
                lse_log2,
                delta_rows,
                acc,
                k,
                v,
                key_start,
                num_keys,
                k_row_stride,
                v_row_stride,
                scale_log2,
                BLOCK_K,
                HEAD_DIM,
                HEAD_BLOCK,
                IS_TAIL,
            )
    _store_tile(grad_q, query_start, length, out_row_stride, acc * softmax_scale, BLOCK_Q, HEAD_DIM, HEAD_BLOCK)


@triton.jit
def _grad_key_value_step(
    key,
    value,
    grad_key,
    grad_value,
    grad_out,
    q,
    lse_log2_in,
    delta,
    query_start,
    num_queries,
    grad_out_row_stride,
    q_row_stride,
    scale_log2,
    BLOCK_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Add one query block's share to grad_key (still without the softmax scale) and grad_value. Scores are held
    transposed, (key, query), so that probs and grad_scores are left operands of the two products that follow.
    Query rows past the segment load as zero (query, grad_out, lse, delta): probs 1, but nothing is added. Key rows past
    the segment can give anything, even inf, in their own rows of grad_key and grad_value, which are never stored."""
    rows = query_start + tl.arange(0, BLOCK_Q)
    query = _load_tile(q, query_start, num_queries, q_row_stride, BLOCK_Q, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    grad_output = _load_tile(
        grad_out, query_start, num_queries, grad_out_row_stride, BLOCK_Q, HEAD_DIM, HEAD_BLOCK, IS_TAIL
    )
    lse_log2 = tl.load(lse_log2_in + rows, mask=rows < num_queries, other=0.0)
    delta_rows = tl.load(delta + rows, mask=rows < num_queries, other=0.0)
    scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2
    probs = tl.exp2(scores - lse_log2[None, :])
    grad_value = tl.dot(probs.to(grad_output.dtype), grad_output, grad_value, input_precision="ieee")
    grad_probs = tl.dot(value, tl.trans(grad_output), input_precision="ieee")
    grad_scores = probs * (grad_probs - delta_rows[None, :])
    grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit(do_not_specialize=["batch_size", "num_heads", "total_nnz"])
def _grad_key_value_kernel(
    grad_out,
    q,
    k,
    v,
    lse_log2_in,
    delta,
    grad_k,
    grad_v,
    segment_of_slot,
    segments,
    batch_size,
    num_heads,
    total_nnz,
    softmax_scale,
    scale_log2,
    grad_out_row_stride,
    grad_out_head_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    grad_row_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start, length, head, key_start, num_queries = locate_block(
        segment_of_slot, segments, batch_size, num_heads, BLOCK_K
    )
    if key_start >= length:
        return
    grad_out += start * grad_out_row_stride + head * grad_out_head_stride
    q += start * q_row_stride + head * q_head_stride
    k += start * k_row_stride + head * k_head_stride
    v += start * v_row_stride + head * v_head_stride
    grad_k += start * grad_row_stride + head * HEAD_DIM
    grad_v += start * grad_row_stride + head * HEAD_DIM
    lse_log2_in += head * total_nnz + start
    delta += head * total_nnz + start

    key = _load_tile(k, key_start, length, k_row_stride, BLOCK_K, HEAD_DIM, HEAD_BLOCK, True)
    value = _load_tile(v, key_start, length, v_row_stride, BLOCK_K, HEAD_DIM, HEAD_BLOCK, True)
    grad_key = tl.zeros((BLOCK_K, HEAD_BLOCK), tl.float32)
    grad_value = tl.zeros((BLOCK_K, HEAD_BLOCK), tl.float32)
    for IS_TAIL in tl.static_range(2):
        first, end = block_range(num_queries, BLOCK_Q, IS_TAIL)
        for query_block in tl.range(first, end, num_stages=1 if IS_TAIL else None):
            query_start = query_block * BLOCK_Q
            grad_key, grad_value = _grad_key_value_step(
                key,
                value,
                grad_key,
                grad_value,
                grad_out,
                q,
                lse_log2_in,
                delta,
                query_start,
                num_queries,
                grad_out_row_stride,
                q_row_stride,
                scale_log2,
                BLOCK_Q,
                HEAD_DIM,
                HEAD_BLOCK,
                IS_TAIL,
            )
    _store_tile(grad_k, key_start, length, grad_row_stride, grad_key * softmax_scale, BLOCK_K, HEAD_DIM, HEAD_BLOCK)
    _store_tile(grad_v, key_start, length, grad_row_stride, grad_value, BLOCK_K, HEAD_DIM, HEAD_BLOCK)


def _rows_and_heads(tensor: Tensor) -> tuple[int, int]:
    return tensor.stride(0), tensor.stride(1)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where its last dimension is strided or its rows could start on 16 bytes, as
    head_dim would have it, and do not."""
    itemsize = tensor.element_size()
    starts = (tensor.data_ptr(), tensor.stride(0) * itemsize, tensor.stride(1) * itemsize)
    wants_16_bytes = tensor.shape[2] * itemsize % 16 == 0
    if tensor.stride(2) == 1 and not (wants_16_bytes and any(start % 16 for start in starts)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention inside each segment.

    Args:
        q, k, v: (total_nnz, num_heads, head_dim), float32 / bfloat16 / float16; may be strided views, which
            are read in place when their last dimension is contiguous and their rows start on 16 bytes.
        cu_seqlens: (batch + 1,) int32 on the same device; rows past cu_seqlens[-1] are slack.
        max_seqlen: longest segment; not needed by this backend, whose grid follows total_nnz.
        softmax_scale: factor on q k^T.

    Returns:
        out (total_nnz, num_heads, head_dim) in q's dtype and softmax_lse (num_heads, total_nnz) float32 (natural log);
        both zero in slack rows, and NaN where the largest score of a row is 2^30 or more in units of log2.
    """
    total_nnz, num_heads, head_dim = q.shape
    q, k, v = (_aligned(tensor) for tensor in (q, k, v))
    out = torch.empty((total_nnz, num_heads, head_dim), dtype=q.dtype, device=q.device)
    softmax_lse = torch.empty((num_heads, total_nnz), dtype=torch.float32, device=q.device)
    if total_nnz == 0 or num_heads == 0:
        return out, softmax_lse
    head_block = max(16, triton.next_power_of_2(head_dim))
    with torch.cuda.device_of(q):
        config = _configs("forward", q.dtype, head_block, q.device)
        segment_of_slot, segments, num_slots = work_list(cu_seqlens, total_nnz, config["BLOCK_Q"])
        _forward_kernel[(num_slots * num_heads,)](
            q,
            k,
            v,
            out,
            softmax_lse,
            segment_of_slot,
            segments,
            cu_seqlens.numel() - 1,
            num_heads,
            total_nnz,
            softmax_scale * _LOG2_E,
            *_rows_and_heads(q),
            *_rows_and_heads(k),
            *_rows_and_heads(v),
            out.stride(0),
            HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block,
            **config,
        )
    return out, softmax_lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`; probs are recomputed from softmax_lse.

    Args:
        grad_out: (total_nnz, num_heads, head_dim), gradient of out.
        grad_lse: (num_heads, total_nnz) float32, gradient of softmax_lse, or None for zero.
        q, k, v, cu_seqlens, max_seqlen, softmax_scale: as given to `forward`.
        out, softmax_lse: as returned by `forward`.

    Returns:
        grad_q, grad_k, grad_v, contiguous, in q's dtype; zero in slack rows. NaN where they depend on a row with a
        softmax_lse of 2^16 or more: of its segment and head.
    """
    total_nnz, num_heads, head_dim = q.shape
    q, k, v, grad_out = (_aligned(tensor) for tensor in (q, k, v, grad_out))
    out, softmax_lse = _aligned(out.contiguous()), softmax_lse.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    if total_nnz == 0 or num_heads == 0:
        return grad_q, grad_k, grad_v
    head_block = max(16, triton.next_power_of_2(head_dim))
    delta, lse_log2 = torch.empty_like(softmax_lse), torch.empty_like(softmax_lse)
    scalars = (cu_seqlens.numel() - 1, num_heads, total_nnz, softmax_scale, softmax_scale * _LOG2_E)
    strides = (
        *_rows_and_heads(grad_out),
        *_rows_and_heads(q),
        *_rows_and_heads(k),
        *_rows_and_heads(v),
        out.stride(0),
    )
    with torch.cuda.device_of(q):
        config = _configs("grad_query", q.dtype, head_block, q.device)
        segment_of_slot, segments, num_slots = work_list(cu_seqlens, total_nnz, config["BLOCK_Q"])
        _grad_query_kernel[(num_slots * num_heads,)](
            grad_out,
            softmax_lse if grad_lse is None else grad_lse.contiguous(),
            q,
            k,
            v,
            out,
            softmax_lse,
            delta,
            lse_log2,
            grad_q,
            segment_of_slot,
            segments,
            *scalars,
            *strides,
            HAS_GRAD_LSE=grad_lse is not None,
            HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block,
            **config,
        )
        config = _configs("grad_key_value", q.dtype, head_block, q.device)
        segment_of_slot, segments, num_slots = work_list(cu_seqlens, total_nnz, config["BLOCK_K"])
        _grad_key_value_kernel[(num_slots * num_heads,)](
            grad_out,
            q,
            k,
            v,
            lse_log2,
            delta,
            grad_k,
            grad_v,
            segment_of_slot,
            segments,
            *scalars,
            *strides,
            HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block,
            **config,
        )
    return grad_q, grad_k, grad_v
