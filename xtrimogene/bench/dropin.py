"""Times of encoders as other single-cell models have them, with their own weights: padded, one by one, and ragged."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xtrimogene.bench import baselines
from xtrimogene.bench.cells import Cells
from xtrimogene.bench.plain import used_slots
from xtrimogene.bench.rows import Row
from xtrimogene.bench.runner import task_rows
from xtrimogene.bench.sizes import Size, shorter, with_rates, within
from xtrimogene.bench.tasks import BACKWARD, BOTH, DTYPES, FORWARD, Lengths, Provider, Task, offsets
from xtrimogene.interop.dropin import ragged_encoder


def dropin(cells: Cells, size: Size, device: str) -> Iterator[Row]:
    """Encoders as other single-cell models have them, with their own weights: padded, one by one, and ragged."""
    for (name, make, dim, layers, ffn, longest), dtype in itertools.product(_others(), DTYPES):

        def flops(n: int, dim: int = dim, layers: int = layers, ffn: int = ffn) -> int:
            return layers * ((8 * dim + 4 * ffn) * dim * n + 4 * dim * n * n)

        lengths = [min(longest, max(1, int(cells.lengths[i]) // size.shorter)) for i in cells.shuffled()[: size.cells]]
        # Two cells at least: one has nothing to pad.
        chosen = lengths[: max(2, len(within(lengths, flops, size.task_gflop)))]
        task = _dropin_task(name, make, dim, tuple(chosen), dtype, device)
        forward = sum(map(flops, chosen))
        backward = sum(layers * (2 * (8 * dim + 4 * ffn) * dim * n + 10 * dim * n * n) for n in chosen)
        task = dataclasses.replace(
            task, flops={FORWARD: forward, BACKWARD: backward, BOTH: forward + backward},
            case=f"{task.case}{shorter(size)}",
        )  # fmt: skip
        for row in task_rows(task, 0, rounds_at_least=size.rounds):
            yield with_rates(row)


def _others() -> list[tuple[str, Callable[[], nn.Module], int, int, int, int]]:
    """Name, module, width, layers, feed-forward width and longest input of encoders of published sizes."""

    def transformer() -> nn.Module:
        layer = nn.TransformerEncoderLayer(512, 8, 512, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)

    found: list[tuple[str, Callable[[], nn.Module], int, int, int, int]] = [
        ("nn.TransformerEncoder, size of scGPT", transformer, 512, 12, 512, 1200)
    ]
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        return found

    def bert() -> nn.Module:
        return BertModel(
            BertConfig(
                hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, hidden_act="relu",
                max_position_embeddings=2048, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        ).encoder  # fmt: skip

    return [("BERT, size of Geneformer", bert, 256, 6, 512, 2048), *found]


def _dropin_task(name: str, make: Callable[[], nn.Module], dim: int, lengths: Lengths, dtype: str, device: str) -> Task:
    torch.manual_seed(0)
    module = make().to(device, DTYPES[dtype]).eval()
    ragged = ragged_encoder(module)
    x = torch.randn(sum(lengths), dim).to(device, DTYPES[dtype]).requires_grad_()
    grad_out = torch.randn(x.shape).to(device, DTYPES[dtype])
    # The bias of the keys shifts all scores of a query alike: its gradient is zero but for rounding, which is no number
    # to compare.
    judged = [not name.endswith("key.bias") for name, _ in ragged.named_parameters()]
    inputs = (x, *itertools.compress(ragged.parameters(), judged))
    cu_seqlens, longest = offsets(lengths).to(device), max(lengths)

    def one_by_one(encoder: nn.Module, rows: Tensor, cells: Lengths) -> Tensor:
        return torch.cat([_padded(encoder, cell, (len(cell),)) for cell in rows.split(list(cells))])

    def exact() -> tuple[Tensor, list[Tensor]]:
        exactly = copy.deepcopy(module).double()
        checked = lengths[:1]
        rows = x[: sum(checked)].detach().double().requires_grad_()
        out = one_by_one(exactly, rows, checked)
        leaves = (rows, *itertools.compress(ragged_encoder(exactly).parameters(), judged))
        return out.detach(), list(torch.autograd.grad(out, leaves, grad_out[: sum(checked)].double()))

    providers = {
        "plain": Provider(lambda: one_by_one(module, x, lengths), inputs),
        "padded": Provider(lambda: _padded(module, x, lengths), inputs),
        "xtg": Provider(lambda: ragged(x, cu_seqlens, longest), inputs),
    }
    case = f"{name}, {len(lengths)} cells"
    return Task("drop-in", case, lengths, dtype, providers, grad_out, exact, lengths[0], {})


def _padded(module: Any, x: Tensor, lengths: Lengths) -> Tensor:
    """(total_nnz, dim): the original module on the batch padded to its longest cell, with its mask if it needs one."""
    if isinstance(module, nn.TransformerEncoder):
        if len(lengths) == 1:
            return baselines.encoder_dense(module, x)
        return baselines.encoder_padded(module, x, lengths, max(lengths))
    rows = nn.utils.rnn.pad_sequence(x.split(list(lengths)), batch_first=True)
    if len(lengths) == 1:
        return module(rows).last_hidden_state[0]
    used = used_slots(lengths, max(lengths), x.device)
    # True where a key may be seen: what transformers makes of an attention mask for its fused attention.
    mask = used[:, None, None].expand(-1, 1, max(lengths), -1)
    return module(rows, attention_mask=mask).last_hidden_state[used]
