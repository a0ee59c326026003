"""Conversion of scFoundation's released checkpoints (Hao et al., Nature Methods 2024) into XTrimoGene models.

A released file is a dict of parts, "cell", "rde" and "gene"; each holds `config` and `state_dict`, whose keys begin
with "model.". Every tensor has a place here:

    theirs                                                  ours
    token_emb.mlp, token_emb.mlp2, token_emb.emb.weight     embedding.w1, b1, w2, b2, bin_table
    token_emb.emb_mask.weight                               mask_row
    pos_emb.weight                                          embedding.gene_table (last row: padding)
    encoder.transformer_encoder.{i}.*, encoder.norm         encoder.layers.{i}.*, encoder.norm
    decoder_embed                                           decoder.bridge
    decoder.performer.net.layers.{i}                        decoder.layers.{i}
      .0.norm, .1.norm                                        .norm1, .norm2
      .0.fn.to_q, to_k, to_v, to_out                          .q_proj, k_proj, v_proj, out_proj
      .0.fn.fast_attention.projection_matrix                  .projection
      .1.fn.fn.w1, w2                                         .linear1, linear2
    decoder.norm, norm, to_final                            decoder.norm, decoder.final_norm, decoder.head

but two, which a ragged model has no use for and which are left out: token_emb.emb_pad.weight, the row of padding, and
decoder.performer.calls_since_last_redraw, a counter. The token ids of padding and of masks go too: here a mask is a
flag, not a value.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtrimogene.interop import PARTS
from xtrimogene.model import XTrimoGene
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.vocabulary import Vocabulary


def from_scfoundation(path: str | Path, part: str, vocabulary: Vocabulary) -> XTrimoGene:
    """A part of a scFoundation checkpoint file as a model in evaluation mode, float32 on the CPU.

    The model has depth tokens, and `stabilizer` "cell", which is what the published code computes for one cell.
    The file is read with torch.load(weights_only=True): nothing in it is run.

    Args:
        path: the released file, such as models.ckpt.
        part: "cell", "rde" or "gene".
        vocabulary: the genes of its positions, seq_len - 2 of them, in their order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such part, another layout, a config that is incomplete or does not fit the tensors, a vocabulary
            of another size, or tensors that are missing, unknown or of the wrong shape (all of them are named).
    """
    path = Path(path)
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    released = _read(path)
    if part not in released:
        raise ValueError(f"{path}: expected a part {part!r}, got a file with {', '.join(map(str, released)) or 'none'}")
    try:
        return _convert(released[part], vocabulary)
    except ValueError as error:
        raise ValueError(f"{path}, part {part}: {error}") from None


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # The parts that are not asked for stay on disk. Files of torch < 1.6 cannot be mapped into memory.
        released = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # PyTorch's text advises to load it all the same; which thing it refused stands in its middle.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{path}: expected a checkpoint of tensors and plain values, as released, got something that torch.load"
            f"(weights_only=True) refuses{': ' + found[1] if found else ''}"
        ) from error
    # What is no checkpoint fails in whatever way its bytes happen to read as a pickle.
    except Exception as error:
        raise ValueError(f"{path}: expected a PyTorch checkpoint, got a damaged file: {error}") from error
    if not isinstance(released, Mapping):
        raise ValueError(f"{path}: expected a dict with the parts {', '.join(PARTS)}, got {type(released).__name__}")
    return released


def _convert(part: Any, vocabulary: Vocabulary) -> XTrimoGene:
    theirs = _state(part)
    config = _config(part, theirs, vocabulary)
    with torch.device("meta"):
        model = XTrimoGene(config, vocabulary)
    expected = model.state_dict()
    names = _names(config)
    shapes: dict[str, tuple[int, ...]] = {name: _their_shape(name, expected[ours]) for ours, name in names.items()}
    shapes["token_emb.emb_pad.weight"] = (1, config.dim)
    shapes["decoder.performer.calls_since_last_redraw"] = ()
    problems = [f"missing model.{name}" for name in shapes if name not in theirs]
    problems += [f"unknown model.{name} {tuple(x.shape)}" for name, x in theirs.items() if name not in shapes]
    problems += [
        f"model.{name}: expected shape {shape}, got {tuple(theirs[name].shape)}"
        for name, shape in shapes.items()
        if name in theirs and tuple(theirs[name].shape) != shape
    ]
    problems += [
        f"model.{name}: expected a float dtype, got {theirs[name].dtype}"
        for name in names.values()
        if name in theirs and not theirs[name].is_floating_point()
    ]
    problems += [
        f"model.{name}: expected finite numbers, got NaN or infinite ones (a damaged file?)"
        for name in names.values()
        if name in theirs and not theirs[name].isfinite().all()
    ]
    if problems:
        raise ValueError("the tensors are not those of the published network: " + "; ".join(problems))
    tensors = {
        ours: theirs[name].reshape(expected[ours].shape).to(torch.float32, copy=True) for ours, name in names.items()
    }
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _state(part: Any) -> dict[str, Tensor]:
    """Tensors of a part, without the prefix of their names."""
    if not isinstance(part, Mapping) or not isinstance(part.get("state_dict"), Mapping):
        raise ValueError("expected a dict with config and state_dict")
    state: dict[str, Tensor] = {}
    for name, tensor in part["state_dict"].items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"state_dict {name}: expected a tensor, got {type(tensor).__name__}")
        if not str(name).startswith("model."):
            raise ValueError(f"state_dict {name}: expected a name that begins with 'model.'")
        state[str(name).removeprefix("model.")] = tensor
    return state


def _config(part: Mapping[str, Any], state: Mapping[str, Tensor], vocabulary: Vocabulary) -> XTrimoGeneConfig:
    """The config of a part. Raises ValueError for what is missing in it, or what its tensors contradict."""
    config = part.get("config")
    merged: dict[str, Any] = {}
    for keys in (("model_config", _value(config, "model")), ("dataset_config", "rnaseq")):
        section = _value(config, *keys)
        if not isinstance(section, Mapping):
            raise ValueError(f"config {'.'.join(map(str, keys))}: expected keys and values, got {section!r:.80}")
        merged.update(section)
    num_positions = _integer(merged, "seq_len")
    if num_positions != len(vocabulary) + 2:
        raise ValueError(
            f"vocabulary: expected {num_positions - 2} genes (config seq_len {num_positions}, two of them depth "
            f"tokens), got {len(vocabulary)}"
        )
    sizes = {
        "dim": _integer(merged, "encoder", "hidden_dim"),
        "num_layers": _integer(merged, "encoder", "depth"),
        "num_heads": _integer(merged, "encoder", "heads"),
        "decoder_dim": _integer(merged, "decoder", "hidden_dim"),
        "decoder_layers": _integer(merged, "decoder", "depth"),
        "decoder_heads": _integer(merged, "decoder", "heads"),
    }
    for prefix, side in (("", "encoder"), ("decoder_", "decoder")):
        dim, heads = sizes[f"{prefix}dim"], sizes["decoder_heads" if prefix else "num_heads"]
        head_dim = merged[side].get("dim_head")
        if head_dim is not None and head_dim * heads != dim:
            raise ValueError(
                f"config {side}: expected hidden_dim = heads * dim_head, got {dim} and {heads} * {head_dim}"
            )
    features = state.get("decoder.performer.net.layers.0.0.fn.fast_attention.projection_matrix")
    widths = [
        len(weight) // dim
        for name, dim in (
            ("encoder.transformer_encoder.0.linear1.weight", sizes["dim"]),
            ("decoder.performer.net.layers.0.1.fn.fn.w1.weight", sizes["decoder_dim"]),
        )
        if (weight := state.get(name)) is not None and weight.dim() and len(weight) >= dim
    ]
    return XTrimoGeneConfig.from_dict(
        {
            **sizes,
            "num_genes": len(vocabulary),
            "num_bins": _integer(merged, "bin_num"),
            "alpha": _value(merged, "bin_alpha"),
            # Where a tensor is missing or misshapen, the comparison of all of them will say so.
            "ffn_mult": widths[0] if widths else 4,
            "favor_features": len(features) if features is not None and features.dim() and len(features) else None,
            "depth_tokens": True,
            "stabilizer": "cell",
        }
    )


def _value(config: Any, *keys: Any) -> Any:
    for i, key in enumerate(keys):
        if not (isinstance(config, Mapping) and isinstance(key, str) and key in config):
            raise ValueError(f"config {'.'.join(map(str, keys[: i + 1]))}: expected a value, got none")
        config = config[key]
    return config


def _integer(config: Any, *keys: Any) -> int:
    value = _value(config, *keys)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config {'.'.join(map(str, keys))}: expected an integer >= 1, got {value!r}")
    return value


def _names(config: XTrimoGeneConfig) -> dict[str, str]:
    """Our name -> theirs, of every tensor that the two have in common."""
    names = {
        "embedding.w1": "token_emb.mlp.weight",
        "embedding.b1": "token_emb.mlp.bias",
        "embedding.w2": "token_emb.mlp2.weight",
        "embedding.b2": "token_emb.mlp2.bias",
        "embedding.bin_table": "token_emb.emb.weight",
        "embedding.gene_table": "pos_emb.weight",
        "mask_row": "token_emb.emb_mask.weight",
    }
    modules = {
        "encoder.norm": "encoder.norm",
        "decoder.bridge": "decoder_embed",
        "decoder.norm": "decoder.norm",
        "decoder.final_norm": "norm",
        "decoder.head": "to_final",
    }
    for i in range(config.num_layers):
        ours, theirs = f"encoder.layers.{i}", f"encoder.transformer_encoder.{i}"
        for name in ("self_attn.in_proj_weight", "self_attn.in_proj_bias"):
            names[f"{ours}.{name}"] = f"{theirs}.{name}"
        for name in ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"):
            modules[f"{ours}.{name}"] = f"{theirs}.{name}"
    for i in range(config.decoder_layers):
        ours, attention, feed_forward = (
            f"decoder.layers.{i}",
            f"decoder.performer.net.layers.{i}.0",
            f"decoder.performer.net.layers.{i}.1",
        )
        names[f"{ours}.projection"] = f"{attention}.fn.fast_attention.projection_matrix"
        modules[f"{ours}.norm1"] = f"{attention}.norm"
        for name in ("q", "k", "v", "out"):
            modules[f"{ours}.{name}_proj"] = f"{attention}.fn.to_{name}"
        modules[f"{ours}.norm2"] = f"{feed_forward}.norm"
        modules[f"{ours}.linear1"] = f"{feed_forward}.fn.fn.w1"
        modules[f"{ours}.linear2"] = f"{feed_forward}.fn.fn.w2"
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = f"{theirs}.{kind}"
    return names


def _their_shape(name: str, ours: Tensor) -> tuple[int, ...]:
    """The first map has one input, and the mask row is a table of one row: theirs have a dimension more."""
    shape = tuple(ours.shape)
    return {"token_emb.mlp.weight": (*shape, 1), "token_emb.emb_mask.weight": (1, *shape)}.get(name, shape)
