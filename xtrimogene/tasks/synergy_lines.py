"""Cell lines as vectors: by a checkpoint's encoder, and what it is compared with, all of the same width."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from xtrimogene.inference.embed import embed
from xtrimogene.inference.options import DEFAULT_MAX_TOKENS
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.tasks.splits import listed
from xtrimogene.tasks.synergy_tables import Expression

Array = npt.NDArray[Any]

# What a line's vector is: its embedding, its expression, the embedding of another line, that of an untrained encoder.
OURS, RAW, SHUFFLED, UNTRAINED = "ours", "raw", "shuffled", "untrained"
VERSIONS = (OURS, RAW, SHUFFLED, UNTRAINED)
_TARGET_SUM = 1e4
# log2 of a million is 20; of a few hundred genes, one has more TPM in any line.
_LARGEST_LOGARITHM = 24.0


def embedded(
    expression: Expression, network: XTrimoGeneNetwork, reading: dict[str, Any], seed: int, device: torch.device
) -> tuple[dict[str, Array], dict[str, int]]:
    """OURS and UNTRAINED: (lines, D) float32 embeddings by a network, and by one of the same shape that has learned
    nothing; and how many "genes" there are, and how many of them are "known".

    reading  values, aliases and target_depth, as for embed
    seed     of the untrained network

    Raises ValueError for numbers that are not what reading says, and for lines without a gene of the model.
    """
    _check_values(expression, reading["values"])
    cells = AnnData(
        expression.values.astype(np.float32),
        obs=pd.DataFrame(index=expression.lines),
        var=pd.DataFrame(index=expression.genes),
    )
    # A line with all its genes and tokens of its depth fits in a batch.
    most = max(DEFAULT_MAX_TOKENS, len(expression.genes) + 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = XTrimoGeneNetwork(network.config, network.vocabulary).eval()
    found, known = {}, 0
    for version, each in ((OURS, network), (UNTRAINED, fresh)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                report = embed(cells, each, dtype="float32", max_tokens=most, device=device, progress=False, **reading)
            except ValueError as error:
                advice = "; other names of genes are found with aliases (--aliases FILE)"
                raise ValueError(
                    str(error).replace("AnnData: ", f"{expression.name}: ", 1)
                    + (advice if "vocabulary genes" in str(error) and reading["aliases"] is None else "")
                ) from error
        assert report.embedding is not None
        found[version], known = report.embedding, report.genes_found
        empty = np.flatnonzero(np.isnan(report.embedding).any(1))
        if len(empty):
            raise ValueError(
                f"{expression.name}: expected a gene of the model in every line, got none in "
                f"{listed([expression.lines[number] for number in empty])}; leave these lines out"
            )
        if version == OURS:  # the other has the same to say
            for each_told in told:
                text = str(each_told.message).replace("AnnData: ", f"{expression.name}: ", 1)
                warnings.warn(text, each_told.category, stacklevel=3)
    return found, {"genes": len(expression.genes), "known": known}


def _check_values(expression: Expression, values: str) -> None:
    """Refuses logarithms that are to be TPM, and counts that are not whole: embed could not know, or would advise what
    this task does not have."""
    largest = float(expression.values.max(initial=0.0))
    if values == "tpm" and 0 < largest < _LARGEST_LOGARITHM:
        raise ValueError(
            f"{expression.name}: expected TPM, got numbers of at most {largest:.3g}, as logarithms are; undo the "
            "logarithm, of log2(TPM + 1) as 2^x - 1, or pass values='log1p' (--values log1p) for log1p of counts per "
            "10,000"
        )
    if values == "counts" and np.any(expression.values != np.round(expression.values)):
        raise ValueError(
            f"{expression.name}: expected whole counts, got numbers that are not; pass values='tpm' (--values tpm), "
            "which takes whatever is proportional to counts"
        )


def log_expression(expression: Expression, values: str) -> Array:
    """(lines, genes) float32 log1p(number / sum * 10,000), of values that are logged already as they are."""
    numbers = expression.values
    if values != "log1p":
        numbers = np.log1p(numbers / np.maximum(numbers.sum(1, keepdims=True), 1e-12) * _TARGET_SUM)
    return numbers.astype(np.float32)


def components(expression: Array, own: Array, width: int) -> Array:
    """(lines, width) float32 principal components of log expression (lines, genes), those of some lines' (own, their
    numbers); 0 beyond as many as these have: with fewer lines than numbers nothing of them is lost."""
    mean = expression[own].mean(0, dtype=np.float64)
    axes = np.linalg.svd(expression[own] - mean, full_matrices=False)[2][: min(width, len(own) - 1)]
    found = np.zeros((len(expression), width), np.float32)
    found[:, : len(axes)] = (expression - mean) @ axes.T
    return found


def shuffled(embeddings: Array, seed: int) -> Array:
    """(lines, D) the embeddings, each line with that of another one."""
    order = np.random.default_rng((seed, 12)).permutation(len(embeddings))
    found = np.empty_like(embeddings)
    found[order] = embeddings[np.roll(order, 1)]
    return found


def vectors(version: str, known: dict[str, Array], own: Array, seed: int) -> Tensor:
    """(lines, D) float32 of a version.

    known  OURS, UNTRAINED: (lines, D) embeddings; RAW: (lines, genes) log expression
    own    numbers of the lines that are trained on
    """
    if version == RAW:
        return torch.from_numpy(components(known[RAW], own, known[OURS].shape[1]))
    return torch.from_numpy(shuffled(known[OURS], seed) if version == SHUFFLED else known[version])
