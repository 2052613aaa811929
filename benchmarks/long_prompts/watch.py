"""What sparse attention passes read while a model runs: pairs, and how much of dense attention lies in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from torch import Tensor

from tamis.attention_index import Heads
from tamis.graph import TokenGraph
from tamis.passes.index_pairs import Held, held
from tamis.passes.sparse import SparseAttention
from tamis.passes.sparse_rewrite import Part, Placed, place

EVERY = 17  # one query of so many; shares no factor with a tile, so every place within a tile comes up


@dataclass
class Watched:
    """One or more passes where a graph lets them answer; what they read is noted, summed over all prompts.

    That is the rewritten model's own run: queries and keys are those after what the layers below have lost.

    heads  query heads of each layer
    notes  what was read, by layer and the query heads that a pass has of it; all others are dense
    """

    passes: Sequence[SparseAttention]
    heads: list[int] = field(default_factory=list)
    notes: dict[tuple[int, tuple[int, ...]], Held] = field(default_factory=dict)

    def placed(self, graph: TokenGraph) -> Placed:
        """Who answers at which attention node."""
        self.heads = [graph.sites[layer.site].heads for layer in graph.layers]
        placed = place(graph, self.passes, [])
        return {
            node: (layer, [self.noting(layer.index, part) for part in parts]) for node, (layer, parts) in placed.items()
        }

    def noting(self, layer: int, part: Part) -> Part:
        """The part as it answers and is noted."""
        note: Any = Noting(part.method, (layer, part.heads), self.notes)
        return Part(note, part.heads)

    def of_heads(self, what: str) -> list[list[float]]:
        """The "density" or "recall" by layer of each query head."""
        found = [[1.0] * heads for heads in self.heads]
        for (layer, heads), one in self.notes.items():
            for head, value in zip(heads, getattr(one, what), strict=True):
                found[layer][head] = value
        return found

    def reading(self, *, recall: bool) -> dict[str, Any]:
        """For the results: density; and each layer's recall, over its heads: mean and lowest."""
        found: dict[str, Any] = {"density": round(fmean(map(fmean, self.of_heads("density"))), 4)}
        if recall:
            found["recall"] = [round(fmean(heads), 4) for heads in self.of_heads("recall")]
            found["lowest"] = [round(min(heads), 4) for heads in self.of_heads("recall")]
        return found


@dataclass(frozen=True)
class Noting:
    """Answers as `method` does, and adds what its index reads to the notes."""

    method: SparseAttention
    at: tuple[int, tuple[int, ...]]
    notes: dict[tuple[int, tuple[int, ...]], Held]

    def attend(self, heads: Heads) -> Tensor:
        """The method's answer."""
        found = looked_at(self.method, heads)
        self.notes[self.at] = self.notes[self.at] + found if self.at in self.notes else found
        return self.method.attend(heads)


def looked_at(method: SparseAttention, heads: Heads) -> Held:
    """What the method's index reads of one layer, over every EVERY-th query."""
    return held(heads, [method.index(heads)], after=EVERY - 1, every=EVERY)[0]
