"""What the report of `xtrimogene bench` says, made from the measured rows; xtrimogene.document writes it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xtrimogene.bench import costs
from xtrimogene.bench.sizes import Size
from xtrimogene.bench.tasks import BOTH, DTYPES, FORWARD
from xtrimogene.cells.masking import MaskingConfig
from xtrimogene.document import Picture, Section, Table, text_table

Row = dict[str, Any]
Parts = list[str | Table | Picture]
MODEL_NAMES = {
    "dense": "dense Transformer encoder",
    "dense auto-encoder": "dense auto-encoder",
    "performer": "full-length Performer",
    "padded": f"our encoder, padded batches of {costs.PADDED_BATCH}",
    "encoder": "our encoder (cell embedding)",
    "auto-encoder, plain": "our auto-encoder, as written down",
    "auto-encoder": "our auto-encoder, exact savings",
}
PART_NAMES = {"ffn": "FFN", "favor": "FAVOR"}
DIRECTION_NAMES = {FORWARD: "forward", BOTH: "forward + backward"}
WAY_NAMES = {"xtg": "ours", "plain": "packed plain PyTorch"}
DAGGER = "\N{DAGGER}"


@dataclass(frozen=True)
class Report:
    """What the report is made of: rows of all benchmarks, names of the pictures that there are, and where it ran."""

    rows: list[Row]
    pictures: dict[str, str]
    where: Row
    cells: str
    num_genes: int
    size: Size
    quick: bool

    def of(self, benchmark: str, **wanted: object) -> list[Row]:
        """Right rows of a benchmark with these values."""
        return [
            row
            for row in self.rows
            if row["benchmark"] == benchmark
            and row["correct"]
            and all(row.get(name) == value for name, value in wanted.items())
        ]

    def one(self, benchmark: str, **wanted: object) -> Row | None:
        """The first such row, if any."""
        return next(iter(self.of(benchmark, **wanted)), None)

    def known(self, benchmark: str, **wanted: object) -> Row:
        """The first such row, where there always is one."""
        return self.of(benchmark, **wanted)[0]

    def beside(self, row: Row, provider: str) -> Row | None:
        """The row of another provider of the same case, dtype and direction, if any."""
        same = {name: row[name] for name in ("case", "dtype", "direction")}
        return self.one(row["benchmark"], provider=provider, **same)

    def values(self, benchmark: str, column: str) -> list[Any]:
        """Distinct values of a column, in their order."""
        return list(dict.fromkeys(row[column] for row in self.of(benchmark) if column in row))

    def timed(self, benchmark: str, provider: str) -> list[Row]:
        """Rows of the directions that the report shows."""
        return [row for row in self.of(benchmark, provider=provider) if row["direction"] in DIRECTION_NAMES]


def sections(report: Report) -> list[Section]:
    """The document."""
    made = {
        "In short": _summary(report),
        "FLOPs per cell": _flops(report),
        "Time and memory": _time(report),
        "Scaling": _scaling(report),
        "Other models without padding": _dropin(report),
        "How it was measured": _how(report),
    }
    warning: Parts = [_quick_warning(report)] if report.quick else []
    measured = ("In short", "Time and memory", "Scaling", "Other models without padding")
    return [Section(title, [*(warning if title in measured else []), *parts]) for title, parts in made.items() if parts]


def _quick_warning(report: Report) -> str:
    """What stands above every table of a quick run that has a time in it."""
    return (
        "Quick run on small shapes: it shows that everything works, not how fast it is. A case named "
        f"\N{LEFT DOUBLE QUOTATION MARK}/ {report.size.shorter}\N{RIGHT DOUBLE QUOTATION MARK} has cells with so many "
        "times fewer genes."
    )


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the least-squares line through log x, log y."""
    xs, ys = zip(*points, strict=True)
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def full_seconds(report: Report, model: str, preset: str, dtype: str, direction: str) -> tuple[float, bool] | None:
    """Seconds of a full-length model for a cell with all genes, and whether they are extrapolated.

    None where measured cells were made shorter: a ratio to the whole of a dense cell would flatter.
    """
    if report.size.shorter > 1:
        return None
    row = report.one("dense", provider=model, preset=preset, dtype=dtype, direction=direction)
    return None if row is None else (row["median_ms"] / 1e3, bool(row.get("extrapolated")))


