"""The models that are measured, as tasks: the encoder layers of a preset, and models that run over every gene.

Weights and inputs are random with a fixed seed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools

import torch
from torch import Tensor, nn

from xtg_kernels import use_backend
from xtrimogene.bench import baselines
from xtrimogene.bench.tasks import DTYPES, NUM_GENES, Lengths, Provider, Task, offsets, with_both
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.encoder import RaggedTransformerEncoder
from xtrimogene.network.flops import encoder_backward_flops, encoder_flops


def encoder_task(
    preset: str,
    lengths: Lengths,
    dtype: str,
    *,
    dense: bool = False,
    check_cells: int = 8,
    orders: tuple[int, ...] = (2, 3, 4),
    layers: int | None = None,
    device: str = "cpu",
) -> Task:
    """The Transformer layers of a preset, or the first so many. dense adds the form that runs all genes, masked.

    orders are the several ways to sum in which the plain form is judged again.
    """
    config = _config(preset, NUM_GENES, layers)
    torch.manual_seed(0)
    encoder = (
        RaggedTransformerEncoder(config.dim, config.num_heads, config.num_layers, ffn_dim=config.ffn_dim, dropout=0.0)
        .to(device, DTYPES[dtype])
        .eval()
    )
    total, cu_seqlens, longest = sum(lengths), offsets(lengths).to(device), max(lengths)
    x = torch.randn(total, config.dim).to(device, DTYPES[dtype]).requires_grad_()
    grad_out = torch.randn(total, config.dim).to(device, DTYPES[dtype])
    weights = (x, *encoder.parameters())
    twin = baselines.torch_encoder(encoder)
    providers = {
        "plain": Provider(lambda: baselines.encoder_packed(encoder, x, lengths), weights),
        "xtg": Provider(lambda: encoder(x, cu_seqlens, longest), weights),
    }
    # Padding does the same harm at every size; at 100m it would take minutes to say so.
    widths = {"padded": longest} if len(lengths) > 1 and preset != "100m" else {}
    widths |= {"dense": NUM_GENES} if dense else {}
    # Both have the names of ours, in torch's order: gradients line up.
    named = dict(twin.named_parameters())
    twins = (x, *(named[name] for name, _ in encoder.named_parameters()))
    for name, width in widths.items():
        run = functools.partial(baselines.encoder_padded, twin, x, lengths, width)
        providers[name] = Provider(run, twins)
    checked = lengths[:check_cells]

    def exact() -> tuple[Tensor, list[Tensor]]:
        exactly = RaggedTransformerEncoder(
            config.dim, config.num_heads, config.num_layers, ffn_dim=config.ffn_dim, dropout=0.0
        ).to(device, torch.float64)
        exactly.load_state_dict(encoder.state_dict())
        rows = x[: sum(checked)].detach().double().requires_grad_()
        out = baselines.encoder_packed(exactly, rows, checked)
        grads = torch.autograd.grad(out, (rows, *exactly.parameters()), grad_out[: sum(checked)].double())
        return out.detach(), list(grads)

    forward, backward = encoder_flops(config, lengths), encoder_backward_flops(config, lengths)
    name = f"{preset}, {len(lengths)} cell{'s' if len(lengths) > 1 else ''}"
    return Task(
        "encoder", name, lengths, dtype, providers, grad_out, exact, sum(checked),
        with_both(forward.linear + forward.attention, backward.linear + backward.attention),
        tuple(
            Provider(functools.partial(baselines.encoder_packed, encoder, x, lengths, parts), weights)
            for parts in orders
        ),
    )  # fmt: skip


def full_length_task(
    model: str, preset: str, genes: int, dtype: str, *, layers: int | None = None, device: str = "cpu"
) -> Task:
    """A model of baselines.FULL_LENGTH, or its first so many layers, on one cell whose every gene is a token.

    It is a baseline itself: there is nothing plainer to hold it against than float64.
    """
    config, kind = _config(preset, genes, layers), baselines.FULL_LENGTH[model]
    torch.manual_seed(0)
    module = kind.build(config).to(device, DTYPES[dtype]).eval()
    x = torch.randn(1, genes, config.dim).to(device, DTYPES[dtype]).requires_grad_()

    # In bfloat16 PyTorch sums the gradients of a LayerNorm over all rows in bfloat16 on a CPU. After some thousand rows
    # they are wrong by half, which is no number to compare.
    norms = [f"{name}." for name, part in module.named_modules() if isinstance(part, nn.LayerNorm)]
    left_out = tuple(norms) if dtype == "bfloat16" else ()

    def leaves(module: nn.Module) -> list[Tensor]:
        return [weight for name, weight in module.named_parameters() if not name.startswith(left_out)]

    def rows(module: nn.Module, x: Tensor) -> Tensor:
        with baselines.without_fastpath():
            return module(x)[0]

    with torch.no_grad():
        width = rows(module, x[:, :1]).shape[1]
    grad_out = torch.randn(genes, width).to(device, DTYPES[dtype])

    def exact() -> tuple[Tensor, list[Tensor]]:
        exactly, exact_x = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
        with use_backend("reference"):
            out = rows(exactly, exact_x)
            grads = torch.autograd.grad(out, (exact_x, *leaves(exactly)), grad_out.double())
        return out.detach(), list(grads)

    forward = kind.flops(config, 1)
    backward = 2 * forward.linear + round(kind.backward * forward.attention)
    return Task(
        "dense", f"{preset}, {genes:,} genes", (genes,), dtype,
        {model: Provider(functools.partial(rows, module, x), (x, *leaves(module)))}, grad_out,
        exact, genes, with_both(forward.total, backward),
    )  # fmt: skip


def _config(preset: str, genes: int, layers: int | None) -> XTrimoGeneConfig:
    """The preset without dropout; of encoder and decoder at most so many layers."""
    config = XTrimoGeneConfig.preset(preset, num_genes=genes, dropout=0.0)
    if layers is None:
        return config
    return dataclasses.replace(config, num_layers=layers, decoder_layers=min(layers, config.decoder_layers))
