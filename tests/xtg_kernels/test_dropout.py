"""dropout: published random bits, the same mask everywhere, its statistics, gradients, edges, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tests.xtg_kernels.ragged_cases import (
    IMPLEMENTATIONS,
    ISAS,
    cu_seqlens_of,
    implementation,
    needs_cpp,
    relative_error,
    threads,
)
from xtg_kernels import dropout, dropout_row_ids
from xtg_kernels.ops.dropout import dropout_backward
from xtg_kernels.ops.dropout.reference import kept, philox, threshold_and_scale

SEED = torch.tensor(0x0123_4567_89AB_CDEF)
# x, residual
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
# Less than a vector, vectors and a rest, blocks of 128 channels and a rest.
DIMS = [1, 5, 33, 128, 129, 200, 384]


def random(rows: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn((rows, dim), generator=torch.Generator().manual_seed(seed)).to(dtype)


def ids(rows: int, first: int = 0) -> Tensor:
    """Of a cell with a number above 2^31, so that the upper half of an id counts."""
    return (torch.tensor(3_000_000_000) << 32) + torch.arange(first, first + rows)


def mask_of(row_ids: Tensor, p: float = 0.1, dim: int = 256, seed: Tensor = SEED, place: int = 0) -> Tensor:
    return dropout(torch.ones((len(row_ids), dim)), p, row_ids, seed, place) > 0


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], words: list[int]) -> None:
    """Known answers of the authors' library, Random123, for seven rounds."""
    got = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
    assert [int(word) for word in got] == words


def bits_of(channel: int, row_id: int, place: int) -> int:
    """Channel 128 b + 64 half + 16 word + lane: one half of a word of the counter (16 b + lane, place, id)."""
    b, rest = divmod(channel, 128)
    half, rest = divmod(rest, 64)
    word, lane = divmod(rest, 16)
    counter = (16 * b + lane, place, row_id & 0xFFFFFFFF, row_id >> 32 & 0xFFFFFFFF)
    key = (int(SEED) & 0xFFFFFFFF, int(SEED) >> 32)
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
    return int(words[word]) >> 16 * half & 0xFFFF


def test_a_channel_takes_its_own_16_bits() -> None:
    row_id, place, dim = int(ids(1)), 7, 300
    mask = kept(torch.tensor([row_id]), SEED, place, 0.3, dim)[0]
    for channel in range(dim):
        assert bool(mask[channel]) == (bits_of(channel, row_id, place) >= round(0.3 * 65536)), channel


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_channel_is_kept_while_p_is_at_most_its_bits(name: str) -> None:
    with implementation(name):
        assert_kept_up_to_its_bits("cpu")


