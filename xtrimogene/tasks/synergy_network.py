"""The network of drug pairs, after DeepDDS: molecular graphs of both drugs and a cell line's vector, in any order.

DeepDDS (Wang et al., Briefings in Bioinformatics 2022) reads each drug's graph of atoms with attention, and a network
takes both drugs' vectors and the cell line's, one beside the other. Here each drug is joined with the line first, by
the same layer for both, and the two meet as their sum and their product: which drug comes first makes no difference, to
the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtrimogene.tasks.molecules import ATOM_WIDTH, Graphs

_HEADS, _HEAD_WIDTH = 4, 32
_DRUG, _JOINED, _HIDDEN = 64, 128, 256
_GRAPH_DROPOUT, _DROPOUT = 0.1, 0.3
# Of a principal component of lines, relative to the first: below it lies the rounding of float32.
_LEAST_STRENGTH = 1e-4


class PairNetwork(nn.Module):
    """Score and class of triples.

    line_width  numbers of a cell line's vector, L

    Buffers `score_mean` and `score_deviation` () are of the scores that it is fitted to; `line_mean` (L,) and
    `line_axes` (L, L) make of a line's vector its whitened principal components among the lines that it is fitted to:
    an encoder that has seen other cells sets lines apart along a few directions, and by little along the others.
    """

    score_mean: Tensor
    score_deviation: Tensor
    line_mean: Tensor
    line_axes: Tensor

    def __init__(self, line_width: int) -> None:
        from torch_geometric.nn import GATConv

        super().__init__()
        self.register_buffer("score_mean", torch.zeros(()))
        self.register_buffer("score_deviation", torch.ones(()))
        self.register_buffer("line_mean", torch.zeros(line_width))
        self.register_buffer("line_axes", torch.zeros(line_width, line_width))
        self.atoms = GATConv(ATOM_WIDTH, _HEAD_WIDTH, _HEADS, dropout=_GRAPH_DROPOUT)
        self.neighbours = GATConv(_HEADS * _HEAD_WIDTH, _DRUG, dropout=_GRAPH_DROPOUT)
        self.pooled = nn.Linear(2 * _DRUG, _DRUG)
        self.normed = nn.LayerNorm(_DRUG, elementwise_affine=False)
        self.line = nn.Linear(line_width, _DRUG)
        self.joined = nn.Sequential(nn.Linear(2 * _DRUG, _JOINED), nn.ReLU(), nn.Dropout(_DROPOUT))
        self.head = nn.Sequential(
            nn.Linear(2 * _JOINED, _HIDDEN),
            nn.ReLU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(_HIDDEN, _JOINED),
            nn.ReLU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(_JOINED, 2),
        )

    def whiten(self, lines: Tensor) -> None:
        """Take the moments of the lines (n, L) that it is fitted to."""
        mean = lines.double().mean(0)
        _, strengths, axes = torch.linalg.svd(lines.double() - mean, full_matrices=False)
        kept = strengths > _LEAST_STRENGTH * strengths[0]
        axes = axes[kept].T / strengths[kept] * len(lines) ** 0.5
        self.line_mean.copy_(mean)
        self.line_axes.zero_()
        self.line_axes[:, : axes.shape[1]] = axes.float()

    def drugs(self, graphs: Graphs) -> Tensor:
        """(molecules, 64) vectors of molecules: maximum and mean over their atoms, after two layers of attention."""
        rows = torch.relu(self.atoms(graphs.atoms, graphs.bonds))
        rows = torch.relu(self.neighbours(rows, graphs.bonds))
        place = graphs.molecule[:, None].expand_as(rows)
        empty = rows.new_zeros(graphs.count, rows.shape[1])
        most = empty.scatter_reduce(0, place, rows, "amax")
        mean = empty.scatter_reduce(0, place, rows, "mean", include_self=False)
        vectors: Tensor = self.normed(self.pooled(torch.cat([most, mean], 1)))
        return vectors

    def forward(self, graphs: Graphs, first: Tensor, second: Tensor, lines: Tensor) -> Tensor:
        """(n, 2) score, standardised, and log odds of synergy against antagonism.

        first, second  (n,) int64 molecules of the graphs
        lines          (n, L) the cell lines' vectors
        """
        drugs = self.drugs(graphs)
        line = self.line((lines - self.line_mean) @ self.line_axes)
        one, other = (self.joined(torch.cat([drugs[each], line], 1)) for each in (first, second))
        found: Tensor = self.head(torch.cat([one + other, one * other], 1))
        return found
