"""A network of cell types: the encoder of a checkpoint with a head on it, the cells it is fitted to, and its fit.

The head reads the maximum over the rows of a cell's genes, through a batch norm without weights and two linear layers,
as the published fine-tuning has it (Hao et al. 2024, doi 10.1038/s41592-024-02305-7), which has no depth tokens either;
and of a model with a product head the cell's vector beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xtg_kernels import RaggedBatch
from xtrimogene.cells.data_sets import Data, expand_data
from xtrimogene.cells.order import Order
from xtrimogene.cells.ragged import taken
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.inference.options import FIXED_DTYPES
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.network.pooling import pool
from xtrimogene.progress import progress_bar
from xtrimogene.tasks import baselines
from xtrimogene.tasks.fitting import Fitted, fit
from xtrimogene.tasks.folder import load
from xtrimogene.tasks.options import TUNES
from xtrimogene.tasks.splits import Names, column_of
from xtrimogene.tasks.work import WorkFolder

TASK = "annotation"
HIDDEN = 256
# Rates of the linear layers; a layer of the encoder has 0.8 of the rate of what stands on it.
RATES = {"head": 2e-3, "published": 1e-3, "all": 2e-3}
RATE_DECAY = 0.8
WEIGHT_DECAY = 0.01
EPOCHS = {"head": 200, "published": 30, "all": 30}
PATIENCE = {"head": 20, "published": 5, "all": 5}
# Cells whose features are kept on disk together.
_PIECE = 4096
# Training cells whose moments the batch norm takes before a validation, about.
_SETTLED_CELLS = 512
Codes = npt.NDArray[np.int64]


class CellTypeHead(nn.Module):
    """Features (n, dim) of cells -> scores (n, types): batch norm without weights, linear, ReLU, linear.

    temperature  what scores are divided by before the softmax; 1 until a fit has set it
    """

    temperature: Tensor

    def __init__(self, dim: int, num_types: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        self.hidden = nn.Linear(dim, HIDDEN)
        self.out = nn.Linear(HIDDEN, num_types)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        """(n, dim) float32 -> (n, types) float32 scores."""
        return self.out(F.relu(self.hidden(self.norm(features))))

    def settle(self, features: Tensor) -> None:
        """Take the moments of these cells (n, dim), n > 1, for evaluation.

        Those that a batch norm averages along the way lag behind an encoder that is trained, and cells lie so close
        together that this makes nonsense of all.
        """
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.norm.running_mean.copy_(features.mean(dim=0))
        self.norm.running_var.copy_(features.var(dim=0))

    def probabilities(self, features: Tensor) -> Tensor:
        """(n, dim) float32 -> (n, types) float32 calibrated probabilities, NaN for a cell of NaN."""
        return torch.softmax(self(features) / self.temperature, dim=1)


class CellTypeNetwork(nn.Module):
    """The encoder of a network and a CellTypeHead on its features of each cell."""

    def __init__(self, network: XTrimoGeneNetwork, head: CellTypeHead, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network, self.head, self.dtype = network, head, dtype

    def features(self, batch: RaggedBatch) -> Tensor:
        """(batch, feature_width) float32, NaN for a cell without genes."""
        with torch.autocast(batch.values.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return features_of(self.network, batch)

    def forward(self, batch: RaggedBatch) -> Tensor:
        """(batch, types) float32 scores."""
        return self.head(self.features(batch))


def features_of(network: XTrimoGeneNetwork, batch: RaggedBatch) -> Tensor:
    """(batch, feature_width) float32, NaN for a cell without genes; the batch has no depth tokens.

    The maximum over the encoder's rows of each cell's genes and, of a network with a product head, the cell's vector.
    """
    encoded = network(batch)
    features = pool(encoded, batch.cu_seqlens, "max")
    if network.product_head is None:
        return features
    seen = network.product_head.features(network.embedding.gene_table[:-1], batch, encoded, depth_tokens=False)
    vectors = network.product_head.cells(seen).masked_fill(features[:, :1].isnan(), torch.nan)
    return torch.cat([features, vectors.to(features.dtype)], dim=1)


def feature_width(config: XTrimoGeneConfig) -> int:
    """Width of features_of."""
    return config.dim + (config.product_head or 0)


@dataclass(frozen=True)
class FitOptions:
    """How a network is fitted; see fit."""

    tune: str
    learning_rate: float
    epochs: int
    patience: int
    validation_share: float
    batch_cells: int
    batch_tokens: int
    dtype: str
    seed: int

    @classmethod
    def checked(cls, tune: str, given: dict[str, Any]) -> FitOptions:
        """Raises ValueError for what no fit can have; what is None is the choice of the tune."""
        if tune not in TUNES:
            raise ValueError(f"tune: expected one of {', '.join(TUNES)}, got {tune!r}")
        defaults: dict[str, Any] = {"learning_rate": RATES[tune], "epochs": EPOCHS[tune], "patience": PATIENCE[tune]}
        self = cls(tune, **{name: defaults[name] if value is None else value for name, value in given.items()})
        for name in ("epochs", "patience", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch_cells < 2:
            raise ValueError(f"batch_cells: expected at least 2, got {self.batch_cells}")
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate: expected a number between 0 and 1, got {self.learning_rate}")
        if not 0 < self.validation_share <= 0.5:
            raise ValueError(f"validation_share: expected above 0 and at most 0.5, got {self.validation_share}")
        if self.dtype not in FIXED_DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(FIXED_DTYPES)}, got {self.dtype!r}")
        return self


@dataclass(frozen=True)
class LabelledCells:
    """Cells with a gene of the vocabulary, in memory.

    packed       RaggedBatch of them, log-normalised, on the CPU
    numbers      (n,) their numbers through all data sets
    labels       (n,) names of their types
    groups       (n,) what they come from, None where that is not said
    names        of the data sets, as paths where they are files
    left_out     cells without a gene of the vocabulary
    genes_found  genes of the vocabulary that the data have
    """

    packed: RaggedBatch
    numbers: Codes
    labels: Names
    groups: Names | None
    names: list[str]
    left_out: int
    genes_found: int

    @classmethod
    def read(
        cls,
        data: Data | Sequence[Data],
        network: XTrimoGeneNetwork,
        label: str,
        group: str | None,
        reading: dict[str, Any],
        batch_tokens: int,
        progress: bool,
    ) -> LabelledCells:
        """Raises ValueError for data sets that cannot be read so, or cells without a label or group."""
        options = {name: value for name, value in reading.items() if value is not None}
        with TrainingCells(
            data,
            network.vocabulary,
            **options,
            target_sum=network.config.target_sum,
            validation_share=0.0,
            min_genes=0,
            batch_tokens=batch_tokens,
            prefetch=0,
            progress=progress,
        ) as stream:
            numbers = stream.training
            labels = column_of(stream.sources, label, f"label {label}")[numbers]
            groups = None if group is None else column_of(stream.sources, group, f"group {group}")[numbers]
            left_out = stream.num_cells - len(numbers)
            if left_out:
                warnings.warn(
                    f"{', '.join(source.name for source in stream.sources)}: {left_out:,} of {stream.num_cells:,} "
                    "cells have no gene of the vocabulary and are left out",
                    stacklevel=3,
                )
            names = [os.path.abspath(each) if isinstance(each, Path) else "AnnData" for each in expand_data(data)]
            return cls(stream.read(numbers), numbers, labels, groups, names, left_out, stream.genes_found)

    @property
    def types(self) -> list[str]:
        return [str(name) for name in np.unique(self.labels)]

    def codes(self, types: Sequence[str]) -> Codes:
        """(n,) number of each cell's type in a sorted list that has them all."""
        return np.searchsorted(types, self.labels.astype(str)).astype(np.int64)

    def counts(self) -> dict[str, int]:
        """Cells of each type."""
        names, counts = np.unique(self.labels, return_counts=True)
        return {str(name): int(count) for name, count in zip(names, counts, strict=True)}

    def check_batches(self, batch_tokens: int) -> None:
        """Refuses a token budget in which some cell could only come alone: a batch norm needs two."""
        longest = np.sort(self.packed.lengths.numpy())[-2:]
        if len(longest) == 2 and longest.sum() > batch_tokens:
            raise ValueError(
                f"batch_tokens: expected room for the two longest cells, got {batch_tokens:,}; raise it to "
                f"{int(longest.sum()):,}"
            )

    def digest(self) -> str:
        """Of genes, values, labels and groups."""
        digest = hashlib.sha256()
        for tensor in (self.packed.values, self.packed.gene_ids, self.packed.cu_seqlens):
            digest.update(tensor.numpy().tobytes())
        digest.update("\n".join(map(str, [*self.labels, *([] if self.groups is None else self.groups)])).encode())
        return digest.hexdigest()[:16]

    def hashes(self) -> npt.NDArray[np.uint64]:
        """(n,) a hash of each cell's genes and values."""
        bounds = self.packed.cu_seqlens.numpy()
        genes, values = self.packed.gene_ids.numpy(), self.packed.values.numpy()
        found = np.empty(len(bounds) - 1, np.uint64)
        for row in range(len(found)):
            own = slice(bounds[row], bounds[row + 1])
            digest = hashlib.blake2b(genes[own].tobytes() + values[own].tobytes(), digest_size=8).digest()
            found[row] = np.frombuffer(digest, np.uint64)[0]
        return found


