"""xtrimogene: xTrimoGene single-cell encoders on ragged kernels, from AnnData to cell embeddings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xtrimogene import _moved

if TYPE_CHECKING:
    from xtrimogene.inference.embed import embed
    from xtrimogene.inference.encoding import EmbedReport
    from xtrimogene.inference.gene_level import GeneReport, gene_embeddings, predict_expression
    from xtrimogene.model import XTrimoGene
    from xtrimogene.network.config import XTrimoGeneConfig
    from xtrimogene.network.vocabulary import Vocabulary

    __version__: str

__all__ = [
    "EmbedReport",
    "GeneReport",
    "Vocabulary",
    "XTrimoGene",
    "XTrimoGeneConfig",
    "__version__",
    "embed",
    "gene_embeddings",
    "predict_expression",
]

# Where each name lives. They are imported when they are asked for: the encoder alone needs no single-cell packages, and
# `xtrimogene --help` not even torch.
_HOMES = {
    "__version__": "xtrimogene.version",
    "EmbedReport": "xtrimogene.inference.encoding",
    "GeneReport": "xtrimogene.inference.gene_level",
    "Vocabulary": "xtrimogene.network.vocabulary",
    "XTrimoGene": "xtrimogene.model",
    "XTrimoGeneConfig": "xtrimogene.network.config",
    "embed": "xtrimogene.inference.embed",
    "gene_embeddings": "xtrimogene.inference.gene_level",
    "predict_expression": "xtrimogene.inference.gene_level",
}

_moved.install()


def __getattr__(name: str) -> Any:
    if name in _moved.MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
