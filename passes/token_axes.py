"""Which axes of a live value are token axes, and at which point of the composed reduction they stand."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Axes:
    """Token axes of one value during re-execution.

    dims   its token axes, ascending
    batch  its batch axis; None when it was folded into another axis
    epoch  how many reductions its token axes have been through (never 0: before the first, nothing is tracked)
    start  leading prefix tokens that were cut off (`x[:, 1:]`): the axis is a segment, the tokens from `start` on.
           What was cut off has no token axis: prefix tokens keep their places
    """

    dims: tuple[int, ...]
    batch: int | None
    epoch: int
    start: int = 0

    def moved(self, order: list[int]) -> Axes:
        """After a permutation: new axis i is old axis order[i]."""
        position = {old: new for new, old in enumerate(order)}
        batch = None if self.batch is None else position[self.batch]
        return replace(self, dims=tuple(sorted(position[d] for d in self.dims)), batch=batch)

    def without(self, dim: int) -> Axes:
        """After axis `dim` (no token axis) is gone."""
        return self._shifted(lambda d: d - (d > dim), drop=dim)

    def with_new(self, dim: int) -> Axes:
        """After a new axis is put in at `dim`."""
        return self._shifted(lambda d: d + (d >= dim))

    def _shifted(self, move, drop: int | None = None) -> Axes:  # type: ignore[no-untyped-def]
        batch = None if self.batch is None or self.batch == drop else move(self.batch)
        return replace(self, dims=tuple(move(d) for d in self.dims), batch=batch)


Pieces = tuple[Axes | None, ...]  # of a value that is a list


class Restored:
    """Marks a value that was computed from tokens put back to full length: its axes are the original ones."""

    def __repr__(self) -> str:
        return "RESTORED"


RESTORED = Restored()


class NeedsFullLength(Exception):
    """Raised by a rule: this op reads the token axis in a way that only the full sequence answers."""
