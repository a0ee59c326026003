"""What is installed and which backend each op would take: ``python -m xtg_kernels.info``."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import Any

import torch

import xtg_kernels
from xtg_kernels import dispatch
from xtg_kernels.ops.dropout import library as dropout
from xtg_kernels.ops.expression_embedding import library as embedding
from xtg_kernels.ops.favor_attention import library as favor
from xtg_kernels.ops.masked_decoder_gather import library as gather
from xtg_kernels.ops.masked_head import library as head
from xtg_kernels.ops.ragged_attention import library as attention


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _op_backends(device: str) -> dict[str, dict[str, Any]]:
    """For each op and common dtype on ``device``: the backend that ``auto`` takes and why the others decline."""
    found: dict[str, dict[str, Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.empty((1, 1, 64), dtype=dtype, device=device)
        values = torch.empty((1,), device=device)
        bin_table = torch.empty((100, 64), dtype=dtype, device=device)
        rows = torch.empty((1, 64), dtype=dtype, device=device)
        projection = torch.empty((266, 64), device=device)
        reasons: dict[str, Callable[[str], list[str]]] = {
            "ragged_attention": functools.partial(attention.not_supported_reasons, q=q, k=q, v=q),
            "expression_embedding": functools.partial(
                embedding.not_supported_reasons, values=values, bin_table=bin_table
            ),
            "favor_attention": functools.partial(favor.not_supported_reasons, q=q, k=q, v=q, projection=projection),
            "masked_decoder_gather": functools.partial(gather.not_supported_reasons, table=rows),
            "masked_head": functools.partial(head.not_supported_reasons, x=rows),
            "masked_mse": functools.partial(head.not_supported_reasons, x=rows),
            "dropout": functools.partial(dropout.not_supported_reasons, x=rows),
            "distinct_index": functools.partial(embedding.distinct_not_supported_reasons, values=values),
        }
        for op, why in reasons.items():
            by_name = ("cpp", "triton", "reference", *(["varlen"] if op == "ragged_attention" else []))
            declined = {name: why(name) for name in by_name}
            found[f"{op} {str(dtype).removeprefix('torch.')}"] = {
                "backend": dispatch.automatic_backend(why),
                "declined": {name: said for name, said in declined.items() if said},
            }
    return found


def info() -> dict[str, Any]:
    """Versions, ISA, threads, GPU and the backend of each op, as a dict.

    Raises:
        ImportError: the C++ extension is present and does not load (the loader's own error).
    """
    extension = dispatch.extension()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "xtg_kernels": xtg_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "extension": f"{dispatch.why_not_built()}: CPU tensors take the reference"
        if extension is None
        else f"built with {extension.compiler} against torch {extension.torch_version}",
        "isa": None if extension is None else extension.active_isa(),
        "available_isas": [] if extension is None else extension.available_isas(),
        "gpus": gpus,
        "backend": dispatch.current_backend(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("XTG_")},
        "ops": {device: _op_backends(device) for device in ["cpu", *(["cuda"] if gpus else [])]},
    }


def main() -> None:
    """Prints ``info()`` for a person."""
    found = info()
    ops = found.pop("ops")
    isas = ", ".join(found.pop("available_isas"))
    found["isa"] = f"{found['isa']} (this machine has: {isas})" if isas else "-"
    found["gpus"] = ", ".join(found["gpus"]) or "none"
    found["environment"] = ", ".join(f"{k}={v}" for k, v in found["environment"].items()) or "-"
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
    for device, by_op in ops.items():
        print(f"\nops on {device} tensors:")
        for op, choice in by_op.items():
            print(f"  {op}: {choice['backend']}")
            for backend, reasons in choice["declined"].items():
                print(f"    not {backend}: {'; '.join(reasons)}")


if __name__ == "__main__":
    main()
