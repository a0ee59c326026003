"""masked_head and masked_mse: against float64, gradients, rows chosen again, edges, determinism, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.xtg_kernels.ragged_cases import IMPLEMENTATIONS, ISAS, implementation, needs_cpp, relative_error, threads
from xtg_kernels import masked_head, masked_mse

PARAMS = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "weight", "bias")
OPS = ("masked_head", "masked_mse sum", "masked_mse mean")
# Rows of a (40, dim) input: in any order, again and again, none, all of them.
CHOICES: dict[str, list[int] | None] = {
    "some": [3, 39, 0, 17, 5],
    "again": [7, 7, 2, 7, 39, 2, 0, 39],
    "all again": [*range(40), *reversed(range(40))],
    "one": [39],
    "none": [],
    "all": None,
}


def leaves_of(
    rows: int, dim: int, dtype: torch.dtype = torch.float32, param_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """x (rows, dim) and the six parameters."""
    generator = torch.Generator().manual_seed(rows + dim)
    x = (2 * torch.randn((rows, dim), generator=generator) + 0.5).to(dtype)
    params = [torch.randn(dim, generator=generator) + offset for offset in (1.0, 0.0, 1.0, 0.0, 0.0)]
    params.append(torch.randn(1, generator=generator))
    return [x.requires_grad_(), *(p.to(param_dtype or dtype).requires_grad_() for p in params)]


def chosen_rows(choice: list[int] | None, dtype: torch.dtype = torch.int64) -> Tensor | None:
    return None if choice is None else torch.tensor(choice, dtype=dtype)


def target_of(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(3))


def plain(op: str, leaves: list[Tensor], rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same in PyTorch's own functions in one dtype."""
    x, w1, b1, w2, b2, weight, bias = (leaf.to(dtype) for leaf in leaves)
    shape = (x.shape[1],)
    chosen = x if rows is None else x[rows]
    normed = F.layer_norm(F.layer_norm(chosen, shape, w1, b1), shape, w2, b2)
    predictions = F.linear(normed, weight[None], bias)[:, 0]
    if op == "masked_head":
        return predictions
    return F.mse_loss(predictions, target_of(len(predictions)).to(dtype), reduction=op.split()[1])


def ours(op: str, leaves: list[Tensor], rows: Tensor | None) -> Tensor:
    x, *params = leaves
    if op == "masked_head":
        return masked_head(x, rows, *params)
    target = target_of(len(x) if rows is None else len(rows)).to(torch.promote_types(x.dtype, torch.float32))
    return masked_mse(x, rows, target, *params, reduction=op.split()[1])


def gradient_like(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)


def run(
    function: Callable[..., Tensor], op: str, leaves: list[Tensor], *args: object
) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = function(op, leaves, *args)
    return out.detach(), torch.autograd.grad(out, leaves, gradient_like(out))


