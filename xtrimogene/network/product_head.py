"""ProductHead: what a gene and a cell have to do with each other, as a product of a vector of each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xtg_kernels import RaggedBatch
from xtrimogene.network.config import DEPTH_NUMBERS, PRODUCT_HIDDEN_MULT
from xtrimogene.network.pooling import pool


class CellNorm(nn.Module):
    """Each channel of the cells' vectors less `mean`, by the root of `variance`, times `weight`, plus `bias`.

    What cells have in common is large beside what tells them apart, and a LayerNorm would leave it there. The moments
    are those of cells that settle was given, in training too: cells of a batch are often of one file, and the moments
    of a batch (batch norm) would take away what these have in common, and make a cell's prediction depend on others.
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
        """Take the moments of these cells (n, dim), n > 1."""
        self.mean.copy_(cells.mean(dim=0))
        self.variance.copy_(cells.var(dim=0, correction=0))

    @property
    def is_settled(self) -> bool:
        """Whether it has moments of cells, and not those that it was made with."""
        return bool((self.mean != 0).any() or (self.variance != 1).any())

    def forward(self, cells: Tensor) -> Tensor:
        """(n, dim) -> (n, dim)."""
        return (cells - self.mean) * (self.variance + self.eps).rsqrt() * self.weight + self.bias


def cells_of_tokens(batch: RaggedBatch) -> Tensor:
    """(total_nnz,) the cell of each token; slack counts to the last one."""
    tokens = torch.arange(batch.total_nnz, device=batch.cu_seqlens.device, dtype=batch.cu_seqlens.dtype)
    return torch.searchsorted(batch.cu_seqlens[1:], tokens, right=True).clamp(max=max(batch.batch_size - 1, 0))


class ProductHead(nn.Module):
    """The term <W_g row_g, cell_c> + b_g of the prediction of gene g in cell c, cell_c the cell's vector:

        n_c    = CellNorm([depth_c, bag_c, pooled_c])
        cell_c = A n_c + C relu(B n_c)

    row_g     row g of the gene table
    depth_c   log(1 + genes), mean and sum of the values that are seen of the cell
    bag_c     sum over the genes seen of value * row_g, divided by the square root of their number
    pooled_c  mean of the encoder's rows of the cell's tokens

    The published network has no way to multiply what it knows of the gene by what it knows of the cell, nor a value by
    its gene's row, but its feed-forward and attention layers, which learn products slowly. As terms of their own (the
    "MVC" decoder of scGPT, Cui et al. 2024, has the first) they are there from the first step: without pooled_c, the
    term is an auto-encoder of one hidden layer beside principal components. A and B start with zeros for pooled_c.

    In training a share `dropout` of the channels of cell_c is dropped. The arithmetic is float32 (float64 for float64),
    under autocast too.
    """

    def __init__(self, dim: int, width: int, positions: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        features = DEPTH_NUMBERS + 2 * dim
        self.norm = CellNorm(features)
        self.cell_map = nn.Linear(features, width)
        self.hidden = nn.Linear(features, PRODUCT_HIDDEN_MULT * width)
        self.out = nn.Linear(PRODUCT_HIDDEN_MULT * width, width, bias=False)
        self.gene_map = nn.Linear(dim, width, bias=False)
        self.gene_bias = nn.Parameter(torch.zeros(positions))
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for layer in (self.cell_map, self.hidden):
                layer.weight[:, -dim:] = 0

    def features(
        self,
        gene_rows: Tensor,
        batch: RaggedBatch,
        encoded: Tensor | None,
        *,
        depth_tokens: bool,
        weights: Tensor | None = None,
    ) -> Tensor:
        """(batch, 3 + 2 dim) depth_c, bag_c and pooled_c of each cell, all zeros for a cell without genes.

        gene_rows     (positions, dim), one row for each gene (and depth token)
        encoded       (total_nnz, dim), the encoder's rows of the batch's tokens; None for zeros
        depth_tokens  whether each cell's last two tokens are T and S, of which bag and depth know nothing
        weights       (total_nnz,) of the tokens in the bag; None for 1
        """
        dtype = self.norm.weight.dtype
        with torch.autocast(gene_rows.device.type, enabled=False):
            starts, ends = batch.cu_seqlens[:-1], batch.cu_seqlens[1:]
            gene_ends = torch.maximum(ends - 2 * depth_tokens, starts)
            tokens = torch.arange(batch.total_nnz, device=gene_rows.device, dtype=starts.dtype)
            cells = cells_of_tokens(batch)
            # Depth tokens and slack, whose ids may be anything, weigh nothing.
            values = torch.where(tokens < gene_ends[cells], batch.values.to(dtype), 0)
            bag = F.embedding_bag(
                batch.gene_ids.to(starts.dtype).clamp(0, len(gene_rows) - 1),
                gene_rows.to(dtype),
                starts,
                mode="sum",
                per_sample_weights=values if weights is None else values * weights,
            )
            genes = (gene_ends - starts).to(dtype)
            total = torch.segment_reduce(values, "sum", offsets=batch.cu_seqlens.long(), axis=0)
            # The sum in thousands: a channel of about 1, whatever norm it goes through.
            numbers = [genes.log1p(), total / genes.clamp(min=1), total / 1000]
            pooled = torch.zeros_like(bag)
            if encoded is not None:
                pooled = pool(encoded, batch.cu_seqlens, "mean", depth_tokens=depth_tokens).to(dtype)
                pooled = pooled.masked_fill((genes == 0)[:, None], 0.0)
            return torch.cat([torch.stack(numbers, dim=1), bag / genes.clamp(min=1).sqrt()[:, None], pooled], dim=1)

    def cells(self, features: Tensor) -> Tensor:
        """(batch, width) the cells' vectors, of their features."""
        with torch.autocast(features.device.type, enabled=False):
            normed = self.norm(features)
            return self.dropout(self.cell_map(normed) + self.out(F.relu(self.hidden(normed))))

    def forward(self, gene_rows: Tensor, features: Tensor) -> Tensor:
        """The term of every gene in every cell, (batch, positions) in the dtype of the weights.

        gene_rows (positions, dim), features (batch, 3 + 2 dim) those of the cells.
        """
        with torch.autocast(features.device.type, enabled=False):
            # <W_g row, cell> = <row, W_g^T cell>: a map of each cell, where one of each gene would be of a whole table.
            cells = self.cells(features) @ self.gene_map.weight
            return torch.addmm(self.gene_bias, cells, gene_rows.to(cells.dtype).t())
