"""PretrainConfig: everything that decides what a pre-training run learns, its YAML form and its key=value changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from xtrimogene.cells.kinds import ValueKind
from xtrimogene.cells.masking import MaskingConfig
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.keys import read_yaml, refuse_unknown, typed, with_numbers, write_yaml

SCHEDULES = ("constant", "cosine")
PRECISIONS = ("float32", "bfloat16")
PARALLEL = ("ddp", "fsdp")

# Warm-up of the published recipe: 9,766 steps of 1,024 cells.
PUBLISHED_WARMUP_STEPS = 9766

_DEFAULT_MODEL = {"preset": "3m"}

# What a run begins with where nothing else is said; keys that are given win. "small" is for 10^3 to 10^6 cells, the
# published recipe is made for 10^11 tokens.
RECIPES: dict[str, dict[str, Any]] = {
    "published": {"model": _DEFAULT_MODEL},
    "small": {
        "model": {"preset": "tiny", "dropout": 0.0, "product_head": 64, "product_dropout": 0.2, "gene_std": 0.05},
        "batch_cells": 32,
        "learning_rate": 1e-3,
        # Below, the median of a rare gene is learned in place of its mean: Adam divides by what it remembers.
        "beta2": 0.99,
        "head_steps": 4000,
        "head_learning_rate": 5e-3,
        "schedule": "cosine",
        "final_rate_share": 0.05,
    },
    # To go on with a model that has learned, on a few hundred cells or more of another kind.
    "tune": {
        "model": _DEFAULT_MODEL,
        "batch_cells": 32,
        "learning_rate": 3e-4,
        "beta2": 0.99,
        "head_steps": 1000,
        "head_learning_rate": 2e-3,
        "schedule": "cosine",
        "final_rate_share": 0.05,
    },
}

# Keys that change neither the weights nor what the log says of them: a resumed run may have other values.
_FREE_KEYS = ("checkpoint_every", "keep_checkpoints", "tensorboard", "max_seconds")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What one pre-training run does. Every key has a default; `model` and `masking` are sections of their own.

    model           keys of XTrimoGeneConfig but num_genes, which the vocabulary gives; `preset` names the sizes that
                    the other keys complete or change
    checkpoint      checkpoint folder whose weights the run begins with, and whose config and vocabulary it has; `model`
                    and `vocabulary` are left out then
    vocabulary      file of the genes (see Vocabulary.from_tsv); None: all genes of the training data
    masking         MaskingConfig: rates and shares of the chosen genes; its seed is `seed` where it is not given
    layer, gene_symbols, aliases, normalized, values, fractional_counts, total_counts
                    as for embed: which matrix, which names, what its numbers are and where the cells' totals stand
    min_genes       cells with at most so many expressed genes of the vocabulary are left out
    validation_share, split_seed
                    share of the cells that is kept for validation and never trained on, and which
    validation_cells
                    most validation cells that one validation reads, always the same ones, always masked alike
    seed            of weights, order, masks, dropout and projections

    batch_cells     most cells of one batch of one rank
    batch_tokens    most expressed genes of one batch of one rank
    accumulate      batches whose gradients are added up for one optimizer step
    max_steps       optimizer steps of the run
    max_seconds     the run also ends, as if it had reached max_steps, after so many seconds of training

    learning_rate, weight_decay, beta1, beta2, adam_eps
                    AdamW
    clip_norm       most norm of the gradient of all parameters together
    schedule        after the warm-up: "constant", or "cosine" down to final_rate_share of the rate at max_steps
    warmup_steps    steps of linear warm-up; None: the published 9,766 steps, at most a tenth of max_steps
    redraw_every    steps between two draws of the decoder's random projections
    head_steps      steps at the beginning in which the product head, if there is one, learns alone, without encoder and
                    decoder, which takes little time; at most nine tenths of max_steps. Then warm-up and schedule begin
                    anew
    head_learning_rate
                    learning rate of these steps

    precision       "float32", or "bfloat16" through autocast (weights and optimizer stay float32)
    activation_checkpointing
                    compute each layer once more in the backward pass instead of keeping its activations
    parallel        with several ranks: "ddp", a copy of the model on each, or "fsdp", a part of it on each

    log_every       steps between two lines of the log
    validate_every  steps between two validations; there is one before the first step and one after the last, too
    checkpoint_every, keep_checkpoints
                    steps between two checkpoints, and how many of the newest stay
    tensorboard     also write TensorBoard events, where the package is installed

    The defaults are the recipe "published" (Gong et al., NeurIPS 2023; AdamW, rate 1e-4, no weight decay, clipping at
    1) but for what a batch of 1,024 cells on many GPUs asks for: batch, length and, with it, warm-up are scaled down.
    from_dict and from_yaml begin with another recipe where they are asked to.

    Raises ValueError, naming the key, the expected and the given value, for a value that no run can have.
    """

    model: Mapping[str, Any] = field(default_factory=lambda: dict(_DEFAULT_MODEL))
    checkpoint: str | None = None
    vocabulary: str | None = None
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    layer: str | None = None
    gene_symbols: str | None = None
    aliases: str | None = None
    normalized: bool = False
    values: str | None = None
    fractional_counts: bool = False
    total_counts: str | None = None
    min_genes: int = 200
    validation_share: float = 0.05
    split_seed: int = 0
    validation_cells: int = 1000
    seed: int = 0

    batch_cells: int = 32
    batch_tokens: int = 65_536
    accumulate: int = 1
    max_steps: int = 10_000
    max_seconds: float | None = None

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_norm: float = 1.0
    schedule: str = "constant"
    final_rate_share: float = 0.1
    warmup_steps: int | None = None
    redraw_every: int = 1000
    head_steps: int = 0
    head_learning_rate: float = 5e-3

    precision: str = "float32"
    activation_checkpointing: bool = False
    parallel: str = "ddp"

    log_every: int = 1
    validate_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = typed(each.name, str(each.type), getattr(self, each.name))
            object.__setattr__(self, each.name, value)
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"config {name}: expected at least {low}, got {value!r}")
        for name in ("learning_rate", "head_learning_rate", "adam_eps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"config {name}: expected a number > 0, got {getattr(self, name)!r}")
        for name in ("beta1", "beta2", "validation_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"config {name}: expected 0 <= {name} < 1, got {getattr(self, name)!r}")
        if not 0 <= self.final_rate_share <= 1:
            raise ValueError(f"config final_rate_share: expected 0 to 1, got {self.final_rate_share!r}")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("parallel", PARALLEL)):
            if getattr(self, name) not in known:
                raise ValueError(f"config {name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        try:
            ValueKind.checked(self.values, self.normalized, self.fractional_counts)
        except ValueError as error:
            raise ValueError(f"config {error}") from None
        if not (self.masking.nonzero_rate or self.masking.zero_rate):
            raise ValueError("config masking.nonzero_rate, zero_rate: expected one above 0, got 0 and 0")
        if self.checkpoint is not None and (self.vocabulary is not None or self.model != _DEFAULT_MODEL):
            given = "vocabulary" if self.vocabulary is not None else "model"
            raise ValueError(f"config {given}: expected none beside checkpoint, which has its own; leave it out")
        if "num_genes" in self.model:
            raise ValueError("config model.num_genes: expected none, the vocabulary gives it")
        if self.checkpoint is None:
            self.model_config(num_genes=1)

    def model_config(self, num_genes: int) -> XTrimoGeneConfig:
        """The config of a fresh model, for a vocabulary of num_genes genes. A checkpoint has a config of its own."""
        values = dict(self.model)
        try:
            if "preset" in values:
                return XTrimoGeneConfig.preset(str(values.pop("preset")), num_genes=num_genes, **values)
            return XTrimoGeneConfig.from_dict({"num_genes": num_genes, **values})
        except ValueError as error:
            raise ValueError(f"config model: {error}") from None

    def head_steps_of(self, model: XTrimoGeneConfig) -> int:
        """Steps in which the product head of such a model learns alone."""
        return 0 if model.product_head is None else min(self.head_steps, self.max_steps * 9 // 10)

    def rate(self, step: int, head_steps: int = 0) -> float:
        """Learning rate of optimizer step `step`, counted from 0, of a run whose head learns alone for head_steps."""
        if step < head_steps:
            highest, steps = self.head_learning_rate, head_steps
        else:
            highest, step, steps = self.learning_rate, step - head_steps, self.max_steps - head_steps
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(PUBLISHED_WARMUP_STEPS, steps // 10)
        if step < warmup:
            return highest * (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return highest
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        falling = (1 + math.cos(math.pi * done)) / 2
        return highest * (self.final_rate_share + (1 - self.final_rate_share) * falling)

    def to_dict(self) -> dict[str, Any]:
        """All keys and values, in the order of the class; the sections as dicts."""
        return {**dataclasses.asdict(self), "model": dict(self.model)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, recipe: str = "published") -> PretrainConfig:
        """Inverse of to_dict: keys that are given, over those of a recipe, "published", "small" or "tune".

        The model's keys are taken one by one; where they name sizes without a preset, the recipe's preset is left out,
        and with a checkpoint all of the recipe's model. Raises ValueError for an unknown or bad key, and names it.
        """
        if recipe not in RECIPES:
            raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
        if not isinstance(values, Mapping):
            raise ValueError(f"config: expected keys and values, got {type(values).__name__}")
        refuse_unknown(values, [each.name for each in dataclasses.fields(cls)])
        if recipe == "tune" and values.get("checkpoint") is None:
            raise ValueError("recipe tune: expected checkpoint=DIR, the model to go on with; a new one takes small")
        values = {**RECIPES[recipe], **values}
        if values["model"] is not RECIPES[recipe]["model"] and isinstance(values["model"], Mapping):
            preset = {} if "preset" in values["model"] else {"preset": None}
            merged = {**RECIPES[recipe]["model"], **preset, **values["model"]}
            values["model"] = {key: value for key, value in merged.items() if (key, value) != ("preset", None)}
        elif values.get("checkpoint") is not None:
            del values["model"]
        masking = values.get("masking", {})
        if not isinstance(masking, MaskingConfig):
            if not isinstance(masking, Mapping):
                raise ValueError(f"config masking: expected keys and values, got {masking!r}")
            refuse_unknown(masking, [each.name for each in dataclasses.fields(MaskingConfig)], "masking.")
            try:
                values["masking"] = MaskingConfig(**{"seed": values.get("seed", 0), **masking})
            except (TypeError, ValueError) as error:
                raise ValueError(f"config masking: {error}") from None
        return cls(**values)

    @classmethod
    def from_yaml(
        cls, path: str | Path | None, changes: Iterable[str] = (), *, recipe: str = "published"
    ) -> PretrainConfig:
        """Read a YAML file (None: the recipe alone) and apply `key=value` changes; `model.dim=64` changes a section's
        key. Both go over the keys of the recipe, see from_dict.

        Raises FileNotFoundError, or ValueError that names the file or the change and the key.
        """
        values: Any = {}
        if path is not None:
            try:
                values = read_yaml(path)
            except FileNotFoundError:
                raise FileNotFoundError(f"config {path}: no such file") from None
            except ValueError as error:
                raise ValueError(f"config {error}") from error
            values = {} if values is None else values
            if not isinstance(values, dict):
                raise ValueError(f"config {path}: expected keys and values, got {type(values).__name__}")
            cls._from_file(path, values, recipe)
        for change in changes:
            _apply(values, change, recipe)
        return cls.from_dict(with_numbers(values), recipe=recipe)

    @classmethod
    def _from_file(cls, path: str | Path, values: dict[str, Any], recipe: str) -> PretrainConfig:
        try:
            return cls.from_dict(values, recipe=recipe)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_yaml(self, path: str | Path) -> None:
        """Write the keys and values as a YAML file."""
        write_yaml(path, self.to_dict())

    def fixed(self) -> dict[str, Any]:
        """The keys that a resumed run must share with the run it goes on with, sections as `section.key`."""
        flat: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                flat.update({f"{name}.{key}": item for key, item in value.items()})
            elif name not in _FREE_KEYS:
                flat[name] = value
        return flat


_LEAST = {
    "min_genes": 0,
    "validation_cells": 1,
    "seed": 0,
    "split_seed": 0,
    "batch_cells": 1,
    "batch_tokens": 1,
    "accumulate": 1,
    "max_steps": 1,
    "max_seconds": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "redraw_every": 1,
    "head_steps": 0,
    "log_every": 1,
    "validate_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
}


def _apply(values: dict[str, Any], change: str, recipe: str) -> None:
    name, separator, text = change.partition("=")
    if not separator or not name:
        raise ValueError(f"{change}: expected key=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise ValueError(f"{change}: expected a value that YAML can read") from None
    section, dot, key = name.partition(".")
    if not dot:
        values[name] = value
        return
    inner = values.setdefault(section, {"preset": _preset_of(recipe)} if section == "model" else {})
    if not isinstance(inner, dict):
        raise ValueError(f"{change}: config {section} is no section of keys")
    inner[key] = value


def _preset_of(recipe: str) -> str | None:
    # A recipe that there is not is refused, by name, when all keys are together.
    return RECIPES[recipe]["model"]["preset"] if recipe in RECIPES else None
