"""Destination: an embedding on its way into a copy of a file, shard by shard, killed and resumed at will."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
from anndata.io import write_elem

from xtrimogene.cells.matrix import CsrArrays
from xtrimogene.cells.numbers import BadNumbers
from xtrimogene.cells.sources import UnreadableCells, is_anndata_file, is_legacy_store, open_store, split_part
from xtrimogene.inference.encoding import Embeddings, Encoding
from xtrimogene.inference.options import partial_folder
from xtrimogene.inference.tables import new_hdf5, write_tables
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.writing import flush_to_disk, locked, sealed, unsealed, write_whole

# What a run puts into its folder. Nothing else is ever removed from it.
_OWN_FILES = re.compile(r"(manifest\.json|shard-\d{12}\.npy)(\.tmp)?|lock|result\.h5ad")
_OWN_FOLDERS = re.compile(r"(result|replaced)\.zarr")
# After the array in a shard: the digest of the rows that it was made from, and that of the run, the array and these.
_DIGEST_BYTES = 32
# What is in the folders of a zarr store (formats 2 and 3): metadata, and chunks in those of arrays.
_ZARR_METADATA = {".zgroup", ".zarray", ".zattrs", ".zmetadata", "zarr.json"}
_ZARR_CHUNK = re.compile(r"c|(c\.)?\d+(\.\d+)*")
_LONGEST_KEY = 255  # a zarr store has a folder of that name
# Attribute of the array in obsm: a digest of the run that made it.
_RUN = "xtrimogene-run"


# From the rows of all windows, in their order: columns of obs, and entries of uns (arrays of text or numbers).
Annotation = tuple[Mapping[str, pd.Series], Mapping[str, Any]]
Annotate = Callable[[Iterator[Embeddings]], Annotation]


@dataclass
class Destination:
    """Where a path's embedding goes, and the folder beside it that holds the finished shards until all are there.

    The folder holds manifest.json (what the shards were made from), one shard-<first row>.npy per window, and lock.
    Every file is written under another name, flushed to disk and renamed: what bears its name is whole. A shard also
    tells the run and the rows that it was made from, with a checksum: no other one is ever taken for it. When the
    result is in place, the folder gets a name that tells so, and is removed. The array in the result tells its run
    too: to go on with a run that is over is no error.
    """

    input: Path
    output: Path
    key: str
    resume: bool
    overwrite: bool

    @property
    def folder(self) -> Path:
        return partial_folder(self.output)

    @property
    def is_store(self) -> bool:
        """Whether the output is a zarr store: a copy of one."""
        return self.input.is_dir() and is_anndata_file(self.input)

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @classmethod
    def checked(cls, input: Path, output: Path, key: str, resume: bool, overwrite: bool) -> Destination:
        """Refuses, before any work, an output that could not be written at the end."""
        input, _ = split_part(input)
        if not input.exists():
            raise FileNotFoundError(f"{input}: no such file")
        is_anndata = is_anndata_file(input)
        kind = ".zarr" if is_anndata and input.is_dir() else ".h5ad"
        if output.suffix != kind:
            why = "as the input is one" if is_anndata else "for an input that is no AnnData file"
            raise ValueError(f"output: expected a name that ends in {kind}, {why}, got {output}")
        if output.is_symlink():
            output = Path(os.path.realpath(output))  # what the link points at is replaced, and the link stays
        self = cls(input, output, key, resume, overwrite)
        if not output.parent.is_dir():
            raise FileNotFoundError(f"output: expected an existing folder, got {output.parent}; make it first")
        self._refuse_input()
        if is_anndata:
            self._check_copy()
        if output.exists():
            self._refuse_present(kind)
        if os.path.lexists(self.folder):
            self._refuse_folder()
        return self

    def _refuse_input(self) -> None:
        """The input is never changed."""
        output, input = self.output, self.input
        if output.exists() and output.samefile(input):
            raise ValueError(f"output: expected another file than the input, got {output}; the input is never changed")
        real_input, real_output = Path(os.path.realpath(input)), Path(os.path.realpath(output))
        if real_input in real_output.parents or {real_output, partial_folder(real_output)} & set(real_input.parents):
            raise ValueError(f"output: expected a place apart from the input {input}, got {output}, one in the other")

    def _check_copy(self) -> None:
        """The result is a copy of the input with another entry in obsm: refuses what that would fail for at the end."""
        files = self.input.rglob("*") if self.input.is_dir() else [self.input]
        for path in files:
            if not os.access(path, os.R_OK):
                raise PermissionError(f"{path}: may not be read (permission denied), and the result is a copy of it")
        root, closing = open_store(self.input)
        with closing:
            try:
                if "obsm" in root:
                    dict(root["obsm"].attrs)
            except Exception as error:  # h5py and zarr have no common base of what they raise
                raise ValueError(
                    f"{self.input}: obsm, where the embedding goes, cannot be read: {error}; remove it from the file"
                ) from error

    def _refuse_present(self, kind: str) -> None:
        output = self.output
        if output.is_dir() != (kind == ".zarr") or not (output.is_dir() or output.is_file()):
            wanted = f"a file name, got the folder {output}" if output.is_dir() else f"a folder, got the file {output}"
            raise FileExistsError(f"output: expected {wanted}")
        if self.resume and self._run_of_output() is not None:
            return  # of this run or of another one: that is known when the model is
        if not self.overwrite:
            raise FileExistsError(f"output: {output} exists; name another file, or pass overwrite=True (--overwrite)")
        if output.is_dir():
            foreign = _foreign_in_store(output)
            if foreign is not None:
                raise FileExistsError(
                    f"output: expected a zarr store to replace, got a folder that holds {foreign}, which is no part of "
                    "one; name another file"
                )
            if not os.access(output, os.W_OK | os.X_OK):
                raise PermissionError(f"output: the folder {output} cannot be replaced, it is read-only")

    def _refuse_folder(self) -> None:
        folder = self.folder
        if folder.is_symlink() or not folder.is_dir():
            raise FileExistsError(
                f"output: expected no file or link {folder}, where finished cells are kept; move it away or name "
                "another output"
            )
        foreign = [entry.name for entry in folder.iterdir() if not _is_own(entry)]
        if foreign:
            raise FileExistsError(
                f"output: {folder} holds {', '.join(sorted(foreign)[:3])}, which no run of embed writes; move it away "
                "or name another output"
            )
        if (folder / "lock").exists():
            with locked(folder / "lock", self._busy):
                pass
        if not self.resume:
            raise FileExistsError(
                f"output: {folder} is left from an interrupted run; go on with resume=True (--resume), or remove "
                "that folder to start again"
            )

    @property
    def _busy(self) -> str:
        return f"output: another run is at work in {self.folder}; wait for it"

    @property
    def _finished(self) -> Path:
        """What the folder is called once the result, which the name tells, is in place."""
        return self.folder.with_name(f"{self.folder.name}.{self.output.stat().st_ino}")

    def _run_of_output(self) -> str | None:
        """The digest of the run that made the output; None where it is of none, or its array was written anew."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            root, closing = open_store(self.output)
            with closing:
                return str(root["obsm"][self.key].attrs[_RUN])
        return None

    def write(self, run: Encoding, options: dict[str, Any], annotate: Annotate | None = None) -> None:
        """Embeds the windows that are not there yet, then puts the result in place.

        annotate  called, with the rows of the windows in their order, for what goes into the result beside them
        """
        report = run.report
        described = {
            "cells": report.cells,
            "columns": run.cells.source.n_vars,
            "genes": hashlib.sha256(run.cells.column_map.gene_ids.tobytes()).hexdigest(),
            "cells per shard": run.window,
            "checkpoint": model_fingerprint(run.network),
            "obsm key": self.key,
            **options,
        }
        wanted = json.loads(json.dumps(described))  # as the manifest gives it back
        if self.resume and self.output.exists():
            made_by = self._run_of_output()
            if made_by == _run_digest(wanted, _fingerprint(self.input)).hex():
                for folder in (self.folder, self._finished):
                    self._remove(folder)
                report.resumed_cells = report.cells
                report.empty_cells = self._count_empty_cells()
                return
            if not self.overwrite:
                raise FileExistsError(
                    f"output: {self.output} exists, of another input, checkpoint or options; name another file, or "
                    "pass overwrite=True (--overwrite)"
                )
        try:
            self.folder.mkdir(exist_ok=self.resume)
        except FileExistsError:
            raise FileExistsError(self._busy) from None
        except OSError as error:
            raise PermissionError(
                f"output: the folder {self.output.parent} cannot be written to ({error}); choose another one"
            ) from error
        over = None
        try:
            with locked(self.folder / "lock", self._busy):
                try:
                    self._embed(run, wanted, annotate)
                    over = self._finished
                except BaseException as error:
                    # Bad numbers stay so, and mending them makes another input: its shards are void.
                    if isinstance(error, BadNumbers | _OtherCells) or not self._any_shard():
                        over = self.folder.with_name(f"{self.folder.name}.{uuid.uuid4().hex[:12]}")
                    elif isinstance(error, OSError | UnreadableCells):
                        kind = UnreadableCells if isinstance(error, UnreadableCells) else OSError
                        kept = "the cells that are finished are kept: go on with resume=True (--resume)"
                        raise kind(f"{error}; {kept}") from error
                    raise
                finally:
                    if over is not None:
                        self.folder.rename(over)  # nobody else takes it for a run to go on with
        finally:
            if over is not None:
                self._remove(over)  # not before the lock is closed: NFS keeps open files

    def _embed(self, run: Encoding, wanted: dict[str, Any], annotate: Annotate | None) -> None:
        report, windows = run.report, run.windows()
        if not is_anndata_file(self.input):
            run.cells.source.obs()  # which the result is made of: what cannot be read is told before the work
        earlier = _manifest_of(self.folder)
        if earlier is not None:
            self._check_same_run(earlier, wanted)
        elif self.manifest.exists():
            warnings.warn(f"{self.manifest}: damaged; each shard is compared with its cells instead", stacklevel=4)
        run_digest = _run_digest(wanted)
        seen = _fingerprint(self.input)
        made_from: dict[int, bytes] = {}
        for start, stop in windows:
            shard = self._read_shard(start, stop, run.width, run_digest)
            if shard is not None:
                made_from[start] = shard[1]
        if earlier is None or earlier.get("input") != seen:
            # Copied or touched it may be the same all the same: what counts is the rows that shards were made from.
            other = _first_other_window(run, made_from)
            if other is not None:
                raise ValueError(
                    f"resume: expected the input of the interrupted run in {self.folder}, got other cells from row "
                    f"{other} of {self.input} on; give the same, or remove that folder to start again"
                )
        missing = [(start, stop) for start, stop in windows if start not in made_from]
        self._remove_result()
        self._check_space(run, missing)
        write_whole(self.manifest, sealed({**wanted, "input": seen}))
        report.resumed_cells = report.cells - sum(stop - start for start, stop in missing)
        run.bar.update(report.resumed_cells)
        for start, stop in missing:
            rows = run.read(start, stop)
            made_from[start] = _digest(rows)
            self._write_shard(start, _shard_of(run.embed_rows(start, rows), made_from[start], run_digest))
        before = _fingerprint(self.input)
        if before != seen and _first_other_window(run, made_from) is not None:
            raise _OtherCells(f"{self.input}: changed while it was read; run again")
        self._publish(run, wanted, before, annotate)

    def _check_same_run(self, earlier: dict[str, Any], wanted: dict[str, Any]) -> None:
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

    def _check_space(self, run: Encoding, missing: list[tuple[int, int]]) -> None:
        files = [file for file in self.input.rglob("*") if file.is_file()] if self.input.is_dir() else [self.input]
        sizes = [file.stat() for file in files] if is_anndata_file(self.input) else []  # others are not copied
        copy = sum(min(size.st_size, size.st_blocks * 512) for size in sizes)
        numbers = run.report.cells + sum(stop - start for start, stop in missing)
        needed, free = copy + numbers * run.width * 4, shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"output: expected {needed / 1e6:,.0f} MB free in {self.output.parent} for a copy of the input with "
                f"the embedding, got {free / 1e6:,.0f} MB; make room, or name another place"
            )

    def _shard(self, start: int) -> Path:
        return self.folder / f"shard-{start:012d}.npy"

    def _any_shard(self) -> bool:
        return any(self.folder.glob("shard-*.npy"))

    def _count_empty_cells(self) -> int:
        root, closing = open_store(self.output)
        with closing:
            return int(np.isnan(root["obsm"][self.key][:, 0]).sum())

    def _write_shard(self, start: int, shard: bytes) -> None:
        write_whole(self._shard(start), shard)

    def _read_shard(self, start: int, stop: int, width: int, run: bytes) -> tuple[Embeddings, bytes] | None:
        """The embeddings of a window and the digest of their rows; None where no whole shard of this run is there."""
        path = self._shard(start)
        if not path.exists():
            return None
        content = path.read_bytes()
        signed, checksum = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if hashlib.sha256(signed + run).digest() != checksum:
            warnings.warn(f"{path}: not the shard that was written; its cells are embedded again", stacklevel=5)
            return None
        embeddings = np.load(io.BytesIO(signed[:-_DIGEST_BYTES]), allow_pickle=False)
        return (embeddings, signed[-_DIGEST_BYTES:]) if embeddings.shape == (stop - start, width) else None

    def _publish(self, run: Encoding, wanted: dict[str, Any], seen: list[int], annotate: Annotate | None) -> None:
        result = self.folder / f"result{self.output.suffix}"
        report, shape = run.report, (run.report.cells, run.width)
        run_digest, mark = _run_digest(wanted), _run_digest(wanted, seen).hex()

        def shards() -> Iterator[tuple[int, Embeddings]]:
            report.empty_cells = 0
            for start, stop in run.windows():
                shard = self._read_shard(start, stop, run.width, run_digest)
                if shard is None:
                    raise OSError(f"{self._shard(start)}: not what was written to it")
                report.empty_cells += int(np.isnan(shard[0][:, 0]).sum())
                yield start, shard[0]

        if self.is_store:
            _copy_store(self.input, result)
            _add_to_zarr(result, self.key, mark, shards(), shape, run.window)
        else:
            if is_anndata_file(self.input):
                shutil.copyfile(self.input, result)
            else:
                with new_hdf5(result, "w") as root:
                    write_tables(root, run.cells.source.obs(), [])
            _add_to_h5ad(result, self.key, mark, shards(), shape)
        if annotate is not None:
            _add_annotation(result, *annotate(rows for _, rows in shards()))
        if _fingerprint(self.input) != seen:
            raise OSError(f"{self.input}: changed while it was copied")
        _flush_tree(result)
        if self.output.exists() and not self.overwrite:
            raise FileExistsError(f"output: {self.output} has appeared meanwhile, by another run perhaps; move it away")
        if self.output.is_dir():
            self.output.rename(self.folder / "replaced.zarr")  # a folder cannot be renamed onto another
        os.replace(result, self.output)
        flush_to_disk(self.output.parent)

    def _remove_result(self) -> None:
        for name in ("result.h5ad", "result.zarr"):
            _remove_path(self.folder / name)

    def _remove(self, folder: Path) -> None:
        """Removes what runs have written, the manifest last."""
        if not folder.is_dir():
            return
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "manifest.json"):
            if _is_own(path):
                _remove_path(path)
        try:
            folder.rmdir()
        except OSError as error:
            warnings.warn(f"{folder}: cannot be removed: {error.strerror}", stacklevel=4)


