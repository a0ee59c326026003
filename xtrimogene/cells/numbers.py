"""The numbers of a data set: whether they are what they are said to be, raw counts or log-normalised values."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np

from xtrimogene.cells.instead import matrix_instead
from xtrimogene.cells.sources import CellSource


def looks_like_counts(source: CellSource) -> bool:
    """Whether a sample of cells from all over the data set holds whole numbers only.

    Raises ValueError that names cell, gene and value for a negative, NaN or infinite number in the sample.
    """
    windows, rows = 8, 32
    starts = np.unique(np.linspace(0, max(0, source.n_obs - rows), windows).astype(int))
    whole = True
    for start in starts.tolist():
        indptr, indices, data = source.read_rows(start, min(start + rows, source.n_obs))
        wrong = ~np.isfinite(data) | (data < 0)
        if wrong.any():
            entry = int(np.argmax(wrong))
            row = int(np.searchsorted(indptr, entry, side="right")) - 1
            raise ValueError(
                f"{source.name}: row {start + row} ({source.cell_name(start + row)}), column {indices[entry]}: value "
                f"{data[entry]}; expected raw counts (or log-normalised values), not negative, NaN or infinite ones"
                f"{matrix_instead(source)}"
            )
        whole = whole and bool(np.all(data == np.rint(data)))
    return whole


def check_counts(source: CellSource, normalized: bool) -> None:
    """Refuse numbers that are not whole unless normalized, and say which other matrix of the data set holds counts.

    Looks at a sample of cells; warns of whole numbers that are said to be normalised.

    Raises:
        ValueError: names the data set and what to do.
    """
    counts = looks_like_counts(source)
    if normalized and counts and source.n_obs:
        warnings.warn(
            f"{source.name}: normalized=True, but the matrix holds whole numbers only, as raw counts do", stacklevel=3
        )
    if normalized or counts:
        return
    fitting = []
    for other in source.other_layers:
        with contextlib.suppress(ValueError), source.open_layer(other) as matrix:
            if looks_like_counts(matrix):
                fitting.append("X (no layer)" if other is None else f"layer={other!r} (--layer {other})")
    hint = f"these matrices hold whole numbers: {', '.join(fitting)}; " if fitting else ""
    wanted = "X" if source.layer is None else f"layer {source.layer!r}"
    raise ValueError(
        f"{source.name}: expected raw counts in {wanted}, got numbers that are not whole; {hint}"
        "if they are log1p(count / total * 10,000) already, pass normalized=True (--normalized; of pretrain, "
        "normalized=true)"
    )
