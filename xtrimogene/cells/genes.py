"""The genes of a data set: where each of its columns goes in a vocabulary, and which names would fit better."""

from __future__ import annotations

import pandas as pd

from xtrimogene.cells.sources import CellSource
from xtrimogene.network.vocabulary import ColumnMap, Vocabulary, column_names


def map_genes(source: CellSource, vocabulary: Vocabulary, *, normalized: bool = False) -> ColumnMap:
    """Find the columns of a data set in a vocabulary.

    Several rows of ``var[gene_symbols]`` with one name are several measured features of one gene, and their counts are
    added; log-normalised values cannot be.

    Raises:
        ValueError: no gene of the vocabulary (names the var column that would fit, if any), or repeated names: of
            ``var_names`` always, of ``gene_symbols`` when the values are normalised.
    """
    can_merge = source.gene_symbols is not None and not normalized
    try:
        column_map = vocabulary.map_columns(source.var_names, merge_duplicates=can_merge)
    except ValueError as error:
        if source.gene_symbols is not None:
            hint = "log-normalised values of one gene cannot be added, counts can: give raw counts"
        else:
            hint = (
                "make them unique with adata.var_names_make_unique() (columns but the first are then unknown), "
                "or keep them in a var column and name it with gene_symbols (counts of one gene are then added)"
            )
        raise ValueError(f"{source.name}: {error}; {hint}") from None
    if column_map.num_found == 0:
        column, found = best_name_column(vocabulary, source.var)
        if found == 0:
            hint = "and none in any other var column; the model was made for other genes or another species"
        elif column is None:
            hint = f"but {found:,} in var_names: leave gene_symbols out"
        else:
            hint = f"but {found:,} in var[{column!r}]: pass gene_symbols={column!r} (--gene-symbols {column})"
        wanted = "var_names" if source.gene_symbols is None else f"var[{source.gene_symbols!r}]"
        raise ValueError(
            f"{source.name}: expected genes such as {', '.join(vocabulary.genes[:3])}, got none of the "
            f"{len(vocabulary):,} vocabulary genes in {wanted} (such as {', '.join(source.var_names[:3])}), {hint}"
        )
    return column_map


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