def per_cell(row: Row) -> tuple[float, float]:
    """GFLOP and milliseconds of a cell."""
    return row["gflops"] * row["median_ms"] / 1e3 / row["cells"], row["median_ms"] / row["cells"]


def summary_tables(report: Report) -> list[Table]:
    """The headline: what a cell costs, counted and where it was measured, beside all that one would run instead."""

    def gflop(provider: str, row: Row) -> float:
        return report.known("flops", provider=provider, case=row["case"])["gflop_per_cell"]

    def share(ours: str, other: str) -> Callable[[Row], str]:
        return lambda row: _percent(gflop(ours, row) / gflop(other, row))

    def times(ours: str, other: str) -> Callable[[Row], str]:
        return lambda row: _times(gflop(other, row) / gflop(ours, row))

    counted = Table.of(
        report.of("flops", provider="encoder"),
        {
            "FLOPs of a cell": lambda row: row["case"],
            "to embed it, of dense": share("encoder", "dense"),
            "dense": times("encoder", "dense"),
            f"padded, {costs.PADDED_BATCH} cells": times("encoder", "padded"),
            "packed plain PyTorch": times("encoder", "encoder"),
            "in pre-training, of dense": share("auto-encoder", "dense auto-encoder"),
            "dense auto-encoder": times("auto-encoder", "dense auto-encoder"),
            "as written down": times("auto-encoder", "auto-encoder, plain"),
        },
        "FLOPs in closed form, forward, mean over all cells, and how many times as many others take. Dense: encoder "
        "and auto-encoder of the same width and depth over all genes. Padded and packed plain PyTorch: what one would "
        "run instead. As written down: our auto-encoder without its exact savings.",
    )
    rows = report.of("encoder", provider="xtg", direction=FORWARD)
    lengths = {
        row["preset"]: f"{row['preset']}: {row['cells']:.0f}, with {row['tokens'] / row['cells']:,.0f} genes on average"
        for row in rows
    }
    timed = Table.of(
        rows,
        {
            "speed of the encoder": lambda row: f"{row['preset']}, {row['dtype']}",
            "cells/s": lambda row: _number(row["cells_per_second"]),
            "packed plain PyTorch": lambda row: _ratio(report.beside(row, "plain"), row),
            "padded": lambda row: _ratio(report.beside(row, "padded"), row),
            "dense": lambda row: _against_full(report, row, "dense"),
        },
        f"The encoder's layers, forward, on some of these cells ({'; '.join(lengths.values())}; their FLOPs differ "
        "from the mean), and how many times as long others take: ours by our kernels, the others by PyTorch's, so that "
        "the ratios are not those of the FLOPs. Padded: these few cells; empty where it was not run, as for one cell. "
        f"{DAGGER} the dense time is extrapolated.",
    )
    return [table for table in (counted, timed) if table.body]


def _summary(report: Report) -> Parts:
    intro = (
        "xTrimoGene runs a Transformer over the genes that a cell expresses instead of all genes of the vocabulary. "
        "This report says what that saves, in arithmetic, time and memory, on this machine."
    )
    return [intro, *summary_tables(report), _where(report)]


