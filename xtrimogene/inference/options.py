"""Choices and defaults of embed and of the gene level. It imports next to nothing: a command line answers at once."""

from pathlib import Path

DEFAULT_KEY = "X_xtrimogene"
# Tokens of a batch: room for a cell that expresses every gene, and enough rows to keep the matrix products busy.
DEFAULT_MAX_TOKENS = 32768
FIXED_DTYPES = ("float32", "bfloat16")
DTYPES = ("auto", *FIXED_DTYPES)
DEFAULT_TARGET_DEPTH = 4.0

EMBEDDINGS_KEY = "gene_embeddings"
IMPUTED_LAYER = "imputed"
# Cells decoded together: each takes about ten (positions, decoder_dim) tensors.
DEFAULT_BATCH_SIZE = 4


def partial_folder(output: Path) -> Path:
    """Where embed keeps the finished cells of an output that is not there yet."""
    return output.with_name(output.name + ".partial")
