"""Writes benchmarks/ROOFLINE.md, a roofline on paper of every op and of the 100m encoder: python -m benchmarks.roofline

A floor is what a card needs at its published peaks for the work that the mathematics asks for. Beside it stands the
static model's time of our kernels as they were compiled (benchmarks/results/triton_static.csv). Nothing was run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.roofline.floors import (
    DIRECTIONS,
    FORMULAS,
    Batch,
    Need,
    batch_of,
    bounds,
    floor,
    model_config,
    needs,
)
from benchmarks.roofline.profiles import (
    UNIT_NAMES,
    Profile,
    bytes_without_model,
    encoder_time,
    kernels_of,
    launch_profile,
    losses,
    op_profile,
    shape_of,
    table_rows,
)
from benchmarks.static.cards import CARDS, Card
from benchmarks.static.launches import OPS
from xtrimogene.bench.rows import Rows
from xtrimogene.bench.tasks import real_lengths
from xtrimogene.document import markdown_table
from xtrimogene.network.config import XTrimoGeneConfig

PAGE = Path(__file__).parents[1] / "ROOFLINE.md"
ARCHITECTURES = ("sm_90", "gfx942")
CELLS = 32


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
            added = f"; without a model, at the memory's peak: {', '.join(missing)}" if missing else ""
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


def main() -> None:
    """Rewrites ROOFLINE.md."""
    try:
        PAGE.write_text(document(table_rows()), encoding="utf-8")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
