"""The genes of a data set: where each of its columns goes in a vocabulary, and which names would fit better."""

from __future__ import annotations

import dataclasses
import re
import warnings

import numpy as np
import numpy.typing as npt
import pandas as pd

from xtrimogene.cells.aliases import Aliases, new_name
from xtrimogene.cells.packing import LEFT_OUT
from xtrimogene.cells.sources import CellSource
from xtrimogene.network.vocabulary import ColumnMap, Vocabulary, column_names

# The genes found as a share of the vocabulary or of the data's genes, whichever is larger: a panel of 300 genes is as
# right as a small vocabulary. Names of another species agree in a few genes in a thousand (F2, C3, AR ...).
_FEW, _TOO_FEW = 0.3, 0.002
_MADE_UNIQUE = re.compile(r"(.+)-\d+")
# What var["feature_types"] of 10x files (and of others that have the column) says of genes.
_GENE_TYPES = ("gene expression", "gene", "gex", "rna")


def map_genes(
    source: CellSource, vocabulary: Vocabulary, *, normalized: bool = False, aliases: Aliases | None = None
) -> ColumnMap:
    """Find the columns of a data set in a vocabulary.

    Columns that are no genes by ``var["feature_types"]`` are left out. Several rows of ``var[gene_symbols]`` with one
    name are several measured features of one gene, as are the versions of an Ensembl id or the copies of a gene on X
    and Y, and their counts are added; log-normalised values cannot be. A name that the vocabulary lacks is looked up
    in ``aliases``, and taken where the gene has no column under its own name.

    Raises:
        ValueError: no or hardly a gene of the vocabulary (names the var column that would fit, if any), or repeated
            names: of ``var_names`` always, of ``gene_symbols`` when the values are normalised.
    """
    left_out = columns_left_out(source.var)
    names = _gene_names(source, left_out)
    column_map = vocabulary.map_columns(names, merge_duplicates=True)
    unknown = [name for name, gene_id in zip(names, column_map.gene_ids, strict=True) if name and gene_id < 0]
    measured = set(column_map.gene_ids[column_map.gene_ids >= 0].tolist())
    renamed: dict[str, str] = {}
    if aliases is not None:
        for name in unknown:
            gene = aliases.gene_of(name, vocabulary)
            if gene is not None and vocabulary.index_of[gene] not in measured:
                renamed[name] = gene
        column_map = vocabulary.map_columns([renamed.get(name, name) for name in names], merge_duplicates=True)
    renewed = [(name, new) for name in unknown if name not in renamed and (new := new_name(name)) is not None]
    gene_ids = column_map.gene_ids
    gene_ids[left_out] = LEFT_OUT
    merged = _checked_repetitions(source, vocabulary, column_map, names, normalized)
    column_map = dataclasses.replace(
        column_map,
        merged=merged,
        renamed=tuple(renamed.items()),
        old_names=tuple(
            (old, new) for old, new in renewed if new in vocabulary and vocabulary.index_of[new] not in measured
        ),
    )
    if _share(column_map, names) < _TOO_FEW:
        raise ValueError(
            f"{source.name}: expected genes such as {', '.join(vocabulary.genes[:3])}, got "
            f"{_how_many(source, column_map)} (such as {', '.join(source.var_names[:3])}), "
            f"{_where_else(source, vocabulary, column_map)}"
        )
    return column_map


def _gene_names(source: CellSource, left_out: npt.NDArray[np.bool_]) -> list[str]:
    """The columns' names, "" for those left out. Where var_names_make_unique() met an antibody before the gene of its
    name, it called the gene CD4-1; it is CD4."""
    taken = {name for name, left in zip(source.var_names, left_out, strict=True) if left}
    names = []
    for name, left in zip(source.var_names, left_out, strict=True):
        made_unique = _MADE_UNIQUE.fullmatch(name) if taken else None
        names.append("" if left else made_unique[1] if made_unique and made_unique[1] in taken else name)
    return names


def warn_of_genes(source: CellSource, vocabulary: Vocabulary, column_map: ColumnMap) -> None:
    """Warn of what is likely to be wrong with the genes of a data set, or is done with them unasked."""
    columns = list(zip(source.var_names, column_map.gene_ids.tolist(), strict=True))
    names = ["" if gene_id == LEFT_OUT else name for name, gene_id in columns]
    share = _share(column_map, names)
    if share < _FEW:
        warnings.warn(
            f"{source.name}: {_how_many(source, column_map)}; {_where_else(source, vocabulary, column_map)}",
            stacklevel=4,
        )
    elif share < 0.5:
        column, found = best_name_column(vocabulary, source.var)
        if found >= 2 * column_map.num_found:
            warnings.warn(
                f"{source.name}: {_how_many(source, column_map)}; {_better_column(column, found)}", stacklevel=4
            )
    if column_map.merged:
        warnings.warn(f"{source.name}: {column_map}", stacklevel=4)
    if column_map.old_names:
        shown = ", ".join(f"{old} (now {new})" for old, new in column_map.old_names[:5])
        more = len(column_map.old_names) - 5
        warnings.warn(
            f"{source.name}: {len(column_map.old_names):,} genes have an old name and are taken for unknown: {shown}"
            f"{f' and {more:,} more' if more > 0 else ''}; map them with aliases=FILE (--aliases FILE), old<tab>new or "
            "HGNC's complete set",
            stacklevel=4,
        )
    measured = {vocabulary.genes[gene_id] for gene_id in column_map.gene_ids[column_map.gene_ids >= 0].tolist()}
    hidden = [name for name, gene_id in columns if gene_id == LEFT_OUT and name in vocabulary and name not in measured]
    if hidden:
        warnings.warn(
            f"{source.name}: columns that are no genes by var['feature_types'] have the names of genes that no other "
            f"column has ({', '.join(hidden[:5])}); they are left out. If var_names_make_unique() gave the genes other "
            "names, name the column of symbols with gene_symbols (--gene-symbols)",
            stacklevel=4,
        )


