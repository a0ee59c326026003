"""Perturbation effects: what perturbing genes does to a cell, learned from a screen and from embeddings of its genes.

A network after GEARS takes the embeddings of the genes of a control cell, the decoder's rows for that very cell before
its head, and the genes that are perturbed, and predicts the change of every measured gene. It is fitted to the mean
change of each perturbation: which control cell a perturbed one was is not known, and pairing them at random adds noise
that averages to nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from xtrimogene.cells.ragged import joined
from xtrimogene.inference.gene_level import checked_output
from xtrimogene.inference.model_cells import ModelCells, opened
from xtrimogene.inference.tables import new_h5ad
from xtrimogene.network.devices import choose_device, prepared
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.progress import progress_bar
from xtrimogene.tasks import folder
from xtrimogene.tasks.conditions import Perturbation, genes_of, name_of
from xtrimogene.tasks.effects import RANK
from xtrimogene.tasks.gene_graphs import Graph, correlations, graph_between, nearest, normalised, read_graph
from xtrimogene.tasks.perturbation_model import OURS, TASK, VERSIONS, Inputs, PerturbationModel, perturbed_genes
from xtrimogene.tasks.perturbation_parts import Parts, parts_of
from xtrimogene.tasks.perturbation_training import Changes, Schedule, fit_version
from xtrimogene.tasks.screen import CONTROL, Screen, open_screen
from xtrimogene.tasks.splits import listed
from xtrimogene.tasks.work import WorkFolder

Array = npt.NDArray[Any]

# Name of the control cells among what an unfinished fit keeps.
_CONTROL = "control"
_DECODED_TOGETHER = 4
# One in so many cells of each perturbation is kept for validation.
_HELD_CELLS = 5
# Cells that co-expression is taken from.
_GRAPH_CELLS = 4000


@dataclass(frozen=True)
class PerturbationReport:
    """What a fit did.

    control  label of the control cells
    cells    "control", and "perturbed" of the perturbations that are used
    parts    names of the perturbations: "training", "validation", "test", and "few", left out for too few cells
    split    in words
    genes    "measured" ones that are predicted, "perturbed" ones, and how many of each the checkpoint knows
    graph    where the graph of perturbed genes is from, and for how many of them it has neighbours, in words
    unknown  perturbed genes of which nothing is known but what they do in this screen
    epochs   what validation has chosen for each version of the network, see perturbation_training.Chosen
    """

    output: str
    control: str
    cells: dict[str, int]
    parts: dict[str, list[str]]
    split: str
    genes: dict[str, int]
    graph: str
    unknown: list[str]
    epochs: dict[str, dict[str, int]]

    def __str__(self) -> str:
        parts = ", ".join(f"{len(self.parts[name]):,} {name}" for name in ("training", "validation", "test"))
        lines = [
            f"control {self.control!r}: {self.cells['control']:,} cells; {self.cells['perturbed']:,} perturbed cells",
            f"perturbations: {parts}; {self.split}",
            f"{self.genes['measured']:,} measured genes, {self.genes['measured, known']:,} of them known to the "
            f"checkpoint; {self.genes['perturbed']:,} perturbed genes, {self.genes['perturbed, known']:,} known",
            f"graph of perturbed genes: {self.graph}",
            *(
                f"{version}: {chosen['epochs']} epochs; for genes not perturbed here: "
                + (f"{chosen['others']} epochs" if chosen["others"] else "an average gene, no more was to be learned")
                for version, chosen in self.epochs.items()
            ),
        ]
        if self.parts["few"]:
            lines.append(f"left out for too few cells: {listed(self.parts['few'])}")
        if self.unknown:
            lines.append(f"nothing is known of {listed(self.unknown)} but what this screen shows")
        return "\n".join(lines)

    @classmethod
    def of(cls, settings: dict[str, Any], output: str) -> PerturbationReport:
        """From a model's settings."""
        names = {part: [name_of(tuple(each)) for each in found] for part, found in settings["parts"].items()}
        own = {name: settings[name] for name in ("control", "cells", "split", "epochs")}
        return cls(output, parts=names, **own, **settings["told"])


