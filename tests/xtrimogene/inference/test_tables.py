"""Tests of xtrimogene.inference.tables: which columns a new file gets, and writes that fail."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from xtrimogene.inference import tables


def test_columns_that_cannot_be_written_leave_nothing_behind(tmp_path: Path) -> None:
    obs = pd.DataFrame({"a": [1, 2]}, index=[10, 11])  # names are strings there
    obs["half"] = pd.Categorical([(1, 2), (3,)])  # its codes can be written, its categories cannot
    obs["_index"] = [5, 6]  # the name of the index in the file
    obs = pd.concat([obs, pd.DataFrame({"a": [7, 8], "last": [3, 4]}, index=obs.index)], axis=1)
    with (
        pytest.warns(UserWarning, match="obs: columns that h5ad files cannot hold are left out: half, _index, a$"),
        tables.new_h5ad(tmp_path / "out.h5ad", obs, ["g"], overwrite=False),
    ):
        pass
    with h5py.File(tmp_path / "out.h5ad") as root:
        assert set(root["obs"]) == {"_index", "a", "last"}
    read = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert (list(read.index), read["a"].tolist(), read["last"].tolist()) == (["10", "11"], [1, 2], [3, 4])


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), MemoryError("no room")])
def test_a_disk_or_memory_that_fails_leaves_no_column_out(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = tables.write_elem

    def fail(group: Any, name: str, *given: Any) -> None:
        if name == "a":
            raise error
        write(group, name, *given)

    monkeypatch.setattr(tables, "write_elem", fail)
    with (
        pytest.raises(type(error), match=str(error.args[-1])),
        tables.new_h5ad(tmp_path / "out.h5ad", pd.DataFrame({"a": [1, 2]}), ["g"], overwrite=False),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["write", "truncate"])
def test_a_disk_that_is_full_is_known_at_once_and_at_the_end(what: str, tmp_path: Path) -> None:
    path, before = tmp_path / "out.h5", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        with tables.new_hdf5(path, "w") as root:
            root.flush()
            root.check()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            if what == "write":
                root["data"] = np.zeros(1000)
                root.flush()
            else:
                root.recorded.truncate(5000)
            with pytest.raises(OSError, match="File too large"):
                root.check()

    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'$"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