def _flops(report: Report) -> Parts:
    presets = report.values("flops", "case")

    def by_size(benchmark: str, column: str, digits: int) -> dict[str, Callable[[Any], str]]:
        """GFLOP and share of the dense encoder for each size, of the row that has in ``column`` what is asked."""

        def gflop(preset: str, asked: Any) -> str:
            return _number(report.known(benchmark, case=preset, **{column: asked})["gflop_per_cell"])

        def share(preset: str, asked: Any) -> str:
            return _percent(report.known(benchmark, case=preset, **{column: asked})["share_of_dense"], digits)

        units = {"GFLOP": gflop, "of dense": share}
        return {
            f"{preset}, {unit}": functools.partial(way, preset)
            for preset, (unit, way) in itertools.product(presets, units.items())
        }

    any_row, masking = report.of("flops")[0], MaskingConfig()
    main = Table.of(
        costs.MODELS, {"model": lambda model: MODEL_NAMES[model], **by_size("flops", "provider", 1)},
        f"Closed form (xtrimogene.flops), forward, mean over {any_row['cells']:,} cells with "
        f"{any_row['tokens'] / any_row['cells']:,.0f} expressed genes on average and {report.num_genes:,} genes in the "
        "vocabulary. FLOPs of matrix products, two for a multiply-add. The share is that of the dense encoder of the "
        "same width and depth; its embedding is left out, which favours it. The dense auto-encoder has a softmax "
        "decoder of our decoder's width and depth. Both of our auto-encoders are counted in pre-training: "
        f"{_percent(masking.nonzero_rate, 0)} of the expressed and {_percent(masking.zero_rate, 0)} of the other genes "
        f"are to be predicted, and {_percent(masking.mask_share, 0)} of these are hidden from the encoder, which costs "
        "less there than for an embedding. The savings are exact: nothing is approximated; they are shared by batches "
        f"of {costs.STEP_CELLS} cells.",
    )  # fmt: skip
    split = {PART_NAMES.get(part, part): functools.partial(_part, f"gflop_{part}") for part in costs.PARTS}
    by_part = Table.of(
        report.of("flops"), {"size, model": _model, **split},
        "The same closed forms by part. Embedding: values into vectors. Projections: queries, keys, values and "
        "output. Attention: products with queries, keys and values (of the Performer: with random features; of the "
        "dense auto-encoder: those of its decoder too). FAVOR: the linear attention of our decoder. Bridge: from "
        "encoder to decoder width. Decoder linear: its projections and FFN.",
    )  # fmt: skip
    by_length = Table.of(
        costs.QUANTILES,
        {
            "quantile": lambda level: f"{100 * level:.0f} %",
            "expressed genes": lambda level: f"{report.known('flops of a cell', quantile=level)['tokens']:,}",
            **by_size("flops of a cell", "quantile", 2),
        },
        "Closed form for the cell at each quantile of expressed genes.",
    )
    counted = Table.of(
        report.of("flops counted"),
        {
            "size, model": _model,
            "cells": lambda row: f"{row['cells']}",
            "counted": lambda row: f"{row['flops_counted']:,}",
            "closed form": lambda row: f"{row['flops_closed_form']:,}",
        },
        "Counted: forward passes on the first cells, called in this run under torch.utils.flop_counter.FlopCounterMode "
        "with the real shapes and offsets, but without doing the arithmetic. Linear layers and PyTorch's attention are "
        "counted by PyTorch; for an op of this project the counter takes the formula that the op states. A difference "
        "of one would end this run with an error. PyTorch's attention is called as matrix products here, since its "
        "fused one on a CPU counts as 0. Padded: to the longest of these cells.",
    )
    parts: Parts = [
        main, *_pictures(report, "flops"), "Where they go, in GFLOP per cell:", by_part, *_pictures(report, "parts"),
        "Cells are unequal, and the cost grows faster than the length. Our encoder over the distribution:", by_length,
        *_pictures(report, "lengths"), "The closed forms beside what is counted when the networks are called:", counted,
    ]  # fmt: skip
    saved = {row["provider"]: row for row in report.of("exact savings")}
    if len(saved) == 2:
        ours, plain = (saved[name]["flops_counted"] for name in ("auto-encoder", "auto-encoder, plain"))
        parts.append(
            f"Exact savings: a training step ({saved['auto-encoder']['case']}, masked, with read-depth tokens) "
            f"executes {ours:,} FLOPs, {ours / plain:.3f} of the {plain:,} of the same network as it is written down; "
            "both counted, forward and backward."
        )
    return parts


def _part(column: str, row: Row) -> str:
    return _number(row[column]) if row[column] else ""


def _model(row: Row) -> str:
    return f"{row['case']}, {MODEL_NAMES[row['provider']]}"


