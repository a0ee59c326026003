"""Writes benchmarks/ROOFLINE.md, a roofline on paper of every op and of the 100m encoder: python -m benchmarks.roofline

A floor is what a card needs at its published peaks for the work that the mathematics asks for. Beside it stands the
static model's time of our kernels as they were compiled (benchmarks/results/triton_static.csv). Nothing was run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.static import model
from benchmarks.static.cards import CARDS, Card
from benchmarks.static.configs import DTYPES, TABLE
from benchmarks.static.launches import OPS
from benchmarks.static.model import UNITS, Shape
from xtrimogene.bench.cases import NUM_GENES, Lengths, real_lengths, umi_counts
from xtrimogene.bench.costs import masked_counts
from xtrimogene.bench.document import markdown_table
from xtrimogene.bench.rows import Rows, read_rows
from xtrimogene.config import XTrimoGeneConfig
from xtrimogene.flops import decoder_backward_flops, decoder_flops, encoder_backward_flops, encoder_flops

PAGE = Path(__file__).parents[1] / "ROOFLINE.md"
ARCHITECTURES = ("sm_90", "gfx942")
DIRECTIONS = ("forward", "backward")
CELLS = 32
HALF, SINGLE, INDEX = 2, 4, 4  # bytes of bfloat16, float32 and int32
UNIT_NAMES = {
    "products": "matrix products",
    "vector": "float32 operations",
    "exp2": "exponentials",
    "shared": "shared memory",
    "cache": "second-level cache",
    "memory": "memory",
}
# What `needs` counts, a line for each op and direction: FLOPs, exponentials, bytes.
FORMULAS = {
    ("ragged_attention", "forward"): ("4 d S", "h S", "8 N d (q, k, v, out) + 4 h N (softmax_lse)"),
    ("ragged_attention", "backward"): (
        "10 d S", "h S", "16 N d (grad_out, q, k, v, out; grad_q, grad_k, grad_v) + 4 h N (softmax_lse)"
    ),
    ("expression_embedding", "forward"): (
        "2 (b + b b + b d) U", "b U", "2 N d (out) + 2 R d (gene rows) + 12 N (values, ids, index) + W"
    ),
    ("expression_embedding", "backward"): (
        "2 (2 b + 3 b b + 2 b d) U", "b U",
        "2 N d (grad_out) + 2 (G + 1) d (grad_gene_table) + 12 N (values, ids, index) + 2 W",
    ),
    ("favor_attention", "forward"): (
        "8 D m P", "2 H m P", "8 P D (q, k, v, out) + 4 m w (projection) + F"
    ),
    ("favor_attention", "backward"): (
        "16 D m P", "2 H m P", "16 P D (grad_out, q, k, v, out; grad_q, grad_k, grad_v) + 4 m w (projection) + F"
    ),
    ("masked_decoder_gather", "forward"): (
        "0", "0", "2 P D (out) + 2 G D (table) + 2 E D (encoded) + 4 D (two rows) + 4 (E + K) (ids)"
    ),
    ("masked_decoder_gather", "backward"): (
        "0", "0", "2 P D (grad_out) + 2 G D (grad_table) + 2 E D (grad_encoded) + 4 D (two rows) + 4 (E + K) (ids)"
    ),
    ("masked_head", "forward"): ("2 D A", "0", "2 A D (x) + 4 A (target) + 20 D (parameters)"),
    ("masked_head", "backward"): ("6 D A", "0", "4 A D (x, grad_x) + 4 A (target) + 40 D (parameters, gradients)"),
}  # fmt: skip


@dataclass(frozen=True)
class Need:
    """What has to be done whoever does it: FLOPs of matrix products in bfloat16, exponentials, bytes of memory."""

    flops: int
    exp2: int
    bytes: int


@dataclass(frozen=True)
class Batch:
    """Cells of a step, and what of them the ops work on.

    lengths    genes with a count of each cell: the tokens of the encoder
    distinct   distinct values of each cell
    gene_rows  rows of the gene table that one of the cells has
    encoded, masked, chosen
               of each cell in pre-training: tokens of the encoder, masked genes, genes of the loss
    """

    lengths: Lengths
    distinct: Lengths
    gene_rows: int
    encoded: Lengths
    masked: Lengths
    chosen: Lengths


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


def model_config() -> XTrimoGeneConfig:
    """The 100m model with the released vocabulary: 19,264 genes, 19,266 positions in the decoder."""
    return XTrimoGeneConfig.preset("100m", num_genes=NUM_GENES, depth_tokens=True)


def batch_of(lengths: Lengths) -> Batch:
    """UMI-like cells of these lengths, masked with the published rates."""
    counts, ids = umi_counts(lengths)
    starts = np.cumsum(lengths)[:-1]
    # Within a cell, values are equal where counts are.
    distinct = tuple(len(np.unique(cell)) for cell in np.split(counts, starts))
    encoded, masked, chosen = (
        tuple(int(n) for n in of_cell) for of_cell in masked_counts(np.asarray(lengths), NUM_GENES)
    )
    return Batch(lengths, distinct, len(np.unique(ids)), encoded, masked, chosen)


def needs(config: XTrimoGeneConfig, batch: Batch) -> dict[tuple[str, str], Need]:
    """(op, direction) -> what it needs: one layer of the attentions, and the other ops once.

    FLOPs are the closed forms of xtrimogene.flops. Bytes are those of FORMULAS: operands once, results once, with the
    boundaries of the cells, which the formulas leave out for brevity.
    """
    cells, tokens, positions = len(batch.lengths), sum(batch.lengths), len(batch.lengths) * config.num_positions
    dim, width, bins, features = config.dim, config.decoder_dim, config.num_bins, config.num_features
    values, starts = sum(batch.distinct), INDEX * (cells + 1)
    embedding = {
        "forward": encoder_flops(config, batch.lengths, batch.distinct).embedding,
        "backward": encoder_backward_flops(config, batch.lengths, batch.distinct).embedding,
    }
    # Of every layer the same, since all positions are asked for; and of the chosen genes, for the head.
    favor = {
        "forward": decoder_flops(config, batch.encoded, masked=batch.masked).favor,
        "backward": decoder_backward_flops(config, batch.encoded, masked=batch.masked).favor,
    }
    head = {
        "forward": decoder_flops(config, batch.encoded, asked=batch.chosen).head,
        "backward": decoder_backward_flops(config, batch.encoded, asked=batch.chosen).head,
    }
    per_token = (SINGLE + 2 * INDEX) * tokens
    weights = HALF * (3 * bins + bins * bins + bins * dim)
    decoder_rows = HALF * positions * width
    projection = SINGLE * features * config.decoder_head_dim
    kept = SINGLE * (cells * features * (width + config.decoder_heads) + cells * config.decoder_heads)
    kept += SINGLE * 2 * config.decoder_heads * positions
    gathered = HALF * (positions + config.num_positions + sum(batch.encoded) + 2) * width
    gathered += INDEX * (sum(batch.encoded) + sum(batch.masked)) + 2 * starts
    chosen, parameters = sum(batch.chosen), SINGLE * (5 * width + 1)

    found = {}
    for direction in DIRECTIONS:
        back = direction == "backward"
        # The gradient of the gene table is written whole; forward reads the rows that the cells have.
        gene_rows = config.num_positions + 1 if back else batch.gene_rows
        found["ragged_attention", direction] = attention_need(config, batch.lengths, direction)
        found["expression_embedding", direction] = Need(
            embedding[direction], bins * values,
            HALF * dim * (tokens + gene_rows) + per_token + (2 if back else 1) * weights,
        )  # fmt: skip
        found["favor_attention", direction] = Need(
            favor[direction] // config.decoder_layers, 2 * config.decoder_heads * features * positions,
            (8 if back else 4) * decoder_rows + projection + kept + 2 * starts,
        )  # fmt: skip
        found["masked_decoder_gather", direction] = Need(0, 0, gathered)
        # The loss, or its gradient, is one number.
        found["masked_head", direction] = Need(
            head[direction], 0,
            (2 if back else 1) * (HALF * chosen * width + parameters) + SINGLE * chosen + SINGLE,
        )  # fmt: skip
    return {(op, direction): found[op, direction] for op in OPS for direction in DIRECTIONS}


def attention_need(config: XTrimoGeneConfig, lengths: Lengths, direction: str) -> Need:
    """One layer of the encoder's attention, as FORMULAS has it."""
    back, tokens = direction == "backward", sum(lengths)
    count = (encoder_backward_flops if back else encoder_flops)(config, lengths)
    return Need(
        count.attention // config.num_layers, config.num_heads * sum(n * n for n in lengths),
        (8 if back else 4) * HALF * tokens * config.dim + SINGLE * config.num_heads * tokens
        + INDEX * (len(lengths) + 1),
    )  # fmt: skip


