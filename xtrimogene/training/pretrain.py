"""pretrain: the masked auto-encoder trained on many cells, by one process or several, killed and resumed at will."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from xtrimogene.cells.data_sets import Data, genes_of_data
from xtrimogene.cells.stream import TrainingCells
from xtrimogene.hub import checkpoint_folder
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.devices import choose_device
from xtrimogene.network.folder import CHECKPOINT_FILES, Checkpoint
from xtrimogene.network.vocabulary import Vocabulary
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.ranks import Ranks
from xtrimogene.training.run import PretrainReport, Run
from xtrimogene.training.run_folder import RunFolder, identity_of


def pretrain(
    config: PretrainConfig,
    data: Data | Sequence[Data],
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> PretrainReport:
    """Train a masked auto-encoder on the cells of one or many data sets.

    Writes into the folder `output`: `run.json` and `config.yaml`, what the run is; `vocabulary.tsv`; `log.jsonl` and
    `tensorboard/`; `checkpoints/`, the newest of which a run goes on with; and at the end `model/`, a checkpoint folder
    for XTrimoGene.from_pretrained. SIGTERM and SIGINT end the run after the step at work, or
    in the middle of a validation, with a checkpoint of the steps made.

    A run that was killed at any moment goes on with `resume=True` from its newest whole checkpoint, or without one from
    the start. On the same machine with the same number of threads it ends with the weights of an uninterrupted run: on
    one CPU process in float32, bit for bit.

    Under torchrun every rank calls this. The ranks share the batches of a step: a run of 2 ranks has the batches of a
    run of 1 rank with twice as many to accumulate.

    Args:
        config: what to do, see PretrainConfig.
        data: AnnData, files or stores of cells, folders of these, or several of them; see TrainingCells.
        output: folder to make.
        resume: go on with the run in `output`; without such a run, start one.
        device: "cpu", "cuda", ... or "auto": the GPU if there is one.
        progress: show progress bars.

    Raises:
        ValueError, OSError: bad data, config or output, or another run in the folder; the message names what it is.
            Nothing is written then.
        TrainingFailed: training had begun and cannot go on: unreadable data, or a loss that is not finite.
        FirstRankFailed: on other ranks, where the first one raises one of the former two.
    """
    chosen = choose_device(device)
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(Ranks.joined(chosen))
        stack.enter_context(torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []))
        folder = RunFolder(Path(output), resume)
        ranks.first(folder.check)
        start = ranks.first(lambda: _start(config))
        cells = stack.enter_context(_opened(config, start, data, ranks, progress))
        run = Run(config, start, cells, folder, ranks, progress)
        stack.callback(folder.unlock)
        stack.callback(run.drop_parallel)
        identity = identity_of(config, cells, ranks)
        newest = ranks.first(lambda: folder.begin(config, cells.vocabulary, identity))
        return run.finish_from(newest)


def _start(config: PretrainConfig) -> Checkpoint | None:
    """The checkpoint that the run begins with, opened once for its vocabulary, its config and its weights."""
    if config.checkpoint is None:
        return None
    return Checkpoint.open(checkpoint_folder(config.checkpoint, CHECKPOINT_FILES))


def _opened(
    config: PretrainConfig, start: Checkpoint | None, data: Data | Sequence[Data], ranks: Ranks, progress: bool
) -> TrainingCells:
    """The cells on every rank; only the first one counts their genes."""

    def opened(vocabulary: Vocabulary, genes_per_cell: npt.NDArray[np.int32] | None) -> TrainingCells:
        model = config.model_config(len(vocabulary)) if start is None else start.config
        return TrainingCells(
            data,
            vocabulary,
            layer=config.layer,
            gene_symbols=config.gene_symbols,
            aliases=config.aliases,
            normalized=config.normalized,
            values=config.values,
            fractional_counts=config.fractional_counts,
            total_counts=config.total_counts,
            masking=config.masking,
            depth_tokens=model.depth_tokens,
            target_sum=model.target_sum,
            min_genes=config.min_genes,
            seed=config.seed,
            validation_share=config.validation_share,
            split_seed=config.split_seed,
            max_validation_cells=config.validation_cells,
            batch_tokens=config.batch_tokens,
            batch_cells=config.batch_cells,
            cost=_cost(model),
            genes_per_cell=genes_per_cell,
            progress=progress,
        )

    own: list[TrainingCells] = []

    def counted() -> tuple[Vocabulary, npt.NDArray[np.int32]]:
        if start is not None:
            vocabulary = start.vocabulary
        elif config.vocabulary is not None:
            vocabulary = Vocabulary.from_tsv(config.vocabulary)
        else:
            vocabulary = genes_of_data(data, layer=config.layer, gene_symbols=config.gene_symbols)
        own.append(opened(vocabulary, None))
        own[0].num_steps(0, world_size=ranks.world_size, accumulate=config.accumulate)
        if 0 < len(own[0].validation_cells) < ranks.world_size:
            raise ValueError(
                f"config validation_share, validation_cells: expected a validation cell for each of {ranks.world_size} "
                f"ranks, or none, got {len(own[0].validation_cells)} of {own[0].num_cells} cells"
            )
        return vocabulary, own[0].genes_per_cell

    vocabulary, genes_per_cell = ranks.first(counted)
    return own[0] if own else opened(vocabulary, genes_per_cell)


def _cost(model: XTrimoGeneConfig) -> tuple[float, float, float]:
    """Multiply-adds of a cell with L expressed genes, as constant, factor of L and factor of L^2."""
    decoder = model.decoder_layers * (12 * model.decoder_dim**2 + 4 * model.num_features * model.decoder_dim)
    encoder = model.num_layers * 12 * model.dim**2
    return float(model.num_positions * decoder), float(encoder), float(2 * model.num_layers * model.dim)
