"""A step of pre-training for measurements: model and masked cells, and the errors of loss and gradient to float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from xtg_kernels import RaggedBatch, use_backend
from xtrimogene import Vocabulary, XTrimoGene
from xtrimogene.bench.tasks import NUM_GENES, offsets, umi_counts
from xtrimogene.cells.masking import MaskingConfig, mask_cells
from xtrimogene.network.masked_batch import MaskedBatch

EXPRESSED = 2000
Loss = Callable[[XTrimoGene, MaskedBatch], torch.Tensor]
# A loss, and the gradient of all weights as one vector in float64, if it was asked for.
Step = tuple[float, torch.Tensor | None]
# Loss, and gradient of all weights as one vector. A rounding that moves a row across the kink of a ReLU changes the
# gradient of that row by the whole.
LIMITS = {"float32": {"loss": 1e-5, "gradient": 1e-2}, "bfloat16": {"loss": 2e-2, "gradient": 0.3}}


def prepared(
    preset: str, cells: int, *, expressed: int = EXPRESSED, num_genes: int = NUM_GENES
) -> tuple[XTrimoGene, MaskedBatch]:
    """A fresh model in training mode without dropout, and a masked batch of UMI-like cells."""
    lengths = (expressed,) * cells
    counts, gene_ids = umi_counts(lengths, num_genes)
    totals = counts.reshape(cells, expressed).sum(1)
    values = np.log1p(counts / totals.repeat(expressed) * 1e4).astype(np.float32)
    batch = RaggedBatch(torch.from_numpy(values), torch.from_numpy(gene_ids), offsets(lengths), expressed)
    depth = torch.from_numpy(np.log10(np.stack([totals, totals], axis=1))).float()
    masked = mask_cells(batch, np.arange(cells), MaskingConfig(), epoch=0, num_genes=num_genes, depth=depth)
    vocabulary = Vocabulary(f"gene{gene}" for gene in range(num_genes))
    return XTrimoGene.from_preset(preset, vocabulary, depth_tokens=True, dropout=0.0).train(), masked


def mean_loss(model: XTrimoGene, masked: MaskedBatch, dtype: str, loss: Loss = XTrimoGene.loss) -> torch.Tensor:
    """The loss by the number of chosen genes; "bfloat16" is autocast."""
    with torch.autocast(model.mask_row.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        return loss(model, masked) / masked.total_chosen


def in_float64(model: XTrimoGene, masked: MaskedBatch) -> tuple[XTrimoGene, MaskedBatch]:
    """A copy of the model and of the numbers of the batch in float64; only the reference takes it."""
    exactly = XTrimoGene(model.config, model.vocabulary).to(model.mask_row.device, torch.float64).train()
    exactly.load_state_dict(model.state_dict())
    batch = replace(masked.batch, values=masked.batch.values.double())
    return exactly, replace(masked, batch=batch, chosen_values=masked.chosen_values.double())


def exact_step(model: XTrimoGene, masked: MaskedBatch, *, gradient: bool = True) -> Step:
    """Loss, and gradient if wanted, in float64 on the reference backend."""
    with use_backend("reference"):
        return loss_and_gradient(*in_float64(model, masked), "float64", XTrimoGene.loss, gradient)


def loss_and_gradient(model: XTrimoGene, masked: MaskedBatch, dtype: str, way: Loss, gradient: bool) -> Step:
    """The loss of the given way, and its gradient if wanted."""
    with torch.set_grad_enabled(gradient):
        loss = mean_loss(model, masked, dtype, way)
    if not gradient:
        return float(loss), None
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return float(loss.detach()), torch.cat([gradient.flatten().double() for gradient in gradients])


def step_errors(
    model: XTrimoGene, masked: MaskedBatch, dtype: str, exact: Step, loss: Loss = XTrimoGene.loss
) -> dict[str, float]:
    """Relative errors of the loss, and of the gradient of all weights as one vector where exact has one."""
    found, gradient = loss_and_gradient(model, masked, dtype, loss, exact[1] is not None)
    errors = {"loss": abs(found / exact[0] - 1)}
    if gradient is not None and exact[1] is not None:
        errors["gradient"] = float((gradient - exact[1]).norm() / exact[1].norm())
    return errors


def step_is_right(errors: Mapping[str, float], dtype: str) -> bool:
    """Whether errors of step_errors are within their limits; NaN is not."""
    return all(error <= LIMITS[dtype][what] for what, error in errors.items())


def error_columns(errors: Mapping[str, float], dtype: str) -> dict[str, Any]:
    """What a row says of them."""
    found: dict[str, Any] = {f"{what}_error": f"{error:.2e}" for what, error in errors.items()}
    return found | {f"{what}_limit": LIMITS[dtype][what] for what in errors}
