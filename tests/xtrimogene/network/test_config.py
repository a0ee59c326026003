"""Tests of xtrimogene.network.config: presets, round trips, and the error for each kind of bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtrimogene.network.config import PRESETS, XTrimoGeneConfig

SIZES = {
    "tiny": (2, 64, 2, 1, 64, 2),
    "3m": (4, 128, 2, 2, 128, 2),
    "10m": (8, 256, 8, 4, 192, 6),
    "100m": (12, 768, 12, 6, 512, 8),
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_sizes_of_the_table(name: str) -> None:
    config = XTrimoGeneConfig.preset(name, num_genes=19264)
    sizes = (
        config.num_layers,
        config.dim,
        config.num_heads,
        config.decoder_layers,
        config.decoder_dim,
        config.decoder_heads,
    )
    assert sizes == SIZES[name]
    assert (config.num_genes, config.num_bins, config.ffn_dim) == (19264, 100, 4 * config.dim)
    assert config.head_dim == config.dim // config.num_heads
    assert config.decoder_head_dim == config.decoder_dim // config.decoder_heads
    assert config.decoder_ffn_dim == 4 * config.decoder_dim
    assert set(PRESETS) == set(SIZES)


def test_positions_and_random_features() -> None:
    config = XTrimoGeneConfig.preset("100m", num_genes=19264)
    assert (config.num_positions, config.num_features) == (19264, 266)
    config = XTrimoGeneConfig.preset("100m", num_genes=19264, depth_tokens=True, favor_features=99)
    assert (config.num_positions, config.num_features) == (19266, 99)
    assert XTrimoGeneConfig.preset("tiny", num_genes=5, decoder_heads=64).num_features == 1


def test_dict_and_yaml_round_trips(tmp_path: Path) -> None:
    config = XTrimoGeneConfig.preset("10m", num_genes=765, dropout=0.25, layer_norm_eps=1e-6, target_sum=100)
    assert XTrimoGeneConfig.from_dict(config.to_dict()) == config
    config.to_yaml(tmp_path / "config.yaml")
    assert XTrimoGeneConfig.from_yaml(tmp_path / "config.yaml") == config


def test_yaml_may_start_from_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("preset: 3m\nnum_genes: 765\nlayer_norm_eps: 1e-6\n")
    assert XTrimoGeneConfig.from_yaml(path) == XTrimoGeneConfig.preset("3m", num_genes=765, layer_norm_eps=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layer": 3}, r"num_layer: unknown key, got 3; did you mean num_layers\?"),
        ({"zzz": 3}, r"zzz: unknown key, got 3; known keys: num_genes"),
        ({"num_layers": 0}, r"num_layers: expected an integer >= 1, got 0"),
        ({"num_layers": 2.0}, r"num_layers: expected an integer >= 1, got 2.0"),
        ({"num_bins": True}, r"num_bins: expected an integer >= 1, got True"),
        ({"num_heads": 3}, r"dim: expected a multiple of num_heads = 3, got 128"),
        ({"decoder_heads": 3}, r"decoder_dim: expected a multiple of decoder_heads = 3, got 128"),
        ({"depth_tokens": 1}, r"depth_tokens: expected true or false, got 1"),
        ({"favor_features": 0}, r"favor_features: expected an integer >= 1, got 0"),
        ({"favor_eps": 0.0}, r"favor_eps: expected a number > 0, got 0.0"),
        ({"stabilizer": "batch"}, r"stabilizer: expected one of head, cell, got 'batch'"),
        ({"dropout": 1.0}, r"dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"dropout": "high"}, r"dropout: expected a finite number, got 'high'"),
        ({"alpha": float("nan")}, r"alpha: expected a finite number, got nan"),
        ({"num_bins": 10**20}, r"num_bins: expected an integer of 64 bits, got 1"),
        ({"alpha": 1e39}, r"alpha: expected a number that float32 can hold, got 1e\+39"),
        ({"layer_norm_eps": 0}, r"layer_norm_eps: expected a number > 0, got 0.0"),
        ({"target_sum": -1}, r"target_sum: expected a number > 0, got -1.0"),
    ],
)
def test_bad_values_are_refused_by_name(change: dict[str, object], message: str) -> None:
    values = XTrimoGeneConfig.preset("3m", num_genes=765).to_dict()
    with pytest.raises(ValueError, match=message):
        XTrimoGeneConfig.from_dict({**values, **change})


def test_missing_keys_are_named() -> None:
    values = XTrimoGeneConfig.preset("3m", num_genes=765).to_dict()
    del values["num_genes"], values["decoder_dim"]
    with pytest.raises(ValueError, match=r"num_genes, decoder_dim: expected a value, got none"):
        XTrimoGeneConfig.from_dict(values)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"expected one of tiny, 3m, 10m, 100m, got '3b'"):
        XTrimoGeneConfig.preset("3b", num_genes=765)


@pytest.mark.parametrize("text", ["- 3m\n", "", "a: [1\n", "\x00"])
def test_a_file_that_holds_no_keys_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken.yaml: .*expected"):
        XTrimoGeneConfig.from_yaml(path)


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_keys_that_lie_too_deep_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("[" * 100_000)
    read = XTrimoGeneConfig.from_yaml if name.endswith("yaml") else XTrimoGeneConfig.from_json
    with pytest.raises(ValueError, match=f"{name}: .*recursion"):
        read(path)


def test_a_preset_file_without_genes_says_which_key(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("preset: 3m\n")
    with pytest.raises(ValueError, match=r"config.yaml: config num_genes: expected an integer >= 1, got None"):
        XTrimoGeneConfig.from_yaml(path)
