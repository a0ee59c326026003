"""Tests of xtrimogene.training.config: YAML, key=value changes, the learning rate, and the error for each bad key."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from xtrimogene import cli
from xtrimogene.cells.masking import MaskingConfig
from xtrimogene.cli import pretrain as command
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.training.config import RECIPES, PretrainConfig


def test_defaults_are_the_published_recipe() -> None:
    config = PretrainConfig()
    assert (config.learning_rate, config.weight_decay, config.clip_norm) == (1e-4, 0.0, 1.0)
    assert config.masking == MaskingConfig(0.3, 0.03, 0.8, 0.1)
    assert config.min_genes == 200
    assert config.redraw_every == 1000
    assert config.model_config(19264) == XTrimoGeneConfig.preset("3m", num_genes=19264)
    assert PretrainConfig.from_yaml(None) == config


def test_yaml_with_changes(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  preset: tiny\n  dim: 32\nmasking:\n  zero_rate: 0.1\nseed: 7\nlearning_rate: 1e-3\n")
    changes = ["model.dropout=0", "masking.nonzero_rate=5e-1", "max_steps=20", "schedule=cosine", "vocabulary=g.tsv"]
    config = PretrainConfig.from_yaml(path, changes)
    assert config.model_config(9) == XTrimoGeneConfig.preset("tiny", num_genes=9, dim=32, dropout=0.0)
    assert config.masking == MaskingConfig(nonzero_rate=0.5, zero_rate=0.1, seed=7)
    assert (config.learning_rate, config.max_steps, config.schedule) == (1e-3, 20, "cosine")
    assert config.vocabulary == "g.tsv"
    assert PretrainConfig.from_dict(config.to_dict()) == config
    config.to_yaml(tmp_path / "again.yaml")
    assert PretrainConfig.from_yaml(tmp_path / "again.yaml") == config


def test_a_recipe_is_what_the_given_keys_leave_out(tmp_path: Path) -> None:
    assert PretrainConfig.from_yaml(None, recipe="published") == PretrainConfig()
    small = PretrainConfig.from_yaml(None, recipe="small")
    assert (small.batch_cells, small.learning_rate, small.beta2, small.schedule) == (32, 1e-3, 0.99, "cosine")
    assert (small.head_steps, small.head_learning_rate) == (4000, 5e-3)
    sizes = {"dropout": 0.0, "product_head": 64, "product_dropout": 0.2, "gene_std": 0.05}
    assert small.model_config(9) == XTrimoGeneConfig.preset("tiny", num_genes=9, **sizes)
    assert PretrainConfig.from_dict({}, recipe="small") == small
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  preset: 3m\n  dropout: 0.2\nbeta2: 0.9\n")
    changed = PretrainConfig.from_yaml(path, ["model.product_head=7", "batch_cells=3"], recipe="small")
    assert (changed.batch_cells, changed.beta2, changed.learning_rate) == (3, 0.9, 1e-3)
    wanted = {**sizes, "dropout": 0.2, "product_head": 7}
    assert changed.model_config(9) == XTrimoGeneConfig.preset("3m", num_genes=9, **wanted)
    one = PretrainConfig.from_yaml(None, ["model.dim=32"], recipe="small")
    assert one.model_config(9) == XTrimoGeneConfig.preset("tiny", num_genes=9, **sizes, dim=32)
    # A term that a recipe has can be taken away, and what a run has written is what it was.
    assert (
        PretrainConfig.from_yaml(None, ["model.product_head=null"], recipe="small").model_config(9).product_head is None
    )
    changed.to_yaml(tmp_path / "again.yaml")
    assert PretrainConfig.from_yaml(tmp_path / "again.yaml") == changed


def test_a_recipe_leaves_sizes_without_preset_and_checkpoints_alone() -> None:
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "decoder_dim": 8, "decoder_layers": 1, "decoder_heads": 2}
    config = PretrainConfig.from_dict({"model": sizes}, recipe="small")
    own = {"dropout": 0.0, "product_head": 64, "product_dropout": 0.2, "gene_std": 0.05}
    assert config.model_config(5) == XTrimoGeneConfig(num_genes=5, **sizes, **own)
    tuned = PretrainConfig.from_dict({"checkpoint": "folder"}, recipe="small")
    assert (tuned.learning_rate, tuned.model) == (1e-3, PretrainConfig().model)
    tuned = PretrainConfig.from_dict({"checkpoint": "folder", "batch_cells": 3}, recipe="tune")
    assert (tuned.learning_rate, tuned.batch_cells, tuned.head_steps) == (3e-4, 3, 1000)
    assert (tuned.head_learning_rate, tuned.beta2, tuned.model) == (2e-3, 0.99, PretrainConfig().model)
    with pytest.raises(ValueError, match=r"recipe tune: expected checkpoint=DIR, the model to go on with; a new one"):
        PretrainConfig.from_yaml(None, ["max_steps=3"], recipe="tune")
    with pytest.raises(ValueError, match="recipe: expected one of published, small, tune, got 'big'"):
        PretrainConfig.from_yaml(None, ["model.dim=3"], recipe="big")


def test_the_command_begins_with_the_recipe_that_fits() -> None:
    def recipe(*words: str) -> str:
        arguments = cli._parser().parse_args(["pretrain", "--data", "a.h5ad", "--output", "run", *words[:2]])
        arguments.changes = list(words[2:])
        return command._recipe(arguments, command._config_file(arguments))

    assert sorted(command.RECIPES) == sorted(RECIPES)
    assert recipe() == "small"
    assert recipe("--threads", "1", "max_steps=7") == "small"
    assert recipe("--config", "config.yaml") == "published"
    assert recipe("--threads", "1", "checkpoint=folder") == "tune"
    assert recipe("--config", "config.yaml", "checkpoint=folder") == "published"
    assert recipe("--recipe", "published") == "published"
    assert recipe("--recipe", "small", "checkpoint=folder") == "small"


def test_the_model_may_be_given_by_its_sizes() -> None:
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "decoder_dim": 8, "decoder_layers": 1, "decoder_heads": 2}
    assert PretrainConfig(model=sizes).model_config(5) == XTrimoGeneConfig(num_genes=5, **sizes)
    assert PretrainConfig.from_yaml(None, ["model.dim=256"]).model_config(5).dim == 256


def test_the_product_head_learns_alone_at_first_at_a_rate_of_its_own() -> None:
    changes = {"head_steps": 100, "learning_rate": 1.0, "head_learning_rate": 4.0, "warmup_steps": 9}
    config = PretrainConfig(max_steps=1000, schedule="cosine", final_rate_share=0.0, **changes)
    model = XTrimoGeneConfig.preset("tiny", num_genes=5, product_head=3)
    assert config.head_steps_of(model) == 100
    assert [config.rate(step, 100) for step in (0, 8, 9)] == pytest.approx([0.4, 3.6, 4.0])
    assert config.rate(99, 100) < 0.01
    # Warm-up and schedule begin anew.
    assert [config.rate(step, 100) for step in (100, 108, 109)] == pytest.approx([0.1, 0.9, 1.0])
    assert config.rate(999, 100) < 0.01
    assert config.rate(50) == PretrainConfig(
        max_steps=1000, schedule="cosine", **{**changes, "head_steps": 0}, final_rate_share=0.0
    ).rate(50)
    # Short runs have some steps of all; without a head there are no such steps.
    assert PretrainConfig(max_steps=50, **changes).head_steps_of(model) == 45
    assert PretrainConfig(max_steps=1000, checkpoint="folder", **changes).head_steps_of(model) == 100
    assert config.head_steps_of(XTrimoGeneConfig.preset("tiny", num_genes=5)) == 0


def test_rate_warms_up_then_stays_or_falls() -> None:
    config = PretrainConfig(max_steps=100, warmup_steps=9, learning_rate=1.0)
    assert [config.rate(step) for step in (0, 4, 8)] == pytest.approx([0.1, 0.5, 0.9])
    assert config.rate(9) == config.rate(99) == 1.0
    config = PretrainConfig(max_steps=109, warmup_steps=9, learning_rate=1.0, schedule="cosine", final_rate_share=0.2)
    assert config.rate(9) == 1.0
    assert config.rate(59) == pytest.approx(0.6)
    assert config.rate(109) == pytest.approx(0.2)
    assert config.rate(34) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    # The published warm-up, or a tenth of a run that is too short for it.
    assert PretrainConfig(max_steps=200).rate(19) < 1e-4 == PretrainConfig(max_steps=200).rate(20)
    assert PretrainConfig(max_steps=10**6).rate(9765) < 1e-4 == PretrainConfig(max_steps=10**6).rate(9766)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("learning_rat=1", r"config learning_rat: unknown key, got 1; did you mean learning_rate\?"),
        ("zzz=1", r"config zzz: unknown key, got 1; known keys: model, checkpoint, vocabulary"),
        ("masking.zero_rat=1", r"config masking.zero_rat: unknown key, got 1; did you mean masking.zero_rate\?"),
        ("model.dims=1", r"config model: config dims: unknown key, got 1; did you mean dim\?"),
        ("model.preset=5m", r"config model: preset: expected one of tiny, 3m, 10m, 100m, got '5m'"),
        ("model.num_genes=5", r"config model.num_genes: expected none, the vocabulary gives it"),
        ("model=3m", r"config model: expected keys and values, got '3m'"),
        ("masking=3", r"config masking: expected keys and values, got 3"),
        ("masking.zero_rate=2", r"config masking: masking zero_rate: expected a number from 0 to 1, got 2"),
        ("masking={zero_rate: 0, nonzero_rate: 0}", r"config masking.nonzero_rate, zero_rate: expected one above 0"),
        ("max_steps=0", r"config max_steps: expected at least 1, got 0"),
        ("max_steps=1.5", r"config max_steps: expected an integer, got 1.5"),
        ("accumulate=yes", r"config accumulate: expected an integer, got True"),
        ("normalized=1", r"config normalized: expected true or false, got 1"),
        ("learning_rate=fast", r"config learning_rate: expected a finite number, got 'fast'"),
        ("learning_rate=0", r"config learning_rate: expected a number > 0, got 0.0"),
        ("clip_norm=-1", r"config clip_norm: expected a number > 0, got -1.0"),
        ("weight_decay=-1", r"config weight_decay: expected at least 0, got -1.0"),
        ("beta2=1", r"config beta2: expected 0 <= beta2 < 1, got 1.0"),
        ("validation_share=1", r"config validation_share: expected 0 <= validation_share < 1, got 1.0"),
        ("final_rate_share=2", r"config final_rate_share: expected 0 to 1, got 2.0"),
        ("schedule=linear", r"config schedule: expected one of constant, cosine, got 'linear'"),
        ("precision=float16", r"config precision: expected one of float32, bfloat16, got 'float16'"),
        ("parallel=tp", r"config parallel: expected one of ddp, fsdp, got 'tp'"),
        ("layer=3", r"config layer: expected a text, got 3"),
        ("seed", r"seed: expected key=value"),
        ("seed.a=1", r"seed.a=1: config seed is no section of keys"),
        ("seed=[1", r"seed=\[1: expected a value that YAML can read"),
    ],
)
def test_bad_keys_and_values_are_refused_by_name(change: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    with pytest.raises(ValueError, match=message):
        PretrainConfig.from_yaml(tmp_path / "config.yaml", [change])


@pytest.mark.parametrize("text", ["- 3m\n", "a: [1\n", "\x00", "max_step: 4\n"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken.yaml: .*(expected|did you mean max_steps)"):
        PretrainConfig.from_yaml(path)
    with pytest.raises(FileNotFoundError, match=r"config .*none.yaml: no such file"):
        PretrainConfig.from_yaml(tmp_path / "none.yaml")


def test_what_a_resumed_run_may_change() -> None:
    fixed = PretrainConfig().fixed()
    assert fixed["masking.zero_rate"] == 0.03
    assert fixed["model.preset"] == "3m"
    free = {"checkpoint_every": 7, "keep_checkpoints": 1, "tensorboard": False, "max_seconds": 5.0}
    assert PretrainConfig(**free).fixed() == fixed  # type: ignore[arg-type]
    assert PretrainConfig(max_steps=7).fixed() != fixed
