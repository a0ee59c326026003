"""The rooms of the project and the arrows between them: who may import whom, and which packages each room needs.

``python -m tests.test_rooms`` writes the picture of them into CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Room: the rooms it may import besides itself, further down. An arrow that is not here is one that blurs the house.
ROOMS = {
    "xtg_kernels": set(),
    "xtrimogene._moved": set(),
    "xtrimogene.version": set(),
    "xtrimogene": {"xtrimogene._moved", "xtrimogene.version"},
    "xtrimogene.progress": set(),
    "xtrimogene.network": {"xtg_kernels"},
    "xtrimogene.encoder": {"xtrimogene.network"},
    "xtrimogene.flops": {"xtrimogene.network"},
    "xtrimogene.hub": set(),
    "xtrimogene.writing": set(),
    "xtrimogene.document": set(),
    "xtrimogene.cells": {"xtrimogene.network", "xtrimogene.progress", "xtg_kernels"},
    "xtrimogene.inference": {
        "xtrimogene.cells",
        "xtrimogene.hub",
        "xtrimogene.network",
        "xtrimogene.progress",
        "xtrimogene.writing",
        "xtg_kernels",
    },
    "xtrimogene.training": {
        "xtrimogene.cells",
        "xtrimogene.evaluation",
        "xtrimogene.hub",
        "xtrimogene.network",
        "xtrimogene.progress",
        "xtrimogene.writing",
        "xtg_kernels",
    },
    "xtrimogene.evaluation": {
        "xtrimogene.cells",
        "xtrimogene.inference",
        "xtrimogene.network",
        "xtrimogene.progress",
    },
    "xtrimogene.tasks": {
        "xtrimogene.cells",
        "xtrimogene.document",
        "xtrimogene.evaluation",
        "xtrimogene.hub",
        "xtrimogene.inference",
        "xtrimogene.network",
        "xtrimogene.progress",
        "xtrimogene.writing",
        "xtg_kernels",
    },
    "xtrimogene.model": {"xtrimogene.inference", "xtrimogene.hub", "xtrimogene.network"},
    "xtrimogene.interop": {"xtrimogene.model", "xtrimogene.network", "xtg_kernels"},
    "xtrimogene.dropin": {"xtrimogene.interop"},
}
# On top: they may import every room of the package.
TOP = {"xtrimogene.bench", "xtrimogene.cli", "xtrimogene.demo", "xtrimogene.__main__"}
# Third-party packages of the rooms that other people's models are built on.
PACKAGES = {
    "xtg_kernels": {"numpy", "torch", "triton"},
    "xtrimogene.network": {"numpy", "safetensors", "torch", "yaml"},
    "xtrimogene.hub": {"huggingface_hub"},
    "xtrimogene.progress": {"tqdm"},
    "xtrimogene.version": set(),
}


def _room(module: str) -> str:
    """The room of a module of ours, or of a name in one: xtrimogene.network for xtrimogene.network.config."""
    parts = module.split(".")
    if parts[0] == "xtg_kernels":
        return parts[0]
    entry = ROOT / "/".join(parts[:2])
    return ".".join(parts[:2]) if entry.is_dir() or entry.with_suffix(".py").is_file() else parts[0]


def _imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, but for the checker of types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = [node for each in ast.walk(tree) if isinstance(each, ast.If) and _for_types(each) for node in each.body]
    hidden = {id(node) for each in unseen for node in ast.walk(each)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            # A name may be a module: `from xtrimogene.cells import stream` leads to the same room.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _for_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _files() -> list[tuple[str, Path]]:
    found = []
    for package in ("xtg_kernels", "xtrimogene"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found.append((module, path))
    return found


FILES = _files()


def test_the_files_are_found() -> None:
    assert len(FILES) > 60


@pytest.mark.parametrize(("module", "path"), FILES, ids=[module for module, _ in FILES])
def test_no_arrow_leads_up(module: str, path: Path) -> None:
    room = _room(module)
    ours = {_room(name) for name in _imports(path) if name.split(".")[0] in ("xtg_kernels", "xtrimogene")} - {room}
    assert not any(name.split(".")[0] in ("benchmarks", "tests") for name in _imports(path))
    if room not in TOP:
        assert room in ROOMS, f"{module}: a room that the table lacks"
        assert ours <= ROOMS[room]
    else:
        assert ours <= {*ROOMS, *TOP}


@pytest.mark.parametrize(("module", "path"), FILES, ids=[module for module, _ in FILES])
def test_a_room_needs_no_other_packages(module: str, path: Path) -> None:
    if _room(module) in PACKAGES:
        packages = {name.split(".")[0] for name in _imports(path)}
        foreign = packages - sys.stdlib_module_names - {"xtg_kernels", "xtrimogene"}
        assert foreign <= PACKAGES[_room(module)]


def picture() -> str:
    """The rooms by floor, the highest first, each with those that it stands on; what these stand on is left out."""
    arrows: dict[str, set[str]] = {}
    for module, path in FILES:
        room = _room(module)
        ours = {_room(name) for name in _imports(path) if name.split(".")[0] in ("xtg_kernels", "xtrimogene")}
        arrows.setdefault(room, set()).update(ours - {room})
    below: dict[str, set[str]] = {}

    def all_below(room: str) -> set[str]:
        if room not in below:
            below[room] = arrows[room].union(*map(all_below, arrows[room]))
        return below[room]

    def floor(room: str) -> int:
        return max((floor(other) + 1 for other in arrows[room]), default=0)

    # The package itself is a list of names, and no room stands on it alone.
    rooms = sorted(set(arrows) - {"xtrimogene"}, key=lambda room: (-floor(room), room))
    lines = []
    for room in rooms:
        direct = arrows[room] - {"xtrimogene"}
        shown = sorted(other for other in direct if not any(other in all_below(each) for each in direct - {other}))
        named = ", ".join(other.removeprefix("xtrimogene.") for other in shown)
        lines.append(f"{floor(room)}  {room.removeprefix('xtrimogene.'):<12}{named}".rstrip())
    return "\n".join(["floor, room    stands on", *lines])


PICTURE = re.compile(r"(?<=^```text\n).*?(?=^```$)", flags=re.MULTILINE | re.DOTALL)
GUIDE = ROOT / "CONTRIBUTING.md"


def test_the_picture_in_the_guide_is_that_of_the_imports() -> None:
    assert PICTURE.findall(GUIDE.read_text(encoding="utf-8")) == [f"{picture()}\n"]


HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (hidden)", name=name)

sys.meta_path.insert(0, Hidden())
"""
SINGLE_CELL = {"anndata", "h5py", "huggingface_hub", "pandas", "scanpy", "scipy", "tqdm", "yaml", "zarr"}


@pytest.mark.parametrize("module", ["xtg_kernels", "xtrimogene.encoder", "xtrimogene.dropin", "xtrimogene.flops"])
def test_the_encoder_imports_without_a_single_cell_stack(module: str) -> None:
    script = HIDE.format(hidden=SINGLE_CELL) + f"import {module}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_alone_imports_nothing() -> None:
    script = HIDE.format(hidden={*SINGLE_CELL, "torch", "numpy"}) + "import xtrimogene; print(xtrimogene.__version__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    GUIDE.write_text(PICTURE.sub(f"{picture()}\n", GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
