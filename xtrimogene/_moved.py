"""Modules by the names that they had before there were rooms: imports of these go on working, with a warning."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from typing import Any

# "embed" is missing: a module of that name would hide the function xtrimogene.embed.
MOVED = {
    "checkpoints": ("training.checkpoints",),
    "config": ("network.config",),
    "convert": ("interop.scfoundation",),
    "data": ("cells.sources", "cells.matrix", "cells.genes", "cells.numbers", "cells.packing", "cells.depth"),
    "decoder": ("network.decoder",),
    "embedding": ("network.embedding",),
    "gene_level": ("inference.gene_level", "inference.options"),
    "linear": ("network.linear",),
    "masking": ("cells.masking", "network.masked_batch"),
    "model_cells": ("inference.model_cells", "network.devices", "cells.depth", "inference.options"),
    "pretrain": ("training.pretrain", "training.run", "training.run_folder", "training.validation"),
    "pretrain_config": ("training.config",),
    "ranks": ("training.ranks",),
    "training_data": ("cells.stream", "cells.data_sets", "cells.prefetch"),
    "training_log": ("training.log",),
    "vocabulary": ("network.vocabulary", "cells.genes"),
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != "xtrimogene" or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: types.ModuleType) -> None:
        homes = [f"xtrimogene.{home}" for home in MOVED[module.__name__.rpartition(".")[2]]]
        warnings.warn(f"{module.__name__} is {' and '.join(homes)} now", DeprecationWarning, stacklevel=2)

        def found(name: str) -> Any:
            # __file__ and the like are asked for by whoever looks through sys.modules, at any moment.
            for home in homes if not name.startswith("__") else []:
                if hasattr(importlib.import_module(home), name):
                    return getattr(importlib.import_module(home), name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = found  # type: ignore[method-assign]


def install() -> None:
    """Let the import system find the modules by their earlier names."""
    sys.meta_path.append(_Finder())
