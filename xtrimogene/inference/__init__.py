"""Inference: a model run over the cells of a data set, and its results in memory or on disk."""
