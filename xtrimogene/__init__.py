"""xtrimogene: xTrimoGene single-cell encoders on ragged kernels, from AnnData to cell embeddings."""

from xtrimogene.config import XTrimoGeneConfig
from xtrimogene.embed import EmbedReport, embed
from xtrimogene.model import XTrimoGene
from xtrimogene.vocabulary import Vocabulary

__all__ = ["EmbedReport", "Vocabulary", "XTrimoGene", "XTrimoGeneConfig", "embed"]
