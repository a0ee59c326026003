"""XTrimoGeneConfig: the sizes of one model, its named presets, and its YAML, dict and JSON forms."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtrimogene.network.keys import read_yaml, refuse_unknown, typed, write_yaml

# The 3m shape agrees with a public re-implementation, 100m is the released scFoundation shape. The paper's row for
# 10 M parameters could not be found: ours keeps the paper's two encoder layers for each decoder layer. tiny is ours: it
# learns something in a minute on two CPU cores.
_PRESET_KEYS = ("num_layers", "dim", "num_heads", "decoder_layers", "decoder_dim", "decoder_heads")
_PRESET_SIZES = {
    "tiny": (2, 64, 2, 1, 64, 2),
    "3m": (4, 128, 2, 2, 128, 2),
    "10m": (8, 256, 8, 4, 192, 6),
    "100m": (12, 768, 12, 6, 512, 8),
}
STABILIZERS = ("head", "cell")
PRODUCT = "product"
# Of the product head: numbers that say how deep a cell is, and its hidden layer as a multiple of product_head.
DEPTH_NUMBERS = 3
PRODUCT_HIDDEN_MULT = 8
POOLINGS = ("mean", "max", "all", PRODUCT)
PRESETS = {name: dict(zip(_PRESET_KEYS, sizes, strict=True)) for name, sizes in _PRESET_SIZES.items()}


def num_favor_features(head_dim: int) -> int:
    """Random features of linear attention where none are given, m = int(w ln w) of the width of a head."""
    return max(1, int(head_dim * math.log(head_dim)))


@dataclass(frozen=True, kw_only=True)
class XTrimoGeneConfig:
    """Sizes and constants of an xTrimoGene model (Gong et al., NeurIPS 2023, arXiv 2311.15156).

    num_genes       genes of the vocabulary, G; the gene table has one row more, for padding (and two for depth tokens)
    dim             encoder width, d
    num_layers      encoder layers
    num_heads       attention heads of the encoder; head width is dim / num_heads
    decoder_dim, decoder_layers, decoder_heads
                    sizes of the decoder; the encoder and its embeddings do not read them
    num_bins        bins of the value embedding, b
    alpha           constant of the value embedding, s = alpha h + W2 h + b2; not learned
    ffn_mult        width of the feed-forward layers as a multiple of dim and of decoder_dim
    dropout         probability, in training only, on the residual branches and inside the feed-forward layer
    layer_norm_eps  epsilon of every LayerNorm
    target_sum      counts of a cell are scaled to this total before log1p
    depth_tokens    two more positions after the genes: T (wanted log10 total, id G) and S (log10 total of the input,
                    id G + 1), as scFoundation has them
    favor_features  random features of the decoder's linear attention, m; None for int(w ln w), w the head width
    favor_eps       epsilon added to every random feature
    stabilizer      what the keys' features are scaled by: the maximum of each cell and "head", or of the whole "cell"
                    (as the published network has it for one cell: for converted weights)
    product_head    width of the product of gene and cell in every prediction (ProductHead); None for none, as published
    product_dropout
                    share of the channels of a cell's vector that the product head drops, in training only
    gene_std        standard deviation of a fresh gene table; loaded weights are what they are

    Raises ValueError, naming the key, the expected and the given value, for a value that no model can have.
    """

    num_genes: int
    dim: int
    num_layers: int
    num_heads: int
    decoder_dim: int
    decoder_layers: int
    decoder_heads: int
    num_bins: int = 100
    alpha: float = 1.0
    ffn_mult: int = 4
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    target_sum: float = 1e4
    depth_tokens: bool = False
    favor_features: int | None = None
    favor_eps: float = 1e-4
    stabilizer: str = "head"
    product_head: int | None = None
    product_dropout: float = 0.0
    gene_std: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = typed(field.name, str(field.type), getattr(self, field.name), least=1)
            object.__setattr__(self, field.name, value)
        for name in ("dropout", "product_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"config {name}: expected 0 <= {name} < 1, got {getattr(self, name)!r}")
        if self.stabilizer not in STABILIZERS:
            raise ValueError(f"config stabilizer: expected one of {', '.join(STABILIZERS)}, got {self.stabilizer!r}")
        for name in ("layer_norm_eps", "target_sum", "favor_eps", "gene_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"config {name}: expected a number > 0, got {getattr(self, name)!r}")
        for width, heads in (("dim", "num_heads"), ("decoder_dim", "decoder_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"config {width}: expected a multiple of {heads} = {getattr(self, heads)}, "
                    f"got {getattr(self, width)}"
                )

    def pooling(self, asked: str | None) -> str:
        """How a cell's embedding is made where this is asked for; None for the way of such models.

        Raises ValueError for a pooling that there is not, or that models of this config do not have.
        """
        if asked is None:
            return "mean" if self.product_head is None else PRODUCT
        if asked not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {asked!r}")
        if asked == "all" and not self.depth_tokens:
            raise ValueError("pooling: expected mean or max for a model without depth tokens, got 'all'")
        if asked == PRODUCT and self.product_head is None:
            raise ValueError(f"pooling: expected mean or max for a model without product_head, got {asked!r}")
        return asked

    def embedding_dim(self, pooling: str) -> int:
        """Width of the embeddings that a pooling gives."""
        if pooling == PRODUCT and self.product_head is not None:
            return self.product_head
        return 4 * self.dim if pooling == "all" else self.dim

    @property
    def head_dim(self) -> int:
        """Width of one encoder attention head."""
        return self.dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the encoder's feed-forward layer."""
        return self.ffn_mult * self.dim

    @property
    def num_positions(self) -> int:
        """Positions of the decoder, G': the genes, and T and S with depth tokens."""
        return self.num_genes + 2 * self.depth_tokens

    @property
    def decoder_head_dim(self) -> int:
        """Width of one decoder attention head."""
        return self.decoder_dim // self.decoder_heads

    @property
    def decoder_ffn_dim(self) -> int:
        """Width of the decoder's feed-forward layer."""
        return self.ffn_mult * self.decoder_dim

    @property
    def num_features(self) -> int:
        """Random features of the decoder's attention, m: favor_features, or int(w ln w) of the head width."""
        if self.favor_features is not None:
            return self.favor_features
        return num_favor_features(self.decoder_head_dim)

    @classmethod
    def preset(cls, name: str, *, num_genes: int, **overrides: Any) -> XTrimoGeneConfig:
        """The preset "tiny", "3m", "10m" or "100m" for a vocabulary of num_genes genes; overrides replace keys."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], "num_genes": num_genes, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All keys and values, in the order of the class."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> XTrimoGeneConfig:
        """Inverse of to_dict. Raises ValueError for an unknown, missing or bad key, and names it."""
        if not isinstance(values, Mapping):
            raise ValueError(f"config: expected keys and values, got {type(values).__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        refuse_unknown(values, fields)
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"config {', '.join(missing)}: expected a value, got none; give it or start from a preset")
        return cls(**values)

    def to_yaml(self, path: str | Path) -> None:
        """Write the keys and values as a YAML file."""
        write_yaml(path, self.to_dict())

    @classmethod
    def from_yaml(cls, path: str | Path) -> XTrimoGeneConfig:
        """Read a YAML file. Its key `preset`, if any, names a preset that the other keys complete or change."""
        values = read_yaml(path)
        try:
            if isinstance(values, dict) and "preset" in values:
                return cls.preset(str(values.pop("preset")), **{"num_genes": None, **values})
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, path: str | Path) -> XTrimoGeneConfig:
        """Read a checkpoint's config.json."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error
