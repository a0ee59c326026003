"""checkpoint_folder: where a model lies on disk, by its path or, downloaded, by its name on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def checkpoint_folder(path_or_name: str | Path, files: tuple[str, ...], **download: Any) -> Path:
    """The path as it is where something is there, else the local copy of the files of a Hub model "owner/name".

    Options are those of huggingface_hub.snapshot_download. Raises FileNotFoundError where neither is to be had.
    """
    folder = Path(path_or_name)
    if folder.exists() or not _HUB_NAME.fullmatch(str(path_or_name)):
        return folder
    # Late: who has a folder needs neither the Hub nor its client.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_name), allow_patterns=list(files), **download))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path_or_name}: no such checkpoint folder, and not to be had from the Hub: {error}"
        ) from error
