"""pretrain: the masked auto-encoder trained on many cells, by one process or several, killed and resumed at will.

A step adds up the gradients of `accumulate` batches of every rank and divides them by the number of chosen genes in all
of them, so that it minimises the mean over all these genes however unequally they are spread. Everything that is random
is a function of (seed, step, batch, rank) or (seed, epoch, cell): a run that goes on from a checkpoint does what it
would have done without the interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from anndata import AnnData
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from xtrimogene.checkpoints import Checkpoints
from xtrimogene.embed import choose_device
from xtrimogene.masking import MaskedBatch
from xtrimogene.model import XTrimoGene
from xtrimogene.pretrain_config import PretrainConfig
from xtrimogene.ranks import Ranks, StopSignals
from xtrimogene.training_data import TrainingCells
from xtrimogene.training_log import TrainingLog
from xtrimogene.vocabulary import Vocabulary

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
VOCABULARY_FILE = "vocabulary.tsv"
CHECKPOINT_FOLDER = "checkpoints"
MODEL_FOLDER = "model"
_LOCK_FILE = "lock"

# What a run writes before run.json says that it is one.
_FIRST_FILES = {_LOCK_FILE, CONFIG_FILE, VOCABULARY_FILE, RUN_FILE + ".tmp"}

# Streams of random numbers: different first words for different uses of one seed.
_DROPOUT, _PROJECTIONS = 1, 2

# Training cells that the baselines' means are taken over, at most.
_BASELINE_CELLS = 20_000


class TrainingFailed(RuntimeError):
    """Training had begun and cannot go on; the message says why. What the last checkpoint holds is safe."""


@dataclass
class PretrainReport:
    """What one call of pretrain did.

    output              the run's folder
    model               checkpoint folder of the trained model, for from_pretrained; None when the run was stopped
    steps, epochs       optimizer steps and passes over the training cells so far, of all calls together
    cells               cells that these steps trained on, repetitions counted
    resumed_steps       steps that earlier calls had done
    loss                mean squared error over the chosen genes, last line of the log
    validation_loss     the same for the validation cells, at the last validation
    baseline_mean       that of predicting each gene's mean over the training cells
    baseline_zero_mean  that of a guess that is told which genes are zero: zero there, else the gene's mean where it is
                        not zero
    seconds             wall time of all calls together
    signal              number of the signal that stopped the run, 0 if none did
    """

    output: Path
    model: Path | None
    steps: int
    epochs: float
    cells: int
    resumed_steps: int
    loss: float
    validation_loss: float
    baseline_mean: float
    baseline_zero_mean: float
    seconds: float
    signal: int

    def __str__(self) -> str:
        resumed = f" ({self.resumed_steps:,} of them by an earlier run)" if self.resumed_steps else ""
        return (
            f"{self.steps:,} steps{resumed}, {self.epochs:.2f} epochs, {self.cells:,} cells, {self.seconds:.1f} s\n"
            f"loss {self.loss:.4f}, validation {self.validation_loss:.4f}; predicting each gene's mean "
            f"{self.baseline_mean:.4f}, told the zeros {self.baseline_zero_mean:.4f}"
        )


@dataclass
class _Progress:
    """Where a run is; it is saved with every checkpoint.

    step    optimizer steps done
    epoch   pass over the training cells, and `batch` batches of it that every rank has done
    cells   cells trained on, by all ranks
    seconds wall time of training
    since_log
            sums since the last line of the log
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    cells: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    since_log: dict[str, float] = field(default_factory=dict)
