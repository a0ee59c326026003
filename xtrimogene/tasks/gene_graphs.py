"""Graphs of genes: co-expression in cells, and a table of pairs that the user has, Gene Ontology for instance."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtrimogene.cells.tables import tab_separated

Array = npt.NDArray[Any]
# gene -> neighbour -> weight
Graph = dict[str, dict[str, float]]

NEIGHBOURS = 10
# Correlations are taken for neighbours from so many standard errors of no correlation on.
_STANDARD_ERRORS = 4.0


def correlations(cells: npt.NDArray[np.float32]) -> Array:
    """(genes, genes) float32 correlation over cells (n, genes), 0 where a gene does not vary, and on the diagonal."""
    centred = cells - cells.mean(0)
    norms = np.sqrt((centred**2).sum(0))
    centred /= np.where(norms > 0, norms, 1.0)
    found = centred.T @ centred
    np.fill_diagonal(found, 0.0)
    return found


def nearest(correlation: Array, cells: int) -> Array:
    """The correlations of each gene (a row) with its nearest neighbours, of those above the noise; 0 elsewhere."""
    kept = np.where(correlation > _STANDARD_ERRORS / np.sqrt(cells), correlation, 0.0)
    if kept.shape[1] > NEIGHBOURS:
        least = -np.partition(-kept, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1 : NEIGHBOURS]
        kept[kept < least] = 0.0
    return kept


def normalised(weights: Array) -> Tensor:
    """(genes, genes) sparse float32: D^-1/2 (A + I) D^-1/2 of weights made symmetric, as in a simple graph
    convolution (Wu et al., ICML 2019)."""
    linked = np.maximum(weights, weights.T) + np.eye(len(weights), dtype=weights.dtype)
    scale = 1 / np.sqrt(linked.sum(1))
    return torch.from_numpy((scale[:, None] * linked * scale).astype(np.float32)).to_sparse_coo().coalesce()


def graph_between(weights: Array, genes: Sequence[str]) -> Graph:
    """The graph of weights (genes, genes), one neighbour or more for each gene that is in it."""
    rows, columns = np.nonzero(weights)
    graph: Graph = {}
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        graph.setdefault(genes[row], {})[genes[column]] = float(weights[row, column])
    return graph


def read_graph(path: str | os.PathLike[str]) -> Graph:
    """Two tab-separated columns, gene and gene, and a third with a weight above 0 (1 without it); links go both ways. A
    first line whose weight is no number, or that is "gene", "gene" or "source", "target", is a header.

    Raises FileNotFoundError, or ValueError that names file and line.
    """
    graph: Graph = {}
    for number, cells in tab_separated(path, "graph"):
        if number == 1 and _is_header(cells):
            continue
        weight = _weight(cells)
        if weight is None:
            raise ValueError(
                f"graph {path}: line {number}: expected gene<tab>gene or gene<tab>gene<tab>weight above 0, got {cells}"
            )
        first, second = cells[:2]
        if first != second:
            for gene, other in ((first, second), (second, first)):
                own = graph.setdefault(gene, {})
                own[other] = max(weight, own.get(other, 0.0))
    if not graph:
        raise ValueError(f"graph {path}: expected pairs of genes, got none")
    return graph


def _is_header(cells: list[str]) -> bool:
    names = [cell.casefold().rstrip("12_ab") for cell in cells[:2]]
    return names in (["gene", "gene"], ["source", "target"]) or (len(cells) == 3 and not _is_number(cells[2]))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _weight(cells: list[str]) -> float | None:
    """The weight of a line, None where it is none of a graph."""
    if len(cells) not in (2, 3) or not all(cells) or not all(map(_is_number, cells[2:])):
        return None
    weight = float(cells[2]) if len(cells) == 3 else 1.0
    return weight if np.isfinite(weight) and weight > 0 else None


def between(graph: Mapping[str, Mapping[str, float]], genes: Sequence[str], neighbours: Sequence[str]) -> Array:
    """(genes, neighbours) float32: the weights of their links, each row divided by its sum, 0 for none."""
    place = {name: number for number, name in enumerate(neighbours)}
    weights = np.zeros((len(genes), len(neighbours)), np.float32)
    for row, gene in enumerate(genes):
        for other, weight in graph.get(gene, {}).items():
            if other in place:
                weights[row, place[other]] = weight
    sums = weights.sum(1, keepdims=True)
    return weights / np.where(sums > 0, sums, 1.0)
