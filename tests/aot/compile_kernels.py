"""Compiles the Triton launches of an op ahead of time for named GPUs, without one; run as a program by test_aot.py.

Launches are recorded from the op's own forward and backward on CPU tensors, then specialised and compiled the way the
launcher would (same signature, divisibility attributes and options). Says nothing about speed or about races.
Reads a JSON list of cases from standard input and prints one JSON report a line. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from xtg_kernels.ops.expression_embedding import triton_kernel as expression_embedding
from xtg_kernels.ops.masked_decoder_gather import triton_kernel as masked_decoder_gather
from xtg_kernels.ops.masked_head import triton_kernel as masked_head
from xtg_kernels.ops.ragged_attention import triton_kernel as ragged_attention

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


def record_launches(call: Callable[[], object]) -> list[Launch]:
    """The kernel launches of one call, which are not run."""
    launches: list[Launch] = []
    original = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def attention_launches(dtype: torch.dtype, head_dim: int) -> list[Launch]:
    """forward, grad_query and grad_key_value on views of a packed qkv."""
    qkv = torch.zeros((256, 3, 2, head_dim), dtype=dtype)
    q, k, v = qkv.unbind(1)
    cu_seqlens = torch.tensor([0, 100, 256], dtype=torch.int32)
    out, lse = torch.zeros_like(q), torch.zeros((2, 256))

    def call() -> None:
        ragged_attention.forward(q, k, v, cu_seqlens, 156, 0.125)
        ragged_attention.backward(out, lse, q, k, v, out, lse, cu_seqlens, 156, 0.125)

    return record_launches(call)


def embedding_launches(dtype: torch.dtype, num_bins: int, dim: int) -> list[Launch]:
    """The forward and every backward kernel, with a gene table and slack rows."""
    values, gene_ids = torch.zeros(256), torch.zeros(256, dtype=torch.int32)
    vector, matrix = torch.zeros(num_bins, dtype=dtype), torch.zeros((num_bins, num_bins), dtype=dtype)
    bin_table, gene_table = torch.zeros((num_bins, dim), dtype=dtype), torch.zeros((300, dim), dtype=dtype)
    weights = (values, vector, vector, matrix, vector, bin_table, 1.0, gene_ids, gene_table, gene_ids)

    def call() -> None:
        expression_embedding.forward(*weights)
        expression_embedding.backward(torch.zeros((256, dim), dtype=dtype), *weights, True)

    return record_launches(call)


def gather_launches(dtype: torch.dtype, dim: int) -> list[Launch]:
    """Every kernel, once for all genes of every cell and once for asked ones, with masked genes."""
    rows = [torch.zeros(shape, dtype=dtype) for shape in ((300, dim), (dim,), (dim,), (256, dim))]
    cu_seqlens, ids = torch.tensor([0, 100, 256], dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    indices = (cu_seqlens, ids, ids, cu_seqlens)

    def call() -> None:
        for asked, shape in (((None, None), (2, 300, dim)), ((ids, cu_seqlens), (256, dim))):
            masked_decoder_gather.forward(*rows, *indices, *asked)
            masked_decoder_gather.backward(torch.zeros(shape, dtype=dtype), *indices, *asked, 300)

    return record_launches(call)


def head_launches(dtype: torch.dtype, dim: int) -> list[Launch]:
    """masked_head at all rows and masked_mse at chosen ones, with float32 parameters."""
    x, rows = torch.zeros((300, dim), dtype=dtype), torch.zeros(256, dtype=torch.int32)
    params = (*(torch.zeros(dim) for _ in range(5)), torch.zeros(1))

    def call() -> None:
        masked_head.masked_head(x, None, *params, 1e-5)
        masked_head.masked_head_backward(torch.zeros(300), x, None, *params, 1e-5)
        masked_head.masked_mse(x, rows, torch.zeros(256), *params, 1e-5, True)
        masked_head.masked_mse_backward(torch.zeros(()), x, rows, torch.zeros(256), *params, 1e-5, True)

    return record_launches(call)


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """The compiled kernel of one recorded launch for one GPU."""
    kernel, args, kwargs = launch
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound_args, specialization, options = bind(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound_args, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def _nvidia_report(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [_TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [_TOOLS / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA)\b", sass)),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.128", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.E\.128", sass)),
        "async_copies": len(re.findall(r"\bLDGSTS\b", sass)),
        "atomics": len(re.findall(r"\b(?:ATOMG?|RED|REDG)\b", sass)),
    }


def _amd_report(compiled: Any) -> dict[str, Any]:
    assembly = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])

    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        # Spilled scalar registers go to lanes of vector registers, not to memory.
        "spills": metadata("vgpr_spill_count"),
        "tensor_core": len(re.findall(r"\bv_mfma_\w*bf16\w*|\bv_mfma_\w*f16\w*", assembly)),
        "wide_loads": len(re.findall(r"\bglobal_load_dwordx4", assembly)),
        "wide_stores": len(re.findall(r"\bglobal_store_dwordx4", assembly)),
        "atomics": len(re.findall(r"\bglobal_atomic_\w+", assembly)),
    }


def report(case: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """What the compiler made of one launch: registers, stack, spills, shared memory and opcode counts."""
    target = TARGETS[case["target"]]
    compiled = compile_launch(launch, target)
    found = _nvidia_report(compiled) if target.backend == "cuda" else _amd_report(compiled)
    name = " ".join(str(value) for value in case.values())
    kernel = launch[0].__name__.strip("_")
    where = {"case": name, "op": case["op"], "target": case["target"], "kernel": kernel}
    # A dot whose result has a blocked layout is a loop of FMAs; on tensor cores it has an mma layout.
    fma_dots = len(re.findall(r"tt\.dot .*-> tensor<[^>]*#blocked", compiled.asm["ttgir"]))
    return {**where, "shared": compiled.metadata.shared, "fma_dots": fma_dots, **found}


LAUNCHES: dict[str, Callable[..., list[Launch]]] = {
    "ragged_attention": attention_launches,
    "expression_embedding": embedding_launches,
    "masked_decoder_gather": gather_launches,
    "masked_head": head_launches,
}


def case_reports(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports of all kernels of one case, {"op", "target", "dtype", sizes}."""
    dtype = DTYPES[case["dtype"]]
    sizes = [case[name] for name in case if name not in ("op", "target", "dtype")]
    launches = LAUNCHES[case["op"]](dtype, *sizes)
    return [report(case, launch) for launch in launches]


if __name__ == "__main__":
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(case_reports, json.loads(sys.stdin.read())):
            for kernel_report in found:
                print(json.dumps(kernel_report), flush=True)
