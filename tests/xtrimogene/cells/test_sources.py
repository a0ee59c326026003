"""Tests of sources and packing: every form of input gives the same packed batch to the bit, and what is refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

from xtg_kernels import RaggedBatch, dispatch
from xtrimogene.cells import matrix
from xtrimogene.cells.genes import map_genes
from xtrimogene.cells.numbers import looks_like_counts
from xtrimogene.cells.packing import pack_csr_numpy, pack_rows, split_by_tokens
from xtrimogene.cells.sources import CellSource, open_cells
from xtrimogene.network.vocabulary import Vocabulary

# Notices of anndata and zarr about their own defaults to come
pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning"),
]

N_OBS, N_VARS = 70, 40
GENES = [f"G{i}" for i in range(N_VARS)]
# Every other gene, in another order, and some that the data lacks.
VOCABULARY = Vocabulary([*GENES[::-2], "absent1", "absent2"])


def counts() -> sp.csr_matrix:
    rng = np.random.default_rng(3)
    matrix = sp.random(N_OBS, N_VARS, density=0.3, format="lil", random_state=rng)
    matrix[5] = 0
    matrix = matrix.tocsr()
    matrix.data = rng.geometric(0.3, matrix.nnz).astype(np.float32)
    return matrix.astype(np.float32)


def adata_of(matrix: Any) -> AnnData:
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_OBS)])
    return AnnData(matrix, obs=obs, var=pd.DataFrame({"number": np.arange(N_VARS)}, index=GENES))


def unsorted(matrix: sp.csr_matrix) -> sp.csr_matrix:
    rows = [np.random.default_rng(row).permutation(np.arange(*matrix.indptr[row : row + 2])) for row in range(N_OBS)]
    order = np.concatenate(rows)
    return sp.csr_matrix((matrix.data[order], matrix.indices[order], matrix.indptr), shape=matrix.shape)


def duplicated(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Each count above 1 stored as two entries, and a zero stored in each row."""
    parts = [matrix.data - 1, np.where(matrix.data > 1, 1, matrix.data), np.zeros(N_OBS, np.float32)]
    rows = np.repeat(np.arange(N_OBS), np.diff(matrix.indptr))
    row_of = np.concatenate([rows, rows, np.arange(N_OBS)])
    columns = np.concatenate([matrix.indices, matrix.indices, np.full(N_OBS, 8)])
    order = np.argsort(row_of, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=N_OBS))])
    stored = sp.csr_matrix((np.concatenate(parts)[order], columns[order], indptr), shape=matrix.shape)
    assert (stored != matrix).nnz == 0
    assert stored.nnz > matrix.nnz
    return stored


def int64_indices(matrix: sp.csr_matrix) -> sp.csr_matrix:
    wide = matrix.copy()
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    return wide


def view(matrix: sp.csr_matrix) -> AnnData:
    padded = anndata.concat([adata_of(matrix), adata_of(matrix * 2)], index_unique="-")
    rows = np.concatenate([np.arange(N_OBS)[::-1]])[::-1]
    adata = padded[rows][:, GENES]
    assert adata.is_view
    return adata


IN_MEMORY: dict[str, Callable[[sp.csr_matrix], Any]] = {
    "csr": adata_of,
    "csr array": lambda matrix: adata_of(sp.csr_array(matrix)),
    "csc": lambda matrix: adata_of(matrix.tocsc()),
    "csc array": lambda matrix: adata_of(sp.csc_array(matrix)),
    "dense": lambda matrix: adata_of(matrix.toarray()),
    "dense by columns": lambda matrix: adata_of(np.asfortranarray(matrix.toarray())),
    "int64 indices": lambda matrix: adata_of(int64_indices(matrix)),
    "unsorted": lambda matrix: adata_of(unsorted(matrix)),
    "duplicated": lambda matrix: adata_of(duplicated(matrix)),
    "float64": lambda matrix: adata_of(matrix.astype(np.float64)),
    "int64": lambda matrix: adata_of(matrix.astype(np.int64)),
    "uint8": lambda matrix: adata_of(matrix.astype(np.uint8)),
    "uint16 dense": lambda matrix: adata_of(matrix.toarray().astype(np.uint16)),
    "int32 csc": lambda matrix: adata_of(matrix.tocsc().astype(np.int32)),
    "view": view,
    "other column order": lambda matrix: adata_of(matrix)[:, GENES[::-1]],
}


