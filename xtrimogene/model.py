"""XTrimoGene: the network with doors to AnnData and files of cells, checkpoint folders and the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from anndata import AnnData
from huggingface_hub import PyTorchModelHubMixin

from xtrimogene.hub import checkpoint_folder
from xtrimogene.inference import gene_level
from xtrimogene.network import folder
from xtrimogene.network.model import XTrimoGeneNetwork


class XTrimoGene(XTrimoGeneNetwork, PyTorchModelHubMixin, library_name="xtrimogene"):
    """xTrimoGene (Gong et al., NeurIPS 2023) as a biologist calls it; what it computes is XTrimoGeneNetwork's.

    config      XTrimoGeneConfig
    vocabulary  Vocabulary of config.num_genes genes; gene ids of a batch are its rows

    Raises ValueError when the vocabulary's size is not config.num_genes.
    """

    def gene_embeddings(
        self, adata_or_path: AnnData | str | os.PathLike[str], genes: Sequence[str], **options: Any
    ) -> npt.NDArray[np.float32] | None:
        """(n_obs, genes, decoder_dim) float32: the decoder's output before its head, for the asked genes of every cell.

        Options are those of xtrimogene.gene_embeddings, which says more; it runs where the model is. None where
        output=... names a file.
        """
        return gene_level.gene_embeddings(adata_or_path, self, genes, **{"device": self.mask_row.device, **options})[1]

    def predict_expression(
        self, adata_or_path: AnnData | str | os.PathLike[str], genes: Sequence[str] | None = None, **options: Any
    ) -> npt.NDArray[np.float32] | None:
        """(n_obs, genes) float32: predicted log-normalised expression of the asked genes, or of the whole vocabulary.

        Options are those of xtrimogene.predict_expression, which says more; it runs where the model is. None where
        output=... names a file.
        """
        options = {"device": self.mask_row.device, **options}
        return gene_level.predict_expression(adata_or_path, self, genes, **options)[1]

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        card: Mapping[str, str] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub: Any,
    ) -> str | None:
        """Write model.safetensors, config.json, vocabulary.tsv and a README.md model card into a folder.

        The files are written to a folder beside it, which is renamed at the end, so that no reader ever sees half a
        checkpoint.

        Args:
            card: text of the model card's sections Data, Recipe, Figures and Limits.
            push_to_hub, repo_id, hub: also upload, as huggingface_hub.PyTorchModelHubMixin.push_to_hub does with the
                options of hub; the address of the upload is returned then.

        Raises FileExistsError when the folder exists and is not empty, unless overwrite; also with overwrite when it
        holds files that no checkpoint has, since the whole folder is replaced.
        """
        folder.save(save_directory, self.state_dict(), self.config, self.vocabulary, card=card, overwrite=overwrite)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id=repo_id or Path(os.path.abspath(save_directory)).name, **hub)

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
        """Load a checkpoint folder, the model "pbmc-tiny" of the package, or one of the Hugging Face Hub by its
        "owner/name"; float32, evaluation mode.

        A folder that exists, and the model of the package, are read without any network. Weights come from
        model.safetensors only; nothing is unpickled.

        Raises FileNotFoundError for a missing folder or file, and ValueError for a pickle, a broken file, a bad config,
        or tensors that are missing, unknown or of the wrong shape (all of them are named) or not finite.
        """
        path = checkpoint_folder(
            pretrained_model_name_or_path,
            folder.CHECKPOINT_FILES,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return cls.from_checkpoint(folder.Checkpoint.open(path), device=device)
