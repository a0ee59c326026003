"""The figures of scIB (Luecken et al. 2022) for a space, by the package scib-metrics, which is an extra."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Before each figure's name among those of a space.
SCIB = "scIB "
# Neighbours that cLISI, iLISI, kBET and the connectivity of labels look at, as scib-metrics' benchmark has them.
_NEIGHBOURS = 90


def need_scib() -> None:
    """Raises ImportError, with what to install, where the package is missing."""
    try:
        import scib_metrics  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "scib: needs scib-metrics, which is not installed: pip install 'xtrimogene[scib]', or leave scib out"
        ) from error


def scib_figures(
    points: npt.NDArray[Any], labels: npt.NDArray[Any], batches: npt.NDArray[Any]
) -> dict[str, float | None]:
    """Of points (n, k) with labels and batches (n,): how well labels are kept, then how well batches are mixed, 0 to 1.

    The same as scib-metrics' own for the same points; None where a figure is not finite.
    """
    import scib_metrics
    from scib_metrics.nearest_neighbors import pynndescent

    points = np.ascontiguousarray(points, dtype=np.float32)
    near = pynndescent(points, n_neighbors=min(_NEIGHBOURS, len(points) - 1), random_state=0, n_jobs=1)
    codes, batch_codes = (np.unique(each, return_inverse=True)[1] for each in (labels, batches))
    clusters = scib_metrics.nmi_ari_cluster_labels_kmeans(points, codes)
    found = {
        "isolated labels": scib_metrics.isolated_labels(points, codes, batch_codes),
        "KMeans NMI": clusters["nmi"],
        "KMeans ARI": clusters["ari"],
        "silhouette label": scib_metrics.silhouette_label(points, codes),
        "cLISI": scib_metrics.clisi_knn(near, codes),
        "graph connectivity": scib_metrics.graph_connectivity(near, codes),
        "silhouette batch": scib_metrics.silhouette_batch(points, codes, batch_codes),
        "iLISI": scib_metrics.ilisi_knn(near, batch_codes),
        "kBET": scib_metrics.kbet_per_label(near, batch_codes, codes),
    }
    return {name: float(value) if np.isfinite(value) else None for name, value in found.items()}
