"""inspect_cells: what a data set holds and what a model would take for it, before any model is run."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from anndata import AnnData

from xtrimogene.cells.formats.tables import UNREADABLE
from xtrimogene.cells.matrix import CsrArrays
from xtrimogene.cells.numbers import columns_of_totals, looks
from xtrimogene.cells.sources import CellSource, MissingMatrix, UnreadableCells, open_cells
from xtrimogene.hub import checkpoint_folder
from xtrimogene.inference.model_cells import WINDOW
from xtrimogene.inference.options import DEFAULT_MAX_TOKENS
from xtrimogene.network.config import PRESETS, XTrimoGeneConfig
from xtrimogene.network.flops import encoder_flops
from xtrimogene.network.folder import CHECKPOINT_FILES, Checkpoint
from xtrimogene.network.vocabulary import Vocabulary, column_names

# Cells that are looked at: so many windows of so many rows, from all over the data set.
_WINDOWS, _ROWS = 8, 32
# expm1 of more would be no count.
_LARGEST_LOGARITHM = 25
# Of MatrixReport.values; the better one first.
_LOGARITHMS = ("log1p", "logged")
_SIDE = 768  # of the square matrices that the rate is measured with


@dataclass
class MatrixReport:
    """One matrix of a data set.

    layer          None for X
    numbers        what the numbers look like, in words
    values         the same in a word: one of numbers.Look, or "" for what no model reads
    largest        largest number of the sample
    totals         (least, median, most) sum of a cell's numbers; of their expm1 where they are log-normalised
    cells, columns shape
    stored         entries that the matrix stores, None where only reading everything would tell
    genes_a_cell   (least, median, 95 of 100, most) numbers above 0 in a cell
    problem        why it cannot be read, else None
    """

    layer: str | None
    numbers: str = ""
    values: str = ""
    largest: float = 0.0
    totals: tuple[float, float, float] = (0.0, 0.0, 0.0)
    cells: int = 0
    columns: int = 0
    stored: int | None = None
    genes_a_cell: tuple[int, int, int, int] = (0, 0, 0, 0)
    problem: str | None = None
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)

    @property
    def density(self) -> float | None:
        """Share of the matrix that is stored."""
        return None if self.stored is None else self.stored / max(1, self.cells * self.columns)


@dataclass
class Cost:
    """What embedding the cells would take.

    model    name of the preset, or "checkpoint"
    flops    of the encoder, for all cells
    seconds  these at the rate of matrix products that was measured; the real time is longer
    bytes    weights and the rows of one batch, roughly
    """

    model: str
    flops: float
    seconds: float
    bytes: float


@dataclass
class CellsReport:
    """What a data set holds; str() is the text for people.

    unreadable  {what cannot be read of var and obs: why}
    genes       {column of var, None for its index: (genes of the vocabulary found, None without one; examples)}
    vocabulary  genes of the vocabulary, None without one
    advice      options for the commands, where the plain ones would not do
    rate        FLOP/s of float32 matrix products, measured for the costs on this machine with torch's threads
    """

    name: str
    kind: str
    matrices: list[MatrixReport]
    genes: dict[str | None, tuple[int | None, list[str]]]
    vocabulary: int | None
    unreadable: dict[str, str]
    totals_columns: list[str]
    advice: list[str]
    costs: list[Cost]
    rate: float
    lengths_of: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        told = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        told["matrices"] = [
            {key: value for key, value in vars(each).items() if key != "lengths"} | {"density": each.density}
            for each in self.matrices
        ]
        told["genes"] = [
            {"column": column, "found": found, "examples": examples} for column, (found, examples) in self.genes.items()
        ]
        told["costs"] = [dataclasses.asdict(each) for each in self.costs]
        return told

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.kind}", "", "matrices"]
        for each in self.matrices:
            name = "X" if each.layer is None else each.layer
            if each.problem is not None:
                lines.append(f"  {name}: cannot be read: {each.problem}")
                continue
            density = "dense on disk" if each.density is None else f"{each.density:.1%} stored"
            least, middle, most = each.totals
            few, median, many, longest = each.genes_a_cell
            what = "sums of expm1" if each.values in _LOGARITHMS else "sums of a cell"
            lines += [
                f"  {name}: {each.cells:,} cells x {each.columns:,} columns, {density}; {each.numbers}",
                f"     {what} {least:,.6g} to {most:,.6g}, median {middle:,.6g}; largest number {each.largest:,.6g}; "
                f"genes a cell {few:,} to {longest:,}, median {median:,}, 95 of 100 below {many:,}",
            ]
        lines += ["", "genes" if self.vocabulary is None else f"genes found, of {self.vocabulary:,}"]
        for column, (found, examples) in self.genes.items():
            name = "var_names" if column is None else f"var[{column!r}]"
            lines.append(f"  {name}: {'' if found is None else f'{found:,} '}(such as {', '.join(examples)})")
        if self.vocabulary is None:
            lines.append("  give --checkpoint or --vocabulary to see how many of its genes each names")
        lines += [f"  {place} cannot be read: {why}" for place, why in self.unreadable.items()]
        if self.totals_columns:
            lines += ["", f"totals of the cells are likely in obs: {', '.join(self.totals_columns)}"]
        if self.costs:
            lines += ["", f"to embed them on this machine's CPU ({self.lengths_of})"]
            lines += [
                f"  {each.model}: {each.flops / 1e12:,.2f} TFLOP, at least {_duration(each.seconds)}, about "
                f"{each.bytes / 1e9:,.1f} GB of memory"
                for each in self.costs
            ]
            lines.append(
                f"  at {self.rate / 1e9:,.0f} GFLOP/s, measured just now with float32 matrix products; the real rate "
                "is lower, so the time is longer"
            )
        if self.advice:
            lines += ["", "options to use"] + [f"  {each}" for each in self.advice]
        return "\n".join(lines)


def inspect_cells(
    adata_or_path: AnnData | str | os.PathLike[str],
    model: Vocabulary | str | os.PathLike[str] | None = None,
    *,
    target_sum: float = 1e4,
) -> CellsReport:
    """What a data set holds: matrices and what their numbers are, genes, and what the presets would take to embed it.

    Numbers are judged by 256 cells from all over each matrix. FLOPs are counted in closed form from the lengths of all
    cells where the matrix stores them, else from that sample.

    Args:
        adata_or_path: as for embed.
        model: a vocabulary or checkpoint folder, to find its genes in each column of var; None for none.
        target_sum: total of a log-normalised cell that is meant.

    Raises:
        FileNotFoundError, ValueError: no such file, or none that can be read at all; a matrix that cannot be read is
            told in the report.
    """
    config, vocabulary = None, model if isinstance(model, Vocabulary) else None
    if isinstance(model, str | os.PathLike):
        checkpoint = Checkpoint.open(checkpoint_folder(os.fspath(model), CHECKPOINT_FILES))
        config, vocabulary = checkpoint.config, checkpoint.vocabulary
        target_sum = config.target_sum
    with _first(adata_or_path) as source:
        matrices = [_matrix(source, target_sum)]
        for layer in source.other_layers:
            try:
                with source.open_layer(layer) as other:
                    matrices.append(_matrix(other, target_sum))
            except (ValueError, OSError) as error:
                matrices.append(MatrixReport(layer, problem=_without_name(error, source.name)))
        matrices.sort(key=lambda each: each.layer is not None)
        best = next(
            (each for values in ("counts", *_LOGARITHMS) for each in matrices if each.values == values), matrices[0]
        )
        genes = _genes(source, vocabulary)
        rate = _rate()
        kept = 1.0
        if vocabulary is not None:
            kept = max(0, max(found or 0 for found, _ in genes.values())) / max(1, source.n_vars)
        unreadable = {f"var[{column!r}]": why for column, why in source.var.attrs.get(UNREADABLE, {}).items()}
        totals: list[str] = []
        try:
            totals = columns_of_totals(source.obs())
        except UnreadableCells as error:
            unreadable["obs"] = _without_name(error, source.name)
        costs = _costs(best, config, vocabulary, rate, min(1.0, kept))
        return CellsReport(
            name=source.name,
            kind=source.kind,
            matrices=matrices,
            genes=genes,
            vocabulary=None if vocabulary is None else len(vocabulary),
            unreadable=unreadable,
            totals_columns=totals,
            advice=_advice(source, matrices, genes, vocabulary),
            costs=costs,
            rate=rate,
            lengths_of="from the lengths of all cells"
            if best.stored is not None
            else "from the lengths of a sample of cells",
        )


def _first(adata_or_path: AnnData | str | os.PathLike[str]) -> CellSource:
    """X, or the first matrix that can be opened where there is no X."""
    try:
        return open_cells(adata_or_path)
    except MissingMatrix as error:
        if not error.layers:
            raise
        return open_cells(adata_or_path, layer=error.layers[0])


def _matrix(source: CellSource, target_sum: float) -> MatrixReport:
    starts = np.unique(np.linspace(0, max(0, source.n_obs - _ROWS), _WINDOWS).astype(int)).tolist()
    sample = [source.read_rows(start, min(start + _ROWS, source.n_obs)) for start in starts]
    data = np.concatenate([np.zeros(0), *(rows[2].astype(np.float64) for rows in sample)])
    stored = source.stored_entries
    lengths = np.concatenate([np.zeros(0, np.int64), *(_sums(rows, rows[2] > 0) for rows in sample)]).astype(np.int64)
    report = MatrixReport(source.layer, cells=source.n_obs, columns=source.n_vars, lengths=lengths)
    if stored is not None:
        report.stored, report.lengths = int(stored.sum()), stored
    if len(lengths):
        report.genes_a_cell = tuple(int(each) for each in np.quantile(lengths, (0, 0.5, 0.95, 1)))  # type: ignore[assignment]
    if len(data):
        report.largest = float(data.max())
    report.numbers, report.values = _kind(data, sample, target_sum)
    if len(lengths) and np.isfinite(data).all():
        with np.errstate(over="ignore"):
            undone = np.expm1 if report.values in _LOGARITHMS else np.asarray
            sums = np.concatenate([_sums(rows, undone(rows[2])) for rows in sample])
        report.totals = tuple(float(each) for each in np.quantile(sums, (0, 0.5, 1)))  # type: ignore[assignment]
    return report


def _kind(data: npt.NDArray[np.float64], sample: list[CsrArrays], target_sum: float) -> tuple[str, str]:
    """What numbers look like, in words and in the word of MatrixReport.values."""
    if not len(data):
        return "no number above 0 in the sample", ""
    if not np.isfinite(data).all():
        return "NaN or infinite numbers", ""
    if (data < 0).any():
        return "scaled (negative numbers): no model here reads them", ""
    look = looks(sample, target_sum)
    if look is not None and look.values != "unknown":
        return look.text, look.values
    if data.max() < _LARGEST_LOGARITHM:
        return "logarithms, perhaps of some of the genes or without a common total", "logged"
    return "fractions: counts that were estimated or corrected, or scaled", "unknown"


def _sums(rows: CsrArrays, numbers: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(rows,) sum of one number for each entry."""
    before = np.concatenate([[0.0], np.cumsum(numbers, dtype=np.float64)])
    return np.diff(before[rows[0]])


