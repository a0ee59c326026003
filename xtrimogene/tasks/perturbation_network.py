"""PerturbationNetwork: the change of every gene of a control cell from the genes that are perturbed, after GEARS.

GEARS (Roohani et al., Nature Biotechnology 2023) adds the embeddings of a cell's genes, smoothed over a co-expression
graph, and those of perturbations, smoothed over a graph of genes, and reads each gene's change off with weights of its
own. Here the genes' embeddings are given rows of that very cell, and a perturbation of several genes is the sum of
what each would do, and a term of their product, which is nothing until training has seen such perturbations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PerturbationNetwork(nn.Module):
    """Changes of log-normalised expression.

    num_genes    measured genes, G
    num_trained  genes with an identity: those perturbed in training, N
    width        of the given rows of genes, D, and of what is known of perturbed genes
    hidden       width inside, H
    learned      the rows of genes are a table that is learned, the same in every cell; none are given then

    Buffer `gene_graph` (G, G) sparse: the co-expression graph, normalised, with loops. Identities begin at zero, and so
    do the weights of the genes: a network that was never trained predicts no change.
    """

    gene_graph: Tensor

    def __init__(self, gene_graph: Tensor, num_trained: int, width: int, hidden: int, *, learned: bool = False) -> None:
        super().__init__()
        num_genes = gene_graph.shape[0]
        self.register_buffer("gene_graph", gene_graph, persistent=False)
        self.table = nn.Parameter(torch.randn(num_genes, width)) if learned else None
        self.rows = nn.Linear(width, hidden)
        self.places = nn.Parameter(0.1 * torch.randn(num_genes, hidden))
        self.identities = nn.Parameter(torch.zeros(num_trained, hidden))
        self.neighbours = nn.Linear(hidden, hidden, bias=False)
        self.known = nn.Linear(width, hidden, bias=False)
        self.gene_weights = nn.Parameter(torch.zeros(num_genes, hidden))
        self.gene_bias = nn.Parameter(torch.zeros(num_genes))
        with torch.no_grad():
            self.known.weight.zero_()
            self.neighbours.weight.zero_()

    def forward(
        self, rows: Tensor, perturbed: Tensor, identity: Tensor, neighbours: Tensor, known: Tensor, *, named: bool = True
    ) -> Tensor:
        """(perturbations, cells, G) changes.

        Args:
            rows: (cells, G, D) embeddings of the genes in each cell, standardised; of (cells, 0, 0) where learned.
            perturbed: (perturbations, n) 1 where one of n genes is perturbed, else 0.
            identity: (n, N) 1 where a gene is one of those of training, else 0.
            neighbours: (n, N) weights of their neighbours in the graph of perturbed genes, rows of sum 1 or 0.
            known: (n, D) what is known of each gene, zeros for nothing.
            named: False takes their identities from the genes: what is predicted if none had been seen.
        """
        cells = self.cells(rows)
        genes = self.genes(identity if named else torch.zeros_like(identity), neighbours, known)
        return self.combined(cells, genes, perturbed)

    def cells(self, rows: Tensor) -> Tensor:
        """(cells, G, H): the genes of each cell."""
        if self.table is not None:
            rows = self.table.expand(len(rows), -1, -1)
        return self.rows(rows) + torch.sparse.mm(self.gene_graph, self.places)

    def genes(self, identity: Tensor, neighbours: Tensor, known: Tensor) -> Tensor:
        """(n, H): the perturbed genes."""
        return identity @ self.identities + self.neighbours(neighbours @ self.identities) + self.known(known)

    def combined(self, cells: Tensor, genes: Tensor, perturbed: Tensor) -> Tensor:
        """(perturbations, cells, G) changes, of the two above."""
        hidden = torch.relu(cells[None] + genes[:, None, None])
        alone = torch.einsum("ncgh,gh->ncg", hidden, self.gene_weights) + self.gene_bias
        return torch.einsum("pn,ncg->pcg", perturbed, alone)