def in_layer(matrix: sp.csr_matrix) -> AnnData:
    adata = adata_of(sp.csr_matrix(matrix.shape, dtype=np.float32))
    adata.layers["counts"] = matrix
    return adata


def in_raw(matrix: sp.csr_matrix) -> AnnData:
    adata = adata_of(matrix)
    adata.raw = adata.copy()
    adata.X = adata.X * 0.5
    return adata[:, :10].copy()


def packed_from(source: CellSource, **options: Any) -> RaggedBatch:
    """All cells, read by uneven windows and joined."""
    column_map = map_genes(source, VOCABULARY)
    bounds = [0, 1, 30, 31, 64, N_OBS]
    parts = [
        pack_rows(source.read_rows(start, stop), column_map.gene_ids, **options)
        for start, stop in itertools.pairwise(bounds)
    ]
    offsets = np.cumsum([0, *(part.total_nnz for part in parts)])
    assert all(part.distinct_index is not None for part in parts)
    return RaggedBatch(
        torch.cat([part.values for part in parts]),
        torch.cat([part.gene_ids for part in parts]),
        torch.cat(
            [
                torch.zeros(1, dtype=torch.int32),
                *(part.cu_seqlens[1:] + o for part, o in zip(parts, offsets, strict=False)),
            ]
        ),
        max(part.max_seqlen for part in parts),
        torch.cat([part.distinct_index + o for part, o in zip(parts, offsets, strict=False)]),  # type: ignore[operator]
    )


def assert_same_bits(one: RaggedBatch, other: RaggedBatch) -> None:
    assert one.max_seqlen == other.max_seqlen
    for name in ("values", "gene_ids", "cu_seqlens", "distinct_index"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.fixture(scope="module")
def expected() -> RaggedBatch:
    """The batch from the dense matrix by the formula."""
    dense = counts().toarray().astype(np.float64)[:, [GENES.index(gene) for gene in VOCABULARY.genes[:-2]]]
    with np.errstate(invalid="ignore"):
        values = np.nan_to_num(np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4))
    cells, genes = np.nonzero(values)
    cu_seqlens = np.concatenate([[0], np.cumsum(np.count_nonzero(values, axis=1))])
    stored = values[cells, genes].astype(np.float32)
    first = [
        cu_seqlens[c] + np.flatnonzero(stored[cu_seqlens[c] :] == v)[0] for c, v in zip(cells, stored, strict=True)
    ]
    return RaggedBatch(
        torch.from_numpy(stored),
        torch.from_numpy(genes.astype(np.int32)),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        int(np.diff(cu_seqlens).max()),
        torch.tensor(first, dtype=torch.int32),
    )


@pytest.mark.parametrize("form", IN_MEMORY)
def test_forms_in_memory(form: str, expected: RaggedBatch) -> None:
    assert_same_bits(packed_from(open_cells(IN_MEMORY[form](counts()))), expected)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_np_matrix(expected: RaggedBatch) -> None:
    adata = adata_of(counts())
    adata._X = np.matrix(counts().toarray())  # AnnData itself no longer makes one
    assert_same_bits(packed_from(open_cells(adata)), expected)