def fit(
    checkpoint: XTrimoGeneNetwork | str | os.PathLike[str],
    data: AnnData | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    condition: str,
    control: str | None = None,
    split: str | None = None,
    test_share: float | None = None,
    graph: str | os.PathLike[str] | None = None,
    group: str | None = None,
    compare: bool = False,
    min_cells: int = 10,
    max_genes: int = 2000,
    control_cells: int = 64,
    epochs: int = 60,
    patience: int = 15,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device = "auto",
    progress: bool = True,
    target_depth: float | str | None = None,
    aliases: str | os.PathLike[str] | None = None,
    **reading: Any,
) -> PerturbationReport:
    """Fit a network to a screen and write it as a folder.

    Args:
        checkpoint: the model whose gene embeddings are used, its folder or its name.
        data: the cells of the screen, control cells among them, as for embed.
        output: the folder to write.
        condition: column of obs with the perturbed genes: A, A+B, A_B, A+ctrl and the like, see conditions.
        control: label of the control cells there; None for the only one that goes by a name of controls.
        split, test_share: what is left out for evaluate, see perturbation_parts.parts_of.
        graph: table of pairs of genes, the graph of perturbed genes; None for co-expression in the training cells.
        group: column of obs, such as a cell line: changes are taken against control cells of the same group.
        compare: also fit the network with learned and with shuffled embeddings of the same width.
        min_cells: perturbations of fewer cells are left out; at least 2.
        max_genes: of more measured genes, those that are perturbed and then those that vary most in the training cells
            are predicted.
        control_cells: at most so many control cells are embedded, and kept with the model.
        epochs, patience: most epochs, and most of them in turn without a better validation.
        seed: of the split, of the cells that are kept, and of the network.
        resume: go on with an interrupted fit of the same data and options.
        target_depth, aliases: as for embed.
        reading: layer, gene_symbols, normalized, values, fractional_counts and total_counts, as for embed.

    Raises ValueError, OSError: what is wrong with data, labels or options, in a line, before the work.
    """
    numbers = {"max_genes": max_genes, "control_cells": control_cells, "epochs": epochs, "patience": patience}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    work = WorkFolder.checked(output, resume=resume, overwrite=overwrite)
    network = opened(checkpoint)
    torch_device = choose_device(device)
    links = None if graph is None else read_graph(graph)
    known = {*network.vocabulary.genes, *(links or ())}
    options = {"condition": condition, "control": control, "group": group, "min_cells": min_cells, **reading}
    with open_screen(data, known=known, **options) as screen:
        readable = {*screen.genes, *known, *perturbed_genes(screen.perturbations)}
        parts = parts_of(
            screen.perturbations,
            split,
            test_share=test_share,
            seed=seed,
            read=lambda label: genes_of(label, readable, screen.control),
        )
        cells = ModelCells.checked(
            screen.source, network, target_depth=target_depth, aliases=aliases, **_numbers(reading)
        )
        sums = screen.sums(screen.drawn(_HELD_CELLS, (seed, 1)), 2, progress=progress)
        identity = {
            **{name: None if value is None else str(value) for name, value in options.items()},
            **numbers,
            "data": _digest(sums.totals, sums.counts, screen.genes, screen.perturbations, screen.groups),
            "checkpoint": _digest(network.vocabulary.genes, *network.state_dict().values()),
            "graph": None if links is None else _digest(links),
            "parts": _digest(parts.training, parts.validation, parts.test),
            "compare": compare,
            "seed": seed,
        }
        if work.is_over(identity):
            return PerturbationReport.of(folder.load(output, TASK).settings, str(output))
        with work.open(identity):
            genes = _chosen_genes(screen, sums.variances(np.array(parts.fitted)), max_genes)
            tensors, names = _embedded(screen, cells, network, genes, control_cells, seed, work, torch_device, progress)
            coexpression, tensors["own_rows"] = _coexpression(screen, parts, genes, seed)
            gene_graph = normalised(coexpression)
            tensors |= {"graph_places": gene_graph.indices(), "graph_weights": gene_graph.values()}
            measured = [screen.genes[gene] for gene in genes]
            whole, seen, held = (
                torch.from_numpy(sums.changes(which)[:, genes].astype(np.float32)) for which in ((0, 1), (0,), (1,))
            )
            tensors["changes"] = whole[parts.fitted]
            trained = perturbed_genes(screen.perturbations[number] for number in parts.fitted)
            settings: dict[str, Any] = {
                folder.IDENTITY: identity,
                "reading": options,
                "genes": measured,
                "graph": _linked(graph_between(coexpression, measured) if links is None else links, trained),
                "control": screen.control,
                "control_cells": names,
                "cells": {"control": int(sums.counts[0].sum()), "perturbed": int(sums.counts[1:].sum())},
                "parts": {**parts.named(screen.perturbations), "few": screen.few},
                "split": parts.how,
                "seed": seed,
                "epochs": {},
            }
            inputs = Inputs(settings, tensors, network.vocabulary)
            settings["told"] = _told(inputs, screen.perturbations, trained, graph)
            for version in VERSIONS if compare else (OURS,):
                module, chosen = fit_version(
                    inputs,
                    version,
                    screen.perturbations,
                    Changes(whole, seen, held),
                    parts.training,
                    parts.validation,
                    Schedule(epochs, patience, seed),
                    work=work,
                    progress=progress,
                )
                tensors |= {f"{version}.{name}": tensor for name, tensor in module.state_dict().items()}
                settings["epochs"][version] = dataclasses.asdict(chosen)
            report = PerturbationReport.of(settings, str(output))
            model = folder.TaskFolder(settings, tensors, network)
            folder.save(output, TASK, model, card=_card(report), overwrite=overwrite)
    return report