def _time(report: Report) -> Parts:
    made = {
        "The encoder's layers on real cells, and how many times as long other ways take:": _encoder(report),
        "Models of the same width and depth over every gene, one cell:": _full_length(report),
        "Peak memory, MiB per cell, float32:": _memory(report),
        "A pre-training step of the whole auto-encoder, and how many times as long other ways take:": _step(report),
    }
    return [part for title, table in made.items() if table.body for part in (title, table)]


def _encoder(report: Report) -> Table:
    return Table.of(
        report.timed("encoder", "xtg"),
        {
            "cells": _case,
            "time a cell": lambda row: _milliseconds(per_cell(row)[1]),
            "cells/s": lambda row: _number(row["cells_per_second"]),
            "tokens/s": lambda row: _number(row["tokens_per_second"]),
            "of GEMM": lambda row: _percent(row["share_of_gemm"], 0),
            "packed plain PyTorch": lambda row: _ratio(report.beside(row, "plain"), row),
            "padded": lambda row: _ratio(report.beside(row, "padded"), row),
            "dense": lambda row: _against_full(report, row, "dense"),
            "Performer": lambda row: _against_full(report, row, "performer"),
            "noise": _noise,
        },
        "Median of the runs of a process in which all ways take turns. Packed plain PyTorch: linear layers over all "
        "tokens, F.scaled_dot_product_attention cell by cell. Padded: torch.nn.TransformerEncoder with a mask; one "
        "cell has no padding, and 100m is not run padded; PyTorch's fast path for inference, which stores all scores, "
        "is off. Dense and Performer: the table below, by cell, not in turns. Of GEMM: closed-form FLOPs by time, "
        "against torch.mm at 2048 x 2048 x 2048 in the same turns and dtype; above 100 % where PyTorch's own product "
        "is slow or had a slow turn: it runs once a turn. Forward: without gradients. Forward + backward: gradients of "
        "input and all weights, no optimiser; scores that a backward computes again are among its FLOPs. Noise: 20 % "
        "and 80 % quantile around the median, of as many runs as results.csv says, here few. Outputs and gradients of "
        f"the first cell were right against float64 before a way was timed. {DAGGER} extrapolated.",
    )


def _full_length(report: Report) -> Table:
    def whole(layer: Row) -> Row | None:
        return report.one("dense", **{name: layer[name] for name in ("preset", "provider", "dtype", "direction")})

    def time(layer: Row) -> str:
        return _seconds(found["median_ms"]) + _mark(found) if (found := whole(layer)) else ""

    def scaled(layer: Row) -> str:
        found = whole(layer)
        if found is None or found.get("extrapolated"):
            return ""
        return f"{100 * (found['scaled_ms'] / found['median_ms'] - 1):+.0f} %"

    layers = [row for row in report.of("dense layer") if row["direction"] in DIRECTION_NAMES]
    genes = f"{layers[0]['tokens']:,} genes" if layers else ""
    return Table.of(
        layers,
        {
            "model": lambda row: f"{row['preset']}, {MODEL_NAMES[row['provider']]}, {_what(row)}",
            f"one layer, {genes}": lambda row: _seconds(row["median_ms"]),
            "its GFLOP/s": lambda row: _number(row["gflops"]),
            "of GEMM": lambda row: _percent(row["share_of_gemm"], 0),
            "all layers": time,
            "one layer scaled, off by": scaled,
        },
        "Every gene a token. Dense: torch.nn.TransformerEncoder with F.scaled_dot_product_attention, its fast path for "
        "inference, which stores all scores, off. Auto-encoder: the same, with a second one of our decoder's width and "
        "depth behind it; one layer is one of each. Performer: the layers and the fused linear attention of our own "
        "decoder at the encoder's width and depth, which is faster than PyTorch's einsum. Embeddings are left out. All "
        f"layers were run where that was expected to take {report.size.full_seconds:g} s at most. {DAGGER} "
        "extrapolated: the time of one layer times the FLOPs of all by those of one. The last column says what this "
        "would have given where all were run.",
    )


