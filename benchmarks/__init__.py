"""Benchmarks of a checkout: ops, whole models, and the Triton kernels with and without a GPU. See benchmarks.run."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
