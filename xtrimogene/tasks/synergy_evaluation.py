"""Judges a model of drug pairs by pairs it was not fitted to, and its way of learning in folds, beside other ways."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xtrimogene.inference.shards import model_fingerprint
from xtrimogene.network.devices import choose_device
from xtrimogene.tasks import synergy_report
from xtrimogene.tasks.molecules import maccs_keys
from xtrimogene.tasks.report import check_output
from xtrimogene.tasks.splits import need
from xtrimogene.tasks.synergy import digest_of, read_pairs
from xtrimogene.tasks.synergy_baselines import Guess, guesses, judge
from xtrimogene.tasks.synergy_lines import OURS, RAW, VERSIONS, vectors
from xtrimogene.tasks.synergy_model import TASK, TEST, SynergyModel, check_packages
from xtrimogene.tasks.synergy_report import NETWORK, Compared, SynergyEvaluation
from xtrimogene.tasks.synergy_training import Examples, Schedule, fit_network, predicted
from xtrimogene.tasks.synergy_triples import (
    BETWEEN,
    KINDS,
    Folds,
    Mask,
    Measured,
    Target,
    folds_of,
    validation_of,
)
from xtrimogene.tasks.work import WorkFolder

Array = npt.NDArray[Any]
NO_SPLIT = "none"


def evaluate(
    model: SynergyModel | str | os.PathLike[str],
    pairs: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    splits: Sequence[str] = KINDS,
    smiles: str | os.PathLike[str] | None = None,
    cell_lines: str | os.PathLike[str] | None = None,
    columns: Sequence[str] | None = None,
    target: str | None = None,
    synergy_above: float | None = None,
    antagonism_below: float | None = None,
    fold_column: str | None = None,
    folds: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> SynergyEvaluation:
    """Judge a model by measured pairs that it was not fitted to, and its way of learning in folds of them.

    In each fold of each split the network is fitted anew, as the model was, and beside it the same network with the raw
    expression of the lines, with the embedding of another line, and with that of an untrained encoder, all as wide; and
    one-hot linear models, one-hot boosting and a forest on fingerprints, see synergy_baselines.guesses. What a fold
    tests has no part in any fit, and not in when it stops.

    Args:
        model: a model or its folder.
        pairs: measured pairs, as for fit: those that it was fitted to, or others.
        output: folder for report.html, report.md, report.json and pictures; None for none.
        splits: "pair", "line", "drug", or the path of a table with a column fold; "none" alone: the model itself only.
        smiles, cell_lines: tables of drugs and lines that the model does not have.
        columns, target, synergy_above, antagonism_below, fold_column, folds: as for fit, None for what the fit had.
            fold_column is of one split, which is then the only one.
        resume: go on with an interrupted evaluation of the same data and options; it needs an output.
        overwrite: replace an earlier report.

    Raises ValueError, OSError: what is wrong with tables or options, in a line, before the work.
    """
    check_packages()
    if fold_column is not None and len(splits) != 1:
        raise ValueError(
            f"fold_column: expected one split that its folds are for, got {', '.join(splits)}; name one (--splits)"
        )
    work = None
    if output is not None:
        need("matplotlib", "the report", TASK)
        check_output(Path(output), overwrite)
        work = WorkFolder(Path(os.path.realpath(output)), resume, overwrite)
        work.check_unfinished()
    model = model if isinstance(model, SynergyModel) else SynergyModel.load(model)
    torch_device = choose_device(device)
    table = read_pairs(model, pairs, columns)
    model = model.extended(table, smiles, cell_lines, torch_device)
    asked = model.settings["asked"]
    learned = Target.found(
        table.table,
        asked["target"] if target is None else target,
        model.target.above if synergy_above is None else synergy_above,
        model.target.below if antagonism_below is None else antagonism_below,
    )
    measured = Measured.of(table, model.drugs, model.lines, learned)
    found = {split: _folds(split, measured, model, asked, fold_column, folds) for split in splits if split != NO_SPLIT}
    codes = measured.triples.codes
    known = set(map(tuple, model.fitted.tolist()))
    new = np.array([tuple(code) not in known for code in codes.tolist()])
    if not found and not new.any():
        raise ValueError(
            f"{table.table.name}: expected triples that the model was not fitted to, got none among {len(codes):,}; "
            "give others, or splits to fit it anew in (--splits)"
        )
    identity = {
        "model": model_fingerprint(model.network)[:16],
        "drugs and lines": digest_of(*model.known.values(), model.drugs.content),
        "pairs": digest_of(codes, measured.values, measured.classes),
        "folds": digest_of(*(each.test for each in found.values())),
        "splits": list(found),
        "schedule": model.settings["schedule"],
    }
    own, counts, truth = _of_the_model(model, measured, new)
    with contextlib.nullcontext() if work is None else work.open(identity):
        compared = _compared(model, measured, found, torch_device, work, progress)
        evaluation = SynergyEvaluation(str(learned), compared, own, counts, len(model.fitted), measured.told, truth)
        if output is not None:  # before what the folds have given is gone
            synergy_report.write(evaluation, Path(output))
    return evaluation


def _folds(
    split: str,
    measured: Measured,
    model: SynergyModel,
    asked: dict[str, Any],
    fold_column: str | None,
    count: int | None,
) -> Folds:
    # The fit's own column is for the split of the fit, where this table has it.
    own = asked["fold_column"] if split == asked["split"] else None
    column = own if own in measured.pairs.table.header else None
    return folds_of(
        split,
        measured,
        model.drugs,
        model.lines,
        fold_column=column if fold_column is None else fold_column,
        count=asked["folds"] if count is None else count,
        seed=model.settings["schedule"]["seed"],
    )


def _of_the_model(
    model: SynergyModel, measured: Measured, new: Mask
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, int], tuple[Array, Array] | None]:
    """Figures of the model itself, and of ways that are fitted to the same triples, by what is unseen; the numbers of
    triples; true and predicted scores, None where none are learned."""
    scores = measured.scores if model.target.scored else None
    if not new.any():
        return {}, {}, None
    fitted = model.parts != TEST
    both = np.concatenate([model.codes[fitted], measured.triples.codes[new]])
    train = np.arange(len(both)) < fitted.sum()
    values = np.concatenate([model.scores[fitted], measured.values[new]])
    classes = np.concatenate([model.classes[fitted], measured.classes[new]])
    seed = model.settings["schedule"]["seed"]
    lines = vectors(RAW, model.known, np.unique(model.fitted[:, 2]), seed).numpy()
    found = guesses(
        both,
        values if scores is not None else None,
        classes,
        train,
        ~train,
        maccs_keys(model.drugs.smiles),
        lines,
        seed,
    )
    own = model.predict(measured.triples.codes[new])
    all_ways = {NETWORK[OURS]: Guess(own[0] if scores is not None else None, own[1]), **found}
    kinds = np.array(model.unseen(measured.triples.codes[new]), object)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    counts: dict[str, int] = {}
    for kind in sorted(set(kinds.tolist())):
        part = kinds == kind
        counts[kind] = int(part.sum())
        figures[kind] = {
            name: judge(
                Guess(None if guess.scores is None else guess.scores[part], guess.probabilities[part]),
                None if scores is None else scores[new][part],
                measured.classes[new][part],
            )
            for name, guess in all_ways.items()
        }
    return figures, counts, None if scores is None else (scores[new], own[0])


def _compared(
    model: SynergyModel,
    measured: Measured,
    found: Mapping[str, Folds],
    device: torch.device,
    work: WorkFolder | None,
    progress: bool,
) -> dict[str, Compared]:
    if not found:
        return {}
    folds = _Fits(model, measured, device, work, progress)
    return {
        split: Compared(
            each.kind,
            each.told,
            [(int(test.sum()), int((test & (measured.classes != BETWEEN)).sum())) for test in each.test],
            folds.figures(each, f"split{number}", split if split in KINDS else Path(split).name),
        )
        for number, (split, each) in enumerate(found.items())
    }


class _Fits:
    """Fits and judges all ways in the folds of splits; what is predicted in a fold is kept until all are done."""

    def __init__(
        self, model: SynergyModel, measured: Measured, device: torch.device, work: WorkFolder | None, progress: bool
    ) -> None:
        self.model, self.measured, self.device, self.work, self.progress = model, measured, device, work, progress
        self.schedule = Schedule(**model.settings["schedule"])
        self.codes = measured.triples.codes
        self.graphs, self.keys = model.graphs, maccs_keys(model.drugs.smiles)

    def figures(self, folds: Folds, name: str, called: str) -> dict[str, dict[str, list[float]]]:
        """Guess -> metric -> a number for each fold."""
        found: dict[str, dict[str, list[float]]] = {}
        count = len(folds.test)
        for fold, (train, test) in enumerate(zip(folds.train, folds.test, strict=True)):
            desc = f"{called}, fold {fold + 1} of {count}"
            for guess, each in self._guesses(folds.kind, train, test, f"{name}_{fold}", desc).items():
                scores = None if self.measured.scores is None else self.measured.scores[test]
                for metric, value in judge(each, scores, self.measured.classes[test]).items():
                    found.setdefault(guess, {}).setdefault(metric, []).append(value)
        return found

    def _guesses(self, kind: str, train: Mask, test: Mask, name: str, desc: str) -> dict[str, Guess]:
        kept = None if self.work is None else self.work.load(name)
        if kept is not None:
            return {
                guess: Guess(kept[0][f"scores.{guess}"].numpy() if scored else None, kept[0][guess].numpy())
                for guess, scored in kept[1].items()
            }
        measured, seed = self.measured, self.schedule.seed
        learned, validation = validation_of(kind, self.codes, train, seed)
        found = {}
        for version in VERSIONS:
            rows = vectors(version, self.model.known, np.unique(self.codes[learned, 2]), seed)
            module, _ = fit_network(
                Examples(self.codes, measured.scores, measured.classes, self.graphs, rows),
                learned,
                validation,
                self.schedule,
                device=self.device,
                work=self.work,
                progress=self.progress,
                name=f"{name}_{version}",
                desc=f"{desc}, {version}",
            )
            scores, probabilities = predicted(module, self.graphs, rows, self.codes[test])
            found[NETWORK[version]] = Guess(None if measured.scores is None else scores, probabilities)
        lines = vectors(RAW, self.model.known, np.unique(self.codes[train, 2]), seed).numpy()
        found |= guesses(self.codes, measured.scores, measured.classes, train, test, self.keys, lines, seed)
        if self.work is not None:
            tensors = {guess: torch.from_numpy(each.probabilities) for guess, each in found.items()}
            tensors |= {
                f"scores.{guess}": torch.from_numpy(each.scores)
                for guess, each in found.items()
                if each.scores is not None
            }
            self.work.save(name, tensors, {guess: each.scores is not None for guess, each in found.items()})
        return found
