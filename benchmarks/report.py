"""The report of `xtrimogene bench`: the measured rows as one document, written as Markdown and as a page of HTML.

The page is a single file: pictures are inside it, nothing is fetched. Every table says how its numbers were obtained.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import costs
from benchmarks.cases import BOTH, FORWARD
from benchmarks.timings import Size

Row = dict[str, Any]
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
DIRECTION_NAMES = {FORWARD: "forward", BOTH: "training step"}
DAGGER = "\N{DAGGER}"


@dataclass(frozen=True)
class Table:
    """Rows under a header; ``how`` says how the numbers were obtained. The first ``labels`` columns hold text."""

    header: list[str]
    body: list[list[str]]
    how: str
    labels: int = 1


@dataclass(frozen=True)
class Picture:
    """A picture that lies beside the report as NAME.png and NAME.svg."""

    name: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, and paragraphs, tables and pictures in their order."""

    title: str
    parts: list[str | Table | Picture]


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

    def values(self, benchmark: str, column: str) -> list[Any]:
        """Distinct values of a column, in their order."""
        return list(dict.fromkeys(row[column] for row in self.of(benchmark) if column in row))


def sections(report: Report) -> list[Section]:
    """The document."""
    made = [_summary(report), _flops(report), _time(report), _scaling(report), _dropin(report), _how(report)]
    return [section for section in made if section.parts]


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the least-squares line through log x, log y."""
    xs, ys = zip(*points, strict=True)
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def dense_seconds(report: Report, preset: str, dtype: str, direction: str) -> tuple[float, bool] | None:
    """Seconds of the dense encoder for a cell with all genes, and whether they are extrapolated.

    None where measured cells were made shorter: a ratio to the whole of a dense cell would flatter.
    """
    if report.size.shorter > 1:
        return None
    row = report.one("dense", preset=preset, dtype=dtype, direction=direction, x=report.num_genes)
    return None if row is None else (row["median_ms"] / 1e3, bool(row.get("extrapolated")))


def per_cell(row: Row) -> tuple[float, float]:
    """GFLOP and milliseconds of a cell."""
    return row["gflops"] * row["median_ms"] / 1e3 / row["cells"], row["median_ms"] / row["cells"]


def summary_table(report: Report) -> Table:
    """The headline: what a cell costs beside a dense one, by size of the model."""
    body = []
    for row in report.of("flops", provider="encoder"):
        size, line = row["case"], [row["case"]]
        whole = report.one("flops", provider="auto-encoder", case=size)
        wide = report.one("flops", provider="dense auto-encoder", case=size)
        assert whole is not None
        assert wide is not None
        for share in (row["share_of_dense"], whole["gflop_per_cell"] / wide["gflop_per_cell"]):
            line += [_percent(share), f"{1 / share:,.0f}"]
        for dtype in ("float32", "bfloat16"):
            found = report.one("encoder", provider="xtg", preset=size, dtype=dtype, direction=FORWARD)
            against = dense_seconds(report, size, dtype, FORWARD)
            line.append("" if found is None else _number(found["cells_per_second"]))
            if found is None or against is None:
                line.append("")
            else:
                line.append(_times(against[0] * found["cells_per_second"]) + (DAGGER if against[1] else ""))
        body.append(line)
    header = [
        "size", "FLOPs to embed a cell, of dense", "times fewer", "FLOPs in pre-training, of dense", "times fewer",
        "cells/s, float32", "against dense", "cells/s, bfloat16", "against dense",
    ]  # fmt: skip
    if not report.of("encoder"):
        header, body = header[:5], [line[:5] for line in body]
    how = (
        "FLOPs in closed form, forward, mean over the cells; the dense encoder and auto-encoder have the same width "
        "and depth over all genes. Speed of the encoder's layers, forward, measured, against the dense encoder in "
        f"the same run; empty where a size was not measured. {DAGGER} the dense time is extrapolated."
    )
    return Table(header, body, how)


def _summary(report: Report) -> Section:
    parts: list[str | Table | Picture] = [
        "xTrimoGene runs a Transformer over the genes that a cell expresses instead of all genes of the vocabulary. "
        "This report says what that saves, in arithmetic, time and memory, on this machine.",
        summary_table(report),
    ]
    if report.quick:
        parts.append("This was a quick run on small shapes: it shows that everything works, not how fast it is.")
    parts.append(_where(report))
    return Section("In short", parts)


def _flops(report: Report) -> Section:
    presets = report.values("flops", "case")
    body = []
    for model in costs.MODELS:
        line = [MODEL_NAMES[model]]
        for preset in presets:
            row = report.one("flops", case=preset, provider=model)
            assert row is not None
            line += [_number(row["gflop_per_cell"]), _percent(row["share_of_dense"])]
        body.append(line)
    tokens = report.of("flops")[0]
    how = (
        f"Closed form (xtrimogene.flops), mean over {tokens['cells']:,} cells with "
        f"{tokens['tokens'] / tokens['cells']:,.0f} expressed genes on average and {report.num_genes:,} genes in the "
        "vocabulary. FLOPs of matrix products, two for a multiply-add. The share is that of the dense encoder of the "
        "same width and depth; its embedding is left out, which favours it. The dense auto-encoder has a softmax "
        "decoder of our decoder's width and depth. Both of our auto-encoders are counted in pre-training (30 % of "
        "the expressed and 3 % of the other genes chosen); the savings are exact: nothing is approximated, and they "
        f"are shared by batches of {costs.STEP_CELLS} cells."
    )
    main = Table(["model"] + [x for preset in presets for x in (f"{preset}, GFLOP", "of dense")], body, how)
    parts: list[str | Table | Picture] = [main, *_pictures(report, "flops")]

    body = []
    for preset in presets:
        for model in costs.MODELS:
            row = report.one("flops", case=preset, provider=model)
            assert row is not None
            split = [row[f"gflop_{part}"] for part in costs.PARTS]
            body.append([preset, MODEL_NAMES[model], *(_number(x) if x else "" for x in split)])
    parts.append("Where they go, in GFLOP per cell:")
    parts.append(
        Table(
            ["size", "model", *(PART_NAMES.get(part, part) for part in costs.PARTS)], body,
            "The same closed forms by part. Embedding: values into vectors. Projections: queries, keys, values and "
            "output. Attention: products with queries, keys and values (of the Performer: with random features; of "
            "the dense auto-encoder: those of its decoder too). "
            "FAVOR: the decoder's linear attention. Bridge: from encoder to decoder width. Decoder linear: its "
            "projections and FFN.",
            labels=2,
        )
    )  # fmt: skip
    parts += _pictures(report, "parts")

    body = []
    for level in costs.QUANTILES:
        rows = [report.one("flops of a cell", case=preset, quantile=level) for preset in presets]
        found = [row for row in rows if row is not None]
        cells = [x for row in found for x in (_number(row["gflop_per_cell"]), _percent(row["share_of_dense"], 2))]
        body.append([f"{100 * level:.0f} %", f"{found[0]['tokens']:,}", *cells])
    parts.append("Cells are unequal, and the cost grows faster than the length. Our encoder over the distribution:")
    header = ["quantile", "expressed genes"] + [x for p in presets for x in (f"{p}, GFLOP", "of dense")]
    parts.append(Table(header, body, "Closed form for the cell at each quantile of expressed genes."))
    parts += _pictures(report, "lengths")

    body = [
        [row["case"], MODEL_NAMES[row["provider"]], f"{row['cells']}",
         *(f"{row[f'flops_{how}']:,}" for how in ("counted", "closed_form"))]
        for row in report.of("flops counted")
    ]  # fmt: skip
    parts.append("The closed forms are what runs, to the last unit:")
    parts.append(
        Table(
            ["size", "model", "cells", "counted", "closed form"], body,
            "Counted: forward passes called in this run under torch.utils.flop_counter.FlopCounterMode, with the real "
            "shapes and offsets, but without doing the arithmetic. A difference of one would end this run with an "
            "error. PyTorch's attention is called as matrix products here, since its fused one on a CPU counts as 0. "
            "Padded: to the longest of these cells.",
            labels=2,
        )
    )  # fmt: skip
    saved = {row["provider"]: row for row in report.of("exact savings")}
    if len(saved) == 2:
        ours, plain = (saved[name]["flops_counted"] for name in ("auto-encoder", "auto-encoder, plain"))
        parts.append(
            f"Exact savings: a training step ({saved['auto-encoder']['case']}, masked, with read-depth tokens) "
            f"executes {ours:,} FLOPs, {ours / plain:.3f} of the {plain:,} of the same network as it is written down; "
            "both counted."
        )
    return Section("FLOPs per cell", parts)


def _time(report: Report) -> Section:
    body = []
    for row in report.of("encoder", provider="xtg"):
        if row["direction"] not in DIRECTION_NAMES:
            continue
        same = {name: row[name] for name in ("case", "dtype", "direction")}
        others = {name: report.one("encoder", provider=name, **same) for name in ("plain", "padded")}
        against = dense_seconds(report, row["preset"], row["dtype"], row["direction"])
        ratios = ["" if o is None else _times(o["median_ms"] / row["median_ms"]) for o in others.values()]
        wide = "" if against is None else _times(against[0] * row["cells_per_second"]) + DAGGER * against[1]
        body.append(
            [row["case"], row["dtype"], DIRECTION_NAMES[row["direction"]], _milliseconds(per_cell(row)[1]),
             _number(row["cells_per_second"]), _number(row["tokens_per_second"]), _percent(row["share_of_gemm"], 0),
             *ratios, wide, _noise(row)]
        )  # fmt: skip
    parts: list[str | Table | Picture] = []
    if body:
        parts.append("The encoder's layers on real cells, and how many times as long other ways take:")
        parts.append(
            Table(
                ["cells", "dtype", "what", "time a cell", "cells/s", "tokens/s", "of GEMM", "packed plain PyTorch",
                 "padded", "dense", "noise"],
                body,
                "Median of the runs of a process in which all ways take turns. Packed plain PyTorch: linear layers "
                "over all tokens, F.scaled_dot_product_attention cell by cell. Padded: torch.nn.TransformerEncoder "
                "with a mask. Dense: the table below, per cell. Of GEMM: closed-form FLOPs by time, against torch.mm "
                "at 2048 x 2048 x 2048 in the same turns and dtype; above 100 % where PyTorch's own product is slow. "
                "Training step: forward and backward, without optimiser. Noise: 20 % and 80 % quantile around the "
                f"median. Every way was right against float64 before it was timed. {DAGGER} extrapolated.",
                labels=3,
            )
        )  # fmt: skip
    body = []
    for preset in report.values("dense", "preset"):
        for dtype in report.values("dense", "dtype"):
            for direction in (FORWARD, BOTH):
                rows = report.of("dense", preset=preset, dtype=dtype, direction=direction)
                measured = [row for row in rows if not row.get("extrapolated")]
                if not measured:
                    continue
                last = measured[-1]
                whole = next((row for row in rows if row["x"] == report.num_genes), None)
                fit = "" if whole is None or not whole.get("extrapolated") else _percent(whole["fit_deviation"], 0)
                total = "" if whole is None else _seconds(whole["median_ms"]) + _mark(whole)
                body.append(
                    [preset, dtype, DIRECTION_NAMES[direction], f"{len(measured)}", f"{last['x']:,}",
                     _seconds(last["median_ms"]), total, fit]
                )  # fmt: skip
    if body:
        parts.append("A dense encoder of the same width and depth, one cell, every gene a token:")
        parts.append(
            Table(
                ["size", "dtype", "what", "points", "longest run", "its time", f"{report.num_genes:,} genes", "misfit"],
                body,
                "torch.nn.TransformerEncoder with F.scaled_dot_product_attention, at a thirty-second of the genes, a "
                f"sixteenth and so on, as long as a run was expected to take {report.size.dense_seconds:g} s at most. "
                f"{DAGGER} extrapolated: the curve of its FLOPs, linear layers (as n) and attention (as "
                "n\N{SUPERSCRIPT TWO}) each at a rate of its own, fitted to the measured times by least relative "
                "squares (attention between a quarter of and four times the rate of linear layers); misfit is its "
                "largest relative deviation from them.",
                labels=3,
            )
        )  # fmt: skip
    body = []
    for preset in report.values("peak", "preset"):
        for direction in (FORWARD, BOTH):
            line = [preset, DIRECTION_NAMES[direction]]
            ours = report.one("peak", preset=preset, direction=direction, provider="xtg")
            for provider in ("xtg", "padded", "dense"):
                found = report.one("peak", preset=preset, direction=direction, provider=provider)
                line.append("" if found is None else _number(found["peak_mib"] / found["cells"]) + _mark(found))
            if ours is not None:
                body.append([*line, f"{ours['cells']}"])
    if body:
        parts.append("Peak memory, MiB per cell, float32:")
        parts.append(
            Table(
                ["size", "what", "ours", "padded", "dense", "cells in the batch"], body,
                "Highest resident memory of a process that does this once, above that with weights and input in "
                "place, by the cells of the batch (dense: one cell). Training step: forward and backward, gradients "
                f"of all weights included. {DAGGER} a line through the two longest runs, since the dense attention is "
                "fused and stores no scores.",
                labels=2,
            )
        )  # fmt: skip
    body = [
        [row["case"], row["dtype"], _seconds(row["median_ms"]), _number(row["cells_per_second"]),
         _number(row["gflops"]), _percent(row["share_of_gemm"], 0), _noise(row)]
        for row in report.of("step")
    ]  # fmt: skip
    if body:
        parts.append("A pre-training step of the whole auto-encoder:")
        parts.append(
            Table(
                ["cells", "dtype", "time", "cells/s", "GFLOP/s", "of GEMM", "noise"], body,
                "Forward, backward and AdamW on masked cells, every gene of the vocabulary in the decoder; bfloat16 "
                "is autocast. The loss of the first cell was right against the model in float64 on the reference "
                "backend.",
                labels=2,
            )
        )  # fmt: skip
    return Section("Time and memory", parts)


def _scaling(report: Report) -> Section:
    body = []
    for labels, rows in _series(report, "length"):
        if len(rows) < 3:
            continue
        points = [(row["x"], row["median_ms"] / row["cells"]) for row in rows]
        upper = [point for point in points if point[0] >= 2000]
        body.append(
            [*labels, f"{points[0][0]:,} ... {points[-1][0]:,}", f"{exponent(points):.2f}",
             f"{exponent(upper):.2f}" if len(upper) >= 3 else "", _milliseconds(points[-1][1])]
        )  # fmt: skip
    parts: list[str | Table | Picture] = []
    if body:
        parts.append("Time per cell against expressed genes, t \N{PROPORTIONAL TO} n^exponent:")
        parts.append(
            Table(
                ["way", "dtype", "what", "expressed genes", "exponent", "from 2,000 genes", "longest, ms"], body,
                "Slope of the least-squares line through log time and log genes. Between 1 (linear layers) and 2 "
                "(attention) by construction; a batch of equal cells per point, about as many tokens in each. "
                "Outputs were compared with plain PyTorch in the same dtype.",
                labels=3,
            )
        )  # fmt: skip
    parts += _pictures(report, "time_by_length")
    body = []
    for x in report.values("unevenness", "x"):
        ways = [report.one("unevenness", x=x, direction=FORWARD, provider=way) for way in ("xtg", "plain", "padded")]
        if ways[0] is not None:
            times = ["" if way is None else _milliseconds(way["median_ms"]) for way in ways]
            body.append([ways[0]["case"].split(", ", 1)[1], *times])
    if body:
        parts.append("Time of a batch of 16 cells against its unevenness, forward, float32:")
        parts.append(
            Table(
                ["longest cell", "ours", "packed plain PyTorch", "padded"], body,
                "The same number of genes in every batch; one cell holds so many times the mean, the others share "
                "the rest. The attention of the long cell is real work, the padding is not.",
            )
        )  # fmt: skip
    parts += _pictures(report, "unevenness")
    body = []
    for labels, rows in _series(report, "threads"):
        if len(rows) > 1:
            gains = [f"{row['x']}: {_times(rows[0]['median_ms'] / row['median_ms'])}" for row in rows]
            body.append([*labels, _milliseconds(rows[0]["median_ms"]), ", ".join(gains)])
    if body:
        parts.append("Threads:")
        parts.append(
            Table(
                ["way", "dtype", "what", "one thread", "threads: times as fast"], body,
                "The same cells and process, with the number of threads set by torch.set_num_threads.", labels=3,
            )
        )  # fmt: skip
    parts += _pictures(report, "threads")
    rows = report.of("encoder", provider="xtg", direction=FORWARD, dtype="float32")
    if len(rows) > 1:
        sizes = [per_cell(row) for row in rows]
        flops, time = (last / first for first, last in zip(sizes[0], sizes[-1], strict=True))
        parts.append(
            f"Size: from {rows[0]['preset']} to {rows[-1]['preset']} the layers take {flops:,.0f} times the FLOPs and "
            f"{time:,.0f} times the time per cell (forward, float32; exponent {exponent(sizes):.2f})."
        )
    parts += _pictures(report, "sizes")
    return Section("Scaling", parts)


def _series(report: Report, benchmark: str) -> Iterator[tuple[list[str], list[Row]]]:
    """Name, dtype and direction of every way of a series, and its points."""
    for dtype in report.values(benchmark, "dtype"):
        for direction in (FORWARD, BOTH):
            for provider, name in (("xtg", "ours"), ("plain", "packed plain PyTorch")):
                rows = report.of(benchmark, dtype=dtype, direction=direction, provider=provider)
                yield [name, dtype, DIRECTION_NAMES[direction]], rows


def _dropin(report: Report) -> Section:
    body = []
    for row in report.of("drop-in", provider="xtg"):
        if row["direction"] not in DIRECTION_NAMES:
            continue
        same = {name: row[name] for name in ("case", "dtype", "direction")}
        others = [report.one("drop-in", provider=name, **same) for name in ("padded", "plain")]
        times = ["" if o is None else _milliseconds(o["median_ms"]) for o in others]
        ratios = ["" if o is None else _times(o["median_ms"] / row["median_ms"]) for o in others]
        body.append(
            [
                row["case"],
                row["dtype"],
                DIRECTION_NAMES[row["direction"]],
                _milliseconds(row["median_ms"]),
                *times,
                *ratios,
            ]
        )
    if not body:
        return Section("Other models without padding", [])
    table = Table(
        ["module", "dtype", "what", "ragged", "padded", "one by one", "against padded", "against one by one"],
        body,
        "xtrimogene.dropin.ragged_encoder(module) on the module's own weights. Padded: the module on a batch padded "
        "to its longest cell, with its mask. One by one: the module on a cell at a time. Modules have random weights "
        "and the sizes of published models; cells longer than the model's input are cut. All three ways take turns, "
        "and were right against float64.",
        labels=3,
    )  # fmt: skip
    intro = (
        "Other single-cell models are plain Transformer encoders, as Geneformer's BERT or scGPT's "
        "nn.TransformerEncoder. The same kernels run them, with the weights that they have:"
    )
    return Section("Other models without padding", [intro, table, *_pictures(report, "dropin")])


def _how(report: Report) -> Section:
    where = report.where
    names = {
        "machine": "CPU", "gpus": "GPU", "isa": "kernels for", "threads": "threads", "system": "system",
        "python": "Python", "torch": "torch", "numpy": "NumPy", "transformers": "transformers",
        "xtrimogene": "xtrimogene", "commit": "commit", "dirty": "uncommitted changes", "date": "date",
        "seconds": "seconds of this run",
    }  # fmt: skip
    body = [[label, str(where[name])] for name, label in names.items() if where.get(name) not in (None, "")]
    noise = [
        (row["q80_ms"] - row["q20_ms"]) / row["median_ms"]
        for row in report.rows
        if row.get("runs", 0) > 1 and row["correct"]
    ]
    table = Table(["", ""], body, "Read from the machine at the start of the run.", labels=2)
    parts: list[str | Table | Picture] = [
        f"Cells: {report.cells}. They are taken in an order shuffled with a fixed seed; weights and inputs are random "
        "with a fixed seed too.",
        "All rows, with the runs and quantiles of each, are in results.csv beside this page. A way whose numbers are "
        "not right gets no time: the error is that of the output (in training also of every gradient) against "
        "float64, and at most twice (gradients: three times) that of plain PyTorch in the same dtype. The dense "
        "encoder and the points of a scaling series are held against plain PyTorch in their own dtype instead.",
    ]
    if noise:
        parts.append(
            "Noise: half of the measured medians have their 20 % and 80 % quantiles within "
            f"{100 * float(np.median(noise)):.0f} % of each other, nine in ten within "
            f"{100 * float(np.quantile(noise, 0.9)):.0f} %. Only ratios inside one run mean something on another "
            "machine."
        )
    return Section("How it was measured", [*parts, table])


def _pictures(report: Report, name: str) -> list[str | Table | Picture]:
    return [Picture(name, report.pictures[name])] if name in report.pictures else []


def _where(report: Report) -> str:
    where = report.where
    changes = ", with changes that are not committed" if where["dirty"] else ""
    return (
        f"Measured on {where['date']} at commit {where['commit']}{changes}: {where['gpus'] or where['machine']}, "
        f"{where['isa']} kernels, {where['threads']} threads, torch {where['torch']}."
    )


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
    low, high = row["q20_ms"] / row["median_ms"] - 1, row["q80_ms"] / row["median_ms"] - 1
    return f"{100 * low:+.0f} / {100 * high:+.0f} %"


def short_table(report: Report) -> str:
    """What the command prints: the FLOP table, and the encoder's times if there are any."""
    found: list[Table] = []
    for section in (_flops(report), _time(report)):
        found += [part for part in section.parts if isinstance(part, Table)][:1]
    tables = [_padded_table([table.header, *table.body], table.labels) for table in found]
    savings = [part for part in _flops(report).parts if isinstance(part, str) and part.startswith("Exact savings")]
    return "\n\n".join([*tables, *savings])


