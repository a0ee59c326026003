"""The dtype of an encoder: the one asked for, or the fastest of the machine whose embeddings come out alike."""

from __future__ import annotations

import numpy as np
import torch

from xtg_kernels import current_backend, dispatch
from xtrimogene.inference.model_cells import ModelCells
from xtrimogene.network.devices import prepared
from xtrimogene.network.linear import onednn_takes
from xtrimogene.network.model import XTrimoGeneNetwork

# dtype="auto": cells that are embedded in both dtypes, and how far bfloat16 may move them, as a share of their spread.
# At 0.05 and below, 95 % or more of a cell's ten nearest neighbours stayed what they are (pbmc3k, untrained presets).
_CHECKED_CELLS = 16
BFLOAT16_TOLERANCE = 0.05


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; for "auto" the fastest of the device, whose accuracy is still to be checked."""
    if dtype == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return torch.float32 if dtype == "float32" else torch.bfloat16


def has_bfloat16(device: torch.device) -> bool:
    """Whether attention and linear layers both have bfloat16 instructions on a device, so that it is worth taking."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    extension = dispatch.extension()
    if device.type != "cpu" or extension is None or current_backend() not in ("auto", "cpp"):
        return False
    return extension.active_isa() in ("avx512bf16", "amx") and onednn_takes(torch.bfloat16)


def bfloat16_error(cells: ModelCells, network: XTrimoGeneNetwork, device: torch.device, pooling: str) -> float:
    """What bfloat16 does to some cells: its differences from float32 by the cells' distances from their mean.

    Both as root mean squares. NaN where fewer than two of the cells have a gene.
    """
    source, batches = cells.source, []
    for row in np.unique(np.linspace(0, max(source.n_obs - 1, 0), min(source.n_obs, _CHECKED_CELLS)).astype(int)):
        packed = cells.pack(source.read_rows(int(row), int(row) + 1), first_row=int(row))
        if packed.total_nnz:
            batches.append(packed.to(device))
    if len(batches) < 2:
        return float("nan")
    embeddings = []
    for dtype in (torch.float32, torch.bfloat16):
        with prepared(network, device, dtype) as ready:
            embeddings.append(torch.cat([ready.embed_batch(batch, pooling) for batch in batches]).double())
    exact, rounded = embeddings
    return float((rounded - exact).norm() / (exact - exact.mean(0)).norm())
