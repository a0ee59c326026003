"""Aliases: other names of genes, from a table that the user has, and the few renamings that everybody meets."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass

from xtrimogene.cells.tables import tab_separated

# Families that HGNC renamed, most of them because spreadsheets took their names for dates. They serve to say what a
# table of aliases would find, and map nothing.
_RENAMED = (
    (re.compile(r"MARCH(\d+)"), r"MARCHF\1"),
    (re.compile(r"SEPT(\d+)"), r"SEPTIN\1"),
    (re.compile(r"MARC([12])"), r"MTARC\1"),
    (re.compile(r"([A-Z]ARS|EPRS)"), r"\g<1>1"),
    (re.compile(r"H3F3([AB])"), r"H3-3\1"),
)
_RENAMED_ONES = {
    "DEC1": "DELEC1", "H1F0": "H1-0", "H1FX": "H1-10", "H2AFJ": "H2AJ", "H2AFV": "H2AZ2", "H2AFX": "H2AX",
    "H2AFY": "MACROH2A1", "H2AFY2": "MACROH2A2", "H2AFZ": "H2AZ1", "HIST1H1A": "H1-1", "HIST1H1B": "H1-5",
    "HIST1H1C": "H1-2", "HIST1H1D": "H1-3", "HIST1H1E": "H1-4", "TMEM173": "STING1",
}  # fmt: skip


def new_name(name: str) -> str | None:
    """The name that HGNC gave a gene of one of the families above, None for all others."""
    for old, new in _RENAMED:
        if match := old.fullmatch(name):
            return match.expand(new)
    return _RENAMED_ONES.get(name)


@dataclass(frozen=True)
class Aliases:
    """Other names of genes.

    tiers   what each name may stand for, the surest table first: approved symbols whose earlier name it is, earlier
            names of the symbol, symbols that have it as an alias, aliases of the symbol
    """

    tiers: tuple[Mapping[str, tuple[str, ...]], ...]

    @classmethod
    def from_tsv(cls, path: str | os.PathLike[str]) -> Aliases:
        """Read two tab-separated columns, old and new name (without a header, or under ``old``, ``new``), or a table
        that has the columns ``symbol``, ``prev_symbol`` and ``alias_symbol`` of HGNC's complete set.

        Raises FileNotFoundError, or ValueError that names the file, for anything else.
        """
        rows = [row for _, row in tab_separated(path, "aliases")]
        if rows and "symbol" in rows[0] and "prev_symbol" in rows[0]:
            return cls(_hgnc_tiers(rows))
        tier: dict[str, dict[str, None]] = {}
        for row in rows[1 if rows and [cell.lower() for cell in rows[0]] == ["old", "new"] else 0 :]:
            old, new = row if len(row) == 2 else ("", "")
            if not old or not new:
                raise ValueError(
                    f"aliases {path}: expected two columns, old<tab>new, or HGNC's complete set with the columns "
                    f"symbol, prev_symbol and alias_symbol, got {row}"
                )
            tier.setdefault(old, {})[new] = None
        if not tier:
            raise ValueError(f"aliases {path}: expected old and new names of genes, got none")
        return cls(({old: tuple(new) for old, new in tier.items()},))

    def gene_of(self, name: str, vocabulary: Container[str]) -> str | None:
        """The one gene of the vocabulary that a name stands for; None where there is none or it may be several."""
        for tier in self.tiers:
            found = [gene for gene in tier.get(name, ()) if gene in vocabulary]
            if found:
                return found[0] if len(found) == 1 else None
        return None


def _hgnc_tiers(rows: list[list[str]]) -> tuple[dict[str, tuple[str, ...]], ...]:
    header = rows[0]
    symbol_at = header.index("symbol")
    tiers: list[dict[str, dict[str, None]]] = []
    for column in ("prev_symbol", "alias_symbol"):
        if column not in header:
            continue
        place = header.index(column)
        to_symbol: dict[str, dict[str, None]] = {}
        from_symbol: dict[str, dict[str, None]] = {}
        for row in rows[1:]:
            symbol = row[symbol_at]
            for other in row[place].split("|") if place < len(row) else []:
                if symbol and other.strip():
                    to_symbol.setdefault(other.strip(), {})[symbol] = None
                    from_symbol.setdefault(symbol, {})[other.strip()] = None
        tiers += [to_symbol, from_symbol]
    return tuple({name: tuple(genes) for name, genes in tier.items()} for tier in tiers)
