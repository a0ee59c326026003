"""Tests of xtrimogene.checkpoints: the same numbers back, the newest kept, and nothing broken ever taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from xtrimogene.training.checkpoints import Checkpoints


def network(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model.register_buffer("projection", torch.randn(5))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.arange(6.0).reshape(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_a_loaded_run_goes_on_with_the_same_bits(checkpoints: Checkpoints) -> None:
    model, optimizer = network(0)
    train(model, optimizer, 3)
    checkpoints.save(3, model, optimizer, {"epoch": 1})
    train(model, optimizer, 2)

    other, other_optimizer = network(1)
    newest = checkpoints.newest()
    assert newest is not None
    path, step, progress = newest
    assert (step, progress) == (3, {"epoch": 1})
    checkpoints.load(path, other, other_optimizer)
    train(other, other_optimizer, 2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    model, optimizer = network(0)
    for step in (9, 10, 100):
        train(model, optimizer, 1)
        checkpoints.save(step, model, optimizer, {})
    assert names(checkpoints) == ["step-000000010", "step-000000100"]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[1] == 100


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "incomplete", "empty", "list", "progress"])
def test_a_broken_checkpoint_is_passed_over(checkpoints: Checkpoints, damage: str) -> None:
    model, optimizer = network(0)
    train(model, optimizer, 1)
    checkpoints.save(1, model, optimizer, {})
    path = checkpoints.save(2, model, optimizer, {})
    data = path / "__0_0.distcp"
    content = data.read_bytes()
    if damage == "cut":
        data.write_bytes(content[:-10])
    elif damage == "changed":
        data.write_bytes(content[:-10] + bytes(byte ^ 1 for byte in content[-10:]))
    elif damage == "missing":
        data.unlink()
    elif damage == "progress":
        complete = path / "complete.json"
        assert '"step": 2' in complete.read_text()
        complete.write_text(complete.read_text().replace('"step": 2', '"step": 3'))
    elif damage == "incomplete":
        (path / "complete.json").unlink()
    else:
        (path / "complete.json").write_text("[]" if damage == "list" else "{}")
    with pytest.warns(UserWarning, match=r"step-000000002: broken checkpoint passed over"):
        newest = checkpoints.newest()
    assert newest is not None
    assert newest[1] == 1
    # The run gets to step 2 again and replaces the broken folder.
    checkpoints.save(2, model, optimizer, {"again": True})
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[1:] == (2, {"again": True})


def test_a_half_written_one_has_no_name(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = network(0)
    train(model, optimizer, 1)
    checkpoints.save(1, model, optimizer, {})

    def die(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("xtrimogene.training.checkpoints._size_and_crc", die)
        with pytest.raises(OSError, match="no space left"):
            checkpoints.save(2, model, optimizer, {})
    assert names(checkpoints) == ["step-000000001", "step-000000002.tmp"]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[1] == 1
    checkpoints.remove_leftovers()
    assert names(checkpoints) == ["step-000000001"]


def test_a_saved_checkpoint_is_on_disk(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync
    flushed: list[Path] = []

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", flush)
    path = checkpoints.save(1, *network(0), {})
    # The files in the folder that is not complete, that folder, and the one where it gets its name.
    assert {written.name.removesuffix(".tmp") for written in flushed if written.parent.name == f"{path.name}.tmp"} >= {
        entry.name for entry in path.iterdir() if entry.name != "complete.json"
    }
    assert flushed[-3:] == [
        checkpoints.folder / f"{path.name}.tmp" / "complete.json.tmp",
        checkpoints.folder / f"{path.name}.tmp",
        checkpoints.folder,
    ]


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_the_disk(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.distributed.checkpoint raises a BaseException with a traceback for its message."""
    model, optimizer = network(0)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step-000000001: the checkpoint cannot be written: .*No space left on device$"):
        checkpoints.save(1, model, optimizer, {})
    assert checkpoints.newest() is None
