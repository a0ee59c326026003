"""TrainingLog: what a training run reports, one JSON object a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtrimogene.writing import sealed, unsealed

LOG_FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class TrainingLog:
    """Lines of {"event": ..., "step": ..., numbers} in `folder/log.jsonl`, and scalars in `folder/tensorboard`.

    Every line ends with a checksum of itself, which read_log takes off.

    after_step   None to begin; a number to go on after that step: later lines are cut off, and with them a line that a
                 killed run wrote by half, so that each step is in the log once
    tensorboard  also write TensorBoard events; without the package there is a warning, and the lines alone

    Attribute `last`: the last line of each event.
    """

    def __init__(self, folder: Path, *, after_step: int | None = None, tensorboard: bool = True) -> None:
        self.path = folder / LOG_FILE
        kept = [] if after_step is None else [line for line in read_log(self.path) if line["step"] <= after_step]
        self.last: dict[str, dict[str, Any]] = {}
        self._steps: dict[str, set[int]] = {}
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        temporary.replace(self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        for entry in kept:
            self._remember(entry)
        self._writer = _summary_writer(folder / TENSORBOARD_FOLDER, after_step) if tensorboard else None

    def write(self, event: str, step: int, **numbers: Any) -> None:
        """Add one line. Float values other than NaN also go to TensorBoard, as `event/name`."""
        entry = {"event": event, "step": step, **numbers}
        self._file.write(_line(entry))
        self._file.flush()
        self._remember(entry)
        if self._writer is not None:
            for name, value in numbers.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{event}/{name}", value, step)

    def has(self, event: str, step: int) -> bool:
        """Whether the log has a line of this event for this step."""
        return step in self._steps.get(event, ())

    def sync(self) -> None:
        """Bring all lines to disk: before a checkpoint that says they are there."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remember(self, entry: dict[str, Any]) -> None:
        self.last[entry["event"]] = entry
        self._steps.setdefault(entry["event"], set()).add(entry["step"])


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log, as dicts; no file, no lines.

    Lines that are damaged are left out with a warning, the last one without where a killed run wrote it by half.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                entry = unsealed(line)
                if not isinstance(entry.get("event"), str) or not isinstance(entry.get("step"), int):
                    raise ValueError("no event and step")
            except ValueError as error:
                warnings.warn(f"{path}: line {number} is damaged and left out: {error}", stacklevel=2)
                continue
            yield entry


def _line(entry: dict[str, Any]) -> str:
    return sealed(entry, indent=None) + "\n"


def _summary_writer(folder: Path, after_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            f"TensorBoard is not installed, the log goes to {LOG_FILE} alone; pip install 'xtrimogene[train]' adds it, "
            "tensorboard=false silences this",
            stacklevel=3,
        )
        return None
    # TensorBoard leaves out what earlier files hold from purge_step on.
    return SummaryWriter(folder, purge_step=0 if after_step is None else after_step + 1)
