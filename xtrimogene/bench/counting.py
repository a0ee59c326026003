"""FLOPs as FlopCounterMode counts them, at full size and without the arithmetic, beside their closed forms.

Every model of xtrimogene.bench.costs is called as it stands, on real cells; what it calls is counted with the real
shapes and offsets. Only the results of floating-point ops are left unwritten, so a network of 20 TFLOP is counted in
seconds.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from xtg_kernels import RaggedBatch
from xtrimogene.bench import baselines, costs
from xtrimogene.bench.baselines import FULL_LENGTH
from xtrimogene.bench.cells import Cells
from xtrimogene.bench.pretraining import prepared
from xtrimogene.bench.rows import Row
from xtrimogene.cells.masking import MaskingConfig, mask_cells
from xtrimogene.model import XTrimoGene
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.flops import encoder_flops, padded_flops, step_flops
from xtrimogene.network.masked_batch import MaskedBatch
from xtrimogene.network.vocabulary import Vocabulary

# Loss, and whether it has the exact savings, in the order in which they are counted.
AUTO_ENCODERS: dict[str, tuple[Callable[[XTrimoGene, MaskedBatch], Tensor], bool]] = {
    "auto-encoder, plain": (baselines.plain_loss, False),
    "auto-encoder": (XTrimoGene.loss, True),
}


class ShapesOnly(TorchDispatchMode):
    """Inside it, floating-point results on the CPU are unwritten memory; views and integers are what they are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        if func.is_view or not any(x.is_floating_point() and not x.is_meta for x in tensors):
            return func(*args, **given[1])
        shapes = tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), given)
        shapes = tree_map_only(torch.device, lambda _: torch.device("meta"), shapes)
        # What an op writes in place, it returns.
        written = dict(zip(map(id, tree_leaves(shapes)), tree_leaves(given), strict=True))

        def unwritten(x: Tensor) -> Tensor:
            return written[id(x)] if id(x) in written else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)

        return tree_map_only(Tensor, unwritten, func(*shapes[0], **shapes[1]))


def counted(run: Callable[[], object]) -> int:
    """FLOPs of what run calls. Linear layers go through addmm: blocks of rows say the same in thousands of calls."""
    with warnings.catch_warnings():
        # Setting these flags makes PyTorch warn of a GPU that is not there.
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
        with torch.backends.mkldnn.flags(enabled=False), ShapesOnly(), FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops()


def counted_rows(presets: Sequence[str], cells: Cells, num_cells: int = 2) -> Iterator[Row]:
    """Forward FLOPs of every model on a few real cells, counted and in closed form: they are equal."""
    chosen = cells.shuffled()[:num_cells]
    batch = cells.batch(chosen)
    lengths, distinct = cells.lengths[chosen], cells.distinct[chosen]
    vocabulary = Vocabulary(f"gene{gene}" for gene in range(cells.num_genes))
    masked = mask_cells(batch, np.asarray(chosen), MaskingConfig(), epoch=0, num_genes=cells.num_genes)
    tokens, values, hidden, asked = counts_of(masked)
    for preset in presets:
        model = XTrimoGene.from_preset(preset, vocabulary, dropout=0.0)
        config = model.config
        rows: dict[str, tuple[Callable[[], object], int]] = {
            name: (_full_length(name, config, num_cells), model_of.flops(config, num_cells).total)
            for name, model_of in FULL_LENGTH.items()
        }
        rows["padded"] = (_padded(model, batch), padded_flops(config, lengths, num_cells).total)
        rows["encoder"] = (functools.partial(model, batch), encoder_flops(config, lengths, distinct).total)
        for name, (loss, savings) in AUTO_ENCODERS.items():
            closed = step_flops(
                config, tokens, distinct=values, masked=hidden, asked=asked, savings=savings, backward=False
            )
            rows[name] = (functools.partial(loss, model, masked), closed)
        for name in costs.MODELS:
            run, closed = rows[name]
            yield _row("flops counted", preset, num_cells, batch.total_nnz, "forward", name, counted(run), closed)


def savings(quick: bool) -> Iterator[Row]:
    """savings_rows of every size."""
    for preset in ("tiny",) if quick else costs.SIZES:
        yield from savings_rows(preset)


def savings_rows(preset: str) -> Iterator[Row]:
    """A training step on 8 cells of 2,000 expressed genes, counted without and with the exact savings."""
    model, masked = prepared(preset, 8)
    tokens, values, hidden, asked = counts_of(masked)
    for name, (loss, savings) in AUTO_ENCODERS.items():
        closed = step_flops(model.config, tokens, distinct=values, masked=hidden, asked=asked, savings=savings)
        flops = counted(functools.partial(_step, functools.partial(loss, model, masked)))
        case, batch = f"{preset}, 8 cells of 2,000 genes", masked.batch
        yield _row("exact savings", case, batch.batch_size, batch.total_nnz, "training step", name, flops, closed)


def _step(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def counts_of(masked: MaskedBatch) -> tuple[costs.Lengths, costs.Lengths, costs.Lengths, costs.Lengths]:
    """Tokens, distinct values, masked and chosen genes of each cell of a masked batch."""
    tokens, hidden, asked = (
        offsets.diff().numpy().astype(np.int64)
        for offsets in (masked.batch.cu_seqlens, masked.masked_cu_seqlens, masked.chosen_cu_seqlens)
    )
    values = [len(cell.unique()) for cell in masked.batch.values.split(tokens.tolist())]
    return tokens, np.asarray(values, np.int64), hidden, asked


def _row(
    benchmark: str, case: str, cells: int, tokens: int, direction: str, provider: str, flops: int, closed: int
) -> Row:
    return {
        "benchmark": benchmark, "case": case, "cells": cells, "tokens": tokens, "direction": direction,
        "provider": provider, "correct": flops == closed, "flops_counted": flops, "flops_closed_form": closed,
    }  # fmt: skip


@contextlib.contextmanager
def _explicit_attention() -> Iterator[None]:
    """PyTorch's attention as matrix products: of its fused one on a CPU, FlopCounterMode counts none."""
    with baselines.without_fastpath(), sdpa_kernel(SDPBackend.MATH):
        yield


def _full_length(name: str, config: XTrimoGeneConfig, num_cells: int) -> Callable[[], Tensor]:
    # Not even addresses for dense scores: they are tens of gigabytes. The Performer's FLOPs depend on real offsets.
    with torch.device("cpu" if name == "performer" else "meta"):
        module = FULL_LENGTH[name].build(config)
        x = torch.empty(num_cells, config.num_genes, config.dim)

    def run() -> Tensor:
        with _explicit_attention():
            return module(x)

    return run


def _padded(model: XTrimoGene, batch: RaggedBatch) -> Callable[[], Tensor]:
    config, cells, longest = model.config, batch.batch_size, batch.max_seqlen
    theirs = baselines.dense_encoder(config)
    values = torch.zeros(cells * longest)

    def run() -> Tensor:
        x = model.embedding.value_rows(values).unflatten(0, (cells, longest))
        with _explicit_attention():
            return theirs(x)

    return run
