"""Compiles the Triton kernels ahead of time for named GPUs, without one, and reports what the compiler made of them.

Launches are recorded from an op's own forward and backward on small CPU tensors, then specialised and compiled the way
the launcher would (same signature, divisibility attributes and options). Says nothing about speed or about races.
Compiling needs a process without TRITON_INTERPRET=1: ``reports`` starts some. As a program it takes a JSON list of
cases from standard input and prints one JSON report a line.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.static.cards import CARDS, resident_programs

Report = dict[str, Any]
ROOT = Path(__file__).parents[2]
# Compiled kernels are kept by the hash of their source, target and options: a second run compiles what has changed.
CACHE = ROOT / "build" / "triton"
# The instructions of matrix products on tensor cores: warp, warpgroup and block wide (NVIDIA), and AMD's.
_TENSOR_CORE = {
    "sm_80": r"HMMA",
    "sm_90": r"HGMMA|HMMA",
    "sm_100": r"UTC\w*MMA|HMMA",
    "default": r"HMMA",
}


@dataclass(frozen=True)
class Case:
    """One kernel of one op to be compiled for one architecture.

    kernel   name without _kernel; "" for all that the op launches
    width    what configs.json is keyed by; size, if given, is the real one that is padded to it
    config   tile sizes, num_warps and num_stages; None takes those of configs.json
    """

    op: str
    kernel: str
    architecture: str
    dtype: str
    width: int
    size: int | None = None
    config: tuple[tuple[str, int], ...] | None = None


def reports(cases: Sequence[Case], *, progress: Callable[[int], None] | None = None) -> list[list[Report]]:
    """The reports of each case, one for each kernel and set of flags, from processes that compile side by side.

    progress: called with the number of cases done.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(CACHE))
    command = [sys.executable, "-m", "benchmarks.static.aot"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([asdict(case) for case in cases]))
        process.stdin.close()
        found: list[list[Report]] = []
        for done, line in enumerate(process.stdout, 1):
            found.append(json.loads(line))
            if progress is not None:
                progress(done)
        if process.wait() != 0:
            errors.seek(0)
            raise RuntimeError(f"compiling ended with status {process.returncode}:\n{errors.read()[-5000:]}")
    return found


def _case_reports(case: Case) -> list[Report]:
    """The reports of the kernels of one case; in a process that does not interpret."""
    import torch

    from benchmarks.static.launches import OPS, record_launches
    from xtg_kernels.triton_launch import overriding

    dtype = getattr(torch, case.dtype)
    op = OPS[case.op]
    configs = {} if case.config is None else {(case.op, case.kernel): dict(case.config)}
    call = op.on_small_tensors(dtype, case.width if case.size is None else case.size)
    with overriding(architecture=case.architecture, configs=configs):
        launches = record_launches(call)
    wanted = [launch for name, launch in launches if case.kernel in ("", name)]
    if not wanted:
        raise ValueError(f"kernel: expected one of {', '.join(op.kernels)}, got {case.kernel!r}")
    return [report(case, launch) for launch in wanted]


