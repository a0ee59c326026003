"""HDF5 files of 10x Cell Ranger: one group per genome (version 2), or the group matrix (version 3 and later).

The matrix is genes x cells by columns, so that its arrays are those of cells x genes by rows.
"""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
import pandas as pd

from xtrimogene.cells.formats.contents import Contents
from xtrimogene.cells.hdf5 import HdfFile, texts
from xtrimogene.cells.matrix import SparseRows, sparse_rows

GENES = "Gene Expression"
# Symbols are not unique in 10x references: taken as a column of names, counts of one gene are added.
NAMES = "gene_symbols"


def is_tenx_root(root: Any) -> bool:
    """Whether an HDF5 file is one of Cell Ranger's."""
    return bool(_groups(root))


def tenx_contents(file: HdfFile) -> Contents:
    """A file with several genomes has a matrix for each, named as it; its genes are those of that genome."""
    groups = _groups(file.root)
    versions = "version 3" if groups == ["matrix"] else "version 2"
    var = {group: _features(file.root[group]) for group in groups}
    # Where each matrix is: (group, genome whose genes count, None for all)
    places: dict[str | None, tuple[str, str | None]] = {}
    if len(groups) > 1:
        places = {group: (group, None) for group in groups}
    else:
        table = var[groups[0]]
        genomes = sorted({genome for genome in table["genome"][_is_gene(table)] if genome})
        places = {genome: (groups[0], genome) for genome in genomes} if len(genomes) > 1 else {None: (groups[0], None)}

    def matrix(layer: str | None) -> SparseRows:
        group = file.root[places[layer][0]]
        genes, cells = (int(size) for size in group["shape"][:])
        return sparse_rows((cells, genes), group, file.array)

    def table_of(layer: str | None) -> pd.DataFrame:
        group, genome = places[layer]
        return tenx_var(var[group], genome)

    def barcodes(layer: str | None) -> h5py.Dataset:
        return file.root[places[layer][0]]["barcodes"]

    return Contents(
        f"10x Cell Ranger h5, {versions}",
        list(places),
        matrix,
        table_of,
        lambda layer: pd.DataFrame(index=texts(barcodes(layer))),
        lambda layer, row: texts(barcodes(layer))[row],
        lambda layer: int(barcodes(layer).shape[0]),
        names_column=NAMES,
        file=file,
    )


def tenx_var(features: pd.DataFrame, genome: str | None = None) -> pd.DataFrame:
    """var of a table of features (gene_ids, names, feature_types, genome): features that are no genes, or of another
    genome than the given one, have no name in column NAMES, and so are left out."""
    names = features["name"].astype(object)
    wanted = _is_gene(features)
    if genome is not None:
        wanted &= features["genome"] == genome
        names = names.str.removeprefix(genome).str.lstrip("_").where(names.str.startswith(genome + "_"), names)
    ids = features["gene_ids"]
    if genome is not None:
        ids = ids.str.removeprefix(genome).str.lstrip("_").where(ids.str.startswith(genome + "_"), ids)
    var = pd.DataFrame({NAMES: names.where(wanted, None), "gene_ids": ids.where(wanted, None)})
    var["feature_types"], var["genome"] = features["feature_types"], features["genome"]
    return var.set_axis(pd.Index(names.to_numpy()), axis=0)


def _is_gene(features: pd.DataFrame) -> pd.Series:
    return features["feature_types"] == GENES


def _groups(root: Any) -> list[str]:
    """Names of the groups that hold a matrix of Cell Ranger's."""
    parts = {"barcodes", "data", "indices", "indptr", "shape"}
    return [
        key
        for key in root
        if isinstance(root[key], h5py.Group) and parts <= set(root[key]) and {"features", "genes"} & set(root[key])
    ]


def _features(group: h5py.Group) -> pd.DataFrame:
    if "features" not in group:
        ids = texts(group["genes"])
        names = texts(group["gene_names"]) if "gene_names" in group else ids
        return pd.DataFrame({"name": names, "gene_ids": ids, "feature_types": GENES, "genome": ""}, dtype=object)
    features = group["features"]
    ids = texts(features["id"])
    return pd.DataFrame(
        {
            "name": texts(features["name"]) if "name" in features else ids,
            "gene_ids": ids,
            "feature_types": texts(features["feature_type"]) if "feature_type" in features else GENES,
            "genome": texts(features["genome"]) if "genome" in features else "",
        },
        dtype=object,
        index=np.arange(len(ids)),
    )
