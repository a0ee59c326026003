"""Formats that cells come in, a file each: how the matrices, genes and cells of one kind of file are found in it."""