def compile_launch(launch: Any, architecture: str) -> Any:
    """The compiled kernel of one recorded launch for one GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, args, kwargs = launch
    target = GPUTarget(*CARDS[architecture].target)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound_args, specialization, options = bind(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound_args, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def report(case: Case, launch: Any) -> Report:
    """What the compiler made of one launch: registers, stack, spills, shared memory and opcode counts."""
    from benchmarks.static.launches import flags_of

    kernel, _, kwargs = launch
    where: Report = {
        "op": case.op,
        "kernel": kernel.__name__.strip("_").removesuffix("_kernel"),
        "architecture": case.architecture,
        "dtype": case.dtype,
        "width": case.width,
        "size": case.width if case.size is None else case.size,
    }
    where["flags"] = " ".join(flags_of(kwargs))
    names = [name for name in kwargs if name.startswith("BLOCK")] + ["num_warps", "num_stages"]
    where["config"] = " ".join(f"{name}={kwargs[name]}" for name in names if name in kwargs)
    try:
        compiled = compile_launch(launch, case.architecture)
    except Exception as error:
        # Shared memory that a card does not have is found by us; ptxas finds registers that a block cannot have.
        return {**where, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    metadata = compiled.metadata
    found = _machine_code(compiled, case.architecture)
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    resident = resident_programs(
        CARDS[case.architecture], found["registers"], metadata.shared, metadata.num_warps, tensor_memory
    )
    # A dot whose result has a blocked layout is a loop of FMAs; on tensor cores it has an mma layout.
    fma_dots = len(re.findall(r"tt\.dot .*-> tensor<[^>]*#blocked", compiled.asm["ttgir"]))
    return {
        **where,
        "registers": found.pop("registers"),
        "stack": found.pop("stack"),
        "shared": metadata.shared,
        "tensor_memory": tensor_memory,
        "resident_programs": resident,
        "fma_dots": fma_dots,
        **found,
    }


def _machine_code(compiled: Any, architecture: str) -> Report:
    """What the machine code says; kept beside the compiled kernel, since disassembling takes as long as compiling."""
    reader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    kept = Path(os.environ.get("TRITON_CACHE_DIR", CACHE)) / f"{compiled.hash}-{reader}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not kept.is_file():
        nvidia = CARDS[architecture].target[0] == "cuda"
        found = _nvidia_report(compiled, architecture) if nvidia else _amd_report(compiled)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            json.dump(found, file)
        Path(file.name).replace(kept)
    return json.loads(kept.read_text())


def _nvidia_report(compiled: Any, architecture: str) -> Report:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()

        def tool(*command: str) -> str:
            return subprocess.run(
                [tools / command[0], *command[1:], cubin.name], capture_output=True, text=True, check=True
            ).stdout

        usage = tool("cuobjdump", "--dump-resource-usage")
        sass = tool("nvdisasm", "-c")
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    wide = r"(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128|UTMALDG"
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "spills": _count(r"STL|LDL", sass),
        **_opcodes(sass, _TENSOR_CORE[architecture], wide),
        "async_copies": _count("LDGSTS|UTMALDG", sass),
        "exp2": _count(r"MUFU\.EX2", sass),
        "atomics": _count("ATOMG?|RED|REDG", sass),
    }


def _amd_report(compiled: Any) -> Report:
    assembly = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])

    wide = r"(?:global|buffer)_load_dwordx4"
    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        # Spilled scalar registers go to lanes of vector registers, not to memory.
        "spills": metadata("vgpr_spill_count"),
        **_opcodes(assembly, r"v_mfma_\w*(?:bf16|f16)\w*", wide),
        "async_copies": _count(r"(?:global|buffer)_load_lds_\w+|buffer_load_\w+ .*\blds", assembly),
        "exp2": _count(r"v_exp_f32\w*", assembly),
        "atomics": _count(r"(?:global|buffer)_atomic_\w+", assembly),
    }


def _count(pattern: str, text: str) -> int:
    return len(re.findall(rf"\b(?:{pattern})\b", text))


def _opcodes(text: str, tensor_core: str, wide: str) -> Report:
    """Counts over the whole kernel and in its hot loop: the loop with the most matrix instructions, with the loops
    inside it, and of several the shortest, which is the one without masks; without such instructions the longest loop,
    and the whole kernel where there is no loop."""

    def heat(body: str) -> tuple[int, int]:
        products, length = _count(tensor_core, body), len(body.splitlines())
        return products, -length if products else length

    hot = max(_loops(text) or [text], key=heat)
    opcodes = re.findall(rf"\b(?:{tensor_core})\b", text)
    return {
        "tensor_core": len(opcodes),
        "tensor_core_opcodes": " ".join(sorted(set(opcodes))),
        "hot_loop_instructions": len(hot.splitlines()),
        "hot_loop_tensor_core": _count(tensor_core, hot),
        "hot_loop_wide_loads": _count(wide, hot),
        "wide_loads": _count(wide, text),
    }


_LABEL = re.compile(r"\s*(\.L\w+):")
# A branch to a label, on NVIDIA and on AMD; one without a condition leaves nothing to fall through to.
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L\w+)\)|\bs_c?branch\w*\s+(\.L\w+)")
_ALWAYS = re.compile(r"^\s*(?:/\*\w+\*/\s*)?(?:BRA(?:\.U)? `|EXIT|RET|s_branch|s_endpgm)")


def _loops(text: str) -> list[str]:
    """The instructions of every natural loop: from a branch back to a block that dominates it (blocks that are moved
    behind the end of the code branch back too, and are no loops)."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            blocks.append([])
            labels[label.group(1)] = len(blocks) - 1
        elif _is_instruction(line):
            blocks[-1].append(line)
            if _BRANCH.search(line) or _ALWAYS.match(line):
                blocks.append([])
    after: list[list[int]] = []
    for number, block in enumerate(blocks):
        branch = _BRANCH.search(block[-1]) if block else None
        target = labels.get(branch.group(1) or branch.group(2)) if branch else None
        falls = number + 1 < len(blocks) and not (block and _ALWAYS.match(block[-1]))
        after.append([*([] if target is None else [target]), *([number + 1] if falls else [])])
    before: list[list[int]] = [[] for _ in blocks]
    for number, targets in enumerate(after):
        for target in targets:
            before[target].append(number)
    dominators = _dominators(after, before)
    bodies: dict[int, set[int]] = {}
    for number, targets in enumerate(after):
        for head in targets:
            if head in dominators[number]:
                body, left = bodies.setdefault(head, {head}), [number]
                while left:
                    block_number = left.pop()
                    if block_number not in body:
                        body.add(block_number)
                        left += before[block_number]
    return ["\n".join(line for number in sorted(body) for line in blocks[number]) for body in bodies.values()]


def _dominators(after: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> list[set[int]]:
    """For each block those that every way to it passes; none for blocks that no way leads to."""
    reached, left = {0}, [0]
    while left:
        for target in after[left.pop()]:
            if target not in reached:
                reached.add(target)
                left.append(target)
    found = [set(reached) if number in reached else set() for number in range(len(after))]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for number in sorted(reached - {0}):
            new = set.intersection(*(found[p] for p in before[number] if p in reached)) | {number}
            changed |= new != found[number]
            found[number] = new
    return found


def _is_instruction(line: str) -> bool:
    line = line.strip()
    return bool(line) and not line.startswith((".", ";", "//")) and not line.endswith(":")


def main() -> None:
    """Compiles the cases of standard input; a line is the JSON list of the reports of one case."""
    cases = [
        Case(**{**case, "config": case["config"] and tuple((name, size) for name, size in case["config"])})
        for case in json.loads(sys.stdin.read())
    ]
    # Each takes most of a GB.
    processes = max(2, min(len(os.sched_getaffinity(0)), 8))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(_case_reports, cases):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
