"""Tests of where the columns of a data set go: few genes found, columns that are no genes, old names and aliases."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from xtrimogene.cells.aliases import Aliases
from xtrimogene.cells.data_sets import genes_of_data
from xtrimogene.cells.genes import map_genes, warn_of_genes
from xtrimogene.cells.packing import LEFT_OUT
from xtrimogene.cells.sources import open_cells
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.inference.embed import embed
from xtrimogene.inference.gene_level import predict_expression
from xtrimogene.model import XTrimoGene
from xtrimogene.network.vocabulary import ColumnMap, Vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")

HUMAN = [f"HUM{i}" for i in range(2000)]


def adata_of(names: Sequence[str], counts: Any = None, **var: Any) -> AnnData:
    matrix = np.random.default_rng(0).poisson(3, (12, len(names))) + 1 if counts is None else counts
    return AnnData(
        sp.csr_matrix(matrix).astype(np.float32),
        obs=pd.DataFrame(index=[f"cell{i}" for i in range(len(matrix))]),
        var=pd.DataFrame(var, index=list(names)),
    )


def mapped(adata: AnnData, vocabulary: Vocabulary, **options: Any) -> tuple[ColumnMap, list[str]]:
    """The map and the warnings."""
    columns = {name: options.pop(name) for name in ("layer", "gene_symbols") if name in options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_cells(adata, **columns) as source:
            column_map = map_genes(source, vocabulary, **options)
            warn_of_genes(source, vocabulary, column_map)
    return column_map, [str(warning.message) for warning in caught]


def test_few_genes_are_told_and_hardly_any_refused() -> None:
    alike = ["F2", "F3", "C3", "C6", "AR"]
    vocabulary = Vocabulary([*HUMAN, *alike])
    mouse = [f"Hum{i}" for i in range(2000)]
    _, (text,) = mapped(adata_of([*mouse, *alike]), vocabulary)
    assert "only 5 of the 2,005 vocabulary genes in var_names; but 2,005 in capital letters: genes of a mouse?" in text
    with pytest.raises(
        ValueError, match=r"expected genes such as HUM0, .*, got only 1 of .* but 2,001 in capital letters"
    ):
        mapped(adata_of([*mouse, "AR"]), vocabulary)
    other = [f"x{i}" for i in range(2000)]
    _, (text,) = mapped(adata_of([*other, *HUMAN[:200]]), vocabulary)
    assert "and no more in any other var column; the model was made for other genes or another species" in text


def test_few_genes_name_the_column_that_has_more() -> None:
    vocabulary = Vocabulary(HUMAN)
    ids = [f"ENSG{i:011d}" for i in range(2000)]
    spiked = [*ids[:-6], *HUMAN[:6]]
    better = r"but 2,000 in var['feature_name']: pass gene_symbols='feature_name' (--gene-symbols feature_name)"
    _, (text,) = mapped(adata_of(spiked, feature_name=HUMAN), vocabulary)
    assert "only 6 of the 2,000 vocabulary genes in var_names" in text
    assert better in text
    with pytest.raises(ValueError, match="got none of the 2,000 vocabulary genes") as refused:
        mapped(adata_of(ids, feature_name=HUMAN), vocabulary)
    assert better in str(refused.value)
    _, (text,) = mapped(adata_of(HUMAN, id=spiked), vocabulary, gene_symbols="id")
    assert "in var['id']; but 2,000 in var_names: leave gene_symbols out" in text
    # Less than half, where another column has twice as many.
    _, (text,) = mapped(adata_of([*ids[:-900], *HUMAN[:900]], symbol=HUMAN), vocabulary)
    assert "only 900 of the 2,000 vocabulary genes in var_names; but 2,000 in var['symbol']" in text


def test_panels_and_small_vocabularies_are_no_alarm() -> None:
    vocabulary = Vocabulary(HUMAN)
    for names in (HUMAN[:300], HUMAN[:1], [*HUMAN[:300], *(f"lnc{i}" for i in range(500))]):
        column_map, told = mapped(adata_of(names), vocabulary)
        assert not told
        assert column_map.num_found == len([name for name in names if name in vocabulary])
    column_map, told = mapped(adata_of(HUMAN), Vocabulary(HUMAN[:40]))
    assert not told
    assert column_map.num_found == 40


def test_a_checkpoint_that_is_trained_on_with_hardly_a_gene_is_told() -> None:
    vocabulary = Vocabulary([*HUMAN, "F2", "F3"])
    adata = adata_of([*(f"Hum{i}" for i in range(20)), "F2", "F3"])
    with (
        pytest.warns(UserWarning, match="only 2 of the 2,002 vocabulary genes"),
        TrainingCells(adata, vocabulary, min_genes=0, progress=False) as cells,
    ):
        assert cells.genes_found == 2


CITE = ["CD4", "CD8A", "CD19", "LYZ", "ACTB"]
TYPES = ["Gene Expression"] * 5 + ["Antibody Capture"] * 2


def cite_seq(order: Sequence[int] = range(7)) -> AnnData:
    """Five genes and two antibodies of the same names, whose counts are large and not whole."""
    names = [*CITE, "CD4", "CD19"]
    counts = np.random.default_rng(0).poisson(3, (12, 7)) + 1.0
    counts[:, 5:] *= 100.5
    adata = adata_of(names, counts, feature_types=TYPES, symbol=names)[:, list(order)].copy()
    adata.var_names_make_unique()
    return adata


@pytest.fixture(scope="module")
def model() -> XTrimoGene:
    return XTrimoGene.from_preset("3m", Vocabulary(CITE), num_layers=1, dim=16, num_heads=2)


@pytest.mark.parametrize("order", [range(7), [5, 6, 0, 1, 2, 3, 4], [0, 5, 1, 6, 2, 3, 4]])
def test_antibodies_are_left_out_and_counted(model: XTrimoGene, order: Sequence[int]) -> None:
    adata = cite_seq(order)
    genes = cite_seq(order)[:, adata.var["feature_types"] == "Gene Expression"].copy()
    want = embed(genes, model, gene_symbols="symbol", dtype="float32", progress=False).embedding
    for symbols in ("symbol", None):  # without, the name that var_names_make_unique() gave a gene is undone
        report = embed(adata, model, gene_symbols=symbols, dtype="float32", progress=False)
        np.testing.assert_array_equal(report.embedding, want)
        assert (report.columns_left_out, report.genes_found) == (2, 5)
        assert "2 columns that are no genes left out" in str(report)
    report, _ = predict_expression(adata, model, ["CD4"], gene_symbols="symbol", progress=False)
    assert report.columns_left_out == 2
    assert "2 columns that are no genes left out" in str(report)
    # Nor are they genes of a new vocabulary.
    assert sorted(genes_of_data(adata, gene_symbols="symbol").genes) == sorted(CITE)


def test_antibodies_are_left_out_of_training() -> None:
    with TrainingCells(cite_seq(), Vocabulary(CITE), min_genes=0, progress=False) as cells:
        counts = cells.read(np.arange(12))
    genes = cite_seq()[:, :5].copy()
    with TrainingCells(genes, Vocabulary(CITE), min_genes=0, progress=False) as cells:
        np.testing.assert_array_equal(counts.values.numpy(), cells.read(np.arange(12)).values.numpy())


def test_what_feature_types_do_not_tell_is_left_in() -> None:
    vocabulary = Vocabulary(CITE)
    for types in (["gene", None, np.nan, "Gene", "gene expression"], ["protein_coding"] * 5):
        column_map, told = mapped(adata_of(CITE, feature_types=types), vocabulary)
        assert (column_map.num_left_out, column_map.num_found) == (0, 5)
        assert not told
    types = ["Peaks", *["Gene Expression"] * 4]
    column_map, told = mapped(adata_of(CITE, feature_types=types), vocabulary)
    assert column_map.gene_ids.tolist() == [LEFT_OUT, 1, 2, 3, 4]
    (text,) = told
    assert (
        "columns that are no genes by var['feature_types'] have the names of genes that no other column has (CD4)"
        in text
    )
    assert "1 columns that are no genes left out" in str(column_map)


OLD = ["MARCH1", "SEPT2", "H1F0", "TP53", "AARS", "CD4", "CD8A"]
NEW = ["MARCHF1", "SEPTIN2", "H1-0", "TP53", "AARS1", "CD4", "CD8A"]


def test_old_names_are_counted_and_listed(model: XTrimoGene) -> None:
    column_map, (text,) = mapped(adata_of(OLD), Vocabulary(NEW))
    assert dict(column_map.old_names) == {old: new for old, new in zip(OLD, NEW, strict=True) if old != new}
    assert "4 genes have an old name and are taken for unknown: MARCH1 (now MARCHF1), SEPT2 (now SEPTIN2)" in text
    assert "aliases=FILE (--aliases FILE)" in text
    # Where the vocabulary has the old name, or the data the new one, there is nothing to say.
    assert not mapped(adata_of(OLD), Vocabulary(OLD))[1]
    assert not mapped(adata_of([*OLD, *NEW[:3], "AARS1"]), Vocabulary(NEW))[1]
    with pytest.warns(UserWarning, match="4 genes have an old name"):
        report = embed(adata_of(OLD), XTrimoGene.from_preset("tiny", Vocabulary(NEW)), progress=False)
    assert report.old_names == 4
    assert "4 under an old name unknown" in str(report)


def test_a_table_of_aliases_maps_them(tmp_path: Path) -> None:
    for header in ("", "old\tnew\n"):
        table = tmp_path / "aliases.tsv"
        table.write_text(header + "".join(f"{old}\t{new}\n" for old, new in zip(OLD, NEW, strict=True) if old != new))
        column_map, told = mapped(adata_of(OLD), Vocabulary(NEW), aliases=Aliases.from_tsv(table))
        assert column_map.gene_ids.tolist() == list(range(7))
        assert len(column_map.renamed) == 4
        assert not told
    network = XTrimoGene.from_preset("tiny", Vocabulary(NEW))
    report = embed(adata_of(OLD), network, aliases=table, dtype="float32", progress=False)
    want = embed(adata_of(NEW), network, dtype="float32", progress=False)
    np.testing.assert_array_equal(report.embedding, want.embedding)
    assert report.genes_renamed == 4
    assert "4 columns renamed" in str(report)


HGNC = """hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol
HGNC:1\tMARCHF1\tmembrane associated\tApproved\tRNF171|MARCH-I\tMARCH1
HGNC:2\tNEW1\tfirst\tApproved\tOTHER\tTWICE|OLD1
HGNC:3\tNEW2\tsecond\tApproved\tOLD1\tTWICE
HGNC:4\tRECENT\tthird\tApproved\t\tEARLIER
"""


def test_the_table_of_hgnc(tmp_path: Path) -> None:
    (tmp_path / "hgnc_complete_set.txt").write_text(HGNC)
    aliases = Aliases.from_tsv(tmp_path / "hgnc_complete_set.txt")
    assert aliases.gene_of("MARCH1", ["MARCHF1"]) == "MARCHF1"
    assert aliases.gene_of("RNF171", ["MARCHF1"]) == "MARCHF1"
    assert aliases.gene_of("TWICE", ["NEW1", "NEW2"]) is None  # it may be either
    assert aliases.gene_of("TWICE", ["NEW2"]) == "NEW2"
    assert aliases.gene_of("OLD1", ["NEW1", "NEW2"]) == "NEW1"  # an earlier name goes before an alias
    assert aliases.gene_of("RECENT", ["EARLIER"]) == "EARLIER"  # of a vocabulary that is older than the data
    assert aliases.gene_of("unheard", ["NEW1"]) is None
    # A gene that is measured under its own name stays that column's alone.
    column_map, _ = mapped(adata_of(["MARCH1", "MARCHF1", "NEW1"]), Vocabulary(["MARCHF1", "NEW1"]), aliases=aliases)
    assert column_map.gene_ids.tolist() == [-1, 0, 1]
    assert column_map.renamed == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"MARCH1\n", r"expected two columns, old<tab>new, or HGNC's complete set .*, got \['MARCH1'\]"),
        (b"a,b\nc,d\n", "expected two columns"),
        (b"", "expected old and new names of genes, got none"),
        (b"old\tnew\n", "expected old and new names of genes, got none"),
        (b"\xff\xfe\x00", "expected a table of tab-separated text"),
    ],
)
def test_other_files_are_no_tables_of_aliases(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"aliases .*a\.tsv: {message}"):
        Aliases.from_tsv(tmp_path / "a.tsv")
    with pytest.raises(FileNotFoundError, match=r"aliases .*none\.tsv: no such file"):
        Aliases.from_tsv(tmp_path / "none.tsv")


def test_ids_as_gencode_writes_them() -> None:
    ids = [f"ENSG{i:011d}" for i in range(182378, 182388)]
    for suffix in (".10", ".10_6", "_PAR_Y", ".10_PAR_Y", ".10_6_PAR_Y"):
        column_map, told = mapped(adata_of([f"{each}{suffix}" for each in ids]), Vocabulary(ids))
        assert column_map.gene_ids.tolist() == list(range(10))
        assert not told
    assert mapped(adata_of(["ENSGR0000182378.10", *ids[1:]]), Vocabulary(ids))[0].num_found == 10
    # The copies of a gene on X and Y, or two versions of one: their counts are added, where they are counts.
    both = adata_of([f"{each}.10" for each in ids] + [f"{each}.10_PAR_Y" for each in ids[:2]])
    column_map, (text,) = mapped(both, Vocabulary(ids))
    assert f"counts of columns added up for {ids[0]}, {ids[1]}" in text
    assert column_map.gene_ids.tolist() == [*range(10), 0, 1]
    column_map, told = mapped(both, Vocabulary(ids), normalized=True)
    assert column_map.gene_ids.tolist() == [*range(10), -1, -1]
    assert not told
    versions = adata_of([f"{each}.1" for each in ids] + [f"{ids[0]}.2"])
    assert mapped(versions, Vocabulary(ids))[0].gene_ids[-1] == 0
    with pytest.raises(
        ValueError, match="log-normalised values of one gene cannot be added, counts can: give raw counts"
    ):
        mapped(versions, Vocabulary(ids), normalized=True)


def test_genes_of_the_mitochondrion_that_the_released_vocabulary_has_twice(shared_data: Path) -> None:
    """A column has the row of its own name; the twenty rows __chrM stay empty for data that do not write them so."""
    vocabulary = Vocabulary.from_tsv(shared_data / "gene_vocabulary_19264.tsv")
    twice = [gene for gene in vocabulary.genes if f"{gene}__chrM" in vocabulary]
    assert len(twice) == 20
    column_map, _ = mapped(adata_of(twice), vocabulary)
    assert [vocabulary.genes[i] for i in column_map.gene_ids] == twice
    column_map, _ = mapped(adata_of([f"{gene}__chrM" for gene in twice]), vocabulary)
    assert [vocabulary.genes[i] for i in column_map.gene_ids] == [f"{gene}__chrM" for gene in twice]


def test_names_of_real_data(shared_data: Path) -> None:
    vocabulary = Vocabulary.from_tsv(shared_data / "gene_vocabulary_19264.tsv")
    for name, columns in (("pbmc3k_counts_labelled", {}), ("zheng_pbmc_facs", {"gene_symbols": "symbol"})):
        adata = anndata.read_h5ad(shared_data / f"{name}.h5ad")
        column_map, told = mapped(adata, vocabulary, **columns)
        assert not [text for text in told if "only" in text]
        assert len(column_map.old_names) > 50
        # Each of them is a new gene, which no column has by its own name.
        found = {vocabulary.genes[i] for i in column_map.gene_ids if i >= 0}
        assert not found & {new for _, new in column_map.old_names}
        assert {new for _, new in column_map.old_names} <= set(vocabulary.genes)
    with pytest.raises(ValueError, match=r"but 12,\d\d\d in var\['symbol'\]: pass gene_symbols='symbol'"):
        mapped(adata, vocabulary)
