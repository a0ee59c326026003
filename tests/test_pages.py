"""README.md and the pages of docs/: their blocks run as a reader would run them, and print what is shown below them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import warm

ROOT = Path(__file__).parents[1]
# The notebooks take a minute of their own: `make docs` runs them, once for the site as they are, and twice here, where
# the question is what lies in the way the second time, with fewer steps of training.
STEPS = re.compile(r"max_steps=\d+")
PAGES = [
    *[Path("README.md"), *sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))],
    *[
        pytest.param(path.relative_to(ROOT), marks=pytest.mark.docs)
        for path in sorted((ROOT / "docs" / "tutorials").glob("*.md"))
    ],
]
# Indented blocks are not run; one that is not listed here fails. Installing is the business of the Makefile and of
# test_packaging.py; a file of scFoundation is the reader's; bench takes minutes, and has tests of its own.
NOT_RUN = {
    "README.md": ["make demo", "make test", "pip install torch 'setuptools>=77' ninja 'pybind11>=2.13'",
                  "pip install --no-build-isolation '.[scanpy]'"],
    "docs/installation.md": ["make demo", "make test", "pip install 'setuptools>=77' ninja 'pybind11>=2.13'",
                             "pip install --no-build-isolation ."],
    "docs/annotation.md": [
        "xtrimogene annotate fit --checkpoint DIR --data reference.h5ad --label celltype --group donor --output model",
        "xtrimogene annotate predict --model model --input new.h5ad --output annotated.h5ad --unknown-below 0.5",
        "xtrimogene annotate evaluate --model model --input test.h5ad --label celltype --output report",
    ],
    "docs/perturbation.md": [
        "xtrimogene perturb fit --checkpoint pbmc-tiny --data screen.h5ad --condition condition --control control "
        "--output model",
        "xtrimogene perturb evaluate --model model --data screen.h5ad --output judged",
        'xtrimogene perturb predict --model model --perturbations "KLF1+MAP2K6" MAPK1 --output predicted.h5ad',
    ],
    "docs/synergy.md": [
        "xtrimogene synergy fit --checkpoint pbmc-tiny --pairs pairs.csv --smiles smiles.csv --cell-lines tpm.csv "
        "--output model",
        "xtrimogene synergy evaluate --model model --pairs pairs.csv --output judged",
        "xtrimogene synergy predict --model model --pairs new.csv --output scored.csv",
    ],
    "docs/learning.md": [
        "xtrimogene evaluate --checkpoint DIR --data held_out.h5ad --label celltype \\",
        "--train-data train.h5ad --output judged",
    ],
    "docs/models.md": [
        "xtrimogene convert --from-scfoundation models.ckpt --part cell \\",
        "--vocabulary genes.tsv --output converted",
    ],
    "docs/tutorials/measure.md": ["xtrimogene bench --input cells.h5ad --output bench"],
}  # fmt: skip


@dataclass
class Block:
    """A block of a page that is run, and the output that the page shows below it."""

    kind: str
    text: str
    shown: str | None = None


def blocks_of(page: Path) -> list[Block]:
    """The blocks that are run, in their order. A kind that is not known fails."""
    found: list[Block] = []
    whole = (ROOT / page).read_text()
    if page.parent.name == "tutorials":
        whole = STEPS.sub("max_steps=3", whole)
    for kind, text in re.findall(r"^```(\S*)[^\n]*\n(.*?)^```$", whole, flags=re.MULTILINE | re.DOTALL):
        if kind == "text":
            found[-1].shown = text
        elif kind in ("bash", "python", "{code-cell}"):
            found.append(Block(kind, text))
        else:
            assert kind in ("{toctree}", "{eval-rst}", "{command-line}", "{findings}", "{include}"), kind
    return found


def run(block: Block, names: dict[str, Any]) -> str:
    """The standard output of a block, run in the current folder with the names that earlier ones defined."""
    magic, _, body = block.text.partition("\n")
    if magic.startswith("%%writefile "):
        Path(magic.split()[1]).write_text(body)
        return ""
    if block.kind == "bash" or magic == "%%bash":
        command = ["bash", "-euo", "pipefail", "-c", block.text if block.kind == "bash" else body]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        return done.stdout
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block.text, "a block", "exec"), names)
    return printed.getvalue()


def alike(text: str) -> str:
    """A text without what differs from machine to machine: times, rounding, and the dtype that suits it."""
    text = re.sub(r"bfloat16|float32", "DTYPE", re.sub(r" \(bfloat16 moves [^)]*\)", "", text))
    return re.sub(r"\d+\.\d+|[\d,]+(?= cells/s)|\d+(?=%)", "N", text)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands that the pages use; test_packaging.py has those of an installation."""
    folder = tmp_path_factory.mktemp("bin")
    warm.write_command(folder / "python")
    warm.write_command(folder / "xtrimogene", "-m", "xtrimogene")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_runs_twice_in_an_empty_folder(
    page: Path, commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("PATH", str(commands)), ("PYTHONPATH", str(ROOT))):
        monkeypatch.setenv(name, os.pathsep.join(filter(None, [value, os.environ.get(name)])))
    monkeypatch.setenv("MPLBACKEND", "agg")
    blocks = blocks_of(page)
    for again in (False, True):
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks:
            printed = run(block, names)
            # The second time, what is there already is said to be there.
            if block.shown is not None and not again:
                assert alike(printed) == alike(block.shown)


@pytest.mark.parametrize("page", [*PAGES], ids=str)
def test_what_is_not_run_is_listed(page: Path) -> None:
    outside = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    indented = [line.split("#")[0].strip() for line in outside.splitlines() if line.startswith("    ")]
    assert indented == NOT_RUN.get(str(page), [])


def test_the_readme_is_short_and_shows_what_its_blocks_print() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert all(block.shown for block in blocks_of(Path("README.md")))


def test_targets_that_are_named_exist() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    targets = {name for page in pages for name in re.findall(r"`?make ([a-z][a-z0-9-]+)(?:`|  )", page.read_text())}
    assert {"demo", "test", "docs", "setup"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"
