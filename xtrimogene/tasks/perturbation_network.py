"""PerturbationNetwork: the change that perturbing a gene makes to every gene of a control cell, after GEARS.

GEARS (Roohani et al., Nature Biotechnology 2023) adds the embeddings of a cell's genes, smoothed over a co-expression
graph, and those of perturbed genes, smoothed over a graph of these, and reads each gene's change off the sum with weights
of its own. Here the embeddings of genes are given rows of that very cell, and what several perturbed genes do is the sum
of what each would do: screens hold too few pairs to learn more of them that is true of others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PerturbationNetwork(nn.Module):
    """Changes of log-normalised expression.

    gene_graph   (G, G) sparse: the co-expression graph of the measured genes, normalised, with loops
    num_trained  genes with an identity: those perturbed in training, N
    width        of the rows of genes, D
    hidden       width inside, H
    learned      the rows of genes are a table that is learned, the same in every cell, and none are given

    Identities begin at zero, as do the weights of the measured genes: untrained, it predicts no change.
    """

    def __init__(self, gene_graph: Tensor, num_trained: int, width: int, hidden: int, *, learned: bool = False) -> None:
        super().__init__()
        self.gene_graph = gene_graph
        num_genes = gene_graph.shape[0]
        self.table = nn.Parameter(torch.randn(num_genes, width)) if learned else None
        self.rows = nn.Linear(width, hidden)
        self.places = nn.Parameter(0.1 * torch.randn(num_genes, hidden))
        self.identities = nn.Parameter(torch.zeros(num_trained, hidden))
        self.neighbours = nn.Parameter(torch.zeros(hidden, hidden))
        self.known = nn.Parameter(torch.zeros(hidden, width))
        self.gene_weights = nn.Parameter(torch.zeros(num_genes, hidden))
        self.gene_bias = nn.Parameter(torch.zeros(num_genes))

    def of_cells(self, rows: Tensor) -> Tensor:
        """(cells, G, H) of the rows (cells, G, D) of the genes in each cell, standardised; where they are learned, only
        the number of cells counts."""
        if self.table is not None:
            rows = self.table.expand(len(rows), -1, -1)
        return self.rows(rows) + torch.sparse.mm(self.gene_graph, self.places)

    def of_perturbed(self, identity: Tensor, neighbours: Tensor, known: Tensor) -> Tensor:
        """(n, H) of perturbed genes.

        identity    (n, N) 1 where the gene is one of those of training, else 0; all 0 for a gene that never was perturbed
        neighbours  (n, N) weights of its neighbours in the graph of perturbed genes, of sum 1, or 0 for none
        known       (n, D) what is known of it, 0 for nothing
        """
        return identity @ self.identities + neighbours @ self.identities @ self.neighbours.T + known @ self.known.T

    def forward(self, cells: Tensor, perturbed: Tensor) -> Tensor:
        """(n, cells, G): the change that each perturbed gene alone makes, of what the two above give."""
        hidden = torch.relu(cells[None] + perturbed[:, None, None])
        return torch.einsum("ncgh,gh->ncg", hidden, self.gene_weights) + self.gene_bias