@dataclass(frozen=True)
class FittedTypes:
    """A network fitted and calibrated, the epochs of its fit, and the figures of its validation cells."""

    module: CellTypeNetwork
    fitted: Fitted
    validation: dict[str, float]


def fitted_types(
    network: XTrimoGeneNetwork,
    cells: LabelledCells,
    held_out: npt.NDArray[np.bool_],
    options: FitOptions,
    device: torch.device,
    work: WorkFolder | None,
    progress: bool,
) -> FittedTypes:
    """A network fitted to the cells that are not held out, and calibrated on those that are."""
    types = cells.types
    codes = cells.codes(types)
    training, validation = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = CellTypeHead(feature_width(network.config), len(types))
    with torch.device("meta"):
        own = XTrimoGeneNetwork(network.config, network.vocabulary)
    own.load_state_dict({name: each.detach().clone() for name, each in network.state_dict().items()}, assign=True)
    module = CellTypeNetwork(own, head, getattr(torch, options.dtype)).to(device)
    optimizer = torch.optim.AdamW(_groups(module, options), weight_decay=WEIGHT_DECAY)
    target = torch.from_numpy(codes).to(device)
    counts = np.bincount(codes[training], minlength=len(types))
    weight = torch.from_numpy(1 / np.sqrt(counts)).float().to(device)
    lengths = cells.packed.lengths.numpy().astype(np.int64)

    features = encoded(module, cells.packed, options.batch_tokens, work, progress) if options.tune == "head" else None

    def batch_of(rows: npt.NDArray[np.int64]) -> RaggedBatch:
        return taken(cells.packed, rows).to(device)

    settling = training[:: -(-len(training) // _SETTLED_CELLS)]

    def scores(rows: npt.NDArray[np.int64]) -> Tensor:
        if features is not None:
            return module.head(features[torch.from_numpy(rows)].to(device))
        return module(batch_of(rows))

    def validated() -> Tensor:
        if features is not None:
            head.settle(features[torch.from_numpy(training)].to(device))
        else:
            head.settle(torch.cat([module.features(batch_of(rows)) for rows in _order(settling, lengths, options)]))
        return torch.cat([scores(rows) for rows in _order(validation, lengths, options)])

    def batches(epoch: int) -> list[npt.NDArray[np.int64]]:
        shuffled = training[np.random.default_rng((options.seed, epoch)).permutation(len(training))]
        # A batch norm makes nothing of one cell; only the last batch can have so few.
        return [rows for rows in _order(shuffled, lengths, options) if len(rows) > 1]

    def loss(rows: npt.NDArray[np.int64]) -> Tensor:
        return F.cross_entropy(scores(rows), target[torch.from_numpy(rows)], weight)

    of_validation = target[torch.from_numpy(validation)]
    fitted = fit(
        module,
        optimizer,
        batches,
        loss,
        lambda: float(F.cross_entropy(validated(), of_validation, weight)),
        epochs=options.epochs,
        patience=options.patience,
        seed=options.seed,
        work=work,
        progress=progress,
    )
    with torch.no_grad():
        found = validated().double().cpu().numpy()  # the moments are those of the best epoch again
    temperature = baselines.temperature_of(found, codes[validation])
    head.temperature.fill_(temperature)
    probabilities = baselines.softmax(found / temperature)
    figures = baselines.figures(codes[validation], probabilities.argmax(1), range(len(types)))
    return FittedTypes(
        module.cpu(),
        fitted,
        {
            **figures,
            "loss": fitted.validation_loss,
            "temperature": temperature,
            "calibration_error": baselines.calibration_error(probabilities, codes[validation]),
            "calibration_error_before": baselines.calibration_error(baselines.softmax(found), codes[validation]),
        },
    )


def _groups(module: CellTypeNetwork, options: FitOptions) -> list[dict[str, Any]]:
    """What is trained, with its rate; all else of the module is frozen."""
    module.requires_grad_(False)
    encoder = module.network.encoder
    layers = list(encoder.layers)
    parts: list[tuple[list[nn.Module], int]] = [([module.head], 0)]
    if options.tune == "published":
        parts.append(([layers[-2] if len(layers) > 1 else layers[-1]], 1))
    elif options.tune == "all":
        head = module.network.product_head
        parts.append(([encoder.norm] if head is None else [encoder.norm, head], 1))
        parts += [([layer], depth) for depth, layer in enumerate(reversed(layers), 1)]
        parts.append(([module.network.embedding], len(layers) + 1))
    groups = []
    for modules, depth in parts:
        parameters = [parameter for each in modules for parameter in each.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        groups.append({"params": parameters, "lr": options.learning_rate * RATE_DECAY**depth})
    return groups


def _order(rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], options: FitOptions) -> list[Codes]:
    """The rows in their order, in batches of at most batch_cells cells and batch_tokens tokens."""
    windows = np.array([0, len(rows)])
    order = Order(rows, windows, lengths[rows], options.batch_tokens, options.batch_cells, (0.0, 1.0, 0.0))
    bounds = order.steps(1).tolist()
    return [rows[start:stop] for start, stop in itertools.pairwise(bounds)]


def encoded(
    module: CellTypeNetwork, packed: RaggedBatch, batch_tokens: int, work: WorkFolder | None, progress: bool
) -> Tensor:
    """(n, feature_width) float32 features of all cells by the frozen encoder, kept on disk piece by piece."""
    lengths = packed.lengths.numpy().astype(np.int64)
    device = next(module.parameters()).device
    pieces = []
    module.eval()
    with torch.no_grad(), progress_bar(len(lengths), unit="cell", desc="embed", disable=not progress) as bar:
        for start in range(0, len(lengths), _PIECE):
            name, stop = f"features_{start}", min(start + _PIECE, len(lengths))
            kept = None if work is None else work.load(name)
            if kept is None:
                piece = torch.empty(stop - start, feature_width(module.network.config))
                rows = start + np.argsort(lengths[start:stop], kind="stable")
                bounds = Order(rows, np.array([0, len(rows)]), lengths[rows], batch_tokens, None, (0.0, 1.0, 0.0))
                ends = bounds.steps(1).tolist()
                for first, last in itertools.pairwise(ends):
                    batch = taken(packed, rows[first:last]).to(device)
                    piece[torch.from_numpy(rows[first:last] - start)] = module.features(batch).cpu()
                    bar.update(last - first)
                if work is not None:
                    work.save(name, {"features": piece}, {})
            else:
                piece = kept[0]["features"]
                bar.update(stop - start)
            pieces.append(piece)
    return torch.cat(pieces)


@dataclass(frozen=True)
class CellTypeModel:
    """A fitted model: the encoder's network, the head, the names of the types, and what its fit left in task.json."""

    network: XTrimoGeneNetwork
    head: CellTypeHead
    types: list[str]
    settings: dict[str, Any]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> CellTypeModel:
        """Raises FileNotFoundError for a missing folder or file, ValueError for one that is none of this task."""
        model = load(folder, TASK)
        types = [str(name) for name in model.settings["types"]]
        head = CellTypeHead(feature_width(model.network.config), len(types))
        try:
            head.load_state_dict(model.tensors)
        except RuntimeError as error:
            raise ValueError(f"{folder}: the tensors do not fit task.json: {error}") from error
        return cls(model.network, head.eval(), types, model.settings)


@contextlib.contextmanager
def on_device(head: CellTypeHead, device: torch.device) -> Iterator[CellTypeHead]:
    before = head.temperature.device
    try:
        yield head.to(device)
    finally:
        head.to(before)
