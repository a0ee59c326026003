"""A cost model for kernels that nobody has run: what the programs of a launch do, and how long a card needs at least.

It knows FLOPs, exponentials, shared-memory and cache traffic by tile sizes, registers and shared memory as compiled,
and the order in which programs of unequal length find processors. It knows nothing of latency inside a loop, bank
conflicts or clocks under load. So it can discard tile sizes; among those close to the best it cannot choose, and takes
the first. The card decides (benchmarks.gpu.tune).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.static.cards import Card
from xtrimogene.bench.tasks import Lengths

Amounts = npt.NDArray[np.float64]
Config = dict[str, int]
# The A100 whitepaper has 5,120 bytes a clock for 108 processors; taken for all cards.
_CACHE_BYTES_PER_CLOCK = 48
_SHARED_BYTES_PER_CLOCK = 128
# From a request to the memory to its data, where nothing was asked for ahead (num_stages 1).
_LATENCY = 700
# What a program asks clocks of, in the order of `demands`; the amounts of a Work.
UNITS = ("products", "vector", "exp2", "shared", "cache")


@dataclass(frozen=True)
class Shape:
    """What a launch works on: the lengths of the cells, the width of configs.json, bytes of an element, the card."""

    lengths: Lengths
    width: int
    itemsize: int
    card: Card
    heads: int = 12
    dim: int = 768


@dataclass(frozen=True)
class Work:
    """What each program of a launch does, in the order of the programs.

    products    FLOPs of matrix products, in the precision of the operands
    vector      float32 operations outside of products
    exp2        exponentials
    shared      bytes read from and written to shared memory
    cache       bytes from and to the second-level cache
    iterations  trips through the hot loop
    memory      bytes of the whole launch that have to come from or go to memory
    """

    products: Amounts
    vector: Amounts
    exp2: Amounts
    shared: Amounts
    cache: Amounts
    iterations: Amounts
    memory: float


def demands(work: Work, shape: Shape) -> Amounts:
    """(units, programs) clocks that each program asks of each unit of its processor, in the order of UNITS."""
    card = shape.card
    products = card.clocks_of_half(1) if shape.itemsize == 2 else card.clocks_of_float32(1)
    return np.stack(
        [
            work.products * products,
            work.vector * card.clocks_of_float32(2),
            work.exp2 / card.exp2_per_clock,
            work.shared / _SHARED_BYTES_PER_CLOCK,
            work.cache / _CACHE_BYTES_PER_CLOCK,
        ]
    )


def program_clocks(work: Work, shape: Shape, config: Config, resident: int) -> Amounts:
    """(programs,) clocks of each program on a processor that holds ``resident`` of them and shares its units out.

    Units work side by side only for different warps: with w warps to a scheduler, a program takes its largest demand,
    or the w-th part of the sum where that is more.
    """
    asked = demands(work, shape)
    warps = resident * config["num_warps"] / 4
    waiting = _LATENCY * work.iterations / resident if config["num_stages"] == 1 else 0.0
    return np.maximum(asked.max(0), asked.sum(0) / max(warps, 1.0) + waiting)


def microseconds(work: Work, shape: Shape, config: Config, resident: int) -> float:
    """The least time of a launch whose processors hold ``resident`` programs at a time."""
    card = shape.card
    last = makespan(program_clocks(work, shape, config, resident) * resident, card.processors * resident)
    return max(last / (1e3 * card.ghz), work.memory / (1e6 * card.terabytes_per_s))


def makespan(times: Amounts, places: int) -> float:
    """When the last program ends, each starting in order at the first place that comes free."""
    free = [0.0] * places
    for time in times.tolist():
        heapq.heapreplace(free, free[0] + time)
    return max(free)


def _attention(
    config: Config,
    shape: Shape,
    rows: int,
    columns: int,
    trips: Amounts,
    *,
    products: int,
    tiles: int,
    written: int,
    memory: float,
) -> Work:
    """Programs own ``rows`` rows of one head and walk over ``trips`` blocks of ``columns``. A trip has ``products`` of
    its two tiles and reads ``tiles`` operands from shared memory; ``written`` rows' results go out at the end."""
    width, size = shape.width, shape.itemsize
    scores, tile = rows * columns, columns * width * size
    # Warps stand side by side over the rows; each reads the whole tile (a warpgroup of four does so once).
    readers = min(config["num_warps"], max(rows // 16, 1))
    if shape.itemsize == 4:
        outputs = scores / config["num_warps"]
        operands = products * 8 * width * scores / np.sqrt(outputs)
    elif shape.card.target[1] in (90, 100):
        operands = tiles * tile * max(readers / 4, 1)
    else:
        operands = tiles * tile * readers
    own = rows * width * size
    return Work(
        products=trips * 2 * products * scores * width,
        vector=trips * (7 * scores + 2 * rows * width),
        exp2=trips * scores,
        shared=trips * (operands + 2 * tile),
        cache=trips * 2 * tile + own * (2 + written),
        iterations=trips,
        memory=memory,
    )


def _trips(shape: Shape, rows: int, columns: int, walked: int | None = None) -> Amounts:
    """Of the programs of all heads, those of long cells first: each walks over its cell, or over ``walked``."""
    longest_first = np.sort(np.asarray(shape.lengths))[::-1]
    each = longest_first if walked is None else np.full_like(longest_first, walked)
    return np.repeat(-(-each // columns), -(-longest_first // rows) * shape.heads).astype(np.float64)


def _tensors(shape: Shape, count: int) -> float:
    """Bytes of so many tensors like q."""
    return float(count * sum(shape.lengths) * shape.heads * shape.width * shape.itemsize)


def attention_forward(config: Config, shape: Shape) -> Work:
    """q k^T and probs v for each key block. Memory: q, k, v, out."""
    rows, columns = config["BLOCK_Q"], config["BLOCK_K"]
    trips = _trips(shape, rows, columns)
    return _attention(config, shape, rows, columns, trips, products=2, tiles=2, written=1, memory=_tensors(shape, 4))


def attention_grad_query(config: Config, shape: Shape) -> Work:
    """q k^T, grad_out v^T and grad_scores k for each key block. Memory: grad_out, q, k, v, out, grad_q."""
    rows, columns = config["BLOCK_Q"], config["BLOCK_K"]
    trips = _trips(shape, rows, columns)
    return _attention(config, shape, rows, columns, trips, products=3, tiles=3, written=1, memory=_tensors(shape, 6))


def attention_grad_key_value(config: Config, shape: Shape) -> Work:
    """k q^T, probs grad_out, v grad_out^T and grad_scores q for each query block. Memory: grad_out, q, k, v, grad_k,
    grad_v."""
    rows, columns = config["BLOCK_K"], config["BLOCK_Q"]
    trips = _trips(shape, rows, columns)
    return _attention(config, shape, rows, columns, trips, products=4, tiles=4, written=2, memory=_tensors(shape, 6))


def _bin_weights(shape: Shape, tokens: int) -> tuple[float, float, float]:
    """FLOPs, vector operations and exponentials for the bin weights of a block of tokens. In half precision hidden is
    split in two, and the product done twice."""
    bins = shape.width
    return 2.0 * tokens * bins * bins * (2 if shape.itemsize == 2 else 1), 16.0 * tokens * bins, 1.0 * tokens * bins


def _chunked(shape: Shape, tokens: int, most: int) -> tuple[Amounts, float]:
    """Trips of each chunk of token blocks, and the number of all token blocks."""
    blocks = -(-sum(shape.lengths) // tokens)
    each = -(-blocks // most)
    chunks = -(-blocks // each)
    trips = np.full(chunks, float(each))
    trips[-1] = blocks - each * (chunks - 1)
    return trips, float(blocks)


def _embedding(config: Config, shape: Shape, trips: Amounts, **per_trip: float) -> Work:
    """Operands come to shared memory once and are read by two warps each on average."""
    cache = per_trip["cache"]
    return Work(
        products=trips * per_trip["products"],
        vector=trips * per_trip["vector"],
        exp2=trips * per_trip["exp2"],
        shared=trips * 3 * cache,
        cache=trips * cache,
        iterations=trips * per_trip["iterations"],
        memory=per_trip["memory"] * sum(shape.lengths) * shape.dim * shape.itemsize,
    )


def embedding_forward(config: Config, shape: Shape) -> Work:
    """A program makes the bin weights of BLOCK_T tokens and their rows, BLOCK_D channels at a time."""
    tokens, bins, size = config["BLOCK_T"], shape.width, shape.itemsize
    flops, vector, exp2 = _bin_weights(shape, tokens)
    return _embedding(
        config, shape, np.ones(-(-sum(shape.lengths) // tokens)),
        products=flops + 2 * tokens * bins * shape.dim, vector=vector + 3 * tokens * shape.dim, exp2=exp2,
        cache=size * (bins * bins + bins * shape.dim + 2 * tokens * shape.dim),
        iterations=bins / config["BLOCK_H"] + shape.dim / config["BLOCK_D"], memory=2,
    )  # fmt: skip


def embedding_grad_bin_table(config: Config, shape: Shape) -> Work:
    """A program owns BLOCK_D channels and a chunk of tokens; every block of channels makes the bin weights again."""
    tokens, bins, size, channels = config["BLOCK_T"], shape.width, shape.itemsize, config["BLOCK_D"]
    flops, vector, exp2 = _bin_weights(shape, tokens)
    trips, _ = _chunked(shape, tokens, 64)
    return _embedding(
        config, shape, np.tile(trips, -(-shape.dim // channels)),
        products=flops + 2 * tokens * bins * channels, vector=vector, exp2=exp2,
        cache=size * (bins * bins + tokens * channels), iterations=bins / config["BLOCK_H"], memory=1,
    )  # fmt: skip


def embedding_grad_weights(config: Config, shape: Shape) -> Work:
    """A program owns BLOCK_W hidden units and a chunk of tokens; every block of units goes through all channels."""
    tokens, bins, size, units = config["BLOCK_T"], shape.width, shape.itemsize, config["BLOCK_W"]
    flops, vector, exp2 = _bin_weights(shape, tokens)
    trips, _ = _chunked(shape, tokens, 256)
    return _embedding(
        config, shape, np.tile(trips, -(-bins // units)),
        products=flops + 2 * tokens * bins * (shape.dim + 2 * units), vector=2 * vector, exp2=exp2,
        cache=size * (bins * bins + shape.dim * (bins + tokens) + bins * units),
        iterations=bins / config["BLOCK_H"] + shape.dim / config["BLOCK_D"], memory=1,
    )  # fmt: skip


def _favor_features(shape: Shape) -> int:
    return int(shape.width * np.log(shape.width))


def _favor_rows(config: Config, shape: Shape, *, products: int, written: int, tensors: int) -> Work:
    """Programs own BLOCK_T tokens of one head and walk over all features: an attention over as many keys."""
    rows, columns = config["BLOCK_T"], config["BLOCK_F"]
    trips = _trips(shape, rows, columns, _favor_features(shape))
    memory = _tensors(shape, tensors)
    return _attention(
        config, shape, rows, columns, trips, products=products, tiles=products, written=written, memory=memory
    )


def _favor_sums(config: Config, shape: Shape) -> Work:
    """Programs own BLOCK_F features of one head and walk over a chunk of 1,024 tokens. Memory: two tensors, and the
    float32 sums of every chunk."""
    rows, features = config["BLOCK_F"], _favor_features(shape)
    chunks = [min(1024, n - first) for n in shape.lengths for first in range(0, n, 1024)]
    programs = -(-features // rows) * shape.heads
    trips = np.tile(-(-np.asarray(chunks) // config["BLOCK_T"]), programs).astype(np.float64)
    memory = _tensors(shape, 2) + 4.0 * len(chunks) * shape.heads * features * shape.width
    return _attention(config, shape, rows, config["BLOCK_T"], trips, products=2, tiles=2, written=1, memory=memory)


def favor_context(config: Config, shape: Shape) -> Work:
    """projection k^T and features v for each block of keys."""
    return _favor_sums(config, shape)


def favor_query(config: Config, shape: Shape) -> Work:
    """q projection^T and features context for each block of features. Memory: q, out."""
    return _favor_rows(config, shape, products=2, written=1, tensors=2)


def favor_grad_query(config: Config, shape: Shape) -> Work:
    """q projection^T, grad_out context^T and grad_scores projection for each block of features. Memory: grad_out, q,
    out, grad_q."""
    return _favor_rows(config, shape, products=3, written=1, tensors=4)


def favor_grad_context(config: Config, shape: Shape) -> Work:
    """projection q^T and features grad_out for each block of queries."""
    return _favor_sums(config, shape)


def favor_grad_key_value(config: Config, shape: Shape) -> Work:
    """k projection^T, v grad_context^T, features grad_context and grad_scores projection for each block of features.
    Memory: k, v, grad_k, grad_v."""
    return _favor_rows(config, shape, products=4, written=2, tensors=4)


WorkOf = Callable[[Config, Shape], Work]
