"""Tests of the model in the package: it loads without a network, is small, says what it is, and has learned."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import xtrimogene
from tests import warm
from xtrimogene import XTrimoGene, hub
from xtrimogene.evaluation.spaces import agreement
from xtrimogene.network.folder import CARD_FILE, CARD_SECTIONS, CHECKPOINT_FILES

FOLDER = Path(xtrimogene.__file__).parent / "models" / "pbmc-tiny"


def test_it_is_a_checkpoint_of_at_most_six_megabytes_with_a_card() -> None:
    assert {entry.name for entry in FOLDER.iterdir()} == {*CHECKPOINT_FILES, CARD_FILE}
    assert sum(entry.stat().st_size for entry in FOLDER.iterdir()) <= 6 << 20
    card = (FOLDER / CARD_FILE).read_text(encoding="utf-8")
    for title, unknown in CARD_SECTIONS.items():
        assert f"## {title}" in card
        assert unknown not in card
    for licence in ("BSD-2-Clause", "MIT", "Apache-2.0"):
        assert licence in card
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("embedding.gene_table").dtype == torch.bfloat16


def test_it_loads_by_its_name_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = (
        "import socket\n"
        "def refused(*_): raise OSError('no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refused\n"
        "import xtrimogene\nxtrimogene.XTrimoGene.from_pretrained('pbmc-tiny')"
    )
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[2])}
    done = subprocess.run([*warm.python(cells=True), "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # A folder of that name comes first, and no other name leads into the package.
    XTrimoGene.from_preset("tiny", xtrimogene.Vocabulary(["A", "B"])).save_pretrained(tmp_path / "pbmc-tiny")
    assert len(XTrimoGene.from_pretrained("pbmc-tiny").vocabulary) == 2
    for name in ("", ".", "..", "pbmc-tiny/.."):
        assert hub.checkpoint_folder(name, CHECKPOINT_FILES) == Path(name)


def test_it_tells_cells_apart_that_it_has_not_seen() -> None:
    """scanpy's shipped PBMC, odd cells by even ones: better than the same network untrained, by both readers."""
    import scanpy

    cells = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    model = XTrimoGene.from_pretrained("pbmc-tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = XTrimoGene(model.config, model.vocabulary).eval()
    labels = cells.obs["bulk_labels"].astype(str).to_numpy()
    scores = []
    for each in (model, fresh):
        xtrimogene.embed(cells, each, normalized=True, dtype="float32", progress=False)
        points = np.asarray(cells.obsm["X_xtrimogene"])
        scores.append(agreement(points[::2], points[1::2], labels[::2], labels[1::2]))
    for reader in ("neighbours", "probe"):
        assert scores[0][reader] > scores[1][reader] + 0.03
