"""Vertical-slash: columns that all read, and diagonals, found from the last queries of the prompt.

Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
NeurIPS 2024, arXiv 2407.02490, section 3 (methods, llm 1.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...attention_index import SHARES, AttentionIndex, Heads
from ...registry import register
from ..sparse import SparseAttention
from ..sparse_scores import best, diagonal_sums, first_seen, is_real, last_queries, shared


@register("vertical-slash")
@dataclass(frozen=True)
class VerticalSlash(SparseAttention):
    """Every token reads the `columns` keys and the `slashes` diagonals to which the last queries attend most.

    Diagonals are read as tiles of `block` keys, so more is read than was chosen.  The first `sink` columns and the
    `near` nearest diagonals are always among them, and count; where fewer were asked for, they are all.

    Args:
        columns: keys that every later token reads (published default 1000).
        slashes: diagonals read, each a distance (published default 6096).
        sink: first keys, always among the columns.
        near: shortest distances, always among the diagonals.
        estimate: last queries of the prompt from which both are chosen.
        share: who shares a choice: each "query" head has its own (published), those of a "kv" head or of the "layer"
            have that of their mean.
        block: queries of a row and keys of a tile.
        layers: layers to use it in; all of them by default.
    """

    columns: int = 1000
    slashes: int = 6096
    sink: int = 30
    near: int = 100
    estimate: int = 64
    share: str = "query"
    block: int = 64

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """Every diagonal."""
        return cls(slashes=tokens)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("columns", "slashes", "sink")
        self.require(
            **{name: ("0 or more", getattr(self, name) >= 0) for name in names},
            **{name: ("1 or more", getattr(self, name) >= 1) for name in ("near", "estimate", "block")},
            share=(f"one of {', '.join(SHARES)}", self.share in SHARES),
        )

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"reads {max(self.columns, self.sink)} columns and {max(self.slashes, self.near)} diagonals"

    def index(self, heads: Heads) -> AttentionIndex:
        """Column and diagonal sums of the last queries' attention, the best of each, and their tiles."""
        weights, place = last_queries(heads, self.estimate)
        columns, slashes = (shared(sums, heads, self.share) for sums in (weights.sum(2), diagonal_sums(weights, place)))
        token, real = torch.arange(heads.tokens, device=columns.device), is_real(heads).unsqueeze(1)
        shown = real & (token < heads.window) if heads.window else real
        tiles, single = torch.ops.tamis.slash_tiles(
            best(slashes, max(self.slashes, self.near), shown, token < self.near),
            best(columns, max(self.columns, self.sink, 1), real, token < self.sink),
            heads.tokens,
            self.block,
        )
        if heads.window:
            single = torch.where(single < first_seen(heads, self.block), -1, single)
        return AttentionIndex(rows=self.block, width=self.block, tiles=tiles, columns=single, share=self.share)
