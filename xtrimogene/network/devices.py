"""Where a network runs: the device asked for, the backend that its ops take there, and a copy made ready for it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch

from xtg_kernels import current_backend, dispatch
from xtrimogene.network.model import XTrimoGeneNetwork


def choose_device(device: str | torch.device) -> torch.device:
    """The device asked for, the GPU if there is one for "auto". Raises ValueError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or another of torch, got {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is there, got {device!r}, and torch finds no GPU; use 'cpu'")
    return torch.empty(0, device=chosen).device  # "cuda" as "cuda:0", as parameters report it


def backend_name(device: torch.device) -> str:
    """The backend that ops take on a device."""
    if current_backend() != "auto":
        return current_backend()
    if device.type != "cpu":
        return "triton"
    return "reference" if dispatch.extension() is None else "cpp"


@contextlib.contextmanager
def prepared(network: XTrimoGeneNetwork, device: torch.device, dtype: torch.dtype) -> Iterator[XTrimoGeneNetwork]:
    """The model on a device, in a dtype and in evaluation mode; the caller's own model is as before afterwards."""
    parameter = next(network.parameters())
    if parameter.device != device or parameter.dtype != dtype:
        given, network = network, copy.deepcopy(network).to(device=device, dtype=dtype)
        if given.product_head is not None:
            # It takes what cells have in common off what tells them apart, not in bfloat16; it costs next to nothing.
            network.product_head = copy.deepcopy(given.product_head).to(device)
    training = network.training
    network.eval()
    try:
        # Not inference_mode: its tensors do not count their changes, and the GPU kernels would list the blocks of a
        # batch anew in every layer.
        with torch.no_grad():
            yield network
    finally:
        network.train(training)
