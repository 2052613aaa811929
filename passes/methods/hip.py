"""HiP: chunks of keys found by probing them in halves, coarse chunks first.

Sources: Lee et al., "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned
Attention", ICLR 2025, arXiv 2406.09827; Lee et al., "InfiniteHiP", arXiv 2502.08910, section 3 (methods, llm 1.9).  Its
longer positions and its cache outside the device are no selection and are not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...attention_index import SHARES, AttentionIndex, Heads
from ...errors import BadParameter
from ...kernels.probe_chunks import row_ends
from ...registry import register
from ..sparse import SparseAttention
from ..sparse_scores import best, first_seen

STAGES = ("chunks", "keeps", "strides")


@register("hip")
@dataclass(frozen=True)
class HiP(SparseAttention):
    """Every row of queries reads the first and the nearest tokens, and the best small chunks in between.

    Stage by stage chunks get shorter: each is halved until one key is left, going on with the half whose middle key
    some query of the row likes more; the largest product met on the way is the chunk's score, and the best chunks go on
    to the next stage.  The best key of a chunk can be missed.  Differs: chunks keep to one grid, which starts behind
    the first tokens, so none is found twice; a key that a query may not see is no candidate of that query; choices
    are made anew in every layer.

    Without a GPU's kernel, takes memory for two keys of each chunk, row and choice at once: with the published stages
    about tokens * tokens / 8192 keys of each head in the first stage, and 32 * tokens in the second and third.

    Args:
        sink: first tokens, read by all.
        local: nearest tokens read, itself among them.
        chunks: keys of a chunk in each stage; each a multiple of the next.
        keeps: keys that are kept after each stage, rounded up to chunks; after the last, they are read.
        strides: of the queries of a row, every so many is asked in each stage.
        share: who shares a choice: each "query" head has its own (published), those of a "kv" head or of the "layer"
            have what their best queries want.
        block: queries of a row.
        layers: layers to use it in; all of them by default.
    """

    sink: int = 256
    local: int = 1024
    chunks: Any = (256, 32, 8)
    keeps: Any = (32768, 8192, 2048)
    strides: Any = (4, 4, 1)
    share: str = "query"
    block: int = 64

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """Every chunk goes on."""
        return cls(keeps=(tokens,) * 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in STAGES:
            object.__setattr__(self, name, self._numbers(name))
        self.require(
            sink=("0 or more", self.sink >= 0),
            local=("1 or more", self.local >= 1),
            block=("1 or more", self.block >= 1),
            share=(f"one of {', '.join(SHARES)}", self.share in SHARES),
            chunks=("multiples of the next", all(a % b == 0 for a, b in pairwise(self.chunks))),
            keeps=(f"{len(self.chunks)} numbers, one for each of chunks", len(self.keeps) == len(self.chunks)),
            strides=(f"{len(self.chunks)} numbers, one for each of chunks", len(self.strides) == len(self.chunks)),
        )

    def _numbers(self, name: str) -> tuple[int, ...]:
        """A parameter as numbers of 1 and more; raises BadParameter."""
        given = getattr(self, name)
        numbers = tuple(given) if isinstance(given, list | tuple) else (given,)
        if not numbers or not all(type(n) is int and n >= 1 for n in numbers):
            hint = f"for example {name}=[8,4,2]."
            raise BadParameter(where=self.name, name=name, rule="numbers of 1 or more", got=repr(given), hint=hint)
        return numbers

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        found = f"{self.keeps[-1]} keys in chunks of {self.chunks[-1]}"
        return f"reads the first {self.sink} and the {self.local} nearest tokens, and {found}"

    def index(self, heads: Heads) -> AttentionIndex:
        """The chunks left after the last stage."""
        device = heads.queries.device
        ends = row_ends(heads.tokens, heads.lengths, self.block, self.local, heads.queries)
        begin = first_seen(heads, self.block)
        place = torch.arange((heads.tokens + self.chunks[0] - 1) // self.chunks[0], device=device) * self.chunks[0]
        starts, before = (place + self.sink)[None, None, None], self.chunks[0]
        for chunk, keep, stride in zip(self.chunks, self.keeps, self.strides, strict=True):
            starts = (starts.unsqueeze(-1) + torch.arange(0, before, chunk, device=device)).flatten(-2)
            near = torch.minimum(starts + chunk, ends) > begin
            allowed = (starts >= self.sink) & (starts < ends) & near
            scores = self.scores(heads, starts, chunk, stride)
            found = best(scores, -(-keep // chunk), allowed, torch.zeros_like(allowed))
            kept = starts.expand(scores.shape).gather(-1, found.clamp(min=0))
            starts = torch.where(found < 0, -self.chunks[0], kept)
            before = chunk
        tiles = torch.where(starts < 0, -1, starts).to(torch.int32)
        return AttentionIndex(
            rows=self.block, width=self.chunks[-1], tiles=tiles, share=self.share, sink=self.sink, local=self.local
        )

    def scores(self, heads: Heads, starts: Tensor, chunk: int, stride: int) -> Tensor:
        """How much each row likes the chunks at starts [B or 1, S or 1, R or 1, M]: [B, S, R, M]."""
        rest = heads.lengths, chunk, stride, self.block, self.local, self.share, heads.window
        scores: Tensor = torch.ops.tamis.probe_chunks(heads.queries, heads.keys, starts, *rest)
        return scores
