"""embed: one embedding per cell from a model, for an AnnData in memory or for a file of any size, shard by shard."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import torch
from anndata import AnnData
from tqdm import tqdm

from xtg_kernels import current_backend, dispatch
from xtrimogene.cells.sources import is_legacy_store, open_cells, open_store, split_by_tokens
from xtrimogene.inference.model_cells import (
    DEFAULT_TARGET_DEPTH,
    WINDOW,
    ModelCells,
    backend_name,
    choose_device,
    prepared,
)
from xtrimogene.network.linear import onednn_takes
from xtrimogene.network.model import POOLINGS, XTrimoGene, check_pooling, pooled_dim

DEFAULT_KEY = "X_xtrimogene"
# Tokens of a batch: room for a cell that expresses every gene, and enough rows to keep the matrix products busy.
DEFAULT_MAX_TOKENS = 32768
DTYPES = ("auto", "float32", "bfloat16")

# dtype="auto": cells that are embedded in both dtypes, and how far bfloat16 may move them, as a share of their spread.
# At 0.05 and below, 95 % or more of a cell's ten nearest neighbours stayed what they are (pbmc3k, untrained presets).
_CHECKED_CELLS = 16
_BFLOAT16_TOLERANCE = 0.05

# Cells that are read, packed, sorted by length and, for a path, written as one shard.
_WINDOW = WINDOW

Embeddings = npt.NDArray[np.float32]


@dataclass
class EmbedReport:
    """What one run of embed did.

    cells            cells of the data set
    empty_cells      cells without any gene of the vocabulary: their embedding is NaN
    resumed_cells    cells whose shards an earlier, interrupted run had finished
    tokens           expressed vocabulary genes that went through the encoder in this run
    genes_found      genes of the vocabulary that the data set has, out of ``vocabulary_size``
    seconds_reading, seconds_packing, seconds_encoder, seconds
                     wall time of the parts and of the whole
    dtype, device, backend
                     what the encoder ran in, on and with
    bfloat16_error   dtype="auto" on a machine with bfloat16: the error that it measured and decided by, else None
    embedding        (cells, dim) float32, None when it was written to a file
    """

    cells: int
    vocabulary_size: int
    genes_found: int
    dtype: str
    device: str
    backend: str
    empty_cells: int = 0
    resumed_cells: int = 0
    tokens: int = 0
    seconds_reading: float = 0.0
    seconds_packing: float = 0.0
    seconds_encoder: float = 0.0
    seconds: float = 0.0
    bfloat16_error: float | None = None
    embedding: Embeddings | None = dataclasses.field(default=None, repr=False)

    @property
    def cells_per_second(self) -> float:
        """Cells of this run by its whole wall time."""
        return (self.cells - self.resumed_cells) / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        resumed = f" ({self.resumed_cells:,} of them by an earlier run)" if self.resumed_cells else ""
        return (
            f"{self.cells:,} cells{resumed}, {self.empty_cells:,} of them empty, {self.tokens:,} tokens, "
            f"{self.genes_found:,} of {self.vocabulary_size:,} vocabulary genes found\n"
            f"{self.seconds:.1f} s (reading {self.seconds_reading:.1f}, packing {self.seconds_packing:.1f}, "
            f"encoder {self.seconds_encoder:.1f}), {self.cells_per_second:,.0f} cells/s, "
            f"{self.dtype}{self._reason()} on {self.device}, backend {self.backend}"
        )

    def _reason(self) -> str:
        if self.bfloat16_error is None:
            return ""
        return f" (bfloat16 moves cells by {self.bfloat16_error:.1%} of their spread)"


def embed(
    adata_or_path: AnnData | str | os.PathLike[str],
    model: XTrimoGene | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    layer: str | None = None,
    pooling: str = "mean",
    max_tokens: int = DEFAULT_MAX_TOKENS,
    key_added: str = DEFAULT_KEY,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    normalized: bool = False,
    target_depth: float | str = DEFAULT_TARGET_DEPTH,
    gene_symbols: str | None = None,
    num_threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> EmbedReport:
    """Embed every cell: (n_obs, dim) float32 into ``adata.obsm[key_added]``, or into a copy of the file at ``output``.

    A cell's embedding depends on that cell alone (up to the rounding of matrix products of another size). A cell
    without a gene of the vocabulary gets NaN, is counted in the report and warned about.

    For a path with ``output``, every 1,024 cells are a shard that is written beside the output, in
    ``<output>.partial``; when all are there, a copy of the input with the embedding is renamed to ``output``. Memory
    does not grow with the number of cells. A run that was killed goes on with ``resume=True``. The input is only read.

    Args:
        adata_or_path: AnnData (in memory, view or backed), or path of an h5ad file or zarr store.
        model: a model, or its checkpoint folder.
        output: file to write when a path is given (h5ad for h5ad, zarr for zarr). None: the embedding is only returned,
            as ``report.embedding``.
        layer: matrix to embed, None for X; "raw" for ``.raw``.
        pooling: "mean" or "max" over the encoder's rows of a cell; for a model with depth tokens over T and S too, as
            scFoundation does, and also "all", its cell embedding (4 dim): row of S, row of T, max and mean over genes.
        max_tokens: most expressed genes in a batch. More is faster, up to a point, and takes more memory.
        key_added: key in obsm; a key that is there already is replaced.
        dtype: arithmetic of the encoder: "float32", "bfloat16", or "auto". Auto takes bfloat16 where the GPU or the CPU
            (AVX512-BF16, AMX) has instructions for it and it tells cells apart as float32 does, else float32: 16 cells,
            evenly spaced over the data set, are embedded in both, and the root mean square of the differences may be
            at most 5 % of that of the cells' distances from their mean. The report says which it was, and the error.
        device: "cpu", "cuda", ... or "auto": the GPU if there is one.
        normalized: the matrix holds log1p(count / total * 10,000) already. Otherwise it must hold raw counts, as a
            model with depth tokens always needs them.
        target_depth: for a model with depth tokens, the log10 total that token T aims at: a number, or "fold:2" (twice
            the cell's total), or "offset:0.5" (added to its log10 total).
        gene_symbols: column of ``var`` with the gene names, None for ``var_names``.
        num_threads: threads of the packer, None for torch.get_num_threads().
        resume: go on with a run that was interrupted; without such a run, start one.
        overwrite: replace ``output`` if it exists.
        progress: show a progress bar.

    Raises:
        ValueError, OSError: bad input or options; the message names the argument or file, what was expected and what
            to do. Nothing is written then.
    """
    started = time.perf_counter()
    _check_options(pooling, max_tokens, key_added, dtype, num_threads)
    destination = None
    if output is not None:
        if isinstance(adata_or_path, AnnData):
            raise ValueError(
                "output: expected None with an AnnData, whose obsm is written; to write a file, call adata.write_h5ad "
                "afterwards, or pass the path of a file in place of the AnnData"
            )
        destination = _Destination.checked(Path(adata_or_path), Path(output), resume, overwrite)
    elif resume or overwrite:
        raise ValueError("resume, overwrite: expected output to be given too")

    network = model if isinstance(model, XTrimoGene) else XTrimoGene.from_pretrained(os.fspath(model))
    torch_device = choose_device(device)
    torch_dtype = _choose_dtype(dtype, torch_device)
    check_pooling(pooling, network.config)
    with open_cells(adata_or_path, layer=layer, gene_symbols=gene_symbols) as source:
        cells = ModelCells.checked(source, network, normalized=normalized, target_depth=target_depth)
        cells.check_longest_cell(max_tokens, _WINDOW)
        bfloat16_error = None
        if dtype == "auto" and torch_dtype == torch.bfloat16:
            bfloat16_error = _bfloat16_error(cells, network, torch_device, pooling)
            if not bfloat16_error <= _BFLOAT16_TOLERANCE:
                torch_dtype = torch.float32
        report = EmbedReport(
            cells=source.n_obs,
            vocabulary_size=cells.column_map.num_genes,
            genes_found=cells.column_map.num_found,
            dtype=str(torch_dtype).removeprefix("torch."),
            device=str(torch_device),
            backend=backend_name(torch_device),
            bfloat16_error=bfloat16_error,
        )
        with (
            prepared(network, torch_device, torch_dtype) as ready,
            tqdm(total=source.n_obs, unit="cell", desc="embed", disable=not progress) as bar,
        ):
            run = _Run(cells, ready, pooling, max_tokens, num_threads, report, bar)
            if destination is None:
                report.embedding = np.empty((source.n_obs, run.width), np.float32)
                for start, stop in run.windows():
                    report.embedding[start:stop] = run.embed_window(start, stop)
                report.empty_cells = int(np.isnan(report.embedding[:, 0]).sum())
            else:
                options: dict[str, Any] = {
                    "pooling": pooling,
                    "layer": layer,
                    "gene_symbols": gene_symbols,
                    "normalized": normalized,
                    "dtype": report.dtype,
                    "obsm key": key_added,
                }
                if network.config.depth_tokens:
                    options["target depth"] = dataclasses.asdict(cells.target_depth)
                destination.write(run, key_added, options)
    if isinstance(adata_or_path, AnnData):
        adata_or_path.obsm[key_added] = report.embedding
    if report.empty_cells:
        warnings.warn(
            f"{source.name}: {report.empty_cells:,} of {report.cells:,} cells have no gene of the vocabulary; "
            "their embedding is NaN",
            stacklevel=2,
        )
    report.seconds = time.perf_counter() - started
    return report


def _check_options(pooling: str, max_tokens: int, key_added: str, dtype: str, num_threads: int | None) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if not key_added or "/" in key_added:
        raise ValueError(f"key_added: expected a name without '/', got {key_added!r}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads: expected at least 1, got {num_threads}")


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; for "auto" the fastest of the device, whose accuracy is still to be checked."""
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    return torch.float32 if dtype == "float32" else torch.bfloat16


def _has_bfloat16(device: torch.device) -> bool:
    """Whether attention and linear layers both have bfloat16 instructions on a device, so that it is worth taking."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    extension = dispatch.extension()
    if device.type != "cpu" or extension is None or current_backend() not in ("auto", "cpp"):
        return False
    return extension.active_isa() in ("avx512bf16", "amx") and onednn_takes(torch.bfloat16)


def _bfloat16_error(cells: ModelCells, network: XTrimoGene, device: torch.device, pooling: str) -> float:
    """What bfloat16 does to some cells: its differences from float32 by the cells' distances from their mean.

    Both as root mean squares. NaN where fewer than two of the cells have a gene.
    """
    source, batches = cells.source, []
    for row in np.unique(np.linspace(0, max(source.n_obs - 1, 0), min(source.n_obs, _CHECKED_CELLS)).astype(int)):
        packed = cells.pack(source.read_rows(int(row), int(row) + 1), first_row=int(row))
        if packed.total_nnz:
            batches.append(packed.to(device))
    if len(batches) < 2:
        return float("nan")
    embeddings = []
    for dtype in (torch.float32, torch.bfloat16):
        with prepared(network, device, dtype) as ready:
            embeddings.append(torch.cat([ready.embed_batch(batch, pooling) for batch in batches]).double())
    exact, rounded = embeddings
    return float((rounded - exact).norm() / (exact - exact.mean(0)).norm())


@dataclass
class _Run:
    """One pass of a model over cells."""

    cells: ModelCells
    network: XTrimoGene
    pooling: str
    max_tokens: int
    num_threads: int | None
    report: EmbedReport
    bar: tqdm

    @property
    def width(self) -> int:
        """Numbers of one embedding."""
        return pooled_dim(self.network.config, self.pooling)

    def windows(self) -> list[tuple[int, int]]:
        return self.cells.windows(_WINDOW)

    def embed_window(self, start: int, stop: int) -> Embeddings:
        """(stop - start, width) embeddings of the cells of one window.

        Cells go through the encoder sorted by length: attention costs the square of the length, and batches of like
        cells take about as long as one another.
        """
        report = self.report
        clock = time.perf_counter()
        window = self.cells.source.read_rows(start, stop)
        report.seconds_reading += time.perf_counter() - clock

        clock = time.perf_counter()
        order = np.argsort(np.diff(window[0]), kind="stable").astype(np.int64)
        packed = self.cells.pack(window, rows=order, num_threads=self.num_threads, first_row=start)
        report.seconds_packing += time.perf_counter() - clock

        clock = time.perf_counter()
        device = next(self.network.parameters()).device
        embeddings = np.empty((stop - start, self.width), np.float32)
        for first, last, batch in split_by_tokens(packed, self.max_tokens):
            pooled = self.network.embed_batch(batch.to(device), self.pooling)
            embeddings[order[first:last]] = pooled.cpu().numpy()
            self.bar.update(last - first)
        report.seconds_encoder += time.perf_counter() - clock
        report.tokens += int((packed.gene_ids < self.network.config.num_genes).sum())
        return embeddings


@dataclass
class _Destination:
    """Where a path's embedding goes, and the folder beside it that holds the finished shards until all are there.

    The folder holds manifest.json (what the shards were made from), one shard-<first row>.npy per window, and lock.
    Every file is written under another name, flushed to disk and renamed: what bears its name is whole.
    """

    input: Path
    output: Path
    resume: bool
    overwrite: bool

    @property
    def folder(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @classmethod
    def checked(cls, input: Path, output: Path, resume: bool, overwrite: bool) -> _Destination:
        """Refuses, before any work, an output that could not be written at the end."""
        self = cls(input, output, resume, overwrite)
        if not input.exists():
            raise FileNotFoundError(f"{input}: no such file")
        kind = ".zarr" if input.is_dir() else ".h5ad"
        if output.suffix != kind:
            raise ValueError(f"output: expected a name that ends in {kind}, as the input is one, got {output}")
        if not output.parent.is_dir():
            raise FileNotFoundError(f"output: expected an existing folder, got {output.parent}; make it first")
        if output.exists() and output.samefile(input):
            raise ValueError(f"output: expected another file than the input, got {output}; the input is never changed")
        if output.exists() and kind == ".h5ad" and output.is_dir():
            raise FileExistsError(f"output: expected a file name, got the folder {output}")
        if output.exists() and not overwrite and not self.published():
            raise FileExistsError(f"output: {output} exists; name another file, or pass overwrite=True (--overwrite)")
        if self.folder.exists() and not resume:
            raise FileExistsError(
                f"output: {self.folder} is left from an interrupted run; go on with resume=True (--resume), or remove "
                "that folder to start again"
            )
        return self

    def published(self) -> bool:
        """Whether the earlier run had put the result in place already and was killed while it tidied up."""
        if not self.resume or not self.output.exists():
            return False
        if self.manifest.exists():
            return bool(json.loads(self.manifest.read_text()).get("result") == _file_identity(self.output))
        # Without leave to overwrite, a run begins only where there is no output: this empty folder is the end of one.
        return not self.overwrite and self.folder.is_dir() and not any(self.folder.iterdir())

    def write(self, run: _Run, key: str, options: dict[str, Any]) -> None:
        """Embeds the windows that are not there yet, then puts the result in place."""
        report = run.report
        wanted = {
            "input": _fingerprint(self.input),
            "cells": report.cells,
            "columns": run.cells.source.n_vars,
            "cells per shard": _WINDOW,
            "checkpoint": _model_fingerprint(run.network),
            **options,
        }
        try:
            self.folder.mkdir(exist_ok=self.resume)
        except OSError as error:
            raise PermissionError(
                f"output: the folder {self.output.parent} cannot be written to ({error}); choose another one"
            ) from error
        published = self.published()
        with self._locked():
            if self.manifest.exists():
                self._check_same_run(wanted)
            if published:
                report.resumed_cells = report.cells
                report.empty_cells = self._count_empty_cells(key)
                self._remove()
                return
            if not self.manifest.exists():
                _write_json(self.manifest, wanted)
            windows = run.windows()
            missing = [(start, stop) for start, stop in windows if not self._has_shard(start, stop, run.width)]
            report.resumed_cells = report.cells - sum(stop - start for start, stop in missing)
            try:
                run.bar.update(report.resumed_cells)
                for start, stop in missing:
                    self._write_shard(start, run.embed_window(start, stop))
            except BaseException as error:
                # Input that cannot be embedded stays so, and mending it makes another input: its shards are void.
                if isinstance(error, ValueError) or not any(self.folder.glob("shard-*.npy")):
                    self._remove()
                raise
            if _fingerprint(self.input) != wanted["input"]:
                self._remove()
                raise ValueError(f"{self.input}: changed while it was read; run again")
            self._publish([start for start, _ in windows], (report.cells, run.width), key, wanted, report)
            self._remove()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl

        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FileExistsError(f"output: another run is at work in {self.folder}; wait for it") from None
            yield

    def _check_same_run(self, wanted: dict[str, Any]) -> None:
        earlier = json.loads(self.manifest.read_text())
        changed = [
            f"{name} was {earlier.get(name)!r}, is {value!r}"
            for name, value in wanted.items()
            if earlier.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"resume: expected the input, checkpoint and options of the interrupted run in {self.folder}, got "
                f"others: {'; '.join(changed)}; give the same, or remove that folder to start again"
            )

    def _shard(self, start: int) -> Path:
        return self.folder / f"shard-{start:012d}.npy"

    def _count_empty_cells(self, key: str) -> int:
        root, closing = open_store(self.output)
        with closing:
            return int(np.isnan(root["obsm"][key][:, 0]).sum())

    def _write_shard(self, start: int, embeddings: Embeddings) -> None:
        _write_atomically(self._shard(start), lambda file: np.save(file, embeddings))

    def _has_shard(self, start: int, stop: int, width: int) -> bool:
        path = self._shard(start)
        return path.exists() and np.load(path, mmap_mode="r").shape == (stop - start, width)

    def _publish(
        self, starts: list[int], shape: tuple[int, int], key: str, manifest: dict[str, Any], report: EmbedReport
    ) -> None:
        result = self.folder / f"result{self.output.suffix}"
        _remove_path(result)

        def shards() -> Iterator[tuple[int, Embeddings]]:
            for start in starts:
                shard = np.load(self._shard(start))
                report.empty_cells += int(np.isnan(shard[:, 0]).sum())
                yield start, shard

        if self.input.is_dir():
            shutil.copytree(self.input, result)
            _add_to_zarr(result, key, shards(), shape)
        else:
            shutil.copyfile(self.input, result)
            _add_to_h5ad(result, key, shards(), shape)
        _flush_to_disk(result)
        _write_json(self.manifest, {**manifest, "result": _file_identity(result)})
        if self.output.is_dir():
            self.output.rename(self.folder / "replaced.zarr")  # a folder cannot be renamed onto another
        os.replace(result, self.output)
        _flush_to_disk(self.output.parent)

    def _remove(self) -> None:
        # The manifest goes last: it tells a resumed run that the result is in place.
        for path in self.folder.iterdir():
            if path != self.manifest:
                _remove_path(path)
        self.manifest.unlink(missing_ok=True)
        self.folder.rmdir()


def _add_to_h5ad(path: Path, key: str, shards: Iterator[tuple[int, Embeddings]], shape: tuple[int, int]) -> None:
    with h5py.File(path, "r+") as root:
        if not is_legacy_store(root):
            obsm = _obsm_group(root)
            if key in obsm:
                del obsm[key]
            _fill_array(obsm.create_dataset(key, shape=shape, dtype=np.float32), shards)
            return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata tells, item by item, how it moves old fields
        adata = anndata.read_h5ad(path)
    adata.obsm[key] = np.empty(shape, np.float32)
    for start, shard in shards:
        adata.obsm[key][start : start + len(shard)] = shard
    adata.write_h5ad(path)


def _add_to_zarr(path: Path, key: str, shards: Iterator[tuple[int, Embeddings]], shape: tuple[int, int]) -> None:
    import zarr

    consolidated = zarr.open_group(path, mode="r").metadata.consolidated_metadata is not None
    obsm = _obsm_group(zarr.open_group(path, mode="r+", use_consolidated=False))
    chunks = (max(1, min(_WINDOW, shape[0])), shape[1])
    _fill_array(obsm.create_array(key, shape=shape, dtype=np.float32, chunks=chunks, overwrite=True), shards)
    if consolidated:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr's notice that format 3 does not have it; this store does
            zarr.consolidate_metadata(path)


def _obsm_group(root: Any) -> Any:
    if "obsm" not in root:
        root.create_group("obsm").attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    return root["obsm"]


def _fill_array(array: Any, shards: Iterator[tuple[int, Embeddings]]) -> None:
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    for start, shard in shards:
        array[start : start + len(shard)] = shard


def _model_fingerprint(network: XTrimoGene) -> str:
    digest = hashlib.sha256(json.dumps([network.config.to_dict(), network.vocabulary.genes]).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fingerprint(path: Path) -> list[int]:
    """Number of files, their bytes in all and the time of the last change (ns)."""
    stats = [file.stat() for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path.stat()]
    return [len(stats), sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]


def _file_identity(path: Path) -> list[int]:
    """What a rename keeps and a rewrite changes."""
    stat = path.stat()
    return [stat.st_dev, stat.st_ino]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def _write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _flush_to_disk(path.parent)


def _flush_to_disk(path: Path) -> None:
    """fsync of a file, or of a folder and, for a store, of all files in it."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.suffix == ".zarr" else []
    for each in (*files, path):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_path(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
