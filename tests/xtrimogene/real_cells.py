"""Real cells as a RaggedBatch, made in a few lines of SciPy: an oracle, free of the project's own readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from xtg_kernels import RaggedBatch, distinct_index


def _ragged(matrix: sp.csr_matrix) -> RaggedBatch:
    matrix.sort_indices()
    cu_seqlens = torch.from_numpy(matrix.indptr.astype(np.int32))
    values = torch.from_numpy(matrix.data.astype(np.float32))
    return RaggedBatch(
        values,
        torch.from_numpy(matrix.indices.astype(np.int32)),
        cu_seqlens,
        int(np.diff(matrix.indptr).max()),
        distinct_index(values, cu_seqlens),
    )


def scanpy_cells(rows: slice) -> RaggedBatch:
    """Log-normalised cells of scanpy's shipped PBMC (765 genes); needs no network and no file but scanpy's own."""
    import scanpy

    return _ragged(sp.csr_matrix(scanpy.datasets.pbmc68k_reduced().raw.X[rows]))


def zheng_cells(shared_data: Path, rows: slice) -> RaggedBatch:
    """Bead-purified PBMC (Zheng et al. 2017), symbols mapped onto the 19,264-gene vocabulary, log1p CP10k."""
    import anndata

    lines = (shared_data / "gene_vocabulary_19264.tsv").read_text().splitlines()[1:]
    index_of = {name: int(index) for name, index in (line.split("\t") for line in lines)}
    adata = anndata.read_h5ad(shared_data / "zheng_pbmc_facs.h5ad")
    gene_ids = adata.var["symbol"].map(index_of).to_numpy()
    found = ~np.isnan(gene_ids)
    counts = sp.coo_matrix(adata.X[rows][:, found])
    shape = (counts.shape[0], len(index_of))
    mapped = sp.csr_matrix((counts.data, (counts.row, gene_ids[found].astype(np.int64)[counts.col])), shape=shape)
    totals = np.asarray(mapped.sum(axis=1)).repeat(np.diff(mapped.indptr))
    mapped.data = np.log1p(mapped.data / totals * 1e4)
    return _ragged(mapped)
