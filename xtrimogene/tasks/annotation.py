"""Cell types: a model fitted to labelled cells, the types of new cells, and how far both can be trusted.

What is fitted is in xtrimogene.tasks.cell_types: the encoder of a checkpoint with a head on it. Probabilities are
calibrated by one temperature on the cells that are kept for validation (Guo et al. 2017, arXiv 1706.04599).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from anndata import AnnData
from anndata.io import read_elem
from torch import Tensor

from xtg_kernels import RaggedBatch
from xtrimogene.cells.data_sets import Data, genes_of_data
from xtrimogene.cells.depth import TargetDepth
from xtrimogene.cells.kinds import ValueKind
from xtrimogene.cells.mapped import MappedCells
from xtrimogene.cells.sources import CellSource, open_cells, open_store
from xtrimogene.inference.encoding import Embeddings, EmbedReport, Encoding
from xtrimogene.inference.model_cells import WINDOW, ModelCells, opened
from xtrimogene.inference.options import DEFAULT_MAX_TOKENS, DEFAULT_TARGET_DEPTH, FIXED_DTYPES
from xtrimogene.inference.shards import Annotation, Destination, model_fingerprint
from xtrimogene.network.devices import backend_name, choose_device, prepared
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.progress import progress_bar
from xtrimogene.tasks import annotation_report, baselines
from xtrimogene.tasks.annotation_report import OURS, UNTRAINED, Evaluation
from xtrimogene.tasks.cell_types import (
    TASK,
    CellTypeHead,
    CellTypeModel,
    CellTypeNetwork,
    Codes,
    FitOptions,
    LabelledCells,
    encoded,
    feature_width,
    features_of,
    fitted_types,
    on_device,
)
from xtrimogene.tasks.folder import IDENTITY, TaskFolder, load, save
from xtrimogene.tasks.options import (
    CONFIDENCE_COLUMN,
    MAJORITY_COLUMN,
    PROBABILITIES_KEY,
    TYPE_COLUMN,
    TYPES_KEY,
    UNKNOWN,
)
from xtrimogene.tasks.report import check_output
from xtrimogene.tasks.splits import Names, check_varied, column_of, listed, need, validation_part
from xtrimogene.tasks.work import WorkFolder

# The version whose logistic regressions the baselines are written for.
SKLEARN = "1.8"
# From so many genes on, two cells with the same genes and values are one.
_TELLING_GENES = 10


@dataclass
class FitReport:
    """What one call of fit did.

    output            the model's folder
    types             names of the cell types, in the order of the probabilities
    cells             cells that were trained on, and "validation" ones
    left_out          cells without a gene of the vocabulary
    genes_found       genes of the vocabulary that the data have, out of vocabulary_size
    epochs            epochs made, best_epoch the one whose weights were kept
    validation        figures of the validation cells: accuracy, macro-F1, loss, and calibration error before and after
    seconds           wall time of this call
    """

    output: Path
    types: list[str]
    cells: dict[str, int]
    left_out: int
    genes_found: int
    vocabulary_size: int
    epochs: int
    best_epoch: int
    validation: dict[str, float]
    seconds: float

    def __str__(self) -> str:
        figures = self.validation
        return (
            f"{len(self.types):,} types, {self.cells['training']:,} training cells, {self.cells['validation']:,} for "
            f"validation, {self.left_out:,} left out without genes; {self.genes_found:,} of {self.vocabulary_size:,} "
            f"vocabulary genes found\n"
            f"epoch {self.best_epoch:,} of {self.epochs:,}: validation accuracy {figures['accuracy']:.3f}, macro-F1 "
            f"{figures['macro_f1']:.3f}, calibration error {figures['calibration_error']:.3f} (before "
            f"{figures['calibration_error_before']:.3f}), {self.seconds:.1f} s"
        )


def fit(
    data: Data | Sequence[Data],
    checkpoint: XTrimoGeneNetwork | str | os.PathLike[str],
    label: str,
    output: str | os.PathLike[str],
    *,
    group: str | None = None,
    tune: str = "all",
    learning_rate: float | None = None,
    epochs: int | None = None,
    patience: int | None = None,
    validation_share: float = 0.1,
    batch_cells: int = 32,
    batch_tokens: int = DEFAULT_MAX_TOKENS,
    dtype: str = "float32",
    seed: int = 0,
    layer: str | None = None,
    gene_symbols: str | None = None,
    aliases: str | os.PathLike[str] | None = None,
    normalized: bool = False,
    values: str | None = None,
    fractional_counts: bool = False,
    total_counts: str | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> FitReport:
    """Fit a model of cell types to labelled cells, and write its folder.

    The cells are held in memory as ragged batches, 8 bytes an expressed gene. The loss is the cross-entropy, each type
    weighted by one over the root of its number of cells. A part of the cells is kept for validation: the weights of
    the epoch with the least loss there are kept, and the temperature of the probabilities is fitted to it.

    Args:
        data: AnnData, files or stores of cells (see cells.sources.open_cells), folders of them, or several of these.
        checkpoint: a model, its checkpoint folder, or its name on the Hub or in the package; trained or not.
        label: column of obs with the types.
        output: folder to write. Until it is there, OUTPUT.partial holds what a killed fit goes on from.
        group: column of obs with what cells come from, such as donors: no group is trained on and validated on. None:
            the validation part is drawn from all cells, each type as often as among all.
        tune: "head": the encoder is frozen, its features are computed once; "published": value embedding, gene table
            and encoder are frozen except the last block but one (the only one, where there is one); "all": everything
            is trained, each layer of the encoder with 0.8 of the rate of the one above.
        learning_rate: of the linear layers, with AdamW, a warm-up and a cosine. None: 2e-3, for "published" 1e-3.
        epochs, patience: most epochs, and most in turn without a better validation loss. None: 30 and 5, for "head",
            whose epochs are short, 200 and 20.
        validation_share: about how many of the cells are kept for validation; of groups, at least one.
        batch_cells, batch_tokens: most cells and most expressed genes of a step.
        dtype: arithmetic of the encoder, "float32" or "bfloat16" (through autocast; weights stay float32).
        seed: of the split, the linear layers, the order of the cells and dropout.
        layer, gene_symbols, aliases, normalized, values, fractional_counts, total_counts: as for embed.
        device: "cpu", "cuda", ... or "auto": the GPU if there is one.
        resume: go on with a fit that was interrupted: on the same machine with the same number of threads, in float32
            on a CPU, it ends with the bits of an uninterrupted one. Without such a fit, start one.
        overwrite: replace the output if it exists.
        progress: show progress bars.

    Raises:
        ValueError, OSError: bad data or options, labels that are missing, the same for all cells, too rare, or found in
            one group only; the message says what to do. Nothing is written then.
        ImportError: scikit-learn is missing.
    """
    started = time.perf_counter()
    need("scikit-learn", TASK, "annotate", SKLEARN)
    options = FitOptions.checked(
        tune,
        {
            "learning_rate": learning_rate, "epochs": epochs, "patience": patience,
            "validation_share": validation_share, "batch_cells": batch_cells, "batch_tokens": batch_tokens,
            "dtype": dtype, "seed": seed,
        },
    )  # fmt: skip
    work = WorkFolder.checked(output, resume=resume, overwrite=overwrite)
    reading: dict[str, Any] = {
        "layer": layer, "gene_symbols": gene_symbols, "aliases": None if aliases is None else os.fspath(aliases),
        "normalized": normalized, "values": values, "fractional_counts": fractional_counts,
        "total_counts": total_counts,
    }  # fmt: skip
    torch_device = choose_device(device)
    network = opened(checkpoint)
    cells = LabelledCells.read(data, network, label, group, reading, batch_tokens, progress)
    check_varied(cells.labels, f"label {label}")
    cells.check_batches(batch_tokens)
    held_out = validation_part(cells.labels, cells.groups, share=validation_share, seed=seed)
    identity = {
        "label": label,
        "group": group,
        **dataclasses.asdict(options),
        **reading,
        "checkpoint": model_fingerprint(network)[:16],
        "cells": len(cells.labels),
        "content of the cells": cells.digest(),
    }
    if not work.is_over(identity):
        with work.open(identity):
            fitted = fitted_types(network, cells, held_out, options, torch_device, work, progress)
            settings: dict[str, Any] = {
                "types": cells.types,
                "reading": reading,
                "data": cells.names,
                "counts": cells.counts(),
                "left_out": cells.left_out,
                "genes_found": cells.genes_found,
                "training": int((~held_out).sum()),
                "history": fitted.fitted.history,
                "best_epoch": fitted.fitted.best_epoch,
                "validation": fitted.validation,
                IDENTITY: identity,
            }
            model = TaskFolder(settings, fitted.module.head.state_dict(), fitted.module.network)
            save(work.output, TASK, model, card=annotation_report.card(work.output.name, settings), overwrite=overwrite)
    settings = load(work.output, TASK).settings
    return FitReport(
        output=Path(output),
        types=settings["types"],
        cells={"training": settings["training"], "validation": int(held_out.sum())},
        left_out=settings["left_out"],
        genes_found=settings["genes_found"],
        vocabulary_size=len(network.vocabulary),
        epochs=len(settings["history"]),
        best_epoch=settings["best_epoch"],
        validation=settings["validation"],
        seconds=time.perf_counter() - started,
    )


@dataclass
class PredictReport:
    """What one run of predict did.

    cells, empty_cells, resumed_cells, genes_found, vocabulary_size
                   as in EmbedReport; an empty cell is "unknown" and has probabilities of NaN
    unknown        cells whose largest probability is below unknown_below, and empty ones
    counts         cells of each type that was found
    seconds        wall time
    labels         (n,) types, and confidence (n,) float32, largest probabilities; None where they went to a file
    """

    cells: int
    empty_cells: int
    resumed_cells: int
    genes_found: int
    vocabulary_size: int
    unknown: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    labels: Names | None = dataclasses.field(default=None, repr=False)
    confidence: Embeddings | None = dataclasses.field(default=None, repr=False)

    def __str__(self) -> str:
        resumed = f" ({self.resumed_cells:,} of them by an earlier run)" if self.resumed_cells else ""
        most = sorted(self.counts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{count:,} {name}" for name, count in most[:8])
        return (
            f"{self.cells:,} cells{resumed}, {self.empty_cells:,} of them empty, {self.unknown:,} unknown, "
            f"{self.genes_found:,} of {self.vocabulary_size:,} vocabulary genes found, {self.seconds:.1f} s\n{shown}"
            f"{f' and {len(most) - 8:,} other types' if len(most) > 8 else ''}"
        )


def predict(
    model: CellTypeModel | str | os.PathLike[str],
    adata_or_path: AnnData | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    unknown_below: float = 0.0,
    majority_vote: str | None = None,
    layer: str | None = None,
    gene_symbols: str | None = None,
    aliases: str | os.PathLike[str] | None = None,
    normalized: bool = False,
    values: str | None = None,
    fractional_counts: bool = False,
    total_counts: str | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    dtype: str = "float32",
    device: str | torch.device = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> PredictReport:
    """Predict the type of every cell: into an AnnData, or into a copy of a file at ``output``.

    What is written: ``obs["xtrimogene_celltype"]``, categorical; ``obs["xtrimogene_celltype_confidence"]``, float32,
    the calibrated probability of that type; ``obsm["X_xtrimogene_celltype_probabilities"]`` (n_obs, types) float32, and
    the names of its columns in ``uns["xtrimogene_celltype_names"]``; with a vote
    ``obs["xtrimogene_celltype_majority"]``.

    A cell's type depends on that cell alone (up to the rounding of matrix products of another size), its majority on
    its group. Of a file, 1,024 cells are read at a time and kept beside the output until all are there, as embed does.

    Args:
        model: the folder that fit has written, or what CellTypeModel.load made of it.
        adata_or_path, output, layer, gene_symbols, aliases, normalized, values: as for embed.
        fractional_counts, total_counts, max_tokens, device, resume, overwrite, progress: as for embed.
        unknown_below: cells whose confidence is below it are called "unknown"; 0 for none but empty cells.
        majority_vote: column of obs whose groups get the type of most of their cells; "auto" for small clusters of
            like cells, found by k-means in the encoder's features (50 components; 30 cells a cluster, at most 500
            clusters), in the manner of CellTypist, which has Leiden clusters there.
        dtype: arithmetic of the encoder, "float32" or "bfloat16".

    Raises:
        ValueError, OSError: bad input or options; the message says what to do. Nothing is written then.
    """
    started = time.perf_counter()
    if not 0 <= unknown_below <= 1:
        raise ValueError(f"unknown_below: expected a probability from 0 to 1, got {unknown_below}")
    if dtype not in FIXED_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(FIXED_DTYPES)}, got {dtype!r}")
    if not 1 <= max_tokens < 1 << 31:
        raise ValueError(f"max_tokens: expected at least 1 and less than 2^31, got {max_tokens}")
    if majority_vote == "auto":
        need("scikit-learn", "majority_vote='auto'", "annotate")
    destination = None
    if output is not None:
        if isinstance(adata_or_path, AnnData):
            raise ValueError("output: expected None with an AnnData, which is written to; or pass the path of a file")
        destination = Destination.checked(
            Path(adata_or_path), Path(output), PROBABILITIES_KEY, resume=resume, overwrite=overwrite
        )
    elif resume or overwrite:
        raise ValueError("resume, overwrite: expected output to be given too")
    known = model if isinstance(model, CellTypeModel) else CellTypeModel.load(model)
    torch_device = choose_device(device)
    with open_cells(adata_or_path, layer=layer, gene_symbols=gene_symbols) as source:
        if majority_vote not in (None, "auto"):
            column_of([source], str(majority_vote), "majority_vote")
        cells = _model_cells(
            source,
            known.network,
            ValueKind.checked(values, normalized, fractional_counts),
            total_counts=total_counts,
            aliases=aliases,
        )
        cells.check_longest_cell(max_tokens, WINDOW)
        with (
            prepared(known.network, torch_device, getattr(torch, dtype)) as ready,
            progress_bar(source.n_obs, unit="cell", desc="annotate", disable=not progress) as bar,
        ):
            embed_report = EmbedReport(
                cells=source.n_obs,
                vocabulary_size=cells.column_map.num_genes,
                genes_found=cells.column_map.num_found,
                dtype=dtype,
                device=str(torch_device),
                backend=backend_name(torch_device),
            )
            common = (cells, ready, "max", max_tokens, WINDOW, None, embed_report, bar)
            with on_device(known.head, torch_device) as head:
                run = _Labelling(*common, head)
                decisions = _Decisions(known.types, unknown_below, majority_vote, _Labelling(*common, None))
                if destination is not None:
                    described = {
                        "layer": source.layer,
                        "gene_symbols": gene_symbols,
                        "values": dataclasses.asdict(cells.mapped.kind),
                        "total counts": total_counts,
                        "content of total counts and aliases": cells.mapped.digest(),
                        "dtype": dtype,
                        "head": _head_digest(known.head),
                        "unknown_below": unknown_below,
                        "majority_vote": majority_vote,
                    }
                    destination.write(run, described, decisions.annotation)
                    if not len(decisions.codes):  # an earlier run has written the result
                        decisions.read(destination.output)
                else:
                    probabilities = np.empty((source.n_obs, len(known.types)), np.float32)
                    for start, stop in run.windows():
                        probabilities[start:stop] = run.embed_rows(start, run.read(start, stop))
                    embed_report.empty_cells = int(np.isnan(probabilities[:, 0]).sum())
                    obs, uns = decisions.annotation(iter([probabilities]))
                    if isinstance(adata_or_path, AnnData):
                        for name, column in obs.items():
                            adata_or_path.obs[name] = column.array
                        adata_or_path.obsm[PROBABILITIES_KEY] = probabilities
                        adata_or_path.uns.update(uns)
    codes = decisions.codes
    if embed_report.empty_cells:
        warnings.warn(
            f"{source.name}: {embed_report.empty_cells:,} of {embed_report.cells:,} cells have no gene of the "
            f"vocabulary; their type is {UNKNOWN!r}",
            stacklevel=2,
        )
    names = np.array([*known.types, UNKNOWN], dtype=object)
    found, counts = np.unique(codes[codes >= 0], return_counts=True)
    return PredictReport(
        cells=embed_report.cells,
        empty_cells=embed_report.empty_cells,
        resumed_cells=embed_report.resumed_cells,
        genes_found=embed_report.genes_found,
        vocabulary_size=embed_report.vocabulary_size,
        unknown=int((codes < 0).sum()),
        counts={known.types[code]: int(count) for code, count in zip(found, counts, strict=True)},
        seconds=time.perf_counter() - started,
        labels=names[codes] if output is None else None,
        confidence=decisions.confidence if output is None else None,
    )


@dataclass
class _Labelling(Encoding):
    """A pass that gives each cell's probabilities, or without a head its features."""

    head: CellTypeHead | None

    @property
    def width(self) -> int:
        return feature_width(self.network.config) if self.head is None else self.head.out.out_features

    def rows_of(self, batch: RaggedBatch) -> Tensor:
        features = features_of(self.network, batch)
        return features if self.head is None else self.head.probabilities(features)


