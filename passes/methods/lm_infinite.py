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
from ...kernels.block_sparse_attention_with_lse import merged
from ...registry import register
from ..sparse_parts import attend_beyond, attend_with_lse
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
        (out, lse), far = self.near(heads), self.far(heads)
        if 0 < heads.window <= self.local:  # nobody sees farther
            return out
        index = replace(self.choose(heads, far, lse), local=0)
        return merged(out, lse, *attend_beyond(index, far, self.local))[0]

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
    `distance` keeps its own position, so that no token changes what an earlier one gets; the few tokens from the
    middle that the published method can add for the last query are not here.

    Args:
        sink: first tokens, read by all (published: 10 or 100).
        local: nearest tokens read, itself among them (published: the length of training).
        distance: what the distance of farther tokens counts as; `local` when None.
        layers: layers to use it in; all of them by default.
    """

    sink: int = 10
    local: int = 4096
    distance: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(distance=("0 or more", self.reach >= 0))

    @property
    def reach(self) -> int:
        """Where far keys, all at the first position, see their queries."""
        return self.local if self.distance is None else self.distance

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"{super().reads}, the first as if {self.reach} away"
