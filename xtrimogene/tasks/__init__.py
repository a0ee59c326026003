"""The three tasks: cell types, perturbation effects, drug pairs."""
