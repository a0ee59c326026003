"""`xtrimogene bench`: FLOPs, time and memory against dense and padded Transformers, as one report.

The front of this package: it measures and counts on the cells of the project or of a file, and writes report.html,
report.md, results.csv and the pictures into a folder.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from xtg_kernels.info import info
from xtrimogene import document
from xtrimogene.bench import (
    costs,
    counting,
    dropin,
    duration,
    figures,
    memory,
    report,
    sizes,
    steps,
    timings,
)
from xtrimogene.bench.cells import Cells, cells_of_file, known_cells
from xtrimogene.bench.costs import SIZES
from xtrimogene.bench.rows import Row, machine, write_csv
from xtrimogene.bench.tasks import BOTH
from xtrimogene.network.devices import choose_device
from xtrimogene.network.vocabulary import Vocabulary

TITLE = "What ragged attention over expressed genes saves"


class WrongNumbers(RuntimeError):
    """A way that was measured or counted is not right."""


def bench(
    output: str | Path,
    *,
    input: str | Path | None = None,
    vocabulary: Vocabulary | None = None,
    layer: str | None = None,
    gene_symbols: str | None = None,
    preset: str = SIZES[0],
    device: str = "cpu",
    quick: bool = False,
    progress: bool = True,
) -> report.Report:
    """Measure, and write the report into the folder ``output``.

    input, vocabulary, layer, gene_symbols   cells of a file instead of the project's, see cells_of_file
    preset    the size that is measured, or "all"; FLOPs are those of all sizes
    device    "cpu" or "cuda"
    quick     small shapes and few runs: does it work, not how fast
    progress  print how long it is expected to take, then a line for every measured row

    Raises ValueError for a file, preset or device that cannot be, ImportError without matplotlib, and WrongNumbers
    where a way gave them, after the report, which leaves it out, is written.
    """
    if preset not in (*SIZES, "all"):
        raise ValueError(f"preset: expected one of {', '.join(SIZES)}, or all, got {preset!r}")
    kind = choose_device(device).type
    figures.check_matplotlib()
    started = time.perf_counter()
    cells = known_cells() if input is None else cells_of_file(
        input, vocabulary=vocabulary, layer=layer, gene_symbols=gene_symbols
    )  # fmt: skip
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    presets = SIZES if preset == "all" else (preset,)
    size = sizes.QUICK if quick else sizes.FULL
    expected = "not known on a GPU"
    if kind == "cpu":
        expected = duration.in_words(duration.expected_seconds(presets, quick=quick, rate=duration.product_rate()))
    if progress:
        print(f"expected to take about {expected}" if kind == "cpu" else f"how long it takes is {expected}", flush=True)
    where = {**machine(), "gpus": ", ".join(info()["gpus"]) if kind == "cuda" else ""}
    rows: list[Row] = []
    for row in _rows(presets, cells, size, kind):
        rows.append({**row, "quick": quick, **where})
        if progress:
            _tell(row)
    write_csv(folder / "results.csv", rows)
    found = info()
    described = {
        **where, "system": platform.platform(), "python": found["python"], "numpy": found["numpy"],
        "transformers": _version("transformers"), "xtrimogene": found["xtg_kernels"],
        "expected": expected, "seconds": f"{time.perf_counter() - started:.0f}",
    }  # fmt: skip
    made = write(report.Report(rows, {}, described, cells.source, cells.num_genes, size, quick), cells, folder)
    wrong = [row for row in rows if not row["correct"]]
    if wrong:
        cases = "; ".join(f"{row['benchmark']}, {row['case']}, {row['provider']}" for row in wrong)
        raise WrongNumbers(f"{folder / 'results.csv'}: wrong numbers, which got no time: {cases}")
    return made


def write(measured: report.Report, cells: Cells, folder: Path) -> report.Report:
    """The pictures and documents of what was measured on the cells; the report with the names of its pictures."""
    made = dataclasses.replace(measured, pictures=figures.draw(measured, cells, folder))
    sections = report.sections(made)
    (folder / "report.md").write_text(document.markdown(sections, TITLE), encoding="utf-8")
    (folder / "report.html").write_text(document.page(sections, TITLE, folder), encoding="utf-8")
    return made


def _rows(presets: tuple[str, ...], cells: Cells, size: sizes.Size, device: str) -> Iterator[Row]:
    yield from costs.flop_rows(SIZES, cells)
    yield from counting.counted_rows(SIZES, cells)
    # The 13,000 ops of a step of the largest one are counted for half a minute.
    yield from counting.savings_rows(SIZES[0] if size.shorter > 1 else SIZES[-1])
    full_length: dict[tuple[str, str], float] = {}
    wrong = set()
    for row in timings.encoder(presets, cells, size, device):
        if not row["correct"]:
            wrong.add((row["preset"], row["provider"]))
        yield row
    for row in timings.full_length(presets, cells, size, device):
        if row["correct"] and (row["benchmark"], row["dtype"], row["direction"]) == ("dense", "float32", BOTH):
            full_length[row["preset"], row["provider"]] = row["median_ms"] / 1e3
        yield row
    yield from memory.memory(presets, cells, size, device, full_length, wrong)
    yield from steps.step(presets, cells, size, device)
    yield from timings.by_length(presets[0], size, device)
    yield from timings.by_unevenness(presets[0], size, device)
    if device == "cpu":
        yield from timings.by_threads(presets[0], cells, size)
    yield from dropin.dropin(cells, size, device)


def _tell(row: Row) -> None:
    for column, unit in (("median_ms", "ms"), ("peak_mib", "MiB")):
        if column in row:
            shown = (row["benchmark"], row["case"], row["dtype"], row["direction"], row["provider"])
            mark = " (extrapolated)" if row.get("extrapolated") else ""
            print(f"{', '.join(shown)}: {row[column]:,.4g} {unit}{mark}", flush=True)


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