def _padded_table(lines: Sequence[Sequence[str]], labels: int) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < labels else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(report: Report, title: str) -> str:
    """The document as Markdown."""
    lines = [f"# {title}"]
    for section in sections(report):
        lines.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, str):
                lines.append(part)
            elif isinstance(part, Picture):
                lines.append(f"![{part.caption}]({part.name}.png)")
            else:
                rule = ["---"] * part.labels + ["---:"] * (len(part.header) - part.labels)
                table = ("| " + " | ".join(line) + " |" for line in (part.header, rule, *part.body))
                lines += ["\n".join(table), f"*{part.how}*"]
    return "\n\n".join(lines) + "\n"


def page(report: Report, title: str, folder: Path) -> str:
    """The document as HTML, with the SVG pictures of the folder inside."""
    body = "\n".join(_render(section, folder) for section in sections(report))
    return _PAGE.format(title=html.escape(title), body=body)


def _render(section: Section, folder: Path) -> str:
    ways: dict[type, Callable[[Any], str]] = {
        str: lambda text: f"<p>{html.escape(text)}</p>",
        Table: _render_table,
        Picture: lambda picture: _render_picture(picture, folder),
    }
    parts = "\n".join(ways[type(part)](part) for part in section.parts)
    return f"<section>\n<h2>{html.escape(section.title)}</h2>\n{parts}\n</section>"


