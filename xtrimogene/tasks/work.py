"""WorkFolder: an unfinished fit on disk, beside the model that it will be, killed and resumed at will."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from xtrimogene.tasks.folder import IDENTITY, TASK_FILE, refuse_occupied
from xtrimogene.writing import locked, sealed, unsealed, write_whole

_FIT_FILE = "fit.json"
_SUFFIX = ".safetensors"
_OWN = re.compile(r"(fit\.json|[a-z0-9_]+\.safetensors)(\.tmp)?|lock")
# After the tensors of a file: the digest of all before it.
_DIGEST_BYTES = 32


@dataclass
class WorkFolder:
    """What a fit keeps until its model is written: OUTPUT.partial, with what the fit is of and named sets of tensors.

    Every file is written whole, under another name first; a set of tensors bears its checksum. When the model is in its
    place the folder is removed.
    """

    output: Path
    resume: bool
    overwrite: bool

    @classmethod
    def checked(cls, output: str | os.PathLike[str], *, resume: bool, overwrite: bool) -> WorkFolder:
        """Refuses, before any work, an output that could not be written, and an unfinished fit that nobody resumes."""
        self = cls(Path(os.path.realpath(output)), resume, overwrite)
        if not (resume and (self.output / TASK_FILE).is_file()):  # else: of this fit, or of another, see is_over
            refuse_occupied(self.output, overwrite)
        parent = self.output.parent
        if not parent.is_dir():
            raise FileNotFoundError(f"output: expected an existing folder, got {parent}; make it first")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(f"output: the folder {parent} cannot be written to; choose another one")
        self.check_unfinished()
        return self

    def check_unfinished(self) -> None:
        """Refuses what lies where an unfinished fit is kept, but for such a fit that is resumed."""
        folder = self.folder
        if os.path.lexists(folder):
            foreign = (
                ["a file"] if not folder.is_dir() else [e.name for e in folder.iterdir() if not _OWN.fullmatch(e.name)]
            )
            if foreign:
                raise FileExistsError(
                    f"output: {folder}, where an unfinished fit is kept, holds {', '.join(sorted(foreign)[:3])}, which "
                    "is of no fit; move it away, or name another output"
                )
            if not self.resume:
                raise FileExistsError(
                    f"output: {folder} is left from an interrupted fit; go on with resume=True (--resume), or remove "
                    "that folder to start again"
                )

    @property
    def folder(self) -> Path:
        return partial_folder(self.output)

    def is_over(self, identity: Mapping[str, Any]) -> bool:
        """Whether the output is what a fit of this identity wrote already: to go on with one that is over is no error.

        The model's settings hold the identity as folder.IDENTITY. Raises FileExistsError for the model of another fit.
        """
        path = self.output / TASK_FILE
        if not (self.resume and path.is_file()):
            return False
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if unsealed(path.read_bytes())["settings"][IDENTITY] == json.loads(json.dumps(identity)):
                return True
        refuse_occupied(self.output, self.overwrite)
        return False

    @contextlib.contextmanager
    def open(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Holds the folder for one fit of this identity: what a resumed fit must share with the one it goes on with.

        The folder is removed at the end, where nothing was raised; where nothing was kept, also then.
        Raises ValueError for another identity, FileExistsError where another process is at work.
        """
        self.folder.mkdir(exist_ok=True)
        over, gone = False, None
        try:
            with locked(self.folder / "lock", f"output: another fit is at work in {self.folder}; wait for it"):
                self._begin(json.loads(json.dumps(identity)))
                try:
                    yield
                    over = True
                finally:
                    if over or not any(self.folder.glob(f"*{_SUFFIX}")):
                        gone = self.folder.with_name(f"{self.folder.name}.{uuid.uuid4().hex[:12]}")
                        self.folder.rename(gone)  # nobody takes it for a fit to go on with
        finally:
            if gone is not None:
                shutil.rmtree(gone, ignore_errors=True)  # not before the lock is closed: NFS keeps open files

    def _begin(self, identity: dict[str, Any]) -> None:
        path = self.folder / _FIT_FILE
        if not path.exists():
            write_whole(path, sealed(identity))
            return
        try:
            earlier = unsealed(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path}: expected what a fit writes there, got a damaged file ({error}); remove {self.folder} to "
                "start again"
            ) from error
        changed = [
            f"{name} was {earlier.get(name)!r}, is {identity.get(name)!r}"
            for name in {**earlier, **identity}
            if earlier.get(name) != identity.get(name)
        ]
        if changed:
            raise ValueError(
                f"resume: expected the data and options of the interrupted fit in {self.folder}, got others: "
                f"{'; '.join(changed)}; give the same, or remove that folder to start again"
            )

    def save(self, name: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Keep tensors, and numbers that fit JSON, under a name (small letters, digits and _)."""
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        content = save(plain, metadata={"numbers": json.dumps(numbers)})
        write_whole(self.folder / (name + _SUFFIX), content + hashlib.sha256(content).digest())

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept under a name; None where nothing was, or, with a warning, where it is damaged."""
        path = self.folder / (name + _SUFFIX)
        if not path.exists():
            return None
        stored = path.read_bytes()
        content = stored[:-_DIGEST_BYTES]
        if hashlib.sha256(content).digest() == stored[-_DIGEST_BYTES:]:
            with contextlib.suppress(SafetensorError, ValueError, KeyError):
                size = int.from_bytes(content[:8], "little")
                header = json.loads(content[8 : 8 + size])
                return load(content), json.loads(header["__metadata__"]["numbers"])
        warnings.warn(f"{path}: not what was written there; it is made again", stacklevel=2)
        return None


def partial_folder(output: Path) -> Path:
    """Where a fit is kept until its model is there."""
    return output.with_name(output.name + ".partial")
