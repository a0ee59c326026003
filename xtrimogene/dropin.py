"""Transformer encoders of other models, run over ragged cells with the weights that they have. Needs torch alone."""

from xtrimogene.interop.dropin import RaggedEncoder, packed_embeddings, ragged_encoder

__all__ = ["RaggedEncoder", "packed_embeddings", "ragged_encoder"]
