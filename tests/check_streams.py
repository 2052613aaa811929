"""Streams of plain tensors on which methods decide without any model, for the check matrix.

The statistics of attention come from the oracle's explicit softmax; nothing of the rewriter is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracle import Stream, one_hot
from torch import Tensor
from untrained import untrained

from tamis.passes.reduction import TokenReduction
from tamis.passes.stream_state import StreamState
from tamis.registry import origin_of, registered_passes
from tamis.tokens import Plan, Tokens

LAYERS, LAST = 4, 3
CHANNELS, HEADS, WIDTH = 8, 2, 4
Groups = list[frozenset[int]]


def reductions() -> dict[str, type[TokenReduction]]:
    """Tamis's own token reductions by name."""
    known = [cls for cls in registered_passes().values() if issubclass(cls, TokenReduction) and not cls.grows]
    return {cls.name: cls for cls in known if origin_of(cls) == "tamis"}


def made(
    cls: type[TokenReduction],
    layers: Sequence[int] = (LAST,),
    channels: int = CHANNELS,
    depth: int = LAYERS,
    **amount: Any,
) -> TokenReduction:
    """A method with this amount (r, keep_ratio) at these layers, with random tensors where it has trained parts.

    One whose own parameters say how many tokens stay has their defaults.
    """
    amount = {} if cls.own_count is True else amount  # a property where parameters decide
    return untrained(cls, channels, depth, layers=layers, **amount)


class Exact(Stream):
    """Attention's statistics in float32 whatever the stream is, as the ops have them."""

    def passed(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Stream:
        """The stream right behind this attention."""
        self._qkv = (q, k, v, scale)
        return self

    def _probabilities(self) -> Tensor:
        kept, (q, k, v, scale) = self._qkv, self._now()
        self._qkv = (q.float(), k.float(), v.float(), scale)
        rows = super()._probabilities()
        self._qkv = kept
        return rows


@dataclass(frozen=True)
class Made:
    """A batch of rows at the last of four layers.  x [B, N, C]; q, k, v [B, H, N, D]; valid, sizes [B, N] or None."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    prefix: int = 1
    valid: Tensor | None = None
    sizes: Tensor | None = None
    grid: tuple[int, int] | None = None
    layer: int = LAST

    @staticmethod
    def random(seed: int, *, side: int = 4, batch: int = 3, prefix: int = 1, count: int | None = None) -> Made:
        """side x side patches behind the prefix, or `count` tokens that are on no grid."""
        count = prefix + side * side if count is None else count
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, count, CHANNELS, generator=generator)
        q, k, v = (torch.randn(batch, HEADS, count, WIDTH, generator=generator) for _ in range(3))
        grid = (side, side) if count == prefix + side * side else None
        return Made(x, 2 * q, k, v, prefix, grid=grid)

    def on(self, change: Any) -> Made:
        """With `change` made to x, q, k and v, whose tokens are on the last axis but one."""
        return replace(self, **{name: change(getattr(self, name)) for name in "xqkv"})

    def taken(self, index: Tensor) -> Made:
        """The tokens at `index` [N], the same in every row."""
        return self.on(lambda value: value.index_select(-2, index))

    def rows(self, which: slice) -> Made:
        """Some rows of the batch."""
        masks = {name: None if (m := getattr(self, name)) is None else m[which] for name in ("valid", "sizes")}
        return replace(self.on(lambda value: value[which]), **masks)

    def stream(self, method: TokenReduction) -> Stream:
        """The oracle's stream right behind attention."""
        one = Exact([method], LAYERS, self.prefix, self.valid, self.grid, sizes=self.sizes, normed=self.x)
        return one.passed(self.q, self.k, self.v, WIDTH**-0.5)

    def tokens(self, method: TokenReduction) -> Tokens:
        """What the method sees."""
        return self.stream(method)._view(method, method.rule(self.layer, LAYERS, self.prefix), self.layer, self.x)

    def plan(self, method: TokenReduction) -> Plan:
        """What it decides."""
        return method.plan(self.tokens(method))

    def reduced(self, method: TokenReduction) -> tuple[StreamState, Tensor]:
        """The state of a rewritten model's stream after the plan, and the hidden states [B, N', C]."""
        state = StreamState(self.x.shape[0], self.x.shape[1], self.valid, self.x.device)
        state.sizes = self.sizes
        return state, state.advance(self.x, self.plan(method), size_bias=method.tracks_sizes)


def groups(plan: Plan) -> list[Groups]:
    """For every row, the tokens in each slot that holds any, slot by slot."""
    return [[frozenset(slot.nonzero().flatten().tolist()) for slot in row if slot.any()] for row in one_hot(plan)]


def renamed(found: Groups, index: Tensor) -> Groups:
    """Groups of a permuted row in the names that its tokens had before: token i was token index[i]."""
    return [frozenset(int(index[i]) for i in group) for group in found]
