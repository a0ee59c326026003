"""Writes the measured tables of README.md (the headline) and docs/benchmarks.md (all): python -m benchmarks.readme"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import RESULTS
from xtrimogene.bench.document import markdown_table
from xtrimogene.bench.report import Report, summary_table
from xtrimogene.bench.rows import Rows, read_rows
from xtrimogene.bench.sizes import FULL, QUICK

ROOT = Path(__file__).parents[1]
OPENING, CLOSING = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def with_tables(text: str, results: Path = RESULTS, names: Sequence[str] = ()) -> str:
    """The text with what stands between the two markers made anew: tables of these results, of all without names.

    A result that is not there makes no table.
    """
    parts = []
    for name, section in SECTIONS.items():
        if names and name not in names:
            continue
        path = results / f"{name}.csv"
        if path.is_file():
            rows = read_rows(path)
            parts += [section(rows), _where(rows)]
    body = "".join(f"{part}\n\n" for part in parts).removesuffix("\n")
    found = re.compile(f"{OPENING}\n.*?{CLOSING}", flags=re.DOTALL)
    if not found.search(text):
        raise ValueError(f"expected the markers {OPENING} and {CLOSING}, got a text without them")
    return found.sub(lambda _: f"{OPENING}\n{body}{CLOSING}", text)


def _memory(rows: Rows) -> str:
    body = [[f"{int(row['cells']):,}", f"{float(row['peak_mib']):,.0f} MiB"] for row in rows]
    title = f"**Memory of `embed`**, h5ad to h5ad ({rows[0]['case']}):"
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
        return f"**{title}\n\n" + markdown_table(header, body) + more

    return section


def _report(rows: Rows) -> str:
    """The headline of `xtrimogene bench`."""
    flops, quick = rows[0], rows[0]["quick"] == "True"
    found = [{name: _value(text) for name, text in row.items() if text} for row in rows]
    table = summary_table(Report(found, {}, {}, "", int(flops["genes"]), QUICK if quick else FULL, quick))
    mean = int(flops["tokens"]) / int(flops["cells"])
    return (
        "**Against dense Transformers** of the same width and depth over all genes (`xtrimogene bench`, "
        f"{int(flops['cells']):,} cells with {mean:,.0f} of {int(flops['genes']):,} genes on average):\n\n"
        f"{markdown_table(table.header, table.body)}\n\n{table.how}\n\n"
        "The whole report, with every model, part and curve: "
        "`benchmarks/results/report/report.md`."
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
    title = f"**Memory of linear attention** above its inputs, {rows[0]['case']}:"
    return f"{title}\n\n" + markdown_table(header, body)


def _pack(rows: Rows) -> str:
    header = ["packer", "cells/s"]
    names = {"xtg": "C++", "numpy": "NumPy (without the extension)"}
    body = [[names[r["provider"]], f"{float(r['cells_per_second']):,.0f}"] for r in rows]
    return f"**Packing** CSR rows in memory ({rows[0]['case']}):\n\n" + markdown_table(header, body)


def _loader(rows: Rows) -> str:
    names = {"xtg": "", "numpy": " (NumPy, without the extension)"}
    body = [[r["case"] + names[r["provider"]], f"{float(r['cells_per_second']):,.0f}"] for r in rows]
    title = "**Masked batches** of cells of 2,000 expressed genes, no model:"
    return f"{title}\n\n" + markdown_table(["what", "cells/s"], body)


def _embed(rows: Rows) -> str:
    header = ["cells, model, dtype asked for", "dtype", "cells/s", "in the encoder", "packing", "reading"]
    body = [
        [r["case"], r["dtype"], f"{float(r['cells_per_second']):,.0f}"]
        + [f"{100 * float(r[f'{part}_share']):.1f} %" for part in ("encoder", "packing", "reading")]
        for r in rows
    ]
    return "**`embed`, file to file**\n\n" + markdown_table(header, body)


def _savings(rows: Rows) -> str:
    plain = {r["case"]: int(r["flops_counted"]) for r in rows if r["provider"] == "auto-encoder, plain"}
    body = [
        [r["case"], f"{int(r['flops_counted']):,}", f"{100 * int(r['flops_counted']) / plain[r['case']]:.1f} %"]
        for r in rows
        if r["provider"] == "auto-encoder"
    ]
    title = "**Exact savings of the decoder**, FLOPs of a training step counted by FlopCounterMode, 19,266 positions"
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
    title = "**A pre-training step**, cells of 2,000 expressed genes, 19,266 positions, memory above weights, gradients"
    return f"{title} and optimizer:\n\n" + markdown_table(header, body)


def _ranks(rows: Rows) -> str:
    header = ["processes", "time of a step", "largest difference of the loss curve"]
    body = [[r["provider"], _milliseconds(r["median_ms"]), r["error"]] for r in rows]
    return f"**Two processes** against one, the same batches ({rows[0]['case']}):\n\n" + markdown_table(header, body)


# The embedding is no matrix product of its tokens: few of them have values of their own.
SECTIONS: dict[str, Callable[[Rows], str]] = {
    "report/results": _report,
    "memory": _memory,
    "embed": _embed,
    "encoder": _ops("Layers of the encoder**, cells of real lengths:"),
    "attention": _ops("Attention**, 12 heads of 64 channels, as in the 100m model:"),
    "favor": _ops("Linear attention (FAVOR+)**, 8 heads of 64 channels and 266 features, against its einsum form:"),
    "favor_memory": _favor_memory,
    "embedding": _ops("Embedding of expression values**, 768 channels, UMI-like counts:", share=""),
    "gather": _ops("Rows of the decoder** (`masked_decoder_gather`), 19,264 genes a cell:", share="copy"),
    "head": _ops("Final norms and head** (`masked_head`) at the chosen genes of 19,264:", share=""),
    "pack": _pack,
    "loader": _loader,
    "step": _step,
    "savings": _savings,
    "ranks": _ranks,
}


# Page: the results whose tables it shows, none for all.
PAGES: dict[str, tuple[str, ...]] = {"README.md": ("report/results",), "docs/benchmarks.md": ()}


def _milliseconds(text: str) -> str:
    value = float(text)
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _where(rows: Rows) -> str:
    first = rows[0]
    dirty = ", with changes that are not committed" if first["dirty"] == "True" else ""
    quick = " Quick shapes: not for comparison." if first["quick"] == "True" else ""
    # A part that a later change concerned may have been measured again.
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    at = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return (
        f"Measured on {first['date']} at {at}{dirty}: {first['machine']}, {first['isa']} kernels, "
        f"{first['threads']} threads, torch {first['torch']}.{quick}"
    )


def main() -> None:
    """Rewrites the pages in place."""
    for name, names in PAGES.items():
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8"), names=names), encoding="utf-8")


if __name__ == "__main__":
    main()
