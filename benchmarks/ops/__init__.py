"""Benchmarks of single ops against plain PyTorch, and pictures of their results."""
