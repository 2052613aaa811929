"""Longformer and BigBird: a window, some global tokens, and random tiles; nothing depends on the input.

Sources: Beltagy et al., "Longformer: The Long-Document Transformer", arXiv 2004.05150, section 3; Zaheer et al., "Big
Bird: Transformers for Longer Sequences", NeurIPS 2020, arXiv 2007.14062, section 2 (methods, llm 1.10).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...attention_index import AttentionIndex, Heads
from ...registry import register
from ..sparse import SparseAttention
from ..sparse_scores import drawn_tiles, near_tiles


@register("longformer")
@dataclass(frozen=True)
class Longformer(SparseAttention):
    """Every token reads `window` / 2 tokens to each side (before it, where causal) and the first `first` tokens.

    Those first tokens read all.  Differs: global tokens have no projections of their own, which a mask alone cannot
    give them; models trained with the pattern have them, others lose by it.  Heads whose window has gaps are `dilated`.

    Args:
        window: tokens read around each one (published: 512), to both sides together.
        first: tokens at the start that are global.
        layers: layers to use it in; all of them by default.
    """

    bidirectional = True

    window: int = 512
    first: int = 1

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """A window over everything."""
        return cls(window=2 * tokens)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(window=("0 or more", self.window >= 0), first=("0 or more", self.first >= 0))

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"reads {self.window // 2} tokens to each side and the first {self.first}, which read all"

    def index(self, heads: Heads) -> AttentionIndex:
        """All parts are the op's own."""
        return AttentionIndex(rows=64, sink=self.first, local=self.window // 2 + 1, first=self.first)


@register("bigbird")
@dataclass(frozen=True)
class BigBird(SparseAttention):
    """Every tile of tokens reads the first and the last tile, its neighbours, and `random` others.

    The first and the last `block` tokens read all.  The draw is an integer hash of (seed, layer, row, tile), the same
    for all heads and inputs.  Differs: the published draw is a generator's; under causal attention what comes later is
    not read.

    Args:
        block: tokens of a tile.
        random: tiles drawn for each row.
        seed: another draw for each.
        layers: layers to use it in; all of them by default.
    """

    bidirectional = True

    block: int = 64
    random: int = 3
    seed: int = 0

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """Every tile is drawn."""
        return cls(random=-(-tokens // cls.block))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(block=("1 or more", self.block >= 1), random=("0 or more", self.random >= 0))

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"reads the first and last tile of {self.block}, its neighbours and {self.random} others"

    def index(self, heads: Heads) -> AttentionIndex:
        """Random scores below those of the tiles that are always read."""
        device = heads.queries.device
        tile = torch.arange((heads.tokens + self.block - 1) // self.block, device=device)
        row = tile.unsqueeze(1)
        drawn = drawn_tiles(heads, self.block, self.seed)
        end = tile[-1:] if heads.lengths is None else ((heads.lengths - 1) // self.block).reshape(-1, 1, 1, 1)
        always = ((row - tile).abs() <= 1) | (tile == 0) | (tile == end)
        seen = near_tiles(heads, tile, self.block)
        scores = torch.where(seen, torch.where(always, torch.inf, drawn), -torch.inf)
        tiles = torch.ops.tamis.pick_tiles(
            scores, heads.lengths, self.block, heads.causal, not heads.window, True, [0, 5 + self.random, 1], 1.0
        )
        size = self.block
        return AttentionIndex(rows=size, width=size, tiles=tiles, first=size, last=size, aligned=True)
