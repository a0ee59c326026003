"""Triples: two drugs on a cell line, in any order, each once, with what was measured of it; and folds that hold out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xtrimogene.tasks.splits import listed
from xtrimogene.tasks.synergy_tables import Drugs, Pairs, Table

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

# What folds hold out, what holds out most first; single triples where nothing else.
DRUG, LINE, PAIR, TRIPLE = "drug", "line", "pair", "triple"
KINDS = (PAIR, LINE, DRUG)
SYNERGY, ANTAGONISM, BETWEEN = 1, 0, -1
_CLASS_NAMES = {SYNERGY: "synergy", ANTAGONISM: "antagonism"}
SCORE, LABEL = "loewe", "label"
FOLD = "fold"
_VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Target:
    """What is learned.

    column     with what was measured
    labels     it holds 0 and 1; else scores
    scored     scores are learned too, not only classes
    above      scores above it are synergy, class 1
    below      scores below it are antagonism, class 0; what lies between has no class
    """

    column: str
    labels: bool
    scored: bool
    above: float
    below: float

    @classmethod
    def found(cls, table: Table, target: str | None, above: float, below: float) -> Target:
        """Raises ValueError where there is no such column, or bounds the wrong way around."""
        if not below <= above:
            raise ValueError(
                f"synergy_above, antagonism_below: expected the first not to be below the second, got {above}, {below}"
            )
        if target is None:
            target = next((each for each in (SCORE, LABEL) if each in table.header), None)
            if target is None:
                raise ValueError(
                    f"{table.name}: expected a column {SCORE!r} or {LABEL!r}, got {listed(table.header)}; name the one "
                    "with scores, or with 0 and 1, with target (--target)"
                )
        column = SCORE if target == LABEL and LABEL not in table.header and SCORE in table.header else target
        place = table.place(column)
        labels = {row[place] for _, row in table.rows} <= {"0", "1", "0.0", "1.0"}
        return cls(column, labels, not labels and target != LABEL, above, below)

    def classes(self, values: Array) -> Array:
        """(n,) int64 the class of each of n means of measurements."""
        above, below = (0.5, 0.5) if self.labels else (self.above, self.below)
        return np.where(values > above, SYNERGY, np.where(values < below, ANTAGONISM, BETWEEN))

    def __str__(self) -> str:
        if self.labels:
            return f"{self.column!r}, of 0 and 1"
        what = "scores and classes" if self.scored else "classes alone"
        return f"{self.column!r}, {what}: above {self.above:g} synergy, below {self.below:g} antagonism"


@dataclass(frozen=True)
class Triples:
    """Pairs on lines in any order, each once, ascending.

    codes    (n, 3) int64 molecules, the smaller number first, and line
    of_row   (rows,) int64 position of each row's triple, -1 for a row that is left out
    """

    codes: Array
    of_row: Array

    @classmethod
    def of(cls, molecules: Array, lines: Array) -> Triples:
        """Of (rows, 2) molecules and (rows,) lines, -1 for a line of which nothing is known."""
        codes = np.column_stack([np.sort(molecules, axis=1), lines])
        of_row = np.full(len(codes), -1, np.int64)
        found, of_row[lines >= 0] = np.unique(codes[lines >= 0], axis=0, return_inverse=True)
        return cls(found, of_row)

    def means(self, values: Array) -> Array:
        """(n,) the mean of each triple's rows."""
        own = self.of_row >= 0
        sums = np.bincount(self.of_row[own], values[own], minlength=len(self.codes))
        return sums / np.bincount(self.of_row[own], minlength=len(self.codes))

    def least(self, values: Array) -> Array:
        """(n,) the least number of each triple's rows, NaN where all are."""
        found = np.full(len(self.codes), np.inf)
        own = (self.of_row >= 0) & ~np.isnan(values)
        np.minimum.at(found, self.of_row[own], values[own])
        return np.where(np.isinf(found), np.nan, found)


