"""Folders that are zarr stores: what tells them, what they hold, and which file of them is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Metadata of a group or array, of zarr formats 2 and 3; the first of each format tells a group.
METADATA = (".zgroup", "zarr.json", ".zarray", ".zattrs", ".zmetadata")


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a zarr store, or is called one."""
    return folder.suffix == ".zarr" or any((folder / name).exists() for name in METADATA[:2])


def damaged_metadata(folder: Path) -> str | None:
    """What is wrong with the metadata of a store, in words that name the file; None where each can be read."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.name in METADATA:
            try:
                json.loads(path.read_bytes())
            except PermissionError:
                return f"{path.relative_to(folder)} may not be read (permission denied)"
            except (OSError, ValueError, RecursionError) as error:
                return f"{path.relative_to(folder)} cannot be read: {error}"
    return None


def members(group: Any) -> list[str]:
    """Names of what is in a group, of HDF5 or zarr, also of what cannot be read."""
    store = getattr(group, "store", None)
    if store is None:
        return list(group)
    folder = Path(store.root) / group.path
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
