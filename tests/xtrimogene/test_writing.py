"""Tests of xtrimogene.writing: what bears its name is on disk, what fails leaves nothing, damaged JSON is told."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from xtrimogene.writing import flush_to_disk, locked, sealed, unsealed, write_whole, written_beside


def failing(code: int) -> Callable[[int], None]:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def write(path: Path, way: str) -> None:
    if way == "whole":
        write_whole(path, b"new")
    else:
        with written_beside(path, overwrite=True) as written:
            written.write_bytes(b"new")


@pytest.mark.parametrize("way", ["whole", "beside"])
def test_content_is_on_disk_before_it_has_its_name(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, replace, path = os.fsync, os.replace, tmp_path / "a.json"
    steps: list[tuple[int, int] | str] = []

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        steps.append((status.st_ino, status.st_size))

    def rename(written: Path, target: Path) -> None:
        replace(written, target)
        steps.append("renamed")

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    write(path, way)
    folder = tmp_path.stat()
    assert steps == [(path.stat().st_ino, len("new")), "renamed", (folder.st_ino, folder.st_size)]


@pytest.mark.parametrize("way", ["whole", "beside"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINVAL])
def test_a_file_that_does_not_reach_the_disk_is_an_error(
    code: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        write(path, way)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP])
def test_a_file_system_may_flush_no_folders(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(code))
    flush_to_disk(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        flush_to_disk(tmp_path)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    for _ in range(2):  # given back
        with (
            locked(tmp_path / "lock", "held"),
            pytest.raises(FileExistsError, match="busy"),
            locked(tmp_path / "lock", "busy"),
        ):
            raise AssertionError("two at work")


def test_json_tells_whether_it_is_what_was_written() -> None:
    text = sealed({"step": 2, "numbers": [0.5, None]})
    assert unsealed(text) == {"step": 2, "numbers": [0.5, None]}
    assert unsealed('{"step": 2}') == {"step": 2}  # of versions that knew no checksum
    for damaged, message in (
        (text.replace("2", "3", 1), "its checksum is another one"),
        (text[:-2], "Expecting"),
        ("[2]", "expected keys and values, got list"),
        ("[" * 100_000, "recursion"),
    ):
        with pytest.raises(ValueError, match=message):
            unsealed(damaged)
