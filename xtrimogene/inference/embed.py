"""embed: one embedding per cell from a model, for an AnnData in memory or for a file of any size, shard by shard."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from xtrimogene.cells.sources import open_cells
from xtrimogene.inference.encoding import EmbedReport, Encoding
from xtrimogene.inference.model_cells import WINDOW, ModelCells, opened
from xtrimogene.inference.options import DEFAULT_KEY, DEFAULT_MAX_TOKENS, DTYPES
from xtrimogene.inference.precision import BFLOAT16_TOLERANCE, bfloat16_error, choose_dtype
from xtrimogene.inference.shards import Destination, check_key
from xtrimogene.network.devices import backend_name, choose_device, prepared
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.progress import progress_bar

# Cells that are read, packed, sorted by length and, for a path, written as one shard.
_WINDOW = WINDOW


def embed(
    adata_or_path: AnnData | str | os.PathLike[str],
    model: XTrimoGeneNetwork | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    layer: str | None = None,
    pooling: str | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    key_added: str = DEFAULT_KEY,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    normalized: bool = False,
    values: str | None = None,
    fractional_counts: bool = False,
    total_counts: str | None = None,
    target_depth: float | str | None = None,
    gene_symbols: str | None = None,
    aliases: str | os.PathLike[str] | None = None,
    num_threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> EmbedReport:
    """Embed every cell: (n_obs, dim) float32 into ``adata.obsm[key_added]``, or into a copy of the file at ``output``.

    A view of a backed AnnData, whose obsm cannot be written, is left alone: the embedding is in the report.

    A cell's embedding depends on that cell alone (up to the rounding of matrix products of another size). A cell
    without a gene of the vocabulary gets NaN, is counted in the report and warned about.

    For a path with ``output``, every 1,024 cells are a shard that is written beside the output, in
    ``<output>.partial``; when all are there, a copy of the input with the embedding is renamed to ``output``. Memory
    does not grow with the number of cells. A run that was killed, or stopped by an error that is none of the numbers,
    goes on with ``resume=True``. The input is only read. Of an input that is no AnnData file (10x, loom, h5mu, ...),
    the output is an h5ad file with its cells as ``obs`` and the embedding in ``obsm``, without X and genes.

    Args:
        adata_or_path: AnnData (in memory, view or backed), or a path: every format that cells.sources.open_cells knows.
        model: a model, or its checkpoint folder.
        output: file to write when a path is given (zarr for zarr, else h5ad). None: the embedding is only returned,
            as ``report.embedding``.
        layer: matrix to embed, None for X; "raw" for ``.raw``.
        pooling: "mean" or "max" over the encoder's rows of a cell; for a model with depth tokens over T and S too, as
            scFoundation does, and also "all", its cell embedding (4 dim): row of S, row of T, max and mean over genes.
            "product": the cell's vector of the product head, where the model has one. None: "product" for such a model,
            else "mean".
        max_tokens: most expressed genes in a batch. More is faster, up to a point, and takes more memory.
        key_added: key in obsm; a key that is there already is replaced.
        dtype: arithmetic of the encoder: "float32", "bfloat16", or "auto". Auto takes bfloat16 where the GPU or the CPU
            (AVX512-BF16, AMX) has instructions for it and it tells cells apart as float32 does, else float32: 16 cells,
            evenly spaced over the data set, are embedded in both, and the root mean square of the differences may be
            at most 5 % of that of the cells' distances from their mean. The report says which it was, and the error.
        device: "cpu", "cuda", ... or "auto": the GPU if there is one.
        normalized: the matrix holds log1p(count / total * 10,000) already: the same as values="log1p".
        values: what the matrix holds: "counts" (the default), raw counts, which are divided by the cell's total;
            "log1p", as normalized; "tpm", TPM or other numbers that are proportional to counts and not logged, divided
            by their sum over the cell. Numbers that are not what they are said to be are refused or warned of.
        fractional_counts: counts need not be whole: those of EM quantifiers, or corrected for ambient RNA.
        total_counts: column of ``obs`` with the total of each whole cell, for a matrix that is cut to some genes:
            counts are divided by it, and token S of a model with depth tokens is its log10. None: the sum over the
            genes of the vocabulary. A model with depth tokens needs it for values "log1p".
        target_depth: for a model with depth tokens, the log10 total that token T aims at: a number above 0, or "fold:2"
            (twice the cell's total), or "offset:0.5" (added to its log10 total). None: 4.0, and for values "tpm", as
            the published code has bulk samples, "fold:1".
        gene_symbols: column of ``var`` with the gene names, None for ``var_names``.
        aliases: table of old and new gene names, for names that the vocabulary lacks: two tab-separated columns, or
            HGNC's complete set.
        num_threads: threads of the packer, None for torch.get_num_threads().
        resume: go on with a run that was interrupted; without such a run, start one; one that is over is left as it
            is.
        overwrite: replace ``output`` if it exists.
        progress: show a progress bar.

    Raises:
        ValueError, OSError: bad input or options; the message names the argument or file, what was expected and what
            to do. Nothing is written then.
    """
    started = time.perf_counter()
    _check_options(max_tokens, key_added, dtype, num_threads)
    destination = None
    if output is not None:
        if isinstance(adata_or_path, AnnData):
            raise ValueError(
                "output: expected None with an AnnData, whose obsm is written; to write a file, call adata.write_h5ad "
                "afterwards, or pass the path of a file in place of the AnnData"
            )
        destination = Destination.checked(Path(adata_or_path), Path(output), key_added, resume, overwrite)
    elif resume or overwrite:
        raise ValueError("resume, overwrite: expected output to be given too")

    network = opened(model)
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    pooling = network.config.pooling(pooling)
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
        cells.check_longest_cell(max_tokens, _WINDOW)
        error = None
        if dtype == "auto" and torch_dtype == torch.bfloat16:
            error = bfloat16_error(cells, network, torch_device, pooling)
            if not error <= BFLOAT16_TOLERANCE:
                torch_dtype = torch.float32
        report = EmbedReport(
            cells=source.n_obs,
            vocabulary_size=cells.column_map.num_genes,
            genes_found=cells.column_map.num_found,
            columns_left_out=cells.column_map.num_left_out,
            genes_renamed=len(cells.column_map.renamed),
            old_names=len(cells.column_map.old_names),
            dtype=str(torch_dtype).removeprefix("torch."),
            device=str(torch_device),
            backend=backend_name(torch_device),
            bfloat16_error=error,
        )
        with (
            prepared(network, torch_device, torch_dtype) as ready,
            progress_bar(source.n_obs, unit="cell", desc="embed", disable=not progress) as bar,
        ):
            run = Encoding(cells, ready, pooling, max_tokens, _WINDOW, num_threads, report, bar)
            if destination is None:
                report.embedding = np.empty((source.n_obs, run.width), np.float32)
                for start, stop in run.windows():
                    report.embedding[start:stop] = run.embed_rows(start, run.read(start, stop))
                report.empty_cells = int(np.isnan(report.embedding[:, 0]).sum())
            else:
                options: dict[str, Any] = {
                    "pooling": pooling,
                    "layer": source.layer,
                    "gene_symbols": gene_symbols,
                    "values": dataclasses.asdict(cells.mapped.kind),
                    "total counts": total_counts,
                    "content of total counts and aliases": cells.mapped.digest(),
                    "dtype": report.dtype,
                }
                if network.config.depth_tokens:
                    options["target depth"] = dataclasses.asdict(cells.target_depth)
                destination.write(run, options)
    if isinstance(adata_or_path, AnnData):
        if adata_or_path.is_view and adata_or_path.isbacked:
            warnings.warn(
                "AnnData: a view of a backed AnnData takes nothing into obsm; the embedding is in the report alone",
                stacklevel=2,
            )
        else:
            adata_or_path.obsm[key_added] = report.embedding
    if report.empty_cells:
        warnings.warn(
            f"{source.name}: {report.empty_cells:,} of {report.cells:,} cells have no gene of the vocabulary; "
            "their embedding is NaN",
            stacklevel=2,
        )
    report.seconds = time.perf_counter() - started
    return report


def _check_options(max_tokens: int, key_added: str, dtype: str, num_threads: int | None) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    check_key(key_added)
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    if max_tokens >= 1 << 31:
        raise ValueError(f"max_tokens: expected less than 2^31, got {max_tokens}")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads: expected at least 1, got {num_threads}")
