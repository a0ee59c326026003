"""dropout: rows with random channels set to zero, the mask drawn from a counter and never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from xtg_kernels import checks, dispatch
from xtg_kernels.ops.dropout import library

__all__ = ["dropout", "dropout_row_ids"]


def dropout(
    x: Tensor,
    p: float,
    row_ids: Tensor,
    seed: Tensor,
    place: int = 0,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """torch.nn.functional.dropout of ``x``, of ``relu(x)``, or added to a residual, in one pass and without a mask.

    Whether a channel is kept is a pure function of seed, place, the row's id and the channel: the same whatever the
    other rows are, whoever computes it, on how many threads, in C++, Triton or the reference. The backward draws it
    again (after ReLU: sees it in the output). The bits are those of Philox4x32-7 (Salmon et al., SC 2011), 16 for each
    channel, so that p is rounded to a multiple of 2^-16; what is kept is divided by 1 - that p, and the mean stays.

    Args:
        x: (rows, dim), float32, bfloat16, float16 (float64: reference backend).
        p: probability that a channel becomes 0, in [0, 1].
        row_ids: (rows,) int64, what is different in each row that is to have a mask of its own: ``dropout_row_ids``.
        seed: () int64, on the device of x: what is different in each step. A tensor, for a compiled graph to take
            another one in every step.
        place: what is different in each dropout of a network, 0 to 2^32 - 1.
        residual: (rows, dim) of the dtype of x or float32, or None; it is added, and the result has its dtype.
        relu: drop out relu(x) instead; not together with residual.

    Returns:
        (rows, dim). Gradients go to x and residual. FLOPs: none.

    Raises:
        TypeError: not a tensor, or a wrong dtype. ValueError: a wrong shape or device, p or place out of range, relu
        with residual, or a backend asked for by name that declines (all its reasons are shown).
    """
    checks.check_tensor("x", x, ("rows", "dim"))
    checks.check_floating("x", x)
    for name, tensor, shape in (("row_ids", row_ids, (x.shape[0],)), ("seed", seed, ())):
        checks.check_tensor(name, tensor, shape, x)
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: expected dtype torch.int64, got {tensor.dtype}")
    if residual is not None:
        checks.check_tensor("residual", residual, tuple(x.shape), x)
        if not takes_residual(x.dtype, residual.dtype):
            raise TypeError(f"residual: expected dtype {x.dtype} or torch.float32, got {residual.dtype}")
        if relu:
            raise ValueError("relu: expected False with a residual, got True")
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability from 0 to 1, got {p}")
    if not 0 <= place < 2**32:
        raise ValueError(f"place: expected 0 to 2^32 - 1, got {place}")
    op = dispatch.choose_overload("dropout", lambda backend: library.not_supported_reasons(backend, x))
    return op(x, residual, row_ids, seed, place, float(p), relu)


def dropout_backward(
    grad_out: Tensor, p: float, row_ids: Tensor, seed: Tensor, place: int = 0, *, out: Tensor | None = None
) -> Tensor:
    """Gradient to x of ``dropout``, for code with a backward of its own; out is what it gave with relu=True.

    Arguments as those of ``dropout``, grad_out and out (rows, dim) of the dtype of x. Without autograd.
    """
    op = dispatch.choose_overload("dropout_backward", lambda backend: library.not_supported_reasons(backend, grad_out))
    return op(grad_out, out, row_ids, seed, place, float(p), grad_out.dtype)


def takes_residual(dtype: torch.dtype, residual: torch.dtype) -> bool:
    """Whether x of one dtype may be added to a residual of another."""
    return residual == dtype or (residual == torch.float32 and dtype.itemsize == 2)


def dropout_row_ids(cu_seqlens: Tensor, total_nnz: int, cells: Tensor | None = None) -> Tensor:
    """(total_nnz,) int64: an id for every token that depends on its cell and its position in the cell alone.

    Args:
        cu_seqlens: (batch + 1,) int32; slack tokens past cu_seqlens[-1] have ids too.
        total_nnz: number of tokens.
        cells: (batch,) int64, a number below 2^32 for each cell, such as its row in the data; None: 0, 1, ...
    """
    tokens = torch.arange(total_nnz, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    starts = torch.nn.functional.pad(cu_seqlens[:-1].long(), (0, 1))
    # The cell of a token is the number of cells that end at or before it; slack tokens are one more cell.
    cell = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    numbers = torch.arange(len(starts), device=cu_seqlens.device)
    if cells is not None:
        numbers = torch.nn.functional.pad(cells.long(), (0, 1))
    return (numbers << 32)[cell] | (tokens - starts[cell])
