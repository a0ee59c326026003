"""Linear layers, and norms and activations beside them, by blocks of rows through oneDNN, the weight packed once.

torch.nn.functional.linear on a CPU copies the bias into the output first, and a (total_nnz, 4 dim) output is new memory
that the system hands out page by page: on a machine with AMX that takes as long as a bfloat16 product itself. Here the
rows go through in blocks, and a block's memory is the one that the last block freed.
In float32 this is also the way around MKL, which is slow on some CPUs.

A backward with create_graph=True is PyTorch's own, of the same layers written plainly: that can be differentiated.

The oneDNN ops of PyTorch that it takes are internal ones, made for torch.compile. They are used only where they exist
and give the right numbers on a small example (asked once in a process); otherwise the same blocks go through
torch.nn.functional.linear.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from xtg_kernels.dispatch import is_transformed, pull_back
from xtrimogene.network.dropping import DropoutKey

# Where one is None, it is a bias that a layer does not have.
Operand = TypeVar("Operand", Tensor, Tensor | None)

# Bytes of the widest tensor of a block: for each thread, and at most for all of them. Smaller blocks would fit caches
# better, but threads that meet more often wait more for each other on a busy machine. From 32 MB on glibc gives every
# tensor new memory.
_BLOCK_BYTES = 8 << 20
_MAX_BLOCK_BYTES = 24 << 20
# oneDNN compiles, and keeps, kernels for every number of rows that it meets: blocks are multiples of a unit, and what
# is left at the end goes by powers of two.
_UNIT_ROWS = 64
_MIN_UNITS = 4
# Below this the memory of a layer's widest tensor is used again from call to call, and blocks only add calls.
_LARGE_BYTES = 16 << 20
# Where oneDNN is the faster one it is so from the rows on that earn back the packing of the weight.
_PACKING_PAYS_ROWS = 512
# For the gradient of a weight oneDNN has to be given both operands turned around, which takes as long as the product
# where the weight is narrow.
_TURNING_PAYS_WIDTH = 512
# Activation -> oneDNN's name for it and for its algorithm. gelu is the exact one (erf).
_ONEDNN_ACTIVATIONS = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
ACTIVATIONS = tuple(_ONEDNN_ACTIVATIONS)


def is_large(rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a (rows, width) tensor is so large that going by blocks of rows is faster."""
    if rows * width * dtype.itemsize >= _LARGE_BYTES:
        return True
    return dtype == torch.float32 and rows >= _PACKING_PAYS_ROWS and onednn_takes(dtype) and _mkl_is_slow()


