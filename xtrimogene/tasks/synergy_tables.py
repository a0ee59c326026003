"""The tables of drug pairs: pairs with their scores, SMILES of drugs, expression of cell lines; each row looked at."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xtrimogene.cells.tables import separated
from xtrimogene.tasks.molecules import Molecule, read_molecule
from xtrimogene.tasks.splits import listed

# What the columns of a pair and its line are called in the files that people have, in small letters without _ and -.
COLUMNS = (
    ("druga", "drug1", "drugrow", "drug1name", "druganame"),
    ("drugb", "drug2", "drugcol", "drug2name", "drugbname"),
    ("cellline", "cell", "celllinename", "line"),
)
_PARTS = ("a drug", "the other drug", "the cell line")
_SMILES_COLUMNS = (("drug", "drugname", "name"), ("smiles", "canonicalsmiles", "isosmiles"))
_SHOWN_ROWS = 3


@dataclass(frozen=True)
class Table:
    """A table of text.

    name    what messages call it: option and path
    header  names of its columns
    rows    the number of each row in the file, the header being row 1, and its cells
    """

    name: str
    header: list[str]
    rows: list[tuple[int, list[str]]]

    @classmethod
    def read(cls, path: str | os.PathLike[str], option: str) -> Table:
        """A table separated by commas, semicolons or tabs, plain or gzipped, with a header.

        Raises FileNotFoundError, or ValueError that names the file and, of a row of another length, the row.
        """
        name = f"{option} {path}"
        numbered = separated(path, option, "\t,;")
        if len(numbered) < 2:
            raise ValueError(f"{name}: expected a header and rows, got {len(numbered)} rows; give a table of text")
        header = numbered[0][1]
        for number, row in numbered[1:]:
            if len(row) != len(header):
                raise ValueError(f"{name}: row {number}: expected {len(header)} cells as in the header, got {len(row)}")
        return cls(name, header, numbered[1:])

    def place(self, column: str) -> int:
        """The position of a column. Raises ValueError where it is not there, or twice."""
        if self.header.count(column) != 1:
            times = "none" if column not in self.header else f"{self.header.count(column)}"
            raise ValueError(f"{self.name}: expected one column {column!r}, got {times}; it has {listed(self.header)}")
        return self.header.index(column)

    def likely(self, names: Collection[str], what: str, how: str) -> int:
        """The position of the only column that goes by one of these names."""
        found = [number for number, each in enumerate(self.header) if _plain(each) in names]
        if len(found) != 1:
            seen = "none" if not found else listed([self.header[number] for number in found])
            raise ValueError(
                f"{self.name}: expected one column for {what}, got {seen}; {how}; it has {listed(self.header)}"
            )
        return found[0]

    def refuse(self, rows: Sequence[tuple[int, str]], expected: str, advice: str) -> None:
        """Raises ValueError for rows, their numbers and what each has; nothing where there are none."""
        if rows:
            shown = "; ".join(f"row {number}: {what}" for number, what in rows[:_SHOWN_ROWS])
            more = f"; and {len(rows) - _SHOWN_ROWS:,} more rows" if len(rows) > _SHOWN_ROWS else ""
            raise ValueError(f"{self.name}: expected {expected}, got {shown}{more}; {advice}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


@dataclass(frozen=True)
class Pairs:
    """The rows of a table of pairs.

    table    the table
    drugs    (rows, 2) names of the drugs, in the order of the file
    lines    (rows,) names of the cell lines
    """

    table: Table
    drugs: npt.NDArray[np.object_]
    lines: npt.NDArray[np.object_]

    @classmethod
    def read(cls, path: str | os.PathLike[str], columns: Sequence[str] | None, option: str = "pairs") -> Pairs:
        """Raises ValueError for missing columns, empty names, and a drug with itself, by row."""
        table = Table.read(path, option)
        if columns is None:
            how = "name all three with columns (--columns DRUG DRUG LINE)"
            places = [table.likely(names, what, how) for names, what in zip(COLUMNS, _PARTS, strict=True)]
        elif len(columns) == 3:
            places = [table.place(column) for column in columns]
        else:
            raise ValueError(f"columns: expected three, those of both drugs and of the line, got {list(columns)}")
        cells = np.array([[row[place] for place in places] for _, row in table.rows], object)
        pairs = list(zip(table.rows, cells.tolist(), strict=True))
        table.refuse(
            [(number, "an empty name") for (number, _), names in pairs if not all(names)],
            "two drugs and a cell line in every row",
            "take these rows out",
        )
        table.refuse(
            [(number, f"{names[0]!r} twice") for (number, _), names in pairs if names[0] == names[1]],
            "two different drugs in every row",
            "take these rows out",
        )
        return cls(table, cells[:, :2], cells[:, 2])

    def numbers(self, column: str, *, empty: bool = False) -> npt.NDArray[np.float64]:
        """(rows,) the numbers of a column, NaN for an empty cell where these are allowed.

        Raises ValueError for anything else, by row.
        """
        place = self.table.place(column)
        found = np.full(len(self.table.rows), np.nan)
        bad = []
        for position, (number, row) in enumerate(self.table.rows):
            text = row[place]
            if empty and text.lower() in ("", "na", "nan"):
                continue
            with contextlib.suppress(ValueError):
                found[position] = float(text)
            if not math.isfinite(found[position]):
                bad.append((number, repr(text)))
        self.table.refuse(bad, f"a number in column {column!r} of every row", "take these rows out")
        return found


class Drugs:
    """Drugs by name, as molecules: two names of one molecule are one drug.

    names      of each molecule the first name
    smiles     of each molecule the canonical SMILES of what is kept of it
    code_of    name -> position of its molecule
    told       what is to be said of salts, of names of one molecule, and of SMILES that nobody asks for
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.smiles: list[str] = []
        self.code_of: dict[str, int] = {}
        self.told: list[str] = []

    @classmethod
    def kept(cls, content: dict[str, str], names: Iterable[str]) -> Drugs:
        """From what `content` gave; names are those of the molecules in their order."""
        self = cls()
        for name in names:
            self._add(name, Molecule(content[name]))
        for name, smiles in content.items():
            self._add(name, Molecule(smiles))
        self.told = []
        return self

    @property
    def content(self) -> dict[str, str]:
        """Name -> canonical SMILES."""
        return {name: self.smiles[code] for name, code in self.code_of.items()}

    def add(self, path: str | os.PathLike[str], asked: Collection[str]) -> None:
        """Take in the drugs of a table with columns of names and SMILES. asked: names that are in use.

        Raises ValueError for a drug that is there with two molecules, and for one that is asked for and which RDKit
        does not read, by name and row.
        """
        table = Table.read(path, "smiles")
        name_at, smiles_at = (
            table.likely(names, what, f"call it {names[0]!r}")
            for names, what in zip(_SMILES_COLUMNS, ("names of drugs", "SMILES"), strict=True)
        )
        bad, ignored, changed = [], [], []
        for number, row in table.rows:
            name = row[name_at]
            try:
                molecule = read_molecule(row[smiles_at])
            except ValueError as error:
                if name in asked:
                    bad.append((number, f"{name!r}, and {error}"))
                else:
                    ignored.append(name)
                continue
            if name in self.code_of and self.smiles[self.code_of[name]] != molecule.smiles:
                changed.append((number, f"{name!r} as another molecule than before"))
            elif name not in self.code_of:
                self._add(name, molecule)
        table.refuse(bad, "SMILES of the drugs in use", "correct them, or take these drugs out of the pairs")
        table.refuse(changed, "each drug as one molecule", "give each molecule its own name")
        if ignored:
            self.told.append(f"SMILES that RDKit does not read, of drugs that are in no pair: {listed(ignored)}")

    def _add(self, name: str, molecule: Molecule) -> None:
        if name in self.code_of:
            return
        if molecule.parts:
            self.told.append(f"several parts in the SMILES of {name!r}: {molecule.parts}")
        if molecule.smiles in self.smiles:
            code = self.smiles.index(molecule.smiles)
            self.told.append(f"{name!r} is the same molecule as {self.names[code]!r}: one drug under two names")
        else:
            code = len(self.smiles)
            self.names.append(name)
            self.smiles.append(molecule.smiles)
        self.code_of[name] = code

    def codes(self, pairs: Pairs) -> npt.NDArray[np.int64]:
        """(rows, 2) molecules of the drugs. Raises ValueError for drugs without SMILES, and pairs of one molecule."""
        rows = [(number, pair) for (number, _), pair in zip(pairs.table.rows, pairs.drugs.tolist(), strict=True)]
        missing = [(number, repr(name)) for number, pair in rows for name in pair if name not in self.code_of]
        pairs.table.refuse(missing, "drugs whose SMILES are known", "give their SMILES, or take these rows out")
        codes = np.array([[self.code_of[name] for name in pair] for _, pair in rows], np.int64).reshape(-1, 2)
        same = [
            (number, f"{pair[0]!r} and {pair[1]!r}, one molecule")
            for (number, pair), (first, second) in zip(rows, codes.tolist(), strict=True)
            if first == second
        ]
        pairs.table.refuse(same, "two different drugs in every row", "take these rows out")
        return codes


