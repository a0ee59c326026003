"""XTrimoGeneNetwork: value embedding, ragged encoder and decoder as one module."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xtg_kernels import RaggedBatch
from xtrimogene.network.config import PRODUCT, XTrimoGeneConfig
from xtrimogene.network.decoder import Decoder, GeneRows
from xtrimogene.network.dropping import DropoutKey, any_drops
from xtrimogene.network.embedding import ExpressionEmbedding
from xtrimogene.network.encoder import RaggedTransformerEncoder
from xtrimogene.network.folder import Checkpoint
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.pooling import pool
from xtrimogene.network.product_head import ProductHead, cells_of_tokens
from xtrimogene.network.vocabulary import Vocabulary

# Most tokens that are hidden beside the masked ones while the product head learns alone, as a share.
FURTHER_HIDDEN = 0.6


class XTrimoGeneNetwork(nn.Module):
    """xTrimoGene (Gong et al., NeurIPS 2023): an encoder of each cell's expressed genes, a decoder of all its genes.

    config      XTrimoGeneConfig
    vocabulary  Vocabulary of config.num_genes genes; gene ids of a batch are its rows

    Submodules: `embedding` (ExpressionEmbedding), `encoder` (RaggedTransformerEncoder), `decoder` (Decoder) and, where
    config.product_head is a width, `product_head` (ProductHead), whose term is added to what the decoder predicts;
    `mask_row` (dim,) is the decoder's input for a masked gene. Cell embeddings need the first two only.
    `checkpoint_activations = True` makes training keep less and compute more.
    Raises ValueError when the vocabulary's size is not config.num_genes.
    """

    def __init__(self, config: XTrimoGeneConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if len(vocabulary) != config.num_genes:
            raise ValueError(f"vocabulary: expected config.num_genes = {config.num_genes} genes, got {len(vocabulary)}")
        self.config = config
        self.vocabulary = vocabulary
        self.embedding = ExpressionEmbedding(
            config.num_positions, config.dim, num_bins=config.num_bins, alpha=config.alpha, gene_std=config.gene_std
        )
        self.encoder = RaggedTransformerEncoder(
            config.dim,
            config.num_heads,
            config.num_layers,
            ffn_dim=config.ffn_dim,
            dropout=config.dropout,
            layer_norm_eps=config.layer_norm_eps,
        )
        self.mask_row = nn.Parameter(torch.randn(config.dim))
        self.decoder = Decoder(
            config.dim,
            config.decoder_dim,
            config.decoder_heads,
            config.decoder_layers,
            ffn_dim=config.decoder_ffn_dim,
            num_features=config.num_features,
            layer_norm_eps=config.layer_norm_eps,
            favor_eps=config.favor_eps,
            stabilizer=config.stabilizer,
        )
        # Last: the weights before it are those of the same seed without it.
        self.product_head: ProductHead | None = None
        if config.product_head is not None:
            self.product_head = ProductHead(
                config.dim, config.product_head, config.num_positions, dropout=config.product_dropout
            )
            # The decoder begins with adding nothing, as the encoder does in the head.
            nn.init.zeros_(self.decoder.head.weight)
            nn.init.zeros_(self.decoder.head.bias)

    @property
    def checkpoint_activations(self) -> bool:
        """Whether encoder and decoder keep only the input of each layer for the backward and compute the rest again."""
        return self.encoder.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        self.encoder.checkpoint_activations = self.decoder.checkpoint_activations = value

    @classmethod
    def from_preset(cls, name: str, vocabulary: Vocabulary, *, seed: int = 0, **overrides: Any) -> Self:
        """A fresh, untrained model of preset "tiny", "3m", "10m" or "100m", in evaluation mode.

        The weights depend on the seed only; the global random state is left as it was. overrides replace config keys.
        """
        config = XTrimoGeneConfig.preset(name, num_genes=len(vocabulary), **overrides)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config, vocabulary).eval()

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, *, device: str | torch.device = "cpu") -> Self:
        """The model of an opened folder: float32, evaluation mode. Raises ValueError for weights that do not fit."""
        checkpoint.check_sizes()
        with torch.device("meta"):
            network = cls(checkpoint.config, checkpoint.vocabulary)
        network.load_state_dict(checkpoint.tensors(network, device), assign=True)
        return network.eval()

    def forward(self, batch: RaggedBatch, dropout_key: DropoutKey | None = None) -> Tensor:
        """(total_nnz, dim): the encoder's row of every token of the batch. dropout_key is the encoder's."""
        return self.encoder(self.embedding(batch), batch.cu_seqlens, batch.max_seqlen, dropout_key=dropout_key)

    def embed_batch(self, batch: RaggedBatch, pooling: str | None = None) -> Tensor:
        """(batch, dim) float32: one embedding per cell, NaN for a cell without expressed genes.

        pooling  "mean", "max" or "all" (4 dim): see pool; "product" (config.product_head): the cell's vector of the
                 product head; None for "product" where there is such a head, else "mean"

        Runs in the model's present mode and with gradients if they are enabled: call eval() and torch.inference_mode()
        for embeddings alone.
        """
        pooling, encoded = self.config.pooling(pooling), self(batch)
        if pooling != PRODUCT:
            return pool(encoded, batch.cu_seqlens, pooling, depth_tokens=self.config.depth_tokens)
        assert self.product_head is not None
        vectors = self.product_head.cells(self.product_features(batch, encoded))
        no_genes = batch.cu_seqlens.diff() <= 2 * self.config.depth_tokens
        vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
        return vectors.masked_fill(no_genes[:, None], torch.nan)

    def product_features(self, batch: RaggedBatch, encoded: Tensor | None) -> Tensor:
        """What the product head reads of each cell, see ProductHead.features; encoded None for the head by itself."""
        assert self.product_head is not None
        return self.product_head.features(
            self.embedding.gene_table[:-1], batch, encoded, depth_tokens=self.config.depth_tokens
        )

    def masked_predictions(self, masked: MaskedBatch, *, dropout_seed: int | None = None) -> Tensor:
        """(total_chosen,) float32: predicted log-normalised values of the chosen genes, in the order of chosen_ids.

        dropout_seed is that of loss.
        """
        return self.predict(masked.batch, self._dropout_key(masked, dropout_seed), **_genes_of(masked))

    def loss(self, masked: MaskedBatch, reduction: str = "sum", *, dropout_seed: int | None = None) -> Tensor:
        """() float32: squared error of masked_predictions against chosen_values, summed or averaged ("sum", "mean").

        dropout_seed  of the encoder's dropout in training: with the same one a cell has the same masks in any batch;
                      None takes one from torch's generator
        """
        if self.product_head is None:
            rows = self.decode(masked.batch, self._dropout_key(masked, dropout_seed), **_genes_of(masked))
            return self.decoder.squared_error(rows, masked.chosen_values, reduction)
        predictions = self.masked_predictions(masked, dropout_seed=dropout_seed)
        return F.mse_loss(predictions, masked.chosen_values, reduction=reduction)

    def _dropout_key(self, masked: MaskedBatch, seed: int | None) -> DropoutKey | None:
        if not any_drops(list(self.encoder.modules())):
            return None
        return DropoutKey.of(masked.batch.cu_seqlens, masked.batch.total_nnz, masked.cells, seed)

    def product_loss(self, masked: MaskedBatch, nonzero_rate: float, zero_rate: float) -> Tensor:
        """() the loss of the product head by itself, without encoder and decoder, at every gene the head is not shown.

        Of the tokens a further share is hidden, for each cell another between 0 and FURTHER_HIDDEN. The squared error
        at a gene that is zero counts zero_rate, at another one that is hidden so much that all of the cell's would
        count nonzero_rate: it is the sum that loss would give if other genes were chosen, with less noise.
        """
        assert self.product_head is not None
        batch, genes = masked.batch, self.config.num_genes
        cells = cells_of_tokens(batch)
        is_gene = batch.gene_ids < genes
        shares = FURTHER_HIDDEN * torch.rand(batch.batch_size, device=batch.values.device)
        kept = torch.rand_like(batch.values) >= shares[cells]
        features = self.product_head.features(
            self.embedding.gene_table[:-1],
            batch,
            None,
            depth_tokens=self.config.depth_tokens,
            weights=kept / (1 - shares[cells]),
        )
        predicted = self.product_head(self.embedding.gene_table[:-1], features)[:, :genes]
        chosen = torch.repeat_interleave(masked.chosen_cu_seqlens.diff().long()), masked.chosen_ids.long()
        truth, shown = torch.zeros_like(predicted), torch.zeros_like(predicted, dtype=torch.bool)
        at = cells[is_gene], batch.gene_ids[is_gene].long()
        truth[at], shown[at] = batch.values[is_gene].to(truth.dtype), kept[is_gene]
        # What was chosen is hidden, or shown with a value that is not its own.
        truth[chosen], shown[chosen] = masked.chosen_values.to(truth.dtype), False
        hidden = (truth > 0) & ~shown
        of_cell = (truth > 0).sum(dim=1) / hidden.sum(dim=1).clamp(min=1)
        weights = torch.where(hidden, nonzero_rate * of_cell[:, None], zero_rate * (truth == 0))
        return (weights * (predicted - truth).square()).sum()

    def redraw_projections(self, generator: torch.Generator | None = None) -> None:
        """Fresh random projections in every decoder layer, of a generator on the CPU (None: torch's global one)."""
        self.decoder.redraw_projections(generator)

    def decode(self, batch: RaggedBatch, dropout_key: DropoutKey | None = None, /, **genes: Tensor | None) -> Tensor:
        """The decoder's rows of a batch, before its norms; genes are the masked and asked ones of Decoder.forward."""
        return self._decode(self(batch, dropout_key), batch, **genes)

    def predict(self, batch: RaggedBatch, dropout_key: DropoutKey | None = None, /, **genes: Tensor | None) -> Tensor:
        """(n,) float32: predicted log-normalised values of the asked genes of each cell, or (batch * positions,) of all
        of them; genes are the masked and asked ones of Decoder.forward."""
        encoded = self(batch, dropout_key)
        predictions = self.decoder.predictions(self._decode(encoded, batch, **genes))
        if self.product_head is None:
            return predictions
        return predictions + self._products(batch, encoded, genes.get("asked_ids"), genes.get("asked_cu_seqlens"))

    def _products(
        self, batch: RaggedBatch, encoded: Tensor | None, asked_ids: Tensor | None, asked_cu_seqlens: Tensor | None
    ) -> Tensor:
        """(n,) the product head's term at the asked genes, or (batch * positions,) at all."""
        assert self.product_head is not None
        features = self.product_features(batch, encoded)
        products = self.product_head(self.embedding.gene_table[:-1], features).flatten()
        products = products if products.dtype == torch.float64 else products.float()
        if asked_ids is None or asked_cu_seqlens is None:
            return products
        return products.index_select(0, GeneRows.of(asked_ids, asked_cu_seqlens, self.config.num_positions).rows)

    def _decode(self, encoded: Tensor, batch: RaggedBatch, **genes: Tensor | None) -> Tensor:
        zero_row = self.embedding.value_rows(batch.values.new_zeros(1))[0]
        return self.decoder(self.embedding.gene_table[:-1], zero_row, self.mask_row, encoded, batch, **genes)


def _genes_of(masked: MaskedBatch) -> dict[str, Tensor | None]:
    """The masked and chosen genes as Decoder.forward takes them."""
    return {
        "masked_ids": masked.masked_ids,
        "masked_cu_seqlens": masked.masked_cu_seqlens,
        "asked_ids": masked.chosen_ids,
        "asked_cu_seqlens": masked.chosen_cu_seqlens,
    }
