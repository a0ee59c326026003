"""Interop: other people's files and modules. scFoundation's released weights, Transformer encoders made ragged."""
