"""AnnData inside larger files: the modalities of MuData (h5mu) and the tables of SpatialData."""

from __future__ import annotations

from typing import Any

# Modalities that hold gene expression, as muon and others name them.
_EXPRESSION = ("rna", "gex", "RNA", "GEX", "gene_expression", "Gene Expression")


def has_inner(root: Any) -> bool:
    """Whether a file or store holds AnnData in parts of its own."""
    return "mod" in root or "tables" in root or ("table" in root and "obs" not in root)


def folder_of_parts(root: Any) -> tuple[str, str]:
    """Where the parts are, and the format in words."""
    if "mod" in root:
        return "mod", "MuData"
    return ("tables" if "tables" in root else "table"), "SpatialData"


def chosen_part(names: list[str], part: str | None, folder: str, name: str) -> str:
    """The part that holds the cells: the one that the user named (FILE.h5mu/prot), else gene expression, else the only
    one.

    Raises ValueError that names the parts.
    """
    word = "modality" if folder == "mod" else "table"
    if part is not None:
        wanted = part.removeprefix(f"{folder}/")
        if wanted not in names:
            raise ValueError(f"expected a {word} that it has ({', '.join(names) or 'none'}), got {wanted!r}")
        return wanted
    preferred = [each for each in _EXPRESSION if each in names] if folder == "mod" else []
    fitting = preferred or (names if len(names) == 1 else [])
    if fitting:
        return fitting[0]
    choices = " or ".join(f"{name}/{folder}/{each}" for each in names)
    raise ValueError(
        f"expected the {word} with the gene expression, got {', '.join(names) or 'none'} in {folder}"
        + (f"; name one in the path: {choices}" if names else "")
    )