def _genes(source: CellSource, vocabulary: Vocabulary | None) -> dict[str | None, tuple[int | None, list[str]]]:
    genes: dict[str | None, tuple[int | None, list[str]]] = {}
    for column in (None, *source.var.columns):
        if column is not None and source.var[column].dtype.kind in "biufcmM":
            continue
        names = [name for name in column_names(source.var, column) if name]
        found = None if vocabulary is None else vocabulary.count_found(names)
        genes[column] = (found, list(dict.fromkeys(names))[:3])
    return genes


def _advice(
    source: CellSource,
    matrices: list[MatrixReport],
    genes: dict[str | None, tuple[int | None, list[str]]],
    vocabulary: Vocabulary | None,
) -> list[str]:
    options = []
    readable = [each for each in matrices if each.problem is None]
    counts = [each for each in readable if each.values == "counts"]
    logged = [each for values in _LOGARITHMS for each in readable if each.values == values]
    if not any(each.layer is None for each in counts):
        for each, more in [*((each, "") for each in counts), *((each, " --normalized") for each in logged)][:1]:
            options.append(("" if each.layer is None else f"--layer {each.layer}") + more)
    if not counts and not logged:
        options.append("none fits: no matrix holds counts or log-normalised values; go back to the counts")
    elif not counts and logged[0].values != "log1p":
        options.append(
            "but the logarithms are not log1p(count / total * 10,000) of all genes: better go back to the counts"
        )
    if vocabulary is not None:
        best = max(genes, key=lambda column: genes[column][0] or 0)
        chosen = source.gene_symbols if source.gene_symbols in genes else None
        if (genes[best][0] or 0) == 0:
            options.append("no column of var names genes of this vocabulary: another species, or other identifiers")
        elif (genes[best][0] or 0) > (genes[chosen][0] or 0):
            options.append("leave --gene-symbols out" if best is None else f"--gene-symbols {best}")
    return [each.strip() for each in options if each.strip()]


