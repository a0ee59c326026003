"""The validation part of a fit: whole groups, every label trained on, and the labels that are refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from xtrimogene.cells.sources import open_cells
from xtrimogene.tasks.splits import check_varied, column_of, need, validation_part


def _names(values: list[str], count: int) -> np.ndarray:
    return np.array((values * count)[:count], dtype=object)


def test_without_groups_each_label_is_on_both_sides_as_often() -> None:
    labels = np.array(["a"] * 80 + ["b"] * 16 + ["c"] * 4, dtype=object)
    held = validation_part(labels, None, share=0.25, seed=0)
    assert [int((held & (labels == name)).sum()) for name in "abc"] == [20, 4, 1]
    assert (validation_part(labels, None, share=0.25, seed=0) == held).all()
    assert (validation_part(labels, None, share=0.25, seed=1) != held).any()


def test_two_cells_of_each_label_are_one_on_each_side() -> None:
    labels = np.array(["a", "a", "b", "b", "c", "c"], dtype=object)
    held = validation_part(labels, None, share=0.1, seed=0)
    assert [int((held & (labels == name)).sum()) for name in "abc"] == [1, 1, 1]


def test_no_group_is_on_both_sides_and_every_label_is_trained_on() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array(["a", "b", "c", "d"], dtype=object), 400)
    groups = rng.choice(np.array([f"donor {i}" for i in range(12)], dtype=object), 400)
    for seed in range(5):
        held = validation_part(labels, groups, share=0.2, seed=seed)
        assert 0.1 < held.mean() < 0.3
        assert not set(groups[held]) & set(groups[~held])
        assert set(labels[~held]) == set("abcd")


def test_groups_alone_and_cells_alone() -> None:
    groups = _names(["x", "y", "z", "u", "v"], 50)
    held = validation_part(None, groups, share=0.2, seed=0)
    assert len(set(groups[held])) == 1
    assert not set(groups[held]) & set(groups[~held])
    assert validation_part(None, None, share=0.2, seed=0, count=50).sum() == 10


def test_one_group_and_labels_of_one_group_are_refused() -> None:
    labels = _names(["a", "b"], 20)
    with pytest.raises(ValueError, match="at least two groups, got \\['x'\\]"):
        validation_part(labels, _names(["x"], 20), share=0.2, seed=0)
    groups = np.where(labels == "b", "x", _names(["x", "x", "y", "y"], 20))
    with pytest.raises(ValueError, match="got 1 of 2 in one group only: 'b'"):
        validation_part(labels, groups, share=0.2, seed=0)


def test_labels_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="label kind: expected at least two different labels, got \\['a'\\]"):
        check_varied(_names(["a"], 5), "label kind")
    with pytest.raises(ValueError, match="expected at least 2 cells of each label, got fewer of 'b'"):
        check_varied(np.array(["a", "a", "b"], dtype=object), "label kind")


def test_columns_are_read_as_text_and_gaps_are_named() -> None:
    obs = pd.DataFrame(
        {"kind": pd.Categorical(["a", None, "b"]), "number": [1, 2, 3], "blank": ["a", " ", "b"]}, index=["u", "v", "w"]
    )
    with open_cells(AnnData(np.ones((3, 2), np.float32), obs=obs)) as source:
        assert column_of([source, source], "number", "label").tolist() == ["1", "2", "3"] * 2
        for column in ("kind", "blank"):
            with pytest.raises(ValueError, match=r"got none for 1 of 3 in obs.*such as 'v'"):
                column_of([source], column, "label")
        with pytest.raises(ValueError, match="got 'donor'; columns: kind, number, blank"):
            column_of([source], "donor", "label")


def test_a_missing_package_is_named_with_the_extra() -> None:
    need("scikit-learn", "annotation", "annotate")
    need("scikit-learn", "annotation", "annotate", "1.2")
    with pytest.raises(ImportError, match=r"annotation needs scikit-learn 99\.10 or later, and .* is installed"):
        need("scikit-learn", "annotation", "annotate", "99.10")
    with pytest.raises(ImportError, match=r"annotation needs nothing_such.*pip install 'xtrimogene\[annotate\]'"):
        need("nothing_such", "annotation", "annotate")