def test_layer_and_raw(expected: RaggedBatch, tmp_path: Path) -> None:
    assert_same_bits(packed_from(open_cells(in_layer(counts()), layer="counts")), expected)
    assert_same_bits(packed_from(open_cells(in_raw(counts()), layer="raw")), expected)
    in_layer(counts()).write_h5ad(tmp_path / "layer.h5ad")
    in_raw(counts()).write_h5ad(tmp_path / "raw.h5ad")
    with open_cells(tmp_path / "layer.h5ad", layer="counts") as source:
        assert_same_bits(packed_from(source), expected)
    with open_cells(tmp_path / "raw.h5ad", layer="raw") as source:
        assert_same_bits(packed_from(source), expected)
        assert source.n_vars == N_VARS


@pytest.mark.parametrize("store", ["h5ad", "zarr v2", "zarr v3", "backed", "backed view"])
@pytest.mark.parametrize(
    "form", ["csr", "csc", "dense", "int64 indices", "unsorted", "duplicated", "uint8", "int32 csc"]
)
def test_forms_on_disk(
    form: str, store: str, expected: RaggedBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "_BLOCK_ENTRIES", 100)  # many blocks
    path = tmp_path / ("cells.zarr" if "zarr" in store else "cells.h5ad")
    adata = IN_MEMORY[form](counts())
    if "zarr" in store:
        with anndata.settings.override(zarr_write_format=int(store[-1])):
            adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    if "backed" not in store:
        with open_cells(path) as source:
            assert_same_bits(packed_from(source), expected)
        return
    backed = anndata.read_h5ad(path, backed="r")
    cells = backed if store == "backed" else backed[:, GENES[:20] + GENES[20:]]
    assert cells.isbacked
    with open_cells(cells) as source:
        assert_same_bits(packed_from(source), expected)
    backed.file.close()


def test_the_numpy_packer_gives_the_same_batch(expected: RaggedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "extension", lambda: None)
    assert_same_bits(packed_from(open_cells(adata_of(unsorted(counts())))), expected)


def test_reading_by_rows_reads_only_those_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adata_of(counts()).write_h5ad(tmp_path / "cells.h5ad")
    read: list[int] = []
    original = h5py.Dataset.__getitem__

    def spy(self: h5py.Dataset, key: Any) -> Any:
        result = original(self, key)
        if self.name in ("/X/data", "/X/indices"):
            read.append(len(result))
        return result

    with open_cells(tmp_path / "cells.h5ad") as source:
        monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
        indptr, _, _ = source.read_rows(10, 14)
    assert read == [indptr[-1]] * 2
    assert 0 < indptr[-1] < counts().nnz / 5


def test_memory_is_not_copied(expected: RaggedBatch) -> None:
    adata = adata_of(counts())
    _, indices, data = open_cells(adata).read_rows(10, 20)
    assert np.shares_memory(indices, adata.X.indices)
    assert np.shares_memory(data, adata.X.data)


def test_names_of_cells_and_entries_stored(tmp_path: Path) -> None:
    adata_of(counts()).write_h5ad(tmp_path / "cells.h5ad")
    adata_of(counts()).write_zarr(tmp_path / "cells.zarr")
    for cells in (adata_of(counts()), tmp_path / "cells.h5ad", tmp_path / "cells.zarr"):
        with open_cells(cells) as source:
            assert source.cell_name(7) == "cell7"
            assert source.stored_entries is not None
            assert source.stored_entries.tolist() == np.diff(counts().indptr).tolist()
            assert (source.n_obs, source.n_vars) == (N_OBS, N_VARS)


def test_batches_by_tokens() -> None:
    batch = pack_rows(
        open_cells(adata_of(counts())).read_rows(0, N_OBS),
        map_genes(open_cells(adata_of(counts())), VOCABULARY).gene_ids,
    )
    for max_tokens in (1, 7, 20, 10**6):
        first_of, values = 0, []
        for first, last, part in split_by_tokens(batch, max_tokens):
            assert first == first_of
            assert part.batch_size == last - first == len(part.lengths)
            assert part.total_nnz <= max_tokens or part.batch_size == 1
            assert part.max_seqlen == int(part.lengths.max())
            assert part.total_nnz == int(part.cu_seqlens[-1])
            assert torch.equal(part.values[part.distinct_index.long()], part.values)  # type: ignore[union-attr]
            values.append(part.values)
            first_of = last
        assert first_of == N_OBS
        assert torch.equal(torch.cat(values), batch.values)
    assert len(list(split_by_tokens(batch, 10**6))) == 1


