"""A task model's folder on disk: task.json, task.safetensors, the network's own folder and a model card.

It is written whole or not at all, nothing in it is unpickled, and nothing in it points outside: it works wherever it is
copied to.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from xtrimogene.hub import checkpoint_folder
from xtrimogene.network import folder as network_folder
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.writing import folder_beside, sealed, unsealed

TASK_FILE, TENSORS_FILE, NETWORK_FOLDER, CARD_FILE = "task.json", "task.safetensors", "network", "README.md"
_FILES = (TASK_FILE, TENSORS_FILE, NETWORK_FOLDER, CARD_FILE)
_FORMAT = 1
# Key of the settings that hold what the model was fitted to, for WorkFolder.is_over.
IDENTITY = "fit"


@dataclass(frozen=True)
class TaskFolder:
    """What a task model consists of.

    settings  what fits JSON: names of types, how cells are read, what it was fitted to
    tensors   the task's own weights by name
    network   the model that they stand on
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    network: XTrimoGeneNetwork


def save(
    folder: str | os.PathLike[str],
    task: str,
    model: TaskFolder,
    *,
    card: str,
    overwrite: bool = False,
) -> None:
    """Write a task model's folder, beside its place and then renamed.

    task  its name, such as "annotation"
    card  the model card, Markdown

    Raises FileExistsError as refuse_occupied does, OSError for a disk that fails.
    """
    target = Path(os.path.realpath(folder))
    refuse_occupied(target, overwrite)
    with folder_beside(target) as written:
        described = {"task": task, "format": _FORMAT, "settings": model.settings}
        (written / TASK_FILE).write_text(sealed(described), encoding="utf-8")
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in model.tensors.items()}
        try:
            save_file(plain, written / TENSORS_FILE)
        except SafetensorError as error:  # also for a full disk
            raise OSError(f"{target / TENSORS_FILE}: cannot be written: {error}") from error
        (written / TENSORS_FILE).chmod((written / TASK_FILE).stat().st_mode)
        network = model.network
        network_folder.save(
            written / NETWORK_FOLDER,
            network.state_dict(),
            network.config,
            network.vocabulary,
            card={"Recipe": f"The network of a model for {task}; the card in the folder above says more."},
        )
        (written / CARD_FILE).write_text(card, encoding="utf-8")


def load(folder: str | os.PathLike[str], task: str) -> TaskFolder:
    """The model of a folder, in evaluation mode.

    Raises FileNotFoundError for a missing folder or file, ValueError for one of another task or that is damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder of a model for {task}")
    for name in _FILES[:3]:
        if not (path / name).exists():
            raise FileNotFoundError(
                f"{path}: expected the folder of a model for {task}, got one without {name}; `fit` makes such a folder"
            )
    try:
        described = unsealed((path / TASK_FILE).read_bytes())
        found, settings = described["task"], described["settings"]
        tensors = load_file(path / TENSORS_FILE)
    except (ValueError, KeyError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a model for {task}, got damaged files: {error}") from error
    if found != task:
        raise ValueError(f"{path}: expected a model for {task}, got one for {found}")
    if described.get("format") != _FORMAT:
        raise ValueError(f"{path}: is of format {described.get('format')}, and this version reads {_FORMAT}; update it")
    checkpoint = network_folder.Checkpoint.open(
        checkpoint_folder(path / NETWORK_FOLDER, network_folder.CHECKPOINT_FILES)
    )
    return TaskFolder(settings, tensors, XTrimoGeneNetwork.from_checkpoint(checkpoint))


def refuse_occupied(target: Path, overwrite: bool) -> None:
    """Raises FileExistsError for a place that save would refuse, so that it can be said before the work."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder to write a model to, got a file")
    present = sorted(entry.name for entry in target.iterdir())
    if present and not overwrite:
        raise FileExistsError(f"{target}: the folder is not empty; name another, or pass overwrite=True (--overwrite)")
    foreign = [name for name in present if name not in _FILES]
    if foreign:
        raise FileExistsError(
            f"{target}: overwrite replaces the whole folder, and {', '.join(foreign[:3])} in it belongs to no model; "
            "move it away or name another folder"
        )
