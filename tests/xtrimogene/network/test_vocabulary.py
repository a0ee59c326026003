"""Tests of xtrimogene.vocabulary: files, names from AnnData, the map from columns to genes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from xtrimogene.cells.genes import best_name_column
from xtrimogene.network.vocabulary import Vocabulary


def adata_of(names: list[str], **columns: list[object]) -> AnnData:
    return AnnData(np.ones((2, len(names)), np.float32), var=pd.DataFrame(columns, index=names))


def test_genes_keep_their_order() -> None:
    vocabulary = Vocabulary(["B", "A", "C"])
    assert len(vocabulary) == 3
    assert vocabulary.genes == ("B", "A", "C")
    assert vocabulary.index_of == {"B": 0, "A": 1, "C": 2}
    assert "A" in vocabulary
    assert "a" not in vocabulary
    assert vocabulary == Vocabulary(["B", "A", "C"])
    assert vocabulary != Vocabulary(["A", "B", "C"])


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        (["A", "B", "A", "C", "B"], "expected distinct genes, got A, B more than once"),
        ([], "expected at least one gene"),
        (["A", ""], "got an empty name at position 1"),
    ],
)
def test_bad_gene_lists_are_refused(genes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vocabulary(genes)


def test_two_column_file_is_read_in_index_order(tmp_path: Path) -> None:
    path = tmp_path / "v.tsv"
    path.write_text("gene_name\tindex\nC\t2\nA\t0\nB\t1\n")
    assert Vocabulary.from_tsv(path).genes == ("A", "B", "C")


@pytest.mark.parametrize("text", ["gene_name\nA\nB\n", "A\nB", "A\r\nB\r\n\r\n", "\ufeffA\nB\n"])
def test_one_column_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "genes.txt"
    path.write_bytes(text.encode("utf-8"))
    assert Vocabulary.from_tsv(path).genes == ("A", "B")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"gene_name\tindex\nA\t0\nB\t0\n", "expected each index once, got 0 for A and for B"),
        (b"gene_name\tindex\nA\t0\nB\t2\n", "expected the indices 0 to 1, got none for 1"),
        (b"gene_name\tindex\nA\tx\n", "expected a gene name and its index"),
        (b"gene_name\tindex\nA\t0\nA\t1\n", "got A more than once"),
        (b"A\tB\nC\tD\n", "got 2 columns"),
        (b"A\nB\nA\n", "got A more than once"),
        (b'["A", "B"]', "got JSON; write its names, one a line"),
        (b'{\n"A": 0,\n"B": 1}', "got JSON; write its names, one a line"),
        (b'"A"\n"B"\n', 'without quotes, got "A"; remove the quotes'),
        (b"A\n'B'\n", "without quotes, got 'B'; remove the quotes"),
        (b"gene_name,index\nA,0\n", "got 2 columns between commas in 'gene_name,index'"),
        (b"A;1\nB;2\n", "got 2 columns between semicolons in 'A;1'"),
        (b"A 0\nB 1\n", "got 2 columns between blanks in 'A 0'"),
        (b"A B C D", "got 4 columns between blanks in 'A B C D'"),
        (b"", "at least one gene"),
        (b"\x89HDF\r\n\x1a\n\xff\xfe", "expected a text file"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Vocabulary.from_tsv(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.tsv: no such file"):
        Vocabulary.from_tsv(tmp_path / "none.tsv")


def test_saved_and_loaded(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["A", "HLA-DRA", "ENSG00000141510"])
    vocabulary.save(tmp_path / "vocabulary.tsv")
    assert Vocabulary.load(tmp_path / "vocabulary.tsv") == vocabulary
    assert (tmp_path / "vocabulary.tsv").read_text().splitlines()[:2] == ["gene_name\tindex", "A\t0"]


def test_from_adata() -> None:
    adata = adata_of(["E1", "E2", "E3", "E4"], symbol=["X", "Y", "X", None])
    assert Vocabulary.from_adata(adata).genes == ("E1", "E2", "E3", "E4")
    assert Vocabulary.from_adata(adata, gene_symbols="symbol").genes == ("X", "Y")
    with pytest.raises(ValueError, match="expected a column of var, got 'name'; columns: symbol"):
        Vocabulary.from_adata(adata, gene_symbols="name")
    with pytest.raises(ValueError, match="got E1 more than once"):
        Vocabulary.from_adata(adata[:, [0, 1, 0]])


def test_columns_map_to_gene_ids() -> None:
    column_map = Vocabulary(["A", "B", "C"]).map_columns(["x", "C", "", "A"])
    assert column_map.gene_ids.dtype == np.int32
    assert column_map.gene_ids.tolist() == [-1, 2, -1, 0]
    assert (column_map.num_found, column_map.num_genes, column_map.merged) == (2, 3, ())
    assert str(column_map) == "2 of 3 vocabulary genes found; 2 of 4 data columns used"


def test_repeated_names_are_refused_only_where_they_matter() -> None:
    vocabulary = Vocabulary(["A", "B"])
    assert vocabulary.map_columns(["x", "x", "A"]).num_found == 1
    with pytest.raises(ValueError, match="expected each once, got A more than once"):
        vocabulary.map_columns(["A", "B", "A"])
    merged = vocabulary.map_columns(["A", "B", "A"], merge_duplicates=True)
    assert merged.gene_ids.tolist() == [0, 1, 0]
    assert (merged.num_found, merged.merged) == (2, ("A",))
    assert "added up for A" in str(merged)


def test_versions_of_ensembl_ids_are_ignored_on_either_side() -> None:
    plain, versioned = Vocabulary(["ENSG00000141510"]), Vocabulary(["ENSMUSG00000059552.13"])
    assert plain.map_columns(["ENSG00000141510.18", "ENSG00000141511.1"]).gene_ids.tolist() == [0, -1]
    assert versioned.map_columns(
        ["ENSMUSG00000059552", "ENSMUSG00000059552.99"], merge_duplicates=True
    ).gene_ids.tolist() == [0, 0]
    # A dot in a symbol is part of the name.
    assert Vocabulary(["RP11-206L10"]).map_columns(["RP11-206L10.2"]).num_found == 0
    with pytest.raises(ValueError, match="ENSG00000141510 more than once"):
        plain.map_columns(["ENSG00000141510.18", "ENSG00000141510"])


def test_best_name_column() -> None:
    adata = adata_of(["E1", "E2", "E3"], size=[1, 2, 3], symbol=["A", "B", "x"], other=["A", None, "y"])
    assert best_name_column(Vocabulary(["A", "B"]), adata.var) == ("symbol", 2)
    assert best_name_column(Vocabulary(["E1"]), adata.var) == (None, 1)


def test_the_released_vocabulary_finds_the_symbols_of_real_data(shared_data: Path) -> None:
    import anndata

    vocabulary = Vocabulary.from_tsv(shared_data / "gene_vocabulary_19264.tsv")
    assert len(vocabulary) == 19264
    symbols = anndata.read_h5ad(shared_data / "zheng_pbmc_facs.h5ad", backed="r").var["symbol"].astype(str).tolist()
    assert vocabulary.count_found(symbols) == 12704
    with pytest.raises(ValueError, match="CRYBG3, MRPS17, NAA60, PNRC2, SNURF and 1 more more than once"):
        vocabulary.map_columns(symbols)
