"""Tests of the public names: where they live today, and by the modules that they were in before there were rooms."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import xtrimogene
from tests import warm
from xtrimogene import _moved

# What the modules were asked for before, by the documents and by scripts of users.
NAMES = {
    "config": "XTrimoGeneConfig",
    "convert": "from_scfoundation",
    "data": "pack_rows open_cells map_genes add_depth_tokens",
    "gene_level": "gene_embeddings predict_expression GeneReport DEFAULT_BATCH_SIZE",
    "masking": "MaskingConfig MaskedBatch mask_cells",
    "model_cells": "ModelCells TargetDepth choose_device DEFAULT_TARGET_DEPTH",
    "pretrain": "pretrain PretrainReport TrainingFailed gene_means RUN_FILE",
    "pretrain_config": "PretrainConfig",
    "training_data": "TrainingCells expand_data genes_of_data prefetched",
    "vocabulary": "Vocabulary ColumnMap best_name_column",
}


@pytest.mark.parametrize("module", _moved.MOVED)
def test_a_module_is_found_by_its_earlier_name_with_a_warning(module: str) -> None:
    sys.modules.pop(f"xtrimogene.{module}", None)
    with pytest.warns(DeprecationWarning, match=rf"xtrimogene\.{module} is xtrimogene\.\w+\.\w+"):
        found = importlib.import_module(f"xtrimogene.{module}")
    for name in NAMES.get(module, "").split():
        value = getattr(found, name)
        homes = [importlib.import_module(f"xtrimogene.{home}") for home in _moved.MOVED[module]]
        assert any(getattr(home, name, None) is value for home in homes)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = found.nothing


def test_names_of_the_package() -> None:
    for name in xtrimogene.__all__:
        assert getattr(xtrimogene, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = xtrimogene.nothing


def test_a_moved_module_does_not_hide_the_function_embed() -> None:
    script = "import warnings; warnings.simplefilter('ignore'); import xtrimogene, xtrimogene.data; "
    script += "from xtrimogene import gene_level; assert callable(xtrimogene.embed)"
    done = subprocess.run([*warm.python(cells=True), "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
