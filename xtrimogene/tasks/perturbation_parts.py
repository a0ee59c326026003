"""Which perturbations of a screen a model is fitted to, which are kept for validation, and which for the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xtrimogene.cells.tables import tab_separated
from xtrimogene.tasks.conditions import Perturbation, name_of
from xtrimogene.tasks.splits import listed, validation_part

UNSEEN_SINGLE, UNSEEN_DOUBLE, NO_TEST = "unseen-single", "unseen-double", "none"
# The share of the test: as GEARS leaves out genes, and as pairs are left out in evaluations since.
TEST_SHARE = {UNSEEN_SINGLE: 0.25, UNSEEN_DOUBLE: 0.5}
_VALIDATION_SHARE = 0.2
_LEAST_FITTED = 3
_PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Parts:
    """Positions of perturbations; a model is fitted to the first two in the end, and judged by the third."""

    training: list[int]
    validation: list[int]
    test: list[int]
    how: str

    @property
    def fitted(self) -> list[int]:
        return sorted(self.training + self.validation)

    def named(self, perturbations: Sequence[Perturbation]) -> dict[str, list[Perturbation]]:
        """The perturbations of each part."""
        parts = {"training": self.training, "validation": self.validation, "test": self.test}
        return {name: [perturbations[number] for number in numbers] for name, numbers in parts.items()}


def parts_of(
    perturbations: Sequence[Perturbation],
    split: str | None,
    *,
    test_share: float | None = None,
    seed: int = 0,
    read: Callable[[str], Perturbation],
) -> Parts:
    """The parts of a screen's perturbations.

    Args:
        perturbations: all of them.
        split: "unseen-single" leaves genes out, and with them every perturbation that they are in, and as many of the
            other perturbations of several genes; "unseen-double" leaves out perturbations of several genes, and none of
            one; "none" leaves nothing out; else the path of a table, condition<tab>train|validation|test, in which what
            is not named is trained on. None: unseen-double where there are perturbations of several genes, else
            unseen-single.
        test_share: of genes, or of perturbations of several genes; None for a quarter and for half of them.
        read: (label) -> perturbation, for the table.

    The validation part is a fifth of what is not left out, if the table names none.

    Raises ValueError where a part would be too small, and for a table that does not fit.
    """
    several = [number for number, each in enumerate(perturbations) if len(each) > 1]
    if split is None:
        split = UNSEEN_DOUBLE if len(several) > 1 else UNSEEN_SINGLE
    if split in TEST_SHARE:
        share = TEST_SHARE[split] if test_share is None else test_share
        if not 0 < share <= 1:
            raise ValueError(f"test_share: expected a share above 0 and up to 1, got {test_share}")
    elif test_share is not None:
        raise ValueError(f"test_share: expected none with split={split!r}, got {test_share}; leave it out")
    rng = np.random.default_rng(seed)
    validation: list[int] = []
    if split == NO_TEST:
        test, how = set[int](), "no perturbation is left out"
    elif split == UNSEEN_SINGLE:
        genes = sorted({gene for each in perturbations for gene in each})
        left_out = set(rng.permutation(genes)[: max(1, round(share * len(genes)))].tolist())
        test = {number for number, each in enumerate(perturbations) if left_out & set(each)}
        others = [number for number in several if number not in test]
        test |= set(rng.permutation(others)[: round(share * len(others))].astype(int).tolist())
        how = f"{len(left_out):,} of {len(genes):,} perturbed genes are left out, and of the other pairs {share:.0%}"
    elif split == UNSEEN_DOUBLE:
        if not several:
            raise ValueError(
                "split: 'unseen-double' leaves perturbations of several genes out, and the screen has none; pass "
                "'unseen-single'"
            )
        test = set(rng.permutation(several)[: max(1, round(share * len(several)))].tolist())
        how = f"{len(test):,} of {len(several):,} perturbations of several genes are left out"
    else:
        found = _read_table(Path(split), perturbations, read)
        test = {number for number, part in found.items() if part == "test"}
        validation = sorted(number for number, part in found.items() if part == "validation")
        how = f"as {Path(split).name} says"
    rest = [number for number in range(len(perturbations)) if number not in test and number not in validation]
    if len(rest) + len(validation) < _LEAST_FITTED or not rest:
        raise ValueError(
            f"split: expected at least {_LEAST_FITTED} perturbations to fit to, got {len(rest) + len(validation)} of "
            f"{len(perturbations)}; leave fewer out (--test-share), or give a screen with more"
        )
    if not validation:
        chosen = validation_part(None, None, share=_VALIDATION_SHARE, seed=seed, count=len(rest))
        validation = [number for number, own in zip(rest, chosen.tolist(), strict=True) if own]
        rest = [number for number in rest if number not in validation]
    return Parts(rest, validation, sorted(test), how)


def _read_table(
    path: Path, perturbations: Sequence[Perturbation], read: Callable[[str], Perturbation]
) -> dict[int, str]:
    """Position of a perturbation -> its part."""
    try:
        table = tab_separated(path, "split")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"split: expected {UNSEEN_SINGLE}, {UNSEEN_DOUBLE}, {NO_TEST} or a file, got {str(path)!r}; no such file"
        ) from None
    place = {each: number for number, each in enumerate(perturbations)}
    found: dict[int, str] = {}
    unknown = []
    for number, cells in table:
        if number == 1 and cells[0] == "condition":
            continue
        if len(cells) != 2 or cells[1] not in _PARTS:
            raise ValueError(f"split {path}: line {number}: expected condition<tab>{'|'.join(_PARTS)}, got {cells}")
        perturbation = read(cells[0])
        if perturbation not in place:
            unknown.append(cells[0])
        elif found.setdefault(place[perturbation], cells[1]) != cells[1]:
            raise ValueError(f"split {path}: line {number}: {name_of(perturbation)} is in two parts")
    if unknown:
        raise ValueError(f"split {path}: expected perturbations of the screen with enough cells, got {listed(unknown)}")
    return found
