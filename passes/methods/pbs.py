"""PBS-Attn: keys are put in order of importance within segments before tiles of them are chosen.

Source: Wang et al., "Sparser Block-Sparse Attention via Token Permutation", 2025, arXiv 2510.21270 (methods, llm 1.8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention_index import SHARES, AttentionIndex, Heads
from ...counts import exact
from ...kernels.attention import capped
from ...registry import register
from ..sparse import SparseAttention, permuted
from ..sparse_scores import (
    ROUNDED_UP,
    covering,
    first_seen,
    in_tiles,
    last_places,
    pooled_logits,
    ranks,
    real_tiles,
    repeated,
    shared,
)
from ..stream_state import take_rows


@register("pbs")
@dataclass(frozen=True)
class PBS(SparseAttention):
    """Every row of queries reads its own segment, and of the segments before the tiles that hold `threshold`.

    Within every whole segment of real tokens the keys are ordered by the attention of the last queries, so that
    important ones share a tile: every key of an earlier segment comes before every query of a later one, whatever the
    order.  Queries stay where they are, as in the published code.  Differs from it: the order is that of a key head
    (the mean over its query heads), not of each query head, so that keys and values are copied once and shared by
    the group; the softmax counts only real queries; a threshold of 1 reads everything, also as a float; and `density`
    bounds the tiles, since an index has a fixed capacity.

    Args:
        density: of the tiles of earlier segments, at most this fraction is read (rounded up); its own segment and the
            tile with the first token are always read.
        block: tokens of a tile, and queries of a row.
        segment: tokens within which keys are ordered; a multiple of the block.
        threshold: part of the pooled attention to earlier segments that is enough; 1.0: everything.
        share: who shares a choice: each "query" head has its own (published), those of a "kv" head or of the "layer"
            have that of their mean; heads of a "layer" share the order of keys too.
        layers: layers to use it in; all of them by default.
    """

    density: float = 1.0
    block: int = 128
    segment: int = 256
    threshold: float = 0.9
    share: str = "query"

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """Every tile, whatever it holds."""
        return cls(threshold=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            density=("in (0, 1]", 0 < self.density <= 1),
            block=("1 or more", self.block >= 1),
            threshold=("between 0 and 1", 0 <= self.threshold <= ROUNDED_UP),
            share=(f"one of {', '.join(SHARES)}", self.share in SHARES),
        )
        whole = self.segment >= 1 and self.segment % self.block == 0
        self.require(segment=(f"a multiple of the block, {self.block}", whole))

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        most = f", at most {self.density:.0%}" if self.density < 1 else ""
        return f"reads its segment of {self.segment}, and the tiles that hold {self.threshold:.0%} of the others{most}"

    def index(self, heads: Heads) -> AttentionIndex:
        """The order of keys, and the tiles of it."""
        order = self.order(heads)
        part = exact(self.density)
        room = self.segment // self.block + 1  # its own segment, and the tile of the first token
        keep = [part.numerator, part.denominator * (room + 1) - 1, part.denominator]
        tiles = torch.ops.tamis.pick_tiles(
            self.scores(heads, order), heads.lengths, self.block, False, False, False, keep, 1.0
        )
        return AttentionIndex(rows=self.block, width=self.block, tiles=tiles, share=self.share, permutation=order)

    def order(self, heads: Heads) -> Tensor:
        """[B, Hk, N] int32: the token whose key is at each place.  Ties: lowest token; a broken segment stays."""
        weights = shared(self._weights(heads), heads, "layer" if self.share == "layer" else "kv")
        weights = weights.expand(-1, heads.keys.shape[1], -1)
        parts = in_tiles(weights.unsqueeze(-1), self.segment).squeeze(-1)
        within = parts.sort(dim=-1, descending=True, stable=True).indices
        start = torch.arange(parts.shape[2], device=parts.device).unsqueeze(1) * self.segment
        place = torch.arange(heads.tokens, device=parts.device)
        return (within + start).flatten(2).index_select(2, place).to(torch.int32)

    def _weights(self, heads: Heads) -> Tensor:
        """[B, H, N] mean attention of the last `block` real queries to all keys of whole segments; 0 elsewhere."""
        place = last_places(heads, self.block)
        token, ends = torch.arange(heads.tokens, device=place.device), place[:, -1:] + 1
        queries = take_rows(heads.queries, place.clamp(min=0), 2, 0).float()
        logits = capped(queries @ repeated(heads.keys, heads).float().transpose(2, 3) * heads.scale, heads.softcap)
        whole = token < ends // self.segment * self.segment
        there = (place >= 0)[:, None, :, None]
        seen = there & whole[:, None, None, :]
        if heads.window:
            seen = seen & (place.unsqueeze(2) - token < heads.window).unsqueeze(1)
        weights = torch.where(seen, logits, torch.finfo(torch.float32).min).softmax(-1)
        return torch.where(seen, weights, 0.0).sum(2) / there.sum(2).clamp(min=1)

    def scores(self, heads: Heads, order: Tensor) -> Tensor:
        """[B, S, R, C] pooled attention to chosen tiles of earlier segments, 2 for what is always read, or -inf."""
        tile = torch.arange((heads.tokens + self.block - 1) // self.block, device=order.device)
        segment = tile * self.block // self.segment
        near = self._near(heads, order)
        earlier = (segment < segment.unsqueeze(1)) & real_tiles(heads, self.block).unsqueeze(3) & near
        logits = shared(pooled_logits(heads, permuted(heads.keys, order), self.block), heads, self.share)
        weights = torch.where(earlier, logits, torch.finfo(torch.float32).min).softmax(-1)
        weights = torch.where(earlier, weights, -1.0)
        part = exact(self.density)
        most = (part.numerator * earlier.sum(-1, keepdim=True) + part.denominator - 1) // part.denominator
        chosen = earlier & covering(weights.clamp(min=0), self.threshold, crossing=True) & (ranks(weights) < most)
        first = in_tiles((order == 0).float().unsqueeze(-1), self.block).sum((3, 4)) > 0  # [B, Hk, C]
        always = (segment == segment.unsqueeze(1)) & near | (self._of_sets(first, heads).unsqueeze(2) & earlier)
        return torch.where(always, 2.0, torch.where(chosen, weights, -torch.inf))

    def _near(self, heads: Heads, order: Tensor) -> Tensor:
        """[B, S, R, C] bool: whether a tile ends within the window of a row's first query; or all true, of any size."""
        if not heads.window:
            return torch.ones((), dtype=torch.bool, device=order.device)
        ends = in_tiles(order.unsqueeze(-1), self.block).amax((3, 4))
        return self._of_sets(ends, heads).unsqueeze(2) >= first_seen(heads, self.block)

    def _of_sets(self, x: Tensor, heads: Heads) -> Tensor:
        """x [B, Hk, C] of key heads for those who share a choice, [B, S, C]."""
        return x[:, :1] if self.share == "layer" else repeated(x, heads) if self.share == "query" else x