def predict(
    model: PerturbationModel | str | os.PathLike[str],
    perturbations: Sequence[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Perturbation]:
    """Write the model's control cells as each perturbation would change them, as an h5ad file.

    Its cells are every control cell of the model under every perturbation: obs["perturbation"], obs["control_cell"]; X
    is log-normalised expression, (cells, genes) float32, not below 0, and layers["change"] the predicted change.

    Args:
        perturbations: conditions, A or A+B, as in fit.

    Returns what they were read as. Raises ValueError for names of which nothing is known, and for the control.
    """
    destination = checked_output(None, Path(output), overwrite)
    model = model if isinstance(model, PerturbationModel) else PerturbationModel.load(model)
    asked = read_conditions(model, perturbations)
    cells = len(model.control)
    names: list[str] = model.settings["control_cells"]
    obs = pd.DataFrame(
        {
            "perturbation": np.repeat([name_of(each) for each in asked], cells),
            "control_cell": np.tile(names, len(asked)),
        },
        index=[f"{name}|{name_of(each)}" for each in asked for name in names],
    )
    shape = (len(obs), len(model.genes))
    with (
        new_h5ad(destination, obs, model.genes, overwrite) as root,
        progress_bar(len(asked), unit="perturbation", desc="predict", disable=not progress) as bar,
    ):
        if "X" in root:
            del root["X"]
        arrays = [root.create_dataset(name, shape=shape, dtype=np.float32) for name in ("X", "layers/change")]
        for array in arrays:
            array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for number, each in enumerate(asked):
            change = model.in_cells(each)
            own = slice(number * cells, (number + 1) * cells)
            arrays[0][own], arrays[1][own] = np.maximum(model.control + change, 0.0), change
            root.check()
            bar.update()
    return asked


def read_conditions(model: PerturbationModel, perturbations: Sequence[str]) -> list[Perturbation]:
    """The perturbations that labels name. Raises ValueError as predict."""
    if not perturbations:
        raise ValueError("perturbations: expected at least one, such as A or A+B, got none")
    control = model.settings["control"]
    found = [genes_of(label.strip(), model.known_names, control) for label in perturbations]
    for label, each in zip(perturbations, found, strict=True):
        if not each:
            raise ValueError(f"perturbations: expected genes that are perturbed, got {label!r}, the control")
    twice = sorted({name_of(each) for each in found if found.count(each) > 1})
    if twice:
        raise ValueError(f"perturbations: expected each once, got {listed(twice)} more often")
    unknown = model.unknown(perturbed_genes(found))
    if unknown:
        raise ValueError(
            f"perturbations: nothing is known of {listed(unknown)}: not perturbed in the screen that the model was "
            "fitted to, not a gene of its checkpoint, and without neighbours in its graph; leave these out, or fit "
            "with a checkpoint or a graph (--graph) that has them"
        )
    return found


def _numbers(reading: dict[str, Any]) -> dict[str, Any]:
    """The options of reading that say what the numbers are."""
    return {name: value for name, value in reading.items() if name not in ("layer", "gene_symbols")}


def _chosen_genes(screen: Screen, variances: Array, most: int) -> Array:
    """Positions of the genes that are predicted, ascending."""
    perturbed = np.isin(screen.genes, perturbed_genes(screen.perturbations))
    return np.sort(np.lexsort((-variances, ~perturbed))[:most])


def _embedded(
    screen: Screen,
    cells: ModelCells,
    network: XTrimoGeneNetwork,
    genes: Array,
    most: int,
    seed: int,
    work: WorkFolder,
    device: torch.device,
    progress: bool,
) -> tuple[dict[str, Tensor], list[str]]:
    """Control cells, each a row: their values, the embeddings of measured genes in them, and mean embeddings of all
    genes of the vocabulary over them; and the names of the cells. They are computed once, and kept."""
    found = work.load(_CONTROL)
    if found is not None:
        return found[0], found[1]["names"]
    ids = cells.column_map.gene_ids
    id_of = {name: int(ids[column]) for column, name in reversed(list(enumerate(screen.source.var_names)))}
    known = np.array([number for number, gene in enumerate(genes) if id_of[screen.genes[gene]] >= 0], np.int64)
    asked = torch.tensor([id_of[screen.genes[gene]] for gene in genes[known]], dtype=torch.long)
    order = np.random.default_rng((seed, 2)).permutation(screen.rows_of(CONTROL))
    kept: list[int] = []
    rows: list[Tensor] = []
    total = torch.zeros(len(network.vocabulary), network.config.decoder_dim, dtype=torch.float64)
    most = min(most, len(order))
    with (
        prepared(network, device, torch.float32) as ready,
        torch.inference_mode(),
        progress_bar(most, unit="cell", desc="embed control cells", disable=not progress) as bar,
    ):
        for start in range(0, len(order), _DECODED_TOGETHER):
            if len(kept) >= most:
                break
            # A cell without a gene of the vocabulary has no embeddings; another one is taken.
            numbers = order[start : start + _DECODED_TOGETHER].tolist()
            pieces = [cells.pack(screen.source.read_rows(number, number + 1), first_row=number) for number in numbers]
            full = [(number, piece) for number, piece in zip(numbers, pieces, strict=True) if piece.total_nnz]
            full = full[: most - len(kept)]
            if not full:
                continue
            batch = joined([piece for _, piece in full]).to(device)
            decoded = ready.decoder.normed(ready.decode(batch)).unflatten(0, (len(full), -1))
            decoded = decoded[:, : len(network.vocabulary)].float().cpu()
            cells.check_finite(decoded.numpy(), batch.lengths.cpu().numpy(), [number for number, _ in full])
            kept += [number for number, _ in full]
            rows.append(decoded[:, asked].half())
            total += decoded.double().sum(0)
            bar.update(len(full))
    if not kept:
        raise ValueError(
            f"{screen.source.name}: none of the {len(order):,} control cells expresses a gene of the checkpoint; take "
            "a checkpoint that knows the genes of the screen"
        )
    if len(kept) < most:
        warnings.warn(
            f"{screen.source.name}: {len(kept):,} of {len(order):,} control cells express a gene of the checkpoint; "
            "the others are not embedded",
            stacklevel=3,
        )
    by_row = np.argsort(kept)
    tensors = {
        "control_values": torch.from_numpy(screen.dense(np.sort(kept), genes)),
        "control_rows": torch.cat(rows)[torch.from_numpy(by_row)],
        "row_genes": torch.from_numpy(known),
        "vocabulary_rows": (total / len(kept)).half(),
    }
    names = [screen.source.cell_name(kept[number]) for number in by_row.tolist()]
    work.save(_CONTROL, tensors, {"names": names})
    return tensors, names


def _coexpression(screen: Screen, parts: Parts, genes: Array, seed: int) -> tuple[Array, Tensor]:
    """(G, G) correlations of neighbouring genes and (G, rank) their principal components, over control cells and those
    that are trained on."""
    rows = np.flatnonzero(np.isin(screen.condition, [CONTROL, *parts.fitted]))
    rows = np.sort(np.random.default_rng((seed, 3)).permutation(rows)[:_GRAPH_CELLS])
    values = screen.dense(rows, genes)
    centred = values - values.mean(0)
    # Of the genes: what each adds to the leading components of cells.
    _, strengths, axes = np.linalg.svd(centred, full_matrices=False)
    components = (strengths[:RANK, None] * axes[:RANK]).T / np.sqrt(len(rows))
    return nearest(correlations(values), len(rows)), torch.from_numpy(np.ascontiguousarray(components, np.float32))


def _linked(graph: Graph, trained: Sequence[str]) -> Graph:
    """The links of a graph that lead to genes that are perturbed in training."""
    names = set(trained)
    linked = {gene: {name: weight for name, weight in own.items() if name in names} for gene, own in graph.items()}
    return {gene: own for gene, own in sorted(linked.items()) if own}


def _told(
    inputs: Inputs, perturbations: Sequence[Perturbation], trained: Sequence[str], graph: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """What the report says of genes and graphs."""
    perturbed = perturbed_genes(perturbations)
    known = [gene for gene, gene_id in zip(perturbed, inputs.gene_ids(perturbed), strict=True) if gene_id >= 0]
    source = "co-expression in the training cells" if graph is None else Path(graph).name
    linked = sum(gene in inputs.graph for gene in perturbed)
    return {
        "genes": {
            "measured": len(inputs.genes),
            "measured, known": inputs.num_known,
            "perturbed": len(perturbed),
            "perturbed, known": len(known),
        },
        "graph": f"{source}, with neighbours for {linked:,} of {len(perturbed):,} perturbed genes",
        "unknown": [gene for gene in perturbed if gene not in known and gene not in inputs.graph],
    }


def _digest(*parts: Any) -> str:
    """Of arrays, tensors, and what has a repr."""
    digest = hashlib.sha256()
    for part in parts:
        array = part.detach().cpu().numpy() if isinstance(part, Tensor) else part
        digest.update(np.ascontiguousarray(array).tobytes() if isinstance(array, np.ndarray) else repr(array).encode())
    return digest.hexdigest()[:16]


def _card(report: PerturbationReport) -> str:
    return (
        "# Perturbation effects\n\nA model of `xtrimogene perturb`: the change of every measured gene of a control "
        f"cell when genes are perturbed.\n\n```text\n{report}\n```\n\nIt holds {report.genes['measured']:,} genes of "
        "the screen in some of its control cells: mind the licence of the screen.\n"
    )
