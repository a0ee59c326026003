"""Tests of the conversion: a file in the released layout, made of the plain network, against that network."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from tests.xtrimogene.published import PublishedNetwork
from xtg_kernels import RaggedBatch, use_backend
from xtrimogene.cli import main
from xtrimogene.inference.embed import embed
from xtrimogene.interop import PARTS
from xtrimogene.interop.scfoundation import from_scfoundation
from xtrimogene.model import XTrimoGene
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.vocabulary import Vocabulary

GENES = 90
VOCABULARY = Vocabulary([f"GENE{i}" for i in range(GENES)])
CONFIG = XTrimoGeneConfig.preset(
    "tiny",
    num_genes=GENES,
    dim=24,
    num_heads=3,
    decoder_dim=32,
    decoder_heads=2,
    decoder_layers=2,
    num_bins=10,
    alpha=0.7,
    depth_tokens=True,
    stabilizer="cell",
)
# The file says how many random features there are, and the config of a converted model says it too.
CONVERTED = replace(CONFIG, favor_features=CONFIG.num_features)


def _network(seed: int) -> PublishedNetwork:
    torch.manual_seed(seed)
    network = PublishedNetwork(CONFIG).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:  # norms and biases, which are all alike in a fresh network
                parameter += 0.3 * torch.randn_like(parameter)
    return network


def _part(network: PublishedNetwork) -> dict[str, Any]:
    """One part of a released file."""
    model = {
        "encoder": {"hidden_dim": CONFIG.dim, "depth": CONFIG.num_layers, "heads": CONFIG.num_heads, "dim_head": 8},
        "decoder": {
            "hidden_dim": CONFIG.decoder_dim,
            "depth": CONFIG.decoder_layers,
            "heads": CONFIG.decoder_heads,
            "dim_head": 16,
            "module_type": "performer",
        },
        "bin_num": CONFIG.num_bins,
        "bin_alpha": CONFIG.alpha,
        "pad_token_id": 103,
        "mask_token_id": 102,
    }
    return {
        "config": {
            "model": "some_model",
            "model_config": {"some_model": model, "another_model": {"bin_num": 3}},
            "dataset_config": {"rnaseq": {"seq_len": GENES + 2}},
        },
        "state_dict": {f"model.{name}": tensor.clone() for name, tensor in network.state_dict().items()},
    }


@pytest.fixture(scope="module")
def networks() -> dict[str, PublishedNetwork]:
    return {part: _network(seed) for seed, part in enumerate(PARTS)}


@pytest.fixture(scope="module")
def checkpoint(networks: dict[str, PublishedNetwork], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "models.ckpt"
    torch.save({part: _part(network) for part, network in networks.items()}, path)
    return path


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "genes.tsv"
    VOCABULARY.save(path)
    return path


def _cells() -> AnnData:
    """Counts of four cells over the vocabulary's genes and three others, in another order."""
    generator = np.random.default_rng(0)
    counts = generator.poisson(0.4, (4, GENES + 3)).astype(np.float32)
    names = [*VOCABULARY.genes, "X1", "X2", "X3"]
    order = generator.permutation(len(names))
    cells = AnnData(sparse.csr_matrix(counts[:, order]))
    cells.var_names = [names[i] for i in order]
    return cells