def assert_kept_up_to_its_bits(device: str) -> None:
    row_ids, seed, x = ids(1).to(device), SEED.to(device), torch.ones((1, 150), device=device)
    # Of both halves of a word, and of the second block.
    for channel in (0, 100, 149):
        bits = bits_of(channel, int(row_ids), 7)
        assert dropout(x, bits / 65536, row_ids, seed, 7)[0, channel] > 0, channel
        assert dropout(x, (bits + 1) / 65536, row_ids, seed, 7)[0, channel] == 0, channel


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bits_of_the_definition(name: str, dtypes: tuple[torch.dtype, torch.dtype], dim: int) -> None:
    """One float32 operation after the other, rounded once: the same bits from every implementation, all forms."""
    dtype, wide = dtypes
    x, residual, grad_out, row_ids = random(9, dim, dtype), random(9, dim, wide, 1), random(9, dim, wide, 2), ids(9, 5)
    mask, scale = kept(row_ids, SEED, 3, 0.1, dim), threshold_and_scale(0.1)[1]

    def of(rows: Tensor, mask: Tensor = mask) -> Tensor:
        return torch.where(mask, rows.float() * scale, 0.0)

    with implementation(name):
        x.requires_grad_()
        residual.requires_grad_()
        alone, relu = dropout(x, 0.1, row_ids, SEED, 3), dropout(x, 0.1, row_ids, SEED, 3, relu=True)
        total = dropout(x, 0.1, row_ids, SEED, 3, residual=residual)
        grads = torch.autograd.grad(total, (x, residual), grad_out)
        narrow = grad_out.to(dtype)
        (alone_grad,), (relu_grad,) = (torch.autograd.grad(out, x, narrow) for out in (alone, relu))
        direct = dropout_backward(narrow, 0.1, row_ids, SEED, 3, out=relu.detach())
    assert torch.equal(alone, of(x).to(dtype))
    assert torch.equal(relu, of(x.relu()).to(dtype))
    assert torch.equal(total, (residual.float() + of(x)).to(wide))
    assert torch.equal(grads[0], of(grad_out).to(dtype))
    assert torch.equal(grads[1], grad_out)
    assert torch.equal(alone_grad, of(narrow).to(dtype))
    assert torch.equal(relu_grad, of(narrow, mask & (x > 0)).to(dtype))
    assert torch.equal(direct, relu_grad)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_is_dropped_is_not_seen(name: str) -> None:
    """NaN and infinity where the mask is 0 are 0 in the result and in the gradient; a kept NaN stays one after ReLU."""
    row_ids = ids(40)
    mask = kept(row_ids, SEED, 0, 0.5, 48)
    with implementation(name):
        x = torch.where(mask, 1.0, math.nan).requires_grad_()
        out = dropout(x, 0.5, row_ids, SEED)
        (grad,) = torch.autograd.grad(out, x, torch.where(mask, 1.0, math.inf))
        assert torch.equal(out, torch.where(mask, 2.0, 0.0))
        assert torch.equal(grad, torch.where(mask, 2.0, 0.0))
        assert torch.equal(dropout(torch.full((40, 48), math.nan), 0.5, row_ids, SEED, relu=True).isnan(), mask)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_edges(name: str) -> None:
    with implementation(name):
        for shape in ((0, 7), (3, 0)):
            assert dropout(torch.ones(shape), 0.1, ids(shape[0]), SEED).shape == shape
        x = random(4, 50)
        assert torch.equal(dropout(x, 0.0, ids(4), SEED), x)
        assert not dropout(x, 1.0, ids(4), SEED).any()
        assert torch.equal(dropout(x, 1.0, ids(4), SEED, residual=2 * x), 2 * x)
        last = torch.tensor([-1, -(2**63), 2**63 - 1])
        assert torch.equal(
            mask_of(last, seed=torch.tensor(-1), place=2**32 - 1), kept(last, torch.tensor(-1), 2**32 - 1, 0.1, 256)
        )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_layouts(name: str) -> None:
    """Strided rows, ids and gradients give what their contiguous copies do."""
    x, residual, row_ids = random(6, 40), random(6, 40, seed=1), ids(6)
    with implementation(name):
        leaf = x.T.contiguous().T.requires_grad_()
        want = dropout(x, 0.1, row_ids, SEED, residual=residual)
        got = dropout(
            leaf, 0.1, torch.stack([row_ids, row_ids], 1)[:, 0], SEED, residual=torch.cat([residual] * 2, 1)[:, :40]
        )
        assert torch.equal(got, want)
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        assert torch.equal(grad, dropout(torch.ones(6, 40), 0.1, row_ids, SEED))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_on_any_number_of_threads_and_for_any_rows(isa: str) -> None:
    x, row_ids = random(700, 130), ids(700)
    with implementation(f"cpp-{isa}"):
        with threads(1):
            one = dropout(x, 0.2, row_ids, SEED, residual=x)
        with threads(2):
            assert torch.equal(dropout(x, 0.2, row_ids, SEED, residual=x), one)
        some = torch.tensor([3, 699, 4])
        assert torch.equal(dropout(x[some], 0.2, row_ids[some], SEED, residual=x[some]), one[some])


