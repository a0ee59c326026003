"""Small parts that benchmarks share: figures cut to what is no noise, and the memory of this process."""

from __future__ import annotations

from pathlib import Path


def digits(x: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{x:.4g}")


def status_mib(key: str) -> float:
    """An entry of /proc/self/status, such as VmRSS or VmHWM, in MiB. RuntimeError where the system has none."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{path}: no {key}; memory is measured on Linux only")
