"""Benchmarks: shapes from real cells, plain PyTorch baselines, one runner. python -m benchmarks.run --help"""
