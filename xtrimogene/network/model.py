"""XTrimoGene: value embedding, ragged encoder and decoder as one model, cell pooling, and checkpoints on disk."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from anndata import AnnData
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xtg_kernels import RaggedBatch
from xtrimogene.cells.masking import MaskedBatch
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.decoder import Decoder
from xtrimogene.network.embedding import ExpressionEmbedding
from xtrimogene.network.encoder import RaggedTransformerEncoder
from xtrimogene.network.vocabulary import Vocabulary

POOLINGS = ("mean", "max", "all")
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
VOCABULARY_FILE = "vocabulary.tsv"
CHECKPOINT_FILES = (CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def pool(encoded: Tensor, cu_seqlens: Tensor, how: str, *, depth_tokens: bool = False) -> Tensor:
    """One row per cell from the rows of its tokens.

    encoded       (total_nnz, dim), any float dtype
    cu_seqlens    (batch + 1,) int32; cell c owns rows cu_seqlens[c]:cu_seqlens[c + 1], rows past the last are ignored
    how           "mean" or "max" over all tokens of the cell, T and S among them where there are any; "all": row of S,
                  row of T, max and mean over the genes, one after the other; all as scFoundation embeds cells
    depth_tokens  whether each cell's last two rows are the tokens T and S, which are no genes
    returns       (batch, dim), for "all" (batch, 4 dim), float32 (float64 for float64 input); NaN for a cell without
                  genes

    A cell's tokens are reduced in their own order by one thread, so its row has the same bits whatever the other cells.
    Raises ValueError for another `how`, or "all" without depth tokens.
    """
    if how not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {how!r}")
    _check_all(how, depth_tokens)
    rows = encoded if encoded.dtype == torch.float64 else encoded.float()
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    gene_ends = torch.maximum(ends - 2, starts) if depth_tokens else ends
    # Segments in turn: what is reduced of a cell, then its other tokens.
    reduced_ends = gene_ends if how == "all" else ends
    offsets = torch.cat([torch.stack([starts, reduced_ends], dim=1).flatten(), cu_seqlens[-1:]])
    parts = []
    if how == "all":
        rows = F.pad(rows, (0, 0, 0, 2))  # that a cell without tokens, too, has two rows to read
        parts = [rows[(ends - 1).long()], rows[(ends - 2).long()]]
    for reduction in ("max", "mean") if how == "all" else (how,):
        parts.append(torch.segment_reduce(rows, reduction, offsets=offsets, axis=0)[::2])
    # The maximum of nothing comes back as -inf, and without a gene T and S say nothing but that.
    return torch.cat(parts, dim=1).masked_fill((gene_ends == starts).unsqueeze(1), torch.nan)


def pooled_dim(config: XTrimoGeneConfig, how: str) -> int:
    """Width of the rows that pool gives."""
    return 4 * config.dim if how == "all" else config.dim


def check_pooling(how: str, config: XTrimoGeneConfig) -> None:
    """Raises ValueError for a pooling that models of this config do not have."""
    _check_all(how, config.depth_tokens)


def _check_all(how: str, depth_tokens: bool) -> None:
    if how == "all" and not depth_tokens:
        raise ValueError("pooling: expected mean or max for a model without depth tokens, got 'all'")


class XTrimoGene(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="xtrimogene",
    tags=["single-cell", "gene-expression"],
    paper_url="https://arxiv.org/abs/2311.15156",
):
    """xTrimoGene (Gong et al., NeurIPS 2023): an encoder of each cell's expressed genes, a decoder of all its genes.

    config      XTrimoGeneConfig
    vocabulary  Vocabulary of config.num_genes genes; gene ids of a batch are its rows

    Submodules: `embedding` (ExpressionEmbedding), `encoder` (RaggedTransformerEncoder) and `decoder` (Decoder);
    `mask_row` (dim,) is the decoder's input for a masked gene. Cell embeddings need the first two only.
    `checkpoint_activations = True` makes training keep less and compute more.
    Raises ValueError when the vocabulary's size is not config.num_genes.
    """

    def __init__(self, config: XTrimoGeneConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if len(vocabulary) != config.num_genes:
            raise ValueError(f"vocabulary: expected config.num_genes = {config.num_genes} genes, got {len(vocabulary)}")
        self.config = config
        self.vocabulary = vocabulary
        self.embedding = ExpressionEmbedding(
            config.num_positions, config.dim, num_bins=config.num_bins, alpha=config.alpha
        )
        self.encoder = RaggedTransformerEncoder(
            config.dim,
            config.num_heads,
            config.num_layers,
            ffn_dim=config.ffn_dim,
            dropout=config.dropout,
            layer_norm_eps=config.layer_norm_eps,
        )
        self.mask_row = nn.Parameter(torch.randn(config.dim))
        self.decoder = Decoder(
            config.dim,
            config.decoder_dim,
            config.decoder_heads,
            config.decoder_layers,
            ffn_dim=config.decoder_ffn_dim,
            num_features=config.num_features,
            layer_norm_eps=config.layer_norm_eps,
            favor_eps=config.favor_eps,
            stabilizer=config.stabilizer,
        )

    @property
    def checkpoint_activations(self) -> bool:
        """Whether encoder and decoder keep only the input of each layer for the backward and compute the rest again."""
        return self.encoder.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        self.encoder.checkpoint_activations = self.decoder.checkpoint_activations = value

    @classmethod
    def from_preset(cls, name: str, vocabulary: Vocabulary, *, seed: int = 0, **overrides: Any) -> XTrimoGene:
        """A fresh, untrained model of preset "tiny", "3m", "10m" or "100m", in evaluation mode.

        The weights depend on the seed only; the global random state is left as it was. overrides replace config keys.
        """
        config = XTrimoGeneConfig.preset(name, num_genes=len(vocabulary), **overrides)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config, vocabulary).eval()

    def forward(self, batch: RaggedBatch) -> Tensor:
        """(total_nnz, dim): the encoder's row of every token of the batch."""
        return self.encoder(self.embedding(batch), batch.cu_seqlens, batch.max_seqlen)

    def embed_batch(self, batch: RaggedBatch, pooling: str = "mean") -> Tensor:
        """(batch, dim) float32 (4 dim for "all"): one embedding per cell, NaN for a cell without expressed genes.

        Runs in the model's present mode and with gradients if they are enabled: call eval() and torch.inference_mode()
        for embeddings alone.
        """
        return pool(self(batch), batch.cu_seqlens, pooling, depth_tokens=self.config.depth_tokens)

    def masked_predictions(self, masked: MaskedBatch) -> Tensor:
        """(total_chosen,) float32: predicted log-normalised values of the chosen genes, in the order of chosen_ids."""
        return self.decoder.predictions(self._decode_masked(masked))

    def loss(self, masked: MaskedBatch, reduction: str = "sum") -> Tensor:
        """() float32: squared error of masked_predictions against chosen_values, summed or averaged ("sum", "mean")."""
        return self.decoder.squared_error(self._decode_masked(masked), masked.chosen_values, reduction)

    def redraw_projections(self, generator: torch.Generator | None = None) -> None:
        """Fresh random projections in every decoder layer, of a generator on the CPU (None: torch's global one)."""
        self.decoder.redraw_projections(generator)

    def _decode_masked(self, masked: MaskedBatch) -> Tensor:
        return self.decode(
            masked.batch,
            masked_ids=masked.masked_ids,
            masked_cu_seqlens=masked.masked_cu_seqlens,
            asked_ids=masked.chosen_ids,
            asked_cu_seqlens=masked.chosen_cu_seqlens,
        )

    def decode(self, batch: RaggedBatch, **genes: Tensor | None) -> Tensor:
        """The decoder's rows of a batch, before its norms; genes are the masked and asked ones of Decoder.forward."""
        zero_row = self.embedding.value_rows(batch.values.new_zeros(1))[0]
        return self.decoder(self.embedding.gene_table[:-1], zero_row, self.mask_row, self(batch), batch, **genes)

    def gene_embeddings(
        self, adata_or_path: AnnData | str | os.PathLike[str], genes: Sequence[str], **options: Any
    ) -> npt.NDArray[np.float32] | None:
        """(n_obs, genes, decoder_dim) float32: the decoder's output before its head, for the asked genes of every cell.

        Options are those of xtrimogene.gene_level.gene_embeddings, which says more; it runs where the model is. None
        where output=... names a file.
        """
        from xtrimogene.inference import gene_level

        options = {"device": self.mask_row.device, **options}
        return gene_level.gene_embeddings(adata_or_path, self, genes, **options)[1]

    def predict_expression(
        self, adata_or_path: AnnData | str | os.PathLike[str], genes: Sequence[str] | None = None, **options: Any
    ) -> npt.NDArray[np.float32] | None:
        """(n_obs, genes) float32: predicted log-normalised expression of the asked genes, or of the whole vocabulary.

        Options are those of xtrimogene.gene_level.predict_expression, which says more; it runs where the model is.
        None where output=... names a file.
        """
        from xtrimogene.inference import gene_level

        options = {"device": self.mask_row.device, **options}
        return gene_level.predict_expression(adata_or_path, self, genes, **options)[1]

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = False, **kwargs: Any) -> str | None:
        """Write model.safetensors, config.json, vocabulary.tsv and a README.md model card into a folder.

        The files are written to a folder beside it, which is renamed at the end, so that no reader ever sees half a
        checkpoint. Further arguments are those of huggingface_hub.PyTorchModelHubMixin.save_pretrained.

        Raises FileExistsError when the folder exists and is not empty, unless overwrite; also with overwrite when it
        holds files that no checkpoint has, since the whole folder is replaced.
        """
        target = Path(os.path.abspath(save_directory))
        _refuse_occupied(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        mark = uuid.uuid4().hex[:12]
        written = target.with_name(f".{target.name}.{mark}.tmp")
        replaced = target.with_name(f".{target.name}.{mark}.old")
        try:
            url = super().save_pretrained(written, **{"repo_id": target.name, **kwargs})
            if target.exists():
                target.rename(replaced)
            try:
                written.rename(target)
            except OSError:
                if replaced.exists():
                    replaced.rename(target)
                raise
        finally:
            shutil.rmtree(written, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        return url

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, save_directory / WEIGHTS_FILE, metadata={"format": "pt"})
        self.vocabulary.save(save_directory / VOCABULARY_FILE)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> XTrimoGene:
        """Load a checkpoint folder, or a model of the Hugging Face Hub by its "owner/name"; float32, evaluation mode.

        A folder that exists is read without any network. Weights come from model.safetensors only; nothing is
        unpickled.

        Raises FileNotFoundError for a missing folder or file, and ValueError for a pickle, a broken file, a bad config,
        or tensors that are missing, unknown or of the wrong shape (all of them are named).
        """
        folder = _local_folder(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        config = XTrimoGeneConfig.from_json(folder / CONFIG_FILE)
        vocabulary = Vocabulary.load(folder / VOCABULARY_FILE)
        with torch.device("meta"):
            model = cls(config, vocabulary)
        tensors = _read_tensors(folder / WEIGHTS_FILE, model.state_dict(), device)
        model.load_state_dict(tensors, assign=True)
        return model.eval()


def _refuse_occupied(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder to write a checkpoint to, got a file")
    present = sorted(entry.name for entry in target.iterdir())
    if present and not overwrite:
        raise FileExistsError(f"{target}: the folder is not empty; name another one, or in Python pass overwrite=True")
    foreign = [name for name in present if name not in (*CHECKPOINT_FILES, "README.md")]
    if foreign:
        raise FileExistsError(
            f"{target}: overwrite replaces the whole folder, and {', '.join(foreign)} in it belongs to no checkpoint; "
            "move it away or name another folder"
        )


def _local_folder(path: str | Path, **download: Any) -> Path:
    """The checkpoint folder at a path, or the local copy of a Hub model; every file of a checkpoint is there."""
    folder = Path(path)
    if folder.is_file():
        if folder.suffix in PICKLE_SUFFIXES:
            raise ValueError(f"{path}: {_PICKLE_REFUSAL}")
        raise ValueError(f"{path}: expected a checkpoint folder, got a file")
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
            raise FileNotFoundError(f"{path}: no such checkpoint folder")
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=list(CHECKPOINT_FILES), **download))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{path}: no such checkpoint folder, and not to be had from the Hub: {error}"
            ) from error
    if not (folder / WEIGHTS_FILE).is_file():
        pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise ValueError(f"{path}: no {WEIGHTS_FILE}, only {', '.join(pickles)}: {_PICKLE_REFUSAL}")
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}: expected a checkpoint folder with {', '.join(CHECKPOINT_FILES)}; missing: {', '.join(missing)}"
        )
    return folder


_PICKLE_REFUSAL = (
    "a pickle can run code when it is read, so it is not opened; save the model as safetensors "
    "(XTrimoGene.save_pretrained) and load that folder"
)


def _read_tensors(path: Path, expected: dict[str, Tensor], device: str | torch.device) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file, which must have exactly the expected names and shapes."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            problems = [f"missing {name}" for name in expected if name not in shapes]
            problems += [f"unknown {name} {shape}" for name, shape in shapes.items() if name not in expected]
            problems += [
                f"{name}: expected shape {tuple(tensor.shape)}, got {shapes[name]}"
                for name, tensor in expected.items()
                if name in shapes and tuple(tensor.shape) != shapes[name]
            ]
            if problems:
                raise ValueError(f"{path}: the tensors do not fit {CONFIG_FILE}: " + "; ".join(problems))
            tensors = {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name}: expected a float dtype, got {tensor.dtype}")
    return {name: tensor.float() for name, tensor in tensors.items()}
