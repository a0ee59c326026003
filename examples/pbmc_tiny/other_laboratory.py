"""What pbmc-tiny knows of cells of another laboratory: python examples/pbmc_tiny/other_laboratory.py SAMPLE

SAMPLE is sample_cell_by_gene.csv, the 559 immune cells that the package celltypist ships (1.7.1, MIT, in
celltypist/data/samples; counts, unlabelled). A fifth is held out. pbmc-tiny is judged by hidden genes as it comes, and
trained on by the other cells (recipe "tune"), beside the bars fitted to these. Writes both reports, into
other_laboratory/.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from xtrimogene.evaluation.evaluate import evaluate
from xtrimogene.evaluation.report import write
from xtrimogene.training.config import PretrainConfig
from xtrimogene.training.pretrain import pretrain

HERE = Path(__file__).parent
STEPS = 1000


def main() -> None:
    """Judges, trains on, judges again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("sample", type=Path)
    cells = load(parser.parse_args().sample)
    held = np.random.default_rng(0).random(cells.n_obs) < 0.2
    known, asked = cells[~held].copy(), cells[held].copy()
    config = PretrainConfig.from_dict(
        {"checkpoint": "pbmc-tiny", "max_steps": STEPS, "validation_share": 0.0, "tensorboard": False}, recipe="tune"
    )
    output = HERE / "other_laboratory"
    output.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tuned = pretrain(config, known, Path(folder) / "run").model
        for name, model in (("as_it_comes", "pbmc-tiny"), ("tuned", tuned)):
            assert model is not None
            write(evaluate(model, asked, train_data=known, progress=False), output / name, pictures=False)
            print(name, (output / name / "report.md").read_text(encoding="utf-8"), sep="\n\n")


def load(path: Path) -> anndata.AnnData:
    """The sample: its counts are whole but for the last bits."""
    table = pd.read_csv(path, index_col=0)
    counts = np.rint(table.to_numpy())
    if not np.allclose(counts, table.to_numpy(), rtol=0, atol=1e-6):
        raise SystemExit(f"{path}: expected whole counts")
    cells = anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)))
    cells.obs_names, cells.var_names = table.index, table.columns
    cells.var_names_make_unique()
    return cells


if __name__ == "__main__":
    main()