def row_blocks(total: int, width: int, dtype: torch.dtype) -> list[slice]:
    """Blocks of [0, total) rows, so small that the memory of (rows, width) of the dtype is used again.

    About equal multiples of 64 rows, and at the end powers of two below 64.
    """
    units = total // _UNIT_ROWS
    block_bytes = min(_BLOCK_BYTES * torch.get_num_threads(), _MAX_BLOCK_BYTES)
    limit = max(_MIN_UNITS, block_bytes // (width * dtype.itemsize * _UNIT_ROWS))
    parts = -(-units // limit)
    ends = [units * i // parts * _UNIT_ROWS for i in range(1, parts + 1)]
    end = units * _UNIT_ROWS
    while end < total:
        end += 1 << (total - end).bit_length() - 1
        ends.append(end)
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


def activate(x: Tensor, activation: str) -> Tensor:
    """x after one of ACTIVATIONS; ReLU is done in place, since no backward needs what was there before."""
    if activation == "relu":
        return F.relu(x, inplace=True)
    return x if activation == "none" else F.gelu(x, approximate=_ONEDNN_ACTIVATIONS[activation][1])


def row_linear(weight: Tensor, bias: Tensor | None, *, activation: str = "none") -> Callable[[Tensor], Tensor]:
    """The layer x -> F.linear(x, weight, bias), then an activation, ready for many blocks of rows.

    weight (out, in) and bias (out,) of one dtype on the CPU; the layer takes x (rows, in) of that dtype and returns a
    new (rows, out). activation is one of ACTIVATIONS. Without autograd. It holds a packed copy of the weight: make a
    new one when the weight changes.
    """
    if not onednn_takes(weight.dtype):
        return lambda x: activate(F.linear(x, weight, bias), activation)
    return _onednn_linear(weight, bias, activation)


def _onednn_linear(weight: Tensor, bias: Tensor | None, activation: str) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _UNIT_ROWS)
    bias = None if bias is None else bias.detach().contiguous()
    name, algorithm = _ONEDNN_ACTIVATIONS[activation]
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias), plus residual if given, with gradients to all, by blocks of rows.

    x (rows, in), weight (out, in) and bias (out,) or None, of one dtype on the CPU. residual (rows, out) of that dtype
    or a wider one, which the result then has.
    """
    return _Linear.apply(x, weight, bias, residual)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    parts: int = 1,
    rows: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """F.linear(F.layer_norm(x, ...), weight, bias), cut into parts of equal width, by blocks of rows.

    With rows (n,) int64 also, last, x[rows]: taken here, their gradient needs no tensor as large as x of its own.

    x (rows, in) and norm_weight, norm_bias (in,) of one dtype, weight (parts * out, in) and bias (parts * out,) of that
    one or a narrower one, which the parts (rows, out) have; all on the CPU. Gradients to all five tensors; only x is
    kept for the backward.
    """
    return _NormLinear.apply(x, norm_weight, norm_bias, eps, weight, bias, parts, rows)


def norm_feed_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """x + F.linear(F.gelu(F.linear(F.layer_norm(x, ...), w1, b1)), w2, b2), by blocks of rows; the exact (erf) GELU.

    x (rows, dim) and norm_weight, norm_bias (dim,) of one dtype, w1 (ffn_dim, dim), b1 (ffn_dim,), w2 (dim, ffn_dim)
    and b2 (dim,) of that one or a narrower one; all on the CPU. Gradients to all; x and the hidden rows before the GELU
    are kept for the backward.
    """
    has_backward = torch.is_grad_enabled()
    return _FeedForward.apply(x, norm_weight, norm_bias, eps, w1, b1, w2, b2, 0.0, None, "gelu", has_backward)


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dropout: float = 0.0,
    key: DropoutKey | None = None,
    *,
    activation: str = "relu",
) -> Tensor:
    """F.linear(F.dropout(activation(F.linear(x, w1, b1)), dropout), w2, b2), with gradients to all five, by blocks.

    x (rows, dim), w1 (ffn_dim, dim), b1 (ffn_dim,) or None, w2 (dim, ffn_dim), b2 (dim,) or None, of one dtype on the
    CPU; activation "relu", "gelu" or "gelu_tanh"; key is what the masks of dropout are drawn from, None where
    dropout is 0. (rows, ffn_dim) are kept for the backward: with relu the dropped-out hidden rows, which are positive
    where the gradient passes; with the others the rows before the activation, which is computed again and dropped out
    again.
    """
    return _FeedForward.apply(x, None, None, 0.0, w1, b1, w2, b2, dropout, key, activation, torch.is_grad_enabled())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        layer = row_linear(weight, bias)
        out = (x if residual is None else residual).new_empty((len(x), len(weight)))
        for block in row_blocks(len(x), len(weight), x.dtype):
            if residual is None:
                out[block] = layer(x[block])
            else:
                torch.add(residual[block], layer(x[block]), out=out[block])
        ctx.save_for_backward(x, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        grad_residual = grad_out if ctx.needs_input_grad[3] else None
        if torch.is_grad_enabled():
            grads = pull_back(F.linear, (x, weight, bias), ctx.needs_input_grad[:3], (grad_out.to(x.dtype),))
            return *grads, grad_residual
        layer, grad_x = row_linear(weight.t(), None), x.new_empty(x.shape)
        sums = _LinearGrads(weight, ctx.needs_input_grad[1:3])
        for block in row_blocks(len(x), len(weight), x.dtype):
            grad_rows = grad_out[block].to(x.dtype)
            if ctx.needs_input_grad[0]:
                grad_x[block] = layer(grad_rows)
            sums.add(grad_rows, x[block])
        return grad_x if ctx.needs_input_grad[0] else None, *sums.sums(), grad_residual


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        dropout: float,
        key: DropoutKey | None,
        activation: str,
        has_backward: bool,
    ) -> Tensor:
        norm = _RowNorm.given(norm_weight, norm_bias, eps)
        linear1, linear2 = row_linear(w1, b1, activation="relu" if activation == "relu" else "none"), row_linear(w2, b2)
        # Block by block: what is kept is not copied.
        hidden, out = [], x.new_empty((len(x), len(w2)))
        for block in row_blocks(len(x), _live_width(w1, activation), w1.dtype):
            rows = linear1(x[block] if norm is None else norm(x[block]).to(w1.dtype))
            if activation == "relu":
                rows = kept = _dropped(rows, dropout, key, block)
            else:
                kept, rows = rows, _dropped(activate(rows, activation), dropout, key, block)
            if has_backward:
                hidden.append(kept)
            rows = linear2(rows)
            if norm is None:
                out[block] = rows
            else:
                torch.add(x[block], rows, out=out[block])
        ctx.save_for_backward(x, norm_weight, norm_bias, w1, b1, w2, b2, *hidden)
        ctx.eps, ctx.dropout, ctx.key, ctx.activation = eps, dropout, key, activation
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, w1, b1, w2, b2, *hidden = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(x: Tensor, *weights: Tensor) -> Tensor:
                norm_weight, norm_bias, w1, b1, w2, b2 = weights
                rows = x if norm_weight is None else F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, ctx.eps)
                rows = activate(F.linear(rows.to(w1.dtype), w1, b1), ctx.activation)
                out = F.linear(_dropped(rows, ctx.dropout, ctx.key, slice(None)), w2, b2)
                return (out if norm_weight is None else x + out).to(grad_out.dtype)

            args, needed = (x, norm_weight, norm_bias, w1, b1, w2, b2), ctx.needs_input_grad
            grads = pull_back(plain, args, (*needed[:3], *needed[4:8]), (grad_out,))
            return *grads[:3], None, *grads[3:], None, None, None, None
        norm = _RowNorm.given(norm_weight, norm_bias, ctx.eps)
        linear1, linear2 = row_linear(w1.t(), None), row_linear(w2.t(), None)
        needs_grad_x = ctx.needs_input_grad[0] or norm is not None
        grad_x = x.new_empty(x.shape if needs_grad_x else (0,))
        grads1, grads2 = _LinearGrads(w1, ctx.needs_input_grad[4:6]), _LinearGrads(w2, ctx.needs_input_grad[6:8])
        blocks = row_blocks(len(x), _live_width(w1, ctx.activation), w1.dtype)
        for block, activated in zip(blocks, hidden, strict=True):
            grad_rows = grad_out[block].to(w2.dtype)
            grad_hidden = linear2(grad_rows)
            if ctx.activation != "relu":
                algorithm = _ONEDNN_ACTIVATIONS[ctx.activation][1]
                grad_hidden = _dropped(grad_hidden, ctx.dropout, ctx.key, block)
                grad_hidden = torch.ops.aten.gelu_backward(grad_hidden, activated, approximate=algorithm)
                activated = _dropped(activate(activated, ctx.activation), ctx.dropout, ctx.key, block)
            elif ctx.dropout:
                grad_hidden = ctx.key.rows(block).backward_of_relu(grad_hidden, activated, ctx.dropout)
            else:
                grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, activated, 0)
            grads1.add(grad_hidden, x[block] if norm is None else norm(x[block]).to(w1.dtype))
            grads2.add(grad_rows, activated)
            if norm is not None:
                torch.add(grad_out[block], norm.backward(linear1(grad_hidden).to(x.dtype)), out=grad_x[block])
            elif needs_grad_x:
                grad_x[block] = linear1(grad_hidden)
        grad_norm = (None, None) if norm is None else norm.sums()
        grads = (*grads1.sums(), *grads2.sums())
        return grad_x if needs_grad_x else None, *grad_norm, None, *grads, None, None, None, None


def _dropped(rows: Tensor, p: float, key: DropoutKey | None, block: slice) -> Tensor:
    if not p:
        return rows
    assert key is not None
    return key.rows(block)(rows, p)


def _live_width(w1: Tensor, activation: str) -> int:
    """Channels of a block that live at one time: ReLU works in place, other activations make a second wide tensor."""
    return len(w1) * (1 if activation == "relu" else 2)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor,
        parts: int,
        rows: Tensor | None,
    ) -> tuple[Tensor, ...]:
        norm, layer = _RowNorm(norm_weight, norm_bias, eps), row_linear(weight, bias)
        outs = tuple(weight.new_empty((len(x), len(weight) // parts)) for _ in range(parts))
        for block in row_blocks(len(x), len(weight), weight.dtype):
            wide = layer(norm(x[block]).to(weight.dtype))
            for out, part in zip(outs, wide.chunk(parts, dim=1), strict=True):
                out[block] = part
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, rows)
        ctx.eps, ctx.parts = eps, parts
        return outs if rows is None else (*outs, x.index_select(0, rows))

    @staticmethod
    def backward(ctx: Any, *grad_outs: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, bias, rows = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Any:
                normed = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, ctx.eps)
                outs = F.linear(normed.to(weight.dtype), weight, bias).chunk(ctx.parts, dim=1)
                return outs if rows is None else (*outs, x.index_select(0, rows))

            args, needed = (x, norm_weight, norm_bias, weight, bias), ctx.needs_input_grad
            grads = pull_back(plain, args, (*needed[:3], *needed[4:6]), grad_outs)
            return *grads[:3], None, *grads[3:], None, None
        grad_parts = grad_outs if rows is None else grad_outs[:-1]
        norm, layer = _RowNorm(norm_weight, norm_bias, ctx.eps), row_linear(weight.t(), None)
        grad_x, sums = x.new_empty(x.shape), _LinearGrads(weight, ctx.needs_input_grad[4:6])
        for block in row_blocks(len(x), len(weight), weight.dtype):
            grad_rows = torch.cat([grad_part[block] for grad_part in grad_parts], dim=1)
            sums.add(grad_rows, norm(x[block]).to(weight.dtype))
            grad_x[block] = norm.backward(layer(grad_rows).to(x.dtype))
        if rows is not None:
            grad_x.index_add_(0, rows, grad_outs[-1])
        return grad_x, *norm.sums(), None, *sums.sums(), None, None


class _RowNorm:
    """LayerNorm of blocks of rows, and the gradients of its weight and bias, summed over the blocks in float32."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.grads = [torch.zeros_like(weight, dtype=wide), torch.zeros_like(bias, dtype=wide)]

    @classmethod
    def given(cls, weight: Tensor | None, bias: Tensor | None, eps: float) -> _RowNorm | None:
        """None for no weight and bias."""
        return None if weight is None or bias is None else cls(weight, bias, eps)

    def __call__(self, x: Tensor) -> Tensor:
        normed, *moments = torch.native_layer_norm(x, list(self.weight.shape), self.weight, self.bias, self.eps)
        self.block = x, moments
        return normed

    def backward(self, grad_normed: Tensor) -> Tensor:
        """Gradient to the block that was normed last."""
        x, moments = self.block
        grad_x, *grads = torch.ops.aten.native_layer_norm_backward(
            grad_normed, x, list(self.weight.shape), *moments, self.weight, self.bias, [True, True, True]
        )
        for total, grad in zip(self.grads, grads, strict=True):
            total += grad
        return grad_x

    def sums(self) -> tuple[Tensor, Tensor]:
        weight, bias = (grad.to(self.weight.dtype) for grad in self.grads)
        return weight, bias


class _LinearGrads:
    """Gradients of a weight and its bias, summed over blocks of rows in float32."""

    def __init__(self, weight: Tensor, needed: tuple[bool, bool]) -> None:
        self.dtype, wide = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
        self.weight = weight.new_zeros(weight.shape, dtype=wide) if needed[0] else None
        self.bias = weight.new_zeros(weight.shape[:1], dtype=wide) if needed[1] else None

    def add(self, grad_rows: Tensor, x_rows: Tensor) -> None:
        if self.weight is not None:
            wide = min(self.weight.shape) >= _TURNING_PAYS_WIDTH
            if wide and self.dtype == torch.float32 and onednn_takes(self.dtype):
                # torch.mm would go to MKL; here that is the slow one.
                self.weight.add_(row_linear(x_rows.t(), None)(grad_rows.t().contiguous()))
            else:
                self.weight.add_(torch.mm(grad_rows.t(), x_rows))
        if self.bias is not None:
            self.bias.add_(grad_rows.sum(0, dtype=self.bias.dtype))

    def sums(self) -> tuple[Tensor | None, Tensor | None]:
        return tuple(None if x is None else x.to(self.dtype) for x in (self.weight, self.bias))  # type: ignore[return-value]


def untouched(x: Tensor, modules: Sequence[nn.Module], kinds: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether these modules may be computed without calling them: a plain CPU tensor, no tracing, no forward mode or
    torch.func, nobody replaced or hooked a module or its weights. kinds are the classes, beside PyTorch's own, that the
    caller knows."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu" or is_transformed():
        return False
    return all(
        type(module) in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.ModuleList, *kinds)
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and all(type(p) is nn.Parameter and p.device == x.device for p in weights_of(module))
        for module in modules
    )


def weights_of(module: nn.Module) -> list[nn.Parameter]:
    """The module's own parameters, without those that it has for None, as a Linear without bias does."""
    return [p for p in module._parameters.values() if p is not None]


def in_autocast_dtype(*operands: Operand) -> tuple[Operand, ...]:
    """Operands in the dtype in which autocast would have F.linear take them."""
    if not torch.is_autocast_enabled("cpu"):
        return operands
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(x if x is None else x.to(dtype) for x in operands)


def pays_by_blocks(rows: int, weight: Tensor, *operands: Tensor | None) -> bool:
    """Whether layers of so many rows are faster by blocks; weight is the one of the wider layer. Never where the dtypes
    of the operands differ."""
    if not is_large(rows, len(weight), weight.dtype):
        return False
    return all(x is None or x.dtype == weight.dtype for x in operands) and pays_in_training(weight.dtype)


def pays_in_training(dtype: torch.dtype) -> bool:
    """Whether ``linear``, ``feed_forward`` and their like are faster than PyTorch's own layers here.

    bfloat16: wherever oneDNN is taken. float32: where MKL is slow.
    """
    if not onednn_takes(dtype):
        return False
    return dtype == torch.bfloat16 or (dtype == torch.float32 and _mkl_is_slow())


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether PyTorch's float32 products go to MKL on a CPU not made by Intel, where it leaves AVX-512 alone.

    A fact of the machine, not a race: a run that is resumed in another process has to take the same way, bit for bit.
    """
    return torch.backends.mkl.is_available() and _cpu_vendor() not in ("GenuineIntel", "")


def _cpu_vendor() -> str:
    """vendor_id of the first processor; empty where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return ""


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether linear layers of a dtype go through oneDNN here; torch.backends.mkldnn.flags(enabled=False) says no."""
    return bool(torch.backends.mkldnn.enabled) and _onednn_works(dtype)


@functools.cache
def _onednn_works(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    # On a thread of its own: the caller may be counting FLOPs or recording gradients, which is a state of its thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_gives_right_numbers, dtype).result()


def _gives_right_numbers(dtype: torch.dtype) -> bool:
    # Sines: a fixed example that leaves the random state alone.
    x, weight, bias = (torch.arange(n).sin().to(dtype) for n in (33 * 48, 40 * 48, 40))
    x, weight = x.view(33, 48), weight.view(40, 48)
    try:
        with torch.no_grad():
            got = [_onednn_linear(weight, bias, name)(x) for name in ACTIVATIONS]
            got.append(_onednn_linear(weight, None, "none")(x))
    except (AttributeError, RuntimeError, TypeError):
        return False
    exact = F.linear(x.double(), weight.double(), bias.double())
    wanted = [activate(exact.clone(), name) for name in ACTIVATIONS] + [F.linear(x.double(), weight.double())]
    tolerance = 10 * torch.finfo(dtype).eps
    return all(
        a.dtype == dtype and torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance)
        for a, b in zip(got, wanted, strict=True)
    )


def _linear_flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(x_shape[:-1]) * weight_shape[0] * weight_shape[1]


# FlopCounterMode counts the internal op as it counts F.linear. A counter takes the formulas when it is made: not later
# than this import.
if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_linear_flops)
