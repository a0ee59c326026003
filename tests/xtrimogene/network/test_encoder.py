"""Tests of xtrimogene.encoder and xtrimogene.embedding against torch.nn.TransformerEncoder and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import CPU_BACKENDS
from tests.xtrimogene.real_cells import scanpy_cells, zheng_cells
from xtg_kernels import RaggedBatch, use_backend
from xtg_kernels.ops.dropout.reference import kept, threshold_and_scale
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.dropping import DropoutKey
from xtrimogene.network.embedding import ExpressionEmbedding
from xtrimogene.network.encoder import RaggedTransformerEncoder
from xtrimogene.network.linear import feed_forward, linear

BACKENDS = [*CPU_BACKENDS, "triton"]
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [5, 0, 1, 70, 33]


@pytest.fixture(autouse=True)
def _plain_torch_layers() -> Iterator[None]:
    """torch's layers run as written (their fused inference path has rules of its own under autocast), on one thread:
    a cell at a time is small work, and on a busy machine the threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _blocks_for_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small batches of these tests go by blocks of rows as large ones do."""
    monkeypatch.setattr("xtrimogene.network.linear._LARGE_BYTES", 0)


def _device(backend: str) -> str:
    return TRITON_DEVICE if backend == "triton" else "cpu"


def _torch_encoder(
    dim: int, num_heads: int, num_layers: int, *, dropout: float = 0.1, **options: Any
) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(dim, num_heads, 4 * dim, dropout=dropout, batch_first=True, **options)
    norm = nn.LayerNorm(dim, bias=options.get("bias", True))
    return nn.TransformerEncoder(layer, num_layers, norm=norm, enable_nested_tensor=False)


def _twins(
    dim: int, num_heads: int, num_layers: int, **options: Any
) -> tuple[RaggedTransformerEncoder, nn.TransformerEncoder]:
    """Our encoder and torch's with the same weights, none of them at a value that could hide a mistake (0 or 1)."""
    torch.manual_seed(0)
    ours = RaggedTransformerEncoder(dim, num_heads, num_layers, dropout=0.0, **options)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = _torch_encoder(dim, num_heads, num_layers, dropout=0.0, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _offsets(lengths: list[int], device: str = "cpu") -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device=device, dtype=torch.int32)


def _cell_by_cell(encoder: Callable[[Tensor], Tensor], x: Tensor, cu_seqlens: Tensor) -> Tensor:
    cells = x[: int(cu_seqlens[-1])].split(cu_seqlens.diff().tolist())
    return torch.cat([encoder(cell[None])[0] if len(cell) else cell for cell in cells])


def _plain_embedding(embedding: ExpressionEmbedding, batch: RaggedBatch, dtype: torch.dtype) -> Tensor:
    w1, b1, w2, b2, bin_table, gene_table = (
        getattr(embedding, name).to(dtype) for name in ("w1", "b1", "w2", "b2", "bin_table", "gene_table")
    )
    hidden = F.leaky_relu(batch.values.to(dtype)[:, None] * w1 + b1, 0.1)
    weights = (embedding.alpha * hidden + F.linear(hidden, w2, b2)).softmax(-1)
    return weights @ bin_table + gene_table[batch.gene_ids.long()]


def _error(out: Tensor, expected: Tensor) -> float:
    out, expected = out.detach().double().cpu(), expected.detach().double().cpu()
    return float((out - expected).norm() / expected.norm())


def test_parameters_are_named_and_shaped_as_torch_names_and_shapes_them() -> None:
    ours, theirs = RaggedTransformerEncoder(32, 4, 2), _torch_encoder(32, 4, 2)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(p, theirs.state_dict()[name]) for name, p in ours.state_dict().items())


def test_initial_weights_are_those_of_torch() -> None:
    torch.manual_seed(3)
    ours = RaggedTransformerEncoder(32, 4, 1)
    torch.manual_seed(3)
    theirs = _torch_encoder(32, 4, 1)
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], parameter), name


