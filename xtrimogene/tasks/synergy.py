"""Drug pairs: how two drugs act together on a cell line, learned from measured pairs and from the line's embedding.

A network after DeepDDS takes the molecular graphs of both drugs and the cell line's embedding by a checkpoint's
encoder, and predicts a score and whether it is one of synergy or of antagonism. Which drug comes first makes no
difference.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xtrimogene.inference.gene_level import checked_output
from xtrimogene.inference.model_cells import opened
from xtrimogene.inference.shards import model_fingerprint
from xtrimogene.network.devices import choose_device
from xtrimogene.network.model import XTrimoGeneNetwork
from xtrimogene.tasks import folder
from xtrimogene.tasks.molecules import Graphs
from xtrimogene.tasks.synergy_lines import OURS, RAW, embedded, log_expression, vectors
from xtrimogene.tasks.synergy_model import TASK, TEST, TRAINING, VALIDATION, SynergyModel, check_packages
from xtrimogene.tasks.synergy_tables import Drugs, Expression, Pairs, Table
from xtrimogene.tasks.synergy_training import Examples, Schedule, fit_network
from xtrimogene.tasks.synergy_triples import ANTAGONISM, PAIR, SYNERGY, Measured, Target, folds_of, validation_of
from xtrimogene.tasks.work import WorkFolder
from xtrimogene.writing import written_beside

Array = npt.NDArray[Any]

# What predict adds to a table of pairs.
SCORE_COLUMN, PROBABILITY_COLUMN, UNSEEN_COLUMN = (
    f"xtrimogene_{name}" for name in ("score", "synergy_probability", "unseen")
)
NO_TEST = "none"
_LINES = "lines"


@dataclass(frozen=True)
class SynergyReport:
    """What a fit did.

    target   what is learned, in words
    drugs    molecules that are in the pairs
    lines    cell lines that are in the pairs
    triples  of each part: "training", "validation" and "test"; and those with a class, "synergy" and "antagonism"
    split    what is held out for the test, in words
    genes    in the table of expression, and how many of them the checkpoint knows: "genes", "known"
    told     what was done with salts, lines without expression, measurements of one triple
    epochs   epochs made, best_epoch the one whose weights are kept, loss its validation loss
    """

    output: str
    target: str
    drugs: int
    lines: int
    triples: dict[str, int]
    split: str
    genes: dict[str, int]
    told: list[str]
    epochs: int
    best_epoch: int
    loss: float

    def __str__(self) -> str:
        parts = ", ".join(f"{self.triples[name]:,} {name}" for name in ("training", "validation", "test"))
        kinds = ", ".join(f"{self.triples[name]:,} of {name}" for name in ("synergy", "antagonism"))
        return "\n".join(
            [
                f"{self.drugs:,} drugs, {self.lines:,} cell lines; triples: {parts}; {kinds}; learned: {self.target}",
                f"split: {self.split}",
                f"{self.genes['known']:,} genes of the checkpoint among the {self.genes['genes']:,} of the expression",
                *self.told,
                f"epoch {self.best_epoch:,} of {self.epochs:,}: validation loss {self.loss:.4f}",
            ]
        )

    @classmethod
    def of(cls, settings: dict[str, Any], output: str) -> SynergyReport:
        """From a model's settings."""
        return cls(output=output, **settings["report"])


