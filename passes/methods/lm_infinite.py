"""LM-Infinite: near keys as the model has them, the first keys as if they stood at the longest distance it knows.

Source: Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models", NAACL 2024, arXiv
2308.16137, section 3 (methods, llm 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...attention_index import AttentionIndex, Heads
from ...graph import Site
from ...kernels.attention import capped, grouped_logits
from ...kernels.block_sparse_attention_with_lse import merged
from ...registry import register
from ..sparse_parts import attend_beyond, attend_by_logits, attend_with_lse
from ..sparse_scores import last_places, ranks
from ..stream_state import take_rows
from .a_shape import AShape


@dataclass(frozen=True)
class TwoAngles(AShape):
    """Attention over an index whose keys `local` tokens and more away are read at other positions than their own.

    The far keys of query i are what causality lets a query read that stands `local` tokens earlier; so both parts are
    attention over an index, and are merged by their log-sum-exp.  In a model without rotary embedding positions are in
    no logit, and far keys are read as they are.

    Args:
        sink: first tokens, read by all.
        local: nearest tokens read, itself among them.
        layers: layers to use it in; all of them by default.
    """

    moves = True
    at_origin: ClassVar[bool] = True  # whether far keys stand at the position of the first token, or at their own

    @classmethod
    def takes_windows(cls) -> bool:
        """Both parts are over an index, which is read within the window."""
        return True

    @property
    def reach(self) -> int:
        """Place whose position far keys see their queries at; queries before it keep their own."""
        return self.local

    @property
    def near_index(self) -> AttentionIndex:
        """The near part of every index."""
        return AttentionIndex(rows=64, local=self.local)

    def near(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Attention to the `local` nearest keys, and its log-sum-exp [B, H, N]."""
        return attend_with_lse(self.near_index, heads)

    def choose(self, heads: Heads, far: Heads, lse: Tensor) -> AttentionIndex:
        """The index, given the heads as they are, as far keys have it, and the log-sum-exp of near logits.

        `local` is a multiple of `rows` where there are tiles.
        """
        return self.index(heads)

    def attend(self, heads: Heads) -> Tensor:
        """Both parts in one softmax."""
        return self.both(heads)[0]

    def both(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Attention to both parts, and its log-sum-exp [B, H, N]."""
        (out, lse), far = self.near(heads), self.far(heads)
        if 0 < heads.window <= self.local:  # nobody sees farther
            return out, lse
        index = replace(self.choose(heads, far, lse), local=0)
        return merged(out, lse, *attend_beyond(index, far, self.local))

    def far(self, heads: Heads) -> Heads:
        """Queries and keys as those far away from each other see them."""
        place = torch.arange(heads.tokens, device=heads.queries.device)
        keys = heads.keys_at(place[:1]) if self.at_origin else heads.keys
        return replace(heads, queries=heads.queries_at(place.clamp(max=self.reach)), keys=keys)

    def why_not_at(self, site: Site) -> str:
        """As of any sparse attention that moves keys; and rotary embedding must be there."""
        reason = super().why_not_at(site)
        if not reason and None in (site.q_rotation, site.k_rotation):
            return "no rotary position embedding was found before it, and the method reads keys at other positions"
        return reason


@register("lm-infinite")
@dataclass(frozen=True)
class LMInfinite(TwoAngles):
    """Every token reads the `local` nearest tokens, and the first `sink` as if they stood `distance` tokens away.

    So no logit is of a longer distance than the model was trained on, however long the prompt.  Prompts of up to
    `local` tokens are dense attention.  Differs: key heads may be fewer than query heads; a query that stands before
    `distance` keeps its own position, so that no token changes what an earlier one gets.

    With `middle` the `last` tokens of the prompt also read the tokens between of highest logit, each head its own, ties
    to the first: un-rotated keys, and queries as if `middle_at` away from them, for the choice and for the attention.
    Published is the one last token, from which the answer goes on, in layers of a range:
    `lm-infinite + lm-infinite:middle=5,layers=[5,6,7]`.  As the last tokens of a prompt they get more than as earlier
    ones of a longer prompt.  More than a few of them takes memory, `last` * N for every head.  They are in no index, so
    `attention_recall` does not count them.

    Args:
        sink: first tokens, read by all (published: 10 or 100).
        local: nearest tokens read, itself among them (published: the length of training).
        distance: what the distance of farther tokens counts as; `local` when None.
        middle: tokens read of those between (published: 5, or none).
        middle_at: what their distance counts as; half of `local` when None.
        last: last tokens of the prompt that read them (published: 1).
        layers: layers to use it in; all of them by default.
    """

    sink: int = 10
    local: int = 4096
    distance: int | None = None
    middle: int = 0
    middle_at: int | None = None
    last: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            distance=("0 or more", self.reach >= 0),
            middle=("0 or more", self.middle >= 0),
            middle_at=("0 or more", self.middle_at is None or self.middle_at >= 0),
            last=("1 or more", self.last >= 1),
        )

    @property
    def reach(self) -> int:
        """Where far keys, all at the first position, see their queries."""
        return self.local if self.distance is None else self.distance

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        between = f"; the last {self.last} also {self.middle} from between" if self.middle else ""
        return f"{super().reads}, the first as if {self.reach} away{between}"

    def attend(self, heads: Heads) -> Tensor:
        """Near and first tokens, and for the last queries some from between, in one softmax."""
        out, lse = self.both(heads)
        if not self.middle or 0 < heads.window <= self.local:
            return out
        place = last_places(heads, self.last)
        rows = place.clamp(min=0)
        found = attend_by_logits(self.between(heads, place), heads)
        few = merged(take_rows(out, rows, 2, 0), take_rows(lse, rows, 2, 0), *found)[0]
        token = torch.arange(heads.tokens, device=out.device)
        number = token - place[:, :1]
        there = (number >= 0) & (number < self.last)
        spread = take_rows(few, torch.where(there, number, -1), 2, 0)
        return torch.where(there[:, None, :, None], spread, out)

    def between(self, heads: Heads, place: Tensor) -> Tensor:
        """Logits [B, H, last, N] float32 of queries at place [B, last] to the tokens chosen for them; else -inf."""
        token = torch.arange(heads.tokens, device=place.device)
        at = self.local // 2 if self.middle_at is None else self.middle_at
        queries = take_rows(heads.queries_at(token.clamp(max=at)), place.clamp(min=0), 2, 0)
        logits = capped(grouped_logits(queries, heads.keys_at(token[:1]), heads.scale), heads.softcap)
        away = place.unsqueeze(-1) - token
        seen = (away >= self.local) & (token >= self.sink)
        seen = (seen & (away < heads.window) if heads.window else seen).unsqueeze(1)
        logits = torch.where(seen, logits, -torch.inf)
        return torch.where(seen & (ranks(logits) < self.middle), logits, -torch.inf)
