"""What a sparse attention method reads while a model runs: pairs, and how much of dense attention lies in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tamis.attention_index import Heads
from tamis.passes.index_pairs import Held, held
from tamis.passes.sparse import SparseAttention

EVERY = 17  # one query of so many; shares no factor with a tile, so every place within a tile comes up


@dataclass
class Watched:
    """Answers as `method` does, and notes for each layer what it read there of what it was given.

    That is the rewritten model's own run: queries and keys are those after what the layers below have lost.
    """

    method: SparseAttention
    layers: list[Held] = field(default_factory=list)

    def attend(self, heads: Heads) -> Tensor:
        """The method's answer."""
        self.layers.append(looked_at(self.method, heads))
        return self.method.attend(heads)


def looked_at(method: SparseAttention, heads: Heads) -> Held:
    """What the method's index reads of one layer, over every EVERY-th query."""
    return held(heads, [method.index(heads)], after=EVERY - 1, every=EVERY)[0]


def mean_density(layers: Sequence[Held]) -> float:
    """Pairs read / pairs that causality allows, mean over heads and layers."""
    return sum(sum(one.density) / len(one.density) for one in layers) / len(layers)


def reading(layers: Sequence[Held], *, recall: bool) -> dict[str, Any]:
    """For the results: density; and each layer's recall, over its heads: mean and lowest."""
    found: dict[str, Any] = {"density": round(mean_density(layers), 4)}
    if recall:
        found["recall"] = [round(sum(one.recall) / len(one.recall), 4) for one in layers]
        found["lowest"] = [round(min(one.recall), 4) for one in layers]
    return found