def test_layers_start_from_different_weights() -> None:
    encoder = RaggedTransformerEncoder(32, 4, 2)
    assert not torch.equal(encoder.layers[0].linear1.weight, encoder.layers[1].linear1.weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dim", "num_heads"), [(64, 2), (48, 3)])
def test_forward_equals_torch_cell_by_cell(backend: str, dim: int, num_heads: int) -> None:
    device = _device(backend)
    ours, theirs = _twins(dim, num_heads, 2)
    ours, theirs = ours.to(device).eval(), theirs.to(device).eval()
    x, cu_seqlens = torch.randn(sum(LENGTHS), dim, device=device), _offsets(LENGTHS, device)
    with torch.no_grad(), use_backend(backend):
        out = ours(x, cu_seqlens, max(LENGTHS))
        assert _error(out, _cell_by_cell(theirs, x, cu_seqlens)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", ["scanpy", "zheng"])
def test_real_cells_through_embedding_and_encoder(backend: str, source: str, request: pytest.FixtureRequest) -> None:
    # The interpreter runs Triton on a CPU about a thousand times slower: fewer cells, the whole model all the same.
    slow = backend == "triton" and TRITON_DEVICE == "cpu"
    if source == "scanpy":
        num_genes, batch = 765, scanpy_cells(slice(0, 4 if slow else 100))
    else:
        shared_data: Path = request.getfixturevalue("shared_data")
        num_genes, batch = 19264, zheng_cells(shared_data, slice(0, 1 if slow else 40))
    device = _device(backend)
    config = XTrimoGeneConfig.preset("3m", num_genes=num_genes)
    encoder, theirs = _twins(config.dim, config.num_heads, config.num_layers)
    embedding = ExpressionEmbedding(config.num_genes, config.dim)
    with torch.no_grad():
        x = _plain_embedding(embedding, batch, torch.float32)
        expected = _cell_by_cell(theirs.eval(), x, batch.cu_seqlens)
        embedding, encoder, batch = embedding.to(device), encoder.to(device).eval(), batch.to(device)
        with use_backend(backend):
            out = encoder(embedding(batch), batch.cu_seqlens, batch.max_seqlen)
    assert _error(out, expected) < 1e-5


# Triton's interpreter has no bfloat16 arithmetic; without a GPU that case is left to the kernels' own tests.
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, *(["triton"] if TRITON_DEVICE == "cuda" else [])])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_error_is_at_most_twice_that_of_plain_pytorch(backend: str, how: str) -> None:
    device = _device(backend)
    batch = scanpy_cells(slice(0, 30)).to(device)
    config = XTrimoGeneConfig.preset("3m", num_genes=765)
    encoder, theirs = _twins(config.dim, config.num_heads, config.num_layers)
    embedding = ExpressionEmbedding(config.num_genes, config.dim)
    embedding, encoder, theirs = embedding.to(device), encoder.to(device).eval(), theirs.to(device).eval()
    if how == "weights":
        embedding, encoder, theirs = embedding.bfloat16(), encoder.bfloat16(), theirs.bfloat16()
    with torch.no_grad():
        # Our embedding stays in float32 under autocast, so the plain one does too.
        x = _plain_embedding(embedding, batch, embedding.bin_table.dtype)
        with use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
            out = encoder(embedding(batch), batch.cu_seqlens, batch.max_seqlen)
            plain = _cell_by_cell(theirs, x, batch.cu_seqlens)
        exact = _cell_by_cell(theirs.double(), _plain_embedding(embedding, batch, torch.float64), batch.cu_seqlens)
    assert out.dtype == plain.dtype
    assert 0 < _error(out, exact) <= 2 * _error(plain, exact)


def _gradients(module: nn.Module, x: Tensor, out: Tensor, seed: Tensor) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    grads = torch.autograd.grad((out * seed).sum(), [x, *named.values()])
    return dict(zip(["x", *named], grads, strict=True))


def test_gradients_equal_torch_in_float64() -> None:
    ours, theirs = _twins(32, 4, 2)
    ours, theirs = ours.double(), theirs.double()
    x = torch.randn(sum(LENGTHS), 32, dtype=torch.float64, requires_grad=True)
    seed, cu_seqlens = torch.randn_like(x), _offsets(LENGTHS)
    expected = _gradients(theirs, x, _cell_by_cell(theirs, x, cu_seqlens), seed)
    for name, grad in _gradients(ours, x, ours(x, cu_seqlens, max(LENGTHS)), seed).items():
        assert _error(grad, expected[name]) < 1e-12, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_error_is_at_most_three_times_that_of_plain_pytorch(backend: str) -> None:
    device = _device(backend)
    ours, theirs = _twins(64, 2, 2)
    ours, theirs = ours.to(device), theirs.to(device)
    x = torch.randn(sum(LENGTHS), 64, device=device, requires_grad=True)
    seed, cu_seqlens = torch.randn_like(x), _offsets(LENGTHS, device)
    with use_backend(backend):
        grads = _gradients(ours, x, ours(x, cu_seqlens, max(LENGTHS)), seed)
    plain = _gradients(theirs, x, _cell_by_cell(theirs, x, cu_seqlens), seed)
    theirs, exact_x = theirs.double(), x.detach().double().requires_grad_()
    exact = _gradients(theirs, exact_x, _cell_by_cell(theirs, exact_x, cu_seqlens), seed.double())
    together = [torch.cat([g[name].double().flatten() for name in exact]) for g in (grads, plain, exact)]
    assert _error(together[0], together[2]) <= 3 * _error(together[1], together[2])
    for name in exact:
        assert _error(grads[name], exact[name]) < 1e-5, name