def _costs(
    matrix: MatrixReport,
    config: XTrimoGeneConfig | None,
    vocabulary: Vocabulary | None,
    rate: float,
    kept: float,
) -> list[Cost]:
    """For the checkpoint, else for every preset. kept: share of the columns that the model knows."""
    lengths = np.rint(matrix.lengths * kept).astype(np.int64)
    if not len(lengths):
        return []
    num_genes = len(vocabulary) if vocabulary is not None else max(1, matrix.columns)
    configs = (
        {"checkpoint": config}
        if config is not None
        else {name: XTrimoGeneConfig.preset(name, num_genes=num_genes) for name in PRESETS}
    )
    costs = []
    for name, each in configs.items():
        flops = encoder_flops(each, lengths).total * (matrix.cells / len(lengths))
        d, width = each.dim, each.decoder_dim
        weights = (each.num_genes + 3) * d + each.num_bins * (each.num_bins + d)
        weights += each.num_layers * (4 + 2 * each.ffn_mult) * d * d
        weights += each.decoder_layers * (4 + 2 * each.ffn_mult) * width * width
        # Rows of one batch: input, output, q, k, v and the wide ones of the feed-forward layer; a window of cells.
        rows = DEFAULT_MAX_TOKENS * d * (6 + each.ffn_mult) + 8 * WINDOW * float(lengths.mean())
        costs.append(Cost(name, float(flops), float(flops) / rate, 4.0 * (weights + rows)))
    return costs


def _rate() -> float:
    """FLOP/s of float32 matrix products on this machine, with torch's threads, in a fifth of a second."""
    square = torch.ones(_SIDE, _SIDE)
    square @ square
    runs, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.2:
        square @ square
        runs += 1
    return runs * 2.0 * _SIDE**3 / (time.perf_counter() - start)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.1f} seconds"


def _without_name(error: Exception, name: str) -> str:
    return str(error).removeprefix(f"{name}: ")
