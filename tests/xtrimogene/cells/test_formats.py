"""Tests of the formats: the same cells in every one of them are the same rows to the bit, and what else people have is
refused with what to do. The files are made here with h5py, gzip and zarr, as their writers lay them out."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import multiprocessing
import os
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from tests import warm
from xtrimogene.cells import hdf5, matrix
from xtrimogene.cells.data_sets import expand_data
from xtrimogene.cells.formats import tenx_mtx
from xtrimogene.cells.formats.zarr_store import METADATA
from xtrimogene.cells.genes import map_genes
from xtrimogene.cells.hdf5 import HdfFile
from xtrimogene.cells.packing import LEFT_OUT
from xtrimogene.cells.sources import CellSource, UnreadableCells, open_cells
from xtrimogene.network.vocabulary import Vocabulary

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning"),
]

N_OBS, N_VARS = 60, 30
SYMBOLS = [f"G{i}" for i in range(N_VARS - 1)] + ["G3"]  # one symbol twice, as in 10x references
IDS = [f"ENSG{i:011d}" for i in range(N_VARS)]
CELLS = [f"AAC{i}-1" for i in range(N_OBS)]


def counts() -> sp.csr_matrix:
    rng = np.random.default_rng(5)
    dense = rng.poisson(2, (N_OBS, N_VARS)) * (rng.random((N_OBS, N_VARS)) < 0.4)
    dense[7] = 0
    return sp.csr_matrix(dense.astype(np.int32))


def adata() -> AnnData:
    obs = pd.DataFrame({"batch": ["a", "b"] * (N_OBS // 2)}, index=CELLS)
    return AnnData(counts().astype(np.float32), obs=obs, var=pd.DataFrame({"symbol": SYMBOLS}, index=IDS))


def strings(names: Any) -> Any:
    return np.array(list(names), "S")


def write_arrays(group: h5py.Group, rows: sp.csr_matrix, cells: list[str]) -> None:
    """Genes x cells by columns, the layout of Cell Ranger."""
    group["barcodes"], group["shape"] = strings(cells), np.array(rows.shape[::-1])
    for name in ("data", "indices", "indptr"):
        group[name] = getattr(rows, name)


def tenx_v3(path: Path, antibodies: int = 0) -> Path:
    rows = counts()
    kinds = ["Gene Expression"] * (N_VARS - antibodies) + ["Antibody Capture"] * antibodies
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        write_arrays(group, rows, CELLS)
        for name, values in (("id", IDS), ("name", SYMBOLS), ("feature_type", kinds), ("genome", ["GRCh38"] * N_VARS)):
            group[f"features/{name}"] = strings(values)
    return path


def tenx_v2(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        group = file.create_group("GRCh38")
        write_arrays(group, counts(), CELLS)
        group["genes"], group["gene_names"] = strings(IDS), strings(SYMBOLS)
    return path


def mtx_folder(
    folder: Path, version: int = 3, packed: bool = True, by: str = "cells", field: str = "integer", prefix: str = ""
) -> Path:
    folder.mkdir()
    entries = counts().tocoo() if by == "cells" else counts().tocsc().tocoo()
    if by == "nothing":
        order = np.random.default_rng(0).permutation(entries.nnz)
        entries = sp.coo_matrix((entries.data[order], (entries.row[order], entries.col[order])), shape=entries.shape)
    number = "{:d}" if field == "integer" else "{:.1f}"
    lines = [f"%%MatrixMarket matrix coordinate {field} general", '%metadata_json: {"a": 1}']
    lines.append(f"{N_VARS} {N_OBS} {entries.nnz}")
    for row, column, value in zip(entries.row, entries.col, entries.data, strict=True):
        lines.append(f"{column + 1} {row + 1} {number.format(value)}")
    kinds = ["\tGene Expression"] * N_VARS if version == 3 else [""] * N_VARS
    texts = {
        "matrix.mtx": lines,
        "features.tsv" if version == 3 else "genes.tsv": [
            f"{ident}\t{symbol}{kind}" for ident, symbol, kind in zip(IDS, SYMBOLS, kinds, strict=True)
        ],
        "barcodes.tsv": CELLS,
    }
    for name, text in texts.items():
        content = ("\n".join(text) + "\n").encode()
        (folder / f"{prefix}{name}{'.gz' if packed else ''}").write_bytes(gzip.compress(content) if packed else content)
    return folder


def loom(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=counts().toarray().T, chunks=(8, 8), compression="gzip")
        file["layers/spliced"] = counts().toarray().T * 2
        file["row_attrs/Gene"], file["row_attrs/Accession"] = strings(SYMBOLS), strings(IDS)
        file["col_attrs/CellID"], file["col_attrs/age"] = strings(CELLS), np.arange(N_OBS)
    return path


def h5mu(path: Path, *others: str) -> Path:
    adata().write_h5ad(path.with_suffix(".h5ad"))
    with h5py.File(path.with_suffix(".h5ad")) as file, h5py.File(path, "w") as target:
        parts = target.create_group("mod")
        for name in ("rna", *others):
            file.copy("/", parts, name)
        for name in ("obs", "var"):
            target.copy(file[name], name)
    path.with_suffix(".h5ad").unlink()
    return path


def spatial(path: Path, folder: str = "tables", names: tuple[str, ...] = ("table",)) -> Path:
    import zarr

    zarr.open_group(path, mode="w").create_group(folder)
    for name in names:
        adata().write_zarr(path / folder / name)
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "10x version 3": lambda folder: tenx_v3(folder / "a.h5"),
    "10x version 2": lambda folder: tenx_v2(folder / "a.h5"),
    "folder version 3": lambda folder: mtx_folder(folder / "a"),
    "folder version 2, not packed": lambda folder: mtx_folder(folder / "a", version=2, packed=False),
    "folder by genes": lambda folder: mtx_folder(folder / "a", by="genes"),
    "folder in no order": lambda folder: mtx_folder(folder / "a", by="nothing", field="real"),
    "folder of a sample": lambda folder: mtx_folder(folder / "a", prefix="GSM1_liver_"),
    "loom": lambda folder: loom(folder / "a.loom"),
    "h5mu": lambda folder: h5mu(folder / "a.h5mu", "prot"),
    "h5mu, named": lambda folder: h5mu(folder / "a.h5mu", "prot") / "mod" / "prot",
    "h5mu, named in short": lambda folder: h5mu(folder / "a.h5mu", "prot") / "prot",
    "SpatialData": lambda folder: spatial(folder / "a.zarr"),
    "SpatialData, the older": lambda folder: spatial(folder / "a.zarr", "table"),
    "SpatialData, named": lambda folder: spatial(folder / "a.zarr", names=("b", "c")) / "tables" / "c",
}


def rows_of(source: CellSource, *bounds: int) -> sp.csr_matrix:
    parts = []
    for start, stop in zip([0, *bounds], [*bounds, source.n_obs], strict=True):
        indptr, indices, data = source.read_rows(start, stop)
        parts.append(sp.csr_matrix((data, indices, indptr), shape=(stop - start, source.n_vars)))
    stacked = sp.vstack(parts).tocsr()
    stacked.sum_duplicates()
    return stacked


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_cells(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_BLOCK_ENTRIES", 64)
    monkeypatch.setattr(tenx_mtx, "_BLOCK_BYTES", 200)
    path = FORMATS[form](tmp_path)
    anndata_inside = "h5mu" in form or "Spatial" in form
    with open_cells(path, gene_symbols="symbol" if anndata_inside else None) as source:
        assert (source.n_obs, source.n_vars) == (N_OBS, N_VARS)
        assert (rows_of(source, 1, 20, 59) != counts()).nnz == 0
        assert source.var_names == SYMBOLS
        assert source.cell_name(11) == CELLS[11]
        assert list(source.obs().index) == CELLS
        # Counts of a symbol that two features have are added, as those of a var column that the user names.
        assert map_genes(source, Vocabulary(["G3", "G5"])).gene_ids.tolist() == [
            {"G3": 0, "G5": 1}.get(symbol, -1) for symbol in SYMBOLS
        ]
        source.suspend()
        assert (rows_of(source, 30) != counts()).nnz == 0
        assert source.cell_name(3) == CELLS[3]
    with open_cells(path, gene_symbols=None if anndata_inside else _ids(form)) as source:
        assert source.var_names == IDS


def _ids(form: str) -> str:
    return "Accession" if form == "loom" else "gene_ids"


def test_stored_entries_without_reading(tmp_path: Path) -> None:
    for path in (tenx_v3(tmp_path / "a.h5"), mtx_folder(tmp_path / "b")):
        with open_cells(path) as source:
            assert source.stored_entries is not None
            assert source.stored_entries.tolist() == np.diff(counts().indptr).tolist()
    with open_cells(loom(tmp_path / "c.loom"), layer="spliced") as source:
        assert source.stored_entries is None
        assert (rows_of(source) != counts() * 2).nnz == 0


def test_features_that_are_no_genes_have_no_name(tmp_path: Path) -> None:
    with open_cells(tenx_v3(tmp_path / "a.h5", antibodies=4)) as source:
        assert source.var_names == [*SYMBOLS[:-4], "", "", "", ""]
        assert source.var["feature_types"].value_counts().to_dict() == {"Gene Expression": 26, "Antibody Capture": 4}
        assert map_genes(source, Vocabulary(["G3"])).gene_ids[-1] == LEFT_OUT


@pytest.mark.parametrize("version", [2, 3])
def test_genomes_are_matrices(version: int, tmp_path: Path) -> None:
    path = tmp_path / "two.h5"
    human = np.arange(N_VARS) < 18
    with h5py.File(path, "w") as file:
        if version == 2:
            for genome, columns in (("GRCh38", human), ("mm10", ~human)):
                write_arrays(file.create_group(genome), counts()[:, columns], CELLS)
                file[genome]["genes"] = strings(np.array(IDS)[columns])
                file[genome]["gene_names"] = strings(np.array(SYMBOLS)[columns])
        else:
            write_arrays(file.create_group("matrix"), counts(), CELLS)
            genomes = np.where(human, "GRCh38", "mm10")
            for name, values in (("id", IDS), ("name", SYMBOLS)):
                prefixed = [f"{genome}_{value}" for genome, value in zip(genomes, values, strict=True)]
                file[f"matrix/features/{name}"] = strings(prefixed)
            file["matrix/features/genome"] = strings(genomes)
            file["matrix/features/feature_type"] = strings(["Gene Expression"] * N_VARS)
    with pytest.raises(ValueError, match=r"two\.h5: expected X, got .*its matrices: GRCh38, mm10"):
        open_cells(path)
    for genome, columns in (("GRCh38", human), ("mm10", ~human)):
        with open_cells(path, layer=genome) as source:
            named = [i for i, name in enumerate(source.var_names) if name]
            assert [source.var_names[i] for i in named] == np.array(SYMBOLS)[columns].tolist()
            assert (rows_of(source)[:, named] != counts()[:, columns]).nnz == 0


def test_what_a_folder_of_text_may_not_be(tmp_path: Path) -> None:
    def changed(name: str, edit: Callable[[bytes], bytes], file: str = "matrix.mtx") -> Path:
        folder = mtx_folder(tmp_path / name, packed=False)
        (folder / file).write_bytes(edit((folder / file).read_bytes()))
        return folder

    size = f"{N_VARS} {N_OBS} {counts().nnz}".encode()
    last = re.compile(rb"\n(\S+) (\S+) (\S+)\n$")
    for folder, message in (
        (changed("cut", lambda text: text[:-20]), r"expected .* entries, as its size line says, got|row, column and"),
        (changed("short", lambda text: text.replace(size, size[:-1] + b"9")), "expected .* entries, as its size line"),
        (changed("word", lambda text: text + b"a b c\n"), "expected lines of row, column and value"),
        (changed("complex", lambda text: text.replace(b"integer", b"complex")), "integer .or real. general"),
        (changed("gene", lambda text: last.sub(rb"\n31 \2 \3\n", text)), "expected features 1 to 30, got 1 to 31"),
        (changed("none", lambda text: last.sub(rb"\n0 \2 \3\n", text)), "expected features 1 to 30, got 0 to 30"),
        (changed("cell", lambda text: last.sub(rb"\n\1 0 \3\n", text)), f"expected cells 1 to {N_OBS}, got 0 to"),
        (changed("between", lambda text: last.sub(rb"\n1.5 \2 \3\n", text)), "expected features 1 to 30, got 1 to 30"),
        (changed("other", lambda text: text + b"AAX-1\n", "barcodes.tsv"), "do not belong together"),
        (changed("text", lambda text: text + b"\xff\n", "barcodes.tsv"), "barcodes.tsv cannot be read: .*damaged or"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_cells(folder)
        assert str(folder) in str(error.value)
    packed = mtx_folder(tmp_path / "packed")
    content = (packed / "matrix.mtx.gz").read_bytes()
    (packed / "matrix.mtx.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"matrix\.mtx\.gz cannot be unpacked: .*; the file is damaged or truncated"):
        open_cells(packed)
    content = (packed / "barcodes.tsv.gz").read_bytes()
    for damaged in (content[: len(content) // 2], content[:10] + b"\xff" * 20, content[:2] + b"\xff" + content[3:]):
        (packed / "barcodes.tsv.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"barcodes\.tsv\.gz cannot be read: .*; the file is damaged or truncated"):
            open_cells(packed)
    two = mtx_folder(tmp_path / "two", prefix="A_")
    for file in mtx_folder(tmp_path / "more", prefix="B_").iterdir():
        file.rename(two / file.name)
    with pytest.raises(ValueError, match=r"matrix of one sample, got A_matrix\.mtx, B_matrix\.mtx"):
        open_cells(two)


def test_no_room_for_a_matrix_that_is_turned_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(matrix.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"a: no room for .* GB in the temporary folder .* TMPDIR$"):
        open_cells(mtx_folder(tmp_path / "a"))


def test_modalities_and_tables_are_named(tmp_path: Path) -> None:
    path = h5mu(tmp_path / "a.h5mu", "prot")
    with pytest.raises(ValueError, match=r"expected a modality that it has \(prot, rna\), got 'atac'"):
        open_cells(path / "atac")
    with h5py.File(path, "r+") as file:
        file.move("mod/rna", "mod/atac")
    with pytest.raises(ValueError, match=r"got atac, prot in mod; name one in the path: .*a\.h5mu/mod/atac or "):
        open_cells(path)
    store = spatial(tmp_path / "s.zarr", names=("one", "two"))
    with pytest.raises(ValueError, match=r"got one, two in tables; name one in the path: .*s\.zarr/tables/one or "):
        open_cells(store)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_cells(tenx_v3(tmp_path / "a.h5") / "rna")


REFUSED = {
    "cells.csv": (b"gene,c1\nA,1\n", "is a table of text; make it sparse once"),
    "cells.tsv.gz": (gzip.compress(b"gene\tc1\nA\t1\n"), "is a table of text; make it sparse once"),
    "cells.rds": (b"\x1f\x8b\x08\x00RDS", "is an object of R; write it from there: anndataR"),
    "matrix.mtx": (b"%%MatrixMarket matrix coordinate integer general\n", "a matrix without its genes and cells; give"),
    "cells.h5ad.gz": (gzip.compress(b"\x89HDF"), "packed with gzip; unpack it: gunzip"),
    "cells.zip": (b"PK\x03\x04", "an archive; unpack it"),
    "._cells.h5ad": (b"\x00\x05\x16\x07\x00\x02", "a companion file that macOS leaves"),
    "cells.h5ad": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "page.h5ad": (b"<!DOCTYPE html><html>", "a web page, not the data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_named_with_its_cure(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_cells(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_folders_say_what_to_give_of_them(tmp_path: Path) -> None:
    outs, many, text = (tmp_path / name for name in ("outs", "many", "text"))
    for folder in (outs, many, text):
        folder.mkdir()
    mtx_folder(outs / "filtered_feature_bc_matrix")
    for name in "ab":
        adata().write_h5ad(many / f"{name}.h5ad")
    (text / "a.csv").write_text("x\n")
    for folder, message in (
        (outs, r"wrote; give .*outs/filtered_feature_bc_matrix"),
        (many, r"is a folder of data sets \(a\.h5ad, b\.h5ad\); give one of them \(pretrain takes a folder\)"),
        (text, r"files that are not read \(a\.csv\); a\.csv is a table of text"),
    ):
        with pytest.raises(ValueError, match=message):
            open_cells(folder)
    with h5py.File(tmp_path / "seurat.h5", "w") as file:
        file.create_group("assays")
    with pytest.raises(ValueError, match="h5Seurat"):
        open_cells(tmp_path / "seurat.h5")
    with h5py.File(tmp_path / "molecule_info.h5", "w") as file:
        file["barcode_idx"] = [1]
    with pytest.raises(ValueError, match=r"list of molecules; give filtered_feature_bc_matrix\.h5"):
        open_cells(tmp_path / "molecule_info.h5")


def test_folders_for_training_leave_hidden_files_out(tmp_path: Path) -> None:
    adata().write_h5ad(tmp_path / "b.h5ad")
    loom(tmp_path / "c.loom")
    (tmp_path / "._b.h5ad").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".hidden.zarr").mkdir()
    assert expand_data(tmp_path) == [tmp_path / "b.h5ad", tmp_path / "c.loom"]
    folder = mtx_folder(tmp_path / "10x")
    assert expand_data(folder) == [folder]
    (tmp_path / "text").mkdir()
    with pytest.raises(FileNotFoundError, match="got none: expected an h5ad file or a zarr store, got another folder"):
        expand_data(tmp_path / "text")


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_attributes_of_fixed_length(form: str, tmp_path: Path) -> None:
    """As HDF5.jl and R write them; also as arrays of one string."""
    cells = adata()
    cells.X = {"csr": cells.X, "csc": cells.X.tocsc(), "dense": cells.X.toarray()}[form]
    cells.obs["batch"] = cells.obs["batch"].astype("category")
    cells.write_h5ad(tmp_path / "a.h5ad")

    def fix(name: str, node: Any) -> None:
        for key, value in list(node.attrs.items()):
            if isinstance(value, str):
                del node.attrs[key]
                node.attrs[key] = np.bytes_(value) if "X" in name else np.array([value.encode()])

    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file.visititems(fix)
    with open_cells(tmp_path / "a.h5ad", gene_symbols="symbol") as source:
        assert source.var_names == SYMBOLS
        assert (rows_of(source, 30) != counts()).nnz == 0
        assert source.cell_name(2) == CELLS[2]


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize(("indices", "indptr"), [("uint32", "uint64"), ("uint64", "uint64"), ("float64", "float64")])
def test_offsets_of_other_types(form: str, indices: str, indptr: str, tmp_path: Path) -> None:
    cells, path = adata(), tmp_path / "a.h5ad"
    cells.X = cells.X if form == "csr" else cells.X.tocsc()
    cells.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for name, dtype in (("indices", indices), ("indptr", indptr)):
            values = file["X"][name][:]
            del file["X"][name]
            file["X"][name] = values.astype(dtype)
    with open_cells(path) as source:
        assert (rows_of(source, 30) != counts()).nnz == 0
    with h5py.File(path, "r+") as file:
        offsets = file["X/indptr"][:].astype(float)
        del file["X/indptr"]
        file["X/indptr"] = offsets + 0.5
    with pytest.raises(ValueError, match=r"a\.h5ad: expected whole numbers as indptr of a sparse matrix"):
        open_cells(path)


def test_columns_that_nobody_asked_for_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    adata().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for table in ("obs", "var"):
            odd = file[table].create_group("odd")
            odd.attrs.update({"encoding-type": "future-array", "encoding-version": "9.9"})
            order = [*file[table].attrs["column-order"], "odd", "gone"]
            file[table].attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())
    with open_cells(path) as source:
        assert source.var_names == IDS
        assert list(source.var.columns) == ["symbol"]
        assert list(source.obs().columns) == ["batch"]
        assert source.obs()["batch"].tolist() == ["a", "b"] * (N_OBS // 2)
    with pytest.raises(ValueError, match=r"gene_symbols: var\['odd'\] cannot be read: .*future-array"):
        open_cells(path, gene_symbols="odd")


def spoil(path: Path, place: str) -> None:
    """Bytes of a data set that gzip does not unpack."""
    with h5py.File(path, "r+") as file:
        names = file[place][:]
        attributes = dict(file[place].attrs)
        del file[place]
        kind = names.dtype if names.dtype.kind == "S" else h5py.string_dtype()
        file.create_dataset(place, data=names, dtype=kind, chunks=names.shape, compression="gzip").attrs.update(
            attributes
        )
        stored = file[place].id.get_chunk_info(0)
    with path.open("r+b") as raw:
        raw.seek(stored.byte_offset)
        raw.write(b"\xff" * stored.size)


@pytest.mark.parametrize("form", ["10x version 3", "loom", "h5ad"])
def test_names_of_cells_that_cannot_be_read(form: str, tmp_path: Path) -> None:
    """The cells can be read all the same; messages go without the name."""
    path, place = tmp_path / "a.h5ad", "obs/_index"
    if form == "h5ad":
        adata().write_h5ad(path)
    else:
        path, place = FORMATS[form](tmp_path), {"loom": "col_attrs/CellID"}.get(form, "matrix/barcodes")
    spoil(path, place)
    with open_cells(path) as source:
        assert (rows_of(source, 30) != counts()).nnz == 0
        assert source.cell_name(3) == "a name that cannot be read"
        with pytest.raises(UnreadableCells, match=rf"^{path}: cannot read obs: "):
            source.obs()


def test_slots_of_encoding_null_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    cells = adata()
    cells.layers["counts"], cells.X = cells.X, None
    cells.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for name in ("X", "raw"):
            if name in file:
                del file[name]
            null = file.create_dataset(name, data=h5py.Empty("f"))
            null.attrs.update({"encoding-type": "null", "encoding-version": "0.1.0"})
    with pytest.raises(ValueError, match="expected X, got a data set without it; its matrices: counts"):
        open_cells(path)
    with open_cells(path, layer="counts") as source:
        assert source.other_layers == []
    backed = anndata.read_h5ad(path, backed="r")
    with contextlib.closing(backed.file), open_cells(backed, layer="counts") as source:
        assert source.other_layers == []
        assert (rows_of(source) != counts()).nnz == 0


def test_the_layer_x_is_x_unless_one_has_that_name(tmp_path: Path) -> None:
    cells = adata()
    with open_cells(cells, layer="X") as source:
        assert source.layer is None
    cells.layers["X"] = cells.X * 2
    with open_cells(cells, layer="X") as source:
        assert (rows_of(source) != counts() * 2).nnz == 0


def test_rows_that_do_not_fit_obs(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    adata().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        names = file["obs/_index"][:-1]
        del file["obs/_index"]
        file["obs/_index"] = names
    with pytest.raises(
        ValueError, match=f"expected {N_OBS - 1} rows as obs has rows, got {N_OBS}; the file is damaged"
    ):
        open_cells(path)


@pytest.mark.parametrize(("zarr_format", "consolidated"), [(2, True), (2, False), (3, False)])
def test_damaged_metadata_is_named_or_does_not_matter(zarr_format: int, consolidated: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    cells = adata()
    cells.layers["other"], cells.obsm["X_pca"], cells.raw = cells.X * 2, np.ones((N_OBS, 2)), cells.copy()
    with anndata.settings.override(zarr_write_format=zarr_format):
        cells.write_zarr(path)
    root = path / "zarr.json"
    if not consolidated and zarr_format == 2:
        (path / ".zmetadata").unlink()
    elif not consolidated:
        described = json.loads(root.read_text())
        del described["consolidated_metadata"]
        root.write_text(json.dumps(described))
    read, refused = set(), {}
    for file in sorted(each for each in path.rglob("*") if each.name in METADATA):
        content = file.read_bytes()
        file.write_text("{")
        name = str(file.relative_to(path))
        try:
            with open_cells(path, gene_symbols="symbol") as source:
                assert (rows_of(source, 30) != counts()).nnz == 0
                assert source.var_names == SYMBOLS
                read.add(name.partition("/")[0])
        except ValueError as error:
            refused[name] = str(error)
        file.write_bytes(content)
    assert read >= {"layers", "obsm", "raw", "uns"}
    assert ("zarr.json" if zarr_format == 3 else ".zgroup") in refused
    for name, told in refused.items():
        assert told.startswith(f"{path}: ")
        assert re.search(rf"{name} cannot|var: the index '_index' cannot|var\['symbol'\] cannot", told)
    parts = {name.partition("/")[0] for name in refused} - set(METADATA)
    assert parts == (set() if consolidated else {"X", "obs", "var"})


def test_a_compression_without_its_plugin_is_named(tmp_path: Path) -> None:
    """A filter number that no installation has stands for Zstandard where hdf5plugin is missing."""
    path = tmp_path / "a.h5ad"
    adata().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        values = file["X/data"][:]
        del file["X/data"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk(values.shape)
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple(values.shape)
        dataset = h5py.h5d.create(file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, space, properties)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, values.astype(np.float32))
    code = (
        "import sys; sys.modules['hdf5plugin'] = None\n"
        f"from xtrimogene.cells.sources import open_cells\nopen_cells({str(path)!r})"
    )
    done = subprocess.run([*warm.python(cells=True), "-c", code], capture_output=True, text=True)
    assert "a.h5ad: /X/data is compressed with Zstandard, which needs a plugin: pip install hdf5plugin" in done.stderr


def _hold_open(path: Path, opened: Any, done: Any) -> None:
    with h5py.File(path, "r+"):
        opened.set()
        done.wait(60)


def test_a_file_that_is_open_for_writing_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    adata().write_h5ad(path)
    context = multiprocessing.get_context("fork")
    opened, done = context.Event(), context.Event()
    writer = context.Process(target=_hold_open, args=(path, opened, done))
    writer.start()
    try:
        assert opened.wait(60)
        with pytest.raises(ValueError, match=r"a\.h5ad: is open for writing elsewhere; close it there"):
            open_cells(path)
    finally:
        done.set()
        writer.join()
    # What the HDF5 library says of a writer that was killed: its mark stays in the file.
    with h5py.File(tmp_path / "b.h5ad", "w", libver="latest") as file:
        file.create_dataset("obs", data=[1])
        file.flush()
        (tmp_path / "copy.h5ad").write_bytes((tmp_path / "b.h5ad").read_bytes())
    with pytest.raises(
        ValueError, match=r"copy\.h5ad: is open for writing elsewhere, or its writer was killed.*h5clear"
    ):
        open_cells(tmp_path / "copy.h5ad")


def test_a_suspended_file_that_changes_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    adata().write_h5ad(path)
    with open_cells(path) as source:
        source.suspend()
        os.utime(path, ns=(1, 1))  # who touches a file does not change it
        assert (rows_of(source, 30) != counts()).nnz == 0
        source.suspend()
        adata()[:30].copy().write_h5ad(path)
        with pytest.raises(ValueError, match=r"a\.h5ad: .*changed while it was read; run again"):
            source.read_rows(0, 5)


def test_too_many_open_files_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    path = tmp_path / "a.h5ad"
    adata().write_h5ad(path)
    with open_cells(path) as source:
        source.suspend()
        monkeypatch.setattr(h5py, "File", full)
        monkeypatch.setattr(hdf5, "more_open_files", lambda: False)
        with pytest.raises(OSError, match=r"^.*a\.h5ad: too many open files; raise the limit with `ulimit -n"):
            source.read_rows(0, 5)


def test_a_file_is_not_closed_while_another_thread_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    adata().write_h5ad(path)
    with open_cells(path) as source:
        stop = threading.Event()

        def suspend() -> None:
            while not stop.is_set():
                source.suspend()

        other = threading.Thread(target=suspend)
        other.start()
        try:
            for _ in range(100):
                assert (rows_of(source, 30) != counts()).nnz == 0
        finally:
            stop.set()
            other.join()


def test_the_handle_is_given_back(tmp_path: Path) -> None:
    path = tenx_v3(tmp_path / "a.h5")
    file = HdfFile(path)
    root = file.root
    file.close()
    assert not root
    assert file.root["matrix/barcodes"].shape == (N_OBS,)
    file.close()
