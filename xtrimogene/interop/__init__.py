"""Interop: other people's files and modules. scFoundation's released weights, Transformer encoders made ragged."""

# Parts of a released scFoundation file.
PARTS = ("cell", "rde", "gene")
