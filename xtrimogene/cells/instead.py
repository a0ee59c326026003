"""Which other matrix of a data set would do where the one that was asked for holds scaled numbers."""

from __future__ import annotations

import contextlib

import numpy as np

from xtrimogene.cells.sources import CellSource

_ROWS = 64
# log1p of a count / total * 10,000 is below this by far, and so is that of any count.
_LARGEST_LOG = 25


def matrix_instead(source: CellSource) -> str:
    """ "; ..." that names a layer of counts, else one of logarithms, and the options that read it; "" for none.

    Judged by its first cells.
    """
    logged = ""
    for other in source.other_layers:
        with contextlib.suppress(ValueError, OSError), source.open_layer(other) as matrix:
            data = matrix.read_rows(0, min(_ROWS, matrix.n_obs))[2]
            name, option = ("X (no layer)", "") if other is None else (f"layer={other!r}", f"--layer {other}")
            if not len(data) or not np.isfinite(data).all() or data.min() < 0:
                continue
            if np.array_equal(data, np.rint(data)):
                return f"; {name} holds counts: {option or 'leave --layer out'}"
            if data.max() < _LARGEST_LOG and not logged:
                options = f"{option} --normalized".strip()
                logged = f"; {name} looks log-normalised: {name}, normalized=True ({options})"
    return logged
