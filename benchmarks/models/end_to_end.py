"""The benchmarks that are no single op: packing CSR rows, loading masked batches, `embed` and its peak memory.

They take real cells: those of $XTG_SHARED_DATA where it is set or found beside the checkout, else the 700 that scanpy
ships. The column `case` of their rows says which.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
import torch

import xtrimogene
from xtg_kernels import RaggedBatch, dispatch
from xtrimogene.bench.measured import digits, status_mib
from xtrimogene.bench.tasks import NUM_GENES, umi_counts
from xtrimogene.cells.masking import MaskingConfig, mask_cells, mask_cells_numpy
from xtrimogene.cells.packing import pack_csr_numpy, pack_rows
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.vocabulary import Vocabulary

SHARED_DATA = Path(os.environ.get("XTG_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
MEMORY_CELLS = (500, 1000, 2000, 4000)


def real_counts(file: str, gene_symbols: str | None = None) -> tuple[str, anndata.AnnData, Vocabulary]:
    """Name, raw counts under gene symbols, and the vocabulary: shared data, or what scanpy ships."""
    genes = SHARED_DATA / "gene_vocabulary_19264.tsv"
    if (SHARED_DATA / file).is_file() and genes.is_file():
        cells = anndata.read_h5ad(SHARED_DATA / file)
        if gene_symbols is not None:
            cells.var_names = cells.var[gene_symbols].astype(str)
            cells.var_names_make_unique()
        cells = anndata.AnnData(sp.csr_matrix(cells.X), obs=cells.obs[[]], var=cells.var[[]])
        return Path(file).stem, cells, Vocabulary.from_tsv(genes)
    import scanpy

    cells = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    # Back from log1p(count / total * 10,000): the smallest count of a cell is 1.
    scaled = sp.csr_matrix(np.expm1(cells.X))
    ones = np.minimum.reduceat(scaled.data, scaled.indptr[:-1])
    scaled.data = np.rint(scaled.data / np.repeat(ones, np.diff(scaled.indptr))).astype(np.float32)
    cells = anndata.AnnData(scaled, obs=cells.obs[[]], var=cells.var[[]])
    return "scanpy_pbmc", cells, Vocabulary.from_adata(cells)


def pack(quick: bool) -> Iterator[dict[str, Any]]:
    """CSR rows in memory -> RaggedBatch at 1,500 genes a cell, sorted and in vocabulary order, on one thread."""
    cells, length = (200 if quick else 1024), 1500  # a window of embed
    counts, gene_ids = umi_counts((length,) * cells)
    rows = (np.arange(cells + 1) * length, gene_ids, counts.astype(np.float32))
    columns = np.arange(NUM_GENES, dtype=np.int32)
    ways = {"numpy": lambda: _as_batch(pack_csr_numpy(*rows, columns))}
    if dispatch.extension() is not None:
        ways["xtg"] = lambda: pack_rows(rows, columns, num_threads=1)

    totals = counts.reshape(cells, length).astype(np.float64).sum(1)
    exact = np.log1p(counts / totals.repeat(length) * 1e4)
    errors = {}
    for name, way in ways.items():
        batch = way()
        same = np.array_equal(batch.gene_ids.numpy(), gene_ids) and batch.batch_size == cells
        same = same and np.array_equal(_distinct(batch), _distinct_exactly(batch, length))
        errors[name] = float(np.linalg.norm(batch.values.numpy() - exact) / np.linalg.norm(exact)) if same else np.inf
    limit = 1e-7
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2 if quick else 7):
        for name, way in ways.items():
            # Not timed: this call gets its memory anew from the system, since the other packer has given it back.
            way()
            clock = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - clock)
    for name in ways:
        row = {
            "benchmark": "pack", "case": f"{length} genes a cell, one thread", "cells": cells, "tokens": cells * length,
            "provider": name, "correct": errors[name] <= limit, "error": f"{errors[name]:.2e}", "error_limit": limit,
        }  # fmt: skip
        if row["correct"]:
            low, median, high = np.quantile(times[name], [0.2, 0.5, 0.8]) * 1e3
            row |= {"runs": len(times[name]), "median_ms": digits(median), "q20_ms": digits(low)}
            row |= {"q80_ms": digits(high), "cells_per_second": digits(cells / (median / 1e3))}
        yield row


def _as_batch(packed: dict[str, Any]) -> RaggedBatch:
    tensors = {name: torch.from_numpy(array) for name, array in packed.items() if name not in ("totals", "rounded")}
    return RaggedBatch(max_seqlen=int(np.diff(packed["cu_seqlens"]).max()), **tensors)


def _distinct(batch: RaggedBatch) -> np.ndarray:
    assert batch.distinct_index is not None
    return batch.distinct_index.numpy()


def _distinct_exactly(batch: RaggedBatch, length: int) -> np.ndarray:
    found = []
    for start in range(0, batch.total_nnz, length):
        _, first, group = np.unique(batch.values[start : start + length], return_index=True, return_inverse=True)
        found.append(first[group] + start)
    return np.concatenate(found)


def loader(quick: bool) -> Iterator[dict[str, Any]]:
    """Masked batches of cells of 2,000 genes: the masking plan alone, and whole epochs from files in the page cache."""
    cells, length = (200 if quick else 8192), 2000
    counts, gene_ids = umi_counts((length,) * cells)
    indptr = np.arange(cells + 1) * length
    columns = np.arange(NUM_GENES, dtype=np.int32)
    packed = pack_rows((indptr, gene_ids, counts), columns)
    yield from _mask_rows(packed, 100 if quick else 1000)

    vocabulary = Vocabulary(f"gene{gene}" for gene in range(NUM_GENES))
    matrix = sp.csr_matrix((counts.astype(np.float32), gene_ids, indptr), shape=(cells, NUM_GENES))
    adata = anndata.AnnData(matrix)
    adata.var_names = list(vocabulary.genes)
    with tempfile.TemporaryDirectory() as folder:
        for compression in (None, "gzip"):
            path = Path(folder) / f"{compression}.h5ad"
            adata.write_h5ad(path, compression=compression)
            kind = "h5ad" if compression is None else f"h5ad, {compression}"
            for depth_tokens in (False, True):
                options: dict[str, Any] = {"depth_tokens": depth_tokens, "batch_cells": 32, "progress": False}
                counting, times, right = [], [], True
                for epoch in range(1 if quick else 5):
                    clock = time.perf_counter()
                    opened = TrainingCells(path, vocabulary, **options)
                    counting.append(time.perf_counter() - clock)
                    with opened:
                        clock = time.perf_counter()
                        seen = [batch.cells for batch in opened.iterate(epoch)]
                        times.append(time.perf_counter() - clock)
                        right = right and torch.equal(torch.cat(seen).sort()[0], torch.from_numpy(opened.training))
                        right = right and _masks(next(opened.iterate(epoch)), packed, epoch, depth_tokens)
                if not depth_tokens:
                    yield _loader_row(f"{kind}: opened, genes counted", cells, cells * length, counting, right)
                case = f"{kind}: an epoch{', thinned' * depth_tokens}"
                trained = len(opened.training)
                yield _loader_row(case, trained, trained * length, times, right)


def _mask_rows(packed: RaggedBatch, cells: int) -> Iterator[dict[str, Any]]:
    """The masking plan of packed cells in memory, on one thread."""
    rows, config = np.arange(cells), MaskingConfig()
    arrays = packed.values.numpy(), packed.gene_ids.numpy(), packed.cu_seqlens.numpy()
    options: dict[str, Any] = {"epoch": 0, "num_genes": NUM_GENES, "rows": rows}
    plain = {**options, **dataclasses.asdict(config)}
    exact = mask_cells_numpy(*arrays, cells=rows, **plain)
    ways = {"numpy": lambda: mask_cells_numpy(*arrays, cells=rows, **plain)}
    if dispatch.extension() is not None:
        ways["xtg"] = lambda: _as_arrays(mask_cells(packed, rows, config, num_threads=1, **options))
    times: dict[str, list[float]] = {name: [] for name in ways}
    right = dict.fromkeys(ways, True)
    for _ in range(5):
        for name, way in ways.items():
            clock = time.perf_counter()
            masked = way()
            times[name].append(time.perf_counter() - clock)
            right[name] = right[name] and all(np.array_equal(masked[key], exact[key]) for key in exact)
    for name in ways:
        tokens = int(packed.cu_seqlens[cells])
        yield _loader_row("masking plan, one thread", cells, tokens, times[name], right[name], provider=name)


def _as_arrays(masked: MaskedBatch) -> dict[str, np.ndarray]:
    values = {**vars(masked), **vars(masked.batch)}
    return {name: value.numpy() for name, value in values.items() if isinstance(value, torch.Tensor)}


def _masks(masked: MaskedBatch, packed: RaggedBatch, epoch: int, depth_tokens: bool) -> bool:
    """Whether a batch is what the NumPy form makes of its cells; of thinned ones, whether the true values are there."""
    arrays = packed.values.numpy(), packed.gene_ids.numpy(), packed.cu_seqlens.numpy()
    rows = masked.cells.numpy()
    if depth_tokens:
        dense = np.zeros((len(rows), NUM_GENES), np.float32)
        for row, cell in enumerate(rows.tolist()):
            own = slice(*arrays[2][cell : cell + 2])
            dense[row, arrays[1][own]] = arrays[0][own]
        row_of = np.repeat(np.arange(len(rows)), masked.chosen_cu_seqlens.diff().numpy())
        return np.array_equal(dense[row_of, masked.chosen_ids.numpy()], masked.chosen_values.numpy())
    options = {**dataclasses.asdict(MaskingConfig()), "epoch": epoch, "num_genes": NUM_GENES, "rows": rows}
    exact, got = mask_cells_numpy(*arrays, cells=rows, **options), _as_arrays(masked)
    return all(np.array_equal(got[key], exact[key]) for key in exact)


def _loader_row(
    case: str, cells: int, tokens: int, times: list[float], right: bool, *, provider: str = "xtg"
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "benchmark": "loader", "case": case, "cells": cells, "tokens": tokens, "provider": provider, "correct": right,
    }  # fmt: skip
    if right:
        low, median, high = np.quantile(times, [0.2, 0.5, 0.8]) * 1e3
        row |= {"runs": len(times), "median_ms": digits(median), "q20_ms": digits(low), "q80_ms": digits(high)}
        row["cells_per_second"] = digits(cells / (median / 1e3))
    return row


def embed_share(quick: bool) -> Iterator[dict[str, Any]]:
    """Where the time of `embed` goes, on PBMC3k with a 3m model: packing, encoder, all else."""
    name, cells, vocabulary = real_counts("pbmc3k_counts_labelled.h5ad")
    if quick:
        cells = cells[:64]
    model = xtrimogene.XTrimoGene.from_preset("3m", vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        cells.write_h5ad(path)
        for dtype in ("float32", "auto"):
            reports = [
                xtrimogene.embed(
                    path, model, dtype=dtype, output=path.with_name("out.h5ad"), overwrite=True, progress=False
                )
                for _ in range(2 if quick else 3)
            ]
            written = anndata.read_h5ad(path.with_name("out.h5ad")).obsm["X_xtrimogene"]
            median = sorted(reports, key=lambda report: report.seconds)[len(reports) // 2]
            row = {
                "benchmark": "embed", "case": f"{name}, 3m, {dtype}", "cells": median.cells, "tokens": median.tokens,
                "dtype": median.dtype, "provider": "xtg", "correct": _embeds(written, cells, model, median.dtype),
            }  # fmt: skip
            if row["correct"]:
                low, high = np.quantile([report.seconds for report in reports], [0.2, 0.8]) * 1e3
                row |= {"runs": len(reports), "median_ms": digits(1e3 * median.seconds)}
                row |= {"q20_ms": digits(low), "q80_ms": digits(high)}
                row["cells_per_second"] = digits(median.cells / median.seconds)
                for part in ("encoder", "packing", "reading"):
                    shares = [getattr(report, f"seconds_{part}") / report.seconds for report in reports]
                    row[f"{part}_share"] = digits(statistics.median(shares))
            yield row


def _embeds(written: np.ndarray, cells: anndata.AnnData, model: xtrimogene.XTrimoGene, dtype: str) -> bool:
    """Whether 16 cells spread over the file have the embedding of the float64 model on the reference backend."""
    chosen = np.linspace(0, cells.n_obs - 1, 16).astype(int)
    matrix = sp.csr_matrix(cells.X)[chosen]
    batch = pack_rows(
        (matrix.indptr, matrix.indices, matrix.data), model.vocabulary.map_columns(cells.var_names).gene_ids
    )
    exactly = xtrimogene.XTrimoGene(model.config, model.vocabulary).double().eval()
    exactly.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact = exactly.embed_batch(batch).numpy()
    error = np.linalg.norm(written[chosen] - exact) / np.linalg.norm(exact)
    return bool(error <= (1e-5 if dtype == "float32" else 2e-2))


def memory(quick: bool) -> Iterator[dict[str, Any]]:
    """Peak memory of `embed` on real cells in an h5ad file, above that of the loaded 3m model, by number of cells."""
    name, cells, vocabulary = real_counts("zheng_pbmc_facs.h5ad", "symbol")
    model = xtrimogene.XTrimoGene.from_preset("3m", vocabulary)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder / "model")
        for count in MEMORY_CELLS[:2] if quick else MEMORY_CELLS:
            # Cells are repeated where the data set has fewer.
            rows = np.arange(count) % cells.n_obs
            repeated = anndata.AnnData(cells.X[rows], var=cells.var)
            repeated.write_h5ad(folder / "cells.h5ad")
            command = [sys.executable, "-m", "benchmarks.models.end_to_end", str(folder)]
            done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
            loaded, peak, seconds = map(float, done.stdout.split()[-3:])
            written = anndata.read_h5ad(folder / "out.h5ad").obsm["X_xtrimogene"]
            (folder / "out.h5ad").unlink()
            row = {
                "benchmark": "memory", "case": f"{name}, 3m", "cells": count, "tokens": int(repeated.X.nnz),
                "dtype": "auto", "provider": "xtg", "correct": _embeds(written, repeated, model, "auto"),
            }  # fmt: skip
            if row["correct"]:
                row |= {"runs": 1, "median_ms": digits(1e3 * seconds), "loaded_mib": digits(loaded)}
                row["peak_mib"] = digits(peak - loaded)
            yield row


def _embed_and_tell_memory(folder: Path) -> None:
    """In a process of its own: memory (MiB) of the loaded model and at the peak of embed, and seconds of embed."""
    model = xtrimogene.XTrimoGene.from_pretrained(folder / "model")
    # The peak so far is that of the imports: start again from what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    loaded = status_mib("VmRSS")
    clock = time.perf_counter()
    xtrimogene.embed(folder / "cells.h5ad", model, output=folder / "out.h5ad", progress=False)
    print(loaded, status_mib("VmHWM"), time.perf_counter() - clock)


if __name__ == "__main__":
    _embed_and_tell_memory(Path(sys.argv[1]))
