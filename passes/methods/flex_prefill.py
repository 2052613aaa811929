"""FlexPrefill: every head has vertical-slash blocks or a map of its own, as its last queries say.

Source: Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
ICLR 2025, arXiv 2502.20766, section 4 (methods, llm 1.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention_index import Heads
from ...registry import register
from ..sparse import SparseAttention
from ..sparse_scores import (
    covering,
    diagonal_sums,
    in_tiles,
    last_queries,
    pooled_logits,
    ranks,
    real_tiles,
    repeated,
    seen_tiles,
    shared,
    tile_means,
)
from ..stream_state import take_rows
from .block_sparse import TileMethod


@register("flex-prefill")
@dataclass(frozen=True)
class FlexPrefill(TileMethod):
    """Blocks that hold `gamma` of the last queries' attention along columns and diagonals.

    A head whose pooled attention tells well where its true attention goes (the root of their Jensen-Shannon divergence
    is below `tau`) also reads the blocks that hold `gamma` of its whole pooled map.  Differs from the published code:
    0 log 0 is 0 in the divergence (there it is NaN, and the head never gets a map), padding is left out, and `density`
    bounds the blocks of a row, best first, since an index has a fixed capacity.

    Args:
        density: of the tiles that a row may read, at most this fraction is read (rounded up).
        block: tokens of a tile (published: 128).
        share: who shares a choice: each "query" head has its own (published), those of a "kv" head or of the "layer"
            have that of their mean.
        sink: always read the first tile; not in layers with a window of the model's own.
        diagonal: always read the row's own tile.
        gamma: part of the estimated attention that is enough (published: 0.9, or 0.95 for accuracy).
        tau: divergence below which a head gets a map of its own; 0: none does.
        min_budget: tokens that columns and diagonals have at least, each.
        layers: layers to use it in; all of them by default.
    """

    density: float = 1.0
    block: int = 128
    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """A least budget of all tokens."""
        return cls(min_budget=tokens)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            gamma=("in (0, 1]", 0 < self.gamma <= 1),
            tau=("between 0 and 1", 0 <= self.tau <= 1),
            min_budget=("1 or more", self.min_budget >= 1),
        )

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"reads the tiles that hold {self.gamma:.0%} of the last queries' attention, at most {self.density:.0%}"

    def scores(self, heads: Heads) -> Tensor:
        """Column and diagonal sums of each block; -inf for blocks that are not read."""
        weights, place = last_queries(heads, self.block)
        weights = shared(weights, heads, self.share)
        columns, slashes = weights.mean(2), diagonal_sums(weights, place) / self.block
        own_map = self._predicted(heads, columns, place)
        of_columns, chosen_columns = self._blocks(columns, own_map)
        of_slashes, chosen_slashes = self._blocks(slashes, own_map)
        row = torch.arange(of_columns.shape[2], device=place.device)
        apart = row.unsqueeze(1) - row
        spread = apart.clamp(min=0).expand(*of_slashes.shape[:2], -1, -1)
        slanting = chosen_slashes.unsqueeze(2).expand(spread.shape).gather(3, spread) & (apart >= 0)
        chosen = chosen_columns.unsqueeze(2) | slanting | (own_map[..., None] & self._mapped(heads))
        score = of_columns.unsqueeze(2) + of_slashes.unsqueeze(2).expand(spread.shape).gather(3, spread)
        return torch.where(chosen & (apart >= 0), score, -torch.inf)

    def _blocks(self, sums: Tensor, own_map: Tensor) -> tuple[Tensor, Tensor]:
        """Sums [B, S, N] per block [B, S, R], and which blocks are read; a head with a map has the smallest budget."""
        needed = (sums.sort(dim=-1, descending=True).values.cumsum(-1) <= self.gamma).sum(-1, keepdim=True) + 1
        least = -(-self.min_budget // self.block)
        many = torch.where(own_map, least, (needed // self.block + 1).clamp(min=least))
        pooled = in_tiles(sums.unsqueeze(-1), self.block).sum((3, 4))
        place = torch.arange(pooled.shape[2], device=sums.device)
        return pooled, ranks(torch.where(place == 0, torch.inf, pooled)) < many

    def _predicted(self, heads: Heads, columns: Tensor, place: Tensor) -> Tensor:
        """[B, S, 1] bool: whether pooled attention tells where the last queries' attention goes."""
        queries = take_rows(heads.queries, place.clamp(min=0), 2, 0).float()
        there = (place >= 0)[:, None, :, None].float()
        query = (queries * there).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)
        keys = repeated(tile_means(heads.keys, heads, self.block), heads)
        pooled = (query @ keys.transpose(2, 3) * heads.scale).squeeze(2)
        pooled = shared(
            torch.where(real_tiles(heads, self.block), pooled, torch.finfo(pooled.dtype).min).softmax(-1),
            heads,
            self.share,
        )
        true = in_tiles(columns.unsqueeze(-1), self.block).sum((3, 4))
        middle = (pooled + true) / 2
        divergence = sum(
            (torch.special.xlogy(one, one) - torch.special.xlogy(one, middle)).sum(-1, keepdim=True) / 2
            for one in (pooled, true)
        )
        return divergence.clamp(min=0).sqrt() < self.tau  # type: ignore[union-attr]

    def _mapped(self, heads: Heads) -> Tensor:
        """[B, S, R, C] bool: blocks that hold gamma of the pooled map, of all rows together."""
        logits, seen = pooled_logits(heads, heads.keys, self.block), seen_tiles(heads, self.block)
        weights = torch.where(seen, logits, torch.finfo(logits.dtype).min).softmax(-1)
        seen = seen & real_tiles(heads, self.block).unsqueeze(3)
        weights = shared(torch.where(seen, weights, 0.0), heads, self.share)
        flat = weights.flatten(2)
        flat = flat / flat.sum(-1, keepdim=True).clamp(min=1e-20)
        return covering(flat, self.gamma, crossing=False).reshape(weights.shape)
