"""AnnData inside larger files: the modalities of MuData (h5mu) and the tables of SpatialData."""

from __future__ import annotations

from typing import Any

# Modalities that hold gene expression, as muon and others name them.
_EXPRESSION = ("rna", "gex", "RNA", "GEX", "gene_expression", "Gene Expression")


def has_inner(root: Any) -> bool:
    """Whether a file or store holds AnnData in parts of its own."""
    return "mod" in root or "tables" in root or ("table" in root and "obs" not in root)


def inner_group(root: Any, part: str | None, name: str) -> tuple[Any, str]:
    """The part of a file that holds the cells, and the format in words.

    part is its name where the user gave one (FILE.h5mu/prot). Without one: gene expression, or the only table.
    Raises ValueError that names the parts.
    """
    if "mod" in root:
        return _chosen(root["mod"], part, "modality", "mod", name, _EXPRESSION), "MuData"
    folder = "tables" if "tables" in root else "table"
    return _chosen(root[folder], part, "table", folder, name, ()), "SpatialData"


def _chosen(group: Any, part: str | None, word: str, folder: str, name: str, preferred: tuple[str, ...]) -> Any:
    names = list(group)
    if part is not None:
        wanted = part.removeprefix(f"{folder}/")
        if wanted not in names:
            raise ValueError(f"expected one of its {word} names ({', '.join(names) or 'none'}), got {wanted!r}")
        return group[wanted]
    fitting = [each for each in preferred if each in names] or (names if len(names) == 1 else [])
    if not fitting:
        choices = " or ".join(f"{name}/{folder}/{each}" for each in names)
        raise ValueError(
            f"expected the {word} with the gene expression, got {', '.join(names) or 'none'} in {folder}"
            + (f"; name one in the path: {choices}" if names else "")
        )
    return group[fitting[0]]
