"""Tests of the model and its folder: pooling, checkpoints on disk, and the error for each kind of broken checkpoint."""

from __future__ import annotations

import json
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.xtrimogene.real_cells import scanpy_cells
from xtg_kernels import RaggedBatch
from xtrimogene.model import XTrimoGene
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.pooling import pool
from xtrimogene.network.vocabulary import Vocabulary

VOCABULARY = Vocabulary([f"GENE{i}" for i in range(765)])
FILES = {"README.md", "config.json", "model.safetensors", "vocabulary.tsv"}


@pytest.fixture(scope="module")
def model() -> XTrimoGene:
    return XTrimoGene.from_preset("3m", VOCABULARY, seed=0)


@pytest.fixture
def checkpoint(model: XTrimoGene, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def _no_leftovers(folder: Path) -> bool:
    return not [entry for entry in folder.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_equals_each_cell_by_itself_to_the_bit(how: str, dtype: torch.dtype) -> None:
    lengths = [300, 0, 1, 17, 2048, 0, 5]
    rows = torch.randn(sum(lengths) + 9, 48).to(dtype)
    rows[sum(lengths) :] = torch.nan  # slack
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    pooled = pool(rows, cu_seqlens, how)
    assert pooled.shape == (7, 48)
    assert pooled.dtype == torch.float32
    for cell, length in enumerate(lengths):
        tokens = rows[int(cu_seqlens[cell]) :][:length]
        if length == 0:
            assert pooled[cell].isnan().all()
            continue
        alone = pool(tokens, torch.tensor([0, length], dtype=torch.int32), how)[0]
        assert torch.equal(pooled[cell], alone)
        exact = tokens.double().mean(0) if how == "mean" else tokens.double().amax(0)
        torch.testing.assert_close(pooled[cell].double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_pool_gradient(how: str) -> None:
    rows = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: pool(x, cu_seqlens, how), rows)
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: pool(x, bounds, how, depth_tokens=True)[[0, 2]], rows)


def test_pool_keeps_its_bits_on_one_and_two_threads() -> None:
    rows, cu_seqlens = torch.randn(5000, 128), torch.tensor([0, 100, 4900, 5000], dtype=torch.int32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = pool(rows, cu_seqlens, "mean")
        torch.set_num_threads(2)
        assert torch.equal(one, pool(rows, cu_seqlens, "mean"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("how", ["mean", "max", "all"])
@pytest.mark.parametrize("slack", [0, 9])
def test_pool_with_depth_tokens(how: str, slack: int) -> None:
    """T and S, the last two rows of a cell, are no genes; "all" is S, T, max, mean of genes. Three cells have none."""
    lengths = [0, 5, 0, 3, 40, 2]
    rows = torch.randn(sum(lengths) + slack, 16)
    rows[sum(lengths) :] = torch.nan
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    pooled = pool(rows, cu_seqlens, how, depth_tokens=True)
    assert pooled.shape == (6, 64 if how == "all" else 16)
    for cell, length in enumerate(lengths):
        tokens = rows[int(cu_seqlens[cell]) :][:length]
        if length <= 2:
            assert pooled[cell].isnan().all()
            continue
        genes = tokens[:-2]
        parts = {"mean": [tokens.mean(0)], "max": [tokens.amax(0)]}
        parts["all"] = [tokens[-1], tokens[-2], genes.amax(0), genes.mean(0)]
        torch.testing.assert_close(pooled[cell], torch.cat(parts[how]))


def test_pool_of_all_needs_depth_tokens() -> None:
    with pytest.raises(ValueError, match="pooling: expected mean or max for a model without depth tokens, got 'all'"):
        pool(torch.zeros(2, 3), torch.tensor([0, 2], dtype=torch.int32), "all")


def test_pool_of_no_tokens_at_all() -> None:
    pooled = pool(torch.zeros(0, 3), torch.zeros(3, dtype=torch.int32), "all", depth_tokens=True)
    assert pooled.shape == (2, 12)
    assert pooled.isnan().all()


def test_pool_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="pooling: expected one of mean, max, all, got 'sum'"):
        pool(torch.zeros(2, 3), torch.tensor([0, 2], dtype=torch.int32), "sum")


def test_embed_batch_gives_one_row_per_cell(model: XTrimoGene) -> None:
    batch = scanpy_cells(slice(0, 5))
    with torch.inference_mode():
        embedding = model.embed_batch(batch)
        encoded = model(batch)
        largest = model.embed_batch(batch, pooling="max")
    assert embedding.shape == (5, 128)
    assert embedding.dtype == torch.float32
    for cell, tokens in enumerate(encoded.split(batch.lengths.tolist())):
        torch.testing.assert_close(embedding[cell], tokens.mean(0))
        torch.testing.assert_close(largest[cell], tokens.amax(0))


def test_a_cell_embeds_alike_alone_and_in_a_batch(model: XTrimoGene) -> None:
    batch, alone = scanpy_cells(slice(0, 5)), scanpy_cells(slice(3, 4))
    with torch.inference_mode():
        # Within rounding only: a matrix product may sum in another order for another number of rows.
        torch.testing.assert_close(model.embed_batch(batch)[3:4], model.embed_batch(alone), rtol=1e-4, atol=1e-5)


def test_a_cell_without_genes_is_nan_and_leaves_the_others_alone(model: XTrimoGene) -> None:
    batch = scanpy_cells(slice(0, 2))
    first, end = int(batch.cu_seqlens[1]), int(batch.cu_seqlens[2])
    cu_seqlens = torch.tensor([0, 0, first, first, end], dtype=torch.int32)
    gaps = RaggedBatch(batch.values, batch.gene_ids, cu_seqlens, batch.max_seqlen)
    with torch.inference_mode():
        embedding = model.embed_batch(gaps)
        assert embedding[[0, 2]].isnan().all()
        torch.testing.assert_close(embedding[[1, 3]], model.embed_batch(batch))


def test_the_whole_model_trains(model: XTrimoGene) -> None:
    trained = XTrimoGene.from_preset("3m", VOCABULARY, num_layers=1).train()
    batch = scanpy_cells(slice(0, 3))
    pooled = trained.embed_batch(batch)
    (pooled * torch.randn_like(pooled)).sum().backward()
    for name, parameter in trained.named_parameters():
        if name.startswith(("decoder.", "mask_row")):
            assert parameter.grad is None, name  # cell embeddings do not need them
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_whole_model_compiles_to_one_graph(model: XTrimoGene) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (slice(0, 3), slice(3, 10), slice(10, 12)):
            batch = scanpy_cells(rows)
            torch.testing.assert_close(compiled(batch), model(batch))


def test_presets_depend_on_the_seed_only() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, again, other = (XTrimoGene.from_preset("3m", VOCABULARY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.training
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not torch.equal(one.embedding.w2, other.embedding.w2)


@pytest.mark.parametrize(("preset", "dim", "layers"), [("3m", 128, 4), ("10m", 256, 8), ("100m", 768, 12)])
def test_parameter_counts(preset: str, dim: int, layers: int) -> None:
    with torch.device("meta"):
        model = XTrimoGene(XTrimoGeneConfig.preset(preset, num_genes=765), VOCABULARY)
    embedding = 3 * 100 + 100 * 100 + 100 * dim + 766 * dim
    encoder = layers * (12 * dim * dim + 13 * dim) + 2 * dim
    width, depth = model.config.decoder_dim, model.config.decoder_layers
    bridge, head = width * dim + width, width + 1
    decoder = bridge + depth * (12 * width * width + 13 * width) + 4 * width + head
    assert sum(parameter.numel() for parameter in model.parameters()) == embedding + encoder + dim + decoder


def test_the_released_shape_has_as_many_parameters_as_the_released_file() -> None:
    config = XTrimoGeneConfig.preset("100m", num_genes=19264, depth_tokens=True)
    with torch.device("meta"):
        model = XTrimoGene(config, Vocabulary(str(i) for i in range(19264)))
    padding_row = 768  # token_emb.emb_pad, which a ragged model has no use for
    assert sum(parameter.numel() for parameter in model.parameters()) + padding_row == 119_252_285


def test_a_vocabulary_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocabulary: expected config.num_genes = 764 genes, got 765"):
        XTrimoGene(XTrimoGeneConfig.preset("3m", num_genes=764), VOCABULARY)


def test_a_saved_model_comes_back_the_same(model: XTrimoGene, checkpoint: Path) -> None:
    assert {entry.name for entry in checkpoint.iterdir()} == FILES
    assert _no_leftovers(checkpoint.parent)
    loaded = XTrimoGene.from_pretrained(checkpoint)
    assert loaded.config == model.config
    assert loaded.vocabulary == VOCABULARY
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert "decoder.layers.1.projection" in loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    batch = scanpy_cells(slice(0, 2))
    with torch.inference_mode():
        assert torch.equal(loaded.embed_batch(batch), model.embed_batch(batch))


def test_config_json_holds_the_config_and_nothing_else(model: XTrimoGene, checkpoint: Path) -> None:
    assert json.loads((checkpoint / "config.json").read_text()) == model.config.to_dict()


def test_a_half_precision_model_is_saved_so_and_loads_as_float32(tmp_path: Path) -> None:
    half = XTrimoGene.from_preset("3m", VOCABULARY).bfloat16()
    half.save_pretrained(tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    loaded = XTrimoGene.from_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.embedding.w2, half.embedding.w2.float())


def test_saving_does_not_overwrite_unasked(model: XTrimoGene, checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="not empty; name another, or pass overwrite=True"):
        model.save_pretrained(checkpoint)
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before
    other = XTrimoGene.from_preset("3m", VOCABULARY, seed=9)
    other.save_pretrained(checkpoint, overwrite=True)
    assert torch.equal(XTrimoGene.from_pretrained(checkpoint).embedding.w2, other.embedding.w2)
    assert _no_leftovers(checkpoint.parent)


def test_overwriting_spares_what_is_no_checkpoint(model: XTrimoGene, checkpoint: Path) -> None:
    (checkpoint / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes.txt in it belongs to no checkpoint"):
        model.save_pretrained(checkpoint, overwrite=True)
    assert (checkpoint / "notes.txt").read_text() == "mine"


def test_an_empty_folder_may_be_saved_to_and_a_file_may_not(model: XTrimoGene, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert {entry.name for entry in (tmp_path / "empty").iterdir()} == FILES
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="expected a folder to write a checkpoint to, got a file"):
        model.save_pretrained(tmp_path / "file", overwrite=True)


def test_a_failed_save_leaves_nothing_and_loses_nothing(
    model: XTrimoGene, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    before = {entry.name: entry.read_bytes() for entry in checkpoint.iterdir()}
    monkeypatch.setattr(Vocabulary, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(checkpoint, overwrite=True)
    assert {entry.name: entry.read_bytes() for entry in checkpoint.iterdir()} == before
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(checkpoint.parent / "new")
    assert [entry.name for entry in checkpoint.parent.iterdir()] == ["checkpoint"]


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "epoch3.ckpt", "model.safetensors"])
def test_a_pickle_is_refused_and_never_opened(checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(_Bomb()))
    message = "expected a safetensors file" if name == "model.safetensors" else f"only {name}: a pickle can run code"
    with pytest.raises(ValueError, match=message):
        XTrimoGene.from_pretrained(checkpoint)
    if name != "model.safetensors":
        with pytest.raises(ValueError, match=f"{name}: a pickle can run code"):
            XTrimoGene.from_pretrained(checkpoint / name)
    assert not Path("exploded").exists()
    pickle.loads((checkpoint / name).read_bytes())
    assert Path("exploded").exists()  # the bomb is live: the check above could have failed


def test_every_tensor_that_does_not_fit_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["encoder.norm.weight"], tensors["embedding.w1"]
    tensors["decoder.surplus"] = torch.zeros(2, 3)
    tensors["embedding.b1"] = torch.zeros(99)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"the tensors do not fit config.json") as refused:
        XTrimoGene.from_pretrained(checkpoint)
    for part in (
        "missing embedding.w1",
        "missing encoder.norm.weight",
        "unknown decoder.surplus (2, 3)",
        "embedding.b1: expected shape (100,), got (99,)",
    ):
        assert part in str(refused.value)


def test_integer_weights_are_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["embedding.b1"] = torch.zeros(100, dtype=torch.int32)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"embedding.b1: expected a float dtype, got torch.int32"):
        XTrimoGene.from_pretrained(checkpoint)


def test_a_truncated_weights_file_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors: expected a safetensors file"):
        XTrimoGene.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocabulary.tsv"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"missing: {name}"):
        XTrimoGene.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "config.json: "), ('{"dimm": 3}', r"config.json: config dimm: unknown key, got 3; did you mean dim\?")],
)
def test_a_broken_config_is_refused(checkpoint: Path, text: str, message: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        XTrimoGene.from_pretrained(checkpoint)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such checkpoint folder"):
        XTrimoGene.from_pretrained(tmp_path / "nowhere")


def test_a_hub_name_without_a_network_says_so() -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder, and not to be had from the Hub"):
        XTrimoGene.from_pretrained("no-such-owner/no-such-model", local_files_only=True)


def _saved(folder: Path) -> XTrimoGene:
    model = XTrimoGene.from_preset("tiny", Vocabulary([f"G{i}" for i in range(7)]), seed=0)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_tensor(tmp_path: Path, number: float) -> None:
    model = _saved(tmp_path / "model")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["encoder.layers.1.linear1.bias"][3] = number
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.layers\.1\.linear1\.bias: expected finite weights"):
        XTrimoGene.from_pretrained(tmp_path / "model")


def test_a_loaded_model_does_not_change_with_its_file(tmp_path: Path) -> None:
    _saved(tmp_path / "model")
    model = XTrimoGene.from_pretrained(tmp_path / "model")
    before = model.mask_row.detach().clone()
    weights = tmp_path / "model" / "model.safetensors"
    with open(weights, "r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"\xff" * (weights.stat().st_size - weights.stat().st_size // 2))
    assert torch.equal(model.mask_row, before)
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("key", "value", "name", "size"),
    [
        ("num_layers", 10**9, "num_layers", 10**9),
        ("decoder_layers", 10**9, "decoder_layers", 10**9),
        ("dim", 2**40, "dim", 2**40),
        ("favor_features", 10**12, "num_features", 10**12),
        ("num_bins", 10**12, "num_bins", 10**12),
        ("ffn_mult", 10**17, "ffn_dim", 64 * 10**17),
    ],
)
def test_a_config_with_absurd_sizes_is_refused_before_anything_is_made(
    tmp_path: Path, key: str, value: int, name: str, size: int
) -> None:
    _saved(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=rf"the tensors do not fit config\.json: {name} is {size:,} there"):
        XTrimoGene.from_pretrained(tmp_path / "model")


def test_files_of_a_checkpoint_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    _saved(tmp_path / "model")
    assert len({stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}) == 1


def test_a_model_card_says_what_is_known_and_what_is_not(tmp_path: Path) -> None:
    model = XTrimoGene.from_preset("tiny", Vocabulary(["A", "B"]), seed=0)
    model.save_pretrained(tmp_path / "model", card={"Data": "Seven cells of a leaf."})
    card = (tmp_path / "model" / "README.md").read_text()
    assert "## Data\n\nSeven cells of a leaf.\n" in card
    assert "## Limits\n\nNot stated" in card


def test_a_model_that_is_pushed_is_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = {}

    class Hub:
        def __init__(self, **_: object) -> None: ...

        def create_repo(self, repo_id: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(repo_id=f"owner/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: object) -> str:
            pushed[repo_id] = {file.name for file in folder_path.iterdir()}
            return "address"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    model = XTrimoGene.from_preset("tiny", Vocabulary(["A", "B"]), seed=0)
    assert model.save_pretrained(tmp_path / "leaf", push_to_hub=True) == "address"
    assert pushed == {"owner/leaf": FILES}
    assert {file.name for file in (tmp_path / "leaf").iterdir()} == FILES
