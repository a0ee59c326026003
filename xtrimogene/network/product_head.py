"""ProductHead: what a gene and a cell have to do with each other, as a product of a map of each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xtrimogene.network.pooling import pool


class CellNorm(nn.Module):
    """Each channel of the cells' vectors with mean 0 and variance 1 over cells, times `weight`, plus `bias`.

    What cells have in common is large beside what tells them apart, and a LayerNorm would leave it there. In training
    the moments are those of the batch, as in batch norm (Ioffe and Szegedy 2015); in evaluation, and for a batch of one
    cell, they are `mean` and `variance`, which settle sets. They are not averaged along the way: such averages
    lag behind the weights.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))

    def settle(self, cells: Tensor) -> None:
        """Take the moments of these cells (n, dim), n > 1, for evaluation."""
        self.mean.copy_(cells.mean(dim=0))
        self.variance.copy_(cells.var(dim=0, correction=0))

    def forward(self, cells: Tensor) -> Tensor:
        """(n, dim) -> (n, dim)."""
        if self.training and len(cells) > 1:
            return F.batch_norm(cells, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return (cells - self.mean) * (self.variance + self.eps).rsqrt() * self.weight + self.bias


class ProductHead(nn.Module):
    """The term <W_g row_g, W_c norm(pooled_c)> of the prediction of gene g in cell c.

    row_g is the gene's row of the gene table, pooled_c the mean of the encoder's rows of the cell's tokens, norm a
    CellNorm, W_g and W_c linear maps (width, dim). The published decoder has no way to multiply what it knows of the
    gene by what it knows of the cell but its feed-forward and attention layers, which learn that product slowly; as a
    term of its own (the "MVC" decoder of scGPT, Cui et al. 2024) it is there from the first step.

    The arithmetic is float32 (float64 for float64), under autocast too: it costs next to nothing.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm = CellNorm(dim)
        self.cell_map = nn.Linear(dim, width, bias=False)
        self.gene_map = nn.Linear(dim, width, bias=False)

    def forward(self, gene_rows: Tensor, encoded: Tensor, cu_seqlens: Tensor, *, depth_tokens: bool) -> Tensor:
        """The term of every gene in every cell, (batch, positions) float32 (float64 for float64).

        gene_rows             (positions, dim), one row for each gene (and depth token)
        encoded, cu_seqlens   (total_nnz, dim), (batch + 1,) int32: the encoder's rows of the tokens of each cell
        depth_tokens          whether each cell's last two tokens are T and S

        A cell without genes is taken for one whose pooled row is 0.
        """
        with torch.autocast(encoded.device.type, enabled=False):
            pooled = pool(encoded, cu_seqlens, "mean", depth_tokens=depth_tokens)
            no_genes = cu_seqlens.diff() <= 2 * depth_tokens
            pooled = pooled.masked_fill(no_genes[:, None], 0.0).to(self.norm.weight.dtype)
            # <W_g row, v> = <row, W_g^T v>: a map of each cell, where a map of each gene would cost the whole table.
            cells = self.cell_map(self.norm(pooled)) @ self.gene_map.weight
            products = cells @ gene_rows.to(cells.dtype).t()
        return products if products.dtype == torch.float64 else products.float()