def linear_need(config: XTrimoGeneConfig, tokens: int, direction: str) -> Need:
    """All linear layers of the encoder: every matrix, input and output once; backward also their gradients."""
    f, back = config.ffn_mult, direction == "backward"
    count = (encoder_backward_flops if back else encoder_flops)(config, [tokens])
    # Widths of the inputs of qkv, output projection and feed-forward, and of their outputs, in units of dim.
    inputs, outputs = 3 + f, 5 + f
    moved = config.dim * tokens * (2 * inputs + outputs if back else inputs + outputs)
    weights = (4 + 2 * f) * config.dim**2
    return Need(count.linear, 0, HALF * config.num_layers * (moved + (2 if back else 1) * weights))


def bounds(need: Need, card: Card) -> dict[str, float]:
    """Microseconds of the whole card at its peaks for each of what is needed."""
    return {
        "products": need.flops / (1e6 * card.half_tflops),
        "exp2": need.exp2 / (1e3 * card.ghz * card.processors * card.exp2_per_clock),
        "memory": need.bytes / (1e6 * card.terabytes_per_s),
    }


def floor(need: Need, card: Card) -> float:
    """Microseconds: everything at its peak, side by side."""
    return max(bounds(need, card).values())


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
        return {"sum_parts": SINGLE * parts * config.num_features * config.decoder_dim}
    return {}


