"""Benchmarks of whole models and what feeds them: packing, loading, `embed`, pre-training."""
