"""Transformer encoders of other models, run over ragged cells with the weights that they have. Needs torch alone."""

from xtrimogene.interop.accelerate import Accelerated, accelerate
from xtrimogene.interop.dropin import RaggedEncoder, packed_embeddings, ragged_encoder
from xtrimogene.interop.packed import Packed

__all__ = ["Accelerated", "Packed", "RaggedEncoder", "accelerate", "packed_embeddings", "ragged_encoder"]
