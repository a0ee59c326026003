"""Names cell types and judges the models: python examples/annotation/run.py DATA [--parts ...] [--seeds ...]

DATA is a folder with zheng_pbmc_facs.h5ad (BSD-2-Clause) and scp1884_gut_1020cells.h5ad (Apache-2.0): raw counts, cell
types in obs["celltype"]. Parts: "zheng", a fifth of the cells of each type held out; "gut", 68 types, donors by the
prefix of the barcodes, a fifth of them held out; "few", 5 to 50 cells of each type of zheng. Each part writes its
figures into results.json as they come, from where they are taken when it is run again with the same checkpoint;
results.md, the reports and the picture are made anew from it. Models lie in OUTPUT/work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from xtrimogene.document import markdown_table
from xtrimogene.inference.model_cells import opened
from xtrimogene.inference.shards import model_fingerprint
from xtrimogene.tasks.annotation import evaluate, fit
from xtrimogene.tasks.annotation_report import OURS, UNTRAINED
from xtrimogene.tasks.report import draw, shown

HERE = Path(__file__).parent
LABEL = "celltype"
FEW = (5, 10, 20, 50)
WAYS = (OURS, UNTRAINED, "logistic regression, L2", "logistic regression, L1")
Rows = npt.NDArray[np.int64]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts that have no figures yet, and writes all that is shown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder with the two files")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--checkpoint", default="pbmc-tiny")
    parser.add_argument("--parts", nargs="+", default=["zheng", "gut", "few"], choices=("zheng", "gut", "few"))
    parser.add_argument("--tunes", nargs="+", default=["head", "published", "all"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="most epochs, of all but head")
    options = parser.parse_args(arguments)
    results = options.output / "results.json"
    stored = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    checkpoint = model_fingerprint(opened(options.checkpoint))[:16]
    # Figures of another checkpoint are none of this one.
    known: dict[str, Any] = stored["runs"] if stored.get("checkpoint") == checkpoint else {}

    def measured(name: str, run: Callable[[], dict[str, Any]]) -> None:
        if name not in known:
            known[name] = run()
            made = {"checkpoint": checkpoint, "runs": known}
            results.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")

    for part in options.parts:
        for seed in options.seeds:
            for tune in options.tunes:
                for count in FEW if part == "few" else (None,):
                    name = f"{part}, {tune}, seed {seed}" + ("" if count is None else f", {count} cells a type")
                    measured(name, lambda p=part, s=seed, t=tune, c=count: _run(options, checkpoint, p, s, t, c))  # type: ignore[misc]
    (options.output / "results.md").write_text(text(known), encoding="utf-8")
    if any(name.startswith("few") for name in known):
        draw(options.output, {"few_shot": lambda figure: _draw_few(figure, known)})


def _run(
    options: argparse.Namespace, checkpoint: str, part: str, seed: int, tune: str, count: int | None
) -> dict[str, Any]:
    """One model fitted and judged; its report, for the first seed of whole parts, goes into the output too."""
    work = options.output / "work" / checkpoint / f"{part}-{tune}-{seed}{'' if count is None else f'-{count}'}"
    work.mkdir(parents=True, exist_ok=True)
    cells, train, test = _split(options.data, part, seed)
    if count is not None:
        train = _few(cells, train, count, seed)
    for name, rows in (("train", train), ("test", test)):
        cells[rows].copy().write_h5ad(work / f"{name}.h5ad")
    reading: dict[str, Any] = {"gene_symbols": "symbol" if part != "gut" else None}
    began = time.process_time()
    epochs = None if tune == "head" else options.epochs
    report = fit(
        work / "train.h5ad", options.checkpoint, LABEL, work / "model", group="donor" if part == "gut" else None,
        tune=tune, seed=seed, epochs=epochs, resume=True, overwrite=True, **reading,
    )  # fmt: skip
    seconds = time.process_time() - began
    evaluation = evaluate(work / "model", work / "test.h5ad", LABEL, output=work / "report", overwrite=True, **reading)
    if seed == options.seeds[0] and count is None:
        target = options.output / f"{part}_{tune}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for file in ("report.md", "methods.png", "confusion.png", "reliability.png"):
            shutil.copy(work / "report" / file, target / file)
    return {
        "methods": evaluation.methods,
        "calibration_error": evaluation.calibration_error,
        "training": report.cells["training"],
        "test": evaluation.cells,
        "types": len(report.types),
        "genes_read": report.genes_found,
        "genes_measured": (evaluation.compared or {})["genes"],
        "epochs": report.epochs,
        "best_epoch": report.best_epoch,
        "cpu_seconds": round(seconds),
    }


def _split(folder: Path, part: str, seed: int) -> tuple[anndata.AnnData, Rows, Rows]:
    """Cells, and the rows to train on and to judge by."""
    if part != "gut":
        cells = anndata.read_h5ad(folder / "zheng_pbmc_facs.h5ad")
        train, test = train_test_split(
            np.arange(cells.n_obs), test_size=0.2, stratify=cells.obs[LABEL].astype(str), random_state=seed
        )
        return cells, np.sort(train), np.sort(test)
    cells = anndata.read_h5ad(folder / "scp1884_gut_1020cells.h5ad")
    # The columns of obs do not belong to the cells; the barcodes name the donor, after a letter for healthy, inflamed
    # and not inflamed: N134300_E-GAAGCC... and I134300_L-CCTTAC... are of donor 134300.
    cells.obs["donor"] = cells.obs_names.str.extract(r"^[A-Z]+(\d+)", expand=False).to_numpy()
    types = cells.obs[LABEL].astype(str).to_numpy()
    donors = cells.obs["donor"].to_numpy()
    # The first split whose training donors have every type at least twice, from two donors.
    for attempt in range(1000):
        splitter = GroupShuffleSplit(1, test_size=0.2, random_state=1000 * seed + attempt)
        train, test = next(splitter.split(types, groups=donors))
        pairs = {(kind, donor) for kind, donor in zip(types[train], donors[train], strict=True)}
        counts = [sum(kind == each for each, _ in pairs) for kind in np.unique(types)]
        if min(counts) >= 2:
            return cells, train, test
    raise ValueError("gut: no split of the donors leaves every type in two of those to train on")


def _few(cells: anndata.AnnData, train: Rows, count: int, seed: int) -> Rows:
    """At most so many of the training rows of each type."""
    rng = np.random.default_rng((seed, count))
    types = cells.obs[LABEL].astype(str).to_numpy()[train]
    return np.sort(np.concatenate([rng.permutation(train[types == kind])[:count] for kind in np.unique(types)]))


def text(known: dict[str, Any]) -> str:
    """The figures as Markdown: means over the seeds, with the spread where there are several."""
    lines = [verdict(known), "", "<!-- figures -->", ""]
    for part, title in (("zheng", "Sorted blood cells, 10 types"), ("gut", "Gut, 68 types of 15 cells, by donor")):
        runs = {name: each for name, each in known.items() if name.startswith(f"{part}, ")}
        if not runs:
            continue
        seeds = sorted({name.partition("seed ")[2] for name in runs})
        tunes = list(dict.fromkeys(name.split(", ")[1] for name in runs))
        rows = []
        for tune in tunes:
            of = [each for name, each in runs.items() if name.split(", ")[1] == tune]
            seconds = np.mean([each["cpu_seconds"] for each in of])
            rows.append([f"tuned `{tune}`", *_figures(of, OURS), f"{seconds:,.0f}"])
            rows.append([f"untrained, tuned `{tune}`", *_figures(of, WAYS[1]), ""])
        of = list(runs.values())
        others = [name for name in of[0]["methods"] if not name.startswith(OURS) and name != WAYS[1]]
        rows += [[name, *_figures(of, name), ""] for name in others]
        first = of[0]
        lines += [
            f"### {title}",
            "",
            f"{first['training']:,} training cells, {first['test']:,} held out; seeds {', '.join(seeds)}. CPU seconds "
            "are those of the fit.",
            "",
            markdown_table(["way", "macro-F1", "accuracy", "CPU seconds"], rows),
            "",
        ]
    if any(name.startswith("few") for name in known):
        lines += ["### Few cells of each type", "", "Macro-F1 on the held-out blood cells.", "", _few_table(known), ""]
    return "\n".join(lines)


def verdict(known: dict[str, Any]) -> str:
    """How the best model stands beside the best regression, in each whole part, and why."""
    told = []
    for part, name in (("zheng", "sorted blood cells"), ("gut", "gut cells")):
        runs = [(key.split(", ")[1], each) for key, each in known.items() if key.startswith(f"{part}, ")]
        if not runs:
            continue
        ours_by: dict[str, list[float]] = {}
        others: dict[str, list[float]] = {}
        for tune, each in runs:
            ours_by.setdefault(tune, []).append(each["methods"][OURS]["macro_f1"])
            for way in WAYS[2:]:
                others.setdefault(way, []).append(each["methods"][way]["macro_f1"])
        best = max(ours_by, key=lambda tune: np.mean(ours_by[tune]))
        other = max(others, key=lambda way: np.mean(others[way]))
        mine, theirs = float(np.mean(ours_by[best])), float(np.mean(others[other]))
        if theirs > mine:
            told.append(
                f"On {name} a linear model wins: {other} has macro-F1 {theirs:.3f}, the best model here, tuned "
                f"`{best}`, {mine:.3f}. The regression weighs each of {runs[0][1]['genes_measured']:,} genes by "
                f"itself; the network knows {runs[0][1]['genes_read']:,} of them, and all that it passes on of a cell "
                "goes through two short vectors, which the linear layers have to read types off."
            )
        else:
            told.append(f"On {name} the model tuned `{best}` has macro-F1 {mine:.3f}, {other} {theirs:.3f}.")
    curves = _curves(known)
    if curves:
        counts = sorted({count for of in curves.values() for count in of})
        best_of = {
            count: max((curves[way][count], way) for way in curves if count in curves[way])[1] for count in counts
        }
        ahead = [str(count) for count in counts if best_of[count].startswith("pre-trained")]
        behind = [str(count) for count in counts if not best_of[count].startswith("pre-trained")]
        if ahead:
            told.append(
                f"With {', '.join(ahead)} blood cells of each type the pre-trained model has the highest macro-F1"
                + (f", with {', '.join(behind)} a regression." if behind else ".")
            )
    return " ".join(told)


def _figures(runs: list[dict[str, Any]], way: str) -> list[str]:
    found = []
    for key in ("macro_f1", "accuracy"):
        values = [each["methods"][way][key] for each in runs]
        spread = f" ± {np.std(values):.3f}" if len(values) > 1 else ""
        found.append(shown(float(np.mean(values))) + spread)
    return found


def _curves(known: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Way -> cells a type -> mean macro-F1."""
    found: dict[str, dict[int, list[float]]] = {}
    for name, run in known.items():
        if name.startswith("few, "):
            tune, count = name.split(", ")[1], int(name.split(", ")[3].split()[0])
            for way in WAYS:
                own = way in WAYS[:2]
                called = f"{'pre-trained' if way == OURS else 'untrained'}, tuned {tune}" if own else way
                found.setdefault(called, {}).setdefault(count, []).append(run["methods"][way]["macro_f1"])
    return {way: {count: float(np.mean(each)) for count, each in sorted(of.items())} for way, of in found.items()}


def _few_table(known: dict[str, Any]) -> str:
    curves = _curves(known)
    counts = sorted({count for of in curves.values() for count in of})
    body = [[way, *(shown(of.get(count)) for count in counts)] for way, of in curves.items()]
    return markdown_table(["way", *(f"{count} cells" for count in counts)], body)


def _draw_few(figure: Any, known: dict[str, Any]) -> None:
    figure.set_size_inches(6.4, 3.8)
    axes = figure.subplots()
    for way, of in _curves(known).items():
        axes.plot(list(of), list(of.values()), marker="o", label=way, ls="-" if "tuned" in way else "--")
    axes.set(xscale="log", xlabel="cells of each type", ylabel="macro-F1", ylim=(0, 1))
    axes.set_xticks(FEW, [str(count) for count in FEW])
    axes.minorticks_off()
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
