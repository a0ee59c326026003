"""`xtrimogene bench`: its counts by hand on a small case, its cells, and a tiny run through the command line."""

from __future__ import annotations

import base64
import dataclasses
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import readme
from tests import warm
from xtg_kernels import RaggedBatch
from xtrimogene.bench import (
    baselines,
    bench,
    cases,
    costs,
    counting,
    duration,
    memory,
    report,
    sizes,
    steps,
    tasks,
    timings,
)
from xtrimogene.bench.cells import Cells, cells_of_file, known_cells
from xtrimogene.bench.pretraining import prepared
from xtrimogene.bench.rows import read_rows
from xtrimogene.bench.runner import measure, right
from xtrimogene.cells.masking import MaskingConfig, mask_cells
from xtrimogene.cli import main
from xtrimogene.model import XTrimoGene
from xtrimogene.network.config import XTrimoGeneConfig
from xtrimogene.network.vocabulary import Vocabulary

GENES = 120
RECORDED = Path(__file__).parents[3] / "benchmarks" / "results" / "report"
DIRECTIONS = ("forward", "forward+backward")
TINY = sizes.Size(
    cells=3,
    shorter=10,
    task_gflop=1.0,
    full_seconds=5.0,
    expressed=(10, 20, 40),
    rounds=2,
    step_gflop=4.0,
    exact_gflop=4.0,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 cells of up to 70 of 120 genes, the third one empty."""
    rng = np.random.default_rng(0)
    dense = rng.zipf(2.0, (30, GENES)).clip(max=50) * (rng.random((30, GENES)) < rng.uniform(0.1, 0.5, (30, 1)))
    dense[2] = 0
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    genes = pd.DataFrame(index=[f"G{i}" for i in range(GENES)])
    anndata.AnnData(sp.csr_matrix(dense.astype(np.float32)), var=genes).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def run(path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of one run through the command line."""
    folder = tmp_path_factory.mktemp("bench") / "made"
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.setattr(sizes, "QUICK", TINY)
    patch.setattr(bench, "SIZES", ("3m",))
    patch.setattr(counting, "prepared", lambda *_: prepared("tiny", 2, expressed=60))
    patch.setattr("xtrimogene.bench.runner.GEMM_SIZE", 64)
    patch.setenv("OMP_NUM_THREADS", "1")
    # Of the processes whose memory is measured.
    patch.setattr(sys, "executable", str(warm.write_command(folder.with_name("python"))))
    printed: list[str] = []
    patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    try:
        arguments = ["bench", "--quick", "--threads", "1", "--input", str(path), "--output", str(folder)]
        assert main(arguments) == 0, printed
    finally:
        patch.undo()
        torch.set_num_threads(threads)
    return folder, "\n".join(printed)


def test_flops_per_cell_by_hand() -> None:
    """The 3m model on two cells of 3 and 5 expressed genes among 10, with 2 and 4 distinct values."""
    cells = Cells("two", 10, np.asarray([3, 5]), np.asarray([2, 4]), lambda chosen: pytest.fail("no batch is needed"))
    rows = {row["provider"]: row for row in costs.flop_rows(["3m"], cells) if row["benchmark"] == "flops"}
    total = {name: row["gflop_per_cell"] * 2e9 for name, row in rows.items()}
    # 4 layers of width 128: 24 d d a token, 4 d L L a cell; a value costs 2 (b + b b + b d) with b = 100.
    layers, value = 4 * 24 * 128 * 128, 2 * (100 + 100 * 100 + 100 * 128)
    assert total["encoder"] == pytest.approx(8 * layers + 4 * 4 * 128 * (9 + 25) + 6 * value)
    assert total["padded"] == pytest.approx(10 * layers + 4 * 4 * 128 * 50 + 10 * value)
    assert total["dense"] == pytest.approx(20 * layers + 4 * 4 * 128 * 200)
    # 64 channels a head make int(64 ln 64) = 266 random features.
    assert total["performer"] == pytest.approx(20 * layers + 4 * 8 * 128 * 266 * 20)
    decoder = 2 * 24 * 128 * 128
    assert total["dense auto-encoder"] == pytest.approx(
        total["dense"] + 20 * (2 * 128 * 128 + decoder + 2 * 128) + 2 * 4 * 128 * 200
    )
    # The plain network embeds the zero of every gene that is neither encoded nor masked.
    # Chosen: round(0.9) = 1 and round(1.5) = 2 expressed genes, no other; hidden: round(0.8) = 1, round(1.6) = 2.
    assert [counts.tolist() for counts in costs.masked_counts(cells.lengths, 10)] == [[2, 3], [1, 2], [1, 2]]
    encoder = 5 * layers + 4 * 4 * 128 * (4 + 9)
    favor = 4 * 128 * 266
    plain = 20 * (2 * 128 * 128 + decoder + 2 * 128) + 2 * 2 * 20 * favor
    assert total["auto-encoder, plain"] == pytest.approx(encoder + 5 * value + (20 - 5 - 3) * value + plain)
    # Savings: 10 + 5 + 2 rows through the bridge; first layer 10 + 5 + 3 distinct rows; last layer 3 asked ones.
    first = 18 * 6 + 20 * (2 + 16)
    last = 3 * 2 + 20 * 4 + 3 * (2 + 16)
    saved = 17 * 2 * 128 * 128 + (first + last) * 128 * 128 + (40 + 20 + 3) * favor + 3 * 2 * 128
    assert total["auto-encoder"] == pytest.approx(encoder + (2 + 3) * value + value + saved)
    assert rows["encoder"]["share_of_dense"] == pytest.approx(total["encoder"] / total["dense"])
    for row in rows.values():
        parts = [value for name, value in row.items() if name.startswith("gflop_") and name != "gflop_per_cell"]
        assert sum(parts) == pytest.approx(row["gflop_per_cell"])
    for part, flops in (("bridge", 2 * 128 * 128), ("decoder linear", decoder), ("head", 2 * 128)):
        assert rows["dense auto-encoder"][f"gflop_{part}"] * 2e9 == pytest.approx(20 * flops)


def test_counting_without_arithmetic_counts_the_same_and_the_plain_network_is_the_same() -> None:
    model, masked = prepared("tiny", 2, expressed=60)
    with FlopCounterMode(display=False) as counter:
        loss = model.loss(masked)
        loss.backward()
    assert counting.counted(lambda: model.loss(masked).backward()) == counter.get_total_flops() > 0
    torch.testing.assert_close(baselines.plain_loss(model, masked), loss, rtol=1e-5, atol=0)


def test_savings_are_counted_and_equal_their_closed_forms() -> None:
    plain, ours = counting.savings(quick=True)
    assert plain["correct"]
    assert ours["correct"]
    assert 0.3 < ours["flops_counted"] / plain["flops_counted"] < 0.9


def test_masked_counts_are_those_of_the_masks(path: Path) -> None:
    cells = cells_of_file(path)
    chosen = [0, 5, 9, 20]
    masked = mask_cells(cells.batch(chosen), np.asarray(chosen), MaskingConfig(), epoch=0, num_genes=GENES)
    for counts, offsets in zip(
        costs.masked_counts(cells.lengths[chosen], GENES),
        (masked.batch.cu_seqlens, masked.masked_cu_seqlens, masked.chosen_cu_seqlens),
        strict=True,
    ):
        assert counts.tolist() == offsets.diff().tolist()


def test_cells_of_a_file(path: Path) -> None:
    matrix = anndata.read_h5ad(path).X.tocsr()
    kept = [i for i in range(30) if i != 2]
    cells = cells_of_file(path)
    assert cells.num_genes == GENES
    assert cells.lengths.tolist() == [matrix[i].nnz for i in kept]
    assert cells.distinct.tolist() == [len(np.unique(matrix[i].data)) for i in kept]
    assert "29 cells of cells.h5ad, 120 genes (1 cells without any of them left out)" in cells.source
    batch = cells.batch([2, 0])
    assert batch.gene_ids.tolist() == [*matrix[3].indices, *matrix[0].indices]
    counts = np.concatenate([matrix[3].data / matrix[3].sum(), matrix[0].data / matrix[0].sum()])
    np.testing.assert_allclose(batch.values.numpy(), np.log1p(1e4 * counts), rtol=1e-6)
    few = cells_of_file(path, vocabulary=Vocabulary([f"G{i}" for i in range(40)]))
    assert few.lengths.tolist() == [matrix[i, :40].nnz for i in kept if matrix[i, :40].nnz]
    with pytest.raises(ValueError, match="none of the 1 vocabulary genes"):
        cells_of_file(path, vocabulary=Vocabulary(["other"]))


def test_known_cells_have_the_committed_lengths() -> None:
    cells = known_cells()
    assert len(cells.lengths) == 906
    assert ((cells.distinct > 0) & (cells.distinct <= cells.lengths)).all()
    batch: RaggedBatch = cells.batch([5, 700])
    assert batch.cu_seqlens.diff().tolist() == cells.lengths[[5, 700]].tolist()
    assert [len(cell.unique()) for cell in batch.values.split(cells.lengths[[5, 700]].tolist())] == (
        cells.distinct[[5, 700]].tolist()
    )


def test_exponents() -> None:
    assert report.exponent([(n, 7 * n**1.4) for n in (2, 30, 400)]) == pytest.approx(1.4)


@pytest.fixture
def small_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xtrimogene.bench.runner.GEMM_SIZE", 64)


@pytest.mark.usefixtures("small_gemm")
def test_one_layer_stands_for_all_where_all_take_too_long(path: Path) -> None:
    """By FLOPs, which are counted here by hand for the 3m model, of width 128, on 120 / 10 genes."""
    cells, genes = cells_of_file(path), GENES // TINY.shorter
    # Encoder: 4 layers of 24 d d n + 4 d n n. Decoder: bridge, 2 layers as wide, head. Performer: 4 layers, no ends.
    layer = 24 * 128 * 128 * genes + 4 * 128 * genes**2
    ends = (2 * 128 * 128 + 2 * 128) * genes
    ratios = {"dense": 4.0, "dense auto-encoder": (6 * layer + ends) / (2 * layer + ends), "performer": 4.0}
    for seconds, extrapolated in ((1e-4, True), (60.0, None)):
        rows = list(timings.full_length(["3m"], cells, dataclasses.replace(TINY, full_seconds=seconds), "cpu"))
        one, whole = (
            {(row["provider"], row["dtype"], row["direction"]): row for row in rows if row["benchmark"] == name}
            for name in ("dense layer", "dense")
        )
        assert len(one) == 3 * 2 * 2
        assert one.keys() == whole.keys()
        for which, row in whole.items():
            scaled = row["median_ms"] if extrapolated else row["scaled_ms"]
            # Times are written with some digits only.
            assert scaled == pytest.approx(one[which]["median_ms"] * ratios[which[0]], rel=2e-3)
            assert row.get("extrapolated") == extrapolated
            assert row["tokens"] == one[which]["tokens"] == genes
            assert row["cells_per_second"] == pytest.approx(1e3 / row["median_ms"], rel=2e-3)
            assert row["correct"]


@pytest.mark.usefixtures("small_gemm")
@pytest.mark.parametrize("long", [True, False])
def test_the_first_round_counts_where_it_is_long(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task = cases.encoder_task("3m", (9, 4), "float32", orders=())
    calls = []
    monkeypatch.setattr("xtrimogene.bench.runner.LONG_ROUND", 0.0 if long else 60.0)
    monkeypatch.setattr("xtrimogene.bench.runner._time_once", lambda *a: calls.append(a) or (len(calls), 1.0, 1.0))
    times = measure(task, ["xtg"], 0, rounds_at_least=2)
    assert times["xtg"]["forward"] == ([1, 2] if long else [2, 3])
    assert len(times["gemm"]["forward"]) == 2


def test_as_many_layers_are_checked_as_float64_can_do() -> None:
    asked: list[int | None] = []

    def make(layers: int | None = None) -> tasks.Task:
        asked.append(layers)
        return cases.encoder_task("3m", (9, 4), "float32", check_cells=1, orders=(2,), layers=layers)

    work = make().flops["forward+backward"] / 1e9
    for share, layers in ((1.01, 4), (0.6, 2), (0.0, 1)):
        asked.clear()
        task, errors, number = timings.check_layers(make, "3m", dataclasses.replace(TINY, exact_gflop=share * work))
        assert number == layers
        assert asked == ([None] if layers == 4 else [None, layers])
        # Whatever is checked, all layers are timed.
        assert task.flops["forward+backward"] == work * 1e9
        assert set(errors) == {"plain", "xtg", "padded"}
        assert all(right(found) for found in errors.values())


class _Rounded(nn.Module):
    """Right in float64 alone."""

    def __init__(self, config: XTrimoGeneConfig) -> None:
        super().__init__()
        self.encoder = baselines.PerformerEncoder(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) * (1 if x.dtype == torch.float64 else 1.2)


@pytest.mark.usefixtures("small_gemm")
def test_a_wrong_full_length_model_gets_no_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = baselines.FULL_LENGTH["performer"]._replace(build=_Rounded)
    monkeypatch.setattr(timings, "FULL_LENGTH", {"performer": wrong})
    monkeypatch.setattr(baselines, "FULL_LENGTH", {"performer": wrong})
    rows = list(timings.full_length(["3m"], cells_of_file(path), TINY, "cpu"))
    assert {row["benchmark"] for row in rows} == {"dense layer"}
    assert not any(row["correct"] or "median_ms" in row for row in rows)


def test_a_wrong_loss_or_gradient_gets_no_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written down, with a loss of another value; with the savings, one of the same value and another gradient."""
    ways = {
        "auto-encoder, plain": (lambda model, masked: 1.05 * XTrimoGene.loss(model, masked), False),
        "auto-encoder": (lambda model, masked: _wrong_gradient(XTrimoGene.loss(model, masked)), True),
    }
    monkeypatch.setattr(steps, "AUTO_ENCODERS", ways)
    rows = list(steps.step(["3m"], cells_of_file(path), TINY, "cpu"))
    assert len(rows) == 4
    assert not any(row["correct"] or "median_ms" in row for row in rows)
    for row in rows:
        loss_is_right = float(row["loss_error"]) <= row["loss_limit"]
        assert loss_is_right == (row["provider"] == "auto-encoder")


def _wrong_gradient(loss: Tensor) -> Tensor:
    return 2 * loss - loss.detach()


def test_a_run_writes_everything_and_all_of_it_is_right(run: tuple[Path, str]) -> None:
    folder, printed = run
    pictures = {"flops", "parts", "lengths", "time_by_length", "unevenness", "dropin"}
    names = {"report.html", "report.md", "results.csv"}
    names |= {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")}
    assert {file.name for file in folder.iterdir()} == names
    rows = read_rows(folder / "results.csv")
    assert all(row["correct"] == "True" and row["quick"] == "True" and row["torch"] for row in rows)
    assert {row["benchmark"] for row in rows} == {
        "flops", "flops of a cell", "flops counted", "exact savings", "encoder", "dense layer", "dense", "peak", "step",
        "length", "unevenness", "threads", "drop-in",
    }  # fmt: skip
    counted = [row for row in rows if row["benchmark"] == "flops counted"]
    assert {row["provider"] for row in counted} == set(costs.MODELS)
    saved = {row["provider"]: int(row["flops_counted"]) for row in rows if row["benchmark"] == "exact savings"}
    assert 0 < saved["auto-encoder"] < saved["auto-encoder, plain"]
    assert all(row["flops_counted"] == row["flops_closed_form"] != "" for row in counted)
    full = [row for row in rows if row["benchmark"] == "dense" and row["direction"] == "forward"]
    assert {row["provider"] for row in full} == set(baselines.FULL_LENGTH)
    assert {row["tokens"] for row in full} == {"12"}
    assert all(float(row["error"]) <= float(row["error_limit"]) for row in rows if row["error"])
    # 3m takes more than exact_gflop with all its layers only on the longest batches.
    assert {row["checked_layers"] for row in full} == {"4"}
    steps = [row for row in rows if row["benchmark"] == "step"]
    assert {(row["dtype"], row["provider"]) for row in steps} == {
        (dtype, name) for dtype in ("float32", "bfloat16") for name in counting.AUTO_ENCODERS
    }
    assert all(row["median_ms"] and row["gradient_error"] for row in steps)
    assert {row["provider"] for row in rows if row["benchmark"] == "drop-in"} == {"plain", "padded", "xtg"}
    assert "dense Transformer encoder" in printed
    assert "report.html, report.md, results.csv, pictures" in printed


def test_ratios_are_to_the_way_that_their_column_names() -> None:
    common = {"correct": True, "preset": "3m", "dtype": "float32", "case": "3m, 2 cells", "cells": 2, "tokens": 9}
    speed = {"gflops": 5.0, "share_of_gemm": 0.5, "q20_ms": 99.0, "q80_ms": 104.0, "tokens_per_second": 90.0}
    ours = {"median_ms": 100.0, "cells_per_second": 20.0, **speed, **common}
    rows = [
        {"benchmark": "encoder", "provider": "xtg", "direction": "forward", **ours},
        {"benchmark": "encoder", "provider": "plain", "direction": "forward", **ours, "median_ms": 250.0},
        {"benchmark": "step", "provider": "auto-encoder", "direction": "training step", **ours},
        {"benchmark": "step", "provider": "auto-encoder, plain", "direction": "training step", **ours,
         "median_ms": 150.0},
    ]  # fmt: skip
    for model, direction, seconds in (
        ("dense", "forward", 8.0), ("performer", "forward", 0.6), ("dense auto-encoder", "forward+backward", 30.0)
    ):  # fmt: skip
        one = {**common, "case": "3m, 120 genes", "cells": 1, "median_ms": 1e3 * seconds, **speed}
        rows.append({"benchmark": "dense", "provider": model, "direction": direction, **one})
    rows[-1]["extrapolated"] = True
    made = report.Report(rows, {}, {}, "", GENES, dataclasses.replace(TINY, shorter=1), False)
    for table, wanted in (
        (report._encoder(made), {
            "packed plain PyTorch": "2.50x", "padded": "", "dense": "160x", "Performer": "12.0x", "noise": "-1 / +4 %",
        }),
        (report._step(made), {"as written down": "1.50x", "dense auto-encoder": "600x\N{DAGGER}"}),
    ):  # fmt: skip
        (line,) = (dict(zip(table.header, line, strict=True)) for line in table.body)
        assert {name: line[name] for name in wanted} == wanted
    # Cells that were made shorter are held against no whole cell.
    (other,) = report._encoder(dataclasses.replace(made, size=TINY)).body
    assert "160x" not in other


def test_the_page_is_well_formed_and_fetches_nothing(run: tuple[Path, str]) -> None:
    text = (run[0] / "report.html").read_text(encoding="utf-8")
    page = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    links = [value for element in page.iter() for name, value in element.items() if name in ("src", "href")]
    assert links
    # Links within the page are those of its list of contents.
    for link in (link for link in links if not link.startswith("#")):
        kind, data = link.split(";base64,")
        assert kind == "data:image/svg+xml"
        svg = base64.b64decode(data).decode()
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', svg))
    # Every table says how its numbers were obtained, and every picture what it shows.
    figures = list(page.iter("figure"))
    assert len(figures) > 10
    assert all((figure.findtext("figcaption") or "").endswith(".") for figure in figures)
    tables = list(page.iter("table"))
    assert len(tables) >= 9
    for table in tables:
        widths = {len(line) for line in table.iter("tr")}
        assert len(widths) == 1


def test_both_reports_hold_the_same_numbers(run: tuple[Path, str]) -> None:
    page = ElementTree.fromstring((run[0] / "report.html").read_text().removeprefix("<!DOCTYPE html>\n"))
    text = (run[0] / "report.md").read_text()
    for element in page.iter():
        if element.tag in ("td", "p", "h2", "figcaption") and element.text:
            assert element.text in text


def test_a_quick_run_says_so_above_its_tables_and_a_list_leads_to_every_section(run: tuple[Path, str]) -> None:
    page = ElementTree.fromstring((run[0] / "report.html").read_text().removeprefix("<!DOCTYPE html>\n"))
    text = (run[0] / "report.md").read_text()
    sections = list(page.iter("section"))
    for section in sections:
        parts = ["table" if part.find(".//table") is not None else part.text or "" for part in section]
        title = parts[0]
        said = [i for i, part in enumerate(parts) if part.startswith("Quick run on small shapes")]
        # FLOPs are the same in every run, and how it was measured has no time in it.
        assert (said[:1] == [1]) == (title not in ("FLOPs per cell", "How it was measured"))
        assert f"](#{section.get('id')})" in text
    targets = [link.get("href") for link in page.iter("a")]
    assert targets == [f"#{section.get('id')}" for section in sections]
    assert run[1].index("Quick run on small shapes") < run[1].index("dense Transformer encoder")


def test_the_expected_duration_is_said_first_and_in_the_report(run: tuple[Path, str]) -> None:
    said = re.match(r"expected to take about (.*)\n", run[1])
    assert said
    assert re.fullmatch(r"[\d.]+ (s|min|h)", said[1])
    assert f"| expected to take | {said[1]} |" in (run[0] / "report.md").read_text()


def test_the_expected_duration_is_that_of_the_recorded_run_at_its_rate() -> None:
    rows = read_rows(RECORDED / "results.csv")
    timed = [row for row in rows if row["median_ms"] and row["runs"]]
    spent: dict[str, float] = {}
    for row in timed:
        series = "series" if row["benchmark"] in ("length", "unevenness", "threads") else row["preset"]
        name = "drop-in" if row["benchmark"] == "drop-in" else series
        spent[name] = spent.get(name, 0.0) + float(row["median_ms"]) * int(row["runs"])
    found = re.search(r"^\| seconds of this run \| (\d+) \|$", (RECORDED / "report.md").read_text(), flags=re.MULTILINE)
    assert found
    whole = int(found[1])
    for name, seconds in duration.RECORDED.items():
        assert seconds == round(whole * spent[name] / sum(spent.values())), name
    rates = [float(row["gemm_gflops"]) for row in timed if row["gemm_gflops"] and row["dtype"] == "float32"]
    assert float(np.median(rates)) == pytest.approx(duration.RECORDED_RATE, rel=1e-3)

    rate = duration.RECORDED_RATE
    assert duration.expected_seconds(("3m", "10m", "100m"), quick=False, rate=rate) == pytest.approx(whole, abs=3)
    assert duration.expected_seconds(("3m",), quick=False, rate=rate / 2) == pytest.approx(2 * (842 + 389 + 342))
    assert duration.expected_seconds(("3m",), quick=True, rate=rate) < 100
    # The series of a larger model cost more than those of 3m, by its layers.
    assert duration.expected_seconds(("10m",), quick=False, rate=rate) > 735 + 342 + 4 * 389
    assert [duration.in_words(seconds) for seconds in (3, 84, 100, 5000, 9000)] == [
        "10 s",
        "80 s",
        "2 min",
        "83 min",
        "2.5 h",
    ]


def test_parts_too_small_to_be_seen_are_named_with_their_share(run: tuple[Path, str]) -> None:
    drawn = ("auto-encoder, plain", "auto-encoder", "encoder")
    flops = [row for row in read_rows(run[0] / "results.csv") if row["benchmark"] == "flops"]
    rows = [row for row in flops if row["provider"] in drawn]
    shares = {
        part: max(float(row[f"gflop_{part}"]) / float(row["gflop_per_cell"]) for row in rows) for part in costs.PARTS
    }
    text = (run[0] / "report.md").read_text()
    named = re.search(r"Too small to be seen, with their largest share: (.*?)\.\]", text)
    small = {report.PART_NAMES.get(part, part) for part, share in shares.items() if share < 0.005}
    assert small == ({each.split(" (")[0] for each in named[1].split(", ")} if named else set())


def test_readme_shows_the_committed_run(run: tuple[Path, str]) -> None:
    assert readme.tables(run[0].parent / "none") == ""
    (run[0].parent / "results" / "report").mkdir(parents=True)
    (run[0].parent / "results" / "report" / "results.csv").write_bytes((run[0] / "results.csv").read_bytes())
    made = readme.tables(run[0].parent / "results")
    assert "dense Transformers" in made
    lines = [line for line in made.splitlines() if line.startswith("| 3m")]
    # FLOPs of the size, and the speed of the encoder in either dtype.
    assert len(lines) == 3
    assert all(line in (run[0] / "report.md").read_text() for line in lines)
    assert "29 cells with" in made
    assert "Quick shapes: not for comparison." in made


def test_memory_is_told_of_right_ways_and_extrapolated_by_a_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = cells_of_file(path)
    monkeypatch.setattr(
        memory, "_memory_of", lambda preset, lengths, *a: dict.fromkeys(DIRECTIONS, 5.0 + 2 * sum(lengths))
    )
    full_length = {("3m", "dense"): 4.1 * TINY.full_seconds, ("3m", "performer"): 3.9 * TINY.full_seconds}
    rows = list(memory.memory(["3m"], cells, TINY, "cpu", full_length, set()))
    assert {row["provider"] for row in rows} == {"xtg", "padded", "dense", "performer"}
    for model, extrapolated in (("dense", True), ("performer", None)):
        found = [row for row in rows if row["provider"] == model]
        assert [row["direction"] for row in found] == list(DIRECTIONS)
        assert [row["peak_mib"] for row in found] == [5.0 + 2 * 12] * 2
        assert all(row.get("extrapolated") == extrapolated for row in found)
        assert all(row.get("fit_up_to") == (3 if extrapolated else None) for row in found)
    rows = list(memory.memory(["3m"], cells, TINY, "cpu", {}, {("3m", "padded")}))
    assert {row["provider"] for row in rows} == {"xtg"}


def test_memory_is_that_of_a_process_and_grows_with_the_cell_along_a_line() -> None:
    few, some, many = (memory._memory_of("3m", (n,), "dense", "cpu") for n in (2000, 4000, 8000))
    for direction in DIRECTIONS:
        # With what the allocator keeps of freed memory, the second rise is off by 5 to 10 %.
        assert many[direction] - some[direction] == pytest.approx(2 * (some[direction] - few[direction]), rel=0.04)
    # Keeping what the backward needs of 4 layers, at least 10 rows of 128 float32 each.
    assert some["forward+backward"] > some["forward"] + 4 * 10 * 4000 * 128 * 4 / 2**20 / 2


def test_wrong_counts_end_the_run_with_an_error(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counting, "encoder_flops", lambda *a: costs.FlopCount(1, 2, 3))
    monkeypatch.setattr(bench, "_rows", lambda presets, cells, *a: counting.counted_rows(presets, cells))
    monkeypatch.setattr(bench.figures, "draw", lambda *a: {})
    monkeypatch.setattr(bench.report, "sections", lambda *a: [])
    assert main(["bench", "--quick", "--preset", "3m", "--input", str(path), "--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "wrong numbers, which got no time: flops counted, 3m, encoder\n" in message


def test_out_of_memory_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(bench, "_rows", fill)
    assert main(["bench", "--quick", "--output", str(tmp_path / "out")]) == 2
    assert "out of memory (no room); try a smaller --preset, or --quick" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--vocabulary", "genes.txt"], "--vocabulary: says how to read --input FILE, which is not given"),
        (["--input", "none.h5ad"], "none.h5ad: no such file"),
        (["--device", "abacus"], "device: expected 'auto'"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
)
def test_errors_are_one_line(
    change: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--quick", "--output", str(tmp_path / "out"), *change]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pictures_need_matplotlib_and_say_so_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench, "_rows", lambda *a: pytest.fail("measured before it was found missing"))
    assert main(["bench", "--quick", "--output", str(tmp_path / "out")]) == 2
    assert "pip install 'xtrimogene[bench]'" in capsys.readouterr().err