def _model_cells(source: CellSource, network: XTrimoGeneNetwork, kind: ValueKind, **options: Any) -> ModelCells:
    """The cells of a source as the network reads them, without depth tokens."""
    config = dataclasses.replace(network.config, depth_tokens=False)
    mapped = MappedCells.checked(source, network.vocabulary, kind, target_sum=config.target_sum, **options)
    return ModelCells(mapped, config, TargetDepth.parse(DEFAULT_TARGET_DEPTH))


@dataclass
class _Decisions:
    """What is said of each cell, from the rows of its probabilities.

    features    the pass that like cells are found by, where they vote
    codes       (n,) number of the type, -1 for unknown
    confidence  (n,) float32, the largest probability
    """

    types: list[str]
    unknown_below: float
    majority_vote: str | None
    features: _Labelling
    codes: Codes = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    confidence: Embeddings = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))

    def annotation(self, rows: Iterator[Embeddings]) -> Annotation:
        """The columns of obs and the entry of uns, from the probabilities of all cells in their order."""
        codes, confidence = [self.codes[:0]], [self.confidence[:0]]
        for probabilities in rows:
            largest = probabilities.max(axis=1)
            confidence.append(largest)
            # NaN, of an empty cell, is not at least anything.
            codes.append(np.where(largest >= self.unknown_below, probabilities.argmax(axis=1), -1))
        self.codes, self.confidence = np.concatenate(codes), np.concatenate(confidence)
        columns = {TYPE_COLUMN: self._categories(self.codes), CONFIDENCE_COLUMN: pd.Series(self.confidence)}
        if self.majority_vote is not None:
            columns[MAJORITY_COLUMN] = self._categories(baselines.majority(self.codes, self._groups()))
        return columns, {TYPES_KEY: np.array(self.types, dtype=object)}

    def _groups(self) -> npt.NDArray[Any]:
        """(n,) the group that each cell votes in."""
        run = self.features
        if self.majority_vote != "auto":
            return column_of([run.cells.source], str(self.majority_vote), "majority_vote")
        run.bar.reset()
        features = np.concatenate([run.embed_rows(start, run.read(start, stop)) for start, stop in run.windows()])
        return baselines.small_clusters(np.nan_to_num(features))

    def _categories(self, codes: Codes) -> pd.Series:
        """A categorical column; unknown is a category where it occurs."""
        names = [name for name in self.types if name != UNKNOWN]
        if (codes < 0).any() or len(names) < len(self.types):
            names.append(UNKNOWN)
        number = np.array([names.index(name) for name in self.types] + [len(names) - 1])
        return pd.Series(pd.Categorical.from_codes(number[codes], categories=pd.Index(names, dtype=object)))

    def read(self, path: Path) -> None:
        """Codes and confidence from a result that is there already."""
        root, closing = open_store(path)
        with closing:
            names, confidence = (read_elem(root["obs"][column]) for column in (TYPE_COLUMN, CONFIDENCE_COLUMN))
        code = {name: number for number, name in enumerate(self.types)}
        self.codes = np.array([code.get(str(name), -1) for name in names], np.int64)
        self.confidence = np.asarray(confidence, np.float32)


