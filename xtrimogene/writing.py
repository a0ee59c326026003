"""Files that are whole or not there: written beside their place, flushed to disk, renamed; and locks on them.

A file that bears its name is the one that was written: JSON files hold a checksum of their content.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_TEMPORARY = ".tmp"
_CHECKSUM = "crc32"
# What flock says where the file system (NFS without lockd, Lustre without -o flock, some FUSE) has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
# What fsync says of a folder where the file system flushes none.
_NO_FOLDER_FLUSH = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is never there by half, also after a power cut."""
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


@contextlib.contextmanager
def written_beside(output: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a name beside the output to write a file under; it gets the output's when all went well, or is removed.

    Without leave to overwrite, an output that has appeared meanwhile stays, and the file keeps a name of its own.
    """
    mark = uuid.uuid4().hex[:12]
    written = output.with_name(f".{output.name}.{mark}{_TEMPORARY}")
    try:
        yield written
        flush_to_disk(written)
        if output.exists() and not overwrite:
            kept = output.with_name(f"{output.stem}.{mark}{output.suffix}")
            os.replace(written, kept)
            raise FileExistsError(
                f"output: {output} has appeared meanwhile, by another run perhaps; the result of this one is {kept}"
            )
        os.replace(written, output)
        flush_to_disk(output.parent)
    finally:
        written.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_beside(output: Path) -> Iterator[Path]:
    """Gives a new folder beside the output to write files in; it takes the output's place when all went well, or is
    removed. What was there before is gone then, and is there unharmed where something fails."""
    mark = uuid.uuid4().hex[:12]
    written = output.with_name(f".{output.name}.{mark}{_TEMPORARY}")
    replaced = output.with_name(f".{output.name}.{mark}.old")
    try:
        written.mkdir()
        yield written
        for path in (*written.rglob("*"), written):
            flush_to_disk(path)
        if output.exists():
            output.rename(replaced)
        try:
            written.rename(output)
        except OSError:
            if replaced.exists():
                replaced.rename(output)
            raise
        flush_to_disk(output.parent)
    finally:
        shutil.rmtree(written, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """fsync of a file or of a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sealed(content: Mapping[str, Any], indent: int | None = 1) -> str:
    """JSON of a dict and of a checksum of it."""
    return json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=indent)


def unsealed(text: str | bytes) -> dict[str, Any]:
    """The dict of sealed; also of JSON without a checksum, as earlier versions wrote it.

    Raises ValueError for anything that was not written so.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict):
        raise ValueError(f"expected keys and values, got {type(content).__name__}")
    if _CHECKSUM in content and content.pop(_CHECKSUM) != _checksum(content):
        raise ValueError("its checksum is another one")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock of a file, which is made where it is missing.

    Raises FileExistsError(busy) where another process holds it; warns where the file system has no locks.
    """
    with open(path, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(busy) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{path}: this file system has no locks ({error.strerror}); see to it that no other run writes there",
                stacklevel=3,
            )
        # Who held it a moment ago may have removed the file: this lock then keeps nobody out.
        if not path.exists() or path.stat().st_ino != os.fstat(lock.fileno()).st_ino:
            raise FileExistsError(busy)
        yield
