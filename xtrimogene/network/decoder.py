"""Decoder: linear attention over all genes of a cell, from the encoder's rows to a row and a prediction per gene."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xtg_kernels import RaggedBatch, favor_attention, masked_decoder_gather, masked_head, masked_mse
from xtrimogene.network.linear import in_autocast_dtype, is_large, linear, norm_feed_forward, norm_linear, untouched


@dataclass(frozen=True)
class GeneRows:
    """Genes of each cell, ragged: where they are among the (batch * positions) rows of the decoder.

    rows        (n,) int64, cell * positions + gene id; the genes of a cell follow one another
    cu_seqlens  (batch + 1,) int32; cell c owns rows cu_seqlens[c]:cu_seqlens[c + 1]
    """

    rows: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, gene_ids: Tensor, cu_seqlens: Tensor, num_positions: int) -> GeneRows:
        """From gene ids (n,). Slack, past cu_seqlens[-1], gets the number of rows, batch * num_positions."""
        numbers = torch.arange(len(gene_ids), device=gene_ids.device)
        batch = len(cu_seqlens) - 1
        cells = torch.searchsorted(cu_seqlens[1:].long(), numbers, right=True)
        return cls(torch.where(cells < batch, cells * num_positions + gene_ids, batch * num_positions), cu_seqlens)


@dataclass(frozen=True)
class SharedRows:
    """The decoder's input with equal rows once: genes that are zero and not masked have the same row in every cell.

    rows   (n, dim) distinct rows: first those of such a gene, one for each position, then all others of each cell
    index  (batch * positions,) int64: which of them each row of the input is
    """

    rows: Tensor
    index: Tensor


class PerformerLayer(nn.Module):
    """One pre-norm layer of a Performer (Choromanski et al. 2021), non-causal:

    x = x + out_proj(favor_attention(q_proj(norm1(x)), k_proj(norm1(x)), v_proj(norm1(x))))
    x = x + linear2(gelu(linear1(norm2(x))))

    with the exact (erf) GELU and no dropout. `projection` (num_features, head width) is a buffer that is saved and
    loaded: the layer's output depends on it.
    """

    projection: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        num_features: int,
        *,
        layer_norm_eps: float = 1e-5,
        favor_eps: float = 1e-4,
        stabilizer: str = "head",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads = {num_heads}, got {dim}")
        self.num_heads, self.favor_eps, self.stabilizer = num_heads, favor_eps, stabilizer
        self.norm1 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.register_buffer("projection", torch.empty(num_features, dim // num_heads))
        self.redraw_projection()

    def redraw_projection(self, generator: torch.Generator | None = None) -> None:
        """A fresh projection, of a generator on the CPU (None: torch's global one)."""
        self.projection.copy_(orthogonal_projection(*self.projection.shape, generator=generator))

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        shared: SharedRows | None = None,
        asked: GeneRows | None = None,
    ) -> Tensor:
        """x (total, dim) -> (total, dim), or (n, dim) for the n asked rows, whose keys and values are still all rows.

        shared holds x with equal rows once.
        """
        rows = x if shared is None else shared.rows
        if asked is None:
            q_rows = x
            projected = self._normed_linear(rows, (self.q_proj, self.k_proj, self.v_proj))
        else:
            chosen = asked.rows if shared is None else shared.index[asked.rows]
            *projected, q_rows = self._normed_linear(rows, (self.k_proj, self.v_proj), chosen)
        if shared is not None:
            projected = [F.embedding(shared.index, part) for part in projected]
        q, k, v = projected if asked is None else (*self._normed_linear(q_rows, (self.q_proj,)), *projected)
        q, k, v = (rows.unflatten(1, (self.num_heads, -1)) for rows in (q, k, v))
        attended = favor_attention(
            q,
            k,
            v,
            self.projection.to(torch.promote_types(q.dtype, torch.float32)),
            cu_seqlens,
            max_seqlen,
            cu_seqlens_q=None if asked is None else asked.cu_seqlens,
            max_seqlen_q=None if asked is None else max_seqlen,
            eps=self.favor_eps,
            stabilizer=self.stabilizer,
        )
        return self._add_feed_forward(self._add_linear(q_rows, attended.flatten(1), self.out_proj))

    def _normed_linear(self, x: Tensor, layers: tuple[nn.Linear, ...], rows: Tensor | None = None) -> list[Tensor]:
        """Each of these layers of the normed x; the norm is taken once. With rows also x[rows], last."""
        if untouched(x, (self.norm1, *layers)):
            operands = in_autocast_dtype(*(layer.weight for layer in layers), *(layer.bias for layer in layers))
            weight, bias = torch.cat(operands[: len(layers)]), torch.cat(operands[len(layers) :])
            if _goes_by_blocks(len(x), weight, bias):
                norm = (self.norm1.weight, self.norm1.bias, self.norm1.eps)
                return list(norm_linear(x, *norm, weight, bias, len(layers), rows))
        normed = self.norm1(x)
        return [layer(normed) for layer in layers] + ([] if rows is None else [F.embedding(rows, x)])

    def _add_linear(self, x: Tensor, rows: Tensor, layer: nn.Linear) -> Tensor:
        if untouched(rows, (layer,)):
            rows, weight, bias = in_autocast_dtype(rows, layer.weight, layer.bias)
            if _goes_by_blocks(len(rows), weight, bias, rows):
                return linear(rows, weight, bias, residual=x)
        return x + layer(rows)

    def _add_feed_forward(self, x: Tensor) -> Tensor:
        if untouched(x, (self.norm2, self.linear1, self.linear2)):
            weights = in_autocast_dtype(self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias)
            if _goes_by_blocks(len(x), *weights):
                return norm_feed_forward(x, self.norm2.weight, self.norm2.bias, self.norm2.eps, *weights)
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class Decoder(nn.Module):
    """The decoder of xTrimoGene (Gong et al. 2023, arXiv 2311.15156): from what is known of each gene to a row for it.

    The input row of gene g is bridge(x + gene_rows[g]), where x is the encoder's row of an encoded gene, zero_row for a
    gene that is zero and mask_row for a masked one. Then Performer layers, two LayerNorms and a linear head.

    It computes what is asked for and nothing twice; the result is the plain network's, up to rounding:

    - the bridge is linear, so gene_rows go through it once for all cells, as do zero_row and mask_row;
    - the first layer norms and projects the row of an unmasked zero gene once for all cells;
    - the last layer has keys and values of all genes, and all else, norms and head too, of the asked ones only.

    `checkpoint_activations = True` keeps only the input of each layer for the backward and computes the rest again.
    """

    def __init__(
        self,
        encoder_dim: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        *,
        ffn_dim: int,
        num_features: int,
        layer_norm_eps: float = 1e-5,
        favor_eps: float = 1e-4,
        stabilizer: str = "head",
    ) -> None:
        super().__init__()
        self.bridge = nn.Linear(encoder_dim, dim)
        self.layers = nn.ModuleList(
            PerformerLayer(
                dim,
                num_heads,
                ffn_dim,
                num_features,
                layer_norm_eps=layer_norm_eps,
                favor_eps=favor_eps,
                stabilizer=stabilizer,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.final_norm = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.head = nn.Linear(dim, 1)
        self.checkpoint_activations = False

    def redraw_projections(self, generator: torch.Generator | None = None) -> None:
        """Fresh random projections in every layer, of a generator on the CPU (None: torch's global one)."""
        for layer in cast(list[PerformerLayer], list(self.layers)):
            layer.redraw_projection(generator)

    def forward(
        self,
        gene_rows: Tensor,
        zero_row: Tensor,
        mask_row: Tensor,
        encoded: Tensor,
        batch: RaggedBatch,
        *,
        masked_ids: Tensor | None = None,
        masked_cu_seqlens: Tensor | None = None,
        asked_ids: Tensor | None = None,
        asked_cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Rows of the last layer, before the norms: (batch * positions, dim), or (n, dim) for n asked genes.

        gene_rows            (positions, encoder_dim), one row for each gene (and depth token)
        zero_row, mask_row   (encoder_dim,)
        encoded              (total_nnz, encoder_dim), the encoder's rows of the tokens of batch
        batch                its gene ids ascend strictly in each cell
        masked_ids, masked_cu_seqlens
                             (total_masked,), (batch + 1,) int32: masked genes of each cell, ascending; None for none
        asked_ids, asked_cu_seqlens
                             (n,), (batch + 1,) int32: genes of each cell to compute, in any order; None for all
        """
        positions, cells = len(gene_rows), batch.batch_size
        table = self._project(gene_rows)
        rows = F.linear(torch.cat([encoded, zero_row[None], mask_row[None]]), self.bridge.weight)
        # The sum of the layers' outputs is kept in the weights' dtype, under autocast too, as in the encoder.
        table, rows = table.to(self.bridge.weight.dtype), rows.to(self.bridge.weight.dtype)
        encoded, zero_row, mask_row = rows[:-2], rows[-2], rows[-1]
        with torch.autocast(table.device.type, enabled=False):
            x = masked_decoder_gather(
                table, zero_row, mask_row, encoded, batch.cu_seqlens, batch.gene_ids, masked_ids, masked_cu_seqlens
            ).flatten(0, 1)
        shared = None
        if cells > 1:
            own, gene_ids, known = (
                GeneRows.of(batch.gene_ids, batch.cu_seqlens, positions).rows,
                batch.gene_ids,
                encoded,
            )
            if masked_ids is not None and masked_cu_seqlens is not None:
                own = torch.cat([own, GeneRows.of(masked_ids, masked_cu_seqlens, positions).rows])
                gene_ids = torch.cat([gene_ids, masked_ids])
                known = torch.cat([known, mask_row.expand(len(masked_ids), -1)])
            # One cell more takes the slack, whose ids may be anything.
            index = torch.arange(positions, device=x.device).repeat(cells + 1)
            index[own] = torch.arange(positions, positions + len(own), device=x.device)
            own_rows = F.embedding(gene_ids.clamp(0, positions - 1), table) + known
            shared = SharedRows(torch.cat([table + zero_row, own_rows]), index[: len(x)])
        asked = None
        if asked_ids is not None and asked_cu_seqlens is not None:
            asked = GeneRows.of(asked_ids, asked_cu_seqlens, positions)
        cu_seqlens = torch.arange(0, (cells + 1) * positions, positions, dtype=torch.int32, device=x.device)
        for i, layer in enumerate(self.layers):
            shared_here, asked_here = shared if i == 0 else None, asked if i + 1 == len(self.layers) else None
            saving = functools.partial(layer, shared=shared_here, asked=asked_here)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(saving, x, cu_seqlens, positions, use_reentrant=False)
            else:
                x = saving(x, cu_seqlens, positions)
        return x

    def _project(self, gene_rows: Tensor) -> Tensor:
        """bridge(gene_rows)."""
        if untouched(gene_rows, (self.bridge,)):
            rows, weight, bias = in_autocast_dtype(gene_rows, self.bridge.weight, self.bridge.bias)
            if _goes_by_blocks(len(rows), weight, bias, rows):
                return linear(rows, weight, bias)
        return self.bridge(gene_rows)

    def normed(self, x: Tensor) -> Tensor:
        """(n, dim) rows after both norms, which the head reads: the embeddings of genes."""
        return self.final_norm(self.norm(x))

    def predictions(self, x: Tensor) -> Tensor:
        """(n,) float32: the head's prediction for each row of forward."""
        return masked_head(x, None, *self._head(), eps=self.norm.eps)

    def squared_error(self, x: Tensor, target: Tensor, reduction: str) -> Tensor:
        """() float32: squared error of the predictions against target (n,), summed or averaged ("sum", "mean")."""
        return masked_mse(x, None, target, *self._head(), eps=self.norm.eps, reduction=reduction)

    def _head(self) -> tuple[Tensor, ...]:
        norms = (self.norm.weight, self.norm.bias, self.final_norm.weight, self.final_norm.bias)
        return (*norms, self.head.weight[0], self.head.bias)


def _goes_by_blocks(rows: int, weight: Tensor, *operands: Tensor) -> bool:
    """Whether layers of so many rows go by blocks, weight being the one of the wider layer: wherever tensors are large,
    be it faster or not, because less is kept for the backward. Never where the dtypes of the operands differ."""
    return is_large(rows, len(weight), weight.dtype) and all(x.dtype == weight.dtype for x in operands)


def orthogonal_projection(num_features: int, head_dim: int, *, generator: torch.Generator | None = None) -> Tensor:
    """(num_features, head_dim) float32 projection of FAVOR+: orthogonal rows, in blocks, with lengths of Gaussian ones.

    Blocks of up to head_dim rows are rows of Q, from the QR decomposition of a Gaussian matrix; each row is then scaled
    by the length of a fresh Gaussian vector of head_dim channels. The numbers come from the generator, or torch's
    global one.
    """

    def normal(rows: int) -> Tensor:
        device = None if generator is None else generator.device
        return torch.randn(rows, head_dim, generator=generator, device=device, dtype=torch.float32)

    blocks = [torch.linalg.qr(normal(head_dim)).Q.T for _ in range(-(-num_features // head_dim))]
    return torch.cat(blocks)[:num_features] * normal(num_features).norm(dim=1, keepdim=True)
