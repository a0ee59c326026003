"""The order of an epoch: which cells a step takes, and which of its batches each goes to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Cells = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Order:
    """Cells in the order in which batches take them.

    cells    (n,) numbers of the cells
    windows  (w + 1,) positions at which windows begin, and n
    lengths  (n,) expressed genes of each
    """

    cells: Cells
    windows: Array
    lengths: Array
    batch_tokens: int
    batch_cells: int | None
    cost: tuple[float, float, float]

    def steps(self, num_parts: int) -> Array:
        """(steps + 1,) positions at which steps of num_parts batches begin, and the end of the last.

        Batches are filled in order, as far as their limits go, and a step is num_parts of them: which cells are in the
        first k batches does not depend on the number of parts.
        """
        total = len(self.cells)
        if 0 < total < num_parts:
            raise ValueError(
                f"world_size, accumulate: expected at most as many batches a step as there are cells, got {num_parts} "
                f"batches and {total} cells"
            )
        bounds = self._filled(0, total)
        steps = [*bounds[:-1:num_parts], total]
        missing = num_parts - (steps[-1] - steps[-2]) if total else 0
        if missing > 0:
            # Every batch of the last step has a cell: the step before it gives some away, or there is no last step.
            gives = len(steps) > 2 and steps[-2] - missing - steps[-3] >= num_parts
            if gives:
                steps[-2] -= missing
            else:
                del steps[-1]
        return np.array(steps)

    def parts(self, start: int, stop: int, num_parts: int) -> Array:
        """(stop - start,) the batch of the step, 0 ... num_parts - 1, for each of its cells.

        The costliest cells first, each to the batch that costs least so far and has room for it.
        """
        lengths = self.lengths[start:stop]
        constant, linear, quadratic = self.cost
        costs = constant + lengths * (linear + quadratic * lengths)
        part_of = np.zeros(len(lengths), np.int64)
        if num_parts == 1:
            return part_of
        cells, tokens, spent = [0] * num_parts, [0] * num_parts, [0.0] * num_parts
        most = math.inf if self.batch_cells is None else self.batch_cells
        for i in np.argsort(-costs, kind="stable").tolist():
            length = int(lengths[i])
            fitting = [
                part for part in range(num_parts) if cells[part] < most and tokens[part] + length <= self.batch_tokens
            ]
            if not fitting:
                return self._parts_in_order(start, stop, num_parts)
            part = min(fitting, key=lambda part: spent[part])
            part_of[i] = part
            cells[part] += 1
            tokens[part] += length
            spent[part] += float(costs[i])
        return part_of

    def _parts_in_order(self, start: int, stop: int, num_parts: int) -> Array:
        """The batches as they were filled, where no balanced ones keep to the limits; halved until there are enough."""
        bounds = self._filled(start, stop)
        while len(bounds) <= num_parts:
            longest = int(np.argmax(np.diff(bounds)))
            bounds.insert(longest + 1, (bounds[longest] + bounds[longest + 1]) // 2)
        return np.repeat(np.arange(num_parts), np.diff(bounds))

    def _filled(self, start: int, stop: int) -> list[int]:
        """Positions at which batches begin that are filled in order, and stop."""
        past = np.cumsum(self.lengths[start:stop])
        bounds = [start]
        while bounds[-1] < stop:
            begin = bounds[-1] - start
            before = int(past[begin - 1]) if begin else 0
            end = int(np.searchsorted(past, before + self.batch_tokens, side="right"))
            if self.batch_cells is not None:
                end = min(end, begin + self.batch_cells)
            bounds.append(start + end)
        return bounds
