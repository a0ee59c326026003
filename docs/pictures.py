"""Draws the pictures of README.md and docs/how_it_works.md from the lengths of real cells: python docs/pictures.py"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"
CELL_LENGTHS = Path(__file__).parents[1] / "xtrimogene" / "bench" / "cell_lengths.json"
NUM_GENES = 19_264
CELLS = 8
EXPRESSED, EMPTY, INK = "#2166ac", "#d9dde3", "#222222"
WIDTH, MARGIN = 860, 20


def lengths() -> list[int]:
    """Expressed genes of the first cells of a real data set."""
    known: list[int] = json.loads(CELL_LENGTHS.read_text(encoding="utf-8"))["lengths"]
    return known[:CELLS]


def ragged(cells: Sequence[int]) -> str:
    """A batch three ways, to scale along the genes: all of them, padded to the longest cell, laid end to end."""
    longest, total = max(cells), sum(cells)
    scale = (WIDTH - 2 * MARGIN) / NUM_GENES
    bar, gap = 9, 3
    shapes, top = [], 46
    ways = (
        (f"All genes: {CELLS} cells x {NUM_GENES:,} positions = {CELLS * NUM_GENES:,}", NUM_GENES),
        (f"Padded to the longest cell: {CELLS} x {longest:,} = {CELLS * longest:,}", longest),
    )
    for title, width in ways:
        shapes.append(_text(MARGIN, top, title))
        top += 10
        for length in cells:
            shapes += [
                _bar(MARGIN, top, width * scale, bar, EMPTY),
                _bar(MARGIN, top, length * scale, bar, EXPRESSED),
            ]
            top += bar + gap
        top += 26
    shapes.append(_text(MARGIN, top, f"Ragged, as here: the {total:,} expressed genes, end to end"))
    top += 10
    left = float(MARGIN)
    for length in cells:
        shapes.append(_bar(left, top, length * scale - 1, bar, EXPRESSED))
        left += length * scale
    title = f"Positions that a Transformer computes for {CELLS} real cells (blue: genes that a cell expresses)"
    return _svg(title, top + bar + MARGIN, shapes)


def attention(cells: Sequence[int]) -> str:
    """The scores of attention for the same cells, to scale: one cell over all genes, padded, and each by itself."""
    longest = max(cells)
    whole = 300.0
    scale = whole / NUM_GENES
    top = 50
    side = longest * scale
    right = MARGIN + whole + 40
    shapes = [
        _bar(MARGIN, top, whole, whole, EMPTY),
        _bar(MARGIN, top, cells[0] * scale, cells[0] * scale, EXPRESSED),
        _text(MARGIN, top + whole + 20, f"One cell over all genes: {NUM_GENES**2:,} scores"),
        _text(right, top + 14, f"{CELLS} cells, padded: {CELLS * longest**2:,}"),
        _text(right, top + 124, f"{CELLS} cells, ragged: {sum(n * n for n in cells):,}"),
    ]
    for index, length in enumerate(cells):
        left = right + index * (side + 8)
        shapes += [
            _bar(left, top + 28, side, side, EMPTY),
            _bar(left, top + 28, length * scale, length * scale, EXPRESSED),
            _bar(left, top + 138, length * scale, length * scale, EXPRESSED),
        ]
    return _svg("Scores of attention, by head and layer, to scale", round(top + whole + 20 + MARGIN), shapes)


def _bar(left: float, top: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(left: float, top: float, words: str, size: int = 15) -> str:
    return f'<text x="{left:.0f}" y="{top:.0f}" font-size="{size}" fill="{INK}">{words}</text>'


def _svg(title: str, height: int, shapes: Sequence[str]) -> str:
    """With a ground of its own, so that it can be read on a dark page, too."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img">'
    )
    ground = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{title}</title>", ground, _text(MARGIN, 24, title, 16), *shapes, "</svg>", ""])


def drawn() -> dict[str, str]:
    """Every picture by the name of its file."""
    cells = lengths()
    return {"ragged.svg": ragged(cells), "attention.svg": attention(cells)}


def main() -> None:
    """Writes them into docs/pictures."""
    PICTURES.mkdir(exist_ok=True)
    for name, picture in drawn().items():
        (PICTURES / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
