"""Names of conditions: separators, names of controls, and genes whose names contain a separator."""

from __future__ import annotations

import pytest

from xtrimogene.tasks.conditions import control_of, genes_of, name_of, perturbations_of

KNOWN = {"KLF1", "MAP2K6", "HLA_A", "A", "B+C"}


@pytest.mark.parametrize(
    ("label", "genes"),
    [
        ("KLF1", ("KLF1",)),
        ("KLF1+MAP2K6", ("KLF1", "MAP2K6")),
        ("MAP2K6+KLF1", ("KLF1", "MAP2K6")),
        ("KLF1_MAP2K6", ("KLF1", "MAP2K6")),
        ("KLF1+ctrl", ("KLF1",)),
        ("ctrl+KLF1", ("KLF1",)),
        ("control_KLF1", ("KLF1",)),
        ("KLF1_non_targeting", ("KLF1",)),
        ("KLF1+KLF1", ("KLF1",)),
        ("KLF1+MAP2K6+A", ("A", "KLF1", "MAP2K6")),
        ("KLF1 + MAP2K6", ("KLF1", "MAP2K6")),
        ("HLA_A", ("HLA_A",)),
        ("HLA_A+KLF1", ("HLA_A", "KLF1")),
        ("KLF1_HLA_A", ("HLA_A", "KLF1")),
        ("B+C", ("B+C",)),
        ("A+B+C", ("A", "B+C")),
        ("A+B", ("A", "B")),
        ("G6", ("G6",)),
        ("unheard+KLF1", ("KLF1", "unheard")),
        ("unheard_of", ("of", "unheard")),
        ("ctrl", ()),
        ("Non-Targeting", ()),
        ("ctrl+ctrl", ()),
        ("mock cells", ()),
    ],
)
def test_a_label_is_read_as_the_genes_that_are_perturbed(label: str, genes: tuple[str, ...]) -> None:
    assert genes_of(label, KNOWN, "mock cells") == genes


def test_a_name_that_controls_go_by_is_a_gene_where_it_is_known_as_one() -> None:
    assert genes_of("NT", set()) == ()
    assert genes_of("NT", {"NT"}) == ("NT",)
    assert genes_of("NT+A", {"NT", "A"}) == ("A", "NT")


@pytest.mark.parametrize(
    ("label", "known", "words"),
    [
        ("KLF1+", KNOWN, "the part ''"),
        ("KLF1_sg2", KNOWN, "the part 'sg2'; give cells the label of their gene"),
        ("KLF1_2", KNOWN, "the part '2'"),
        ("A_B_C", {"A", "A_B", "B_C", "C"}, r"can be read as A \+ B_C and as A_B \+ C"),
    ],
)
def test_labels_that_are_no_genes_or_ambiguous_are_refused(label: str, known: set[str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        genes_of(label, known)
    assert "\n" not in str(refused.value)


def test_the_control_is_given_or_recognised_and_never_guessed() -> None:
    assert control_of({"A", "B", "ctrl"}, None, column="c") == "ctrl"
    assert control_of({"A", "B", "ctrl+ctrl"}, None, column="c") == "ctrl+ctrl"
    assert control_of({"A", "B", "cells"}, "cells", column="c") == "cells"
    for labels, control, words in (
        ({"A", "B"}, None, "none goes by a name of controls; name it"),
        ({"A", "ctrl", "non-targeting"}, None, "'ctrl', 'non-targeting' go by a name of controls; name it"),
        ({"A", "ctrl", "non-targeting"}, "ctrl", "has 'non-targeting' too"),
        ({"A", "B", "control"}, "contrl", "got 'contrl'; it has 'control'"),
    ):
        with pytest.raises(ValueError, match=words):
            control_of(labels, control, column="c")


def test_a_whole_label_that_is_a_known_gene_is_that_gene() -> None:
    assert genes_of("A_B", {"A", "B", "A_B"}) == ("A_B",)
    assert genes_of("A_B", {"A", "B"}) == ("A", "B")


def test_every_label_of_a_column_is_read() -> None:
    labels = ["X_1", "Y", "X_1+Y", "Z_Y", "control", "Y+ctrl", "Y"]
    read = perturbations_of(labels, {"X_1"}, "control", column="c")
    assert read == {
        "X_1": ("X_1",), "Y": ("Y",), "X_1+Y": ("X_1", "Y"), "Z_Y": ("Y", "Z"), "control": (), "Y+ctrl": ("Y",),
    }  # fmt: skip
    assert name_of(read["X_1+Y"]) == "X_1+Y"
    with pytest.raises(ValueError, match="got control cells alone"):
        perturbations_of(["ctrl", "ctrl+ctrl"], set(), "ctrl", column="c")
