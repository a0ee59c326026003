"""The report of a task: report.html, report.md, report.json and pictures in a folder, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtrimogene.document import Section, markdown, page
from xtrimogene.writing import folder_beside

_OWN = re.compile(r"report\.(html|md|json)|[a-z_]+\.(png|svg)")
_STYLE: dict[str, Any] = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5,
    "legend.frameon": False, "svg.hashsalt": "xtrimogene", "axes.axisbelow": True,
}  # fmt: skip


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuses, before any work, a folder that could not be written at the end."""
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"output {folder}: expected an existing folder to make it in, got {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"output {folder}: the folder {parent} cannot be written to; choose another one")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"output {folder}: expected the name of a folder, got a file")
    present = sorted(entry.name for entry in folder.iterdir())
    foreign = [name for name in present if not _OWN.fullmatch(name)]
    if foreign:
        raise FileExistsError(f"output {folder}: {', '.join(foreign[:3])} in it is of no report; name another folder")
    if present and not overwrite:
        raise FileExistsError(f"output {folder}: exists; name another folder, or pass overwrite=True (--overwrite)")


def write(
    folder: Path,
    title: str,
    sections: Sequence[Section],
    numbers: Mapping[str, Any],
    pictures: Mapping[str, Callable[[Any], None]],
) -> None:
    """Write the report's files, in the place of an earlier report.

    sections  the document, see xtrimogene.document; a Picture in it is one of pictures
    numbers   what report.json holds; numbers that are not finite are null there
    pictures  name (small letters and _) -> (matplotlib figure) -> draws it
    """
    with folder_beside(folder.absolute()) as written:
        draw(written, pictures)
        (written / "report.json").write_text(
            json.dumps(_finite(numbers), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        (written / "report.md").write_text(markdown(sections, title), encoding="utf-8")
        (written / "report.html").write_text(page(sections, title, written), encoding="utf-8")


def draw(folder: Path, pictures: Mapping[str, Callable[[Any], None]]) -> None:
    """Write NAME.png and NAME.svg of every picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = _STYLE
    with mpl.rc_context(style):
        for name, way in pictures.items():
            figure = Figure(layout="constrained")
            way(figure)
            figure.savefig(folder / f"{name}.png", dpi=120)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def shown(value: float | None, digits: int = 3) -> str:
    """A number for a table; nothing where there is none."""
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if hasattr(value, "item"):
        value = value.item()
    return value if not isinstance(value, float) or math.isfinite(value) else None
