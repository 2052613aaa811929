"""InfLLM: blocks of far keys, looked up by the keys that the tokens near them attended to most.

Source: Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
NeurIPS 2024, arXiv 2402.04617, section 3 (methods, llm 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention_index import SHARES, AttentionIndex, Heads
from ...registry import register
from ..sparse import arguments
from ..sparse_scores import best, first_seen, ranks, shared, tile_means
from .lm_infinite import TwoAngles


@register("infllm")
@dataclass(frozen=True)
class InfLLM(TwoAngles):
    """Every chunk of queries reads the nearest and the first tokens, and the `blocks` blocks it likes most in between.

    A block stands for itself by the mean of the `stand_ins` keys that got most attention from the `local` tokens from
    them on.  The mean query of a chunk looks blocks up among those that are `local` tokens before all of the chunk;
    what is between them and the window is read whole.  Far keys are not rotated, and see their queries at position
    `local` - 1: they may be as far away as they like.

    Differs: the whole prompt is one graph and its keys stay on the device (the published memory offloads blocks and
    keeps some in a cache; which are read is the same); attention received is that of a softmax over near keys alone,
    not over near and far ones, so that no chunk waits for another; a prompt's last chunk is looked up as the others,
    where the published code decodes token by token.

    Args:
        sink: first tokens, read by all.
        local: nearest tokens read, itself among them; a multiple of `chunk`.
        blocks: blocks read from the middle (published: 16, or 64).
        block: tokens of a block.
        stand_ins: keys of a block that stand for it.
        chunk: queries that look blocks up together.
        share: who shares a choice: the "layer" (published), those of a "kv" head, or each "query" head has its own.
        layers: layers to use it in; all of them by default.
    """

    sink: int = 128
    local: int = 4096
    blocks: int = 16
    block: int = 128
    stand_ins: int = 4
    chunk: int = 512
    share: str = "layer"

    @classmethod
    def full(cls, tokens: int) -> TwoAngles:
        """A window over everything."""
        return cls(local=-(-tokens // cls.chunk) * cls.chunk)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            blocks=("1 or more", self.blocks >= 1),
            block=("1 or more", self.block >= 1),
            stand_ins=("between 1 and block", 1 <= self.stand_ins <= self.block),
            chunk=("1 or more", self.chunk >= 1),
            share=(f"one of {', '.join(SHARES)}", self.share in SHARES),
        )
        self.require(local=(f"a multiple of chunk, {self.chunk}", self.local % self.chunk == 0))

    @property
    def reach(self) -> int:
        """The farthest position within the window."""
        return self.local - 1

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"{super().reads}, and {self.blocks} blocks of {self.block}"

    def index(self, heads: Heads) -> AttentionIndex:
        """Looked up, after a sweep over the near keys."""
        return self.choose(heads, self.far(heads), self.near(heads)[1])

    def choose(self, heads: Heads, far: Heads, lse: Tensor) -> AttentionIndex:
        """The best blocks of each chunk, and the tokens between the last of them and the window."""
        scores = shared(self.scores(heads, far, lse), heads, self.share)
        block = torch.arange(scores.shape[3], device=scores.device)
        first = torch.arange(scores.shape[2], device=scores.device).unsqueeze(1) * self.chunk
        real = torch.zeros_like(first) + heads.tokens if heads.lengths is None else heads.lengths.reshape(-1, 1, 1, 1)
        real = (first < real).expand(scores.shape[0], 1, -1, -1)
        closed = ((first - self.local - self.sink) // self.block).clamp(min=0)  # blocks before all windows of the chunk
        unseen = (first_seen(heads, self.chunk) - self.sink).clamp(min=0) // self.block  # blocks before the model's own
        allowed = (block >= unseen) & (block < closed) & real
        found = best(scores, self.blocks, allowed, torch.zeros_like(allowed))
        rest = closed + torch.arange(-(-(self.block - 1 + self.chunk) // self.block), device=scores.device)
        between = real & (rest >= unseen) & (self.sink + rest * self.block < first + self.chunk - self.local)
        rest = torch.where(between, rest, -1).expand(-1, scores.shape[1], -1, -1)
        tiles = torch.cat([found, rest], -1)
        tiles = torch.where(tiles < 0, heads.tokens, self.sink + tiles * self.block).sort(-1).values
        tiles = torch.where(tiles < heads.tokens, tiles, -1).to(torch.int32)
        return AttentionIndex(
            rows=self.chunk, width=self.block, tiles=tiles, share=self.share, sink=self.sink, local=self.local
        )

    def scores(self, heads: Heads, far: Heads, lse: Tensor) -> Tensor:
        """Products of the mean queries of chunks and the blocks' stand-ins [B, H, R, M]; blocks count from the sink."""
        batch, sets, _, size = heads.keys.shape
        means = tile_means(far.queries, heads, self.chunk).reshape(batch, sets, heads.group, -1, size)
        stood_for = self.stand_in(heads, far, lse).transpose(2, 3)  # [B, Hk, group, M, D]
        return (means @ stood_for.transpose(3, 4)).flatten(1, 2)

    def stand_in(self, heads: Heads, far: Heads, lse: Tensor) -> Tensor:
        """Means of the keys of each block that got most attention from near queries [B, Hk, M, group, D]."""
        batch, sets, tokens, size = heads.keys.shape
        queries, keys, _, *near = arguments(self.near_index, heads)
        got = torch.ops.tamis.block_sparse_received(queries, keys, lse, None, *near)
        count = (tokens + self.block - 1) // self.block
        place = (self.sink + torch.arange(count * self.block, device=got.device)).clamp(max=tokens - 1)
        got = got.index_select(2, place).reshape(batch, sets, heads.group, count, self.block)
        chosen = (ranks(got) < self.stand_ins).float().transpose(2, 3)
        keys = far.keys.float().index_select(2, place).reshape(batch, sets, count, self.block, size)
        return chosen @ keys / self.stand_ins
