"""The static model's times of the kernels as they were compiled, beside the floors of what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.roofline.floors import (
    DIRECTIONS,
    HALF,
    INDEX,
    SINGLE,
    Batch,
    Need,
    attention_need,
    floor,
    linear_need,
    needs,
)
from benchmarks.static import model
from benchmarks.static.cards import CARDS, Card
from benchmarks.static.configs import DTYPES, TABLE
from benchmarks.static.launches import OPS
from benchmarks.static.model import UNITS, Shape
from xtrimogene.bench.rows import Rows, read_rows
from xtrimogene.bench.tasks import Lengths
from xtrimogene.network.config import XTrimoGeneConfig

UNIT_NAMES = {
    "products": "matrix products",
    "vector": "float32 operations",
    "exp2": "exponentials",
    "shared": "shared memory",
    "cache": "second-level cache",
    "memory": "memory",
}


@dataclass(frozen=True)
class Profile:
    """Where the static model's time of a launch, or of several one after the other, goes; all in microseconds.

    total    from the first program to the last
    busy     unit -> time for which it has work, were the work spread evenly over the processors
    busiest  that of the busiest unit (of each launch, summed)
    spread   the time were the programs spread evenly: the rest of the total waits for the last of them
    """

    total: float
    busy: dict[str, float]
    busiest: float
    spread: float


def table_rows(path: Path = TABLE) -> Rows:
    """The table of compiled kernels. Raises FileNotFoundError, saying what writes it, where it is missing."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the table of compiled kernels, which "
            "`python -m benchmarks.static.configs --table` writes"
        )
    return read_rows(path)


def kernels_of(rows: Rows, op: str, direction: str, architecture: str, width: int) -> dict[str, Rows]:
    """Kernel -> its rows in half precision, one for each set of flags, in the order of OPS.

    Raises ValueError for a kernel that the table lacks or that did not compile.
    """
    found: dict[str, Rows] = {}
    for name, kernel in OPS[op].kernels.items():
        if kernel.direction == direction:
            where = {
                "op": op, "kernel": name, "architecture": architecture, "dtype": DTYPES["half"], "width": str(width),
            }  # fmt: skip
            found[name] = [row for row in rows if where.items() <= row.items()]
            if not found[name] or any(row.get("error") for row in found[name]):
                raise ValueError(f"{TABLE.name}: expected compiled rows of {where}, got {found[name]}")
    return found


def launch_profile(row: dict[str, str], shape: Shape) -> Profile:
    """The static model's account of one row of the table on this shape."""
    work_of = OPS[row["op"]].kernels[row["kernel"]].work
    assert work_of is not None
    config = {name: int(value) for name, value in (pair.split("=") for pair in row["config"].split())}
    work, resident, card = work_of(config, shape), int(row["resident_programs"]), shape.card
    to_microseconds = 1 / (1e3 * card.ghz * card.processors)
    units = model.demands(work, shape).sum(1) * to_microseconds
    busy = dict(zip(UNITS, units.tolist(), strict=True)) | {"memory": work.memory / (1e6 * card.terabytes_per_s)}
    even = float(model.program_clocks(work, shape, config, resident).sum()) * to_microseconds
    total = model.microseconds(work, shape, config, resident)
    return Profile(total, busy, max(busy.values()), max(even, busy["memory"]))


def in_turn(profiles: Sequence[Profile]) -> Profile:
    """Launches one after the other."""
    return Profile(
        sum(p.total for p in profiles),
        {unit: sum(p.busy[unit] for p in profiles) for unit in UNIT_NAMES},
        sum(p.busiest for p in profiles),
        sum(p.spread for p in profiles),
    )


def op_profile(
    rows: Rows, config: XTrimoGeneConfig, op: str, direction: str, architecture: str, shape: Shape
) -> Profile | None:
    """The kernels of an op, one after the other; None where none of them has a work model. Of the sets of flags of a
    kernel the slowest counts, and a kernel without a model for the bytes that it moves."""
    found = [
        max((launch_profile(row, shape) for row in variants), key=lambda profile: profile.total)
        for name, variants in kernels_of(rows, op, direction, architecture, shape.width).items()
        if OPS[op].kernels[name].work is not None
    ]
    if not found:
        return None
    for moved in bytes_without_model(config, op, direction, shape).values():
        time = moved / (1e6 * shape.card.terabytes_per_s)
        found.append(Profile(time, dict.fromkeys(UNIT_NAMES, 0.0) | {"memory": time}, time, time))
    return in_turn(found)


