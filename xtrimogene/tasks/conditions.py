"""Names of conditions as screens have them, A, A+B, A_B, A+ctrl, non-targeting, read as the genes perturbed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

Perturbation = tuple[str, ...]

# What screens call cells in which nothing is perturbed, without case and with "-" for "_" and blanks.
CONTROL_WORDS = frozenset(
    {"ctrl", "control", "ctl", "non-targeting", "nontargeting", "non-targeting-control", "negative-control", "neg-ctrl",
     "nt", "ntc", "unperturbed", "no-perturbation", "scramble", "scrambled", "safe-targeting", "untreated"}
)  # fmt: skip
# The number of a guide of a gene, as in KLF1_sg2.
_GUIDE = re.compile(r"(sg|sgrna|g|grna|guide)[-.]?\d+", re.IGNORECASE)
_SHOWN = 5


def name_of(perturbation: Perturbation) -> str:
    """A+B: the genes of a perturbation in alphabetical order."""
    return "+".join(perturbation)


def is_control_word(text: str) -> bool:
    """Whether a name is one that controls go by."""
    return re.sub(r"[_ ]", "-", text.strip().casefold()) in CONTROL_WORDS


def control_of(labels: Collection[str], control: str | None, *, column: str) -> str:
    """The label of the control cells among the labels of a column: the one that is given, or the only one that goes by
    a name of controls.

    Raises ValueError where it is not there, or where several labels or none go by such a name.
    """
    # Both parts of "ctrl+ctrl" are none.
    likely = sorted(label for label in labels if all(map(is_control_word, label.split("+"))))
    if control is not None:
        if control not in labels:
            near = difflib.get_close_matches(control, sorted(labels), n=1) + [
                each for each in likely if each != control
            ]
            shown = near or sorted(labels)[:_SHOWN]
            raise ValueError(
                f"control: expected a label of obs[{column!r}], got {control!r}; it has {', '.join(map(repr, shown))}"
            )
        others = [label for label in likely if label != control]
        if others:
            raise ValueError(
                f"control: {control!r} is given, and obs[{column!r}] has {', '.join(map(repr, others))} too, by which "
                "controls go as well; give all control cells one label, or take the others out"
            )
        return control
    if len(likely) != 1:
        raise ValueError(
            f"control: cannot be told among the labels of obs[{column!r}], of which "
            f"{', '.join(map(repr, likely)) if likely else 'none'} go{'es' if not likely else ''} by a name of "
            "controls; name it (--control)"
        )
    return likely[0]


def genes_of(label: str, known: Collection[str], control: str | None = None) -> Perturbation:
    """The perturbed genes of a label in alphabetical order, each once; () for the control.

    A label that is a known gene is that gene, whatever it contains. All else is divided at "+" and "_", but for those
    inside of known genes, so that as few parts as can be are unknown; parts that controls go by are left out.

    Raises ValueError for a part that is empty, has no letter or is the number of a guide, and for a label that can be
    read in two ways.
    """
    if label == control:
        return ()
    if label in known:
        return (label,)
    genes: set[str] = set()
    parts = [part.strip() for part in _divided(label, known)]
    for part in parts:
        if part == control or (part not in known and is_control_word(part)):
            continue
        guide = len(parts) > 1 and _GUIDE.fullmatch(part)
        if part not in known and (guide or not re.search("[A-Za-z]", part)):
            raise ValueError(
                f"condition {label!r}: expected names of genes alone, such as A, A+B or A_B, got the part {part!r}; "
                "give cells the label of their gene, not of their guide"
            )
        genes.add(part)
    return tuple(sorted(genes))


def _divided(label: str, known: Collection[str]) -> list[str]:
    """The parts of a label: of the ways to divide it, the one with the fewest unknown parts."""
    pieces = re.split("([+_])", label)
    words = pieces[::2]
    # best[i]: (parts that are unknown, all ways to divide the first i words with so few of them)
    best: list[tuple[int, list[list[str]]]] = [(0, [[]])]
    for end in range(1, len(words) + 1):
        found: list[tuple[int, list[list[str]]]] = []
        for start in range(end):
            part = "".join(pieces[2 * start : 2 * end - 1])
            whole = part in known or is_control_word(part)
            if whole or end - start == 1:
                unknown, ways = best[start]
                found.append((unknown + (not whole), [[*way, part] for way in ways]))
        fewest = min(unknown for unknown, _ in found)
        best.append((fewest, [way for unknown, ways in found if unknown == fewest for way in ways][:_SHOWN]))
    ways = best[-1][1]
    if len(ways) > 1:
        raise ValueError(
            f"condition {label!r}: can be read as {' and as '.join(' + '.join(way) for way in ways[:2])}, of known "
            "genes all; give another name to one of the genes"
        )
    return ways[0]


def perturbations_of(
    labels: Sequence[str], known: Collection[str], control: str, *, column: str
) -> dict[str, Perturbation]:
    """What each distinct label means.

    Raises ValueError as genes_of, and where no label is a perturbation.
    """
    meanings = {label: genes_of(label, known, control) for label in sorted(set(labels))}
    if not any(meanings.values()):
        raise ValueError(f"condition: expected perturbations in obs[{column!r}], got control cells alone")
    return meanings
