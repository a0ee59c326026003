"""Tests of xtrimogene.training.pretrain: what a step computes, the log, and runs that are stopped, killed, resumed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from safetensors.torch import load_file

from xtrimogene import Vocabulary, XTrimoGene, embed
from xtrimogene.cells.masking import MaskingConfig
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.cli import main
from xtrimogene.evaluation.bars import Bars
from xtrimogene.evaluation.hidden import HiddenGenes
from xtrimogene.network import folder
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.log import read_log
from xtrimogene.training.pretrain import pretrain
from xtrimogene.training.ranks import StopSignals
from xtrimogene.training.run import PretrainReport, Run, TrainingFailed
from xtrimogene.training.validation import gene_means
from xtrimogene.writing import sealed, unsealed

GENES = [f"G{i}" for i in range(40)]
MODEL = {
    "dim": 16, "num_layers": 2, "num_heads": 2, "num_bins": 8,
    "decoder_dim": 16, "decoder_layers": 2, "decoder_heads": 2,
}  # fmt: skip
# 57 training cells in batches of 8: an epoch has 8 steps, so that the runs below cross its end.
OPTIONS: dict[str, Any] = {
    "model": MODEL,
    "masking": {"zero_rate": 0.3},
    "min_genes": 3,
    "validation_share": 0.1,
    "batch_cells": 8,
    "max_steps": 12,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "redraw_every": 5,
    "validate_every": 6,
    "checkpoint_every": 4,
    "tensorboard": False,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Weights have the same bits for one number of threads; subprocesses get one, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cells(seed: int = 0) -> AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 2.0, size=len(GENES)), size=(64, len(GENES)))
    return AnnData(sp.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=GENES))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cells().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def config(**changes: Any) -> PretrainConfig:
    return PretrainConfig.from_dict({**OPTIONS, **changes})


def run(data: Any, output: Path, *, resume: bool = False, **changes: Any) -> PretrainReport:
    return pretrain(config(**changes), data, output, resume=resume, progress=False)


def arguments(path: Path, output: Path, *more: str) -> list[str]:
    options = output.with_name("config.yaml")
    options.write_text(json.dumps(OPTIONS))
    files = ["--config", str(options), "--data", str(path), "--output", str(output)]
    return ["pretrain", *files, "--threads", "1", "--no-progress", *more]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def assert_same_weights(output: Path, other: Path) -> None:
    for name, tensor in weights(output).items():
        assert torch.equal(tensor, weights(other)[name]), name


def timeless(output: Path) -> list[dict[str, Any]]:
    """The lines of a log without what the clock says."""
    lines = list(read_log(output / "log.jsonl"))
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def losses(output: Path, event: str = "train", name: str = "loss") -> list[float]:
    return [line[name] for line in read_log(output / "log.jsonl") if line["event"] == event]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run with OPTIONS on cells()."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    cells().write_h5ad(folder / "cells.h5ad")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(folder / "cells.h5ad", folder / "run")
    torch.set_num_threads(threads)
    return folder / "run"


def test_a_run_leaves_a_model_a_log_and_checkpoints(path: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    report = run(path, tmp_path / "run", keep_checkpoints=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert (report.steps, report.signal, report.resumed_steps, report.rank) == (12, 0, 0, 0)
    assert report.model == tmp_path / "run" / "model"
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {
        "checkpoints", "config.yaml", "lock", "log.jsonl", "model", "run.json", "vocabulary.tsv"
    }  # fmt: skip
    names = sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000000008", "step-000000012"]
    assert PretrainConfig.from_yaml(tmp_path / "run" / "config.yaml") == config(keep_checkpoints=2)
    model = XTrimoGene.from_pretrained(report.model)
    assert model.vocabulary == Vocabulary(GENES)
    assert model.config == config().model_config(len(GENES))

    lines = list(read_log(tmp_path / "run" / "log.jsonl"))
    assert [(line["event"], line["step"]) for line in lines] == [
        ("validation", 0),
        *(("train", step) for step in range(1, 7)),
        ("validation", 6),
        *(("train", step) for step in range(7, 13)),
        ("validation", 12),
    ]
    steps = [line for line in lines if line["event"] == "train"]
    assert [line["rate"] for line in steps] == [config().rate(step) for step in range(12)]
    assert steps[-1]["cells"] == report.cells
    assert all(line["tokens"] > 0 and line["chosen"] > 0 and line["cells_per_second"] > 0 for line in steps)
    assert report.loss == steps[-1]["loss"]
    assert report.validation_loss == lines[-1]["loss"]
    assert report.epochs == steps[-1]["epoch"] > 1
    assert "12 steps" in str(report)


def test_steps_are_adamw_on_the_mean_over_all_chosen_genes(path: Path, tmp_path: Path) -> None:
    plain = config(model={**MODEL, "dropout": 0.0}, max_steps=3, redraw_every=2, accumulate=2, clip_norm=0.5)
    run(path, tmp_path / "run", **plain.to_dict())

    data = TrainingCells(
        path, Vocabulary(GENES), min_genes=3, validation_share=0.1, batch_cells=8,
        masking=MaskingConfig(zero_rate=0.3), progress=False,
    )  # fmt: skip
    # The weights before training are those of a run that does not learn.
    run(path, tmp_path / "untrained", **{**plain.to_dict(), "max_steps": 1, "learning_rate": 1e-30})
    model = XTrimoGene.from_pretrained(tmp_path / "untrained" / "model").train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.0)
    last = XTrimoGene.from_pretrained(tmp_path / "run" / "model")
    batches = data.iterate(0, accumulate=2)
    means, norms = [], []
    for step in range(3):
        if step == 2:
            model.decoder.load_state_dict(
                {name: tensor for name, tensor in last.decoder.state_dict().items() if name.endswith("projection")},
                strict=False,
            )
        pair = [next(batches), next(batches)]
        squares = torch.cat([model.masked_predictions(each) - each.chosen_values for each in pair]).square()
        means.append(float(squares.detach().mean()))
        squares.mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.param_groups[0]["lr"] = plain.rate(step)
        optimizer.step()
        optimizer.zero_grad()
    batches.close()
    data.close()
    assert losses(tmp_path / "run") == pytest.approx(means, rel=1e-5)
    assert losses(tmp_path / "run", name="gradient_norm") == pytest.approx(norms, rel=1e-4)
    for name, tensor in last.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=2e-5, msg=name)


def test_validation_is_that_of_the_model_and_of_guesses(uninterrupted: Path) -> None:
    path = uninterrupted.with_name("cells.h5ad")
    data = TrainingCells(
        path, Vocabulary(GENES), min_genes=3, validation_share=0.1, masking=MaskingConfig(zero_rate=0.3), progress=False
    )
    model = XTrimoGene.from_pretrained(uninterrupted / "model")
    matrix = cells().X.toarray().astype(np.float64)
    matrix = np.log1p(matrix / matrix.sum(1, keepdims=True) * 1e4)[data.training]
    mean = matrix.mean(0)
    nonzero_mean = matrix.sum(0) / np.maximum((matrix > 0).sum(0), 1)
    for means, expected in zip(gene_means(data, 1000), (mean, nonzero_mean), strict=True):
        np.testing.assert_allclose(means, expected, rtol=1e-6)

    squares, hidden_squares, count = np.zeros(3), 0.0, 0
    bars = Bars.fit(
        [HiddenGenes.of(data.masked(data.training, epoch), len(GENES)) for epoch in range(4)],
        MaskingConfig(zero_rate=0.3),
    )
    hidden = HiddenGenes.of(data.validation(), len(GENES), model)
    ridge_squares = np.square(bars.predict(hidden)["depth + PCA"] - hidden.values).sum()
    for masked in data.validation():
        values, genes = masked.chosen_values.numpy(), masked.chosen_ids.numpy()
        with torch.no_grad():
            predicted = model.masked_predictions(masked).numpy()
        for i, guess in enumerate((predicted, mean[genes], np.where(values > 0, nonzero_mean[genes], 0))):
            squares[i] += np.square(values - guess).sum()
        for cell, (start, end) in enumerate(itertools.pairwise(masked.chosen_cu_seqlens.tolist())):
            own = masked.masked_ids[masked.masked_cu_seqlens[cell] : masked.masked_cu_seqlens[cell + 1]].numpy()
            at = start + np.flatnonzero(np.isin(genes[start:end], own))
            hidden_squares += np.square(values[at] - predicted[at]).sum()
        count += len(values)
    data.close()
    last = timeless(uninterrupted)[-1]
    assert last["event"] == "validation"
    np.testing.assert_allclose(
        [last["loss"], last["baseline_mean"], last["baseline_zero_mean"]], squares / count, rtol=1e-5
    )
    assert 0 < len(hidden.values) < count
    np.testing.assert_allclose(
        [last["hidden_loss"], last["ridge_hidden_loss"]],
        [hidden_squares / len(hidden.values), ridge_squares / len(hidden.values)],
        rtol=1e-5,
    )


def test_where_no_gene_is_hidden_there_is_no_error_at_hidden_genes(path: Path, tmp_path: Path) -> None:
    masking = MaskingConfig(zero_rate=0.3, mask_share=0.0, random_share=0.5)
    report = run(path, tmp_path / "run", masking=masking, max_steps=2)
    assert np.isnan([report.hidden_loss, report.ridge_hidden_loss]).all()
    assert np.isfinite([report.loss, report.validation_loss, report.baseline_mean]).all()


def test_real_cells_are_learned(tmp_path: Path) -> None:
    import scanpy

    adata = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    report = run(
        adata, tmp_path / "run", normalized=True, min_genes=50, max_steps=40, batch_cells=16, learning_rate=5e-3,
        masking={}, validate_every=100, checkpoint_every=100, log_every=10,
    )  # fmt: skip
    first, last = losses(tmp_path / "run", "validation")
    assert last < report.baseline_mean < first
    assert [line["step"] for line in timeless(tmp_path / "run") if line["event"] == "train"] == [10, 20, 30, 40]


def test_log_lines_average_over_their_steps(path: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run(path, tmp_path / "run", log_every=5)
    each = [line for line in timeless(uninterrupted) if line["event"] == "train"]
    for line, first, stop in zip(
        [line for line in timeless(tmp_path / "run") if line["event"] == "train"], (0, 5, 10), (5, 10, 12), strict=True
    ):
        chosen = [one["chosen"] for one in each[first:stop]]
        mean = np.average([one["loss"] for one in each[first:stop]], weights=chosen)
        assert (line["step"], line["chosen"]) == (stop, sum(chosen))
        assert line["loss"] == pytest.approx(mean)
    assert_same_weights(tmp_path / "run", uninterrupted)


def test_accumulated_batches_are_one_batch(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of dropout are those of a cell in a step, whatever its batch."""
    seeds: list[int] = []
    loss = XTrimoGeneNetwork.loss

    def watched(self: XTrimoGeneNetwork, *args: Any, dropout_seed: int) -> torch.Tensor:
        seeds.append(dropout_seed)
        return loss(self, *args, dropout_seed=dropout_seed)

    monkeypatch.setattr(XTrimoGeneNetwork, "loss", watched)
    # Fewer steps than an epoch, whose last step is smaller and has a cell in each of its batches.
    changes = {"model": {**MODEL, "dropout": 0.3}, "max_steps": 6}
    run(path, tmp_path / "one", **changes)
    run(path, tmp_path / "four", accumulate=4, batch_cells=2, **changes)
    for name in ("loss", "gradient_norm"):
        assert losses(tmp_path / "four", name=name) == pytest.approx(losses(tmp_path / "one", name=name), rel=1e-4)
    of_steps = seeds[:6]
    assert len(set(of_steps)) == 6, "each step has masks of its own"
    assert seeds[6:] == [seed for seed in of_steps for _ in range(4)]


