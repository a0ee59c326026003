"""What is no format that can be read: what it is, and how to make cells of it that can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xtrimogene.cells.formats.zarr_store import members

FORMATS = (
    "h5ad, zarr, 10x Cell Ranger (h5 or the folder of matrix.mtx), loom, h5mu, SpatialData and TileDB-SOMA are read"
)
_TABLE = (
    "a table of text; make it sparse once, in Python: adata = anndata.io.read_csv(FILE) (read_text for tabs; adata.T "
    "if genes are the rows), adata.X = scipy.sparse.csr_matrix(adata.X), adata.write_h5ad('cells.h5ad')"
)
_R = (
    "an object of R; write it from there: anndataR::write_h5ad(object, 'cells.h5ad') takes Seurat and "
    "SingleCellExperiment objects, with the counts"
)
_ARCHIVE = "an archive; unpack it and give what is in it"
_BY_SUFFIX = {
    **dict.fromkeys((".csv", ".tsv", ".txt", ".tab", ".dge"), _TABLE),
    **dict.fromkeys((".rds", ".rda", ".rdata", ".qs", ".qs2", ".robj"), _R),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z"), _ARCHIVE),
    ".mtx": "a matrix without its genes and cells; give the folder that has barcodes.tsv and features.tsv (or "
    "genes.tsv) beside it; else, in Python: adata = scanpy.read_mtx(FILE).T, set adata.var_names and adata.obs_names, "
    "adata.write_h5ad('cells.h5ad')",
    ".xlsx": "a spreadsheet; save it as CSV, and make that sparse with anndata",
    ".parquet": "a table; make an AnnData of it with a sparse matrix, and write that as h5ad",
    ".npz": "arrays without genes; make an AnnData of them, and write that as h5ad",
    ".pkl": "a pickle, which may run any program when it is loaded; write the cells as h5ad where you trust it",
    ".bam": "reads; count them first (cellranger count, STARsolo, alevin-fry)",
    ".fastq": "reads; count them first (cellranger count, STARsolo, alevin-fry)",
}
_BY_CONTENT = (
    (b"\x00\x05\x16\x07", "a companion file that macOS leaves beside the data; give the one without ._ in its name"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the data; fetch it with git lfs pull"),
    (b"<!doctype", "a web page, not the data; download the file itself"),
    (b"<html", "a web page, not the data; download the file itself"),
    (b"PK\x03\x04", _ARCHIVE),
    (b"\x1f\x8b", "packed with gzip; unpack it: gunzip FILE"),
    (b"BZh", _ARCHIVE),
)


def file_refusal(path: Path) -> str:
    """What a file that is not HDF5 is, and the cure."""
    what = _BY_SUFFIX.get(_suffix(path))
    with open(path, "rb") as file:
        head = file.read(64).lower()
    if what is None or head.startswith(b"\x00\x05\x16\x07"):
        what = next((told for start, told in _BY_CONTENT if head.startswith(start.lower())), what)
    if what is not None:
        return f"is {what}"
    return (
        "expected an h5ad file, got something that is not HDF5, or is cut off at its start; write one with "
        f"adata.write_h5ad ({FORMATS})"
    )


def hdf5_refusal(root: Any) -> str:
    """What an HDF5 file that holds no cells we know is, and the cure."""
    keys = list(root)
    if "assays" in keys:
        return f"is {_R} (this is an h5Seurat file)"
    if "barcode_idx" in keys or "molecule_info" in keys:
        return "is Cell Ranger's list of molecules; give filtered_feature_bc_matrix.h5, which is beside it"
    if {"obs", "var"} & set(keys):
        missing = " and ".join(key for key in ("obs", "var") if key not in keys)
        return f"expected an AnnData file, got one without {missing}"
    held = ", ".join(keys[:8]) or "nothing"
    return (
        f"expected an h5ad, 10x, loom or h5mu file, got HDF5 that holds {held}; write the cells with adata.write_h5ad"
    )


def store_refusal(root: Any) -> str:
    """What a zarr store that holds no cells we know is."""
    missing = " and ".join(key for key in ("obs", "var") if key not in root)
    held = ", ".join(members(root)[:8]) or "nothing"
    return f"expected an AnnData file, got one without {missing}; the store holds {held}"


def folder_refusal(folder: Path) -> str:
    """What a folder that is no data set is, and what to give of it."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    names = [entry.name for entry in entries]
    for inner in ("filtered_feature_bc_matrix", "filtered_gene_bc_matrices", "outs", "raw_feature_bc_matrix"):
        if inner in names:
            return f"is a folder that Cell Ranger wrote; give {folder / inner}, or the .h5 file of that name"
    data_sets = [name for name in names if Path(name).suffix in (".h5ad", ".zarr", ".h5mu", ".loom", ".h5")]
    if data_sets:
        more = f" and {len(data_sets) - 3} more" if len(data_sets) > 3 else ""
        return (
            f"is a folder of data sets ({', '.join(data_sets[:3])}{more}); give one of them (pretrain takes a folder), "
            "or join them with anndata.experimental.concat_on_disk"
        )
    if any(name.removesuffix(".gz").endswith(".mtx") for name in names):
        return (
            f"is a folder with a matrix, but not with the three files of 10x: it holds {', '.join(names[:6])}; "
            "expected matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), gzipped or not"
        )
    if len(entries) == 1 and entries[0].is_dir():
        return f"is a folder that holds only {entries[0].name}; give {entries[0]}"
    tables = [entry for entry in entries if _suffix(entry) in _BY_SUFFIX]
    if tables:
        told = ", ".join(each.name for each in tables[:3])
        return f"is a folder of files that are not read ({told}); {tables[0].name} is {_BY_SUFFIX[_suffix(tables[0])]}"
    held = f"holds {', '.join(names[:6])}" if names else "is empty"
    return f"expected an h5ad file or a zarr store, got another folder, which {held} ({FORMATS})"


def _suffix(path: Path) -> str:
    """The ending that says what a file is: .csv of cells.csv.gz too."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix
