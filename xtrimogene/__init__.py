"""xtrimogene: xTrimoGene single-cell encoders on ragged kernels, from AnnData to cell embeddings."""

from xtrimogene.inference.embed import EmbedReport, embed
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.model import XTrimoGene
from xtrimogene.network.vocabulary import Vocabulary

__all__ = ["EmbedReport", "Vocabulary", "XTrimoGene", "XTrimoGeneConfig", "embed"]