def test_a_product_head_takes_the_moments_of_training_cells_and_resumes_bit_for_bit(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"model": {**MODEL, "product_head": 4, "dropout": 0.0}}
    run(path, tmp_path / "still", **changes, learning_rate=1e-30)
    model = XTrimoGene.from_pretrained(tmp_path / "still" / "model")
    with (
        TrainingCells(
            path, model.vocabulary, masking=config().masking, min_genes=3, validation_share=0.1, batch_cells=8
        ) as stream,
        torch.no_grad(),
    ):
        batches = [masked.batch for masked in stream.masked(stream.training, 0)]
        features = torch.cat([model.product_features(batch, model(batch)) for batch in batches])
        norm = model.product_head.norm
        torch.testing.assert_close(norm.mean, features.mean(0))
        torch.testing.assert_close(norm.variance, features.var(0, correction=0))
        # The last validation is of the model that is saved.
        squares, chosen = 0.0, 0
        for masked in stream.validation():
            squares, chosen = squares + float(model.loss(masked)), chosen + masked.total_chosen
    assert losses(tmp_path / "still", "validation")[-1] == pytest.approx(squares / chosen, rel=1e-5)

    # Moments of an even step are in the checkpoint of an odd one.
    monkeypatch.setattr("xtrimogene.training.run._SETTLE_EVERY", 2)
    changes["head_steps"] = 4
    run(path, tmp_path / "whole", **changes)
    run(path, tmp_path / "halved", **changes, max_seconds=1e-9)
    run(path, tmp_path / "halved", **changes, resume=True)
    assert_same_weights(tmp_path / "halved", tmp_path / "whole")
    # And those of the first step of all of the model have its encoder in them.
    monkeypatch.setattr("xtrimogene.training.run._SETTLE_EVERY", 10**9)
    run(path, tmp_path / "seldom", **changes)
    often, seldom = (weights(tmp_path / name)["product_head.norm.variance"] for name in ("whole", "seldom"))
    assert not torch.equal(often, seldom)
    assert (seldom[-model.config.dim :] > 0).all()


