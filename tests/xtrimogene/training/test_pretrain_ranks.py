"""Tests of xtrimogene.training on two processes: DDP learns what one process learns, FSDP saves, loads and goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import warm
from tests.xtrimogene.training.test_pretrain import MODEL, arguments, assert_same_weights, cells, losses, run, weights
from xtrimogene import XTrimoGene

Torchrun = Callable[..., subprocess.Popen[str]]
CHANGES = {"model": {**MODEL, "dropout": 0.1}, "batch_cells": 4}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A command that stands for the interpreter that torchrun starts its ranks with."""
    return warm.write_command(tmp_path_factory.mktemp("bin") / "python")


@pytest.fixture
def torchrun(python: Path) -> Torchrun:
    def start(*words: str) -> subprocess.Popen[str]:
        command = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return subprocess.Popen(
            [*command, "-m", "xtrimogene", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHON_EXEC": str(python)},
        )  # fmt: skip

    return start


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cells().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_two_ranks_learn_what_one_learns(path: Path, tmp_path: Path, torchrun: Torchrun) -> None:
    """With a product head, whose norm takes the moments of a batch: those of two ranks are those of one. So are the
    masks of dropout: what is left between one process and two is the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    own = {"model": {**CHANGES["model"], "product_head": 4}, "head_steps": 4}
    run(path, tmp_path / "one", accumulate=2, **{**CHANGES, **own})
    torch.set_num_threads(threads)
    changes = ["batch_cells=4", "model.dropout=0.1", "model.product_head=4", "head_steps=4"]
    process = torchrun(*arguments(path, tmp_path / "two", *changes))
    out, err = process.communicate()
    assert process.returncode == 0, err
    # One rank speaks for both.
    assert out.count("12 steps") == 1
    for event in ("train", "validation"):
        assert losses(tmp_path / "two", event) == pytest.approx(losses(tmp_path / "one", event), rel=1e-5)
    norms = [losses(tmp_path / name, name="gradient_norm") for name in ("two", "one")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "one")[name], rtol=1e-3, atol=1e-4, msg=name)


def test_fsdp_saves_loads_and_goes_on(path: Path, tmp_path: Path, torchrun: Torchrun) -> None:
    output = tmp_path / "run"
    changes = ["batch_cells=4", "parallel=fsdp", "activation_checkpointing=true"]
    changes += ["max_steps=4", "checkpoint_every=2", "validate_every=4", "model.product_head=4", "head_steps=1"]
    process = torchrun(*arguments(path, output, *changes))
    assert process.wait() == 0, process.communicate()[1]
    shutil.move(output / "model", tmp_path / "whole" / "model")
    files = {entry.name for entry in (output / "checkpoints" / "step-000000004").iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp", "complete.json"}

    shutil.rmtree(output / "checkpoints" / "step-000000004")
    process = torchrun(*arguments(path, output, *changes, "--resume"))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "4 steps (2 of them by an earlier run)" in out
    assert_same_weights(output, tmp_path / "whole")
    assert XTrimoGene.from_pretrained(output / "model").config.dim == 16
    model = {**MODEL, "product_head": 4}
    own = {"max_steps": 4, "validate_every": 4, "head_steps": 1}
    run(path, tmp_path / "one", model=model, accumulate=2, batch_cells=4, **own)
    assert losses(output) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_a_checkpoint_that_the_first_rank_cannot_write_stops_all_ranks(
    path: Path, tmp_path: Path, torchrun: Torchrun
) -> None:
    output = tmp_path / "run"
    process = torchrun(*arguments(path, output, "max_steps=100000", "checkpoint_every=20", "batch_cells=4"))
    while not (output / "log.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    (output / "checkpoints").write_bytes(b"")
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.count("File exists") == 1
    assert err.count("xtrimogene: error:") == 1, err
    assert "go on with --resume" in err


def test_a_signal_to_torchrun_stops_all_ranks_after_the_same_step(
    path: Path, tmp_path: Path, torchrun: Torchrun
) -> None:
    output = tmp_path / "run"
    process = torchrun(*arguments(path, output, "max_steps=100000", "checkpoint_every=100000", "batch_cells=4"))
    while not ((output / "log.jsonl").exists() and (output / "log.jsonl").read_bytes().count(b"\n") > 3):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert "SIGTERM: stops after this step, or batch of a validation; --resume goes on" in err
    assert f"stopped, with a checkpoint of step {len(losses(output)):,}" in out
    assert len(list((output / "checkpoints").iterdir())) == 1
    # torchrun kills a rank that is still there half a minute after the signal.
    assert "Unable to shutdown process" not in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vocabulary=none.tsv", "vocabulary none.tsv: no such file"),
        ("validation_cells=1", "config validation_share, validation_cells: expected a validation cell for each of 2 "),
    ],
)
def test_an_error_is_told_once(change: str, message: str, path: Path, tmp_path: Path, torchrun: Torchrun) -> None:
    process = torchrun(*arguments(path, tmp_path / "run", change))
    _, err = process.communicate()
    assert process.returncode != 0
    assert err.count(f"xtrimogene: error: {message}") == 1
    assert not (tmp_path / "run").exists()