def test_ids_follow_cell_and_position() -> None:
    """In any batch, in any order; without numbers of cells their places in the batch count."""
    cells = torch.tensor([70, 5, 2**32 - 1])
    got = dropout_row_ids(cu_seqlens_of([2, 0, 3]), 7, cells)
    assert got[:5].tolist() == [70 << 32, 70 << 32 | 1, -(1 << 32), -(1 << 32) + 1, -(1 << 32) + 2]
    assert len(got) == 7, "slack tokens have ids too"
    assert torch.equal(dropout_row_ids(cu_seqlens_of([3, 2]), 5, cells[[2, 0]]), got[[2, 3, 4, 0, 1]])
    assert dropout_row_ids(cu_seqlens_of([1, 2]), 3).tolist() == [0, 1 << 32, 1 << 32 | 1]
    assert dropout_row_ids(cu_seqlens_of([]), 0).shape == (0,)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_kept_and_mean(p: float) -> None:
    """Over a million channels within five standard deviations, of all, and of any channel of a block."""
    mask = mask_of(torch.arange(4096) << 32 | 17, p, 256).double()
    threshold, scale = threshold_and_scale(p)
    share = 1 - threshold / 65536
    assert abs(share - (1 - p)) <= 2**-17
    assert share * scale == pytest.approx(1, abs=1e-15), "the mean stays"
    deviation = math.sqrt(share * (1 - share))
    assert abs(mask.mean() - share) < 5 * deviation / 1024
    assert (mask.mean(0) - share).abs().max() < 5 * deviation / 64


def test_masks_are_independent() -> None:
    """Of positions, cells, channels, places and steps: two of them agree no more often than chance has it."""
    rows, dim, p = 1024, 512, 0.3
    row_ids = torch.arange(rows)
    mask = mask_of(row_ids, p, dim)
    others = {
        "next position": mask_of(row_ids + 1, p, dim),
        "next cell": mask_of(row_ids + (1 << 32), p, dim),
        "position and cell exchanged": mask_of(row_ids << 32, p, dim)[1:],
        "next channel": mask.roll(1, 1),
        "the other half of a word": mask.roll(64, 1),
        "next counter": mask.roll(128, 1),
        "next place": mask_of(row_ids, p, dim, place=1),
        "next seed": mask_of(row_ids, p, dim, SEED + 1),
        "another upper half of the seed": mask_of(row_ids, p, dim, SEED + (1 << 32)),
    }
    kept_share = 1 - threshold_and_scale(p)[0] / 65536
    chance = kept_share**2 + (1 - kept_share) ** 2
    for what, other in others.items():
        agree = (mask[-len(other) :] == other).double().mean().item()
        assert abs(agree - chance) < 5 * math.sqrt(chance * (1 - chance) / other.numel()), what


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_against_the_definition(data: st.DataObject) -> None:
    rows, dim = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 300))
    p, place = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 2**32 - 1))
    seed = torch.tensor(data.draw(st.integers(-(2**63), 2**63 - 1)))
    row_ids = torch.tensor([data.draw(st.integers(-(2**63), 2**63 - 1)) for _ in range(rows)], dtype=torch.int64)
    x = random(rows, dim)
    mask, scale = kept(row_ids, seed, place, p, dim), threshold_and_scale(p)[1]
    with implementation(data.draw(st.sampled_from(IMPLEMENTATIONS))):
        assert torch.equal(dropout(x, p, row_ids, seed, place), torch.where(mask, x * scale, 0.0))


def test_gradcheck_of_the_reference() -> None:
    x, residual = (random(3, 20, torch.float64, seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda x, residual: dropout(x, 0.3, ids(3), SEED, residual=residual), (x, residual))
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.3, ids(3), SEED).square(), x)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.3, ids(3), SEED, relu=True), x)


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(overload: str) -> None:
    op, backward = (getattr(getattr(torch.ops.xtg, name), overload) for name in ("dropout", "dropout_backward"))
    x, residual, mask = random(5, 20).requires_grad_(), random(5, 20, seed=1).requires_grad_(), (ids(5), SEED, 1, 0.3)
    torch.library.opcheck(op, (x, residual, *mask, False))
    torch.library.opcheck(op, (random(5, 20, torch.bfloat16).requires_grad_(), residual, *mask, False))
    torch.library.opcheck(op, (x, None, *mask, True))
    torch.library.opcheck(backward, (random(5, 20), None, *mask, torch.bfloat16))
    torch.library.opcheck(backward, (random(5, 20), random(5, 20, seed=1), *mask, torch.float32))


def test_compile_takes_another_seed_without_compiling_again() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    def dropped(x: Tensor, cu_seqlens: Tensor, seed: Tensor) -> Tensor:
        return dropout(x, 0.1, dropout_row_ids(cu_seqlens, len(x)), seed)

    compiled = torch.compile(dropped, fullgraph=True, backend=backend)
    for seed in (SEED, SEED + 1):
        arguments = (random(5, 20), cu_seqlens_of([2, 3]), seed)
        assert torch.equal(compiled(*arguments), dropped(*arguments))
    assert len(graphs) == 1