def bytes_without_model(config: XTrimoGeneConfig, op: str, direction: str, shape: Shape) -> dict[str, int]:
    """Kernel -> bytes that it has to move, for the kernels that no work model covers beside some that one does."""
    if (op, direction) == ("expression_embedding", "backward"):
        tokens = sum(shape.lengths)
        return {"grad_gene_table": HALF * config.dim * (tokens + config.num_positions + 1) + INDEX * tokens}
    if op == "favor_attention":
        # float32 sums of chunks of tokens (a launch has 1,024 in each) come in, those of cells go out. In both
        # directions, though OPS has the kernel under forward only.
        parts = sum(-(-n // 1024) for n in shape.lengths) + len(shape.lengths)
        sums = {"sum_parts": SINGLE * parts * config.num_features * config.decoder_dim}
        if direction == "forward":
            return sums
        # For each head of a cell the projection, and a maximum, its row and a sum for every 32 keys.
        found = (2 * SINGLE + INDEX) * config.decoder_heads * sum(-(-n // 32) for n in shape.lengths)
        return sums | {"grad_key_max": found + HALF * len(shape.lengths) * config.num_features * config.decoder_dim}
    return {}


def shape_of(config: XTrimoGeneConfig, op: str, lengths: Lengths, card: Card) -> Shape:
    """What the static model is asked about: the encoder's tokens, or every position of the decoder."""
    size = {
        "ragged_attention": config.head_dim,
        "expression_embedding": config.num_bins,
        "favor_attention": config.decoder_head_dim,
        "dropout": config.dim,
    }.get(op, config.decoder_dim)
    width = next(width for width, known in OPS[op].sizes.items() if known == size)
    if op == "favor_attention":
        return Shape(
            (config.num_positions,) * len(lengths), width, HALF, card, config.decoder_heads, config.decoder_dim
        )
    return Shape(lengths, width, HALF, card, config.num_heads, config.dim)


def losses(need: Need, profile: Profile, card: Card) -> dict[str, float]:
    """Where the model's time above the floor goes, in microseconds; the sum is the difference.

    work     the busiest unit has more to do than the floor's
    overlap  units of a processor wait for each other: too few warps
    tail     processors have run out of programs before the last one ends
    """
    return {
        "work": profile.busiest - floor(need, card),
        "overlap": profile.spread - profile.busiest,
        "tail": profile.total - profile.spread,
    }


def encoder_parts(
    rows: Rows, config: XTrimoGeneConfig, batch: Batch, name: str, direction: str, *, dense: bool
) -> dict[str, tuple[float, float]]:
    """Part of the encoder -> microseconds of its floor, and with our kernels, for all layers in one direction.

    dense: all genes of the vocabulary are tokens of each cell; the embedding is left out, as in dense_flops.
    """
    card = CARDS[name]
    lengths = (config.num_genes,) * len(batch.lengths) if dense else batch.lengths

    def modelled(op: str, need: Need, times: int) -> tuple[float, float]:
        profile = op_profile(rows, config, op, direction, name, shape_of(config, op, lengths, card))
        assert profile is not None
        return times * floor(need, card), times * profile.total

    linear = floor(linear_need(config, sum(lengths), direction), card)
    parts = {
        "linear layers": (linear, linear),
        "attention": modelled("ragged_attention", attention_need(config, lengths, direction), config.num_layers),
    }
    embedding = needs(config, batch)["expression_embedding", direction]
    return parts | {"embedding": (0.0, 0.0) if dense else modelled("expression_embedding", embedding, 1)}


def encoder_time(
    rows: Rows, config: XTrimoGeneConfig, batch: Batch, name: str, *, training: bool, dense: bool
) -> dict[str, tuple[float, float]]:
    """As encoder_parts, of inference (forward) or of a training step (forward and backward)."""
    directions = DIRECTIONS if training else DIRECTIONS[:1]
    found = [encoder_parts(rows, config, batch, name, direction, dense=dense) for direction in directions]
    return {part: (sum(f[part][0] for f in found), sum(f[part][1] for f in found)) for part in found[0]}