@dataclass(frozen=True)
class Expression:
    """A table of expression: genes, and of each line (lines, genes) float64 numbers."""

    name: str
    lines: list[str]
    genes: list[str]
    values: npt.NDArray[np.float64]

    @classmethod
    def read(cls, path: str | os.PathLike[str], asked: Collection[str]) -> Expression:
        """A table whose first column has the names of genes and whose others are cell lines, or the other way around:
        that side holds the lines which has more of the names that are asked for.

        Raises ValueError for names that are there twice, and for what is no number or below 0, by row and column.
        """
        table = Table.read(path, "cell_lines")
        columns, rows = table.header[1:], [row[0] for _, row in table.rows]
        in_columns, in_rows = (sum(name in asked for name in names) for names in (columns, rows))
        if in_columns == in_rows:
            raise ValueError(
                f"{table.name}: expected the cell lines of the pairs, such as {listed(sorted(asked))}, as columns or "
                f"as rows, got {in_columns} of them as columns and {in_rows} as rows; give lines the names of the pairs"
            )
        for what, names in (("columns", columns), ("rows", rows)):
            twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
            if twice or "" in names:
                raise ValueError(f"{table.name}: expected a name of its own in each of the {what}, got {listed(twice)}")
        values = np.full((len(rows), len(columns)), np.nan)
        for position, (number, row) in enumerate(table.rows):
            try:
                values[position] = row[1:]
            except ValueError:
                values[position] = np.nan
            if not np.all(np.isfinite(values[position]) & (values[position] >= 0)):
                column, text = next((c, t) for c, t in zip(columns, row[1:], strict=True) if not _is_amount(t))
                raise ValueError(
                    f"{table.name}: row {number} ({row[0]!r}): expected numbers of 0 and more, got {text!r} in column "
                    f"{column!r}; correct it, or leave the line or the gene out"
                )
        if in_columns > in_rows:
            return cls(table.name, columns, rows, values.T)
        return cls(table.name, rows, columns, values)

    def of(self, lines: Sequence[str]) -> Expression:
        """Of some of the lines."""
        place = {name: number for number, name in enumerate(self.lines)}
        return Expression(self.name, list(lines), self.genes, self.values[[place[name] for name in lines]])


def _is_amount(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) >= 0
    except ValueError:
        return False