def shape_of(config: XTrimoGeneConfig, op: str, lengths: Lengths, card: Card) -> Shape:
    """What the static model is asked about: the encoder's tokens, or every position of the decoder."""
    size = {
        "ragged_attention": config.head_dim,
        "expression_embedding": config.num_bins,
        "favor_attention": config.decoder_head_dim,
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


def why(need: Need, profile: Profile, card: Card) -> str:
    """The busiest unit and the largest loss in words."""
    lost = losses(need, profile, card)
    largest, above = max(lost, key=lost.__getitem__), profile.total - floor(need, card)
    unit = max(profile.busy, key=profile.busy.__getitem__)
    at_least = bounds(need, card).get(unit, 0.0)
    share = f"{lost[largest] / above:.0%} of the loss"
    busy = f"{profile.busy[unit] / profile.total:.0%} of the time"
    if at_least:
        busy += f", {_number(profile.busy[unit] / at_least)} times the least"
    if largest == "work":
        return f"{UNIT_NAMES[unit]}: more to do than the floor counts ({share}); busy {busy}"
    reason = "units wait for each other" if largest == "overlap" else "the last programs run alone"
    return f"{reason} ({share}); busiest: {UNIT_NAMES[unit]}, {busy}"


def document(rows: Rows) -> str:
    """ROOFLINE.md from the rows of the table of compiled kernels."""
    config, batch = model_config(), batch_of(real_lengths(CELLS))
    found = needs(config, batch)
    cards = [part for name in ARCHITECTURES for part in _card_section(rows, config, batch, found, name)]
    return "\n\n".join([*_opening(config, batch, found), *cards, *_closing(rows, config, batch, found)]) + "\n"


def _opening(config: XTrimoGeneConfig, batch: Batch, found: dict[tuple[str, str], Need]) -> Iterator[str]:
    cells, tokens = len(batch.lengths), sum(batch.lengths)
    yield "# A roofline on paper"
    yield (
        "What each op and the encoder of the 100m model must cost at least on an H100 and an MI300X, and how near to "
        "that floor the kernels can come by what the compiler made of them. **Nothing here was run on a GPU.** "
        "`python -m benchmarks.roofline` writes this page from `benchmarks/results/triton_static.csv`, "
        "`benchmarks/static/cards.py` and the closed forms of `xtrimogene/flops.py`."
    )
    yield "## How to read"
    yield (
        "- **Floor**: the largest of three times at the card's published peaks: FLOPs of matrix products in bfloat16; "
        "exponentials on the units that a card has for them; bytes by the bandwidth of the memory, each operand read "
        "once and each result written once. The largest stands under *bound by*, two where they are within 1%.\n"
        "- **Model**: the time that the static model (`benchmarks/static/model.py`) gives the op's kernels, one after "
        "the other, with their tile sizes, registers and shared memory as compiled. It is meant as a lower bound too, "
        "a less generous one: it adds padding to tiles, products that are done twice, shared memory and the "
        "second-level cache, how many programs a processor holds, and the order in which they find processors.\n"
        "- **Share**: floor by model, which is the most of the floor that these counts allow. *Why* names the largest "
        "of three losses: the busiest unit has more to do than the floor counts; units wait for each other, since too "
        "few warps are there to keep them busy side by side; or the last programs run alone.\n"
        "- **Limits**: the model knows no latency inside a loop, no bank conflicts, no launches and no clocks under "
        "load, and takes one figure for the second-level cache of all cards. A real kernel is slower, by how much "
        "only the card can say. That one config ranks before another is no proof that it is faster."
    )
    yield (
        f"The batch is {cells} real cells (`xtrimogene/bench/cell_lengths.json`) of {min(batch.lengths):,} to "
        f"{max(batch.lengths):,} genes, {tokens:,} tokens together, with UMI-like counts: {sum(batch.distinct):,} "
        f"values that are different within their cell, and {batch.gene_rows:,} of the {config.num_genes:,} genes. "
        f"In pre-training {sum(batch.encoded):,} tokens are encoded, {sum(batch.masked):,} genes masked, and "
        f"{sum(batch.chosen):,} are in the loss. The decoder has {config.num_positions:,} positions a cell. The "
        "attentions are counted for one layer, the other ops for the one time that a step runs them."
    )
    yield "## What is counted"
    yield (
        f"N = {tokens:,} tokens, S = {sum(n * n for n in batch.lengths):,} (sum of squared lengths), "
        f"d = {config.dim}, h = {config.num_heads} heads; U = {sum(batch.distinct):,} distinct values, "
        f"b = {config.num_bins} bins, R = {batch.gene_rows:,} gene rows, W = 2 (3 b + b b + b d) bytes of weights; "
        f"G = {config.num_positions:,} positions, P = {cells * config.num_positions:,} of all cells, "
        f"D = {config.decoder_dim}, H = {config.decoder_heads} heads of w = {config.decoder_head_dim}, "
        f"m = {config.num_features} features, F = bytes of the float32 sums kept for the backward; "
        f"E = {sum(batch.encoded):,} encoded, K = {sum(batch.masked):,} masked, A = {sum(batch.chosen):,} chosen."
    )
    yield markdown_table(
        ["op", "direction", "FLOPs", "exponentials", "bytes", "GFLOP", "G exponentials", "MB"],
        [
            [
                f"`{op}`", direction, *FORMULAS[op, direction], _number(need.flops / 1e9), _number(need.exp2 / 1e9),
                _number(need.bytes / 1e6),
            ]
            for (op, direction), need in found.items()
        ],
    )  # fmt: skip


def _card_section(
    rows: Rows, config: XTrimoGeneConfig, batch: Batch, found: dict[tuple[str, str], Need], name: str
) -> Iterator[str]:
    card = CARDS[name]
    yield f"## {card.name}"
    yield (
        f"{card.processors} processors at {card.ghz} GHz, {card.half_tflops:,.0f} TFLOP/s of dense bfloat16 products, "
        f"{card.processors * card.exp2_per_clock * card.ghz / 1e3:.1f} T exponentials/s, {card.terabytes_per_s} TB/s "
        f"({card.source})."
    )
    yield f"**Ops**, times in microseconds:\n\n{_ops_table(rows, config, batch, found, name)}"
    yield (
        "**Kernels**: what the compiler made of them, and for which share of the model's time each unit has work:"
        f"\n\n{_kernels_table(rows, config, batch, name)}"
    )
    yield (
        f"**Encoder**, {config.num_layers} layers, on the {len(batch.lengths)} cells, beside a dense Transformer of "
        f"the same width and depth over all {config.num_genes:,} genes of as many cells. *With our kernels* has the "
        "linear layers at their floor and the rest at the model's time:\n\n"
        f"{_encoder_table(rows, config, batch, name)}"
    )


def _ops_table(
    rows: Rows, config: XTrimoGeneConfig, batch: Batch, found: dict[tuple[str, str], Need], name: str
) -> str:
    card, body = CARDS[name], []
    for (op, direction), need in found.items():
        at_peak, shape = bounds(need, card), shape_of(config, op, batch.lengths, card)
        # Two that differ by less than the figures of a datasheet bind together.
        binding = [UNIT_NAMES[unit] for unit in at_peak if at_peak[unit] >= 0.99 * floor(need, card)]
        profile = op_profile(rows, config, op, direction, name, shape)
        if profile is None:
            widths = ", ".join(
                f"{kernel} {_wide_loads(variants)}"
                for kernel, variants in kernels_of(rows, op, direction, name, shape.width).items()
                if OPS[op].kernels[kernel].has_rows
            )
            last = ["none", "", f"moves rows and computes little; loads of 16 bytes in the code: {widths}"]
        else:
            missing = bytes_without_model(config, op, direction, shape)
            added = f"; {', '.join(missing)}, which has no model, at the memory's peak" if missing else ""
            share = f"{floor(need, card) / profile.total:.0%}"
            last = [_number(profile.total), share, why(need, profile, card) + added]
        body.append(
            [
                f"`{op}`", direction, *(_number(at_peak[unit]) for unit in at_peak), _number(floor(need, card)),
                ", ".join(binding), *last,
            ]
        )  # fmt: skip
    header = [
        "op", "direction", "products", "exponentials", "memory", "floor", "bound by", "model", "share", "why",
    ]  # fmt: skip
    return markdown_table(header, body)


def _wide_loads(variants: Rows) -> str:
    counts = [int(row["wide_loads"]) for row in variants]
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _kernels_table(rows: Rows, config: XTrimoGeneConfig, batch: Batch, name: str) -> str:
    card, body = CARDS[name], []
    for op, spec in OPS.items():
        shape = shape_of(config, op, batch.lengths, card)
        for direction in DIRECTIONS:
            for kernel, variants in kernels_of(rows, op, direction, name, shape.width).items():
                if spec.kernels[kernel].work is None:
                    continue
                row = max(variants, key=lambda row: launch_profile(row, shape).total)
                profile = launch_profile(row, shape)
                body.append(
                    [
                        f"`{op}` {kernel}", row["config"].replace("num_", ""), row["registers"], row["shared"],
                        row["resident_programs"], _number(profile.total),
                        *(f"{profile.busy[unit] / profile.total:.0%}" for unit in UNIT_NAMES),
                    ]
                )  # fmt: skip
    header = [
        "kernel", "config", "registers", "shared memory", "programs a processor", "model, us", *UNIT_NAMES.values(),
    ]  # fmt: skip
    return markdown_table(header, body)


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


def _encoder_table(rows: Rows, config: XTrimoGeneConfig, batch: Batch, name: str) -> str:
    cells, body = len(batch.lengths), []
    for training in (False, True):
        totals = []
        for dense in (False, True):
            parts = encoder_time(rows, config, batch, name, training=training, dense=dense)
            total = [sum(part[column] for part in parts.values()) for column in (0, 1)]
            totals.append(total)
            body.append(
                [
                    f"{'training step' if training else 'inference'}, {'dense' if dense else 'ours'}",
                    *(_milliseconds(least) for least, _ in parts.values()),
                    _milliseconds(total[0]), f"{cells / total[0] * 1e6:,.0f}",
                    _milliseconds(parts["attention"][1]), _milliseconds(total[1]), f"{cells / total[1] * 1e6:,.0f}",
                    f"{total[0] / total[1]:.0%}",
                ]
            )  # fmt: skip
        (ours_least, ours), (dense_least, dense_time) = totals
        ratios = [f"{ratio:.1f}x" for ratio in (dense_least / ours_least, dense_time / ours, dense_least / ours)]
        body.append(["dense by ours", "", "", "", ratios[0], "", "", ratios[1], "", ""])
        body.append(["dense at its floor by ours with our kernels", *[""] * 6, ratios[2], "", ""])
    header = [
        "", "linear layers, floor", "attention, floor", "embedding, floor", "floor", "cells/s at the floor",
        "attention, our kernels", "with our kernels", "cells/s with our kernels", "share",
    ]  # fmt: skip
    return markdown_table(header, body)


def _closing(rows: Rows, config: XTrimoGeneConfig, batch: Batch, found: dict[tuple[str, str], Need]) -> Iterator[str]:
    yield (
        "The encoder's floor is a sum of floors, one kernel after the other. A linear layer moves its matrix, input "
        "and output once, backward their gradients too. Norms, biases, residual branches and activations cost nothing "
        "here, and neither does the optimizer. The dense Transformer gets the same, an embedding for nothing, and an "
        "attention that never writes its scores. The ratio beside the floors compares floors, the one beside our "
        "kernels gives both sides our attention, and the last gives the dense side its floor and our side the model's "
        "time: the least that a good dense kernel leaves of it."
    )
    yield "## What would change it"
    lines = []
    for name in ARCHITECTURES:
        parts = encoder_time(rows, config, batch, name, training=True, dense=False)
        lost = {part: allowed - least for part, (least, allowed) in parts.items()}
        largest = max(lost, key=lost.__getitem__)
        least, total = (sum(part[column] for part in parts.values()) for column in (0, 1))
        lines.append(
            f"- {CARDS[name].name}: of the {_milliseconds(total)} of a training step, {_milliseconds(total - least)} "
            f"lie above the floor, {_milliseconds(lost[largest])} of them in the {largest}. The linear layers, here at "
            f"their floor, are {parts['linear layers'][1] / total:.0%} of the step."
        )
    tokens, values = sum(batch.lengths), sum(batch.distinct)
    lines += [
        f"- The Triton kernels of `expression_embedding` compute every token; the floor counts distinct values, "
        f"{tokens / values:.0f} times fewer here. The model also fetches a gene row from memory for each of the "
        f"{tokens:,} tokens, where {batch.gene_rows:,} different rows would do if a cache holds the table.",
        "- The backward of the attentions computes its scores in more than one kernel, so that no sum depends on an "
        "order: more products and exponentials than the floor counts, and no atomics.",
        "- Exponentials count against the units for them. A kernel that makes some of them of multiply-adds goes "
        "below that bound; a card whose clock is not the one its peaks are stated at moves it.",
        "- One run of `python -m benchmarks.gpu` on a card: measured times in place of the model's.",
    ]
    yield "\n".join(lines)


def _number(x: float) -> str:
    """Three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _milliseconds(microseconds: float) -> str:
    return f"{_number(microseconds / 1e3)} ms"


def table_rows(path: Path = TABLE) -> Rows:
    """The table of compiled kernels. Raises FileNotFoundError, saying what writes it, where it is missing."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the table of compiled kernels, which "
            "`python -m benchmarks.static.configs --table` writes"
        )
    return read_rows(path)


def main() -> None:
    """Rewrites ROOFLINE.md."""
    try:
        PAGE.write_text(document(table_rows()), encoding="utf-8")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
