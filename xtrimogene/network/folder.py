"""A model's folder on disk: model.safetensors, config.json, vocabulary.tsv and a model card.

It is written whole or not at all, and nothing in it is unpickled.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.vocabulary import Vocabulary

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
VOCABULARY_FILE = "vocabulary.tsv"
CARD_FILE = "README.md"
CHECKPOINT_FILES = (CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# Sections of a model card, and what stands there until its author says more.
CARD_SECTIONS = {
    "Data": "Not stated: which cells the weights were trained on, from where, under which licence.",
    "Recipe": "Not stated: how the weights were trained. Weights that were never trained are random numbers.",
    "Figures": "Not stated: what the model was measured to do on held-out cells, beside PCA and an untrained network.",
    "Limits": "Not stated: species, tissues and chemistries of its cells; not known to work on others.",
}
_PICKLE_REFUSAL = (
    "a pickle can run code when it is read, so it is not opened; save the model as safetensors "
    "(XTrimoGene.save_pretrained) and load that folder"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, opened once: what is small in it is here, the weights are read when they are asked for.

    They are those of the file that check_sizes has looked at, whatever bears its name by then.
    """

    folder: Path
    config: XTrimoGeneConfig
    vocabulary: Vocabulary

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config and vocabulary of a folder, and check that its weights are there.

        Raises FileNotFoundError for a missing folder or file, ValueError for a pickle or a bad config or vocabulary.
        """
        path = Path(folder)
        _check_files(path)
        return cls(path, XTrimoGeneConfig.from_json(path / CONFIG_FILE), Vocabulary.load(path / VOCABULARY_FILE))

    @functools.cached_property
    def _weights(self) -> Any:
        path = self.folder / WEIGHTS_FILE
        try:
            path.open("rb").close()  # safetensors says "no such file" of one that may not be read
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a safetensors file: {error}") from error

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._weights.get_slice(name).get_shape()) for name in self._weights.keys()}  # noqa: SIM118

    def tensors(self, network: nn.Module, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The float32 weights for a network of this config, which may be one on the device "meta".

        Raises ValueError for a broken file, tensors that are missing, unknown or of the wrong shape (all of them are
        named), and numbers that are not finite.
        """
        path, expected, shapes = self.folder / WEIGHTS_FILE, network.state_dict(), self._shapes()
        problems = [f"missing {name}" for name in expected if name not in shapes]
        problems += [f"unknown {name} {shape}" for name, shape in shapes.items() if name not in expected]
        problems += [
            f"{name}: expected shape {tuple(tensor.shape)}, got {shapes[name]}"
            for name, tensor in expected.items()
            if name in shapes and tuple(tensor.shape) != shapes[name]
        ]
        if problems:
            raise ValueError(f"{path}: the tensors do not fit {CONFIG_FILE}: " + "; ".join(problems))
        tensors = {}
        for name in expected:
            tensor = self._weights.get_tensor(name)
            if not tensor.is_floating_point():
                raise ValueError(f"{path}: {name}: expected a float dtype, got {tensor.dtype}")
            # A copy: what safetensors hands out is the file itself, and would change with it.
            tensors[name] = tensor.to(device, torch.float32, copy=True)
            if not bool(torch.isfinite(tensors[name]).all()):
                raise ValueError(f"{path}: {name}: expected finite weights, got NaN or infinite ones")
        return tensors

    def check_sizes(self) -> None:
        """Compare the config with the header of the weights, before a network of these sizes is made.

        Raises ValueError, so that a config with absurd sizes takes neither time nor memory.
        """
        path = self.folder / WEIGHTS_FILE
        shapes, config = self._shapes(), self.config
        layers = {match.groups() for name in shapes if (match := re.match(r"(\w+)\.layers\.(\d+)\.", name))}
        found: dict[str, int | None] = {
            "num_layers": sum(part == "encoder" for part, _ in layers),
            "decoder_layers": sum(part == "decoder" for part, _ in layers),
        }
        for key, name in (
            ("dim", "encoder.norm.weight"),
            ("decoder_dim", "decoder.norm.weight"),
            ("num_features", "decoder.layers.0.projection"),
            ("ffn_dim", "encoder.layers.0.linear1.weight"),
            ("decoder_ffn_dim", "decoder.layers.0.linear1.weight"),
            ("num_bins", "embedding.bin_table"),
            ("product_head", "product_head.gene_map.weight"),
        ):
            found[key] = shapes[name][0] if shapes.get(name) else None
        wrong = [
            f"{key} is {_number(getattr(config, key))} there and {size:,} here"
            for key, size in found.items()
            if size is not None and size != getattr(config, key)
        ]
        if wrong:
            raise ValueError(f"{path}: the tensors do not fit {CONFIG_FILE}: {'; '.join(wrong)}")