def test_counts_are_recognised() -> None:
    assert looks_like_counts(open_cells(adata_of(counts())))
    assert not looks_like_counts(open_cells(adata_of(counts() * 0.3)))
    wrong = counts()
    wrong.data[wrong.indptr[69]] = -1
    with pytest.raises(ValueError, match=r"AnnData: row 69 \(cell69\), column \d+: value -1\.0; expected raw counts"):
        looks_like_counts(open_cells(adata_of(wrong)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "none"}, "expected layer 'none', got a data set without it; its matrices: X, counts, raw"),
        ({"gene_symbols": "symbol"}, "gene_symbols: expected a column of var, got 'symbol'; columns: number"),
    ],
)
def test_what_the_data_lacks_is_named(options: dict[str, str], message: str, tmp_path: Path) -> None:
    adata = in_layer(counts())
    adata.raw = adata.copy()
    with pytest.raises(ValueError, match=message):
        open_cells(adata, **options)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=message) as error:
        open_cells(tmp_path / "cells.h5ad", **options)
    assert str(tmp_path / "cells.h5ad") in str(error.value)


def test_matrices_of_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a matrix of integers or floats, got dtype complex64"):
        open_cells(adata_of(counts().astype(np.complex64)))
    with pytest.raises(ValueError, match="expected X, got a data set without it"):
        open_cells(AnnData(obs=pd.DataFrame(index=["a"]), var=pd.DataFrame(index=["b"])))
    with pytest.raises(TypeError, match="adata_or_path: expected an AnnData or a path, got csr_matrix"):
        open_cells(counts())  # type: ignore[arg-type]


