"""The figures of README.md and the tables of docs/benchmarks.md are made from the files of results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import readme
from xtrimogene.bench.rows import write_csv

WHERE = {"machine": "M", "isa": "avx2", "threads": 2, "torch": "2", "commit": "abc", "dirty": False, "date": "D"}


def test_tables_are_made_from_the_files_alone(tmp_path: Path) -> None:
    text = f"before\n{readme.OPENING}\nold\n{readme.CLOSING}\nafter\n"
    empty = f"before\n{readme.OPENING}\n{readme.CLOSING}\nafter\n"
    assert readme.with_tables(text, readme.tables(tmp_path)) == empty
    row = {"case": "cells, 3m", "cells": 2000, "peak_mib": 123.4, "quick": False, **WHERE}
    write_csv(tmp_path / "memory.csv", [row])
    made = readme.with_tables(text, readme.tables(tmp_path))
    assert "| 2,000 | 123 MiB |" in made
    assert "old" not in made
    assert readme.with_tables(made, readme.tables(tmp_path)) == made
    with pytest.raises(ValueError, match="markers"):
        readme.with_tables("no markers", "")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A report of two sizes, the larger not padded and beside an extrapolated dense model; memory, embed."""

    def timed(
        benchmark: str, preset: str, provider: str, ms: float, direction: str, cells: int, **more: object
    ) -> dict:
        case = f"{preset}, {cells} cells"
        return {
            "benchmark": benchmark, "case": case, "preset": preset, "provider": provider, "cells": cells, "tokens": 100,
            "dtype": "float32", "direction": direction, "median_ms": ms, "quick": False, **WHERE, **more,
        }  # fmt: skip

    rows = []
    for direction in ("forward", "backward", "forward+backward"):
        for preset, cells, ours in (("3m", 4, 40.0), ("10m", 1, 50.0)):
            rows += [
                timed("encoder", preset, "xtg", ours, direction, cells),
                timed("encoder", preset, "plain", 1.5 * ours if preset == "3m" else 1.25 * ours, direction, cells),
                timed("dense", preset, "dense", 1000.0, direction, 1, extrapolated=preset == "10m"),
                timed("dense", preset, "dense auto-encoder", 3000.0, direction, 1, extrapolated=False),
            ]
        rows += [timed("encoder", "3m", "padded", 100.0, direction, 4)]
        rows += [
            timed("drop-in", "", name, ms, direction, 2)
            for name, ms in (("xtg", 10.0), ("padded", 14.0), ("plain", 11.0))
        ]
    for provider, ms in (("auto-encoder", 100.0), ("auto-encoder, plain", 130.0)):
        rows.append(timed("step", "3m", provider, ms, "training step", 2))
    (tmp_path / "report").mkdir()
    write_csv(tmp_path / "report" / "results.csv", rows)
    write_csv(tmp_path / "memory.csv", [{"cells": n, "peak_mib": 200.0 + n / 100, **WHERE} for n in (500, 4000)])
    write_csv(
        tmp_path / "embed.csv", [{"case": "c, 3m, float32", "dtype": "float32", "cells_per_second": 99.6, **WHERE}]
    )
    return tmp_path


def test_the_headline_has_what_one_would_run_beside_what_is_dense(results: Path) -> None:
    table, how = readme.headline(results).split("\n\n")
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    # By cell: 3m takes 10 ms forward, a dense cell 1,000 ms, a step's cell 50 ms.
    ways = "packed plain PyTorch 1.25x to 1.50x, padded 2.50x, dense over all genes 20x to 100x\N{DAGGER}"
    assert lines == [
        ["encoder, forward", ways],
        ["encoder, forward + backward", ways],
        ["BERT and `nn.TransformerEncoder`, as they are", "padded 1.40x, a cell at a time 1.10x"],
        ["pre-training step", "the same network without the exact savings 1.30x, dense auto-encoder 60x"],
        ["`embed`, file to file, 3m",
         "100 cells/s in float32; above the model 205 MiB for 500 cells, 240 MiB for 4,000 cells"],
    ]  # fmt: skip
    assert "3m and 10m, float32, lengths of real cells; 10m was not run padded." in how


def test_rows_of_several_commits_are_told_apart(tmp_path: Path) -> None:
    def rows(commit: str, dirty: bool, cost: float) -> list[dict]:
        row = {"case": "step", "dtype": "float32", "median_ms": 200.0, "quick": False, **WHERE}
        row |= {"commit": commit, "dirty": dirty}
        more = {"cost_percent": cost, "cost_q25_percent": 1.0, "cost_q75_percent": 9.0}
        return [{**row, "provider": "dropout 0"}, {**row, "provider": "dropout 0.1", **more}]

    write_csv(tmp_path / "dropout.csv", [*rows("abc", True, 5.0), *rows("def", False, 2.0)])
    made = readme.tables(tmp_path)
    assert "A row is of the commit that it names; abc still had PyTorch's dropout:" in made
    assert "| step | float32 | 200 ms | 2.0 % | 1.0 to 9.0 % | def |" in made
    assert "at commits abc with changes that are not committed, def: M" in made
    write_csv(tmp_path / "dropout.csv", rows("def", False, 2.0))
    made = readme.tables(tmp_path)
    assert "A row is of the commit that it names:" in made
    assert "at commit def: M" in made


def test_a_case_that_was_measured_twice_is_explained_with_both_runs(results: Path) -> None:
    def rows(provider: str, cells: int, gemm: float, gflops: float, speedup: float) -> list[dict]:
        return [
            {
                "benchmark": "encoder", "case": f"3m, {cells} cells",
                "cells": cells, "tokens": 1000 * cells,
                "dtype": dtype, "direction": "forward", "provider": provider,
                "gemm_gflops": gemm, "gflops": gflops, "speedup": speedup,
            }
            for dtype in ("float32", "bfloat16")
        ]  # fmt: skip

    early = [{**row, "date": "A"} for row in (*rows("plain", 8, 800.0, 100.0, 1.0), *rows("xtg", 8, 800.0, 300.0, 3.0))]
    late = [{**row, "date": "B"} for row in (*rows("plain", 4, 200.0, 90.0, 1.0), *rows("xtg", 4, 200.0, 180.0, 2.0))]
    told = readme._measured_twice(*([{k: str(v) for k, v in row.items()} for row in rows] for rows in (early, late)))
    assert "| A, float32 | 8 | 1,000 | 800 GFLOP/s | 300 GFLOP/s | 100 GFLOP/s | 3.00x |" in told
    assert "| B, bfloat16 | 4 | 1,000 | 200 GFLOP/s | 180 GFLOP/s | 90 GFLOP/s | 2.00x |" in told
    assert "ran at 0.25 of the rate in bfloat16" in told
    assert readme._measured_twice([], []) == ""
