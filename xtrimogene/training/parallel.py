"""The model on several ranks: a copy (DDP) or a part of it (FSDP2) on each, and when gradients are exchanged."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.training.ranks import Ranks


class _LossOf(nn.Module):
    """The model's summed loss as a module's forward, which is what DDP and FSDP act on, or that of its product head
    alone; or what the product head reads of the cells, or what is predicted of the chosen genes."""

    def __init__(self, model: XTrimoGeneNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        masked: MaskedBatch,
        head_alone: tuple[float, float] | None = None,
        *,
        features: bool = False,
        predictions: bool = False,
        dropout_seed: int | None = None,
    ) -> Tensor:
        if predictions:
            return self.model.masked_predictions(masked)
        if features:
            return self.model.product_features(masked.batch, None if head_alone else self.model(masked.batch))
        if head_alone is None:
            return self.model.loss(masked, dropout_seed=dropout_seed)
        return self.model.product_loss(masked, *head_alone)


def parallel(model: XTrimoGeneNetwork, ranks: Ranks, how: str, *, head_alone: bool = False) -> nn.Module:
    """The module whose forward is the model's summed loss of a MaskedBatch: "ddp" or "fsdp" where there are ranks.

    With head_alone, the rates of the masking plan, it is the loss of the product head without encoder and decoder, for
    which the argument here makes room; with features=True what the head reads of the cells, as they are masked; with
    predictions=True those of the chosen genes, see masked_predictions.
    """
    network = _LossOf(model)
    if ranks.world_size == 1:
        return network
    if how == "ddp":
        # Projections are drawn alike on all ranks: there is nothing to broadcast.
        return DistributedDataParallel(network, broadcast_buffers=False, find_unused_parameters=head_alone)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for layer in (*model.encoder.layers, *model.decoder.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def exchanging(network: nn.Module, now: bool) -> contextlib.AbstractContextManager[Any]:
    """Whether the ranks exchange gradients in the backward pass of a batch: in the last one of a step."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)
    if isinstance(network, DistributedDataParallel) and not now:
        return network.no_sync()
    return contextlib.nullcontext()
