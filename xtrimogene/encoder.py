"""RaggedTransformerEncoder, the encoder alone, for models of others. It needs torch and xtg_kernels, nothing else."""

from xtrimogene.network.dropping import DropoutKey
from xtrimogene.network.encoder import RaggedTransformerEncoder

__all__ = ["DropoutKey", "RaggedTransformerEncoder"]