def _render_table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marked = (
            f"<{tag}{'' if i < table.labels else CLASS_OF_NUMBERS}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    head = f"<thead>{line(table.header, 'th')}</thead>" if any(table.header) else ""
    body = "\n".join(line(cells, "td") for cells in table.body)
    scroll = f'<div class="table">\n<table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table>\n</div>'
    return f"<figure>\n{scroll}\n<figcaption>{html.escape(table.how)}</figcaption>\n</figure>"


def _render_picture(picture: Picture, folder: Path) -> str:
    svg = (folder / f"{picture.name}.svg").read_bytes()
    data, caption = base64.b64encode(svg).decode(), html.escape(picture.caption)
    found = re.search(rb'<svg [^>]*?width="([0-9.]+)pt"', svg)
    assert found is not None
    # Letters of the size of those in tables.
    rem = float(found[1]) / 11.5
    kind = "wide" if rem > 40 else "small"
    image = (
        f'<div class="scroll"><img class="{kind}" style="width: {rem:.0f}rem" src="data:image/svg+xml;base64,{data}" '
        f'alt="{caption}" /></div>'
    )
    return f"<figure>\n{image}\n<figcaption>{caption}</figcaption>\n</figure>"


CLASS_OF_NUMBERS = ' class="n"'
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>{title}</title>
<style>
:root {{ color-scheme: light; --ink: #1c2126; --soft: #5b6670; --line: #d9dee3; --band: #f5f7f9; --accent: #0b5c8c; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }}
main {{ max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: .9rem; border-top: 2px solid var(--accent); }}
p {{ max-width: 46rem; margin: .7rem 0; overflow-wrap: anywhere; }}
figure {{ margin: 1.1rem 0 1.8rem; }}
figcaption {{ max-width: 46rem; margin-top: .5rem; color: var(--soft); font-size: .86rem; line-height: 1.45;
  overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
.table {{ overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }}
table {{ border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .38rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }}
td {{ white-space: nowrap; }}
th {{ background: var(--band); font-weight: 600; vertical-align: bottom; }}
th.n, td.n {{ text-align: right; }}
tbody tr:last-child td {{ border-bottom: 0; }}
tbody tr:hover {{ background: var(--band); }}
img {{ display: block; max-width: 100%; height: auto; }}
@media (max-width: 40rem) {{
  main {{ padding: 1.25rem .9rem 3rem; }}
  h1 {{ font-size: 1.5rem; }}
  th, td {{ padding: .32rem .5rem; font-size: .8rem; }}
  td:first-child {{ white-space: normal; min-width: 5.5rem; background: #fff; }}
  th:first-child, td:first-child {{ position: sticky; left: 0; border-right: 1px solid var(--line); }}
  img.wide {{ min-width: 38rem; }}
}}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""
