"""Vocabulary: the genes a model knows, in the order of its gene table, and which columns of a data set they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Stable Ensembl gene id of any species, with what Ensembl and GENCODE append: the version (ENSG00000141510.18), a
# second one of genes lifted to an older genome (.18_6), and _PAR_Y of the copies on Y of genes that X and Y share.
# Before version 25 GENCODE wrote these copies with an R in place of a 0: ENSGR0000182378.10
_ENSEMBL_ID = re.compile(r"(ENS[A-Z]*G)(R\d{10}|\d{11})(\.\d+(_\d+)?)?(_PAR_Y)?")


@dataclass(frozen=True)
class ColumnMap:
    """Where each column of a data set goes.

    gene_ids    (n_columns,) int32: vocabulary index of each column's gene, -1 where the vocabulary lacks it, -2 where
                the column is no gene at all (an antibody, a peak) and its numbers are not looked at
    num_genes   genes of the vocabulary
    num_found   genes of the vocabulary with at least one column
    merged      genes with several columns, whose counts are added
    renamed     (name in the data, gene of the vocabulary) of columns that a table of aliases has mapped
    old_names   (name in the data, gene of the vocabulary) of columns left unknown whose new name the vocabulary has
    """

    gene_ids: npt.NDArray[np.int32]
    num_genes: int
    num_found: int
    merged: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    old_names: tuple[tuple[str, str], ...] = ()

    @property
    def num_left_out(self) -> int:
        """Columns that are no genes."""
        return int(np.count_nonzero(self.gene_ids == -2))

    @property
    def num_used(self) -> int:
        """Columns that are genes of the vocabulary."""
        return int(np.count_nonzero(self.gene_ids >= 0))

    def __str__(self) -> str:
        parts = [
            f"{self.num_found:,} of {self.num_genes:,} vocabulary genes found",
            f"{self.num_used:,} of {len(self.gene_ids):,} data columns used",
        ]
        if self.num_left_out:
            parts.append(f"{self.num_left_out:,} columns that are no genes left out (var['feature_types'])")
        if self.renamed:
            parts.append(f"{len(self.renamed):,} columns renamed by the table of aliases")
        if self.merged:
            parts.append(f"counts of columns added up for {_named(self.merged)}")
        return "; ".join(parts)


class Vocabulary:
    """An ordered list of distinct gene names (symbols or Ensembl ids); the position of a gene is its gene id.

    Raises ValueError for no gene at all, an empty name or a name given twice.
    """

    def __init__(self, genes: Iterable[str]) -> None:
        self.genes: tuple[str, ...] = tuple(str(gene) for gene in genes)
        if not self.genes:
            raise ValueError("vocabulary: expected at least one gene, got none")
        if "" in self.genes:
            raise ValueError(f"vocabulary: expected gene names, got an empty name at position {self.genes.index('')}")
        if len(self.index_of) != len(self.genes):
            raise ValueError(
                f"vocabulary: expected distinct genes, got {_named(_repeated(self.genes))} more than once; "
                "remove the repetitions"
            )

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Gene id of each gene name."""
        return {gene: index for index, gene in enumerate(self.genes)}

    def __len__(self) -> int:
        return len(self.genes)

    def __contains__(self, gene: object) -> bool:
        return gene in self.index_of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.genes == other.genes

    def __hash__(self) -> int:
        return hash(self.genes)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} genes: {', '.join(self.genes[:3])}{', ...' if len(self) > 3 else ''})"

    @classmethod
    def from_tsv(cls, path: str | Path) -> Vocabulary:
        """Read a text file: either two tab-separated columns under the header ``gene_name``, ``index`` (in any order of
        rows, indices 0 ... G-1), or one gene name a line, in order, with or without the header ``gene_name``.

        Raises FileNotFoundError, or ValueError that names the file, for anything else: JSON, quoted names, columns that
        commas or blanks separate.
        """
        path = Path(path)
        try:
            lines = [line.rstrip("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
        except FileNotFoundError:
            raise FileNotFoundError(f"vocabulary {path}: no such file") from None
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise ValueError(f"vocabulary {path}: expected a text file with one gene a line: {error}") from error
        rows = [line.split("\t") for line in lines if line.strip()]
        try:
            if rows and rows[0] == ["gene_name", "index"]:
                return cls(_in_index_order(rows[1:]))
            for row in rows:
                if len(row) != 1:
                    raise ValueError(
                        f"vocabulary: expected one gene name a line, or two columns under the header "
                        f"gene_name<tab>index, got {len(row)} columns in {row}"
                    )
            names = [row[0].strip() for row in rows[1 if rows and rows[0] == ["gene_name"] else 0 :]]
            _check_plain(names)
            return cls(names)
        except ValueError as error:
            raise ValueError(str(error).replace("vocabulary", f"vocabulary {path}", 1)) from None

    @classmethod
    def from_adata(cls, adata: Any, *, gene_symbols: str | None = None) -> Vocabulary:
        """The genes of a data set in its order: ``adata.var_names`` or the column ``adata.var[gene_symbols]``.

        Rows of the column without a name are left out; names that several rows share are taken once, as ``map_columns``
        adds their counts. Repeated ``var_names`` raise ValueError.
        """
        names = column_names(adata.var, gene_symbols)
        return cls(names if gene_symbols is None else dict.fromkeys(name for name in names if name))

    def save(self, path: str | Path) -> None:
        """Write the two-column file that from_tsv reads."""
        lines = ["gene_name\tindex", *(f"{gene}\t{index}" for index, gene in enumerate(self.genes))]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    load = from_tsv

    @cached_property
    def _index_of_stable_id(self) -> dict[str, int]:
        index: dict[str, int] = {}
        for gene_id, gene in enumerate(self.genes):
            index.setdefault(_stable_id(gene) or gene, gene_id)
        return index

    def map_columns(self, names: Sequence[str], *, merge_duplicates: bool = False) -> ColumnMap:
        """Find each name in the vocabulary: as it is, else an Ensembl id without its version (``.18``, ``.18_6``) and
        without ``_PAR_Y``.

        The released vocabulary has 20 genes of the mitochondrion twice (MT-CO1 and MT-CO1__chrM): a column has the row
        of its own name, so that the rows of ``__chrM`` stay empty for data that do not write their names so.

        Args:
            names: (n_columns,) gene name of each column; an empty name is absent.
            merge_duplicates: let several columns name one gene (the packer adds their counts).

        Raises:
            ValueError: several columns name one gene of the vocabulary, without merge_duplicates.
        """
        gene_ids = np.full(len(names), -1, dtype=np.int32)
        for column, name in enumerate(names):
            gene_id = self.index_of.get(name)
            if gene_id is None and name:
                gene_id = self._index_of_stable_id.get(_stable_id(name) or name)
            if gene_id is not None:
                gene_ids[column] = gene_id
        columns_of = np.bincount(gene_ids[gene_ids >= 0], minlength=len(self))
        repeated = tuple(self.genes[gene_id] for gene_id in np.flatnonzero(columns_of > 1))
        if repeated and not merge_duplicates:
            raise ValueError(f"gene names: expected each once, got {_named(repeated)} more than once")
        return ColumnMap(gene_ids, len(self), int(np.count_nonzero(columns_of)), repeated)

    def count_found(self, names: Iterable[str]) -> int:
        """How many distinct genes of the vocabulary the names hold."""
        return self.map_columns(list(names), merge_duplicates=True).num_found


def column_names(var: Any, gene_symbols: str | None = None) -> list[str]:
    """Gene name of each row of ``var``: its index, or the column ``gene_symbols``; "" where the column has no value."""
    if gene_symbols is None:
        return [str(name) for name in var.index]
    if gene_symbols not in var.columns:
        known = ", ".join(map(str, var.columns)) or "none"
        raise ValueError(f"gene_symbols: expected a column of var, got {gene_symbols!r}; columns: {known}")
    column = var[gene_symbols]
    return ["" if missing else str(name) for name, missing in zip(column, column.isna(), strict=True)]


def _in_index_order(rows: list[list[str]]) -> list[str]:
    genes: dict[int, str] = {}
    for row in rows:
        if len(row) != 2 or not row[1].strip().isdecimal():
            raise ValueError(f"vocabulary: expected a gene name and its index, got {row}")
        index = int(row[1])
        if index in genes:
            raise ValueError(f"vocabulary: expected each index once, got {index} for {genes[index]} and for {row[0]}")
        genes[index] = row[0].strip()
    missing = next((index for index in range(len(genes)) if index not in genes), None)
    if missing is not None:
        raise ValueError(f"vocabulary: expected the indices 0 to {len(genes) - 1}, got none for {missing}")
    return [genes[index] for index in range(len(genes))]


def _check_plain(names: list[str]) -> None:
    """Refuses lines that are not gene names but parts of another format, which would be genes that no data has."""
    if not names:
        return
    if names[0][0] in "{[":
        raise ValueError(
            "vocabulary: expected one gene name a line, got JSON; write its names, one a line: "
            "Path('genes.txt').write_text('\\n'.join(names))"
        )
    quoted = next((name for name in names if name[0] in "\"'" and name[-1] == name[0]), None)
    if quoted is not None:
        raise ValueError(f"vocabulary: expected one gene name a line without quotes, got {quoted}; remove the quotes")
    for word, separator in (("commas", ","), ("semicolons", ";"), ("blanks", None)):
        columns = len(names[0].split(separator))
        if columns > 1 and all(len(name.split(separator)) == columns for name in names):
            raise ValueError(
                f"vocabulary: expected one gene name a line, got {columns} columns between {word} in {names[0]!r:.60}; "
                "keep the column of the names, or separate gene_name and index by a tab"
            )


def _stable_id(name: str) -> str | None:
    """The Ensembl gene id without what is appended to it, None where the name is none."""
    match = _ENSEMBL_ID.fullmatch(name)
    return match[1] + match[2].replace("R", "0") if match else None


def _repeated(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return list(dict.fromkeys(name for name in names if name in seen or seen.add(name)))  # type: ignore[func-returns-value]


def _named(names: Sequence[str], limit: int = 5) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
