"""Writes the measured figures of README.md, the table of docs/tutorials/ragged.md and all tables of docs/benchmarks.md:
python -m benchmarks.readme
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import RESULTS
from xtrimogene.bench.report import DAGGER, Report, summary_tables
from xtrimogene.bench.rows import Rows, read_rows
from xtrimogene.bench.sizes import FULL, QUICK
from xtrimogene.bench.tasks import BOTH
from xtrimogene.document import markdown_table

ROOT = Path(__file__).parents[1]
OPENING, CLOSING = "<!-- benchmarks -->", "<!-- /benchmarks -->"
REPORT = "report/results.csv"


def with_tables(text: str, body: str) -> str:
    """The text with what stands between the two markers replaced."""
    found = re.compile(f"{OPENING}\n.*?{CLOSING}", flags=re.DOTALL)
    if not found.search(text):
        raise ValueError(f"expected the markers {OPENING} and {CLOSING}, got a text without them")
    return found.sub(lambda _: f"{OPENING}\n{body}{CLOSING}", text)


def tables(results: Path = RESULTS) -> str:
    """Every table. A result that is not there makes none."""
    parts = []
    for name, section in SECTIONS.items():
        path = results / f"{name}.csv"
        if path.is_file():
            rows = read_rows(path)
            parts += [section(rows), _where(rows)]
            if name == "encoder" and (results / REPORT).is_file():
                parts.append(_measured_twice(rows, read_rows(results / REPORT)))
    return "".join(f"{part}\n\n" for part in parts).removesuffix("\n")


def headline(results: Path = RESULTS) -> str:
    """The five figures of README.md: beside a dense model stands what one would run instead."""
    report, memory, embed = (read_rows(results / name) for name in (REPORT, "memory.csv", "embed.csv"))
    ours = {"encoder": "xtg", "drop-in": "xtg", "step": "auto-encoder"}
    dense = {
        (row["preset"], row["provider"], row["dtype"], row["direction"]): row
        for row in report
        if row["benchmark"] == "dense"
    }

    def against(benchmark: str, other: str, *directions: str) -> str:
        """How many times as long another way takes: lowest to highest of the sizes, dtypes and directions."""
        found = {
            (r["case"], r["dtype"], r["direction"], r["provider"]): r for r in report if r["benchmark"] == benchmark
        }
        ratios, marks = [], set()
        for (*case, provider), row in found.items():
            if provider != ours[benchmark] or (directions and row["direction"] not in directions):
                continue
            # A step has a backward; the full-length models know but that direction.
            whole = dense.get((row["preset"], other, row["dtype"], "forward" if case[2] == "forward" else BOTH))
            beside = whole if other.startswith("dense") else found.get((case[0], case[1], case[2], other))
            if beside is not None:
                per_cell = [float(each["median_ms"]) / int(each["cells"]) for each in (beside, row)]
                ratios.append(per_cell[0] / per_cell[1])
                marks.add(beside["extrapolated"])
        return " to ".join(dict.fromkeys(map(_times, (min(ratios), max(ratios))))) + DAGGER * ("True" in marks)

    few, many = memory[0], memory[-1]
    speeds = ", ".join(f"{float(row['cells_per_second']):,.0f} cells/s in {row['dtype']}" for row in embed)
    peaks = ", ".join(f"{float(row['peak_mib']):,.0f} MiB for {int(row['cells']):,} cells" for row in (few, many))
    lines = [
        *(
            [
                f"encoder, {direction.replace('+', ' + ')}",
                f"packed plain PyTorch {against('encoder', 'plain', direction)}, "
                f"padded {against('encoder', 'padded', direction)}, "
                f"dense over all genes {against('encoder', 'dense', direction)}",
            ]
            for direction in ("forward", BOTH)
        ),
        [
            "BERT and `nn.TransformerEncoder`, as they are",
            f"padded {against('drop-in', 'padded', 'forward', BOTH)}, "
            f"a cell at a time {against('drop-in', 'plain', 'forward', BOTH)}",
        ],
        [
            "pre-training step",
            f"the same network without the exact savings {against('step', 'auto-encoder, plain')}, "
            f"dense auto-encoder {against('step', 'dense auto-encoder')}",
        ],
        [f"`embed`, file to file, {embed[0]['case'].split(', ')[1]}", f"{speeds}; above the model {peaks}"],
    ]
    encoder = [row for row in report if row["benchmark"] == "encoder"]
    sizes, dtypes = (list(dict.fromkeys(row[name] for row in encoder)) for name in ("preset", "dtype"))
    padded = {row["preset"] for row in encoder if row["provider"] == "padded"}
    alone = " and ".join(size for size in sizes if size not in padded)
    table = markdown_table(["measured", "how many times as long others take"], lines).replace("---:", "---")
    return (
        f"{table}\n\n"
        f"Lowest to highest of {', '.join(sizes[:-1])} and {sizes[-1]}, {' and '.join(dtypes)}, lengths of real cells; "
        f"{alone} was not run padded. Packed and padded PyTorch are what one would run; a dense model is not. "
        f"{DAGGER} extrapolated from a layer where all would take too long. {_where(report)} `embed`: "
        f"{embed[0]['date']}, speed and memory.\n"
    )


def _memory(rows: Rows) -> str:
    body = [[f"{int(row['cells']):,}", f"{float(row['peak_mib']):,.0f} MiB"] for row in rows]
    title = f"## Memory of `embed`\n\nFrom h5ad to h5ad ({rows[0]['case']}):"
    return f"{title}\n\n" + markdown_table(["cells", "peak above the loaded model"], body)


def _ops(title: str, *, share: str = "gemm") -> Callable[[Rows], str]:
    """share: what the last column compares with, "gemm" or "copy"; "" for no such column."""

    def section(rows: Rows) -> str:
        last = {"gemm": "share of GEMM rate", "copy": "share of copy rate"}.get(share, "")
        header = ["case", "dtype", "direction", "time", "against plain PyTorch", last]
        body = [
            [
                r["case"], r["dtype"], r["direction"].replace("+", " + "), _milliseconds(r["median_ms"]),
                f"{float(r['speedup']):.2f}x", f"{100 * float(r[f'share_of_{share}']):.0f} %" if share else "",
            ]
            for r in rows
            if r["provider"] == "xtg"
        ]  # fmt: skip
        if not share:
            header, body = header[:-1], [line[:-1] for line in body]
        others = [
            f"{r['provider']} {r['case']} {r['dtype']} {float(r['speedup']):.2f}x"
            for r in rows
            if r["provider"] not in ("xtg", "plain") and r["direction"] == "forward"
        ]
        more = f"\n\nOther forms, forward, against the same plain PyTorch: {'; '.join(others)}." if others else ""
        return f"## {title}\n\n" + markdown_table(header, body) + more

    return section


def _report(rows: Rows) -> str:
    """The headline of `xtrimogene bench`."""
    flops, quick = rows[0], rows[0]["quick"] == "True"
    found = [{name: _value(text) for name, text in row.items() if text} for row in rows]
    made = summary_tables(Report(found, {}, {}, "", int(flops["genes"]), QUICK if quick else FULL, quick))
    mean = int(flops["tokens"]) / int(flops["cells"])
    return "\n\n".join(
        [
            "## Against what one would run, and against dense Transformers",
            f"Of the same width and depth (`xtrimogene bench`, {int(flops['cells']):,} cells with {mean:,.0f} of "
            f"{int(flops['genes']):,} genes on average):",
            *(f"{markdown_table(table.header, table.body)}\n\n{table.how}" for table in made),
            "The whole report, with every model, part and curve: `benchmarks/results/report/report.md`.",
        ]
    )


def _measured_twice(encoder: Rows, report: Rows) -> str:
    """Why one case has two ratios: the forward of 3m in both files of results, with the rates that they had."""
    header = ["3m, forward", "cells", "genes a cell", "`torch.mm`", "ours", "packed plain PyTorch", "ratio"]
    runs = [
        {(row["dtype"], row["provider"]): row for row in rows if row["case"] == case and row["direction"] == "forward"}
        for rows, case in (
            (encoder, "3m, 8 cells"),
            ([row for row in report if row["benchmark"] == "encoder"], "3m, 4 cells"),
        )
    ]
    if not all(runs):
        return ""
    body = [
        [
            f"{ours['date']}, {dtype}", ours["cells"], f"{int(ours['tokens']) / int(ours['cells']):,.0f}",
            *(f"{float(x):,.0f} GFLOP/s" for x in (ours["gemm_gflops"], ours["gflops"], run[dtype, "plain"]["gflops"])),
            f"{float(ours['speedup']):.2f}x",
        ]
        for run in runs
        for (dtype, provider), ours in run.items()
        if provider == "xtg"
    ]  # fmt: skip
    rates = [float(run["bfloat16", "xtg"]["gemm_gflops"]) for run in runs]
    return (
        "## Why 3m has two ratios\n\nThe first table and the one above have the same baseline, but other cells and "
        "another machine, of the same name:\n\n"
        f"{markdown_table(header, body)}\n\n"
        f"On the later one `torch.mm` ran at {rates[1] / rates[0]:.2f} of the rate in bfloat16, and our kernels lost "
        "more than packed plain PyTorch. Why that machine was slower is not known. The README shows the later run."
    )


def _value(text: str) -> str | float | bool:
    """What stood in a row before it was written to a CSV file."""
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text


def _favor_memory(rows: Rows) -> str:
    header = [
        "dtype",
        "direction",
        "output and gradients",
        "peak",
        "peak of the einsum form",
        "share of what comes on top",
    ]
    plain = {(r["dtype"], r["direction"]): r for r in rows if r["provider"] == "plain"}
    body = [
        [
            r["dtype"], r["direction"].replace("+", " + "),
            *(
                f"{float(mib):,.0f} MiB"
                for mib in (r["results_mib"], r["peak_mib"], plain[r["dtype"], r["direction"]]["peak_mib"])
            ),
            f"{100 * float(r['share_of_plain']):.1f} %",
        ]
        for r in rows
        if r["provider"] == "xtg"
    ]  # fmt: skip
    title = f"## Memory of linear attention\n\nAbove its inputs, {rows[0]['case']}:"
    return f"{title}\n\n" + markdown_table(header, body)


def _pack(rows: Rows) -> str:
    header = ["packer", "cells/s"]
    names = {"xtg": "C++", "numpy": "NumPy (without the extension)"}
    body = [[names[r["provider"]], f"{float(r['cells_per_second']):,.0f}"] for r in rows]
    return f"## Packing\n\nCSR rows in memory ({rows[0]['case']}):\n\n" + markdown_table(header, body)


def _loader(rows: Rows) -> str:
    names = {"xtg": "", "numpy": " (NumPy, without the extension)"}
    body = [[r["case"] + names[r["provider"]], f"{float(r['cells_per_second']):,.0f}"] for r in rows]
    title = "## Masked batches\n\nCells of 2,000 expressed genes, no model:"
    return f"{title}\n\n" + markdown_table(["what", "cells/s"], body)


def _embed(rows: Rows) -> str:
    header = ["cells, model, dtype asked for", "dtype", "cells/s", "in the encoder", "packing", "reading"]
    body = [
        [r["case"], r["dtype"], f"{float(r['cells_per_second']):,.0f}"]
        + [f"{100 * float(r[f'{part}_share']):.1f} %" for part in ("encoder", "packing", "reading")]
        for r in rows
    ]
    return "## `embed`, file to file\n\n" + markdown_table(header, body)


def _savings(rows: Rows) -> str:
    plain = {r["case"]: int(r["flops_counted"]) for r in rows if r["provider"] == "auto-encoder, plain"}
    body = [
        [r["case"], f"{int(r['flops_counted']):,}", f"{100 * int(r['flops_counted']) / plain[r['case']]:.1f} %"]
        for r in rows
        if r["provider"] == "auto-encoder"
    ]
    title = "## Exact savings of the decoder\n\nFLOPs of a training step counted by FlopCounterMode, 19,266 positions"
    return f"{title}:\n\n" + markdown_table(["model, cells", "FLOPs", "of the network as it is written down"], body)


def _step(rows: Rows) -> str:
    header = ["model, cells", "dtype", "seconds a cell", "against the reference backend", "peak memory a cell"]
    body = [
        [
            r["case"], r["dtype"], f"{1 / float(r['cells_per_second']):.3g}",
            f"{float(r['speedup']):.2f}x" if r["speedup"] else "", f"{float(r['peak_mib']):,.0f} MiB",
        ]
        for r in rows
        if r["provider"] == "xtg"
    ]  # fmt: skip
    title = (
        "## A pre-training step\n\nCells of 2,000 expressed genes, 19,266 positions, memory above weights, gradients"
    )
    return f"{title} and optimizer:\n\n" + markdown_table(header, body)


def _dropout(rows: Rows) -> str:
    header = ["what", "dtype", "without dropout", "0.1 costs", "quartiles", "commit"]
    without = {(r["case"], r["dtype"], r["commit"]): r["median_ms"] for r in rows if r["provider"] == "dropout 0"}
    body = [
        [
            r["case"], r["dtype"], _milliseconds(without[r["case"], r["dtype"], r["commit"]]),
            f"{r['cost_percent']} %", f"{r['cost_q25_percent']} to {r['cost_q75_percent']} %", r["commit"],
        ]
        for r in rows
        if r["provider"] == "dropout 0.1"
    ]  # fmt: skip
    title = (
        "## Dropout\n\nForward and backward with and without, in turns, CPU time. A row is of the commit that it names"
    )
    *before, _ = dict.fromkeys(r["commit"] for r in rows)
    theirs = "".join(f"; {commit} still had PyTorch's dropout" for commit in before)
    return f"{title}{theirs}:\n\n" + markdown_table(header, body)


def _ranks(rows: Rows) -> str:
    header = ["processes", "time of a step", "largest difference of the loss curve"]
    body = [[r["provider"], _milliseconds(r["median_ms"]), r["error"]] for r in rows]
    return f"## Two processes\n\nAgainst one, the same batches ({rows[0]['case']}):\n\n" + markdown_table(header, body)


def accelerated(results: Path = RESULTS) -> str:
    """Cells per second of other people's models: as they are with PyTorch's best setting, accelerated, packed."""
    rows = read_rows(results / "accelerated.csv")
    ways = ("accelerate", "accelerate, padded_rows=False", "packed")
    found = {(r["case"], r["dtype"], r["direction"], r["provider"]): r for r in rows}
    body = []
    for case in dict.fromkeys(key[:3] for key in found):
        best = max(float(r["cells_per_second"]) for key, r in found.items() if key[:3] == case and "as it is" in key[3])
        ours = [found.get((*case, way)) for way in ways]
        body.append(
            [
                case[0], case[1], {"forward": "inference"}.get(case[2], "training step"), f"{best:.3g}",
                *(f"{float(r['cells_per_second']):.3g} ({float(r['speedup']):.2f}x)" if r else "" for r in ours),
            ]
        )  # fmt: skip
    header = ["model", "dtype", "what", "as it is", "`accelerate`", "`padded_rows=False`", "packed all the way"]
    return (
        f"{markdown_table(header, body)}\n\n"
        "Cells/s of embeddings and encoder, in the published width, with so few layers that the run takes minutes; "
        "cells at evenly spaced ranks of real lengths, cut where the model cuts. As it is: the faster of PyTorch with "
        "and without its fused inference path. UCE attends to padding, which has to be computed. No dropout. "
        f"{_where(rows)}\n"
    )


# The embedding is no matrix product of its tokens: few of them have values of their own.
SECTIONS: dict[str, Callable[[Rows], str]] = {
    "report/results": _report,
    "memory": _memory,
    "embed": _embed,
    "encoder": _ops("Layers of the encoder\n\nCells of real lengths:"),
    "attention": _ops("Attention\n\n12 heads of 64 channels, as in the 100m model:"),
    "favor": _ops("Linear attention (FAVOR+)\n\n8 heads of 64 channels and 266 features, against its einsum form:"),
    "favor_memory": _favor_memory,
    "embedding": _ops("Embedding of expression values\n\n768 channels, UMI-like counts:", share=""),
    "gather": _ops("Rows of the decoder\n\n`masked_decoder_gather`, 19,264 genes a cell:", share="copy"),
    "head": _ops("Final norms and head\n\n`masked_head` at the chosen genes of 19,264:", share=""),
    "pack": _pack,
    "loader": _loader,
    "step": _step,
    "dropout": _dropout,
    "savings": _savings,
    "ranks": _ranks,
}


PAGES: dict[str, Callable[[], str]] = {
    "README.md": headline,
    "docs/benchmarks.md": tables,
    "docs/tutorials/ragged.md": accelerated,
}


def _milliseconds(text: str) -> str:
    value = float(text)
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:,.0f}x"


def _where(rows: Rows) -> str:
    first = rows[0]
    quick = " Quick shapes: not for comparison." if first["quick"] == "True" else ""
    # A part that a later change concerned may have been measured again.
    commits = list(dict.fromkeys((row["commit"], row["dirty"] == "True") for row in rows))
    at = ", ".join(commit + " with changes that are not committed" * dirty for commit, dirty in commits)
    return (
        f"Measured on {first['date']} at commit{'s' * (len(commits) > 1)} {at}: {first['machine']}, "
        f"{first['isa']} kernels, {first['threads']} thread{'s' * (first['threads'] != '1')}, "
        f"torch {first['torch']}.{quick}"
    )


def main() -> None:
    """Rewrites the pages in place."""
    for name, made in PAGES.items():
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8"), made()), encoding="utf-8")


if __name__ == "__main__":
    main()
