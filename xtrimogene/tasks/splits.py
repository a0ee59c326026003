"""Labels of cells and the part of them that a fit keeps for validation, never cells of one group on both sides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from xtrimogene.cells.sources import CellSource

Names = npt.NDArray[np.object_]
_SHOWN = 5


def need(package: str, why: str, extra: str, least: str | None = None) -> None:
    """Raises ImportError, which says what to install, where a package is missing or older than version `least`."""
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{why} needs {package}, which is not installed: pip install 'xtrimogene[{extra}]'") from None
    if least is not None and _numbers(found) < _numbers(least):
        raise ImportError(
            f"{why} needs {package} {least} or later, and {found} is installed: pip install -U 'xtrimogene[{extra}]'"
        )


def _numbers(version: str) -> list[int]:
    """The first two numbers of a version: 1.10.2 is later than 1.9."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def column_of(sources: Iterable[CellSource], column: str, option: str) -> Names:
    """(cells,) the values, as text, of one column of obs over several data sets; option is what messages call it.

    Raises ValueError where a data set lacks the column, or a cell a value.
    """
    found = []
    for source in sources:
        obs = source.obs()
        if column not in obs.columns:
            known = ", ".join(map(str, obs.columns)) or "none"
            raise ValueError(f"{source.name}: {option}: expected a column of obs, got {column!r}; columns: {known}")
        values = obs[column]
        missing = values.isna() | (values.astype(str).str.strip() == "")
        if missing.any():
            raise ValueError(
                f"{source.name}: {option}: expected a value for every cell, got none for {int(missing.sum()):,} of "
                f"{len(values):,} in obs[{column!r}], such as {source.cell_name(int(np.argmax(missing)))!r}; take "
                "these cells out"
            )
        found.append(values.astype(str).to_numpy(object))
    return np.concatenate(found)


def check_varied(labels: Names, option: str, least: int = 2) -> None:
    """Refuses labels that are all the same, and those of which there are fewer than `least` cells each."""
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2:
        raise ValueError(
            f"{option}: expected at least two different labels, got {names.tolist()} for all {len(labels):,} cells; "
            "name another column"
        )
    rare = names[counts < least]
    if len(rare):
        raise ValueError(
            f"{option}: expected at least {least} cells of each label, got fewer of {listed(rare)}; take them out, or "
            "give them a broader label"
        )


def listed(names: Sequence[Any] | npt.NDArray[Any]) -> str:
    """Some names for a message, and how many more there are."""
    shown = ", ".join(repr(str(name)) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN:,} more"


def validation_part(
    labels: Names | None, groups: Names | None, *, share: float, seed: int, count: int | None = None
) -> npt.NDArray[np.bool_]:
    """(cells,) which cells are kept for validation: about a share of them, whole groups where there are groups.

    labels  kinds of cells that shall be on both sides, each about as often as among all; None for no kinds
    groups  what the cells come from, such as donors: none of them is on both sides; None where each cell is its own
    count   number of cells where there are neither labels nor groups

    Raises ValueError where there is one group only, or labels that are found in one group only: what is learned of
    them could not be told from what is learned of the group.
    """
    need("scikit-learn", "the split", "annotate")
    from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedGroupKFold, StratifiedShuffleSplit

    size = len(labels) if labels is not None else len(groups) if groups is not None else int(count or 0)
    chosen = np.zeros(size, bool)
    places = np.zeros(size)
    if groups is None:
        if labels is None:
            splitter: Any = ShuffleSplit(1, test_size=share, random_state=seed)
        else:
            kinds = len(np.unique(labels))
            most = size - kinds
            splitter = StratifiedShuffleSplit(
                1, test_size=min(max(kinds, round(share * size)), most), random_state=seed
            )
        chosen[next(splitter.split(places, labels))[1]] = True
        return chosen
    names = np.unique(groups)
    if len(names) < 2:
        raise ValueError(f"group: expected at least two groups, got {names.tolist()} for all cells; leave it out")
    if labels is None:
        splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
        chosen[next(splitter.split(places, groups=groups))[1]] = True
        return chosen
    check_grouped(labels, groups)
    folds = min(max(2, round(1 / share)), len(names))
    best = None
    for _, part in StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(places, labels, groups):
        held = np.zeros(size, bool)
        held[part] = True
        untrained = len(np.unique(labels)) - len(np.unique(labels[~held]))
        unseen = len(np.unique(labels)) - len(np.unique(labels[held]))
        # Every label has to be trained on; as many as possible are validated.
        if not untrained and held.any() and (best is None or unseen < best[0]):
            best = (unseen, held)
    if best is None:
        raise ValueError(
            f"group: expected groups of which some can be kept for validation with every label still in the others, "
            f"got none such among {len(names):,}; give more groups, or leave it out"
        )
    return best[1]


def check_grouped(labels: Names, groups: Names) -> None:
    """Refuses labels that are found in one group only."""
    pairs = {(label, group) for label, group in zip(labels, groups, strict=True)}
    names, counts = np.unique([label for label, _ in pairs], return_counts=True)
    single = names[counts < 2]
    if len(single):
        raise ValueError(
            f"group: expected every label in at least two groups, got {len(single):,} of {len(names):,} in one group "
            f"only: {listed(single)}; take them out, or leave the group out"
        )
