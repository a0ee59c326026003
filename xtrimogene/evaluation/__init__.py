"""Evaluation: what a model knows of cells that it has not seen, beside guesses that need no network."""
