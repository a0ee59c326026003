"""Kinds of numbers that a matrix may hold. It imports nothing, for a command line that answers at once."""

from __future__ import annotations

from dataclasses import dataclass

VALUES = ("counts", "log1p", "tpm")


@dataclass(frozen=True)
class ValueKind:
    """What the numbers of a matrix are.

    values      "counts": raw counts, which are divided by the cell's total; "log1p": log1p(count / total * 10,000)
                already; "tpm": transcripts or counts per million or any other number that is proportional to counts,
                not logged, and divided by its sum over the cell
    fractional  counts that need not be whole: estimated ones, or corrected for ambient RNA
    """

    values: str = "counts"
    fractional: bool = False

    @classmethod
    def checked(cls, values: str | None, normalized: bool, fractional_counts: bool) -> ValueKind:
        """From the options of a reading function; ``normalized`` is another word for values "log1p".

        Raises ValueError for an unknown kind, or options that do not go together.
        """
        if values is not None and values not in VALUES:
            raise ValueError(f"values: expected one of {', '.join(VALUES)}, got {values!r}")
        if normalized and values not in (None, "log1p"):
            raise ValueError(
                f"normalized: expected False with values={values!r}, got True, which is 'log1p'; leave one out"
            )
        kind = cls("log1p" if normalized else values or "counts", fractional_counts)
        if fractional_counts and kind.values != "counts":
            raise ValueError(
                f"fractional_counts: expected False where values are not counts, got True with "
                f"values={kind.values!r}; leave one out"
            )
        return kind

    @property
    def whole(self) -> bool:
        """Whether every number has to be whole."""
        return self.values == "counts" and not self.fractional

    @property
    def logged(self) -> bool:
        """Whether the numbers are taken as they are."""
        return self.values == "log1p"
