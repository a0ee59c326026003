"""xtrimogene: xTrimoGene single-cell encoders on ragged kernels, from AnnData to cell embeddings."""

from xtrimogene.config import XTrimoGeneConfig
from xtrimogene.model import XTrimoGene
from xtrimogene.vocabulary import Vocabulary

__all__ = ["Vocabulary", "XTrimoGene", "XTrimoGeneConfig"]
