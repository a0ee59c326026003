"""HDF5 files: opened, closed for a while and opened again, with the cure for what cannot be opened or unpacked."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import resource
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np

# Registered numbers of the compressions that single-cell files are seen with and HDF5 itself does not bring.
_FILTERS = {32000: "LZF", 32001: "Blosc", 32004: "LZ4", 32008: "bitshuffle", 32015: "Zstandard", 32026: "Blosc2"}


class MachineLimit(OSError):
    """The machine has no room for the work: no fault of the file, and mended outside of it, as the message says."""


class HdfFile:
    """An HDF5 file for reading, opened when it is needed: after close(), the next read opens it again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._file: h5py.File | None = None
        self._identity: tuple[int, int] | None = None

    @property
    def root(self) -> h5py.File:
        """Raises ValueError where it cannot be opened, or is another file than before."""
        with self._lock:
            if self._file is None:
                self._file = _opened(self.path)
                stat = self.path.stat()
                identity = (stat.st_ino, stat.st_size)  # whoever touches a file does not change it
                if self._identity not in (None, identity):
                    self.close()
                    raise ValueError(f"{self.path}: changed while it was read; run again")
                self._identity = identity
            return self._file

    def array(self, stored: Any) -> Any:
        """The data set as one that outlives close(); anything else as it is."""
        return HdfArray(self, stored) if isinstance(stored, h5py.Dataset) else stored

    def close(self) -> None:
        """Gives the file handle back."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def read(self, name: str, key: Any) -> Any:
        with self._lock:  # not closed by another thread while it is read
            return self.root[name][key]


class HdfArray:
    """A data set of an HdfFile, by its name."""

    def __init__(self, file: HdfFile, dataset: h5py.Dataset) -> None:
        self.file, self.name, self.shape, self.dtype = file, dataset.name, dataset.shape, dataset.dtype

    def __getitem__(self, key: Any) -> Any:
        return self.file.read(self.name, key)


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if _too_many_open(error) and more_open_files():
            return h5py.File(path, "r")
        raise _open_error(path, error) from error


def more_open_files() -> bool:
    """Raises this process's own limit of open files as far as it may; False where it is there already."""
    own, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if own == most:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return True


def _too_many_open(error: OSError) -> bool:
    return error.errno == errno.EMFILE or f"errno = {errno.EMFILE}," in str(error)


def _open_error(path: Path, error: OSError) -> Exception:
    told = str(error)
    if error.errno == errno.EACCES:
        return PermissionError(f"{path}: may not be read (permission denied); ask its owner, or copy it")
    if _too_many_open(error):
        return MachineLimit("too many open files; raise the limit with `ulimit -n 4096` in this shell and run again")
    if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK) or "unable to lock file" in told:
        return ValueError(
            f"{path}: is open for writing elsewhere; close it there (adata.file.close(), or end that session), or give "
            "a copy. If nothing writes to it and the file system has no locks, set HDF5_USE_FILE_LOCKING=FALSE"
        )
    if "already open for write" in told or "consistency flags" in told:
        return ValueError(
            f"{path}: is open for writing elsewhere, or its writer was killed; wait for that program, or, if none is "
            f"at work, clear the mark with `h5clear -s {path}` (of the HDF5 tools) and check what the file holds"
        )
    return ValueError(f"{path}: cannot be opened: {error}; the file is damaged or truncated")


def check_filters(stored: Any) -> None:
    """Loads hdf5plugin where it helps. Raises ValueError for a data set whose compression cannot be undone even so."""
    if not isinstance(stored, h5py.Dataset):
        return
    properties = stored.id.get_create_plist()
    numbers = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if all(h5py.h5z.filter_avail(number) for number in numbers):
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("hdf5plugin")  # it registers its filters
    missing = [_FILTERS.get(number, f"filter {number}") for number in numbers if not h5py.h5z.filter_avail(number)]
    if missing:
        raise ValueError(
            f"{stored.name} is compressed with {' and '.join(missing)}, which needs a plugin: pip install hdf5plugin, "
            "or write the file again with compression='gzip'"
        )


def text(value: Any) -> str:
    """A string attribute or entry, however its writer stored it: of fixed length, as bytes, or in an array of one."""
    if isinstance(value, np.ndarray):
        value = value.ravel()[0] if value.size else ""
    if value is None or isinstance(value, h5py.Empty):
        return ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def texts(stored: Any) -> list[str]:
    """All entries of a one-dimensional data set of strings."""
    check_filters(stored)
    return [text(entry) for entry in stored[:]]


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5. Raises PermissionError where it may not be read."""
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path}: may not be read (permission denied); ask its owner, or copy it")
    return bool(h5py.is_hdf5(path))
