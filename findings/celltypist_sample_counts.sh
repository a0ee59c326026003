#!/usr/bin/env bash
# The sample of raw counts that celltypist ships is not of whole numbers.
#
# celltypist/data/samples/sample_cell_by_gene.csv (560 lines, 559 cells x 32,786 genes) is offered by
# celltypist.samples.get_sample_csv() as a table of raw counts. Expected: whole numbers. Seen in celltypist 1.7.1: numbers
# such as 0.999999999999999 and 3.00000000000001, up to 1e-11 off, as are left when normalised values are turned back. A
# reader that asks whether all values equal their integer part takes the table for fractions or refuses it, and one that
# cuts to integers loses counts. What follows: compare counts with rounding and a tolerance.
#
# Output seen:
#   values that are not whole: yes; farther than 1e-6 from whole: 0
#   counts lost by cutting to integers: yes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy==2.3.5 pandas==2.3.3
"$folder/venv/bin/python" -m pip install --quiet --no-deps --target "$folder/celltypist" celltypist==1.7.1
"$folder/venv/bin/python" - "$folder/celltypist/celltypist/data/samples/sample_cell_by_gene.csv" <<'PYTHON'
import sys

import numpy as np
import pandas as pd

counts = pd.read_csv(sys.argv[1], index_col=0).to_numpy()
whole = np.rint(counts)
fractional, far = int((counts != whole).sum()), int((abs(counts - whole) > 1e-6).sum())
lost = int((whole - np.trunc(counts)).sum())
print(f"values that are not whole: {'yes' if fractional else 'no'}; farther than 1e-6 from whole: {far}")
print(f"counts lost by cutting to integers: {'yes' if lost else 'no'}")
print(f"{counts.shape[0]:,} cells, {fractional:,} values that are not whole, {lost:,} counts lost", file=sys.stderr)
assert counts.shape == (559, 32786) and fractional and lost and not far
PYTHON