def exactly(op: str, leaves: list[Tensor], rows: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    return run(plain, op, exact_leaves, rows, torch.float64)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [128, 33])
@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_error_within_plain_pytorch(name: str, dtype: torch.dtype, param_dtype: torch.dtype, dim: int, op: str) -> None:
    """Error against float64: at most 2x (forward) and 3x (gradients) that of plain PyTorch in the same dtype."""
    leaves = leaves_of(300, dim, dtype, param_dtype)
    rows = torch.randint(0, 300, (250,), generator=torch.Generator().manual_seed(2))
    with implementation(name):
        out, grads = run(ours, op, leaves, rows)
    assert out.dtype == torch.float32
    plain_out, plain_grads = run(plain, op, leaves, rows, dtype)
    exact_out, exact_grads = exactly(op, leaves, rows)
    floor = 2e-6 if dtype == torch.float32 else 0.0
    assert relative_error(out, exact_out) <= max(2 * relative_error(plain_out, exact_out), floor)
    for what, leaf, got, plain_grad, want in zip(("x", *PARAMS), leaves, grads, plain_grads, exact_grads, strict=True):
        assert got.dtype == leaf.dtype
        assert relative_error(got, want) <= max(3 * relative_error(plain_grad, want), floor), what


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_choices_of_rows(name: str, choice: list[int] | None, op: str) -> None:
    """Rows that are not chosen hold NaN: none is read, and their gradient is zero."""
    leaves = leaves_of(40, 20)
    idle = sorted(set(range(40)) - set(range(40) if choice is None else choice))
    exact_out, exact = exactly(op, leaves, chosen_rows(choice))
    with torch.no_grad():
        leaves[0][idle] = math.nan
    with implementation(name):
        out, grads = run(ours, op, leaves, chosen_rows(choice, torch.int32))
    assert not grads[0][idle].any()
    if choice == []:
        # The sum of nothing is 0, its mean NaN as in torch; no gradient goes anywhere.
        assert torch.equal(out.isnan(), exact_out.isnan())
        assert out.nan_to_num().sum() == 0
        assert not any(g.any() for g in grads)
        return
    # One prediction is a sum over channels that may cancel: it is judged by the size of such sums.
    assert (out - exact_out).abs().max() <= 2e-6 * max(exact_out.abs().max().item(), 20**0.5)
    for what, got, want in zip(("x", *PARAMS), grads, exact, strict=True):
        assert relative_error(got, want) < 5e-6, what


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_nan_row_stays_in_its_row(name: str) -> None:
    leaves = leaves_of(5, 20)
    x, *params = (leaf.detach() for leaf in leaves)
    with implementation(name):
        want = masked_head(x, None, *params)
        x[3, 7] = math.nan
        got = masked_head(x, None, *params)
    assert got.isnan().tolist() == [False, False, False, True, False]
    assert torch.equal(got[[0, 1, 2, 4]], want[[0, 1, 2, 4]])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_rows_at_all(name: str) -> None:
    leaves = leaves_of(0, 6)
    for op in OPS:
        with implementation(name):
            out, grads = run(ours, op, leaves, None)
        assert out.shape == ((0,) if op == "masked_head" else ())
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("choice", [[2, 5, 2, 0], None], ids=["some, one again", "all"])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck_of_the_reference(op: str, choice: list[int] | None) -> None:
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves_of(6, 4)]
    rows = chosen_rows(choice)
    assert torch.autograd.gradcheck(lambda *leaves: ours(op, list(leaves), rows), leaves)


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", OPS)
def test_same_bits_for_any_thread_count_and_batch(isa: str, op: str) -> None:
    """A prediction and its row's gradient do not depend on what else is chosen; sums only on the chosen rows."""
    leaves = leaves_of(3000, 40, torch.bfloat16, torch.float32)
    rows = torch.randint(0, 3000, (2500,), generator=torch.Generator().manual_seed(2))
    with implementation(f"cpp-{isa}"):
        with threads(1):
            one, one_grads = run(ours, op, leaves, rows)
        with threads(2):
            two, two_grads = run(ours, op, leaves, rows)
        for a, b in zip((one, *one_grads), (two, *two_grads), strict=True):
            assert torch.equal(a, b)
        if op == "masked_head":
            few = rows[[3, 700, 2499]]
            x, *params = leaves
            out = masked_head(x, few, *params)
            assert torch.equal(out, one[[3, 700, 2499]])
            # All positions of these rows, and no other row.
            positions = torch.isin(rows, few).nonzero()[:, 0]
            out = masked_head(x, rows[positions], *params)
            (grad,) = torch.autograd.grad(out, x, gradient_like(one)[positions])
            assert torch.equal(grad[few], one_grads[0][few])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_long_sums_stay_exact(name: str) -> None:
    """The gradients of 60,000 rows, of one sign: adding them one after the other would lose two digits."""
    leaves = leaves_of(60_000, 8)
    grad_out = torch.rand(60_000, generator=torch.Generator().manual_seed(1))
    with implementation(name):
        grads = torch.autograd.grad(masked_head(leaves[0], None, *leaves[1:]), leaves, grad_out)
        loss = masked_mse(leaves[0], None, torch.zeros(60_000), *leaves[1:])
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    predictions = plain("masked_head", exact_leaves, None, torch.float64)
    exact = torch.autograd.grad(predictions, exact_leaves, grad_out.double(), retain_graph=True)
    for what, got, want in zip(("x", *PARAMS), grads, exact, strict=True):
        assert relative_error(got, want) < 2e-6, what
    assert abs(loss.item() / predictions.square().sum().item() - 1) < 1e-6


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_shapes_against_float64(data: st.DataObject) -> None:
    rows, dim = data.draw(st.integers(1, 70)), data.draw(st.integers(3, 70))
    choice = data.draw(st.none() | st.lists(st.integers(0, rows - 1), min_size=1, max_size=90))
    op = data.draw(st.sampled_from(OPS))
    leaves = leaves_of(rows, dim)
    wide = data.draw(st.sampled_from([torch.int32, torch.int64]))
    with implementation(data.draw(st.sampled_from(IMPLEMENTATIONS))):
        out, grads = run(ours, op, leaves, chosen_rows(choice, wide))
    exact_out, exact = exactly(op, leaves, chosen_rows(choice))
    plain_out, plain_grads = run(plain, op, leaves, chosen_rows(choice), torch.float32)

    def error(x: Tensor, exact_x: Tensor) -> float:
        return (x.double() - exact_x).abs().max().item()

    # Sums over few rows may cancel, a prediction may meet its target, and few channels may be nearly alike, which a
    # norm blows up: what is left is judged by what it is made of, or by what plain PyTorch makes of it.
    size = max(1.0, exact_out.abs().max().item())
    assert error(out, exact_out) <= max(1e-5 * size, 2 * error(plain_out, exact_out))
    scale = max(g.abs().max().item() for g in exact)
    limit = max(1e-5 * scale, 3 * max(error(g, want) for g, want in zip(plain_grads, exact, strict=True)))
    for what, got, want in zip(("x", *PARAMS), grads, exact, strict=True):
        assert error(got, want) <= limit, what


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_layouts(name: str) -> None:
    """Rows of a wider tensor, transposed x, strided parameters and an expanded gradient."""
    leaves = leaves_of(30, 12)
    rows = torch.tensor([4, 29, 4, 0])
    x, *params = (leaf.detach() for leaf in leaves)
    strided = [torch.stack([p, p], 1)[:, 0].requires_grad_() for p in params]
    with implementation(name):
        out = masked_head(leaves[0], rows, *leaves[1:])
        want = torch.autograd.grad(out, leaves, torch.ones(4))
        for view in (torch.cat([x, x], 1)[:, :12], x.mT.contiguous().mT):
            assert not view.is_contiguous()
            view = view.requires_grad_()
            got_out = masked_head(view, torch.stack([rows, rows], 1)[:, 0], *strided)
            got = torch.autograd.grad(got_out, [view, *strided], torch.ones(1).expand(4))
            for a, b in zip((got_out, *got), (out, *want), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(overload: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        leaves = leaves_of(20, 12, dtype, torch.float32)
        for rows in (torch.tensor([3, 19, 3], dtype=torch.int32), None):
            n = 20 if rows is None else 3
            x, *params = leaves
            ops = torch.ops.xtg
            torch.library.opcheck(getattr(ops.masked_head, overload), (x, rows, *params, 1e-5))
            torch.library.opcheck(getattr(ops.masked_mse, overload), (x, rows, target_of(n), *params, 1e-5, True))
            x, *params = (leaf.detach() for leaf in leaves)
            torch.library.opcheck(getattr(ops.masked_head_backward, overload), (target_of(n), x, rows, *params, 1e-5))
            torch.library.opcheck(
                getattr(ops.masked_mse_backward, overload),
                (torch.tensor(0.5), x, rows, target_of(n), *params, 1e-5, False),
            )


def test_compile_without_graph_breaks_for_changing_shapes() -> None:
    torch._dynamo.reset()

    def both(x: Tensor, rows: Tensor, target: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        return masked_head(x, rows, *params), masked_mse(x, rows, target, *params, reduction="mean")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for n, choice in ((20, [3, 7, 3]), (35, [0, 1]), (50, [*range(50)])):
        x, *params = leaves = leaves_of(n, 12)
        got, want = (f(x, torch.tensor(choice), target_of(len(choice)), *params) for f in (compiled, both))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(*(torch.autograd.grad(p.sum() + loss, leaves) for p, loss in (got, want)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(name: str, op: str) -> None:
    leaves = leaves_of(20, 12, torch.bfloat16, torch.float32)
    rows = torch.tensor([3, 7, 3])
    with implementation(name):
        want, want_grads = run(ours, op, leaves, rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = ours(op, leaves, rows)
        grads = torch.autograd.grad(out, leaves, gradient_like(out))
    assert torch.equal(out, want)
    for a, b in zip(grads, want_grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("op", "forward", "backward"), [("masked_head", 2, 4), ("masked_mse sum", 2, 6)])
def test_flops_are_those_of_the_linear_map(op: str, forward: int, backward: int) -> None:
    leaves = leaves_of(20, 12)
    for rows, n in ((torch.tensor([3, 7, 3]), 3), (None, 20)):
        with FlopCounterMode(display=False) as counter:
            out = ours(op, leaves, rows)
        assert counter.get_total_flops() == forward * n * 12
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == backward * n * 12


def valid() -> dict[str, object]:
    x, *params = (leaf.detach() for leaf in leaves_of(9, 4))
    return {"x": x, "rows": torch.tensor([2, 8]), "target": torch.zeros(2), **dict(zip(PARAMS, params, strict=True))}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(9)}, ValueError, r"x: expected shape \(N, dim\), got \(9,\)"),
        ({"x": torch.zeros((9, 0))}, ValueError, "x: expected at least one channel"),
        ({"x": torch.zeros((9, 4)).int()}, TypeError, "x: expected float32"),
        ({"x": torch.zeros((9, 4)).double()}, TypeError, "norm1_weight: expected the dtype of x, torch.float64, or"),
        ({"norm1_bias": torch.zeros(5)}, ValueError, r"norm1_bias: expected shape \(4,\), got \(5,\)"),
        ({"norm2_bias": torch.zeros(4).half()}, TypeError, "norm2_bias: expected dtype torch.float32"),
        ({"weight": torch.zeros((1, 4))}, ValueError, r"weight: expected shape \(4,\), got \(1, 4\)"),
        ({"bias": torch.zeros(())}, ValueError, r"bias: expected shape \(1,\), got \(\)"),
        ({"rows": torch.zeros((2, 1)).int()}, ValueError, r"rows: expected shape \(n,\), got \(2, 1\)"),
        ({"rows": torch.zeros(2)}, TypeError, "rows: expected dtype int32 or int64, got torch.float32"),
        ({"rows": torch.tensor([2, 9])}, ValueError, r"rows: expected rows of x, \[0, 9\), got 9 at 1"),
        ({"rows": torch.tensor([-1, 2])}, ValueError, r"rows: expected rows of x, \[0, 9\), got -1 at 0"),
        ({"rows": None}, ValueError, r"target: expected shape \(9,\), got \(2,\)"),
        ({"target": torch.zeros(2).double()}, TypeError, "target: expected dtype torch.float32, got torch.float64"),
        ({"target": torch.zeros(2).requires_grad_()}, ValueError, "target: expected data"),
        ({"reduction": "none"}, ValueError, 'reduction: expected "sum" or "mean", got \'none\''),
    ],
)
def test_refusals_name_argument_expected_and_got(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    masked_mse(**valid())  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        masked_mse(**(valid() | change))  # type: ignore[arg-type]
    if not set(change) & {"target", "reduction"} and change != {"rows": None}:
        arguments = {name: value for name, value in (valid() | change).items() if name != "target"}
        with pytest.raises(error, match=message):
            masked_head(**arguments)  # type: ignore[arg-type]


@needs_cpp
def test_the_op_itself_refuses_what_would_read_outside() -> None:
    x, *params = (leaf.detach() for leaf in leaves_of(9, 4))
    for rows in (torch.tensor([2, 9]), torch.tensor([-1, 2]), torch.tensor([2**32 + 1, 2])):
        with pytest.raises(RuntimeError, match="rows: expected rows of x"):
            torch.ops.xtg.masked_head.default(x, rows, *params, 1e-5)
        with pytest.raises(RuntimeError, match="rows: expected rows of x"):
            torch.ops.xtg.masked_mse_backward.default(torch.ones(()), x, rows, torch.zeros(2), *params, 1e-5, False)
    with pytest.raises(RuntimeError, match="target"):
        torch.ops.xtg.masked_mse.default(x, None, torch.zeros(8), *params, 1e-5, False)
    with pytest.raises(RuntimeError, match="grad_out"):
        torch.ops.xtg.masked_head_backward.default(torch.zeros(8), x, None, *params, 1e-5)
