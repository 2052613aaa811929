"""Dilated windows: every step-th token around a token, and some global ones; nothing depends on the input.

Sources: Beltagy et al., "Longformer: The Long-Document Transformer", arXiv 2004.05150, section 3.1; the dilated
baselines of Jiang et al., "MInference 1.0", NeurIPS 2024, arXiv 2407.02490, section 4 (methods, llm 1.10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...attention_index import Heads
from ...registry import register
from ..span_summaries import NEVER
from ..sparse import SparseAttention
from ..sparse_scores import is_real, repeated


@register("dilated")
@dataclass(frozen=True)
class Dilated(SparseAttention):
    """Every token reads itself and every `step`-th token before it, `local` in all, and the first `sink` tokens.

    Where tokens see later ones, as many after it too.  Tokens whose places differ by a multiple of `step` are a
    sequence of their own, in which the window has no gaps: that is how it is computed.  Longformer's dilated heads are
    `step=2` with its global token as `sink=1,first=1`; MInference's first dilated baseline is the defaults.  Differs
    from that: published code reads the odd distances, in tiles that in effect read all, and not the token itself; its
    second baseline, a dense window inside a dilated one, is not here.  All heads have the same step.

    Args:
        step: distance from one token read to the next; 1 is a plain window.
        local: tokens read at those distances, the token itself among them (to each side, where it sees both).
        sink: first tokens, read by all.
        first: tokens at the start that read all they see.
        layers: layers to use it in; all of them by default.
    """

    bidirectional = True
    indexed = False

    step: int = 2
    local: int = 4096
    sink: int = 1024
    first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"step": 1, "local": 1, "sink": 0, "first": 0}
        self.require(**{name: (f"{low} or more", getattr(self, name) >= low) for name, low in least.items()})

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """A window without gaps over everything."""
        return cls(step=1, local=tokens, sink=1)

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        dense = f"; the first {self.first} read all" if self.first else ""
        return f"reads the first {self.sink} and {self.local} tokens at steps of {self.step}{dense}"

    def attend(self, heads: Heads) -> Tensor:
        """A window over each class of places, whose rows are so many times the batch."""
        batch, many, tokens = heads.queries.shape[:3]
        queries, keys, values = (self.apart(x) for x in (heads.queries, heads.keys, heads.values))
        place = torch.arange(self.sink, device=queries.device)
        sinks = [
            self.each(repeated(x.index_select(2, place.clamp(max=tokens - 1)), heads))
            for x in (heads.keys, heads.values)
        ]
        none = torch.arange(batch, device=queries.device) * 0
        ends = self.each(none + tokens if heads.lengths is None else heads.lengths)
        rest = (torch.arange(self.step, device=queries.device).unsqueeze(1) + none).flatten()
        hidden = self.hidden(place, rest.unsqueeze(1), ends.unsqueeze(1), heads.causal)
        out = torch.ops.tamis.summary_attention(
            queries,
            keys,
            values,
            *sinks,
            None,
            *hidden,
            (ends - rest + self.step - 1) // self.step,
            1,
            self.local,
            heads.scale,
            heads.causal,
            heads.softcap,
        )
        out = out.reshape(self.step, batch, many, -1, out.shape[3]).permute(1, 3, 0, 2, 4)
        out = out.reshape(batch, -1, many, out.shape[4])[:, :tokens].transpose(1, 2)
        return with_first(out, heads, self.first) if self.first else out

    def each(self, x: Tensor) -> Tensor:
        """x [B, ...] for every class: [step * B, ...]."""
        return x.unsqueeze(0).expand(self.step, *x.shape).flatten(0, 1)

    def apart(self, x: Tensor) -> Tensor:
        """x [B, H, N, D] by class of places: [step * B, H, ceil(N / step), D], zeros behind the last."""
        batch, many, tokens, size = x.shape
        count = (tokens + self.step - 1) // self.step
        x = pad(x, (0, 0, 0, count * self.step - tokens)).reshape(batch, many, count, self.step, size)
        return x.permute(3, 0, 1, 2, 4).reshape(self.step * batch, many, count, size)

    def hidden(self, sink: Tensor, rest: Tensor, ends: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """From which query on and until which the sinks are not read, in the count of each class: [step * B, sink].

        Those of the same class are read within the window already.
        """
        own = sink // self.step
        before = (sink - rest + self.step - 1) // self.step if causal else rest * 0 + sink * 0
        same = sink % self.step == rest
        begin = rest * 0 + sink * 0 if causal else torch.where(same, own + 1 - self.local, 0)
        stop = torch.where(same, own + self.local, before)
        there = sink < ends
        return torch.where(there, begin, 0), torch.where(there, stop, NEVER)


def with_first(out: Tensor, heads: Heads, first: int) -> Tensor:
    """`out` [B, H, N, D] with dense attention in the rows of the first tokens."""
    place = torch.arange(heads.tokens, device=out.device)
    few = torch.arange(first, device=out.device).clamp(max=heads.tokens - 1)
    seen: Any = (place <= few.unsqueeze(1)) if heads.causal else None
    bias = torch.where(is_real(heads), 0.0, -torch.inf).expand(out.shape[0], -1)
    queries = heads.queries.index_select(2, few)
    dense = torch.ops.tamis.attention(queries, heads.keys, heads.values, bias, seen, heads.scale, False, heads.softcap)
    opening = (place < first)[:, None] & is_real(heads)[:, None, :, None]
    return torch.where(opening, dense.index_select(2, place.clamp(max=first - 1)), out)
