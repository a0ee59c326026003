"""The day a GPU is there: python -m benchmarks.gpu [--quick] [--out FOLDER] [--device cpu]

Checks every op on the device against float64, runs the op tests there and compute-sanitizer where there is one, tunes
the launch configs, times the ops beside what others offer, and measures the 100m encoder and a pre-training step.
Writes gpu.csv, gpu.md, gpu.png and the tuned configs into the folder. Cut off at any moment, the same command goes on
with what is missing. --quick is done within ten minutes: what does not fit is left to the next call. --device cpu is a
rehearsal: the same steps with tiny shapes, the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICK_MINUTES = 9.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; 1 when anything was wrong, 3 when time ran out first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and runs: ten minutes at most")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal with tiny shapes")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: build/gpu, in a rehearsal build/rehearsal")
    parser.add_argument("--fresh", action="store_true", help="start over")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        # Read when a kernel is decorated, so it has to be there from the start.
        command = [sys.executable, "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.call(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU found by this torch; --device cpu rehearses")
    from benchmarks.gpu import report, session, work
    from xtrimogene.bench.rows import read_rows

    folder = options.out or ROOT / "build" / ("gpu" if options.device == "cuda" else "rehearsal")
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    here = session.machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in here.items()), flush=True)
    minutes = QUICK_MINUTES if options.quick and options.device == "cuda" else None
    try:
        left = session.go(work.plan_of(options.device, options.quick), options.device, folder, here, minutes)
    except ValueError as error:
        parser.error(str(error))
    rows = read_rows(folder / "gpu.csv")
    report.write(rows, folder)
    print(
        f"{folder / 'gpu.csv'}, gpu.md and gpu.png are written"
        + (f"; {left} items are left: run again" if left else "")
    )
    return 1 if any(session.wrong(row) for row in rows) else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