def columns_left_out(var: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """(n_columns,) whether a column is something else than a gene, such as an antibody, by ``var["feature_types"]``.

    None is where the column is missing or names no genes at all, and none whose type is not given.
    """
    if "feature_types" not in var.columns:
        return np.zeros(len(var), bool)
    given = var["feature_types"]
    is_gene = given.astype(str).str.strip().str.casefold().isin(_GENE_TYPES).to_numpy(bool)
    if not is_gene.any():
        return np.zeros(len(var), bool)
    return ~is_gene & ~given.isna().to_numpy(bool)


def best_name_column(vocabulary: Vocabulary, var: pd.DataFrame) -> tuple[str | None, int]:
    """The place in ``var`` that names most genes of the vocabulary: (column, or None for the index; genes found)."""
    best: tuple[str | None, int] = (None, vocabulary.count_found(column_names(var)))
    for column in var.columns:
        if var[column].dtype.kind in "biufcmM":
            continue
        found = vocabulary.count_found(column_names(var, column))
        if found > best[1]:
            best = (column, found)
    return best


def _checked_repetitions(
    source: CellSource, vocabulary: Vocabulary, column_map: ColumnMap, names: list[str], normalized: bool
) -> tuple[str, ...]:
    """The genes whose columns are added up; copies on Y of genes with another column are dropped where that cannot be.

    Raises ValueError for repeated names that cannot be added.
    """
    repeated = np.flatnonzero(np.bincount(column_map.gene_ids[column_map.gene_ids >= 0]) > 1)
    merged = []
    for gene_id in repeated.tolist():
        columns = np.flatnonzero(column_map.gene_ids == gene_id)
        if normalized:
            copies = [column for column in columns.tolist() if names[column].endswith("_PAR_Y")]
            if len(copies) == len(columns) - 1:
                column_map.gene_ids[copies] = -1
                continue
        same_names = len({names[column] for column in columns.tolist()}) < len(columns)
        if not normalized and (source.gene_symbols is not None or not same_names):
            merged.append(vocabulary.genes[gene_id])
            continue
        if normalized and (source.gene_symbols is not None or not same_names):
            hint = "log-normalised values of one gene cannot be added, counts can: give raw counts"
        else:
            hint = (
                "make them unique with adata.var_names_make_unique() (columns but the first are then unknown), "
                "or keep them in a var column and name it with gene_symbols (counts of one gene are then added)"
            )
        others = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        raise ValueError(
            f"{source.name}: gene names: expected each once, got {vocabulary.genes[gene_id]}{others} more than once; "
            f"{hint}"
        )
    return tuple(merged)


def _share(column_map: ColumnMap, names: list[str]) -> float:
    named = sum(1 for name in names if name)
    return max(column_map.num_found / column_map.num_genes, column_map.num_used / max(1, named))


def _how_many(source: CellSource, column_map: ColumnMap) -> str:
    wanted = "var_names" if source.gene_symbols is None else f"var[{source.gene_symbols!r}]"
    count = "none" if column_map.num_found == 0 else f"only {column_map.num_found:,}"
    return f"{count} of the {column_map.num_genes:,} vocabulary genes in {wanted}"


def _where_else(source: CellSource, vocabulary: Vocabulary, column_map: ColumnMap) -> str:
    column, found = best_name_column(vocabulary, source.var)
    if found > 2 * column_map.num_found:
        return _better_column(column, found)
    capital = vocabulary.count_found([name.upper() for name in source.var_names])
    if capital > 4 * column_map.num_found + 10:
        return f"but {capital:,} in capital letters: genes of a mouse? Map them to their human orthologs first"
    more = "and none" if found == 0 else "and no more"
    return f"{more} in any other var column; the model was made for other genes or another species"


def _better_column(column: str | None, found: int) -> str:
    if column is None:
        return f"but {found:,} in var_names: leave gene_symbols out"
    return f"but {found:,} in var[{column!r}]: pass gene_symbols={column!r} (--gene-symbols {column})"
