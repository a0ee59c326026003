"""Destination: an embedding on its way into a copy of a file, shard by shard, killed and resumed at will."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import torch
from anndata import AnnData

from xtrimogene.cells.sources import CellSource, is_anndata_file, is_legacy_store, open_store, split_part
from xtrimogene.inference.encoding import Embeddings, Encoding
from xtrimogene.network.model import XTrimoGeneNetwork


@dataclass
class Destination:
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
    def is_store(self) -> bool:
        """Whether the output is a zarr store: a copy of one."""
        return self.input.is_dir() and is_anndata_file(self.input)

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @classmethod
    def checked(cls, input: Path, output: Path, resume: bool, overwrite: bool) -> Destination:
        """Refuses, before any work, an output that could not be written at the end."""
        self = cls(split_part(input)[0], output, resume, overwrite)
        input = self.input
        if not input.exists():
            raise FileNotFoundError(f"{input}: no such file")
        kind = ".zarr" if self.is_store else ".h5ad"
        if output.suffix != kind:
            why = "as the input is one" if is_anndata_file(input) else "for an input that is no AnnData file"
            raise ValueError(f"output: expected a name that ends in {kind}, {why}, got {output}")
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

    def write(self, run: Encoding, key: str, options: dict[str, Any]) -> None:
        """Embeds the windows that are not there yet, then puts the result in place."""
        report = run.report
        wanted = {
            "input": _fingerprint(self.input),
            "kind": run.cells.source.kind,
            "cells": report.cells,
            "columns": run.cells.source.n_vars,
            "cells per shard": run.window,
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
            self._publish([start for start, _ in windows], key, wanted, run)
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

    def _publish(self, starts: list[int], key: str, manifest: dict[str, Any], run: Encoding) -> None:
        report, shape = run.report, (run.report.cells, run.width)
        result = self.folder / f"result{self.output.suffix}"
        _remove_path(result)

        def shards() -> Iterator[tuple[int, Embeddings]]:
            for start in starts:
                shard = np.load(self._shard(start))
                report.empty_cells += int(np.isnan(shard[:, 0]).sum())
                yield start, shard

        if self.is_store:
            shutil.copytree(self.input, result)
            _add_to_zarr(result, key, shards(), shape, run.window)
        else:
            if is_anndata_file(self.input):
                shutil.copyfile(self.input, result)
            else:
                _write_skeleton(result, run.cells.source)
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


def _write_skeleton(path: Path, source: CellSource) -> None:
    """What holds the embedding of an input that is no AnnData file: its cells as obs, no X and no genes."""
    AnnData(obs=source.obs()).write_h5ad(path)


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


def _add_to_zarr(
    path: Path, key: str, shards: Iterator[tuple[int, Embeddings]], shape: tuple[int, int], window: int
) -> None:
    import zarr

    consolidated = zarr.open_group(path, mode="r").metadata.consolidated_metadata is not None
    obsm = _obsm_group(zarr.open_group(path, mode="r+", use_consolidated=False))
    chunks = (max(1, min(window, shape[0])), shape[1])
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


def _model_fingerprint(network: XTrimoGeneNetwork) -> str:
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
