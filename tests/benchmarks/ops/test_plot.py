"""The pictures: one for each file of ratios, without the rows that were wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.ops import plot
from xtrimogene.bench.rows import write_csv

WHERE = {"machine": "M", "isa": "avx2", "threads": 2, "commit": "abc"}


def _rows() -> list[dict[str, object]]:
    return [
        {"case": case, "dtype": dtype, "direction": direction, "provider": provider, "correct": True,
         "speedup": 2, **WHERE}
        for case in ("8 cells", "1 x 2048")
        for dtype in ("float32", "bfloat16")
        for direction in ("forward", "backward", "forward+backward")
        for provider in ("plain", "xtg")
    ]  # fmt: skip


def test_a_picture_is_drawn_without_wrong_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {**_rows()[0], "provider": "padded", "correct": False, "speedup": ""}
    write_csv(tmp_path / "attention.csv", [*_rows(), wrong])
    plot.main([str(tmp_path / "attention.csv"), "--out", str(tmp_path / "pictures")])
    picture = tmp_path / "pictures" / "attention.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(picture)
