"""Triton backend of favor_attention: FAVOR+ attention inside each segment, forward and backward.

The kernels have the shape of FlashAttention-2's (Dao 2023, arXiv 2307.08691) with features in the place of keys or of
queries. Where something is summed over tokens (context, key_sum and their gradients) a program owns a block of features
and a chunk of a segment's tokens; the chunks' sums are added up in order by a kernel of their own. Elsewhere a program
owns a block of tokens and walks over the blocks of features. Every element has one owner and one order of summation,
and features are padded to whole blocks, never to a power of two.

Scores live in base 2 (the projection carries log2 e, and exp2 is what the hardware has); key_max and row_max are
natural logarithms, and what uses the ones that are stored agrees with the backward to the last bit. What eps adds to
every feature is never added to a feature: it multiplies sums that all features have in common.

Both maxima pass gradient on, to the first of the largest scores: a query's program finds it among its own; for the keys
every program tells its largest score, and a kernel of its own gives the first row that has it its share at the end.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtg_kernels.ops.ragged_attention.triton_kernel import _aligned, _load_tile, _rows_and_heads, _store_tile
from xtg_kernels.triton_launch import LaunchConfigs, locate_block, work_list

_LOG2_E = math.log2(math.e)
_configs = LaunchConfigs("favor_attention", Path(__file__).with_name("configs.json"))
# Tokens that one partial sum of the context covers: fewer take more memory, more leave processors idle.
_CHUNK = 1024


@triton.jit
def _segment(segment_of_slot, batch_size, num_heads, other_cu_seqlens):
    """This program's segment, and its rows on the other side (queries for keys, keys for queries; none in slack)."""
    segment = tl.load(segment_of_slot + tl.program_id(0) // num_heads)
    real = segment < batch_size
    start = tl.load(other_cu_seqlens + segment, mask=real, other=0)
    return segment.to(tl.int64), tl.load(other_cu_seqlens + segment + 1, mask=real, other=0) - start


@triton.jit
def _half_norms(tile, half_norm_scale):
    x = tile.to(tl.float32)
    return tl.sum(x * x, 1) * half_norm_scale


@triton.jit
def _sum_key_block(
    projection_tile,
    feature_max,
    score_max,
    key_sum,
    value_sum,
    acc,
    k,
    v,
    key_start,
    num_keys,
    k_row_stride,
    v_row_stride,
    half_norm_scale,
    BLOCK_T: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Fold one key block into the sums of a block of features, each relative to its largest exponent so far."""
    key = _load_tile(k, key_start, num_keys, k_row_stride, BLOCK_T, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    scores = tl.dot(projection_tile, tl.trans(key), input_precision="ieee")
    if IS_TAIL:
        scores = tl.where((key_start + tl.arange(0, BLOCK_T) < num_keys)[None, :], scores, float("-inf"))
    exponents = scores - _half_norms(key, half_norm_scale)[None, :]
    new_max = tl.maximum(feature_max, tl.max(exponents, 1))
    score_max = tl.maximum(score_max, tl.max(scores, 1))
    features = tl.exp2(exponents - new_max[:, None])
    correction = tl.exp2(feature_max - new_max)
    key_sum = key_sum * correction + tl.sum(features, 1)
    value = _load_tile(v, key_start, num_keys, v_row_stride, BLOCK_T, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    value_sum += tl.sum(value.to(tl.float32), 0)
    acc = tl.dot(features.to(value.dtype), value, acc * correction[:, None], input_precision="ieee")
    return new_max, score_max, key_sum, value_sum, acc


@triton.jit(do_not_specialize=["batch_size", "num_heads", "num_features"])
def _context_kernel(
    k,
    v,
    projection,
    part_context,
    part_key_sum,
    part_feature_max,
    part_score_max,
    part_context_of_eps,
    part_key_sum_of_eps,
    segment_of_slot,
    segments,
    cu_seqlens_q,
    batch_size,
    num_heads,
    num_features,
    half_norm_scale,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    start, _, head, chunk_start, num_keys = locate_block(segment_of_slot, segments, batch_size, num_heads, CHUNK)
    _, num_queries = _segment(segment_of_slot, batch_size, num_heads, cu_seqlens_q)
    if (chunk_start >= num_keys) | (num_queries == 0):
        return
    k += start * k_row_stride + head * k_head_stride
    v += start * v_row_stride + head * v_head_stride
    part = tl.program_id(0).to(tl.int64)
    feature_start = tl.program_id(1) * BLOCK_F
    features = feature_start + tl.arange(0, BLOCK_F)
    chunk_end = tl.minimum(chunk_start + CHUNK, num_keys)

    projection_tile = _load_tile(projection, feature_start, num_features, HEAD_DIM, BLOCK_F, HEAD_DIM, HEAD_BLOCK, True)
    feature_max = tl.full((BLOCK_F,), float("-inf"), tl.float32)
    score_max = tl.full((BLOCK_F,), float("-inf"), tl.float32)
    key_sum = tl.zeros((BLOCK_F,), tl.float32)
    value_sum = tl.zeros((HEAD_BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK_F, HEAD_BLOCK), tl.float32)
    num_whole = (chunk_end - chunk_start) // BLOCK_T
    for block in range(0, num_whole):
        block_start = chunk_start + block * BLOCK_T
        feature_max, score_max, key_sum, value_sum, acc = _sum_key_block(
            projection_tile,
            feature_max,
            score_max,
            key_sum,
            value_sum,
            acc,
            k,
            v,
            block_start,
            chunk_end,
            k_row_stride,
            v_row_stride,
            half_norm_scale,
            BLOCK_T,
            HEAD_DIM,
            HEAD_BLOCK,
            False,
        )
    for block in tl.range(num_whole, tl.cdiv(chunk_end - chunk_start, BLOCK_T), num_stages=1):
        block_start = chunk_start + block * BLOCK_T
        feature_max, score_max, key_sum, value_sum, acc = _sum_key_block(
            projection_tile,
            feature_max,
            score_max,
            key_sum,
            value_sum,
            acc,
            k,
            v,
            block_start,
            chunk_end,
            k_row_stride,
            v_row_stride,
            half_norm_scale,
            BLOCK_T,
            HEAD_DIM,
            HEAD_BLOCK,
            True,
        )

    in_use = features < num_features
    tl.store(part_feature_max + part * num_features + features, feature_max, mask=in_use)
    tl.store(part_score_max + part * num_features + features, score_max, mask=in_use)
    tl.store(part_key_sum + part * num_features + features, key_sum, mask=in_use)
    part_context += part * num_features * HEAD_DIM
    _store_tile(part_context, feature_start, num_features, HEAD_DIM, acc, BLOCK_F, HEAD_DIM, HEAD_BLOCK)
    # All blocks of features have found the same sum of the values; the first one stores it.
    if feature_start == 0:
        channels = tl.arange(0, HEAD_BLOCK)
        tl.store(part_context_of_eps + part * HEAD_DIM + channels, value_sum, mask=channels < HEAD_DIM)
        tl.store(part_key_sum_of_eps + part, (chunk_end - chunk_start).to(tl.float32))


@triton.jit(do_not_specialize=["num_heads", "num_features"])
def _sum_parts_kernel(
    part_context,
    part_key_sum,
    part_feature_max,
    part_score_max,
    part_context_of_eps,
    part_key_sum_of_eps,
    context,
    key_sum,
    key_max,
    segments,
    other_cu_seqlens,
    num_heads,
    num_features,
    eps,
    HAS_MAX: tl.constexpr,
    PER_CELL: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Adds up the parts of one segment and head, in their order, for a block of features."""
    group = tl.program_id(0).to(tl.int64)
    segment, head = group // num_heads, group % num_heads
    feature_start = tl.program_id(1) * BLOCK_F
    features = feature_start + tl.arange(0, BLOCK_F)
    in_use = features < num_features
    length = tl.load(segments + segment * 3 + 1)
    others = tl.load(other_cu_seqlens + segment + 1) - tl.load(other_cu_seqlens + segment)
    num_parts = tl.where(others > 0, tl.cdiv(length, CHUNK), 0)
    # Parts lie as the programs that made them ran: those of a segment together, head by head.
    first_of_segment = tl.load(segments + segment * 3 + 2).to(tl.int64) * num_heads
    first = first_of_segment + head * num_parts

    stabilizer = 0.0
    if HAS_MAX:
        maxima = tl.full((BLOCK_F,), float("-inf"), tl.float32)
        first_maximum = first_of_segment if PER_CELL else first
        count = (num_parts * num_heads if PER_CELL else num_parts) * num_features
        for offset in range(0, count, BLOCK_F):
            index = offset + tl.arange(0, BLOCK_F)
            found = tl.load(
                part_score_max + first_maximum * num_features + index, mask=index < count, other=float("-inf")
            )
            maxima = tl.maximum(maxima, found)
        largest = tl.where(num_parts > 0, tl.max(maxima, 0) * 0.6931471805599453, 0.0)
        if feature_start == 0:
            tl.store(key_max + group, largest)
        stabilizer = largest * 1.4426950408889634

    channels = tl.arange(0, HEAD_BLOCK)
    acc = tl.zeros((BLOCK_F, HEAD_BLOCK), tl.float32)
    acc_key_sum = tl.zeros((BLOCK_F,), tl.float32)
    for i in range(0, num_parts):
        part = first + i
        rows = part * num_features + features
        factor = tl.full((BLOCK_F,), 1.0, tl.float32)
        if HAS_MAX:
            factor = tl.exp2(tl.load(part_feature_max + rows, mask=in_use, other=0.0) - stabilizer)
        tile = _load_tile(
            part_context + part * num_features * HEAD_DIM,
            feature_start,
            num_features,
            HEAD_DIM,
            BLOCK_F,
            HEAD_DIM,
            HEAD_BLOCK,
            True,
        )
        of_eps = tl.load(part_context_of_eps + part * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0)
        acc += tile * factor[:, None] + eps * of_eps[None, :]
        acc_key_sum += tl.load(part_key_sum + rows, mask=in_use, other=0.0) * factor
        acc_key_sum += eps * tl.load(part_key_sum_of_eps + part)
    context += group * num_features * HEAD_DIM
    _store_tile(context, feature_start, num_features, HEAD_DIM, acc, BLOCK_F, HEAD_DIM, HEAD_BLOCK)
    tl.store(key_sum + group * num_features + features, acc_key_sum, mask=in_use)


@triton.jit
def _attend_feature_block(
    query,
    row_max,
    row_sum,
    acc,
    projection,
    context,
    key_sum,
    feature_start,
    num_features,
    BLOCK_F: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Fold one block of features into (row_max, row_sum, acc), relative to the largest score so far."""
    features = feature_start + tl.arange(0, BLOCK_F)
    tile = _load_tile(projection, feature_start, num_features, HEAD_DIM, BLOCK_F, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    scores = tl.dot(query, tl.trans(tile), input_precision="ieee")
    if IS_TAIL:
        scores = tl.where((features < num_features)[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    exponentials = tl.exp2(scores - new_max[:, None])
    correction = tl.exp2(row_max - new_max)
    sums = tl.load(key_sum + features, mask=features < num_features, other=0.0)
    row_sum = row_sum * correction + tl.sum(exponentials * sums[None, :], 1)
    context_tile = _load_tile(context, feature_start, num_features, HEAD_DIM, BLOCK_F, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    acc = tl.dot(exponentials.to(context_tile.dtype), context_tile, acc * correction[:, None], input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["batch_size", "num_heads", "num_features", "total_q"])
def _query_kernel(
    q,
    projection,
    context,
    key_sum,
    context_sum,
    key_sum_sum,
    out,
    row_max_out,
    row_sum_out,
    segment_of_slot,
    segments,
    cu_seqlens,
    batch_size,
    num_heads,
    num_features,
    total_q,
    eps,
    half_norm_scale,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    HAS_EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    start, length, head, query_start, _ = locate_block(segment_of_slot, segments, batch_size, num_heads, BLOCK_T)
    if query_start >= length:
        return
    segment, num_keys = _segment(segment_of_slot, batch_size, num_heads, cu_seqlens)
    group = segment * num_heads + head
    q += start * q_row_stride + head * q_head_stride
    out += start * out_row_stride + head * HEAD_DIM
    context += group * num_features * HEAD_DIM
    key_sum += group * num_features
    # Slack rows and segments without keys meet no feature.
    num_features = tl.where(num_keys > 0, num_features, 0)

    query = _load_tile(q, query_start, length, q_row_stride, BLOCK_T, HEAD_DIM, HEAD_BLOCK, True)
    row_max = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, HEAD_BLOCK), tl.float32)
    for block in range(0, num_features // BLOCK_F):
        feature_start = block * BLOCK_F
        row_max, row_sum, acc = _attend_feature_block(
            query,
            row_max,
            row_sum,
            acc,
            projection,
            context,
            key_sum,
            feature_start,
            num_features,
            BLOCK_F,
            HEAD_DIM,
            HEAD_BLOCK,
            False,
        )
    for block in tl.range(num_features // BLOCK_F, tl.cdiv(num_features, BLOCK_F), num_stages=1):
        feature_start = block * BLOCK_F
        row_max, row_sum, acc = _attend_feature_block(
            query,
            row_max,
            row_sum,
            acc,
            projection,
            context,
            key_sum,
            feature_start,
            num_features,
            BLOCK_F,
            HEAD_DIM,
            HEAD_BLOCK,
            True,
        )

    has_keys = num_features > 0
    stored_max = tl.where(has_keys, row_max * 0.6931471805599453, 0.0)
    exponent = row_max - stored_max * 1.4426950408889634
    channels = tl.arange(0, HEAD_BLOCK)
    common = tl.zeros((HEAD_BLOCK,), tl.float32)
    common_sum = 0.0
    if HAS_EPS:
        # Without eps the half norm of a query cancels; left out, it cannot make the feature vanish.
        exponent -= _half_norms(query, half_norm_scale)
        in_use = channels < tl.where(has_keys, HEAD_DIM, 0)
        common = eps * tl.load(context_sum + group * HEAD_DIM + channels, mask=in_use, other=0.0)
        common_sum = eps * tl.load(key_sum_sum + group, mask=has_keys, other=0.0)
    factor = tl.where(has_keys, tl.exp2(exponent), 0.0)
    row_sum = factor * row_sum + common_sum
    result = (acc * factor[:, None] + common[None, :]) / tl.where(has_keys, row_sum, 1.0)[:, None]
    rows = query_start + tl.arange(0, BLOCK_T)
    row_offset = head * total_q + start
    tl.store(row_max_out + row_offset + rows, stored_max, mask=rows < length)
    tl.store(row_sum_out + row_offset + rows, row_sum, mask=rows < length)
    _store_tile(out, query_start, length, out_row_stride, result, BLOCK_T, HEAD_DIM, HEAD_BLOCK)


@triton.jit
def _grad_query_step(
    query,
    grad_output,
    row_max,
    rest,
    delta,
    largest,
    largest_feature,
    grad_sum,
    acc,
    projection,
    context,
    key_sum,
    feature_start,
    num_features,
    BLOCK_F: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Add one block of features' share of grad_q (still without its scale) to acc, and to the half norms' gradient;
    keep the first feature that has the largest score."""
    features = feature_start + tl.arange(0, BLOCK_F)
    tile = _load_tile(projection, feature_start, num_features, HEAD_DIM, BLOCK_F, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    scores = tl.dot(query, tl.trans(tile), input_precision="ieee")
    if IS_TAIL:
        scores = tl.where((features < num_features)[None, :], scores, float("-inf"))
    block_largest, at = tl.max(scores, 1, return_indices=True)
    largest_feature = tl.where(block_largest > largest, feature_start + at, largest_feature)
    largest = tl.maximum(largest, block_largest)
    exponentials = tl.exp2(scores - row_max[:, None] - rest[:, None])
    sums = tl.load(key_sum + features, mask=features < num_features, other=0.0)
    context_tile = _load_tile(context, feature_start, num_features, HEAD_DIM, BLOCK_F, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    grad_features = tl.dot(grad_output, tl.trans(context_tile), input_precision="ieee")
    grad_scores = exponentials * (grad_features - delta[:, None] * sums[None, :])
    acc = tl.dot(grad_scores.to(tile.dtype), tile, acc, input_precision="ieee")
    return largest, largest_feature, grad_sum + tl.sum(grad_scores, 1), acc


@triton.jit(do_not_specialize=["batch_size", "num_heads", "num_features", "total_q"])
def _grad_query_kernel(
    grad_out,
    q,
    projection,
    out,
    context,
    key_sum,
    row_max_in,
    row_sum_in,
    delta_out,
    grad_q,
    segment_of_slot,
    segments,
    cu_seqlens,
    batch_size,
    num_heads,
    num_features,
    total_q,
    half_norm_scale,
    grad_out_row_stride,
    grad_out_head_stride,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    HAS_EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    start, length, head, query_start, _ = locate_block(segment_of_slot, segments, batch_size, num_heads, BLOCK_T)
    if query_start >= length:
        return
    segment, num_keys = _segment(segment_of_slot, batch_size, num_heads, cu_seqlens)
    group = segment * num_heads + head
    grad_out += start * grad_out_row_stride + head * grad_out_head_stride
    q += start * q_row_stride + head * q_head_stride
    out += start * out_row_stride + head * HEAD_DIM
    grad_q += start * out_row_stride + head * HEAD_DIM
    context += group * num_features * HEAD_DIM
    key_sum += group * num_features
    num_features = tl.where(num_keys > 0, num_features, 0)
    row_offset = head * total_q + start

    rows = query_start + tl.arange(0, BLOCK_T)
    grad_output = _load_tile(grad_out, query_start, length, grad_out_row_stride, BLOCK_T, HEAD_DIM, HEAD_BLOCK, True)
    output = _load_tile(out, query_start, length, out_row_stride, BLOCK_T, HEAD_DIM, HEAD_BLOCK, True)
    delta = tl.sum(grad_output.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta_out + row_offset + rows, delta, mask=rows < length)

    query = _load_tile(q, query_start, length, q_row_stride, BLOCK_T, HEAD_DIM, HEAD_BLOCK, True)
    row_max = tl.load(row_max_in + row_offset + rows, mask=rows < length, other=0.0) * 1.4426950408889634
    # Every use of a feature divides it by the row's sum.
    rest = tl.log2(tl.load(row_sum_in + row_offset + rows, mask=rows < length, other=1.0))
    if HAS_EPS:
        rest += _half_norms(query, half_norm_scale)
    largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    largest_feature = tl.zeros((BLOCK_T,), tl.int32)
    grad_sum = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, HEAD_BLOCK), tl.float32)
    for block in range(0, num_features // BLOCK_F):
        feature_start = block * BLOCK_F
        largest, largest_feature, grad_sum, acc = _grad_query_step(
            query,
            grad_output,
            row_max,
            rest,
            delta,
            largest,
            largest_feature,
            grad_sum,
            acc,
            projection,
            context,
            key_sum,
            feature_start,
            num_features,
            BLOCK_F,
            HEAD_DIM,
            HEAD_BLOCK,
            False,
        )
    for block in tl.range(num_features // BLOCK_F, tl.cdiv(num_features, BLOCK_F), num_stages=1):
        feature_start = block * BLOCK_F
        largest, largest_feature, grad_sum, acc = _grad_query_step(
            query,
            grad_output,
            row_max,
            rest,
            delta,
            largest,
            largest_feature,
            grad_sum,
            acc,
            projection,
            context,
            key_sum,
            feature_start,
            num_features,
            BLOCK_F,
            HEAD_DIM,
            HEAD_BLOCK,
            True,
        )
    if HAS_EPS:
        # Without eps the maximum cancels.
        channels = tl.arange(0, HEAD_BLOCK)[None, :]
        pointers = projection + largest_feature[:, None] * HEAD_DIM + channels
        acc -= grad_sum[:, None] * tl.load(pointers, mask=channels < HEAD_DIM, other=0.0).to(tl.float32)
    result = _grad_of_row(query, grad_sum, acc, half_norm_scale)
    result = tl.where(num_features > 0, result, 0.0)
    _store_tile(grad_q, query_start, length, out_row_stride, result, BLOCK_T, HEAD_DIM, HEAD_BLOCK)


@triton.jit
def _grad_of_row(tile, grad_sum, acc, half_norm_scale):
    """Gradient of rows of q or k from that of their scores times the projection, and that of their half norms. Both the
    projection and the half norms' scale carry log2 e: the factor takes it away."""
    x = tile.to(tl.float32)
    return 0.6931471805599453 * (acc - (2.0 * half_norm_scale) * grad_sum[:, None] * x)


@triton.jit
def _sum_query_block(
    projection_tile,
    grad_key_sum,
    grad_sum,
    delta_sum,
    acc,
    grad_out,
    q,
    row_max_in,
    row_sum_in,
    delta_in,
    query_start,
    num_queries,
    grad_out_row_stride,
    q_row_stride,
    half_norm_scale,
    HAS_EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Fold one query block into the gradients of a block of features' sums."""
    rows = query_start + tl.arange(0, BLOCK_T)
    query = _load_tile(q, query_start, num_queries, q_row_stride, BLOCK_T, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    scores = tl.dot(projection_tile, tl.trans(query), input_precision="ieee")
    row_max = tl.load(row_max_in + rows, mask=rows < num_queries, other=0.0) * 1.4426950408889634
    # Where there is no row, an infinite sum takes its features away.
    row_sum = tl.load(row_sum_in + rows, mask=rows < num_queries, other=float("inf"))
    delta = tl.load(delta_in + rows, mask=rows < num_queries, other=0.0)
    rest = tl.log2(row_sum)
    if HAS_EPS:
        rest += _half_norms(query, half_norm_scale)
    exponentials = tl.exp2(scores - row_max[None, :] - rest[None, :])
    grad_output = _load_tile(
        grad_out, query_start, num_queries, grad_out_row_stride, BLOCK_T, HEAD_DIM, HEAD_BLOCK, IS_TAIL
    )
    grad_key_sum -= tl.sum(exponentials * delta[None, :], 1)
    inverse = 1.0 / row_sum
    grad_sum += tl.sum(grad_output.to(tl.float32) * inverse[:, None], 0)
    delta_sum += tl.sum(delta * inverse, 0)
    acc = tl.dot(exponentials.to(grad_output.dtype), grad_output, acc, input_precision="ieee")
    return grad_key_sum, grad_sum, delta_sum, acc


@triton.jit(do_not_specialize=["batch_size", "num_heads", "num_features", "total_q"])
def _grad_context_kernel(
    grad_out,
    q,
    projection,
    row_max_in,
    row_sum_in,
    delta_in,
    part_context,
    part_key_sum,
    part_context_of_eps,
    part_key_sum_of_eps,
    segment_of_slot,
    segments,
    cu_seqlens,
    batch_size,
    num_heads,
    num_features,
    total_q,
    half_norm_scale,
    grad_out_row_stride,
    grad_out_head_stride,
    q_row_stride,
    q_head_stride,
    HAS_EPS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    start, _, head, chunk_start, num_queries = locate_block(segment_of_slot, segments, batch_size, num_heads, CHUNK)
    _, num_keys = _segment(segment_of_slot, batch_size, num_heads, cu_seqlens)
    if (chunk_start >= num_queries) | (num_keys == 0):
        return
    grad_out += start * grad_out_row_stride + head * grad_out_head_stride
    q += start * q_row_stride + head * q_head_stride
    row_offset = head * total_q + start
    row_max_in += row_offset
    row_sum_in += row_offset
    delta_in += row_offset
    part = tl.program_id(0).to(tl.int64)
    feature_start = tl.program_id(1) * BLOCK_F
    features = feature_start + tl.arange(0, BLOCK_F)
    chunk_end = tl.minimum(chunk_start + CHUNK, num_queries)

    projection_tile = _load_tile(projection, feature_start, num_features, HEAD_DIM, BLOCK_F, HEAD_DIM, HEAD_BLOCK, True)
    grad_key_sum = tl.zeros((BLOCK_F,), tl.float32)
    grad_sum = tl.zeros((HEAD_BLOCK,), tl.float32)
    delta_sum = 0.0
    acc = tl.zeros((BLOCK_F, HEAD_BLOCK), tl.float32)
    num_whole = (chunk_end - chunk_start) // BLOCK_T
    for block in range(0, num_whole):
        block_start = chunk_start + block * BLOCK_T
        grad_key_sum, grad_sum, delta_sum, acc = _sum_query_block(
            projection_tile,
            grad_key_sum,
            grad_sum,
            delta_sum,
            acc,
            grad_out,
            q,
            row_max_in,
            row_sum_in,
            delta_in,
            block_start,
            chunk_end,
            grad_out_row_stride,
            q_row_stride,
            half_norm_scale,
            HAS_EPS,
            BLOCK_T,
            HEAD_DIM,
            HEAD_BLOCK,
            False,
        )
    for block in tl.range(num_whole, tl.cdiv(chunk_end - chunk_start, BLOCK_T), num_stages=1):
        block_start = chunk_start + block * BLOCK_T
        grad_key_sum, grad_sum, delta_sum, acc = _sum_query_block(
            projection_tile,
            grad_key_sum,
            grad_sum,
            delta_sum,
            acc,
            grad_out,
            q,
            row_max_in,
            row_sum_in,
            delta_in,
            block_start,
            chunk_end,
            grad_out_row_stride,
            q_row_stride,
            half_norm_scale,
            HAS_EPS,
            BLOCK_T,
            HEAD_DIM,
            HEAD_BLOCK,
            True,
        )

    tl.store(part_key_sum + part * num_features + features, grad_key_sum, mask=features < num_features)
    part_context += part * num_features * HEAD_DIM
    _store_tile(part_context, feature_start, num_features, HEAD_DIM, acc, BLOCK_F, HEAD_DIM, HEAD_BLOCK)
    if feature_start == 0:
        channels = tl.arange(0, HEAD_BLOCK)
        tl.store(part_context_of_eps + part * HEAD_DIM + channels, grad_sum, mask=channels < HEAD_DIM)
        tl.store(part_key_sum_of_eps + part, -delta_sum)


@triton.jit
def _grad_key_value_step(
    key,
    value,
    key_max,
    half_norms,
    largest,
    grad_sum,
    grad_key,
    grad_value,
    projection,
    grad_context,
    grad_key_sum,
    feature_start,
    num_features,
    BLOCK_F: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Add one block of features' share to grad_key (still without its scale), grad_value and the half norms' gradient;
    keep the largest scores."""
    features = feature_start + tl.arange(0, BLOCK_F)
    tile = _load_tile(projection, feature_start, num_features, HEAD_DIM, BLOCK_F, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    scores = tl.dot(key, tl.trans(tile), input_precision="ieee")
    if IS_TAIL:
        scores = tl.where((features < num_features)[None, :], scores, float("-inf"))
    largest = tl.maximum(largest, tl.max(scores, 1))
    exponentials = tl.exp2(scores - key_max - half_norms[:, None])
    grad_tile = _load_tile(grad_context, feature_start, num_features, HEAD_DIM, BLOCK_F, HEAD_DIM, HEAD_BLOCK, IS_TAIL)
    grad_value = tl.dot(exponentials.to(grad_tile.dtype), grad_tile, grad_value, input_precision="ieee")
    sums = tl.load(grad_key_sum + features, mask=features < num_features, other=0.0)
    grad_features = tl.dot(value, tl.trans(grad_tile), input_precision="ieee")
    grad_scores = exponentials * (grad_features + sums[None, :])
    grad_key = tl.dot(grad_scores.to(tile.dtype), tile, grad_key, input_precision="ieee")
    return largest, grad_sum + tl.sum(grad_scores, 1), grad_key, grad_value


@triton.jit(do_not_specialize=["batch_size", "num_heads", "num_features"])
def _grad_key_value_kernel(
    k,
    v,
    projection,
    key_max_in,
    grad_context,
    grad_key_sum,
    grad_context_sum,
    grad_k,
    grad_v,
    part_largest,
    part_row,
    part_grad_sum,
    segment_of_slot,
    segments,
    cu_seqlens_q,
    batch_size,
    num_heads,
    num_features,
    eps,
    half_norm_scale,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    grad_row_stride,
    HAS_EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    start, length, head, key_start, _ = locate_block(segment_of_slot, segments, batch_size, num_heads, BLOCK_T)
    if key_start >= length:
        return
    segment, num_queries = _segment(segment_of_slot, batch_size, num_heads, cu_seqlens_q)
    group = segment * num_heads + head
    k += start * k_row_stride + head * k_head_stride
    v += start * v_row_stride + head * v_head_stride
    grad_k += start * grad_row_stride + head * HEAD_DIM
    grad_v += start * grad_row_stride + head * HEAD_DIM
    grad_context += group * num_features * HEAD_DIM
    grad_key_sum += group * num_features
    has_queries = num_queries > 0
    num_features = tl.where(has_queries, num_features, 0)

    key = _load_tile(k, key_start, length, k_row_stride, BLOCK_T, HEAD_DIM, HEAD_BLOCK, True)
    value = _load_tile(v, key_start, length, v_row_stride, BLOCK_T, HEAD_DIM, HEAD_BLOCK, True)
    key_max = tl.load(key_max_in + group, mask=has_queries, other=0.0) * 1.4426950408889634
    half_norms = _half_norms(key, half_norm_scale)
    largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    grad_sum = tl.zeros((BLOCK_T,), tl.float32)
    grad_key = tl.zeros((BLOCK_T, HEAD_BLOCK), tl.float32)
    grad_value = tl.zeros((BLOCK_T, HEAD_BLOCK), tl.float32)
    for block in range(0, num_features // BLOCK_F):
        feature_start = block * BLOCK_F
        largest, grad_sum, grad_key, grad_value = _grad_key_value_step(
            key,
            value,
            key_max,
            half_norms,
            largest,
            grad_sum,
            grad_key,
            grad_value,
            projection,
            grad_context,
            grad_key_sum,
            feature_start,
            num_features,
            BLOCK_F,
            HEAD_DIM,
            HEAD_BLOCK,
            False,
        )
    for block in tl.range(num_features // BLOCK_F, tl.cdiv(num_features, BLOCK_F), num_stages=1):
        feature_start = block * BLOCK_F
        largest, grad_sum, grad_key, grad_value = _grad_key_value_step(
            key,
            value,
            key_max,
            half_norms,
            largest,
            grad_sum,
            grad_key,
            grad_value,
            projection,
            grad_context,
            grad_key_sum,
            feature_start,
            num_features,
            BLOCK_F,
            HEAD_DIM,
            HEAD_BLOCK,
            True,
        )
    channels = tl.arange(0, HEAD_BLOCK)
    in_use = channels < tl.where(has_queries, HEAD_DIM, 0)
    grad_value += eps * tl.load(grad_context_sum + group * HEAD_DIM + channels, mask=in_use, other=0.0)[None, :]
    grad_key = tl.where(has_queries, _grad_of_row(key, grad_sum, grad_key, half_norm_scale), 0.0)
    _store_tile(grad_k, key_start, length, grad_row_stride, grad_key, BLOCK_T, HEAD_DIM, HEAD_BLOCK)
    _store_tile(grad_v, key_start, length, grad_row_stride, grad_value, BLOCK_T, HEAD_DIM, HEAD_BLOCK)
    if HAS_EPS:
        part = tl.program_id(0)
        rows = key_start + tl.arange(0, BLOCK_T)
        block_largest, at = tl.max(tl.where(rows < length, largest, float("-inf")), 0, return_indices=True)
        tl.store(part_largest + part, block_largest)
        # NaN among the scores may point past the segment.
        tl.store(part_row + part, tl.minimum(key_start + at, length - 1))
        tl.store(part_grad_sum + part, tl.sum(tl.where(rows < length, grad_sum, 0.0), 0))


@triton.jit(do_not_specialize=["num_heads", "num_features"])
def _grad_key_max_kernel(
    k,
    projection,
    part_largest,
    part_row,
    part_grad_sum,
    grad_k,
    segments,
    cu_seqlens_q,
    num_heads,
    num_features,
    k_row_stride,
    k_head_stride,
    grad_row_stride,
    PER_CELL: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Gives grad_k what goes through the key_max of one segment and head, or of one segment; a part is what a program
    of _grad_key_value_kernel has found in ROWS rows."""
    group = tl.program_id(0)
    segment = group if PER_CELL else group // num_heads
    start = tl.load(segments + segment * 3).to(tl.int64)
    length = tl.load(segments + segment * 3 + 1)
    num_queries = tl.load(cu_seqlens_q + segment + 1) - tl.load(cu_seqlens_q + segment)
    if (length == 0) | (num_queries == 0):
        return
    parts_of_head = tl.cdiv(length, ROWS)
    # Parts lie as the programs that made them ran: those of a segment together, head by head.
    first = tl.load(segments + segment * 3 + 2) * num_heads
    count = parts_of_head * num_heads
    if not PER_CELL:
        first += group % num_heads * parts_of_head
        count = parts_of_head
    largest = tl.full((BLOCK_F,), float("-inf"), tl.float32)
    largest_part = tl.zeros((BLOCK_F,), tl.int32)
    grad_sums = tl.zeros((BLOCK_F,), tl.float32)
    for offset in range(0, count, BLOCK_F):
        parts = offset + tl.arange(0, BLOCK_F)
        found = tl.load(part_largest + first + parts, mask=parts < count, other=float("-inf"))
        largest_part = tl.where(found > largest, parts, largest_part)
        largest = tl.maximum(largest, found)
        grad_sums += tl.load(part_grad_sum + first + parts, mask=parts < count, other=0.0)
    # Each lane has the first of its own parts.
    part = tl.min(tl.where(largest == tl.max(largest, 0), largest_part, count - 1), 0)
    grad_sum = tl.sum(grad_sums, 0)
    row = start + tl.load(part_row + first + part)
    head = (part // parts_of_head if PER_CELL else group % num_heads).to(tl.int64)

    channels = tl.arange(0, HEAD_BLOCK)
    key = tl.load(k + row * k_row_stride + head * k_head_stride + channels, mask=channels < HEAD_DIM, other=0.0)
    key = key.to(tl.float32)
    score = float("-inf")
    feature = 0
    for block in range(0, tl.cdiv(num_features, BLOCK_F)):
        feature_start = block * BLOCK_F
        features = feature_start + tl.arange(0, BLOCK_F)
        tile = _load_tile(projection, feature_start, num_features, HEAD_DIM, BLOCK_F, HEAD_DIM, HEAD_BLOCK, True)
        scores = tl.sum(tile.to(tl.float32) * key[None, :], 1)
        block_largest, at = tl.max(tl.where(features < num_features, scores, float("-inf")), 0, return_indices=True)
        feature = tl.where(block_largest > score, feature_start + at, feature)
        score = tl.maximum(score, block_largest)
    pointers = grad_k + row * grad_row_stride + head * HEAD_DIM + channels
    grad = tl.load(pointers, mask=channels < HEAD_DIM, other=0.0).to(tl.float32)
    row_of_projection = tl.load(projection + feature * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0)
    # The projection carries log2 e.
    grad -= 0.6931471805599453 * grad_sum * row_of_projection.to(tl.float32)
    tl.store(pointers, grad.to(grad_k.dtype.element_ty), mask=channels < HEAD_DIM)


def _scaled(projection: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The projection times head_dim ** -0.25 and log2 e, and half the square of that scale times log2 e."""
    scale = projection.shape[1] ** -0.25
    return (projection.double() * (scale * _LOG2_E)).to(dtype).contiguous(), 0.5 * scale * scale * _LOG2_E


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class _Parts:
    """What the chunks of all segments add to context and key_sum, or to their gradients, and their sum."""

    def __init__(self, cu_seqlens: Tensor, total: int, num_heads: int, projection: Tensor) -> None:
        self.segment_of_slot, self.segments, num_slots = work_list(cu_seqlens, total, _CHUNK)
        self.programs = num_slots * num_heads
        num_features, head_dim = projection.shape
        self.context = _empty(projection, self.programs, num_features, head_dim)
        self.key_sum = _empty(projection, self.programs, num_features)
        self.context_of_eps = _empty(projection, self.programs, head_dim)
        self.key_sum_of_eps = _empty(projection, self.programs)


def _sum_parts(
    parts: _Parts,
    maxima: tuple[Tensor, Tensor] | None,
    other_cu_seqlens: Tensor,
    batch_size: int,
    num_heads: int,
    eps: float,
    per_cell: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """context, key_sum and key_max of all segments from their parts; maxima are those of exponents and of what the
    stabiliser is the maximum of, for each part and feature (None for gradients, which have no stabiliser)."""
    _, num_features, head_dim = parts.context.shape
    context = _empty(parts.context, batch_size, num_heads, num_features, head_dim)
    key_sum = _empty(parts.context, batch_size, num_heads, num_features)
    key_max = _empty(parts.context, batch_size, num_heads)
    feature_max, score_max = maxima or (parts.key_sum, parts.key_sum)
    head_block = max(16, triton.next_power_of_2(head_dim))
    config = _configs("sum_parts", torch.float32, head_block, context.device)
    if batch_size:
        _sum_parts_kernel[(batch_size * num_heads, triton.cdiv(num_features, config["BLOCK_F"]))](
            parts.context,
            parts.key_sum,
            feature_max,
            score_max,
            parts.context_of_eps,
            parts.key_sum_of_eps,
            context,
            key_sum,
            key_max,
            parts.segments,
            other_cu_seqlens,
            num_heads,
            num_features,
            eps,
            HAS_MAX=maxima is not None,
            PER_CELL=per_cell,
            CHUNK=_CHUNK,
            HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block,
            **config,
        )
    return context, key_sum, key_max


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    eps: float,
    per_cell: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """FAVOR+ attention inside each segment, and what the backward needs of it; as reference.forward.

    Args:
        q: (total_q, num_heads, head_dim), float32 or bfloat16; may be a strided view, as k and v, which is read in
            place when its last dimension is contiguous and its rows start on 16 bytes.
        k, v: (total_nnz, num_heads, head_dim).
        projection: (num_features, head_dim) float32.
        cu_seqlens, cu_seqlens_q: (batch + 1,) int32 on the same device.
        max_seqlen, max_seqlen_q: not needed by this backend, whose grids follow total_nnz and total_q.
        eps: added to every feature.
        per_cell: whether key_max is the maximum over the heads too.
    """
    total_q, num_heads, head_dim = q.shape
    num_features, batch_size = projection.shape[0], cu_seqlens.numel() - 1
    q, k, v = (_aligned(tensor) for tensor in (q, k, v))
    cu_seqlens, cu_seqlens_q = cu_seqlens.contiguous(), cu_seqlens_q.contiguous()
    scaled, half_norm_scale = _scaled(projection, q.dtype)
    out = torch.empty((total_q, num_heads, head_dim), dtype=q.dtype, device=q.device)
    row_max, row_sum = _empty(q, num_heads, total_q), _empty(q, num_heads, total_q)
    head_block = max(16, triton.next_power_of_2(head_dim))
    with torch.cuda.device_of(q):
        parts = _Parts(cu_seqlens, k.shape[0], num_heads, projection)
        feature_max, score_max = torch.empty_like(parts.key_sum), torch.empty_like(parts.key_sum)
        config = _configs("context", q.dtype, head_block, q.device)
        _context_kernel[(parts.programs, triton.cdiv(num_features, config["BLOCK_F"]))](
            k,
            v,
            scaled,
            parts.context,
            parts.key_sum,
            feature_max,
            score_max,
            parts.context_of_eps,
            parts.key_sum_of_eps,
            parts.segment_of_slot,
            parts.segments,
            cu_seqlens_q,
            batch_size,
            num_heads,
            num_features,
            half_norm_scale,
            *_rows_and_heads(k),
            *_rows_and_heads(v),
            CHUNK=_CHUNK,
            HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block,
            **config,
        )
        # Without eps every stabiliser cancels: one that keeps the largest feature at 1 then avoids 0 / 0.
        maxima = (feature_max, score_max if eps else feature_max)
        context, key_sum, key_max = _sum_parts(
            parts, maxima, cu_seqlens_q, batch_size, num_heads, eps, per_cell and eps != 0.0
        )
        config = _configs("query", q.dtype, head_block, q.device)
        segment_of_slot, segments, num_slots = work_list(cu_seqlens_q, total_q, config["BLOCK_T"])
        _query_kernel[(num_slots * num_heads,)](
            q,
            scaled,
            context.to(q.dtype),
            key_sum,
            context.sum(2),
            key_sum.sum(2),
            out,
            row_max,
            row_sum,
            segment_of_slot,
            segments,
            cu_seqlens,
            batch_size,
            num_heads,
            num_features,
            total_q,
            eps,
            half_norm_scale,
            *_rows_and_heads(q),
            out.stride(0),
            HAS_EPS=eps != 0.0,
            HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block,
            **config,
        )
    return out, context, key_sum, key_max, row_max, row_sum


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    out: Tensor,
    context: Tensor,
    key_sum: Tensor,
    key_max: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    eps: float,
    per_cell: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` to q, k and v, contiguous, in q's dtype; features are recomputed from scores.

    Args:
        grad_out: (total_q, num_heads, head_dim), gradient of out.
        q, k, v, projection, cu_seqlens, max_seqlen, cu_seqlens_q, max_seqlen_q, eps, per_cell: as given to `forward`.
        out, context, key_sum, key_max, row_max, row_sum: as returned by `forward`.
    """
    total_q, num_heads, head_dim = q.shape
    num_features, batch_size = projection.shape[0], cu_seqlens.numel() - 1
    q, k, v, grad_out, out = (_aligned(tensor) for tensor in (q, k, v, grad_out, out.contiguous()))
    cu_seqlens, cu_seqlens_q = cu_seqlens.contiguous(), cu_seqlens_q.contiguous()
    key_sum, key_max, row_max, row_sum = (x.contiguous() for x in (key_sum, key_max, row_max, row_sum))
    scaled, half_norm_scale = _scaled(projection, q.dtype)
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (q, k, v))
    delta = torch.empty_like(row_sum)
    head_block = max(16, triton.next_power_of_2(head_dim))
    sizes = (batch_size, num_heads, num_features)
    constants = {"HEAD_DIM": head_dim, "HEAD_BLOCK": head_block}
    with torch.cuda.device_of(q):
        config = _configs("grad_query", q.dtype, head_block, q.device)
        segment_of_slot, segments, num_slots = work_list(cu_seqlens_q, total_q, config["BLOCK_T"])
        _grad_query_kernel[(num_slots * num_heads,)](
            grad_out,
            q,
            scaled,
            out,
            context.to(q.dtype).contiguous(),
            key_sum,
            row_max,
            row_sum,
            delta,
            grad_q,
            segment_of_slot,
            segments,
            cu_seqlens,
            *sizes,
            total_q,
            half_norm_scale,
            *_rows_and_heads(grad_out),
            *_rows_and_heads(q),
            out.stride(0),
            HAS_EPS=eps != 0.0,
            **constants,
            **config,
        )
        parts = _Parts(cu_seqlens_q, total_q, num_heads, projection)
        config = _configs("grad_context", q.dtype, head_block, q.device)
        _grad_context_kernel[(parts.programs, triton.cdiv(num_features, config["BLOCK_F"]))](
            grad_out,
            q,
            scaled,
            row_max,
            row_sum,
            delta,
            parts.context,
            parts.key_sum,
            parts.context_of_eps,
            parts.key_sum_of_eps,
            parts.segment_of_slot,
            parts.segments,
            cu_seqlens,
            *sizes,
            total_q,
            half_norm_scale,
            *_rows_and_heads(grad_out),
            *_rows_and_heads(q),
            HAS_EPS=eps != 0.0,
            CHUNK=_CHUNK,
            **constants,
            **config,
        )
        grad_context, grad_key_sum, _ = _sum_parts(parts, None, cu_seqlens, batch_size, num_heads, eps, False)
        config = _configs("grad_key_value", q.dtype, head_block, q.device)
        segment_of_slot, segments, num_slots = work_list(cu_seqlens, k.shape[0], config["BLOCK_T"])
        part_largest, part_grad_sum = (_empty(q, num_slots * num_heads) for _ in range(2))
        part_row = torch.empty((num_slots * num_heads,), dtype=torch.int32, device=q.device)
        found = (part_largest, part_row, part_grad_sum)
        _grad_key_value_kernel[(num_slots * num_heads,)](
            k,
            v,
            scaled,
            key_max,
            grad_context.to(q.dtype),
            grad_key_sum,
            grad_context.sum(2),
            grad_k,
            grad_v,
            *found,
            segment_of_slot,
            segments,
            cu_seqlens_q,
            *sizes,
            eps,
            half_norm_scale,
            *_rows_and_heads(k),
            *_rows_and_heads(v),
            grad_k.stride(0),
            HAS_EPS=eps != 0.0,
            **constants,
            **config,
        )
        if batch_size and eps:
            rows = config["BLOCK_T"]
            config = _configs("grad_key_max", q.dtype, head_block, q.device)
            _grad_key_max_kernel[(batch_size if per_cell else batch_size * num_heads,)](
                k,
                scaled,
                *found,
                grad_k,
                segments,
                cu_seqlens_q,
                num_heads,
                num_features,
                *_rows_and_heads(k),
                grad_k.stride(0),
                PER_CELL=per_cell,
                ROWS=rows,
                **constants,
                **config,
            )
    return grad_q, grad_k, grad_v