@dataclass(frozen=True)
class Measured:
    """Triples and what was measured of them.

    pairs, triples  the rows, and what they are of
    target          what the numbers are
    values          (n,) float64 mean of the measurements of each triple
    classes         (n,) int64 1 synergy, 0 antagonism, -1 neither
    told            what is to be said of lines left out and of triples measured more than once
    """

    pairs: Pairs
    triples: Triples
    target: Target
    values: Array
    classes: Array
    told: list[str]

    @classmethod
    def of(cls, pairs: Pairs, drugs: Drugs, lines: Sequence[str], target: Target) -> Measured:
        """Raises ValueError for rows that cannot be read, by row, and for measurements that teach nothing."""
        values = pairs.numbers(target.column)
        place = {name: number for number, name in enumerate(lines)}
        line_codes = np.array([place.get(name, -1) for name in pairs.lines.tolist()], np.int64)
        triples = Triples.of(drugs.codes(pairs), line_codes)
        told = list(drugs.told)
        if (line_codes < 0).any():
            names = sorted(set(pairs.lines[line_codes < 0].tolist()))
            told.append(f"left out for lines without expression: {int((line_codes < 0).sum()):,} rows, {listed(names)}")
        counts = np.bincount(triples.of_row[triples.of_row >= 0], minlength=len(triples.codes))
        means = triples.means(values)
        classes = target.classes(means)
        if (counts > 1).any():
            repeated = triples.of_row >= 0
            repeated[repeated] = counts[triples.of_row[repeated]] > 1
            apart = np.sqrt(np.mean((values[repeated] - means[triples.of_row[repeated]]) ** 2))
            told.append(
                f"{int((counts > 1).sum()):,} triples are measured more than once, in either order of the drugs: the "
                f"mean is taken, of which a measurement is off by {apart:.3g} (root mean square)"
            )
        found = set(classes.tolist())
        if not {SYNERGY, ANTAGONISM} <= found:
            raise ValueError(
                f"{pairs.table.name}: expected triples of synergy and of antagonism by {target}, got "
                f"{int((classes == SYNERGY).sum()):,} and {int((classes == ANTAGONISM).sum()):,}; give others, or "
                "other bounds with synergy_above and antagonism_below (--synergy-above, --antagonism-below)"
            )
        return cls(pairs, triples, target, means, classes, told)

    @property
    def scores(self) -> Array | None:
        """(n,) where scores are learned, else None."""
        return self.values if self.target.scored else None


@dataclass(frozen=True)
class Folds:
    """Parts of triples, each held out once.

    kind   what is held out whole: no test triple's drug (one of both), line or pair is in the training part
    test   (folds, n) what is tested in each
    train  (folds, n) what may be trained on then
    told   in words
    """

    kind: str
    test: Mask
    train: Mask
    told: str

    @classmethod
    def made(cls, kind: str, codes: Array, count: int, seed: int) -> Folds:
        """Folds of about as many drugs, lines or pairs each, drawn at random. A triple whose drugs are in two folds is
        tested twice, and never trained on while either drug is held out.

        Raises ValueError for fewer than two folds, and for fewer drugs, lines or pairs than folds.
        """
        if count < 2:
            raise ValueError(f"folds: expected at least 2, got {count}")
        groups = _groups(kind, codes)
        names = np.unique(groups)
        if len(names) < count:
            raise ValueError(
                f"folds: expected at least {count} {kind}s for as many folds, got {len(names)}; ask for fewer "
                "(--folds), or for another split"
            )
        place = np.random.default_rng((seed, 10)).permutation(len(names)) % count
        of_group = place[np.searchsorted(names, groups)]
        test = np.array([(of_group == fold).any(1) for fold in range(count)])
        return cls(kind, test, ~test, f"{count} folds made here, of {len(names):,} {kind}s")

    @classmethod
    def given(cls, column: Array, codes: Array, name: str, claim: str | None) -> Folds:
        """From the fold (n,) of each triple, NaN for none: such a triple is trained on and never tested.

        claim: what the folds are to hold out, None to find out. Raises ValueError where they do not.
        """
        values = np.unique(column[~np.isnan(column)])
        if len(values) < 2:
            raise ValueError(f"{name}: expected at least two folds, got {len(values)}")
        test = column[None] == values[:, None]
        leaks = {kind: _leaks(kind, codes, test) for kind in (DRUG, LINE, PAIR)}
        if claim is not None and any(leaks[claim]):
            shown = ", ".join(f"{value:g}: {leak:.0%}" for value, leak in zip(values, leaks[claim], strict=True))
            one = "a drug" if claim == DRUG else f"a {claim}"
            held = [kind for kind in (LINE, PAIR) if not any(leaks[kind])]
            raise ValueError(
                f"{name}: expected folds that leave {claim}s out, got folds of whose triples a share has no {claim} "
                f"that is unknown to the others ({shown}){f'; they leave {held[0]}s out' if held else ''}; leave the "
                f"column out and folds that leave {one} out are made (--split {claim})"
            )
        kind = claim or next((kind for kind in (DRUG, LINE, PAIR) if not any(leaks[kind])), TRIPLE)
        missing = int(np.isnan(column).sum())
        told = f"{len(values)} folds of {name}, checked: {_HOLDS[kind]}"
        if missing:
            told += f"; {missing:,} triples without a fold are trained on and not tested"
        return cls(kind, test, ~test, told)


_HOLDS = {
    DRUG: "one drug of each test triple is in no training triple",
    LINE: "no test line is in a training triple",
    PAIR: "no test pair is in a training triple",
    TRIPLE: "they hold out triples alone, whose drugs, lines and pairs are trained on",
}


