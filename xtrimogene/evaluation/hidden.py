"""HiddenGenes: masked cells as matrices: what is seen of each cell, what it holds, which of its genes are hidden."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.model import XTrimoGeneNetwork

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class HiddenGenes:
    """Cells of masked batches, n of them, in the genes of a vocabulary, G.

    seen         (n, G) CSR float32: values that the encoder sees, random ones in the place of some among them
    whole        (n, G) CSR float32: the true values of all genes
    cells        (hidden,) int64: row of each hidden gene's cell
    genes        (hidden,) int64: its gene id
    values       (hidden,) float64: its true log-normalised value
    predictions  (hidden,) float64: what a model predicts there; None without a model
    """

    seen: sparse.csr_matrix
    whole: sparse.csr_matrix
    cells: npt.NDArray[np.int64]
    genes: npt.NDArray[np.int64]
    values: Values
    predictions: Values | None = None

    @classmethod
    def of(cls, batches: Iterable[MaskedBatch], num_genes: int, model: XTrimoGeneNetwork | None = None) -> HiddenGenes:
        """From masked batches on the CPU; a model predicts where it is, in its present dtype and mode."""
        seen, whole, cells, genes, values, predictions, first = [], [], [], [], [], [], 0
        for masked in batches:
            shape = (masked.batch_size, num_genes)
            chosen = masked.chosen_ids.numpy().astype(np.int64)
            rows = np.repeat(np.arange(masked.batch_size), masked.chosen_cu_seqlens.diff().numpy())
            true = masked.chosen_values.numpy().astype(np.float64)
            hidden = is_hidden(masked, num_genes)
            batch = masked.batch
            tokens = np.repeat(np.arange(masked.batch_size), batch.lengths.numpy()), batch.gene_ids.numpy()
            is_gene = tokens[1] < num_genes  # depth tokens are none
            row, column = (part[is_gene] for part in tokens)
            shown = batch.values.numpy()[is_gene]
            own = ~np.isin(row * num_genes + column, rows * num_genes + chosen)
            seen.append(sparse.csr_matrix((shown, (row, column)), shape=shape))
            both = (
                np.concatenate([shown[own], true]),
                (
                    np.concatenate([row[own], rows]),
                    np.concatenate([column[own], chosen]),
                ),
            )
            whole.append(sparse.csr_matrix(both, shape=shape, dtype=np.float32))
            whole[-1].eliminate_zeros()
            cells.append(first + rows[hidden])
            genes.append(chosen[hidden])
            values.append(true[hidden])
            if model is not None:
                with torch.inference_mode():
                    predicted = model.masked_predictions(masked.to(model.mask_row.device))
                predictions.append(predicted.double().cpu().numpy()[hidden])
            first += masked.batch_size
        return cls(
            sparse.vstack(seen).tocsr(),
            sparse.vstack(whole).tocsr(),
            np.concatenate(cells),
            np.concatenate(genes),
            np.concatenate(values),
            np.concatenate(predictions) if predictions else None,
        )


def is_hidden(masked: MaskedBatch, num_genes: int) -> npt.NDArray[np.bool_]:
    """(total_chosen,) whether each chosen gene is hidden from the encoder; others show their value or a random one."""

    def numbers(ids: torch.Tensor, cu_seqlens: torch.Tensor) -> npt.NDArray[np.int64]:
        cells = np.repeat(np.arange(masked.batch_size), cu_seqlens.diff().numpy())
        return cells * num_genes + ids.numpy()

    chosen = numbers(masked.chosen_ids, masked.chosen_cu_seqlens)
    return np.isin(chosen, numbers(masked.masked_ids, masked.masked_cu_seqlens))
