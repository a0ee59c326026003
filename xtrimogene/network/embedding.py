"""ExpressionEmbedding: the learned parameters that turn (expression value, gene) tokens into encoder rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtg_kernels import RaggedBatch, expression_embedding


class ExpressionEmbedding(nn.Module):
    """Auto-discretisation of expression values plus one learned row per gene (arXiv 2311.15156, section 3).

    A token of value v and gene g becomes e(v) + gene_table[g], where

        h = LeakyReLU(w1 v + b1)      slope 0.1
        s = alpha h + w2 h + b2
        e(v) = softmax(s) @ bin_table

    Parameters: w1, b1, b2 (num_bins,), w2 (num_bins, num_bins), bin_table (num_bins, dim),
    gene_table (num_genes + 1, dim); depth tokens count as genes here. The last gene row is the padding row of released
    checkpoints; no token points to it. They start as torch.nn.Linear and torch.nn.Embedding layers do, the gene table
    with standard deviation gene_std.
    """

    def __init__(
        self, num_genes: int, dim: int, *, num_bins: int = 100, alpha: float = 1.0, gene_std: float = 1.0
    ) -> None:
        super().__init__()
        self.alpha, self.gene_std = alpha, gene_std
        self.w1 = nn.Parameter(torch.empty(num_bins))
        self.b1 = nn.Parameter(torch.empty(num_bins))
        self.w2 = nn.Parameter(torch.empty(num_bins, num_bins))
        self.b2 = nn.Parameter(torch.empty(num_bins))
        self.bin_table = nn.Parameter(torch.empty(num_bins, dim))
        self.gene_table = nn.Parameter(torch.empty(num_genes + 1, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights: uniform within fan_in ** -0.5 for the two linear maps, normal for the tables."""
        # The first map has one input, the value, so its bound is 1.
        for parameter, fan_in in ((self.w1, 1), (self.b1, 1), (self.w2, self.b2.numel()), (self.b2, self.b2.numel())):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        nn.init.normal_(self.bin_table)
        nn.init.normal_(self.gene_table, std=self.gene_std)
        with torch.no_grad():
            self.gene_table[-1] = 0

    def forward(self, batch: RaggedBatch) -> Tensor:
        """(total_nnz, dim) rows of the tokens, zero in slack rows; differentiable in weights and batch.values."""
        return expression_embedding(
            batch.values,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            self.bin_table,
            alpha=self.alpha,
            gene_ids=batch.gene_ids,
            gene_table=self.gene_table,
            cu_seqlens=batch.cu_seqlens if batch.distinct_index is None else None,
            distinct_index=batch.distinct_index,
        )

    def value_rows(self, values: Tensor) -> Tensor:
        """(n, dim) rows e(v) of values (n,) alone, without a gene's row."""
        return expression_embedding(values, self.w1, self.b1, self.w2, self.b2, self.bin_table, alpha=self.alpha)