class _OtherCells(ValueError):
    """The input has other cells than it had when the run began."""


def _manifest_of(folder: Path) -> dict[str, Any] | None:
    """What is written in the manifest; None where it is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return unsealed((folder / "manifest.json").read_bytes())
    return None


def _is_own(path: Path) -> bool:
    """Whether this is something that a run of embed writes into its folder."""
    if path.is_symlink():
        return False
    return bool(_OWN_FOLDERS.fullmatch(path.name) if path.is_dir() else _OWN_FILES.fullmatch(path.name))


def _foreign_in_store(folder: Path) -> str | None:
    """The name of something in a folder that no zarr store has, None where all is part of one (or there is nothing)."""
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_dir() for entry in entries}
    is_array = ".zarray" in found
    if "zarr.json" in found:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            described = json.loads((folder / "zarr.json").read_bytes())
            is_array = isinstance(described, dict) and described.get("node_type") == "array"
    if found and not _ZARR_METADATA & set(found):
        return f"{folder.name}, without the metadata of a group or array," if len(found) > 1 else min(found)
    for name, is_folder in found.items():
        if (name in _ZARR_METADATA and not is_folder) or (is_array and _ZARR_CHUNK.fullmatch(name)):
            continue
        if not is_folder or is_array:
            return name
        foreign = _foreign_in_store(folder / name)
        if foreign is not None:
            return f"{name}/{foreign}"
    return None


def _shard_of(embeddings: Embeddings, rows: bytes, run: bytes) -> bytes:
    """The content of a shard: an npy file, the digest of the rows, and that of both and of the run."""
    file = io.BytesIO()
    np.save(file, embeddings)
    signed = file.getvalue() + rows
    return signed + hashlib.sha256(signed + run).digest()


def _digest(rows: CsrArrays) -> bytes:
    digest = hashlib.sha256()
    for array in rows:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.digest()


def _first_other_window(run: Encoding, made_from: dict[int, bytes]) -> int | None:
    """First row of the first window whose rows are not those of the digest."""
    for start, stop in run.windows():
        if start in made_from and _digest(run.read(start, stop)) != made_from[start]:
            return start
    return None


def check_key(key: str) -> None:
    """Refuses, before any work, a key that could not be written into the obsm of a file. Raises ValueError."""
    if not key or "/" in key or "\0" in key or key.startswith((".", "__")) or key == "zarr.json":
        raise ValueError(f"key_added: expected a name without '/', got {key[:40]!r}; nor may it begin with '.' or '__'")
    if len(key.encode(errors="surrogateescape")) > _LONGEST_KEY:
        raise ValueError(f"key_added: expected at most {_LONGEST_KEY} bytes, got {key[:40]!r}...")


def _run_digest(wanted: dict[str, Any], input: list[int] | None = None) -> bytes:
    """Of what is embedded and how; with the fingerprint of an input, of what it was made from as well."""
    return hashlib.sha256(json.dumps([wanted, input], sort_keys=True).encode()).digest()


def _add_to_h5ad(
    path: Path, key: str, mark: str, shards: Iterator[tuple[int, Embeddings]], shape: tuple[int, int]
) -> None:
    with new_hdf5(path, "r+") as root:
        if not is_legacy_store(root):
            if "obsm" in root and not isinstance(root["obsm"], h5py.Group):
                del root["obsm"]  # anndata 0.12 writes nothing as a data set of encoding "null"
            obsm = _obsm_group(root)
            if key in obsm:
                del obsm[key]
            _fill_array(obsm.create_dataset(key, shape=shape, dtype=np.float32), mark, shards)
            return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata tells, item by item, how it moves old fields
        adata = anndata.read_h5ad(path)
    adata.obsm[key] = np.empty(shape, np.float32)
    for start, shard in shards:
        adata.obsm[key][start : start + len(shard)] = shard
    adata.write_h5ad(path)
    with new_hdf5(path, "r+") as root:
        root["obsm"][key].attrs[_RUN] = mark


def _add_to_zarr(
    path: Path, key: str, mark: str, shards: Iterator[tuple[int, Embeddings]], shape: tuple[int, int], window: int
) -> None:
    import zarr

    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    if "obsm" in root and not isinstance(root["obsm"], zarr.Group):
        shutil.rmtree(path / "obsm")
    obsm = _obsm_group(root)
    if (path / "obsm" / key).exists():
        shutil.rmtree(path / "obsm" / key)
    chunks = (max(1, min(window, shape[0])), shape[1])
    _fill_array(obsm.create_array(key, shape=shape, dtype=np.float32, chunks=chunks), mark, shards)
    _consolidate(path, ["obsm"], [f"obsm/{key}"])


def _add_annotation(path: Path, obs: Mapping[str, pd.Series], uns: Mapping[str, Any]) -> None:
    """Columns of obs and entries of uns into a result, in place of those of the same name."""
    if not path.is_dir():
        with new_hdf5(path, "r+") as root:
            _put_annotation(root, obs, uns)
        return
    import zarr

    _put_annotation(zarr.open_group(path, mode="r+", use_consolidated=False), obs, uns)
    _consolidate(path, ["obs", "uns"], [*(f"obs/{name}" for name in obs), *(f"uns/{name}" for name in uns)])


def _put_annotation(root: Any, obs: Mapping[str, pd.Series], uns: Mapping[str, Any]) -> None:
    table = root["obs"]
    for name, column in obs.items():
        if name in table:
            del table[name]
        write_elem(table, name, column.array if isinstance(column.dtype, pd.CategoricalDtype) else column.to_numpy())
    names = [str(name) for name in table.attrs["column-order"] if name not in obs]
    order = [*names, *obs]
    is_hdf5 = isinstance(root, h5py.Group)
    table.attrs["column-order"] = np.array(order, dtype=h5py.string_dtype()) if is_hdf5 else order
    if "uns" not in root:
        root.create_group("uns").attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    for name, value in uns.items():
        if name in root["uns"]:
            del root["uns"][name]
        write_elem(root["uns"], name, value)


def _consolidate(store: Path, groups: Sequence[str], written: Sequence[str]) -> None:
    """Enters new nodes, with all in them, and the groups that hold them into the metadata of all nodes that some stores
    keep at their root.

    zarr.consolidate_metadata would read those of every node, and fail for a broken one that is none of our business.
    """
    for name in (".zmetadata", "zarr.json"):
        root = json.loads((store / name).read_bytes()) if (store / name).exists() else {}
        kept = root if name == ".zmetadata" else root.get("consolidated_metadata")
        if not kept:
            continue
        entries = {
            entry: content
            for entry, content in kept["metadata"].items()
            if not any(f"{entry}/".startswith(f"{node}/") for node in written)
        }
        files = (".zgroup", ".zarray", ".zattrs") if name == ".zmetadata" else ("zarr.json",)
        inner = [
            path.parent.relative_to(store).as_posix()
            for node in written
            for file in files
            for path in (store / node).rglob(file)
        ]
        for node in dict.fromkeys([*groups, *inner]):
            for file in files:
                if (store / node / file).exists():
                    entry = f"{node}/{file}" if name == ".zmetadata" else node
                    entries[entry] = json.loads((store / node / file).read_bytes())
        # zarr takes the children of a node that stand together.
        kept["metadata"] = {entry: entries[entry] for entry in sorted(entries, key=lambda e: (e.count("/"), e))}
        (store / name).write_text(json.dumps(root))


def _obsm_group(root: Any) -> Any:
    if "obsm" not in root:
        root.create_group("obsm").attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    return root["obsm"]


def _fill_array(array: Any, mark: str, shards: Iterator[tuple[int, Embeddings]]) -> None:
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0", _RUN: mark})
    for start, shard in shards:
        array[start : start + len(shard)] = shard


def model_fingerprint(network: XTrimoGeneNetwork) -> str:
    """Hex digest of a model's config, vocabulary and weights."""
    digest = hashlib.sha256(json.dumps([network.config.to_dict(), network.vocabulary.genes]).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fingerprint(path: Path) -> list[int]:
    """Number of files, their bytes in all and the time of the last change (ns)."""
    stats = [file.stat() for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path.stat()]
    return [len(stats), sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]


def _copy_store(source: Path, target: Path) -> None:
    """A copy of a folder in files and folders that are new: writable ones, also where those of the source are not."""
    target.mkdir()
    for entry in source.iterdir():
        copy = _copy_store if entry.is_dir() else shutil.copyfile
        copy(entry, target / entry.name)


def _flush_tree(path: Path) -> None:
    for each in (*path.rglob("*"), path) if path.is_dir() else (path,):
        flush_to_disk(each)


def _remove_path(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