class Masked(nn.Module):
    """Dropout with the masks of a key, for the layers of torch."""

    def __init__(self, key: DropoutKey, p: float) -> None:
        super().__init__()
        self.key, self.p = key, p

    def forward(self, x: Tensor) -> Tensor:
        mask = kept(self.key.row_ids, self.key.seed, self.key.place, self.p, x.shape[-1])
        return x * mask * threshold_and_scale(self.p)[1]


@pytest.mark.parametrize("slow", [False, True], ids=["modules", "blocks"])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}], ids=str)
def test_dropout_falls_where_torch_has_it_outside_attention(
    options: dict[str, Any], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks of each cell, its own numbers and positions in them, in three places a layer; and the gradients."""
    monkeypatch.setattr("xtrimogene.network.linear._mkl_is_slow", lambda: slow)
    ours, theirs = _twins(32, 4, 2, **options)
    for layer in ours.layers:
        layer.dropout.p = 0.3  # type: ignore[union-attr, operator]
    x, cu_seqlens, cells = torch.randn(sum(LENGTHS), 32, requires_grad=True), _offsets(LENGTHS), torch.arange(90, 95)
    out = ours(x, cu_seqlens, max(LENGTHS), dropout_key=DropoutKey.of(cu_seqlens, len(x), cells, seed=7))
    expected = []
    for cell, rows in zip(cells, x.split(LENGTHS), strict=True):
        key = DropoutKey.of(_offsets([len(rows)]), len(rows), cell[None], seed=7)
        for i, layer in enumerate(theirs.layers):
            for place, name in enumerate(("dropout1", "dropout", "dropout2")):
                setattr(layer, name, Masked(key.at(3 * i + place), 0.3))
        expected.append(theirs(rows[None])[0] if len(rows) else rows)
    want, seed = torch.cat(expected), torch.randn(len(x), 32)
    assert _error(out, want) < 1e-5
    grads, plain = _gradients(ours, x, out, seed), _gradients(theirs, x, want, seed)
    for name, grad in grads.items():
        assert _error(grad, plain[name]) < 1e-4, name
    assert _error(ours.eval()(x, cu_seqlens, max(LENGTHS)), want) > 1e-2


def test_without_a_key_torchs_seed_decides_about_dropout() -> None:
    encoder, x, cu_seqlens = RaggedTransformerEncoder(32, 4, 2, dropout=0.5), torch.randn(20, 32), _offsets([12, 8])
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(encoder(x, cu_seqlens, 12))
    assert torch.equal(outs[0], outs[1])
    assert _error(outs[2], outs[0]) > 1e-2
    assert _error(encoder(x, cu_seqlens, 12), outs[2]) > 1e-2, "and the next step has other masks"
    torch.manual_seed(1)
    layer = encoder.layers[0]
    assert _error(layer(x, cu_seqlens, 12), layer(x, cu_seqlens, 12)) > 1e-2, "a layer by itself too"


def test_a_dropout_that_is_off_takes_no_random_number() -> None:
    x, cu_seqlens = torch.randn(20, 32), _offsets([20])
    for encoder in (RaggedTransformerEncoder(32, 4, 2, dropout=0.0), RaggedTransformerEncoder(32, 4, 2).eval()):
        before = torch.get_rng_state()
        encoder(x, cu_seqlens, 20)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_dropout_with_a_hook_is_called() -> None:
    encoder, x, cu_seqlens = RaggedTransformerEncoder(32, 4, 1, dropout=0.5), torch.randn(20, 32), _offsets([20])
    seen = []
    encoder.layers[0].dropout.register_forward_hook(lambda *args: seen.append("called"))  # type: ignore[union-attr]
    encoder(x, cu_seqlens, 20)
    assert seen == ["called"] * 3


def test_rows_past_the_last_cell_change_nothing() -> None:
    encoder = RaggedTransformerEncoder(32, 4, 2, dropout=0.0)
    x, cu_seqlens = torch.randn(60, 32), _offsets([20, 30])
    with torch.no_grad():
        out = encoder(x, cu_seqlens, 30)
        x[50:] = 1e4
        assert torch.equal(encoder(x, cu_seqlens, 30)[:50], out[:50])


def test_q_k_and_v_are_views_of_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watch(q: Tensor, k: Tensor, v: Tensor, *args: object) -> Tensor:
        seen.extend([q, k, v])
        return v

    monkeypatch.setattr("xtrimogene.network.encoder.ragged_attention", watch)
    RaggedTransformerEncoder(32, 4, 1)(torch.randn(10, 32), _offsets([10]), 10)
    assert len({x.untyped_storage().data_ptr() for x in seen}) == 1
    assert [x.storage_offset() for x in seen] == [0, 32, 64]


def test_compiles_to_one_graph_and_keeps_it_over_changing_shapes() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    encoder = RaggedTransformerEncoder(32, 4, 2, dropout=0.3)
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    for step, lengths in enumerate(([5, 9], [7, 0, 12], [3, 1, 20, 6], [40], [11, 13])):
        x, cu_seqlens = torch.randn(sum(lengths), 32, requires_grad=True), _offsets(lengths)
        seed = torch.randn(sum(lengths), 32)
        torch.manual_seed(step)
        want = encoder(x, cu_seqlens, max(lengths))
        expected = _gradients(encoder, x, want, seed)
        torch.manual_seed(step)
        out = compiled(x, cu_seqlens, max(lengths))
        assert _error(out, want) < 1e-6
        for name, grad in _gradients(encoder, x, out, seed).items():
            assert _error(grad, expected[name]) < 1e-5, name
    # The first shapes are compiled as constants, the second as symbols; one more graph is allowed for a size of 1.
    assert len(graphs) <= 3


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    encoder = RaggedTransformerEncoder(16, 1, 1, dropout=0.0).eval()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for lengths in ([5, 9], [7, 0, 12]):
            x, cu_seqlens = torch.randn(sum(lengths), 16), _offsets(lengths)
            assert _error(compiled(x, cu_seqlens, max(lengths)), encoder(x, cu_seqlens, max(lengths))) < 1e-6


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 31), r"x: expected shape \(total_nnz, 32\), got \(4, 31\)"),
        (torch.zeros(1, 32, 4), r"x: expected shape \(total_nnz, 32\), got \(1, 32, 4\)"),
    ],
)
def test_a_wrong_shape_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RaggedTransformerEncoder(32, 4, 1)(x, _offsets([4]), 4)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="dim: expected a multiple of num_heads = 3, got 32"):
        RaggedTransformerEncoder(32, 3, 1)


def test_no_cells_at_all() -> None:
    encoder = RaggedTransformerEncoder(32, 4, 1)
    assert encoder(torch.zeros(0, 32), _offsets([]), 0).shape == (0, 32)
    assert encoder(torch.zeros(0, 32), _offsets([0, 0]), 0).shape == (0, 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_embedding_equals_plain_pytorch(backend: str) -> None:
    device = _device(backend)
    torch.manual_seed(0)
    batch = scanpy_cells(slice(0, 3))
    embedding = ExpressionEmbedding(765, 64, alpha=0.7)
    expected = _plain_embedding(embedding, batch, torch.float64)
    with use_backend(backend), torch.no_grad():
        assert _error(embedding.to(device)(batch.to(device)), expected) < 1e-6


def test_embedding_without_a_distinct_index_gives_the_same_rows() -> None:
    batch = scanpy_cells(slice(0, 3))
    embedding = ExpressionEmbedding(765, 64)
    without = RaggedBatch(batch.values, batch.gene_ids, batch.cu_seqlens, batch.max_seqlen)
    assert torch.equal(embedding(batch), embedding(without))


def test_embedding_starts_as_linear_and_embedding_layers_do() -> None:
    torch.manual_seed(0)
    embedding = ExpressionEmbedding(2000, 64, num_bins=100)
    assert embedding.gene_table.shape == (2001, 64)
    assert not embedding.gene_table[-1].any()
    assert embedding.gene_table[:-1].std().item() == pytest.approx(1, abs=0.02)
    for parameter, bound in ((embedding.w1, 1.0), (embedding.b1, 1.0), (embedding.w2, 0.1), (embedding.b2, 0.1)):
        assert 0.9 * bound < parameter.abs().max() <= bound


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, so that cells and blocks cut each other."""
    monkeypatch.setattr("xtrimogene.network.linear._UNIT_ROWS", 16)
    monkeypatch.setattr("xtrimogene.network.linear._MIN_UNITS", 1)
    monkeypatch.setattr("xtrimogene.network.linear._BLOCK_BYTES", 1)


def _layer_by_layer(encoder: RaggedTransformerEncoder, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    for layer in encoder.layers:
        x = layer(x, cu_seqlens, max_seqlen)
    return encoder.norm(x)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_inference_by_blocks_is_as_exact_as_plain_pytorch(dtype: torch.dtype, num_layers: int) -> None:
    encoder, theirs = _twins(64, 2, num_layers)
    encoder, theirs = encoder.to(dtype).eval(), theirs.to(dtype).eval()
    x, cu_seqlens = torch.randn(sum(LENGTHS), 64).to(dtype), _offsets(LENGTHS)
    given = x.clone()
    with torch.inference_mode():
        assert encoder._infers_by_blocks(x)
        out = encoder(x, cu_seqlens, max(LENGTHS))
        exact = _cell_by_cell(theirs.double(), x.double(), cu_seqlens)
        plain = _layer_by_layer(encoder, x, cu_seqlens, max(LENGTHS))
    assert torch.equal(x, given)
    assert out.dtype == dtype
    assert _error(out, exact) <= max(2 * _error(plain, exact), 1e-6 if dtype == torch.float32 else 0.0)


@pytest.mark.usefixtures("small_blocks")
def test_inference_of_no_cells_and_of_rows_past_the_last_cell() -> None:
    encoder = RaggedTransformerEncoder(32, 4, 2).eval()
    x = torch.randn(60, 32)
    with torch.no_grad():
        assert encoder(x[:0], _offsets([0, 0]), 0).shape == (0, 32)
        out = encoder(x, _offsets([20, 30]), 30)
        x[50:] = torch.nan
        assert torch.equal(encoder(x, _offsets([20, 30]), 30)[:50], out[:50])


def test_inference_keeps_hooks_and_replaced_modules() -> None:
    """What a user hangs on or puts into the layers runs; only untouched encoders skip the modules."""
    encoder, x, cu_seqlens = RaggedTransformerEncoder(32, 4, 2).eval(), torch.randn(20, 32), _offsets([20])
    seen = []
    with torch.no_grad():
        assert encoder._infers_by_blocks(x)
        handle = encoder.layers[1].linear1.register_forward_hook(lambda *args: seen.append("after"))
        encoder(x, cu_seqlens, 20)
        handle.remove()
        handle = encoder.norm.register_forward_pre_hook(lambda *args: seen.append("before"))
        encoder(x, cu_seqlens, 20)
        handle.remove()
        assert seen == ["after", "before"]

        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        plain = encoder(x, cu_seqlens, 20)
        doubled = Doubled(32, 32)
        doubled.load_state_dict(encoder.layers[0].self_attn.out_proj.state_dict())
        encoder.layers[0].self_attn.out_proj = doubled
        assert _error(encoder(x, cu_seqlens, 20), plain) > 1e-2


def test_without_gradients_dropout_still_falls_in_training_mode() -> None:
    encoder, x, cu_seqlens = RaggedTransformerEncoder(32, 4, 2, dropout=0.5), torch.randn(20, 32), _offsets([20])
    with torch.no_grad():
        assert _error(encoder(x, cu_seqlens, 20), encoder(x, cu_seqlens, 20)) > 1e-2
        encoder.eval()
        assert torch.equal(encoder(x, cu_seqlens, 20), encoder(x, cu_seqlens, 20))


def test_inference_sees_weights_that_were_changed_in_place() -> None:
    encoder, x, cu_seqlens = RaggedTransformerEncoder(32, 4, 2).eval(), torch.randn(20, 32), _offsets([20])
    with torch.no_grad():
        before = encoder(x, cu_seqlens, 20)
        encoder.layers[1].linear2.weight.mul_(3)
        assert _error(encoder(x, cu_seqlens, 20), before) > 1e-2


def test_inference_under_autocast_rounds_as_the_layers_do() -> None:
    encoder, x, cu_seqlens = RaggedTransformerEncoder(32, 4, 2).eval(), torch.randn(20, 32), _offsets([20])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = encoder(x, cu_seqlens, 20)
        assert torch.equal(out, _layer_by_layer(encoder, x, cu_seqlens, 20))


def test_weights_of_another_dtype_are_refused_with_or_without_gradients() -> None:
    encoder = RaggedTransformerEncoder(32, 4, 1).bfloat16().eval()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match="dtype"):
            encoder(torch.randn(20, 32), _offsets([20]), 20)


@pytest.mark.usefixtures("small_blocks")
def test_float32_training_through_onednn_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose MKL is slow."""
    monkeypatch.setattr("xtrimogene.network.linear._mkl_is_slow", lambda: True)
    used = []
    monkeypatch.setattr(
        "xtrimogene.network.encoder.feed_forward", lambda *a, **k: used.append(1) or feed_forward(*a, **k)
    )
    monkeypatch.setattr("xtrimogene.network.encoder.linear", lambda *args: used.append(1) or linear(*args))
    ours, theirs = _twins(64, 2, 2)
    x, cu_seqlens = torch.randn(sum(LENGTHS), 64, requires_grad=True), _offsets(LENGTHS)
    seed = torch.randn(sum(LENGTHS), 64)
    out, expected = ours(x, cu_seqlens, max(LENGTHS)), _cell_by_cell(theirs, x, cu_seqlens)
    assert len(used) == 4
    assert _error(out, expected) < 1e-5
    grads, wanted = _gradients(ours, x, out, seed), _gradients(theirs, x, expected, seed)
    assert max(_error(grads[name], wanted[name]) for name in wanted) < 1e-4


VARIANTS: dict[str, dict[str, Any]] = {
    "post-norm gelu": {"activation": "gelu"},
    "pre-norm relu": {"norm_first": True},
    "pre-norm gelu without bias": {"norm_first": True, "activation": "gelu", "bias": False},
    "post-norm relu without bias": {"bias": False},
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_layers_equal_torch_by_blocks_and_layer_by_layer(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference and training, by blocks of rows (as on a machine whose MKL is slow) and through the modules."""
    ours, theirs = _twins(64, 2, 2, **VARIANTS[variant])
    x, cu_seqlens = torch.randn(sum(LENGTHS), 64, requires_grad=True), _offsets(LENGTHS)
    seed = torch.randn(sum(LENGTHS), 64)
    expected = _cell_by_cell(theirs, x, cu_seqlens)
    wanted = _gradients(theirs, x, expected, seed)
    for slow in (True, False):
        monkeypatch.setattr("xtrimogene.network.linear._mkl_is_slow", lambda slow=slow: slow)
        out = ours(x, cu_seqlens, max(LENGTHS))
        assert _error(out, expected) < 1e-5
        for name, grad in _gradients(ours, x, out, seed).items():
            assert _error(grad, wanted[name]) < 1e-4, name
    with torch.no_grad():
        rows = x.detach().clone()
        assert ours.eval()._infers_by_blocks(rows)
        assert _error(ours(rows, cu_seqlens, max(LENGTHS)), expected) < 1e-5
        assert _error(_layer_by_layer(ours, rows, cu_seqlens, max(LENGTHS)), expected) < 1e-5
    assert {name: p.shape for name, p in ours.state_dict().items()} == {
        name: p.shape for name, p in theirs.state_dict().items()
    }


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation: expected one of relu, gelu, gelu_tanh, got 'silu'"):
        RaggedTransformerEncoder(32, 4, 1, activation="silu")


def test_training_keeps_hooks() -> None:
    encoder, x, cu_seqlens = RaggedTransformerEncoder(32, 4, 1).bfloat16(), torch.randn(20, 32), _offsets([20])
    seen = []
    encoder.layers[0].linear1.register_forward_hook(lambda *args: seen.append("after"))
    encoder(x.bfloat16(), cu_seqlens, 20)
    assert seen == ["after"]


def test_small_batches_are_left_to_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, x = RaggedTransformerEncoder(32, 4, 1).bfloat16().eval(), torch.randn(256, 32).bfloat16()
    monkeypatch.setattr("xtrimogene.network.encoder.feed_forward", lambda *a, **k: pytest.fail("by blocks"))
    for limit in (256 * 128 * 2, 256 * 128 * 2 + 1):
        monkeypatch.setattr("xtrimogene.network.linear._LARGE_BYTES", limit)
        with torch.no_grad():
            assert encoder._infers_by_blocks(x)
            assert encoder.float()._infers_by_blocks(x.float()[:128]) == (limit == 256 * 128 * 2)
        encoder.bfloat16()
    encoder(x, _offsets([256]), 256)