def _tokens(cells: AnnData, cell: int, depth: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and positions of a cell's tokens, spelled out: genes, then T, then S."""
    counts = np.zeros(GENES)
    for name, count in zip(cells.var_names, cells.X[cell].toarray()[0], strict=True):
        if name in VOCABULARY:
            counts[VOCABULARY.index_of[name]] = count
    genes = np.flatnonzero(counts)
    values = [*np.log1p(counts[genes] / counts.sum() * 1e4), depth, np.log10(counts.sum())]
    return torch.tensor(np.array(values, np.float32)), torch.tensor([*genes, GENES, GENES + 1])


def _error(got: Any, want: torch.Tensor) -> float:
    got, want = torch.as_tensor(got).double(), want.detach().double()
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("part", PARTS)
def test_a_converted_part_computes_what_the_published_network_does(
    part: str, networks: dict[str, PublishedNetwork], checkpoint: Path
) -> None:
    model, network, cells = from_scfoundation(checkpoint, part, VOCABULARY), networks[part], _cells()
    assert model.config == CONVERTED
    assert not model.training
    values, gene_ids = _tokens(cells, 0, 4.0)
    batch = RaggedBatch(values, gene_ids.int(), torch.tensor([0, len(values)], dtype=torch.int32), len(values))
    masked = torch.tensor([i for i in range(0, GENES, 7) if i not in gene_ids], dtype=torch.int32)
    bounds = torch.tensor([0, len(masked)], dtype=torch.int32)
    with torch.no_grad():
        assert _error(model(batch), network.encode(values, gene_ids)) < 1e-5
        rows = model.decode(batch, masked_ids=masked, masked_cu_seqlens=bounds)
        assert _error(model.decoder.normed(rows), network(values, gene_ids, masked)) < 1e-5
        assert _error(model.decoder.predictions(rows), network.predict(values, gene_ids, masked)) < 1e-5


def test_outputs_of_cells_equal_the_published_network_at_batch_size_one(
    networks: dict[str, PublishedNetwork], checkpoint: Path
) -> None:
    model, network, cells = from_scfoundation(checkpoint, "gene", VOCABULARY), networks["gene"], _cells()
    asked = ["GENE7", "GENE88", "GENE0"]
    ids = [7, 88, 0]
    embeddings = model.gene_embeddings(cells, asked)
    expression = model.predict_expression(cells)
    some = model.predict_expression(cells, asked)
    embed(cells, model, pooling="all", dtype="float32", progress=False)
    assert embeddings.shape == (4, 3, CONFIG.decoder_dim)
    assert expression.shape == (4, GENES)
    nothing = torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        for cell in range(4):
            tokens = _tokens(cells, cell, 4.0)
            encoded = network.encode(*tokens)
            genes = encoded[:-2]
            pooled = torch.cat([encoded[-1], encoded[-2], genes.amax(0), genes.mean(0)])
            assert _error(cells.obsm["X_xtrimogene"][cell], pooled) < 1e-5
            rows, predictions = network(*tokens, nothing), network.predict(*tokens, nothing)
            assert _error(embeddings[cell], rows[ids]) < 1e-5
            assert _error(expression[cell], predictions[:GENES]) < 1e-5
            assert _error(some[cell], predictions[ids]) < 1e-5


@pytest.mark.parametrize(
    ("given", "aimed"),
    [
        (3.5, lambda total: 3.5),
        ("fold:2", lambda total: np.log10(2 * total)),
        ("offset:-1", lambda total: np.log10(total) - 1),
    ],
)
def test_target_depth(
    given: float | str, aimed: Callable[[float], float], networks: dict[str, PublishedNetwork], checkpoint: Path
) -> None:
    model, cells = from_scfoundation(checkpoint, "cell", VOCABULARY), _cells()
    embed(cells, model, target_depth=given, dtype="float32", progress=False)
    predictions = model.predict_expression(cells, target_depth=given)
    with torch.no_grad():
        values, gene_ids = _tokens(cells, 2, 0.0)
        values[-2] = aimed(10 ** float(values[-1]))
        encoded = networks["cell"].encode(values, gene_ids)
        assert _error(cells.obsm["X_xtrimogene"][2], encoded.mean(0)) < 1e-5
        want = networks["cell"].predict(values, gene_ids, torch.zeros(0, dtype=torch.int64))
        assert _error(predictions[2], want[:GENES]) < 1e-5


def test_the_command_writes_a_checkpoint_that_embeds(
    checkpoint: Path, vocabulary_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "converted"
    arguments = ["--part", "cell", "--vocabulary", str(vocabulary_file), "--output", str(output)]
    assert main(["convert", "--from-scfoundation", str(checkpoint), *arguments]) == 0
    assert main(["convert", "--from-scfoundation", str(checkpoint), *arguments, "--overwrite"]) == 0
    assert "90 genes" in capsys.readouterr().out
    loaded, direct = XTrimoGene.from_pretrained(output), from_scfoundation(checkpoint, "cell", VOCABULARY)
    assert loaded.config == CONVERTED
    for name, tensor in direct.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    cells = tmp_path / "cells.h5ad"
    _cells().write_h5ad(cells)
    command = ["embed", "--checkpoint", str(output), "--input", str(cells), "--output", str(tmp_path / "out.h5ad")]
    assert main([*command, "--pooling", "all", "--target-depth", "fold:2", "--no-progress"]) == 0


def test_half_precision_weights_become_float32(networks: dict[str, PublishedNetwork], tmp_path: Path) -> None:
    part = _part(networks["cell"])
    part["state_dict"] = {name: x.half() if x.is_floating_point() else x for name, x in part["state_dict"].items()}
    torch.save({"cell": part}, tmp_path / "half.ckpt")
    model = from_scfoundation(tmp_path / "half.ckpt", "cell", VOCABULARY)
    assert {x.dtype for x in model.state_dict().values()} == {torch.float32}


def test_the_old_file_format_is_read_too(networks: dict[str, PublishedNetwork], tmp_path: Path) -> None:
    torch.save({"cell": _part(networks["cell"])}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    model = from_scfoundation(tmp_path / "old.ckpt", "cell", VOCABULARY)
    assert torch.equal(model.mask_row, networks["cell"].token_emb.emb_mask.weight[0])


def test_every_tensor_that_does_not_fit_is_named(networks: dict[str, PublishedNetwork], tmp_path: Path) -> None:
    part = _part(networks["cell"])
    state = part["state_dict"]
    del state["model.norm.weight"], state["model.token_emb.emb_pad.weight"]
    state["model.decoder.surplus"] = torch.zeros(2, 3)
    state["model.pos_emb.weight"] = torch.zeros(GENES + 2, CONFIG.dim)
    state["model.to_final.bias"] = torch.zeros(1, dtype=torch.int32)
    state["model.norm.bias"] = state["model.norm.bias"].clone()
    state["model.norm.bias"][3] = torch.nan
    torch.save({"cell": part}, tmp_path / "broken.ckpt")
    with pytest.raises(ValueError, match=r"broken.ckpt, part cell: the tensors are not those") as refused:
        from_scfoundation(tmp_path / "broken.ckpt", "cell", VOCABULARY)
    for problem in (
        "missing model.norm.weight",
        "missing model.token_emb.emb_pad.weight",
        "unknown model.decoder.surplus (2, 3)",
        "model.pos_emb.weight: expected shape (93, 24), got (92, 24)",
        "model.to_final.bias: expected a float dtype, got torch.int32",
        "model.norm.bias: expected finite numbers, got NaN or infinite ones",
    ):
        assert problem in str(refused.value)


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(part: dict[str, Any]) -> None:
        for key in keys[:-1]:
            part = part[key]
        if value is None:
            del part[keys[-1]]
        else:
            part[keys[-1]] = value

    return change


MODEL = ("config", "model_config", "some_model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("config", value=None), "config model: expected a value, got none"),
        (_set("config", "model", value="other"), "config model_config.other: expected a value, got none"),
        (_set("config", "model", value=["some_model"]), "config model_config.* expected a value, got none"),
        (_set(*MODEL, "bin_alpha", value=None), "config bin_alpha: expected a value, got none"),
        (_set(*MODEL, "bin_alpha", value="high"), "config alpha: expected a finite number, got 'high'"),
        (_set(*MODEL, "encoder", "depth", value="two"), "config encoder.depth: expected an integer >= 1, got 'two'"),
        (_set(*MODEL, "encoder", "depth", value=3), "missing model.encoder.transformer_encoder.2.linear1.weight"),
        (_set(*MODEL, "bin_num", value=11), r"token_emb.mlp.weight: expected shape \(11, 1\), got \(10, 1\)"),
        (_set(*MODEL, "decoder", "dim_head", value=5), "expected hidden_dim = heads \\* dim_head, got 32 and 2 \\* 5"),
        (_set(*MODEL, "decoder", "heads", value=3), "expected hidden_dim = heads \\* dim_head"),
        (
            _set("config", "dataset_config", "rnaseq", "seq_len", value=50),
            r"vocabulary: expected 48 genes \(config seq_len 50, two of them depth tokens\), got 90",
        ),
        (_set("state_dict", value=None), "expected a dict with config and state_dict"),
        (_set("state_dict", "step", value=3), "state_dict step: expected a tensor, got int"),
        (_set("state_dict", "step", value=torch.tensor(3)), "step: expected a name that begins with 'model.'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], message: str, networks: dict[str, PublishedNetwork], tmp_path: Path
) -> None:
    part = _part(networks["cell"])
    change(part)
    torch.save({"cell": part}, tmp_path / "models.ckpt")
    with pytest.raises(ValueError, match=message):
        from_scfoundation(tmp_path / "models.ckpt", "cell", VOCABULARY)


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (Path("exploded"),)


def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cell": _Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match=r"bomb.ckpt: expected a checkpoint of tensors and plain values"):
        from_scfoundation(tmp_path / "bomb.ckpt", "cell", VOCABULARY)
    assert not Path("exploded").exists()
    torch.save({"cell": Path("x")}, tmp_path / "path.ckpt")
    with pytest.raises(ValueError, match=r"refuses: pathlib.PosixPath$"):
        from_scfoundation(tmp_path / "path.ckpt", "cell", VOCABULARY)
    pickle.loads(pickle.dumps(_Bomb()))
    assert Path("exploded").exists()  # the bomb is live: the check above could have failed


def test_other_files_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.ckpt: no such file"):
        from_scfoundation(tmp_path / "nowhere.ckpt", "cell", VOCABULARY)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "hello.ckpt").write_text("hello")
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html>")
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:-3000])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("text.ckpt", "hello.ckpt", "page.ckpt", "cut.ckpt", "empty.ckpt"):
        with pytest.raises(ValueError, match=f"{name}: expected a"):
            from_scfoundation(tmp_path / name, "cell", VOCABULARY)
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"list.ckpt: expected a dict with the parts cell, rde, gene, got list"):
        from_scfoundation(tmp_path / "list.ckpt", "cell", VOCABULARY)
    torch.save({"gene": 1}, tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"one.ckpt: expected a part 'cell', got a file with gene"):
        from_scfoundation(tmp_path / "one.ckpt", "cell", VOCABULARY)
    with pytest.raises(ValueError, match="part: expected one of cell, rde, gene, got 'cells'"):
        from_scfoundation(checkpoint, "cells", VOCABULARY)


def test_the_reference_backend_agrees(checkpoint: Path) -> None:
    model, cells = from_scfoundation(checkpoint, "rde", VOCABULARY), _cells()
    with use_backend("reference"):
        want = model.predict_expression(cells)
    np.testing.assert_allclose(model.predict_expression(cells), want, rtol=1e-4, atol=1e-5)
