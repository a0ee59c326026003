"""Checkpoints of a training run: written beside their place, renamed when complete, checked before they are taken.

The tensors go through torch.distributed.checkpoint, so that every rank writes what it holds. A checkpoint is a folder
`step-<number>` with the files of torch.distributed.checkpoint and complete.json, which holds the progress of the run,
the size and CRC-32 of every other file and a checksum of its own.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from xtrimogene.training.ranks import first_rank_does
from xtrimogene.writing import flush_to_disk, sealed, unsealed, write_whole

COMPLETE_FILE = "complete.json"
_PREFIX = "step-"
_TEMPORARY = ".tmp"
_READ_BYTES = 1 << 22


class Checkpoints:
    """The checkpoints of one run, in one folder that all its ranks see.

    folder  where they are; made with the first one
    keep    how many of the newest stay
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> Path:
        """Write the state after `step` optimizer steps. Called by all ranks; returns when the checkpoint is on disk.

        `progress` must be the same on all ranks and fit JSON. Until the folder is renamed at the end, nothing takes it.
        """
        target = self.folder / f"{_PREFIX}{step:09d}"
        written = target.with_name(target.name + _TEMPORARY)
        first_rank_does(self._make_room, written, target)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        with _without_single_process_notice():
            try:
                dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=written)
            except CheckpointException as error:  # no Exception, and a traceback of each rank for a message
                first = next(iter(error.failures.values()))[0]
                raise OSError(f"{target}: the checkpoint cannot be written: {first}") from error
        first_rank_does(self._complete, written, target, {"step": step, "progress": progress})
        return target

    def _make_room(self, written: Path, target: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A checkpoint of this step can be there only if it was found broken.
        for path in (written, target):
            shutil.rmtree(path, ignore_errors=True)

    def _complete(self, written: Path, target: Path, described: dict[str, Any]) -> None:
        files = {path.name: list(_size_and_crc(path)) for path in sorted(written.iterdir())}
        write_whole(written / COMPLETE_FILE, sealed({**described, "files": files}))
        written.rename(target)
        flush_to_disk(self.folder)
        for old in list(self._newest_first())[self.keep :]:
            discarded = old.with_name(old.name + _TEMPORARY)
            old.rename(discarded)
            shutil.rmtree(discarded)

    def newest(self) -> tuple[Path, int, dict[str, Any]] | None:
        """The newest checkpoint that is whole, as (folder, step, progress); None if there is none.

        Warns about every broken one that it passes over. Reads only; for one rank, which tells the others.
        """
        for path in self._newest_first():
            try:
                complete = unsealed((path / COMPLETE_FILE).read_bytes())
                for name, (size, crc) in complete["files"].items():
                    if (path / name).stat().st_size != size or _size_and_crc(path / name) != (size, crc):
                        raise ValueError(f"{name} is not the file that was written")
                return path, int(complete["step"]), complete["progress"]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                warnings.warn(f"{path}: broken checkpoint passed over: {error}", stacklevel=2)
        return None

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put a checkpoint's tensors into a model and an optimizer like those that were saved. Called by all ranks."""
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        with _without_single_process_notice():
            dcp.load(state, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def remove_leftovers(self) -> None:
        """Remove what a killed run had begun to write. For one rank, before training."""
        for path in self.folder.glob(f"{_PREFIX}*{_TEMPORARY}"):
            shutil.rmtree(path)

    def _newest_first(self) -> Iterator[Path]:
        folders = [path for path in self.folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
        return iter(sorted(folders, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True))


@contextlib.contextmanager
def _without_single_process_notice() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _size_and_crc(path: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