def _memory(report: Report) -> Table:
    def peak(provider: str) -> Callable[[Row], str]:
        def shown(row: Row) -> str:
            found = report.one("peak", preset=row["preset"], direction=row["direction"], provider=provider)
            return "" if found is None else _number(found["peak_mib"] / found["cells"]) + _mark(found)

        return shown

    return Table.of(
        report.timed("peak", "xtg"),
        {
            "size": lambda row: f"{row['preset']}, {DIRECTION_NAMES[row['direction']]}",
            "ours": peak("xtg"), "padded": peak("padded"), "dense": peak("dense"), "Performer": peak("performer"),
            "dense auto-encoder": peak("dense auto-encoder"), "cells in the batch": lambda row: f"{row['cells']}",
        },
        "Highest resident memory of a process that does this once, above that with weights and input in place, by the "
        "cells of the batch (full-length models: one cell). What is freed goes back to the system at once "
        f"(MALLOC_MMAP_THRESHOLD_). Backward: gradients of all weights are included. {DAGGER} a line through an eighth "
        "and a quarter of the genes: fused attention stores no scores.",
    )  # fmt: skip


def _step(report: Report) -> Table:
    bound = report.size.exact_gflop
    return Table.of(
        report.of("step", provider="auto-encoder"),
        {
            "cells": lambda row: f"{row['case']}, {row['dtype']}",
            "time": lambda row: _seconds(row["median_ms"]),
            "cells/s": lambda row: _number(row["cells_per_second"]),
            "GFLOP/s": lambda row: _number(row["gflops"]),
            "of GEMM": lambda row: _percent(row["share_of_gemm"], 0),
            "as written down": lambda row: _ratio(report.beside(row, "auto-encoder, plain"), row),
            "dense auto-encoder": lambda row: _against_full(report, {**row, "direction": BOTH}, "dense auto-encoder"),
            "noise": _noise,
        },
        "Ours, with the exact savings: forward, backward and AdamW on masked cells, every gene of the vocabulary in "
        "the decoder; bfloat16 is autocast; its own executed FLOPs by time. As written down: the same network, weights "
        "and kernels without the savings, in turns with ours. Dense auto-encoder: the table above, by cell, forward "
        "and backward without AdamW, which favours it. The loss of the first cell was right against float64 on the "
        "reference backend; so was the gradient of all weights where a step of one cell takes at most "
        f"{bound:,.0f} GFLOP. {DAGGER} extrapolated.",
    )


def _scaling(report: Report) -> Parts:
    series = [rows for rows in _series(report, "length") if len(rows) > 2]

    def from_2000(rows: list[Row]) -> str:
        upper = [_point(row) for row in rows if row["x"] >= 2000]
        return f"{exponent(upper):.2f}" if len(upper) > 2 else ""

    by_length = Table.of(
        series,
        {
            "way": _way,
            "expressed genes": lambda rows: f"{rows[0]['x']:,} ... {rows[-1]['x']:,}",
            "exponent": lambda rows: f"{exponent([_point(row) for row in rows]):.2f}",
            "from 2,000 genes": from_2000,
            "time of the longest cell": lambda rows: _milliseconds(_point(rows[-1])[1]),
        },
        "Slope of the least-squares line through log time and log genes, of each way over the lengths it was timed at. "
        "FLOPs grow with an exponent between 1 (linear layers) and 2 (attention); a batch of equal cells per point, "
        f"about {4096 // report.size.shorter:,} tokens unless one cell has more.",
    )
    uneven = Table.of(
        report.of("unevenness", provider="xtg", direction=FORWARD),
        {
            "longest cell": lambda row: f"{row['x']:g} times the mean",
            "ours": lambda row: _milliseconds(row["median_ms"]),
            "packed plain PyTorch": lambda row: _beside(report, row, "plain"),
            "padded": lambda row: _beside(report, row, "padded"),
        },
        "About the same number of genes in every batch; one cell holds so many times the mean, the others share the "
        "rest. The attention of the long cell is real work, the padding is not.",
    )
    threads = Table.of(
        [rows for rows in _series(report, "threads") if len(rows) > 1],
        {
            "way": _way,
            "one thread": lambda rows: _milliseconds(rows[0]["median_ms"]),
            "threads: times as fast": lambda rows: ", ".join(
                f"{row['x']:g}: {_times(rows[0]['median_ms'] / row['median_ms'])}" for row in rows
            ),
        },
        "The same cells and process, with the number of threads set by torch.set_num_threads.",
    )
    parts: Parts = []
    for title, table, name in (
        ("Time per cell against expressed genes, t \N{PROPORTIONAL TO} n^exponent:", by_length, "time_by_length"),
        ("Time of a batch of 16 cells against its unevenness, forward, float32:", uneven, "unevenness"),
        ("Threads, time of the batch:", threads, "threads"),
    ):
        parts += [title, table] if table.body else []
        parts += _pictures(report, name)
    rows = report.of("encoder", provider="xtg", direction=FORWARD, dtype="float32")
    if len(rows) > 1:
        sizes = [per_cell(row) for row in rows]
        flops, time = (last / first for first, last in zip(sizes[0], sizes[-1], strict=True))
        parts.append(
            f"Size: from {rows[0]['preset']} to {rows[-1]['preset']} the layers take {flops:,.0f} times the FLOPs and "
            f"{time:,.0f} times the time per cell (forward, float32; exponent {exponent(sizes):.2f})."
        )
    return [*parts, *_pictures(report, "sizes")]


