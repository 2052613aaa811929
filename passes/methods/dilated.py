"""Dilated windows: every step-th token around a token, and some global ones; nothing depends on the input.

Sources: Beltagy et al., "Longformer: The Long-Document Transformer", arXiv 2004.05150, section 3.1; the dilated
baselines of Jiang et al., "MInference 1.0", NeurIPS 2024, arXiv 2407.02490, section 4 (methods, llm 1.10).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...attention_index import AttentionIndex, Heads
from ...graph import Site
from ...kernels.block_sparse_attention_with_lse import merged
from ...registry import register
from ..sparse import SparseAttention
from ..sparse_parts import attend_beyond, attend_with_lse, moved_back, moved_up
from ..sparse_scores import first_seen, is_real


@register("dilated")
@dataclass(frozen=True)
class Dilated(SparseAttention):
    """Every token reads itself and every `step`-th token before it, `local` in all, and the first `sink` tokens.

    Where tokens see later ones, as many after it too.  With `near` every token reads so many nearest ones, itself among
    them, and the `local` at steps are the first ones behind those.  Longformer's dilated heads are `step=2` with its
    global token as `sink=1,first=1`; MInference's first dilated baseline (a window of 8192) is the defaults, its second
    (2048, and a window of 4096 behind them) `near=2048,local=2048`.  Differs from those: published code reads the odd
    distances, in tiles that in effect read all, and not the token itself.  All heads have the same step.

    Tokens whose places differ by a multiple of `step` are a sequence of their own, in which the window has no gaps:
    that is how it is computed.  In layers with a window of the model's own that window holds for all parts.

    Args:
        step: distance from one token read to the next; 1 is a plain window.
        local: tokens read at multiples of that distance (to each side, where it sees both).
        sink: first tokens, read by all.
        first: tokens at the start that read all they see.
        near: nearest tokens, itself among them, of which all are read; only for causal attention.
        layers: layers to use it in; all of them by default.
    """

    bidirectional = True

    step: int = 2
    local: int = 4096
    sink: int = 1024
    first: int = 0
    near: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"step": 1, "local": 1, "sink": 0, "first": 0, "near": 0}
        self.require(**{name: (f"{low} or more", getattr(self, name) >= low) for name, low in least.items()})

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """A window without gaps over everything."""
        return cls(step=1, local=tokens, sink=1)

    @classmethod
    def takes_windows(cls) -> bool:
        """All parts are over an index."""
        return True

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        near = f"the {self.near} nearest, " if self.near else ""
        dense = f"; the first {self.first} read all" if self.first else ""
        return f"reads the first {self.sink}, {near}and {self.local} tokens at steps of {self.step}{dense}"

    def why_not_at(self, site: Site) -> str:
        """As of any sparse attention; and nearest tokens are those before a token."""
        reason = super().why_not_at(site)
        if not reason and self.near and not site.hides_later:
            return "attention sees later tokens too, and near is for causal attention"
        return reason

    def index(self, heads: Heads) -> AttentionIndex:
        """Every query's keys at steps as single ones: what is read, said for measuring; `attend` needs no list."""
        place = torch.arange(heads.tokens, dtype=torch.int32, device=heads.queries.device)
        behind = -(-self.near // self.step)
        last = place - self.step * behind if heads.causal else place + self.step * (self.local - 1)
        begin = (place - self.step * (behind + self.local - 1)).clamp(min=self.sink)
        begin = begin + (place - begin) % self.step
        steps = place[:: self.step][: self.local if heads.causal else 2 * self.local - 1]
        columns = begin.unsqueeze(1) + steps
        shown = (columns <= last.clamp(max=heads.tokens - 1).unsqueeze(1)) & (columns >= first_seen(heads, 1))
        columns = torch.where(shown, columns, -1)
        return AttentionIndex(rows=1, columns=columns[None, None], sink=self.sink, local=self.near, first=self.first)

    def attend(self, heads: Heads) -> Tensor:
        """Sinks and nearest tokens, and a window over each class of places, in one softmax."""
        behind = -(-self.near // self.step)  # steps to the first token behind the nearest ones
        whole = AttentionIndex(rows=64, sink=self.sink, local=self.near)
        parts = [attend_with_lse(whole, heads)] if self.sink + self.near else []
        if not 0 < heads.window <= behind * self.step:
            parts.append(self.at_steps(heads, behind))
        out = parts[0][0] if len(parts) == 1 else merged(*parts[0], *parts[1])[0]
        dense = self.first if heads.causal else max(self.first, self.sink)
        return self.with_opening(out, heads, dense) if dense else out

    def at_steps(self, heads: Heads, behind: int) -> tuple[Tensor, Tensor]:
        """Attention to keys behind the sinks, from `behind` steps away on, and its log-sum-exp; nothing to sinks."""
        queries, keys, values = (self.apart(x) for x in (heads.queries, heads.keys, heads.values))
        ends = torch.arange(heads.queries.shape[0], device=heads.queries.device) * 0 + heads.tokens
        ends = (ends if heads.lengths is None else heads.lengths) - self.sink
        rest = torch.arange(self.step, device=ends.device).unsqueeze(1)
        ends = (ends - rest + self.step - 1).clamp(min=0).flatten() // self.step
        window = -(-heads.window // self.step)
        each = replace(heads, queries=queries, keys=keys, values=values, lengths=ends, window=window)
        out, lse = attend_beyond(AttentionIndex(rows=64, local=self.local), each, behind)
        return moved_back(self.joined(out, heads), self.joined(lse.unsqueeze(-1), heads).squeeze(-1), self.sink)

    def apart(self, x: Tensor) -> Tensor:
        """x [B, H, N, D] behind the sinks by class of places: [step * B, H, ceil(N / step), D], zeros behind."""
        batch, many, tokens, size = x.shape
        count = (tokens + self.step - 1) // self.step
        x = pad(moved_up(x, self.sink), (0, 0, 0, count * self.step - tokens))
        x = x.reshape(batch, many, count, self.step, size)
        return x.permute(3, 0, 1, 2, 4).reshape(self.step * batch, many, count, size)

    def joined(self, x: Tensor, heads: Heads) -> Tensor:
        """The inverse of `apart`, where sinks are cut off: [B, H, N, D]."""
        batch, many = heads.queries.shape[:2]
        x = x.reshape(self.step, batch, many, -1, x.shape[3]).permute(1, 2, 3, 0, 4)
        return x.reshape(batch, many, -1, x.shape[4])[:, :, : heads.tokens]

    def with_opening(self, out: Tensor, heads: Heads, many: int) -> Tensor:
        """`out` [B, H, N, D] with the first tokens in place, by masked attention to all keys."""
        place = torch.arange(heads.tokens, device=out.device)
        few = torch.arange(many, device=out.device).clamp(max=heads.tokens - 1).unsqueeze(1)
        apart = (few - place).abs()
        seen = (few < self.first) | (place < self.sink)
        seen = seen | ((apart % self.step == 0) & (apart < self.step * self.local))
        seen = seen & (place <= few) if heads.causal else seen
        seen = seen & (apart < heads.window) if heads.window else seen
        bias = torch.where(is_real(heads), 0.0, -torch.inf).expand(out.shape[0], -1)
        queries = heads.queries.index_select(2, few.flatten())
        dense = torch.ops.tamis.attention(
            queries, heads.keys, heads.values, bias, seen, heads.scale, False, heads.softcap
        )
        opening = (place < many)[:, None] & is_real(heads)[:, None, :, None]
        return torch.where(opening, dense.index_select(2, place.clamp(max=many - 1)), out)