def test_autocast_casts_nothing() -> None:
    """As torch's dropout and addition."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dropout(random(3, 8), 0.1, ids(3), SEED).dtype == torch.float32
        assert dropout(random(3, 8).bfloat16(), 0.1, ids(3), SEED).dtype == torch.bfloat16
        assert dropout(random(3, 8).bfloat16(), 0.1, ids(3), SEED, residual=random(3, 8)).dtype == torch.float32


def test_flops_are_none() -> None:
    assert torch.ops.xtg.dropout in flop_registry
    assert torch.ops.xtg.dropout_backward in flop_registry
    with FlopCounterMode(display=False) as counter:
        dropout(random(3, 8).requires_grad_(), 0.1, ids(3), SEED).sum().backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_error_within_plain_pytorch(name: str) -> None:
    """residual + dropout(x) in bfloat16 rounds twice in PyTorch, here once."""
    x, residual, row_ids = random(50, 96, torch.bfloat16), random(50, 96, torch.bfloat16, 1), ids(50)
    mask, scale = kept(row_ids, SEED, 0, 0.1, 96), threshold_and_scale(0.1)[1]
    exact = residual.double() + torch.where(mask, x.double() * scale, 0.0)
    plain = residual + torch.where(mask, x * scale, 0.0)
    with implementation(name):
        got = dropout(x, 0.1, row_ids, SEED, residual=residual)
    assert relative_error(got, exact) <= relative_error(plain, exact)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(6)}, ValueError, r"x: expected shape \(rows, dim\), got \(6,\)"),
        ({"x": torch.zeros((2, 3)).int()}, TypeError, "x: expected float32"),
        ({"p": 1.5}, ValueError, "p: expected a probability from 0 to 1, got 1.5"),
        ({"p": math.nan}, ValueError, "p: expected a probability from 0 to 1, got nan"),
        ({"row_ids": torch.arange(3)}, ValueError, r"row_ids: expected shape \(2,\), got \(3,\)"),
        ({"row_ids": torch.arange(2).int()}, TypeError, "row_ids: expected dtype torch.int64, got torch.int32"),
        ({"seed": 5}, TypeError, "seed: expected a torch.Tensor, got int"),
        ({"seed": torch.tensor([5])}, ValueError, r"seed: expected shape \(\), got \(1,\)"),
        ({"seed": torch.tensor(5.0)}, TypeError, "seed: expected dtype torch.int64, got torch.float32"),
        ({"place": -1}, ValueError, r"place: expected 0 to 2\^32 - 1, got -1"),
        ({"residual": torch.zeros((2, 4))}, ValueError, r"residual: expected shape \(2, 3\), got \(2, 4\)"),
        (
            {"residual": torch.zeros((2, 3)).half()},
            TypeError,
            "residual: expected dtype torch.float32 or torch.float32",
        ),
        ({"residual": torch.zeros((2, 3)), "relu": True}, ValueError, "relu: expected False with a residual"),
    ],
)
def test_refusals_name_argument_expected_and_got(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    valid = {"x": torch.zeros((2, 3)), "p": 0.1, "row_ids": torch.arange(2), "seed": SEED}
    dropout(**valid)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        dropout(**(valid | change))  # type: ignore[arg-type]


@needs_cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros((2, 4))}, "residual: expected size 3"),
        ({"residual": torch.zeros((2, 3)).half(), "x": torch.zeros((2, 3)).bfloat16()}, "residual: expected the dtype"),
        ({"row_ids": torch.arange(1)}, "row_ids: expected size 2"),
        ({"row_ids": torch.arange(2).int()}, "row_ids: wrong dtype"),
        ({"seed": torch.tensor([1])}, "seed: expected 0 dimensions"),
        ({"p": 2.0}, "p: expected a probability"),
        ({"place": 2**32}, "place: expected 0"),
    ],
)
def test_the_op_itself_refuses_what_would_read_outside(change: dict[str, object], message: str) -> None:
    valid = {"x": torch.zeros((2, 3)), "residual": None, "row_ids": torch.arange(2), "seed": SEED, "place": 0, "p": 0.1}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.xtg.dropout.default(*(valid | change).values(), False)