def _number(size: int | None) -> str:
    return "none" if size is None else f"{size:,}"


def save(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: XTrimoGeneConfig,
    vocabulary: Vocabulary,
    *,
    card: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model's folder, beside its place and then renamed, so that no reader ever sees half of one.

    tensors  state dict of the network
    card     text of the model card's sections Data, Recipe, Figures and Limits; what is left out is said to be unknown

    Raises FileExistsError when the folder exists and is not empty, unless overwrite; also with overwrite when it holds
    files that no checkpoint has, since the whole folder is replaced.
    """
    target = Path(os.path.realpath(folder))  # what a link points at is written, and the link stays
    refuse_occupied(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:12]
    written = target.with_name(f".{target.name}.{mark}.tmp")
    replaced = target.with_name(f".{target.name}.{mark}.old")
    try:
        written.mkdir()
        (written / CONFIG_FILE).write_text(json.dumps(config.to_dict(), sort_keys=True, indent=2), encoding="utf-8")
        vocabulary.save(written / VOCABULARY_FILE)
        (written / CARD_FILE).write_text(_card(target.name, tensors, config, vocabulary, card or {}), encoding="utf-8")
        plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(plain, written / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:  # also for a full disk
            raise OSError(f"{target / WEIGHTS_FILE}: cannot be written: {error}") from error
        # safetensors makes files that only their owner can read, whatever the umask.
        (written / WEIGHTS_FILE).chmod(stat.S_IMODE((written / CONFIG_FILE).stat().st_mode))
        if target.exists():
            target.rename(replaced)
        try:
            written.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _card(
    name: str,
    tensors: Mapping[str, Tensor],
    config: XTrimoGeneConfig,
    vocabulary: Vocabulary,
    sections: Mapping[str, str],
) -> str:
    """The README.md of a model's folder; its head is what the Hugging Face Hub reads."""
    numbers = sum(tensor.numel() for tensor in tensors.values())
    lines = [
        "---",
        "library_name: xtrimogene",
        "tags: [single-cell, gene-expression]",
        "---",
        "",
        f"# {name}",
        "",
        f"An xTrimoGene model ([arXiv 2311.15156](https://arxiv.org/abs/2311.15156)) of {len(vocabulary):,} genes: "
        f"{config.num_layers} encoder layers of width {config.dim}, {config.decoder_layers} decoder layers of width "
        f"{config.decoder_dim}, {numbers:,} numbers in all.",
        "",
        "```python",
        "import xtrimogene",
        "",
        f'model = xtrimogene.XTrimoGene.from_pretrained("{name}")',
        'report = xtrimogene.embed("cells.h5ad", model)',
        "```",
    ]
    for title, unknown in CARD_SECTIONS.items():
        lines += ["", f"## {title}", "", sections.get(title, unknown)]
    return "\n".join(lines) + "\n"


def refuse_occupied(target: Path, overwrite: bool) -> None:
    """Raises FileExistsError for a place that ``save`` would refuse, so that it can be said before the work."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder to write a checkpoint to, got a file")
    present = sorted(entry.name for entry in target.iterdir())
    if present and not overwrite:
        raise FileExistsError(f"{target}: the folder is not empty; name another, or pass overwrite=True (--overwrite)")
    foreign = [name for name in present if name not in (*CHECKPOINT_FILES, CARD_FILE)]
    if foreign:
        raise FileExistsError(
            f"{target}: overwrite replaces the whole folder, and {', '.join(foreign)} in it belongs to no checkpoint; "
            "move it away or name another folder"
        )


def _check_files(path: Path) -> None:
    """Refuses a folder that is not one of a model."""
    if path.is_file():
        raise ValueError(
            f"{path}: {_PICKLE_REFUSAL}"
            if path.suffix in PICKLE_SUFFIXES
            else f"{path}: expected a checkpoint folder, got a file"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint folder")
    if not (path / WEIGHTS_FILE).is_file():
        pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise ValueError(f"{path}: no {WEIGHTS_FILE}, only {', '.join(pickles)}: {_PICKLE_REFUSAL}")
    missing = [name for name in CHECKPOINT_FILES if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}: expected a checkpoint folder with {', '.join(CHECKPOINT_FILES)}; missing: {', '.join(missing)}"
        )
