"""SpargeAttn's selection: pooled attention, where tiles are alike within, and everything where they are not.

Source: Zhang et al., "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference",
ICML 2025, arXiv 2502.18137, section 3 (methods, llm 1.7).  Its 8-bit products and the skipping inside the kernel are
no selection and are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...attention_index import Heads
from ...registry import register
from ..sparse import SparseAttention
from ..sparse_scores import ROUNDED_UP, covering, is_real, pooled_logits, repeated, seen_tiles, shared, tile_means
from .block_sparse import TileMethod


@register("sparge")
@dataclass(frozen=True)
class Sparge(TileMethod):
    """Every row of queries reads the tiles that hold `threshold` of its pooled attention.

    Tiles whose members are unlike each other (mean cosine up to `similarity`) say nothing by their mean: such a tile of
    keys is read by all, and such a tile of queries reads all, as far as `density` lets them: those of highest pooled
    attention first.  Differs from the published code: rows and tiles are of one size, the first tile and the row's own
    are always read, the tile that crosses the threshold is read too, and causality holds within tiles.

    Args:
        density: of the tiles that a row may read, at most this fraction is read (rounded up).
        block: tokens of a tile.
        share: who shares a choice: each "query" head has its own (published), those of a "kv" head or of the "layer"
            have what any of them chose.
        sink: always read the first tile; not in layers with a window of the model's own.
        diagonal: always read the row's own tile.
        threshold: part of the pooled attention that is enough.
        similarity: mean cosine up to which a tile counts as mixed; -1 and less: none does.
        crossing: read the tile with which the threshold is reached (the published code does not).
        layers: layers to use it in; all of them by default.
    """

    bidirectional = True

    density: float = 1.0
    threshold: float = 0.98
    similarity: float = 0.6
    crossing: bool = True

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """Every tile, whatever it holds."""
        return cls(threshold=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            threshold=("between 0 and 1", 0 <= self.threshold <= ROUNDED_UP),
            similarity=("between -1 and 1", -1 <= self.similarity <= 1),
        )

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"reads the tiles that hold {self.threshold:.0%} of the pooled attention, at most {self.density:.0%}"

    def scores(self, heads: Heads) -> Tensor:
        """Pooled attention; 2 to 3 where a tile is mixed, by pooled attention too; -inf for tiles that are not read."""
        keys = heads.keys.float() - self._mean(heads.keys, heads)
        seen = seen_tiles(heads, self.block)
        mixed = repeated(self._alike(keys, heads), heads) <= self.similarity
        told = seen & ~mixed.unsqueeze(2)
        pooled = pooled_logits(heads, keys, self.block)
        weights = torch.where(told, pooled, torch.finfo(pooled.dtype).min).softmax(-1)
        weights = torch.where(told, weights, 0.0)
        chosen = covering(weights, self.threshold, crossing=self.crossing) & told
        best = (weights == weights.amax(-1, keepdim=True)) & told
        all_of = mixed.unsqueeze(2) | (self._alike(heads.queries, heads) <= self.similarity).unsqueeze(3)
        score = torch.where(seen & all_of, 2 + self._order(pooled, seen), torch.where(chosen | best, weights, -1.0))
        score = shared(score, heads, self.share) if self.share == "query" else self._any(score, heads)
        return torch.where(score >= 0, score, -torch.inf)

    def _any(self, score: Tensor, heads: Heads) -> Tensor:
        """The largest score among those that share."""
        sets = 1 if self.share == "layer" else heads.keys.shape[1]
        return score.reshape(score.shape[0], sets, -1, *score.shape[2:]).amax(2)

    def _order(self, pooled: Tensor, seen: Tensor) -> Tensor:
        """Where each tile lies between the row's lowest, 0, and highest, 1: which mixed ones go where a cap does."""
        low = torch.where(seen, pooled, torch.inf).amin(-1, keepdim=True)
        high = torch.where(seen, pooled, -torch.inf).amax(-1, keepdim=True)
        return ((pooled - low) / (high - low).clamp(min=1e-20)).clamp(0, 1)

    def _mean(self, x: Tensor, heads: Heads) -> Tensor:
        real = is_real(heads).float()[:, None, :, None]
        return (x.float() * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)

    def _alike(self, x: Tensor, heads: Heads) -> Tensor:
        """Mean cosine of all pairs in each tile [B, H, R]: the squared length of the mean direction."""
        return tile_means(normalize(x.float(), dim=-1, eps=1e-12), heads, self.block).square().sum(-1)
