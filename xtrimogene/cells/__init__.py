"""Cells: what comes in. Files of several formats as CSR rows, their genes and numbers, packed, masked, streamed."""
