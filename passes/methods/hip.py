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
from ...kernels.rows import take_rows
from ...registry import register
from ..sparse import SparseAttention
from ..sparse_scores import best, in_tiles, repeated

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

    Takes memory for two keys of each chunk, row and choice at once: with the published stages about tokens * tokens
    / 8192 keys of each head in the first stage, and 32 * tokens in the second and third.

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
        numbers = (given,) if isinstance(given, int) else tuple(given)
        if not numbers or not all(isinstance(n, int) and n >= 1 for n in numbers):
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
        place = torch.arange((heads.tokens + self.chunks[0] - 1) // self.chunks[0], device=device) * self.chunks[0]
        starts, before = (place + self.sink)[None, None, None], self.chunks[0]
        for chunk, keep, stride in zip(self.chunks, self.keeps, self.strides, strict=True):
            starts = (starts.unsqueeze(-1) + torch.arange(0, before, chunk, device=device)).flatten(-2)
            allowed = (starts >= self.sink) & (starts < self._end(heads))
            scores = self.scores(heads, starts, chunk, stride)
            found = best(scores, -(-keep // chunk), allowed, torch.zeros_like(allowed))
            kept = starts.expand(scores.shape).gather(-1, found.clamp(min=0))
            starts = torch.where(found < 0, -self.chunks[0], kept)
            before = chunk
        tiles = torch.where(starts < 0, -1, starts).to(torch.int32)
        return AttentionIndex(
            rows=self.block, width=self.chunks[-1], tiles=tiles, share=self.share, sink=self.sink, local=self.local
        )

    def _end(self, heads: Heads) -> Tensor:
        """[B or 1, 1, R, 1] where the keys end that some query of a row does not read as local ones; 0 in padding."""
        first = self._rows(heads)[None, None, :, None]
        ends = torch.zeros_like(first) + heads.tokens if heads.lengths is None else heads.lengths.reshape(-1, 1, 1, 1)
        return torch.where(first < ends, torch.minimum(first + self.block, ends) - self.local, 0)

    def _rows(self, heads: Heads) -> Tensor:
        """[R] first query of each row."""
        rows = (heads.tokens + self.block - 1) // self.block
        return torch.arange(rows, device=heads.queries.device) * self.block

    def scores(self, heads: Heads, starts: Tensor, chunk: int, stride: int) -> Tensor:
        """The largest product met in each chunk [B or 1, S or 1, R or 1, M]: [B, S, R, M] float32.

        Ties go to the left half.
        """
        left, right = starts, torch.minimum(starts + chunk, self._end(heads))
        score: Tensor | None = None
        for _ in range(max(1, (chunk - 1).bit_length())):
            middle = (left + right) // 2
            a, b = (self._reached(heads, (end + middle) // 2, stride) for end in (left, right))
            score = torch.maximum(a, b) if score is None else torch.maximum(score, torch.maximum(a, b))
            left, right = torch.where(a >= b, left, middle), torch.where(a >= b, middle, right)
        assert score is not None
        return score

    def _reached(self, heads: Heads, probes: Tensor, stride: int) -> Tensor:
        """The largest product of keys at probes [B or 1, S or 1, R, M] with the queries asked: [B, S, R, M]."""
        queries = in_tiles(heads.queries.float(), self.block)[:, :, :, ::stride]
        keys = repeated(heads.keys, heads) if self.share == "query" else heads.keys
        (batch, many, rows, asked, size), (sets, tokens) = queries.shape, keys.shape[1:3]
        queries = queries.reshape(batch, sets, -1, rows, asked, size).transpose(2, 3)
        probes = probes.expand(batch, sets, rows, -1)
        flat = probes.clamp(min=0).clamp(max=tokens - 1).reshape(batch * sets, -1)
        found = take_rows(keys.float().reshape(batch * sets, tokens, size), flat)
        found = found.reshape(batch, sets, rows, -1, size).transpose(3, 4)
        products = queries.reshape(batch, sets, rows, -1, size) @ found
        place = self._rows(heads).unsqueeze(1) + torch.arange(0, self.block, stride, device=probes.device)
        place = place.repeat(1, many // sets).unsqueeze(-1)  # [R, queries asked of all heads that share, 1]
        ends = tokens if heads.lengths is None else heads.lengths.reshape(-1, 1, 1, 1, 1)
        seen = (probes.unsqueeze(3) <= place) & (place < ends)
        score = torch.where(seen, products, torch.finfo(torch.float32).min).amax(3)
        return score.amax(1, keepdim=True) if self.share == "layer" else score
