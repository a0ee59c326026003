"""A document of sections with paragraphs, tables and pictures, written as Markdown and as a page of HTML.

The page is a single file: pictures are inside it, nothing is fetched. Every table says how its numbers were obtained.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows under a header; ``how`` says how the numbers were obtained. The first column names the row."""

    header: list[str]
    body: list[list[str]]
    how: str

    @classmethod
    def of(cls, rows: Iterable[Any], columns: Mapping[str, Callable[[Any], str]], how: str) -> Table:
        """The table with a line for each row, from header -> what stands under it."""
        return cls(list(columns), [[column(row) for column in columns.values()] for row in rows], how)


@dataclass(frozen=True)
class Picture:
    """A picture that lies beside the report as NAME.png and NAME.svg."""

    name: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, and paragraphs, tables and pictures in their order."""

    title: str
    parts: list[str | Table | Picture]


def text_table(table: Table) -> str:
    """The table for a terminal, without how its numbers were obtained."""
    lines = [table.header, *table.body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(header: list[str], body: list[list[str]]) -> str:
    """A table of Markdown; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))


def markdown(sections: Sequence[Section], title: str) -> str:
    """The document as Markdown."""
    lines = [f"# {title}", "\n".join(f"- [{section.title}](#{_anchor(section)})" for section in sections)]
    for section in sections:
        lines.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, str):
                lines.append(part)
            elif isinstance(part, Picture):
                lines.append(f"![{part.caption}]({part.name}.png)")
            else:
                lines += [markdown_table(part.header, part.body), f"*{part.how}*"]
    return "\n\n".join(lines) + "\n"


def page(sections: Sequence[Section], title: str, folder: Path) -> str:
    """The document as HTML, with the SVG pictures of the folder inside."""
    links = "\n".join(f'<li><a href="#{_anchor(each)}">{html.escape(each.title)}</a></li>' for each in sections)
    body = "\n".join(_render(section, folder) for section in sections)
    return _PAGE.format(title=html.escape(title), contents=f"<nav><ul>\n{links}\n</ul></nav>", body=body)


def _anchor(section: Section) -> str:
    """The name that a heading has as the end of a link, in Markdown as in HTML."""
    return re.sub(r"[^a-z0-9-]", "", section.title.lower().replace(" ", "-"))


def _render(section: Section, folder: Path) -> str:
    ways: dict[type, Callable[[Any], str]] = {
        str: lambda text: f"<p>{html.escape(text)}</p>",
        Table: _render_table,
        Picture: lambda picture: _render_picture(picture, folder),
    }
    parts = "\n".join(ways[type(part)](part) for part in section.parts)
    return f'<section id="{_anchor(section)}">\n<h2>{html.escape(section.title)}</h2>\n{parts}\n</section>'


def _render_table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    head = f"<thead>{line(table.header, 'th')}</thead>" if any(table.header) else ""
    body = "\n".join(line(cells, "td") for cells in table.body)
    scroll = f'<div class="table">\n<table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table>\n</div>'
    return f"<figure>\n{scroll}\n<figcaption>{html.escape(table.how)}</figcaption>\n</figure>"


def _render_picture(picture: Picture, folder: Path) -> str:
    svg = (folder / f"{picture.name}.svg").read_bytes()
    data, caption = base64.b64encode(svg).decode(), html.escape(picture.caption)
    found = re.search(rb'<svg [^>]*?width="([0-9.]+)pt"', svg)
    assert found is not None
    # Letters of the size of those in tables.
    rem = float(found[1]) / 11.5
    kind = "wide" if rem > 40 else "small"
    image = (
        f'<div class="scroll"><img class="{kind}" style="width: {rem:.0f}rem" src="data:image/svg+xml;base64,{data}" '
        f'alt="{caption}" /></div>'
    )
    return f"<figure>\n{image}\n<figcaption>{caption}</figcaption>\n</figure>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>{title}</title>
<style>
:root {{ color-scheme: light; --ink: #1c2126; --soft: #5b6670; --line: #d9dee3; --band: #f5f7f9; --accent: #0b5c8c; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }}
main {{ max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: .9rem; border-top: 2px solid var(--accent); }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 1rem 0 0; padding: 0; list-style: none; }}
a {{ color: var(--accent); }}
p {{ max-width: 46rem; margin: .7rem 0; overflow-wrap: anywhere; }}
figure {{ margin: 1.1rem 0 1.8rem; }}
figcaption {{ max-width: 46rem; margin-top: .5rem; color: var(--soft); font-size: .86rem; line-height: 1.45;
  overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
.table {{ overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }}
table {{ border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .38rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }}
td {{ white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ background: var(--band); font-weight: 600; vertical-align: bottom; }}
tbody tr:last-child td {{ border-bottom: 0; }}
tbody tr:hover {{ background: var(--band); }}
img {{ display: block; max-width: 100%; height: auto; }}
@media (max-width: 40rem) {{
  main {{ padding: 1.25rem .9rem 3rem; }}
  h1 {{ font-size: 1.5rem; }}
  th, td {{ padding: .32rem .5rem; font-size: .8rem; }}
  td:first-child {{ white-space: normal; min-width: 8.5rem; background: #fff; }}
  th:first-child, td:first-child {{ position: sticky; left: 0; border-right: 1px solid var(--line); }}
  img.wide {{ min-width: 38rem; }}
}}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{contents}
{body}
</main>
</body>
</html>
"""
