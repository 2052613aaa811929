"""Block-sparse and XAttention: tiles of keys chosen by an estimate of each tile's attention.

Sources: the block-sparse pattern of Jiang et al., "MInference 1.0", NeurIPS 2024, arXiv 2407.02490, section 3 (methods,
llm 1.3); Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", ICML 2025, arXiv 2503.16428
(methods, llm 1.6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention_index import SHARES, AttentionIndex, Heads
from ...counts import exact
from ...registry import register
from ..sparse import SparseAttention
from ..sparse_scores import ROUNDED_UP, antidiagonal_scores, near_tiles, pooled_logits, shared


@dataclass(frozen=True)
class TileMethod(SparseAttention):
    """Every row of `block` queries reads its best tiles of as many keys, the first and its own among them.

    Args:
        density: of the tiles that a row may read, at most this fraction is read (rounded up); 1.0 is dense attention.
        block: tokens of a tile.
        share: who shares a choice: each "query" head has its own (published), those of a "kv" head or of the "layer"
            have that of their mean score.
        sink: always read the first tile; not in layers with a window of the model's own.
        diagonal: always read the row's own tile.
        layers: layers to use it in; all of them by default.
    """

    density: float = 0.25
    block: int = 64
    share: str = "query"
    sink: bool = True
    diagonal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            density=("in (0, 1]", 0 < self.density <= 1),
            block=("1 or more", self.block >= 1),
            share=(f"one of {', '.join(SHARES)}", self.share in SHARES),
        )

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """Every tile."""
        return cls(density=1.0)

    @property
    def mass(self) -> float:
        """Part of a row's estimated attention that is enough."""
        return 1.0

    @property
    def keep(self) -> list[int]:
        """Tiles read of n, as pick_tiles has it."""
        part = exact(self.density)
        return [part.numerator, part.denominator - 1, part.denominator]

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"reads at most {self.density:.0%} of the {self.block} x {self.block} tiles"

    def scores(self, heads: Heads) -> Tensor:
        """The estimate of each tile for those who share a choice, [B, S, R, C]; -inf: not to be read."""
        raise NotImplementedError

    def index(self, heads: Heads) -> AttentionIndex:
        """The best tiles."""
        scores = self.scores(heads)
        if heads.window:
            place = torch.arange(scores.shape[3], device=scores.device)
            scores = torch.where(near_tiles(heads, place, self.block), scores, -torch.inf)
        sink = self.sink and not heads.window  # which most rows do not see
        tiles = torch.ops.tamis.pick_tiles(
            scores, heads.lengths, self.block, heads.causal, sink, self.diagonal, self.keep, self.mass
        )
        return AttentionIndex(rows=self.block, width=self.block, tiles=tiles, share=self.share, aligned=True)


@register("block-sparse")
@dataclass(frozen=True)
class BlockSparse(TileMethod):
    """Every row of queries reads the tiles whose mean key is closest to its mean query.

    Differs from the published pattern: the row's own tile and the first are always read (without them a row can lose
    its own tokens), padding is in no mean, and the budget is a fraction unless `tiles` is given (published: 100).

    Args:
        density: of the tiles that a row may read, at most this fraction is read (rounded up); 1.0 is dense attention.
        block: tokens of a tile.
        share: who shares a choice: each "query" head has its own (published), those of a "kv" head or of the "layer"
            have that of their mean score.
        sink: always read the first tile; not in layers with a window of the model's own.
        diagonal: always read the row's own tile.
        tiles: a row reads at most so many tiles, however many there are; 0: as `density` says.
        layers: layers to use it in; all of them by default.
    """

    bidirectional = True

    tiles: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(tiles=("0 or more", self.tiles >= 0))

    @property
    def keep(self) -> list[int]:
        """Tiles read of n, as pick_tiles has it."""
        return [0, self.tiles, 1] if self.tiles else super().keep

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"reads at most {self.tiles} tiles of {self.block} x {self.block}" if self.tiles else super().reads

    def scores(self, heads: Heads) -> Tensor:
        """Products of mean queries and mean keys."""
        return shared(pooled_logits(heads, heads.keys, self.block), heads, self.share)


@register("x-attention")
@dataclass(frozen=True)
class XAttention(TileMethod):
    """Every row of queries reads the tiles that hold `threshold` of its attention, estimated along antidiagonals.

    Differs from the published code: the estimate sees all earlier keys at every length, any device computes the same,
    and `density` bounds the tiles, since an index has a fixed capacity.

    Args:
        density: of the tiles that a row may read, at most this fraction is read (rounded up); 1.0 is dense attention.
        block: tokens of a tile (published: 128).
        share: who shares a choice: each "query" head has its own (published), those of a "kv" head or of the "layer"
            have that of their mean score.
        sink: always read the first tile; not in layers with a window of the model's own.
        diagonal: always read the row's own tile.
        threshold: part of the estimated attention that is enough; 1.0: no limit but the density.
        stride: distance of the antidiagonals; divides the block (published: 8 or 16).
        layers: layers to use it in; all of them by default.
    """

    block: int = 128
    threshold: float = 0.9
    stride: int = 8

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """Every tile, whatever it holds."""
        return cls(density=1.0, threshold=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            threshold=("between 0 and 1", 0 <= self.threshold <= ROUNDED_UP),
            stride=(f"a divisor of the block, {self.block}", self.stride >= 1 and self.block % self.stride == 0),
        )

    @property
    def mass(self) -> float:
        """Part of a row's estimated attention that is enough."""
        return self.threshold

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"{super().reads}, until they hold {self.threshold:.0%} of the estimated attention"

    def scores(self, heads: Heads) -> Tensor:
        """Sums of the softmax over antidiagonals."""
        return shared(antidiagonal_scores(heads, self.block, self.stride), heads, self.share)