@pytest.mark.parametrize("settled", [True, False])
def test_a_run_keeps_the_moments_of_its_checkpoint(path: Path, tmp_path: Path, settled: bool) -> None:
    model = XTrimoGene(
        XTrimoGeneConfig.from_dict({"num_genes": len(GENES), **MODEL, "product_head": 4}), Vocabulary(GENES)
    )
    assert model.product_head is not None
    assert not model.product_head.norm.is_settled
    if settled:
        model.product_head.norm.settle(torch.randn(9, 3 + 2 * MODEL["dim"]) + 2)
        assert model.product_head.norm.is_settled
    model.save_pretrained(tmp_path / "begun")
    config = PretrainConfig.from_dict(
        {**{key: value for key, value in OPTIONS.items() if key != "model"}, "checkpoint": str(tmp_path / "begun")}
    )
    pretrain(config, path, tmp_path / "run", progress=False)
    begun, ended = (load_file(tmp_path / name / "model.safetensors") for name in ("begun", "run/model"))
    assert not torch.equal(begun["product_head.cell_map.weight"], ended["product_head.cell_map.weight"])
    for name in ("product_head.norm.mean", "product_head.norm.variance"):
        assert torch.equal(begun[name], ended[name]) == settled


def test_the_product_head_begins_with_the_means_and_learns_alone_at_first(path: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": {**MODEL, "product_head": 4}, "masking": MaskingConfig(zero_rate=0.2)}
    changes["weight_decay"] = 0.5  # which what does not learn is spared
    # The fresh model, the one after a step of the head alone, and after a step of all of it.
    for name, rate, head_steps in (("fresh", 1e-30, 3), ("head", 1e-2, 3), ("all", 1e-2, 0)):
        run(
            path,
            tmp_path / name,
            **changes,
            learning_rate=rate,
            head_learning_rate=rate,
            warmup_steps=0,
            head_steps=head_steps,
            max_seconds=1e-9,
        )
    fresh, head, everything = (weights(tmp_path / name) for name in ("fresh", "head", "all"))
    for name, tensor in fresh.items():
        learns = name == "embedding.gene_table" or name.startswith("product_head")
        if learns and "norm" not in name:
            assert not torch.equal(head[name], tensor), name
        elif not learns:
            assert torch.equal(head[name], tensor), name
    assert not torch.equal(everything["decoder.head.weight"], fresh["decoder.head.weight"])
    # Each gene's mean where it is chosen, over the training cells, which are chosen often enough here.
    vocabulary = XTrimoGene.from_pretrained(tmp_path / "fresh" / "model").vocabulary
    masking = MaskingConfig(zero_rate=0.2)
    with TrainingCells(path, vocabulary, masking=masking, min_genes=3, validation_share=0.1, batch_cells=8) as stream:
        genes, values = [], []
        for epoch in range(60):
            for masked in stream.iterate(epoch):
                genes.append(masked.chosen_ids.numpy())
                values.append(masked.chosen_values.numpy())
    found = np.bincount(np.concatenate(genes), np.concatenate(values)) / np.bincount(np.concatenate(genes))
    assert np.corrcoef(found, fresh["product_head.gene_bias"].numpy())[0, 1] > 0.99
    np.testing.assert_allclose(fresh["product_head.gene_bias"].numpy().mean(), found.mean(), rtol=0.05)


def test_checkpointed_activations_change_no_bit(path: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run(path, tmp_path / "run", activation_checkpointing=True)
    assert_same_weights(tmp_path / "run", uninterrupted)


def test_bfloat16_trains_float32_weights(path: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run(path, tmp_path / "run", precision="bfloat16")
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())
    assert losses(tmp_path / "run") != losses(uninterrupted)
    assert losses(tmp_path / "run") == pytest.approx(losses(uninterrupted), rel=0.02)


def test_projections_are_redrawn(path: Path, tmp_path: Path) -> None:
    for name, steps in (("four", 5), ("five", 6)):
        run(path, tmp_path / name, max_steps=steps)
    before, after = (
        {name: x for name, x in weights(tmp_path / run_).items() if "projection" in name} for run_ in ("four", "five")
    )
    assert len(before) == 2
    for name in before:
        assert not torch.equal(before[name], after[name])


def test_the_time_limit_ends_a_run_as_its_steps_do(path: Path, tmp_path: Path, uninterrupted: Path) -> None:
    report = run(path, tmp_path / "run", max_seconds=1e-9)
    assert (report.steps, report.signal) == (1, 0)
    assert report.model is not None
    assert report.validation_loss == losses(tmp_path / "run", "validation")[-1]
    assert run(path, tmp_path / "run", resume=True, max_seconds=1e-9).steps == 1
    # Given more time, it goes on.
    assert run(path, tmp_path / "run", resume=True).resumed_steps == 1
    assert_same_weights(tmp_path / "run", uninterrupted)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Do something in the middle of a step, counted from 0."""
    redraw = Run._step

    def step_and_act(self: Run, *rest: Any) -> int:
        if self.progress.step == step:
            action()
        return redraw(self, *rest)

    monkeypatch.setattr(Run, "_step", step_and_act)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(
    number: int,
    status: int,
    path: Path,
    tmp_path: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: os.kill(os.getpid(), number))
        assert main(arguments(path, output)) == status
    captured = capfd.readouterr()
    assert f"{signal.Signals(number).name}: stops after this step, or batch of a validation" in captured.err
    assert "stopped, with a checkpoint of step 6; --resume goes on" in captured.out
    assert not (output / "model").exists()
    assert sorted(entry.name for entry in (output / "checkpoints").iterdir())[-1] == "step-000000006"
    assert main(arguments(path, output, "--resume")) == 0
    assert "12 steps (6 of them by an earlier run)" in capfd.readouterr().out
    assert_same_weights(output, uninterrupted)
    assert timeless(output) == timeless(uninterrupted)


def test_resume_alone_goes_on_with_the_config_of_the_run(
    path: Path,
    tmp_path: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(arguments(path, output)) == 143
    alone = ["pretrain", "--data", str(path), "--output", str(output), "--threads", "1", "--no-progress", "--resume"]
    # What is given beside it must still be what the run has.
    capfd.readouterr()
    assert main([*alone, "max_steps=5"]) == 2
    assert "max_steps was 12, is 5" in capfd.readouterr().err
    assert main([*alone, "max_steps=12"]) == 0
    assert "12 steps (6 of them by an earlier run)" in capfd.readouterr().out
    assert_same_weights(output, uninterrupted)
    # A run that is over is not made longer: another one begins with its weights.
    assert main([*alone, "max_steps=20"]) == 2
    assert f"name another folder; checkpoint={output / 'model'} begins there" in capfd.readouterr().err


@pytest.mark.parametrize("step", [0, 6])
def test_a_signal_breaks_a_validation_off(
    step: int,
    path: Path,
    tmp_path: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    validate = Run._validate

    def signal_and_validate(self: Run, signals: StopSignals) -> Any:
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, signals)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_validate", signal_and_validate)
        # The second time, the run goes on from the checkpoint that the first one left, and comes no further.
        for more in ((), ("--resume",)):
            assert main(arguments(path, output, *more)) == 143
            with_what = f"with a checkpoint of step {step}" if step else "before the first step"
            assert f"stopped, {with_what}; --resume goes on" in capfd.readouterr().out
            present = sorted(entry.name for entry in (output / "checkpoints").glob("*"))
            assert present[-1:] == ([f"step-{step:09}"] if step else [])
            validated = [line["step"] for line in read_log(output / "log.jsonl") if line["event"] == "validation"]
            assert validated == list(range(0, step, 6))
    assert main(arguments(path, output, "--resume")) == 0
    assert_same_weights(output, uninterrupted)
    assert timeless(output) == timeless(uninterrupted)


def test_validations_and_checkpoints_do_not_slow_the_rate_of_steps(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = Run._validate

    def validate_slowly(self: Run, signals: StopSignals) -> Any:
        time.sleep(3)
        return validate(self, signals)

    monkeypatch.setattr(Run, "_validate", validate_slowly)
    report = run(path, tmp_path / "run", max_steps=1)
    (line,) = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["event"] == "train"]
    assert line["seconds"] >= 3
    assert report.cells / line["cells_per_second"] < 3


@pytest.mark.parametrize(
    "text", ["{}", '{"run"', "[]", '{"run": {}, "machine": 3}', '{"run": {}, "machine": {}, "crc32": "00000000"}']
)
def test_a_damaged_run_file_is_named(text: str, path: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run.json: expected what a run writes there, got a damaged file"):
        run(path, output, resume=True)


def test_a_step_without_a_chosen_gene_says_so(path: Path, tmp_path: Path) -> None:
    # Of a handful of genes, so small a share rounds to none.
    rates = MaskingConfig(nonzero_rate=1e-6, zero_rate=0.0)
    with pytest.raises(TrainingFailed, match=r"step 1: no gene was chosen; raise masking.nonzero_rate"):
        run(path, tmp_path / "run", masking=rates, validation_share=0.0)
    with pytest.raises(TrainingFailed, match=r"validation: no gene was chosen"):
        run(path, tmp_path / "other", masking=rates)


def test_a_vocabulary_may_move(path: Path, tmp_path: Path) -> None:
    report = run(path, tmp_path / "run", max_steps=1)
    assert report.model is not None
    for name in ("one.tsv", "other.tsv"):
        shutil.copy(report.model / "vocabulary.tsv", tmp_path / name)
    run(path, tmp_path / "moved", max_steps=1, vocabulary=str(tmp_path / "one.tsv"))
    again = run(path, tmp_path / "moved", max_steps=1, vocabulary=str(tmp_path / "other.tsv"), resume=True)
    assert again.resumed_steps == 1


def killed(path: Path, output: Path, lines: int, *more: str) -> None:
    """Start a run as a process of its own and kill it when its log has so many lines."""
    process = subprocess.Popen(
        [sys.executable, "-m", "xtrimogene", *arguments(path, output, *more)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = output / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= lines):
        if process.poll() is not None:
            pytest.fail(f"the run ended by itself: {process.communicate()[0]}")
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    path: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    output = tmp_path / "run"
    # A line of validation and six of steps: the checkpoint of step 4 is there, that of step 8 is not.
    killed(path, output, 7)
    assert not (output / "model").exists()
    steps = [int(entry.name[5:14]) for entry in (output / "checkpoints").iterdir()]
    assert steps[0] == 4
    # What a kill can leave: a line and a checkpoint by half.
    with open(output / "log.jsonl", "a") as log:
        log.write('{"event": "tr')
    shutil.copytree(output / "checkpoints" / "step-000000004", output / "checkpoints" / "step-000000008.tmp")
    report = run(path, output, resume=True)
    assert report.resumed_steps in steps
    assert_same_weights(output, uninterrupted)
    assert timeless(output) == timeless(uninterrupted)
    assert sorted(entry.name for entry in (output / "checkpoints").iterdir()) == [
        "step-000000004", "step-000000008", "step-000000012"
    ]  # fmt: skip


class Killed(BaseException):
    """Ends a run anywhere, without any of its own words, as SIGKILL would."""


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("step", [0, 3, 4, 8, 11])
def test_a_run_that_dies_at_any_step_goes_on(
    step: int, path: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step, kill)
        with pytest.raises(Killed):
            run(path, tmp_path / "run")
    report = run(path, tmp_path / "run", resume=True)
    assert report.resumed_steps == step // 4 * 4
    assert_same_weights(tmp_path / "run", uninterrupted)
    assert timeless(tmp_path / "run") == timeless(uninterrupted)


@pytest.mark.parametrize(
    "moment",
    [
        "xtrimogene.training.checkpoints.dcp.save",
        "xtrimogene.training.checkpoints._size_and_crc",
        "xtrimogene.training.run.save",
        "xtrimogene.training.run_folder.write_whole",
        "xtrimogene.training.log.TrainingLog.sync",
    ],
)
def test_a_run_that_dies_while_it_writes_goes_on(
    moment: str, path: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(moment, lambda *_, **__: kill())
        with pytest.raises(Killed):
            run(path, tmp_path / "run")
    run(path, tmp_path / "run", resume=True)
    assert_same_weights(tmp_path / "run", uninterrupted)
    assert timeless(tmp_path / "run") == timeless(uninterrupted)


def test_a_broken_checkpoint_is_passed_over(path: Path, tmp_path: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    newest = tmp_path / "run" / "checkpoints" / "step-000000012" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-000000012: broken checkpoint passed over"):
        report = run(path, tmp_path / "run", resume=True)
    assert report.resumed_steps == 8
    assert_same_weights(tmp_path / "run", uninterrupted)
    assert timeless(tmp_path / "run") == timeless(uninterrupted)


def test_a_finished_run_is_not_run_again(path: Path, tmp_path: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    report = run(path, tmp_path / "run", resume=True)
    assert (report.steps, report.resumed_steps) == (12, 12)
    assert report.validation_loss == losses(uninterrupted, "validation")[-1]
    assert timeless(tmp_path / "run") == timeless(uninterrupted)
    assert run(path, tmp_path / "new", resume=True).resumed_steps == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-2, "seed": 1}, r"seed was 0, is 1; learning_rate was 0.001, is 0.01; give"),
        ({"masking": {}}, r"masking.zero_rate was 0.3, is 0.03"),
        ({"model": {**MODEL, "dropout": 0.0}}, r"model.dropout was None, is 0.0"),
        ({"accumulate": 2}, r"batches a step \(ranks times accumulate\) was 1, is 2"),
        ({"data": "values"}, r"cells, genes and values was"),
        ({"data": "name"}, r"data sets was \[\['cells.h5ad', 64\]\], is \[\['other.h5ad', 64\]\]"),
    ],
)
def test_resume_refuses_another_run(
    change: dict[str, Any], message: str, path: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    change = dict(change)
    data = change.pop("data", None)
    if data == "name":
        path = path.rename(tmp_path / "other.h5ad")
    elif data == "values":
        adata = cells()
        adata.X.data[adata.X.data == 2] = 3
        adata.write_h5ad(path)
    with pytest.raises(ValueError, match=message):
        run(path, tmp_path / "run", resume=True, **change)
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_a_run_of_a_version_that_knew_fewer_keys_goes_on(path: Path, tmp_path: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    known = unsealed(file.read_bytes())
    for key in ("aliases", "values", "fractional_counts", "total_counts"):
        del known["run"][key]
    file.write_text(sealed(known))
    assert run(path, tmp_path / "run", resume=True).resumed_steps == 12
    with pytest.raises(ValueError, match="fractional_counts was False, is True"):
        run(path, tmp_path / "run", resume=True, fractional_counts=True)


def test_totals_and_aliases_that_change_make_another_run(tmp_path: Path) -> None:
    adata, path, table = cells(), tmp_path / "cells.h5ad", tmp_path / "aliases.tsv"
    adata.obs["n"] = np.asarray(adata.X.sum(axis=1)).ravel() + 100
    adata.var_names = [*GENES[:-1], "old"]
    genes = tmp_path / "genes.txt"
    genes.write_text("\n".join(GENES))
    table.write_text(f"old\t{GENES[-1]}\n")
    adata.write_h5ad(path)
    changes: dict[str, Any] = {
        "total_counts": "n", "aliases": str(table), "max_steps": 1, "vocabulary": str(genes), "values": "counts"
    }  # fmt: skip
    run(path, tmp_path / "run", **changes)
    assert run(path, tmp_path / "run", resume=True, **changes).resumed_steps == 1
    table.write_text("none\tnothing\n")
    with pytest.raises(ValueError, match="cells, genes and values was"):
        run(path, tmp_path / "run", resume=True, **changes)
    table.write_text(f"old\t{GENES[-1]}\n")
    adata.obs.iloc[-1, 0] += 1
    adata.write_h5ad(path)
    with pytest.raises(ValueError, match="cells, genes and values was"):
        run(path, tmp_path / "run", resume=True, **changes)


def test_another_machine_is_warned_of(path: Path, tmp_path: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match=r"threads was 1, is 2: the run goes on, but its weights can differ"):
        run(path, tmp_path / "run", resume=True)


def test_two_runs_at_once(path: Path, tmp_path: Path, uninterrupted: Path) -> None:
    import fcntl

    shutil.copytree(uninterrupted, tmp_path / "run")
    with open(tmp_path / "run" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another run is at work in it"):
            run(path, tmp_path / "run", resume=True)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("xtrimogene: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["learning_rat=1"], "config learning_rat: unknown key, got 1; did you mean learning_rate?"),
        (["--config", "none.yaml"], "config none.yaml: no such file"),
        (["vocabulary=none.tsv"], "vocabulary none.tsv: no such file"),
        (["--data", "none.h5ad"], "none.h5ad: no such file"),
        (["--data", "{folder}/text.h5ad"], "text.h5ad: expected an h5ad file"),
        (["--data", "{folder}/cells.h5ad", "{folder}/cut.h5ad"], "cut.h5ad"),
        (["--data", "{folder}/empty"], "empty: expected h5ad files or zarr stores in the folder, got none"),
        (["--output", "{folder}/empty"], "exists; name another folder, or go on with its run: --resume"),
        (["--output", "{folder}/empty", "--resume", "--data", "none.h5ad"], "none.h5ad: no such file"),
        (["--output", "{folder}/cells.h5ad", "--resume"], "expected the folder of a run, got a file"),
        (["--output", "{folder}", "--resume"], "expected the folder of a run, got one without run.json"),
        (["--output", "/proc/run"], "output /proc/run: the folder cannot be made"),
        (["--device", "abacus"], "device: expected 'auto'"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["min_genes=40"], "expected cells to train on"),
        (["batch_tokens=5"], "batch_tokens: expected room for the longest cell"),
        (["accumulate=100"], "expected at most as many batches a step as there are cells"),
    ],
)
def test_errors_are_one_line_and_change_nothing(
    change: list[str], message: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = path.parent
    words = [*arguments(path, folder / "run"), *(word.format(folder=folder) for word in change)]
    (folder / "text.h5ad").write_text("precious")
    (folder / "cut.h5ad").write_bytes(path.read_bytes()[:-3000])
    (folder / "empty").mkdir()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert main(words) == 2
    assert message in error_line(capsys)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert not (folder / "run").exists()


def test_changes_may_stand_anywhere(path: Path, tmp_path: Path) -> None:
    words = arguments(path, tmp_path / "run")
    after_data = words.index(str(path)) + 1
    words = [words[0], "max_steps=2", *words[1:after_data], "model.dropout=0", *words[after_data:], "seed=3"]
    assert main(words) == 0
    chosen = PretrainConfig.from_yaml(tmp_path / "run" / "config.yaml")
    assert (chosen.max_steps, chosen.model["dropout"], chosen.seed, chosen.masking.seed) == (2, 0.0, 3, 3)


def test_words_that_mean_nothing_are_refused(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--max-steps", "3"], ["max-steps=3"], ["3"]):
        with pytest.raises(SystemExit) as stop:
            main([*arguments(path, tmp_path / "run"), *words])
        assert stop.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["loss", "gradient", "file"])
def test_training_that_cannot_go_on_says_why(
    what: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "file":

        def broken(*_: object) -> None:
            raise ValueError("cells.h5ad: cannot read rows 3 to 9")

        stop_at(monkeypatch, 5, lambda: monkeypatch.setattr(TrainingCells, "_masked", broken))
        expected = "cells.h5ad: cannot read rows 3 to 9; go on with --resume"
    elif what == "loss":
        monkeypatch.setattr(XTrimoGeneNetwork, "loss", lambda self, *_, **__: self.mask_row.sum() * torch.nan)
        expected = "step 1: the loss is nan; lower learning_rate"
    else:
        loss = XTrimoGene.loss

        def steep(*arguments: Any, **options: Any) -> torch.Tensor:
            squares = loss(*arguments, **options)
            squares.register_hook(lambda gradient: gradient * torch.inf)
            return squares

        monkeypatch.setattr(XTrimoGeneNetwork, "loss", steep)
        expected = "step 1: the norm of the gradient is"
    assert main(arguments(path, tmp_path / "run", "validation_share=0")) == 1
    assert expected in error_line(capsys)


def test_no_validation_cells_no_validation(path: Path, tmp_path: Path) -> None:
    report = run(path, tmp_path / "run", validation_share=0.0, max_steps=1)
    assert np.isnan(report.validation_loss)
    assert losses(tmp_path / "run", "validation") == []


def test_several_files_a_folder_and_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    for seed in range(2):
        cells(seed).write_h5ad(tmp_path / "cells" / f"{seed}.h5ad")
    (tmp_path / "genes.txt").write_text("\n".join(GENES[:30]))
    changes = {"vocabulary": str(tmp_path / "genes.txt"), "max_steps": 3}
    run(tmp_path / "cells", tmp_path / "folder", **changes)
    run([tmp_path / "cells" / "0.h5ad", tmp_path / "cells" / "1.h5ad"], tmp_path / "files", **changes)
    assert_same_weights(tmp_path / "folder", tmp_path / "files")
    assert XTrimoGene.from_pretrained(tmp_path / "files" / "model").vocabulary.genes == tuple(GENES[:30])


def test_depth_tokens(path: Path, tmp_path: Path) -> None:
    report = run(path, tmp_path / "run", model={**MODEL, "depth_tokens": True}, max_steps=2)
    assert report.model is not None
    assert XTrimoGene.from_pretrained(report.model).config.depth_tokens


def test_a_run_begins_with_the_weights_of_a_checkpoint(path: Path, tmp_path: Path, uninterrupted: Path) -> None:
    options = {name: value for name, value in OPTIONS.items() if name != "model"}
    checkpoint = str(uninterrupted / "model")
    changed = PretrainConfig.from_dict({**options, "checkpoint": checkpoint, "max_steps": 1})
    pretrain(changed, path, tmp_path / "run", device="cpu", progress=False)
    assert losses(tmp_path / "run", "validation")[0] == pytest.approx(losses(uninterrupted, "validation")[-1])
    assert losses(tmp_path / "run", "validation")[0] != losses(uninterrupted, "validation")[0]


def test_the_checkpoint_that_a_run_begins_with_is_opened_once(
    path: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of it, for vocabulary, config, sizes and weights; so does embed."""
    opened: list[str] = []

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            opened.append(name)
            return function(*args, **options)

        monkeypatch.setattr(module, name, call)

    counted(folder, "safe_open")
    counted(XTrimoGeneConfig, "from_json")
    counted(Vocabulary, "load")
    options = {name: value for name, value in OPTIONS.items() if name != "model"}
    begun = PretrainConfig.from_dict({**options, "checkpoint": str(uninterrupted / "model"), "max_steps": 1})
    pretrain(begun, path, tmp_path / "run", device="cpu", progress=False)
    assert sorted(opened) == ["from_json", "load", "safe_open"]
    opened.clear()
    embed(path, uninterrupted / "model", output=tmp_path / "embedded.h5ad", progress=False)
    assert sorted(opened) == ["from_json", "load", "safe_open"]


@pytest.mark.parametrize("change", [{"model": MODEL}, {"vocabulary": "genes.tsv"}])
def test_a_checkpoint_has_its_own_model_and_vocabulary(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"config {next(iter(change))}: expected none beside checkpoint"):
        PretrainConfig.from_dict({"checkpoint": "folder", **change})
