"""RunFolder: the output folder of a pre-training run, what it is a run of, and who is at work in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from xtg_kernels import dispatch
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.network.vocabulary import Vocabulary
from xtrimogene.training.checkpoints import Checkpoints
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.ranks import Ranks
from xtrimogene.writing import locked, sealed, unsealed, write_whole

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
VOCABULARY_FILE = "vocabulary.tsv"
CHECKPOINT_FOLDER = "checkpoints"
MODEL_FOLDER = "model"
_LOCK_FILE = "lock"
# What a run writes before run.json says that it is one.
_FIRST_FILES = {_LOCK_FILE, CONFIG_FILE, VOCABULARY_FILE, RUN_FILE + ".tmp"}
# Cells whose values a resumed run compares, and what messages call the comparison.
_SAMPLED_CELLS = 256
_CONTENT = "cells, genes and values"


class RunFolder:
    """The output folder of a run, on the first rank the only one that writes to it but for checkpoints."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.resume = resume
        self._lock = contextlib.ExitStack()

    def check(self) -> None:
        """Refuse, before any work, a folder that cannot be the output."""
        path = self.path
        if path.exists() and not self.resume:
            raise FileExistsError(f"output {path}: exists; name another folder, or go on with its run: --resume")
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"output {path}: expected the folder of a run, got a file")
        if path.exists() and not (path / RUN_FILE).exists():
            foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in _FIRST_FILES)
            if foreign:
                raise FileExistsError(
                    f"output {path}: expected the folder of a run, got one without {RUN_FILE} (it holds "
                    f"{', '.join(foreign[:3])}); name another folder"
                )
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(f"output {path}: the folder {nearest} cannot be written to; choose another one")

    def begin(
        self, config: PretrainConfig, vocabulary: Vocabulary, identity: dict[str, Any]
    ) -> tuple[Path, int, dict[str, Any]] | None:
        """Make the folder, or take up its run; the checkpoint to go on with, if any."""
        try:
            self.path.mkdir(parents=True, exist_ok=self.resume)
        except OSError as error:
            raise PermissionError(
                f"output {self.path}: the folder cannot be made ({error.strerror}); choose another one"
            ) from error
        busy = f"output {self.path}: another run is at work in it; wait for it"
        self._lock.enter_context(locked(self.path / _LOCK_FILE, busy))
        run_file = self.path / RUN_FILE
        machine = _machine()
        if run_file.exists():
            try:
                earlier = unsealed(run_file.read_bytes())
                earlier_run, earlier_machine = dict(earlier["run"]), dict(earlier["machine"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{run_file}: expected what a run writes there, got a damaged file ({error}); name another folder"
                ) from error
            self._check_same(earlier_run, identity)
            changed = [
                f"{name} was {earlier_machine.get(name)}, is {value}"
                for name, value in machine.items()
                if earlier_machine.get(name) != value
            ]
            if changed:
                warnings.warn(
                    f"{self.path}: {'; '.join(changed)}: the run goes on, but its weights can differ in their last "
                    "bits from those of an uninterrupted one",
                    stacklevel=2,
                )
        else:
            config.to_yaml(self.path / CONFIG_FILE)
            vocabulary.save(self.path / VOCABULARY_FILE)
            write_whole(run_file, sealed({"run": identity, "machine": machine}))
        checkpoints = self.checkpoints(config)
        checkpoints.remove_leftovers()
        return checkpoints.newest()

    def _check_same(self, earlier: dict[str, Any], identity: dict[str, Any]) -> None:
        # As JSON gives it back: tuples as lists.
        wanted = json.loads(json.dumps(identity))
        # A key that the run's version of the project did not know had its default.
        defaults = PretrainConfig().fixed()
        earlier = {**{name: defaults.get(name) for name in wanted}, **earlier}
        changed = [
            f"{name} was {earlier.get(name)!r}, is {wanted.get(name)!r}"
            for name in earlier
            if earlier[name] != wanted.get(name)
        ]
        if len(changed) > 1:
            # Options decide what is read: another content need not mean other cells.
            changed = [change for change in changed if not change.startswith(_CONTENT)]
        if changed:
            model = self.path / MODEL_FOLDER
            weights = f"; checkpoint={model} begins there with the weights of this run" if model.exists() else ""
            raise ValueError(
                f"resume: expected the config and data of the run in {self.path}, got others: {'; '.join(changed)}; "
                f"give the same, or name another folder{weights}"
            )

    def checkpoints(self, config: PretrainConfig) -> Checkpoints:
        return Checkpoints(self.path / CHECKPOINT_FOLDER, config.keep_checkpoints)

    def unlock(self) -> None:
        self._lock.close()


def identity_of(config: PretrainConfig, cells: TrainingCells, ranks: Ranks) -> dict[str, Any]:
    """What a run must share with the one that it goes on with, by the names that messages call it."""
    sample = cells.read(cells.training[:: max(1, len(cells.training) // _SAMPLED_CELLS)][:_SAMPLED_CELLS])
    content = hashlib.sha256(cells.fingerprint.encode())
    content.update(sample.values.numpy().tobytes())
    fixed = config.fixed()
    # The first is told by another name, the second by its genes, wherever the file lies.
    del fixed["accumulate"], fixed["vocabulary"]
    return {
        **fixed,
        "data sets": [[Path(source.name).name, source.n_obs] for source in cells.sources],
        "genes": len(cells.vocabulary),
        _CONTENT: content.hexdigest()[:16],
        "batches a step (ranks times accumulate)": ranks.world_size * config.accumulate,
    }


def _machine() -> dict[str, Any]:
    extension = dispatch.extension()
    return {
        "torch": str(torch.__version__),
        "kernels": "reference" if extension is None else extension.active_isa(),
        "threads": torch.get_num_threads(),
    }
