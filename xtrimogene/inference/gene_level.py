"""Gene level: embeddings and predicted expression of genes in each cell, for an AnnData or a file of any size.

An embedding of a gene in a cell is the decoder's output before its head: the row after both LayerNorms, which the head
reads (in the published code, the "gene" output). A prediction is the head's number, a log-normalised expression, and
the product head's where the model has one.
Nothing is masked. For asked genes only, the last decoder layer and the norms and head after it are computed for these
alone.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch
from anndata import AnnData
from scipy import sparse

from xtg_kernels import RaggedBatch
from xtrimogene.cells.sources import open_cells, split_part
from xtrimogene.inference.model_cells import ModelCells, of_columns, opened
from xtrimogene.inference.options import (
    DEFAULT_BATCH_SIZE,
    EMBEDDINGS_KEY,
    FIXED_DTYPES,
    IMPUTED_LAYER,
)
from xtrimogene.inference.tables import NewHdf5, new_h5ad
from xtrimogene.network.devices import backend_name, choose_device, prepared
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.network.vocabulary import Vocabulary
from xtrimogene.progress import progress_bar

Numbers = npt.NDArray[np.float32]


@dataclass
class GeneReport:
    """What one run did: cells and those without a gene of the vocabulary (NaN), asked genes, columns of the data as in
    EmbedReport, and how it ran."""

    cells: int
    genes: int
    genes_found: int
    vocabulary_size: int
    dtype: str
    device: str
    backend: str
    columns_left_out: int = 0
    genes_renamed: int = 0
    old_names: int = 0
    empty_cells: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.cells / self.seconds if self.seconds > 0 else 0.0
        return (
            f"{self.cells:,} cells, {self.empty_cells:,} of them empty, {self.genes:,} genes asked for, "
            f"{self.genes_found:,} of {self.vocabulary_size:,} vocabulary genes found"
            f"{of_columns(self.columns_left_out, self.genes_renamed, self.old_names)}\n"
            f"{self.seconds:.1f} s, {rate:,.1f} cells/s, {self.dtype} on {self.device}, backend {self.backend}"
        )


def gene_embeddings(
    adata_or_path: AnnData | str | os.PathLike[str],
    model: XTrimoGeneNetwork | str | os.PathLike[str],
    genes: Sequence[str],
    *,
    output: str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[GeneReport, Numbers | None]:
    """Embeddings (n_obs, genes, decoder_dim) float32 of genes in every cell, whether the cell expresses them or not.

    Args:
        adata_or_path: cells, as for embed.
        model: a model, or its checkpoint folder.
        genes: names of the vocabulary.
        output: None to get the array; else an h5ad file to write, and None is returned in place of the array: an
            AnnData with the obs of the input, the genes as var, no X, and the array in obsm["gene_embeddings"], its
            second axis in the order of var. Memory does not grow with the number of cells then.
        options: those of predict_expression.

    Raises:
        ValueError, OSError: as predict_expression.
    """
    return _run(adata_or_path, model, genes, output, embeddings=True, **options)


def predict_expression(
    adata_or_path: AnnData | str | os.PathLike[str],
    model: XTrimoGeneNetwork | str | os.PathLike[str],
    genes: Sequence[str] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[GeneReport, Numbers | None]:
    """Predicted log-normalised expression (n_obs, genes) float32, of the genes or of the whole vocabulary.

    Args:
        adata_or_path, model, genes: as for gene_embeddings; genes None for all of the vocabulary, in its order.
        output: None to get the array; else an h5ad file to write: an AnnData with the obs of the input, the genes as
            var, what the model read as X (sparse: log-normalised counts, or the given values) and the predictions in
            layers["imputed"] (dense: none of them is 0).
        layer, gene_symbols, aliases, normalized, values, fractional_counts: as for embed.
        total_counts, target_depth, device, num_threads, overwrite, progress: as for embed.
        batch_size: cells decoded together; more takes more memory.
        dtype: "float32", or "bfloat16" by autocast.

    A cell without a gene of the vocabulary gets NaN, is counted in the report and warned about.

    Raises:
        ValueError, OSError: bad input or options, such as genes that the vocabulary lacks; the message names the
            argument or file, what was expected and what to do. Nothing is written then.
    """
    return _run(adata_or_path, model, genes, output, embeddings=False, **options)


def _run(
    adata_or_path: AnnData | str | os.PathLike[str],
    model: XTrimoGeneNetwork | str | os.PathLike[str],
    genes: Sequence[str] | None,
    output: str | os.PathLike[str] | None,
    *,
    embeddings: bool,
    layer: str | None = None,
    gene_symbols: str | None = None,
    normalized: bool = False,
    values: str | None = None,
    fractional_counts: bool = False,
    total_counts: str | None = None,
    aliases: str | os.PathLike[str] | None = None,
    target_depth: float | str | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    dtype: str = "float32",
    device: str | torch.device = "auto",
    num_threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[GeneReport, Numbers | None]:
    started = time.perf_counter()
    if dtype not in FIXED_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(FIXED_DTYPES)}, got {dtype!r}")
    for name, value in (("batch_size", batch_size), ("num_threads", num_threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if output is None and overwrite:
        raise ValueError("overwrite: expected output to be given too")
    destination = None if output is None else checked_output(adata_or_path, Path(output), overwrite)
    network = opened(model)
    torch_device = choose_device(device)
    gene_ids = None if genes is None else find_genes(network.vocabulary, genes)
    with open_cells(adata_or_path, layer=layer, gene_symbols=gene_symbols) as source:
        cells = ModelCells.checked(
            source,
            network,
            normalized=normalized,
            values=values,
            fractional_counts=fractional_counts,
            total_counts=total_counts,
            aliases=aliases,
            target_depth=target_depth,
        )
        report = GeneReport(
            cells=source.n_obs,
            genes=cells.column_map.num_genes if gene_ids is None else len(gene_ids),
            genes_found=cells.column_map.num_found,
            vocabulary_size=cells.column_map.num_genes,
            columns_left_out=cells.column_map.num_left_out,
            genes_renamed=len(cells.column_map.renamed),
            old_names=len(cells.column_map.old_names),
            dtype=dtype,
            device=str(torch_device),
            backend=backend_name(torch_device),
        )
        names = list(network.vocabulary.genes) if gene_ids is None else [network.vocabulary.genes[i] for i in gene_ids]
        shape = (report.cells, report.genes, *([network.config.decoder_dim] if embeddings else []))
        result = np.empty(shape, np.float32) if destination is None else None
        with contextlib.ExitStack() as stack:
            target: Any = result
            measured: _CsrWriter | None = None
            root: NewHdf5 | None = None
            if destination is not None:
                root = stack.enter_context(new_h5ad(destination, source.obs(), names, overwrite))
                target = _array(root, f"obsm/{EMBEDDINGS_KEY}" if embeddings else f"layers/{IMPUTED_LAYER}", shape)
                measured = None if embeddings else stack.enter_context(_CsrWriter(root, (report.cells, report.genes)))
            bar = stack.enter_context(progress_bar(report.cells, unit="cell", desc="decode", disable=not progress))
            ready = stack.enter_context(prepared(network, torch_device, torch.float32))
            stack.enter_context(torch.autocast(torch_device.type, torch.bfloat16, enabled=dtype == "bfloat16"))
            for start, stop in cells.windows(batch_size):
                batch = cells.pack(source.read_rows(start, stop), first_row=start, num_threads=num_threads)
                decoded = _decode(ready, batch.to(torch_device), gene_ids, embeddings)
                numbers = decoded.float().cpu().numpy()
                cells.check_finite(numbers, batch.lengths.numpy(), range(start, stop))
                target[start:stop] = numbers
                if measured is not None:
                    measured.append(_values(batch, report.vocabulary_size, gene_ids))
                if root is not None:
                    root.check()
                report.empty_cells += int((batch.lengths == 0).sum())
                bar.update(stop - start)
    if report.empty_cells:
        warnings.warn(
            f"{source.name}: {report.empty_cells:,} of {report.cells:,} cells have no gene of the vocabulary; "
            "their numbers are NaN",
            stacklevel=3,
        )
    report.seconds = time.perf_counter() - started
    return report, result


def _decode(
    network: XTrimoGeneNetwork, batch: RaggedBatch, gene_ids: npt.NDArray[np.int32] | None, embeddings: bool
) -> torch.Tensor:
    """(cells, genes) predictions, or (cells, genes, decoder_dim) embeddings, of one batch; NaN for empty cells."""
    cells, device = batch.batch_size, batch.values.device
    genes = {}
    if gene_ids is not None:
        genes["asked_ids"] = torch.from_numpy(gene_ids).to(device).repeat(cells)
        genes["asked_cu_seqlens"] = torch.arange(cells + 1, dtype=torch.int32, device=device) * len(gene_ids)
    numbers = network.decoder.normed(network.decode(batch, **genes)) if embeddings else network.predict(batch, **genes)
    numbers = numbers.unflatten(0, (cells, -1))
    if gene_ids is None:
        numbers = numbers[:, : network.config.num_genes]  # without the depth tokens
    empty = (batch.lengths == 0).view(-1, *[1] * (numbers.dim() - 1))
    return numbers.masked_fill(empty, torch.nan)


def _values(batch: RaggedBatch, num_genes: int, gene_ids: npt.NDArray[np.int32] | None) -> sparse.csr_matrix:
    """(cells, genes) values that the model read."""
    indices = batch.gene_ids.numpy()
    shape = (batch.batch_size, max(num_genes, int(indices.max(initial=0)) + 1))
    matrix = sparse.csr_matrix((batch.values.numpy(), indices, batch.cu_seqlens.numpy()), shape=shape)
    matrix = matrix[:, :num_genes] if gene_ids is None else matrix[:, gene_ids]
    matrix.sort_indices()
    return matrix


def find_genes(vocabulary: Vocabulary, genes: Sequence[str]) -> npt.NDArray[np.int32]:
    """Gene ids of names, looked up as the columns of a data set are.

    Raises ValueError for no name, unknown ones (with near matches) or one given twice.
    """
    if isinstance(genes, str) or not len(genes):
        raise ValueError(f"genes: expected a list of gene names, got {genes!r}")
    names = [str(gene) for gene in genes]
    gene_ids = vocabulary.map_columns(names, merge_duplicates=True).gene_ids
    unknown = [name for name, gene_id in zip(names, gene_ids, strict=True) if gene_id < 0]
    if unknown:
        shown = [f"{name!r}{_near_matches(vocabulary, name)}" for name in unknown[:5]]
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(
            f"genes: expected genes of the vocabulary, such as {', '.join(vocabulary.genes[:3])}, got "
            f"{', '.join(shown)}{more}"
        )
    if len(np.unique(gene_ids)) < len(names):
        twice = next(name for i, name in enumerate(names) if gene_ids[i] in gene_ids[:i])
        raise ValueError(f"genes: expected each gene once, got {twice!r} again")
    return gene_ids


def _near_matches(vocabulary: Vocabulary, name: str) -> str:
    folded: dict[str, str] = {gene.casefold(): gene for gene in vocabulary.genes}
    near = [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.7)]
    return f" (near: {', '.join(near)})" if near else ""


def checked_output(
    adata_or_path: AnnData | str | os.PathLike[str] | None, output: Path, overwrite: bool, suffix: str = ".h5ad"
) -> Path:
    """Refuses, before any work, an output that could not be written at the end; a link is what it points at.

    adata_or_path is the input, None for none, which is never written over.
    """
    if output.suffix != suffix:
        raise ValueError(f"output: expected a name that ends in {suffix}, got {output}")
    if output.is_symlink():
        output = Path(os.path.realpath(output))
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output: expected an existing folder, got {output.parent}; make it first")
    if output.is_dir():
        raise FileExistsError(f"output: expected a file name, got the folder {output}")
    if output.exists():
        if not output.is_file():
            raise FileExistsError(f"output: expected a file to replace, got {output}, a device or the like")
        input = split_part(Path(adata_or_path))[0] if isinstance(adata_or_path, str | os.PathLike) else None
        if input is not None and input.exists() and output.samefile(input):
            raise ValueError(f"output: expected another file than the input, got {output}; the input is never changed")
        if not overwrite:
            raise FileExistsError(f"output: {output} exists; name another file, or pass overwrite=True (--overwrite)")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"output: the folder {output.parent} cannot be written to; choose another one")
    return output


def _array(root: h5py.File, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
    array = root.create_dataset(name, shape=shape, dtype=np.float32)
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return array


class _CsrWriter(contextlib.AbstractContextManager["_CsrWriter"]):
    """X of an AnnData file as a CSR matrix that grows by rows."""

    def __init__(self, root: h5py.File, shape: tuple[int, int]) -> None:
        if "X" in root:
            del root["X"]
        self.group = root.create_group("X")
        self.group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
        for name, dtype in (("data", np.float32), ("indices", np.int32)):
            self.group.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(1 << 16,), dtype=dtype)
        self.lengths: list[npt.NDArray[np.int64]] = []

    def append(self, rows: sparse.csr_matrix) -> None:
        for name in ("data", "indices"):
            dataset = self.group[name]
            dataset.resize((dataset.shape[0] + rows.nnz,))
            dataset[dataset.shape[0] - rows.nnz :] = getattr(rows, name)
        self.lengths.append(np.diff(rows.indptr).astype(np.int64))

    def __exit__(self, *_: object) -> None:
        self.group["indptr"] = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *self.lengths]))])