def fit(
    checkpoint: XTrimoGeneNetwork | str | os.PathLike[str],
    pairs: str | os.PathLike[str],
    smiles: str | os.PathLike[str],
    cell_lines: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    target: str | None = None,
    synergy_above: float = 10.0,
    antagonism_below: float = 0.0,
    split: str = PAIR,
    fold_column: str | None = None,
    folds: int = 5,
    values: str = "tpm",
    aliases: str | os.PathLike[str] | None = None,
    target_depth: float | str | None = None,
    epochs: int = 30,
    patience: int = 10,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> SynergyReport:
    """Fit a network to measured pairs of drugs and write it as a folder.

    Rows of one pair on one line, in either order of the drugs, are measurements of one triple: their mean is learned.
    Rows of lines without expression are left out. Both are told.

    Args:
        checkpoint: the model whose embeddings of the cell lines are used, its folder or its name.
        pairs: table of text (commas, semicolons or tabs, plain or gzipped) with two drugs, a cell line and what was
            measured in a row.
        smiles: table with columns drug and smiles, of all drugs of the pairs. Of a SMILES of several parts the largest
            is kept, as of a salt, but of complexes of metals such as platinum all; names of one molecule are one drug.
        cell_lines: table of expression, genes in rows and lines in columns or the other way around.
        output: the folder to write.
        columns: of the pairs: one drug, the other, the line. None for the only ones that go by names such as drug_a,
            drug1, drug_row; cell_line, cell_line_name.
        target: column with scores, or with 0 and 1, which are classes then. "label": the column of that name, or else
            the classes of column loewe, and no scores. None: loewe, or else label.
        synergy_above, antagonism_below: a score above is synergy, one below antagonism; between them is no class.
        split: what is held out for the test, the first of several folds: "pair", "line", "drug"; "none" for nothing; or
            the path of a table of pairs with a column fold. Another such part is kept for validation.
        fold_column, folds: column of the pairs with the folds, and how many folds are made, see folds_of.
        values, aliases, target_depth: what the expression is and how it is embedded, as for embed.
        epochs, patience: most epochs, and most of them in turn without a better validation.
        seed: of folds that are made, of the validation part, and of the network.
        resume: go on with an interrupted fit of the same data and options.

    Raises:
        ValueError, OSError: what is wrong with tables or options, in a line, before the work.
        ImportError: RDKit, torch-geometric or scikit-learn is missing.
    """
    check_packages()
    for name, value in (("epochs", epochs), ("patience", patience)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    work = WorkFolder.checked(output, resume=resume, overwrite=overwrite)
    torch_device = choose_device(device)
    table = Pairs.read(pairs, columns)
    learned = Target.found(table.table, target, synergy_above, antagonism_below)
    drugs = Drugs()
    drugs.add(smiles, set(table.drugs.ravel().tolist()))
    expression = Expression.read(cell_lines, set(table.lines.tolist()))
    measured = Measured.of(table, drugs, expression.lines, learned)
    train, validation, told = _parts(split, measured, drugs, expression.lines, fold_column, folds, seed)
    network = opened(checkpoint)
    aliases = None if aliases is None else os.fspath(aliases)
    reading = {"values": values, "aliases": aliases, "target_depth": target_depth}
    identity = {
        "checkpoint": model_fingerprint(network)[:16],
        "pairs": digest_of(measured.triples.codes, measured.values, measured.classes),
        "drugs": digest_of(drugs.content),
        "cell lines": digest_of(expression.lines, expression.genes, expression.values),
        "target": dataclasses.asdict(learned),
        "parts": digest_of(train, validation),
        **reading,
        "epochs": epochs,
        "patience": patience,
        "seed": seed,
    }
    if work.is_over(identity):
        return SynergyReport.of(folder.load(output, TASK).settings, str(output))
    with work.open(identity):
        kept = work.load(_LINES)
        if kept is None:
            found, genes = embedded(expression, network, reading, seed, torch_device)
            work.save(_LINES, {name: torch.from_numpy(each) for name, each in found.items()}, genes)
        else:
            found, genes = {name: each.numpy() for name, each in kept[0].items()}, kept[1]
        codes = measured.triples.codes
        lines = vectors(OURS, found, np.unique(codes[train, 2]), seed)
        examples = Examples(codes, measured.scores, measured.classes, Graphs.of(drugs.smiles), lines)
        module, fitted = fit_network(
            examples,
            train,
            validation,
            Schedule(epochs, patience, seed),
            device=torch_device,
            work=work,
            progress=progress,
            name=OURS,
            desc="fit",
        )
        parts = np.where(train, TRAINING, np.where(validation, VALIDATION, TEST))
        counts = {name: int((parts == part).sum()) for name, part in _PARTS.items()}
        counts |= {
            name: int((measured.classes == code).sum())
            for name, code in (("synergy", SYNERGY), ("antagonism", ANTAGONISM))
        }
        report = SynergyReport(
            str(output), str(learned), len(np.unique(codes[:, :2])), len(np.unique(codes[:, 2])), counts, told, genes,
            measured.told, len(fitted.history), fitted.best_epoch, fitted.validation_loss,
        )  # fmt: skip
        settings: dict[str, Any] = {
            folder.IDENTITY: identity,
            "report": {name: value for name, value in dataclasses.asdict(report).items() if name != "output"},
            "reading": reading,
            "drugs": drugs.content,
            "molecules": drugs.names,
            "lines": expression.lines,
            "genes": expression.genes,
            "columns": None if columns is None else list(columns),
            "target": dataclasses.asdict(learned),
            "asked": {"target": target, "split": split, "fold_column": fold_column, "folds": folds},
            "schedule": {"epochs": epochs, "patience": patience, "seed": seed},
            "history": fitted.history,
        }
        tensors = {
            **{f"lines.{name}": torch.from_numpy(each) for name, each in found.items()},
            f"lines.{RAW}": torch.from_numpy(log_expression(expression, values)).half(),
            "codes": torch.from_numpy(codes).int(),
            "parts": torch.from_numpy(parts).to(torch.int8),
            "scores": torch.from_numpy(measured.values),
            "classes": torch.from_numpy(measured.classes).to(torch.int8),
            **{f"{OURS}.{name}": tensor for name, tensor in module.state_dict().items()},
        }
        folder.save(
            output, TASK, folder.TaskFolder(settings, tensors, network), card=_card(report), overwrite=overwrite
        )
    return report


_PARTS = {"training": TRAINING, "validation": VALIDATION, "test": TEST}


def _parts(
    split: str,
    measured: Measured,
    drugs: Drugs,
    lines: Sequence[str],
    fold_column: str | None,
    count: int,
    seed: int,
) -> tuple[Array, Array, str]:
    """(n,) what is trained on and what is kept for validation, and the split in words."""
    codes = measured.triples.codes
    if split == NO_TEST:
        train, validation = validation_of(PAIR, codes, np.ones(len(codes), bool), seed)
        return train, validation, "nothing is held out; whole pairs are kept for validation"
    found = folds_of(split, measured, drugs, lines, fold_column=fold_column, count=count, seed=seed)
    train, validation = validation_of(found.kind, codes, found.train[0], seed)
    return train, validation, f"{found.told}; the first is held out, and other {found.kind}s for validation"


def predict(
    model: SynergyModel | str | os.PathLike[str],
    pairs: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    smiles: str | os.PathLike[str] | None = None,
    cell_lines: str | os.PathLike[str] | None = None,
    columns: Sequence[str] | None = None,
    overwrite: bool = False,
    device: str | torch.device = "auto",
) -> dict[str, int]:
    """Write a table of pairs with what the model predicts of each row, as CSV.

    Added are xtrimogene_score, empty where only classes were learned; xtrimogene_synergy_probability, of synergy
    against antagonism; and xtrimogene_unseen, what of the row the model was not fitted to: pair, line, one drug, both
    drugs. A row and the same with its drugs the other way around get the same numbers.

    Args:
        smiles, cell_lines: tables as for fit, of drugs and lines that the model does not have.
        columns: as for fit; None for those of the fit, where the table has them.

    Returns the number of rows by what is unseen. Raises ValueError for drugs and lines of which nothing is known, by
    row.
    """
    check_packages()
    destination = checked_output(pairs, Path(output), overwrite, ".csv")
    model = model if isinstance(model, SynergyModel) else SynergyModel.load(model)
    table = read_pairs(model, pairs, columns)
    model = model.extended(table, smiles, cell_lines, choose_device(device))
    molecules = model.drugs.codes(table)
    place = {name: number for number, name in enumerate(model.lines)}
    rows = zip(table.table.rows, table.lines.tolist(), strict=True)
    table.table.refuse(
        [(number, repr(name)) for (number, _), name in rows if name not in place],
        "lines whose expression is known",
        "give their expression with cell_lines (--cell-lines), or take these rows out",
    )
    codes = np.column_stack([molecules, [place[name] for name in table.lines.tolist()]])
    scores, probabilities = model.predict(codes)
    unseen = model.unseen(codes)
    added = (SCORE_COLUMN, PROBABILITY_COLUMN, UNSEEN_COLUMN)
    kept = [number for number, name in enumerate(table.table.header) if name not in added]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(table.table.header[number] for number in kept), *added])
    for number, (_, row) in enumerate(table.table.rows):
        score = f"{scores[number]:.9g}" if model.target.scored else ""
        writer.writerow([*(row[each] for each in kept), score, f"{probabilities[number]:.9g}", unseen[number]])
    with written_beside(destination, overwrite) as written:
        written.write_text(text.getvalue(), encoding="utf-8")
    names, counts = np.unique(unseen, return_counts=True)
    return {str(name) or "nothing": int(count) for name, count in zip(names, counts, strict=True)}


def read_pairs(model: SynergyModel, pairs: str | os.PathLike[str], columns: Sequence[str] | None) -> Pairs:
    """A table of pairs, by the columns that are named, or that were in the fit and are there, or that are likely."""
    own = model.settings["columns"]
    if columns is None and own is not None and set(own) <= set(Table.read(pairs, "pairs").header):
        columns = own
    return Pairs.read(pairs, columns)


def digest_of(*parts: Any) -> str:
    """Of arrays, and of what has a repr."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:16]


def _card(report: SynergyReport) -> str:
    return (
        "# Drug pairs\n\nA model of `xtrimogene synergy`: the score of two drugs on a cell line, and whether it is one "
        f"of synergy.\n\n```text\n{report}\n```\n\nIt holds the scores that it was fitted to, the drugs' SMILES and "
        "the expression of the cell lines: mind the licences of these tables.\n"
    )