def _head_digest(head: CellTypeHead) -> str:
    digest = hashlib.sha256()
    for tensor in head.state_dict().values():
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def evaluate(
    model: CellTypeModel | str | os.PathLike[str],
    data: Data | Sequence[Data],
    label: str,
    *,
    output: str | os.PathLike[str] | None = None,
    reference: Data | Sequence[Data] | None = None,
    untrained: bool = True,
    layer: str | None = None,
    gene_symbols: str | None = None,
    aliases: str | os.PathLike[str] | None = None,
    normalized: bool = False,
    values: str | None = None,
    fractional_counts: bool = False,
    total_counts: str | None = None,
    batch_tokens: int = DEFAULT_MAX_TOKENS,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Judge a model by labelled cells that it was not fitted to, beside what needs no network.

    The others are fitted to all cells that the model was fitted to, its validation part too, on all their genes:
    logistic regressions on log1p(count / total * 10,000), a vote of neighbours on 50 principal components, a majority
    vote over small clusters; and the same network untrained, with the same tuning.

    Args:
        model: the folder that fit has written, or what CellTypeModel.load made of it.
        data, label: cells, and the column of obs with their types. They are held in memory.
        output: folder to write the report to; None for none.
        reference: the cells that the model was fitted to. None: where they lay then; where they are not there any more
            the model stands alone, with a warning.
        untrained: also fit the untrained network, which takes as long as the fit took.
        layer, gene_symbols, aliases, normalized, values, fractional_counts, total_counts: as for embed, for data.
        batch_tokens: most expressed genes of a batch.

    Raises:
        ValueError, OSError: bad data; labels that are missing or that the model does not know; cells that the model was
            fitted to among those to judge by; another reference. The message says what to do.
        ImportError: scikit-learn or matplotlib is missing.
    """
    need("scikit-learn", TASK, "annotate", SKLEARN)
    if output is not None:
        need("matplotlib", "the report", "annotate")
        check_output(Path(output), overwrite)
    known = model if isinstance(model, CellTypeModel) else CellTypeModel.load(model)
    settings = known.settings
    torch_device = choose_device(device)
    reading: dict[str, Any] = {
        "layer": layer, "gene_symbols": gene_symbols, "aliases": aliases, "normalized": normalized, "values": values,
        "fractional_counts": fractional_counts, "total_counts": total_counts,
    }  # fmt: skip
    judged = LabelledCells.read(data, known.network, label, None, reading, batch_tokens, progress)
    foreign = sorted(set(judged.labels) - set(known.types))
    if foreign:
        raise ValueError(
            f"label {label}: expected types that the model knows, got {listed(foreign)}; take these cells out, or give "
            "them the names that the model has for them"
        )
    if reference is None:
        reference = _where_it_lay(settings)
    codes = judged.codes(known.types)
    guesses: dict[str, Codes] = {}
    probabilities = _probabilities(known.network, known.head, judged, batch_tokens, torch_device)
    guesses[OURS] = probabilities.argmax(axis=1)
    compared = None
    if reference is not None:
        identity = settings[IDENTITY]
        cells = LabelledCells.read(
            reference, known.network, identity["label"], identity["group"], settings["reading"], batch_tokens, progress
        )
        if cells.digest() != identity["content of the cells"]:
            raise ValueError(
                "reference: expected the cells that the model was fitted to, got others; give these, or a model that "
                "was fitted to them"
            )
        # Cells of a handful of genes can be alike by chance.
        both = np.isin(judged.hashes(), cells.hashes()) & (judged.packed.lengths.numpy() >= _TELLING_GENES)
        if both.any():
            raise ValueError(
                f"data: {int(both.sum()):,} of {len(both):,} cells are among those that the model was fitted to, by "
                "their genes and values; judge by cells that were held out"
            )
        own = settings["reading"]
        genes = genes_of_data(reference, layer=own["layer"], gene_symbols=own["gene_symbols"])
        wholes = [
            baselines.log_normalised(each, genes, how, chosen.numbers)
            for each, how, chosen in ((reference, own, cells), (data, reading, judged))
        ]
        guesses |= baselines.guesses(wholes[0], wholes[1], cells.codes(known.types), guesses[OURS])
        compared = {"cells": len(cells.labels), "genes": wholes[0].shape[1]}
        if untrained:
            options = FitOptions(**{each.name: identity[each.name] for each in dataclasses.fields(FitOptions)})
            held_out = validation_part(cells.labels, cells.groups, share=options.validation_share, seed=options.seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(options.seed)
                fresh = XTrimoGeneNetwork(known.network.config, known.network.vocabulary)
            fitted = fitted_types(fresh, cells, held_out, options, torch_device, None, progress).module
            found = _probabilities(fitted.network, fitted.head, judged, batch_tokens, torch_device)
            guesses[UNTRAINED] = found.argmax(axis=1)
    else:
        warnings.warn(
            "reference: the cells that the model was fitted to are not where they were; there is nothing to compare it "
            "with: name them with reference (--reference)",
            stacklevel=2,
        )
    evaluation = Evaluation.of(known.types, codes, probabilities, guesses, settings, compared)
    if output is not None:
        annotation_report.write(evaluation, Path(output))
    return evaluation


def _where_it_lay(settings: dict[str, Any]) -> list[str] | None:
    paths = settings["data"]
    return paths if all(os.path.isabs(path) and os.path.exists(path) for path in paths) else None


def _probabilities(
    network: XTrimoGeneNetwork, head: CellTypeHead, cells: LabelledCells, batch_tokens: int, device: torch.device
) -> Embeddings:
    """(n, types) calibrated probabilities of cells in memory."""
    with prepared(network, device, torch.float32) as ready, on_device(head, device) as placed:
        features = encoded(CellTypeNetwork(ready, placed), cells.packed, batch_tokens, None, False)
        return placed.probabilities(features.to(device)).cpu().numpy()
