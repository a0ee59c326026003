"""What pages are made of besides text: the command line from its parser, findings from their files, docstrings."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]


def command_line(parser: argparse.ArgumentParser) -> str:
    """Markdown of a parser: usage, description, options and ending, then the same of each of its commands."""
    formatter = parser._get_formatter()
    parts = ["```text\n" + re.sub(r"^usage: ", "", parser.format_usage()) + "```"]
    if parser.description:
        parts.append(_escaped(parser.description))
    commands = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands += list(action.choices.values())
        elif action.help != argparse.SUPPRESS:
            # As `--help` writes it: names with what they take, defaults filled in.
            term = formatter._format_action_invocation(action)
            told = formatter._expand_help(action) if action.help else "required" if action.required else ""
            parts.append(f"`{term}`\n: {_escaped(told)}")
    if parser.epilog:
        parts.append(_escaped(parser.epilog))
    for command in commands:
        # "annotate fit" for the part of a command
        parts += [f"## {command.prog.partition(chr(32))[2]}", command_line(command)]
    return "\n\n".join(parts)


def findings(folder: Path) -> str:
    """Markdown that lists the scripts of a folder by the comment at their head; what there is to say without any."""
    parts = [f"`findings/{path.name}`\n: {_escaped(_header(path))}" for path in sorted(folder.glob("*.sh"))]
    return "\n\n".join(parts) or "None has been recorded yet."


def _header(path: Path) -> str:
    """The first comment of a script, without the line that names its interpreter."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words += [] if line.startswith("#!") else [line.strip("# ")]
    return " ".join(filter(None, words))


def _escaped(text: str) -> str:
    """Text of a terminal as Markdown: nothing in it is markup."""
    return re.sub(r"([*_<>\[\]`$])", r"\\\1", " ".join(text.split())).replace("--", r"\-\-")


def readable(lines: list[str]) -> list[str]:
    """A docstring whose aligned names and meanings are a definition list, and whose indented paragraphs are code.

    Sections such as "Args:", with all that is indented below them, are left to napoleon.
    """
    made: list[str] = []
    section = False
    for block in _paragraphs(lines):
        if not block[0].startswith(" "):
            section = bool(_SECTION.match(block[0]))
        if section:
            made += block
        elif block[0].startswith(" "):
            announced = any(line.endswith("::") for line in made[-2:])
            made += block if announced else ["::", "", *block]
        elif any(_ALIGNED.match(line) for line in block):
            for line in block:
                found = _ALIGNED.match(line)
                name, told = found.groups() if found else (line, None)
                made += [f"    {line.strip()}"] if line.startswith(" ") else [f"``{name}``"]
                made += [f"    {told}"] if told else []
        else:
            made += block
        made.append("")
    return made


_ALIGNED = re.compile(r"^(\S(?:.*?[^\s.:;])?)\s{2,}(\S.*)$")
_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Yields):$")


def _paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines without an empty one between."""
    for empty, block in itertools.groupby(lines, key=lambda line: not line.strip()):
        if not empty:
            yield list(block)


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = readable(lines)


class CommandLine(SphinxDirective):
    """``{command-line}``: the reference of the command line."""

    def run(self) -> list[nodes.Node]:
        from xtrimogene.cli import _parser

        return self.parse_text_to_nodes(command_line(_parser()), allow_section_headings=True)


class Findings(SphinxDirective):
    """``{findings}``: the scripts of findings/."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(findings(ROOT / "findings"))


def _dashes(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """A dash between an argument and what is said of it: Sphinx writes two hyphens."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-line", CommandLine)
    app.add_directive("findings", Findings)
    # Before napoleon, which takes the sections.
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("doctree-resolved", _dashes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
