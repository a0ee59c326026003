"""Fits: early stopping, the best weights, and the same bits after any interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from xtrimogene.tasks.fitting import FitFailed, Fitted, fit
from xtrimogene.tasks.work import WorkFolder, partial_folder

IDENTITY = {"cells": 4}


class Interrupted(Exception):
    pass


def _fit(
    folder: Path | None, *, resume: bool = False, stop_after: int | None = None, epochs: int = 6
) -> tuple[nn.Module, Fitted]:
    """A small regression with dropout and a batch norm; it stops by an error after so many steps."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    y = x[:, :1] - 2 * x[:, 1:2]
    steps = 0

    def batches(epoch: int) -> list[torch.Tensor]:
        return list(torch.randperm(32, generator=torch.Generator().manual_seed(epoch)).split(8))

    def loss(rows: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        if steps == stop_after:
            raise Interrupted
        steps += 1
        return (module(x[rows]) - y[rows]).square().mean()

    def run(work: WorkFolder | None) -> Fitted:
        return fit(
            module, optimizer, batches, loss, lambda: float((module(x[32:]) - y[32:]).square().mean()),
            epochs=epochs, patience=epochs, seed=3, work=work, progress=False, save_seconds=0.0,
        )  # fmt: skip

    if folder is None:
        return module, run(None)
    work = WorkFolder.checked(folder, resume=resume, overwrite=False)
    with work.open(IDENTITY):
        return module, run(work)


@pytest.mark.parametrize("stop_after", [1, 4, 6, 23])
def test_an_interrupted_fit_ends_with_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    expected, told = _fit(None)
    with pytest.raises(Interrupted):
        _fit(tmp_path / "model", stop_after=stop_after)
    assert partial_folder(tmp_path / "model").is_dir()
    module, again = _fit(tmp_path / "model", resume=True)
    assert again == told
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    assert not partial_folder(tmp_path / "model").exists()


def test_the_weights_are_those_of_the_best_epoch_and_patience_ends_a_fit() -> None:
    module = nn.Linear(1, 1)
    scores = iter([3.0, 1.0, 2.0, 2.5, 9.0, 9.0])
    weights: list[float] = []

    def validate() -> float:
        weights.append(module.weight.item())
        return next(scores)

    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    told = fit(
        module, optimizer, lambda epoch: [0], lambda batch: module.weight.sum(), validate,
        epochs=6, patience=2, seed=0, progress=False,
    )  # fmt: skip
    assert (told.best_epoch, len(told.history)) == (2, 4)
    assert module.weight.item() == weights[1]
    assert not module.training


def test_a_loss_that_is_not_finite_ends_a_fit() -> None:
    module = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(module.parameters())
    with pytest.raises(FitFailed, match="the loss is nan in step 1"):
        fit(
            module, optimizer, lambda epoch: [0], lambda batch: module.weight.sum() * torch.nan, lambda: 0.0,
            epochs=1, patience=1, seed=0, progress=False,
        )  # fmt: skip


def test_the_caller_s_random_state_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    fit(
        module, torch.optim.Adam(module.parameters()), lambda epoch: [0], lambda batch: module(torch.ones(4, 1)).sum(),
        lambda: 0.0, epochs=1, patience=1, seed=0, progress=False,
    )  # fmt: skip
    assert torch.equal(torch.rand(2), expected)


def test_an_unfinished_fit_is_not_lost_and_not_taken_for_another(tmp_path: Path) -> None:
    output = tmp_path / "model"
    with pytest.raises(Interrupted):
        _fit(output, stop_after=2)
    with pytest.raises(FileExistsError, match="--resume"):
        WorkFolder.checked(output, resume=False, overwrite=False)
    work = WorkFolder.checked(output, resume=True, overwrite=False)
    with pytest.raises(ValueError, match="cells was 4, is 5"), work.open({"cells": 5}):
        pass
    with work.open(IDENTITY), pytest.raises(FileExistsError, match="another fit is at work"), work.open(IDENTITY):
        pass


def test_a_damaged_state_is_made_again_with_a_warning(tmp_path: Path) -> None:
    output = tmp_path / "model"
    with pytest.raises(Interrupted):
        _fit(output, stop_after=9)
    path = partial_folder(output) / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="not what was written there"):
        module, _ = _fit(output, resume=True)
    expected, _ = _fit(None)
    assert torch.equal(module.state_dict()["3.weight"], expected.state_dict()["3.weight"])


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    partial_folder(tmp_path / "model").mkdir()
    (partial_folder(tmp_path / "model") / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        WorkFolder.checked(tmp_path / "model", resume=True, overwrite=False)
    with pytest.raises(FileNotFoundError, match="make it first"):
        WorkFolder.checked(tmp_path / "none" / "model", resume=False, overwrite=False)
