"""Some cells of ragged batches, and ragged batches joined, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xtg_kernels import RaggedBatch

Array = npt.NDArray[Any]


def taken(packed: RaggedBatch, rows: Array) -> RaggedBatch:
    """Some cells of a batch, in the order of rows; without distinct_index."""
    cu_seqlens = packed.cu_seqlens.numpy()
    lengths = np.diff(cu_seqlens)[rows]
    ends = np.cumsum(lengths, dtype=np.int64)
    entries = np.arange(int(lengths.sum())) + np.repeat(cu_seqlens[rows] - ends + lengths, lengths)
    return _batch(packed.values.numpy()[entries], packed.gene_ids.numpy()[entries], lengths)


def joined(pieces: list[RaggedBatch]) -> RaggedBatch:
    """The cells of several batches in one; without distinct_index."""
    if len(pieces) == 1:
        return pieces[0]
    values, gene_ids, lengths = (
        np.concatenate([np.zeros(0, dtype), *(getattr(piece, name).numpy() for piece in pieces)])
        for name, dtype in (("values", np.float32), ("gene_ids", np.int32), ("lengths", np.int32))
    )
    return _batch(values, gene_ids, lengths)


def _batch(values: Array, gene_ids: Array, lengths: Array) -> RaggedBatch:
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return RaggedBatch(
        torch.from_numpy(values),
        torch.from_numpy(gene_ids),
        torch.from_numpy(cu_seqlens),
        int(lengths.max(initial=0)),
    )
