"""Dropout in the encoder: what its masks are drawn from, and the modules of torch computed by xtg_kernels.dropout.

A mask is a pure function of a seed, the place in the network, the cell, the position of a token in its cell, and the
channel. It is drawn where it is used, in the backward once more, and never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from xtg_kernels import dropout, dropout_row_ids
from xtg_kernels.ops.dropout import dropout_backward, takes_residual


class DropoutKey(NamedTuple):
    """What the masks of one pass over a batch are drawn from.

    row_ids  (total_nnz,) int64, see xtg_kernels.dropout_row_ids
    seed     () int64 on the device of row_ids
    place    number of the first of a layer's dropouts
    """

    row_ids: Tensor
    seed: Tensor
    place: int = 0

    @classmethod
    def of(cls, cu_seqlens: Tensor, total_nnz: int, cells: Tensor | None = None, seed: int | None = None) -> Self:
        """For a batch: cells (batch,) int64 are numbers that the masks follow, None for the places in the batch; seed
        None takes one from torch's generator."""
        number = torch.randint(2**63 - 1, ()) if seed is None else torch.tensor(seed)
        return cls(dropout_row_ids(cu_seqlens, total_nnz, cells), number.to(cu_seqlens.device))

    def at(self, place: int) -> DropoutKey:
        """The same at another place, counted from this one."""
        return self._replace(place=self.place + place)

    def rows(self, block: slice) -> DropoutKey:
        """The same for some of the rows."""
        return self._replace(row_ids=self.row_ids[block])

    def __call__(self, x: Tensor, p: float, *, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """See xtg_kernels.dropout."""
        return dropout(x, p, self.row_ids, self.seed, self.place, residual=residual, relu=relu)

    def backward_of_relu(self, grad_out: Tensor, out: Tensor, p: float) -> Tensor:
        """Gradient to x of a call with relu=True, from the gradient of what it gave and from that itself, out."""
        return dropout_backward(grad_out, p, self.row_ids, self.seed, self.place, out=out)


def share_of(module: nn.Module | None) -> float:
    """What torch's dropout drops now; 0 also where it has to be called, because it is another module or has hooks."""
    if type(module) is not nn.Dropout or not module.training:
        return 0.0
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return 0.0 if hooks else module.p


def any_drops(modules: Sequence[nn.Module | None]) -> bool:
    """Whether any of them drops something now."""
    return any(share_of(module) > 0 for module in modules)


def dropped(module: nn.Dropout | None, x: Tensor, key: DropoutKey | None, *, relu: bool = False) -> Tensor:
    """What the module gives for x, or with relu for relu(x), for which x may be overwritten.

    key None where no module drops.
    """
    share = share_of(module)
    if share and key is not None:
        return key(x, share, relu=relu)
    if relu:
        # In place: no backward needs the value before it, and this is the widest tensor of the layer.
        x = torch.nn.functional.relu(x, inplace=True)
    return x if module is None else module(x)


def added(residual: Tensor, module: nn.Dropout | None, x: Tensor, key: DropoutKey | None) -> Tensor:
    """residual + what the module gives for x."""
    share = share_of(module)
    if share and key is not None and takes_residual(x.dtype, residual.dtype):
        return key(x, share, residual=residual)
    return residual + dropped(module, x, key)
