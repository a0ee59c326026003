"""xtg_kernels: ops for ragged transformers over the expressed genes of single cells, on CPUs and GPUs."""

from importlib import metadata as _metadata

from xtg_kernels.dispatch import current_backend, use_backend
from xtg_kernels.ops.dropout import dropout, dropout_row_ids
from xtg_kernels.ops.expression_embedding import distinct_index, expression_embedding
from xtg_kernels.ops.favor_attention import favor_attention
from xtg_kernels.ops.masked_decoder_gather import masked_decoder_gather
from xtg_kernels.ops.masked_head import masked_head, masked_mse
from xtg_kernels.ops.ragged_attention import ragged_attention
from xtg_kernels.ragged import RaggedBatch

try:
    # Of the package that both come in, xtg_kernels and xtrimogene.
    __version__ = _metadata.version("xtrimogene")
except _metadata.PackageNotFoundError:
    __version__ = "0 (not installed)"

__all__ = [
    "RaggedBatch",
    "current_backend",
    "distinct_index",
    "dropout",
    "dropout_row_ids",
    "expression_embedding",
    "favor_attention",
    "masked_decoder_gather",
    "masked_head",
    "masked_mse",
    "ragged_attention",
    "use_backend",
]
