"""Would tensor descriptors (TMA) help the attention forward? The same kernel with both, compiled for sm_90 and sm_100.

``_forward_kernel`` below is the op's forward with k and v read through descriptors of whole tensors, one bulk copy a
tile, in place of pointers; the last, partial key block is still read by masked pointers, because a descriptor would
bring rows of the next segment. python -m benchmarks.static.tensor_descriptors [FILE] writes what the compiler makes of
both.
"""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import RESULTS
from benchmarks.static.aot import Case, Report, report
from benchmarks.static.launches import OPS, Call, record_launches
from xtg_kernels.ops.ragged_attention import triton_kernel
from xtg_kernels.ops.ragged_attention.triton_kernel import _attend_key_block, _load_tile, _store_tile
from xtg_kernels.triton_launch import locate_block, overriding, work_list
from xtrimogene.bench.rows import write_csv
from xtrimogene.bench.tasks import offsets

TABLE = RESULTS / "tensor_descriptors.csv"


@triton.jit
def _attend_described_block(
    query, row_max, row_sum, acc, k, v, row, head, scale_log2, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """One online-softmax step over a full key block, read through descriptors."""
    key = k.load([row, head, 0]).reshape(BLOCK_K, HEAD_DIM)
    scores = tl.dot(query, tl.trans(key)) * scale_log2
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    probs = tl.exp2(scores - new_max[:, None])
    correction = tl.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(probs, 1)
    value = v.load([row, head, 0]).reshape(BLOCK_K, HEAD_DIM)
    acc = tl.dot(probs.to(value.dtype), value, acc * correction[:, None])
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["batch_size", "num_heads", "total_nnz"])
def _forward_kernel(
    q,
    k,
    v,
    described_k,
    described_v,
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

    query = _load_tile(q, query_start, length, q_row_stride, BLOCK_Q, HEAD_DIM, HEAD_DIM, True)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    for key_block in range(0, num_keys // BLOCK_K):
        row = start.to(tl.int32) + key_block * BLOCK_K
        row_max, row_sum, acc = _attend_described_block(
            query,
            row_max,
            row_sum,
            acc,
            described_k,
            described_v,
            row,
            head.to(tl.int32),
            scale_log2,
            BLOCK_K,
            HEAD_DIM,
        )
    for key_block in tl.range(num_keys // BLOCK_K, tl.cdiv(num_keys, BLOCK_K), num_stages=1):
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
            HEAD_DIM,
            True,
        )
    has_keys = row_sum != 0.0
    row_sum = tl.where(has_keys, row_sum, 1.0)
    lse = tl.where(has_keys, (row_max + tl.log2(row_sum)) * 0.6931471805599453, 0.0)
    rows = query_start + tl.arange(0, BLOCK_Q)
    tl.store(softmax_lse + rows, lse, mask=rows < length)
    _store_tile(out, query_start, length, out_row_stride, acc / row_sum[:, None], BLOCK_Q, HEAD_DIM, HEAD_DIM)


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, config: dict[str, int]) -> tuple[Tensor, Tensor]:
    """out and softmax_lse of ragged_attention; head_dim a power of two, rows and heads of k and v on 16 bytes."""
    total_nnz, num_heads, head_dim = q.shape
    out = torch.empty((total_nnz, num_heads, head_dim), dtype=q.dtype, device=q.device)
    softmax_lse = torch.empty((num_heads, total_nnz), dtype=torch.float32, device=q.device)
    segment_of_slot, segments, num_slots = work_list(cu_seqlens, total_nnz, config["BLOCK_Q"])
    described = (TensorDescriptor(x, list(x.shape), list(x.stride()), [config["BLOCK_K"], 1, head_dim]) for x in (k, v))
    _forward_kernel[(num_slots * num_heads,)](
        q,
        k,
        v,
        *described,
        out,
        softmax_lse,
        segment_of_slot,
        segments,
        cu_seqlens.numel() - 1,
        num_heads,
        total_nnz,
        head_dim**-0.5 * math.log2(math.e),
        *(stride for x in (q, k, v) for stride in x.stride()[:2]),
        out.stride(0),
        HEAD_DIM=head_dim,
        enable_fp_fusion=True,
        **config,
    )
    return out, softmax_lse


def table_rows() -> list[Report]:
    """What the compiler makes of both, with the configs that are shipped; in a process that does not interpret."""
    rows = []
    for architecture in ("sm_90", "sm_100"):
        for head_dim in (64, 128):
            q, k, v = torch.zeros((256, 3, 2, head_dim), dtype=torch.bfloat16).unbind(1)
            with overriding(architecture=architecture):
                config = triton_kernel._configs("forward", q.dtype, head_dim, q.device)
                del config["enable_fp_fusion"]
                described = functools.partial(forward, q, k, v, offsets((100, 156)), config)
                pointers = OPS["ragged_attention"].on_small_tensors(q.dtype, head_dim)
                ways: dict[str, Call] = {"pointers": pointers, "descriptors": described}
                launches = {way: dict(record_launches(call))["forward"] for way, call in ways.items()}
            case = Case("ragged_attention", "forward", architecture, "bfloat16", head_dim)
            rows += [{"loads": way, **report(case, launch)} for way, launch in launches.items()]
    return rows


if __name__ == "__main__":
    write_csv(Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE, table_rows())
