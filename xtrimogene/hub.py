"""checkpoint_folder: where a model lies on disk, by its path, or by its name in the package or on the Hugging Face Hub.

Models in the package: pbmc-tiny, see its card in xtrimogene/models/pbmc-tiny.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# Models that come with the package.
_PACKAGED = Path(__file__).parent / "models"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def checkpoint_folder(path_or_name: str | Path, files: tuple[str, ...], **download: Any) -> Path:
    """The path as it is where something is there, else the model of that name in the package, else the local copy of
    the files of a Hub model "owner/name".

    Options are those of huggingface_hub.snapshot_download. Raises FileNotFoundError where neither is to be had.
    """
    folder = Path(path_or_name)
    if folder.exists():
        return folder
    if str(path_or_name) in _packaged():
        return _PACKAGED / path_or_name
    if not _HUB_NAME.fullmatch(str(path_or_name)):
        return folder
    # Late: who has a folder needs neither the Hub nor its client.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_name), allow_patterns=list(files), **download))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path_or_name}: no such checkpoint folder, and not to be had from the Hub: {error}"
        ) from error


def _packaged() -> list[str]:
    return sorted(entry.name for entry in _PACKAGED.iterdir()) if _PACKAGED.is_dir() else []