def _series(report: Report, benchmark: str) -> Iterator[list[Row]]:
    """The points of every dtype, direction and way of a series."""
    for dtype, direction, way in itertools.product(DTYPES, DIRECTION_NAMES, WAY_NAMES):
        yield report.of(benchmark, dtype=dtype, direction=direction, provider=way)


def _point(row: Row) -> tuple[float, float]:
    """Where a point of a series stands, and the milliseconds of a cell."""
    return row["x"], row["median_ms"] / row["cells"]


def _way(rows: list[Row]) -> str:
    return f"{WAY_NAMES[rows[0]['provider']]}, {_what(rows[0])}"


def _dropin(report: Report) -> Parts:
    table = Table.of(
        report.timed("drop-in", "xtg"),
        {
            "module": _case,
            "ragged": lambda row: _milliseconds(row["median_ms"]),
            "padded": lambda row: _beside(report, row, "padded"),
            "one by one": lambda row: _beside(report, row, "plain"),
            "against padded": lambda row: _ratio(report.beside(row, "padded"), row),
            "against one by one": lambda row: _ratio(report.beside(row, "plain"), row),
        },
        "xtrimogene.dropin.ragged_encoder(module) on the module's own weights. Padded: the module on a batch padded to "
        "its longest cell, with its mask, PyTorch's fast path for inference off. One by one: the module on a cell at a "
        "time. Modules have random weights and the sizes of published models; cells longer than the model's input are "
        "cut. All three ways take turns, and the outputs and gradients of the first cell were right against float64.",
    )
    intro = (
        "Other single-cell models are plain Transformer encoders, as Geneformer's BERT or scGPT's "
        "nn.TransformerEncoder. The same kernels run them, with the weights that they have:"
    )
    return [intro, table, *_pictures(report, "dropin")] if table.body else []