def validation_of(kind: str, codes: Array, train: Mask, seed: int) -> tuple[Mask, Mask]:
    """(n,) what of a training part is trained on, and what is kept for validation: a tenth of its drugs, lines or pairs
    (one at least), held out as the folds hold out theirs.

    Raises ValueError where nothing would be left to train on.
    """
    own = codes[train]
    groups = _groups(kind, own)
    names = np.unique(groups)
    count = max(1, round(_VALIDATION_SHARE * len(names)))
    chosen = np.random.default_rng((seed, 11)).permutation(names)[:count]
    held = np.isin(groups, chosen).any(1)
    if held.all():
        raise ValueError(
            f"split: expected {kind}s of which some can be kept for validation, got {len(names)} to fit to; give more "
            "pairs, or another split"
        )
    validation = np.zeros(len(codes), bool)
    validation[train] = held
    return train & ~validation, validation


def _groups(kind: str, codes: Array) -> Array:
    """(n, 1 or 2) the drugs, line or pair of each triple, as numbers."""
    if kind == DRUG:
        return codes[:, :2]
    if kind == LINE:
        return codes[:, 2:]
    width = int(codes.max(initial=0)) + 1
    pair = codes[:, :1] * width + codes[:, 1:2]
    return pair if kind == PAIR else pair * width + codes[:, 2:]


def _leaks(kind: str, codes: Array, test: Mask) -> list[float]:
    """Of each fold, the share of its triples of which nothing of the kind is unknown to the others."""
    groups = _groups(kind, codes)
    return [float(np.isin(groups[own], groups[~own]).all(1).mean()) for own in test]


def folds_of(
    split: str,
    measured: Measured,
    drugs: Drugs,
    lines: Sequence[str],
    *,
    fold_column: str | None = None,
    count: int = 5,
    seed: int = 0,
) -> Folds:
    """The folds of a split.

    Args:
        split: "pair", "line" or "drug", or the path of a table of pairs with a column "fold".
        fold_column: column of the pairs whose folds are taken, and checked for what the split says. None: folds are
            made, but for pairs, whose folds are those of the column "fold" where there is one.
        count, seed: of folds that are made.

    Of the folds of several measurements of one triple the least counts.

    Raises ValueError for folds that do not hold out what they are to hold out, or that leave one class alone to fit to;
    FileNotFoundError for no such table.
    """
    found = _folds_of(split, measured, drugs, lines, fold_column, count, seed)
    for number, train in enumerate(found.train):
        missing = _CLASS_NAMES.keys() - set(measured.classes[train].tolist())
        if missing:
            raise ValueError(
                f"split {split}: expected triples of synergy and of antagonism to fit to, got none of "
                f"{_CLASS_NAMES[min(missing)]} where fold {number + 1} is held out; ask for more folds (--folds), or "
                "for another split"
            )
    return found


def _folds_of(
    split: str,
    measured: Measured,
    drugs: Drugs,
    lines: Sequence[str],
    fold_column: str | None,
    count: int,
    seed: int,
) -> Folds:
    pairs, triples = measured.pairs, measured.triples
    if split not in KINDS:
        if fold_column is not None:
            raise ValueError(
                f"fold_column: expected none with a table of folds, got {fold_column!r}; leave it out, or name what "
                f"its folds hold out with split (--split {'|'.join(KINDS)})"
            )
        return _folds_of_table(split, triples, drugs, lines)
    if fold_column is None and split == PAIR and FOLD in pairs.table.header:
        fold_column = FOLD
    if fold_column is None:
        return Folds.made(split, triples.codes, count, seed)
    column = triples.least(pairs.numbers(fold_column, empty=True))
    return Folds.given(column, triples.codes, f"column {fold_column!r} of the pairs", split)


def _folds_of_table(path: str, triples: Triples, drugs: Drugs, lines: Sequence[str]) -> Folds:
    try:
        given = Pairs.read(path, None, "split")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"split: expected {', '.join(KINDS)} or a table with a column {FOLD!r}, got {path!r}; no such file"
        ) from None
    column = given.numbers(FOLD, empty=True)
    place = {name: number for number, name in enumerate(lines)}
    known = np.array([name in drugs.code_of for pair in given.drugs.tolist() for name in pair]).reshape(-1, 2).all(1)
    line_codes = np.array([place.get(name, -1) for name in given.lines.tolist()], np.int64)
    line_codes[~known] = -1
    molecules = np.array(
        [[drugs.code_of.get(name, -1) for name in pair] for pair in given.drugs.tolist()], np.int64
    ).reshape(-1, 2)
    own = Triples.of(molecules, line_codes)
    fold_of = dict(zip(map(tuple, own.codes.tolist()), own.least(column).tolist(), strict=True))
    found = np.array([fold_of.get(tuple(code), np.nan) for code in triples.codes.tolist()])
    return Folds.given(found, triples.codes, f"split {Path(path).name}", None)
