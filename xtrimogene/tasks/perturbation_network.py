"""PerturbationNetwork: the change that perturbing a gene makes to every gene of a control cell, after GEARS.

GEARS (Roohani et al., Nature Biotechnology 2023) adds the embeddings of a cell's genes, smoothed over a co-expression
graph, and those of perturbed genes, smoothed over a graph of these, and reads each gene's change off the sum with
weights of its own. Here the embeddings of genes are given rows of that very cell. A gene that was perturbed in training
is known by its own embedding, and any other by what it has of its neighbours in the graph and by its rows in control
cells; a gene of which nothing is known does what an average gene does.
What several genes do is the sum of what each does: screens hold too few pairs to learn more that is true of others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PerturbationNetwork(nn.Module):
    """Changes of log-normalised expression.

    gene_graph   (G, G) sparse: the co-expression graph of the measured genes, normalised, with loops
    average      (G,) what an average gene does
    num_trained  genes that are perturbed in training, N
    width        of the rows of genes, D
    hidden       width inside, H
    learned      the rows of genes are a table that is learned, the same in every cell, and none are given

    Parameters `known` (H, D) and `likeness` (), by how much a gene is like its neighbours, serve genes that were not
    perturbed in training. They begin at zero, as do `identities` (N, H): untrained, every gene is an average one.
    """

    average: Tensor

    def __init__(
        self,
        gene_graph: Tensor,
        average: Tensor,
        num_trained: int,
        width: int,
        hidden: int,
        *,
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.gene_graph = gene_graph
        self.register_buffer("average", average)
        num_genes = gene_graph.shape[0]
        self.table = nn.Parameter(torch.randn(num_genes, width)) if learned else None
        self.rows = nn.Linear(width, hidden)
        self.places = nn.Parameter(0.1 * torch.randn(num_genes, hidden))
        self.identities = nn.Parameter(torch.zeros(num_trained, hidden))
        self.gene_weights = nn.Parameter(0.1 * torch.randn(num_genes, hidden))
        self.known = nn.Parameter(torch.zeros(hidden, width))
        self.likeness = nn.Parameter(torch.zeros(()))

    def of_cells(self, rows: Tensor) -> Tensor:
        """(cells, G, H) of the rows (cells, G, D) of the genes in each cell, standardised; where they are learned, only
        the number of cells counts."""
        if self.table is not None:
            rows = self.table.expand(len(rows), -1, -1)
        return self.rows(rows) + torch.sparse.mm(self.gene_graph, self.places)

    def of_perturbed(self, identity: Tensor, neighbours: Tensor, known: Tensor) -> Tensor:
        """(n, H) of perturbed genes.

        identity    (n, N) 1 where the gene is one of those of training, else 0
        neighbours  (n, N) weights of its neighbours in the graph of perturbed genes, of sum 1, or 0 for none
        known       (n, D) its rows in control cells, in the mean, standardised; 0 where there are none
        """
        own = identity.sum(1, keepdim=True)
        return identity @ self.identities + (1 - own) * self.of_others(neighbours, known, self.likeness, self.known)

    def of_others(self, neighbours: Tensor, known: Tensor, likeness: Tensor, by_known: Tensor) -> Tensor:
        """(n, H) of genes that were not perturbed in training, by a number () and a map (H, D)."""
        return likeness * (neighbours @ self.identities) + known @ by_known.T

    def forward(self, cells: Tensor, perturbed: Tensor) -> Tensor:
        """(n, cells, G): the change that each perturbed gene alone makes, of what of_cells and of_perturbed give."""
        hidden = torch.relu(cells[None] + perturbed[:, None, None]) - torch.relu(cells)
        return torch.einsum("ncgh,gh->ncg", hidden, self.gene_weights) + self.average

    def mean_alone(self, cells: Tensor, perturbed: Tensor) -> Tensor:
        """(n, G): what forward gives in the mean over the cells, gene after gene, so that many need no more memory."""
        return torch.stack([self(cells, each)[0].mean(0) for each in perturbed.split(1)])