def test_files_that_are_none(tmp_path: Path) -> None:
    text, empty, plain, folder = (tmp_path / name for name in ("text.h5ad", "empty.h5ad", "plain.h5ad", "folder"))
    text.write_text("barcode,gene\n")
    empty.touch()
    folder.mkdir()
    with h5py.File(plain, "w") as file:
        file.create_group("matrix")
    for path, message in (
        (text, "expected an h5ad file, got something that is not HDF5"),
        (empty, "expected an h5ad file, got something that is not HDF5"),
        (plain, "expected an h5ad, 10x, loom or h5mu file, got HDF5 that holds matrix"),
        (folder, "expected an h5ad file or a zarr store, got another folder"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_cells(path)
        assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"none\.h5ad: no such file"):
        open_cells(tmp_path / "none.h5ad")


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.99])
def test_truncated_files(kept: float, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.h5ad", tmp_path / "cut.h5ad"
    adata_of(counts()).write_h5ad(whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"cut\.h5ad: .*truncated"):
        open_cells(cut)


def test_damage_inside_a_file_is_told_when_read(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    adata_of(counts()).write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(content)
    with (
        open_cells(path) as source,
        pytest.raises(ValueError, match=r"cells\.h5ad: cannot read rows 3 to 8: .* damaged"),
    ):
        source.read_rows(3, 9)


def test_arrays_that_do_not_fit_together(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    adata_of(counts()).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X/indptr"][3] = 10**6
    with pytest.raises(ValueError, match=r"cells\.h5ad: expected CSR arrays of 70 rows.*damaged"):
        open_cells(path)


def test_genes_that_do_not_fit() -> None:
    adata = adata_of(counts())
    source = open_cells(adata)
    with pytest.raises(
        ValueError, match=r"got none of the 2 vocabulary genes in var_names .* and none in any other var"
    ):
        map_genes(source, Vocabulary(["X", "Y"]))
    adata.var["symbol"] = [f"S{i}" for i in range(N_VARS)]
    with pytest.raises(
        ValueError, match=r"but 2 in var\['symbol'\]: pass gene_symbols='symbol' \(--gene-symbols symbol\)"
    ):
        map_genes(open_cells(adata), Vocabulary(["S1", "S2"]))
    with pytest.raises(ValueError, match="but 1 in var_names: leave gene_symbols out"):
        map_genes(open_cells(adata, gene_symbols="symbol"), Vocabulary(["G1"]))


def test_repeated_names() -> None:
    adata = adata_of(counts())
    adata.var["symbol"] = ["A", "A", *GENES[2:]]
    merged = map_genes(open_cells(adata, gene_symbols="symbol"), Vocabulary(["A", "G5"]))
    assert merged.merged == ("A",)
    assert merged.gene_ids[:6].tolist() == [0, 0, -1, -1, -1, 1]
    with pytest.raises(ValueError, match="A more than once; log-normalised values of one gene cannot be added"):
        map_genes(open_cells(adata, gene_symbols="symbol"), Vocabulary(["A"]), normalized=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's own warning of the names
        adata.var_names = ["G0", "G0", *GENES[2:]]
        with pytest.raises(
            ValueError, match=r"got G0 more than once; make them unique with adata\.var_names_make_unique"
        ):
            map_genes(open_cells(adata), Vocabulary(["G0"]))
    assert map_genes(open_cells(adata), Vocabulary(["G7"])).num_found == 1


def test_real_cells_of_a_legacy_file() -> None:
    """scanpy's shipped PBMC, which an early anndata wrote: .raw is log-normalised, with unsorted rows."""
    import scanpy

    path = Path(scanpy.__file__).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"
    raw = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    vocabulary = Vocabulary.from_adata(raw)
    assert not raw.X.has_sorted_indices
    for cells in (path, scanpy.datasets.pbmc68k_reduced()):
        with open_cells(cells, layer="raw") as source:
            assert not looks_like_counts(source)
            batch = pack_rows(source.read_rows(0, 700), map_genes(source, vocabulary).gene_ids, normalized=True)
        matrix = raw.X.sorted_indices()
        np.testing.assert_array_equal(batch.values.numpy(), matrix.data)
        np.testing.assert_array_equal(batch.gene_ids.numpy(), matrix.indices)
        np.testing.assert_array_equal(batch.cu_seqlens.numpy(), matrix.indptr)


def test_real_counts_equal_scanpys_normalisation(shared_data: Path) -> None:
    import scanpy

    path = shared_data / "zheng_pbmc_facs.h5ad"
    vocabulary = Vocabulary.from_tsv(shared_data / "gene_vocabulary_19264.tsv")
    with open_cells(path, gene_symbols="symbol") as source:
        assert looks_like_counts(source)
        column_map = map_genes(source, vocabulary)
        rows = source.read_rows(1000, 1200)
        batch = pack_rows(rows, column_map.gene_ids)
        by_numpy = pack_csr_numpy(*rows, column_map.gene_ids)
    assert column_map.num_found == 12704
    np.testing.assert_array_max_ulp(batch.values.numpy(), by_numpy["values"], maxulp=1)
    for name in ("gene_ids", "cu_seqlens", "distinct_index"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), by_numpy[name])
    adata = anndata.read_h5ad(path)[1000:1200]
    adata = adata[:, column_map.gene_ids >= 0].copy()
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    single = ~np.isin(
        column_map.gene_ids[column_map.gene_ids >= 0], [vocabulary.index_of[g] for g in column_map.merged]
    )
    ours = sp.csr_matrix((batch.values, batch.gene_ids, batch.cu_seqlens), shape=(200, len(vocabulary)))
    theirs = adata.X[:, single].toarray()
    np.testing.assert_allclose(
        ours[:, column_map.gene_ids[column_map.gene_ids >= 0][single]].toarray(), theirs, rtol=1e-5
    )