def _how(report: Report) -> Parts:
    where = {**report.where, "dirty": "yes" if report.where["dirty"] else "no"}
    names = {
        "machine": "CPU", "gpus": "GPU", "isa": "kernels for", "threads": "threads", "system": "system",
        "python": "Python", "torch": "torch", "numpy": "NumPy", "transformers": "transformers",
        "xtrimogene": "xtrimogene", "commit": "commit", "dirty": "uncommitted changes", "date": "date",
        "expected": "expected to take", "seconds": "seconds of this run",
    }  # fmt: skip
    body = [[label, str(where[name])] for name, label in names.items() if where.get(name) not in (None, "")]
    parts: Parts = [
        f"Cells: {report.cells}. They are taken in an order shuffled with a fixed seed; weights and inputs are random "
        "with a fixed seed too.",
        "All rows, with the runs and quantiles of each, are in results.csv beside this page. A way whose numbers are "
        "not right gets no time: outputs and gradients of the first cell are held against float64, and may be off by "
        "at most twice (gradients: three times) what plain PyTorch is off by in the same dtype, at the worst of its "
        "orders of summation, or by 2e-6 in float32. The gradient of the bias of BERT's keys, zero but for rounding, "
        "is not judged. Plain PyTorch itself and the full-length models are baselines, and have a fixed limit for each "
        "dtype (in bfloat16 without the gradients of their LayerNorms, which PyTorch sums in bfloat16 on a CPU). "
        "Full-length models and the points of a scaling series are checked with as many of their layers as take "
        f"{report.size.exact_gflop:,.0f} GFLOP, at least one (column checked_layers).",
    ]
    noise = [
        (row["q80_ms"] - row["q20_ms"]) / row["median_ms"]
        for row in report.rows
        if row.get("runs", 0) > 1 and row["correct"]
    ]
    if noise:
        parts.append(
            "Noise: half of the measured medians have their 20 % and 80 % quantiles within "
            f"{100 * float(np.median(noise)):.0f} % of each other, nine in ten within "
            f"{100 * float(np.quantile(noise, 0.9)):.0f} %. Only ratios inside one run mean something on another "
            "machine."
        )
    return [*parts, Table(["", ""], body, "Read from the machine at the start of the run.")]


def _pictures(report: Report, name: str) -> Parts:
    return [Picture(name, report.pictures[name])] if name in report.pictures else []


def _where(report: Report) -> str:
    where = report.where
    changes = ", with changes that are not committed" if where["dirty"] else ""
    commit = where["commit"] if where["commit"].startswith("version ") else f"commit {where['commit']}"
    return (
        f"Measured on {where['date']} at {commit}{changes}: {where['gpus'] or where['machine']}, "
        f"{where['isa']} kernels, {where['threads']} thread{'s' * (where['threads'] > 1)}, torch {where['torch']}."
    )


def _what(row: Row) -> str:
    return f"{row['dtype']}, {DIRECTION_NAMES[row['direction']]}"


def _case(row: Row) -> str:
    return f"{row['case']}, {_what(row)}"


def _beside(report: Report, row: Row, provider: str) -> str:
    """The time of another way."""
    other = report.beside(row, provider)
    return "" if other is None else _milliseconds(other["median_ms"])


def _ratio(other: Row | None, row: Row) -> str:
    """How many times as long the other way takes."""
    return "" if other is None else _times(other["median_ms"] / row["median_ms"])


def _against_full(report: Report, row: Row, model: str) -> str:
    """How many times as long a full-length model takes for a cell."""
    found = full_seconds(report, model, row["preset"], row["dtype"], row["direction"])
    return "" if found is None else _times(found[0] * row["cells_per_second"]) + DAGGER * found[1]


def _mark(row: Row) -> str:
    return DAGGER if row.get("extrapolated") else ""


def _number(x: float) -> str:
    if x >= 1000:
        return f"{x:,.0f}"
    return f"{x:#.3g}".rstrip(".") if x >= 0.001 else f"{x:.1g}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:,.{digits}f} %"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:#.3g}x".replace(".x", "x")


def _milliseconds(ms: float) -> str:
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def _seconds(ms: float) -> str:
    return _milliseconds(ms) if ms < 1000 else f"{ms / 1e3:,.3g} s" if ms < 1e6 else f"{ms / 1e3:,.0f} s"


def _noise(row: Row) -> str:
    low, high = (round(100 * (row[name] / row["median_ms"] - 1)) for name in ("q20_ms", "q80_ms"))
    return f"{low:+d} / {high:+d} %"


def short_text(report: Report) -> str:
    """What the command prints: the FLOP table, the encoder's times if there are any, and the exact savings."""
    flops, encoder = _flops(report), _encoder(report)
    tables = [text_table(part) for part in (flops[0], encoder) if isinstance(part, Table) and part.body]
    savings = [part for part in flops if isinstance(part, str) and part.startswith("Exact savings")]
    return "\n\n".join([*([_quick_warning(report)] if report.quick else []), *tables, *savings])
