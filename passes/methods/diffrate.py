"""DiffRate: prune the tokens that matter least, then merge the next ones into those that matter most.

Source: Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023, arXiv
2305.17997, section 3; patch/deit.py and merge.py of its code (methods card 10.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...counts import CountRule, at_most, exact
from ...errors import BadParameter
from ...registry import register
from ...schedule import Schedule
from ...tokens import Plan, Tokens
from ..plans import keep_plan, places, real_count
from ..properties import EXACT_COUNT, KEEPS_SURVIVORS, ORDER_FREE, SET_FREE
from ..reduction import TokenReduction


@register("diffrate")
@dataclass(frozen=True)
class DiffRate(TokenReduction):
    """Rank tokens by the class token's attention (mean over heads); drop the last, merge those before into the first.

    Each merged token goes to the most similar of the tokens that stay (cosine of hidden states, between attention and
    MLP), as a plain mean; its size counts by that similarity.  The class token and the rest of the prefix are not
    merged into.  Order: prefix, kept by falling attention.  Published with rates learned per layer, which `prune` and
    `merge` take; without them `prune_share` splits what `r` or `keep_ratio` removes.  Differs: a similarity below 0
    counts as 0, since the code's evaluation can take the log of a size of 0 or less (its training clamps).

    Args:
        r: tokens that leave per layer, one way or the other.
        keep_ratio: fraction of the unprotected tokens kept per layer, instead of r.
        prune_share: of those that leave, the part that is dropped: floor(prune_share * r), or of T unprotected tokens
            floor(prune_share * (1 - keep_ratio) * T); the others merge.  Not with `prune` and `merge`.
        prune: tokens dropped per layer, with `merge` instead of r or keep_ratio: a number or a schedule.
        merge: tokens merged per layer.
        layers: layers to reduce in; all of them by default.
        prop_attn: proportional attention, log sizes added to the logits of later attention.
    """

    needs_class_token: ClassVar[bool] = True
    properties: ClassVar[frozenset[str]] = frozenset({EXACT_COUNT, KEEPS_SURVIVORS, ORDER_FREE, SET_FREE})

    prune_share: float = 0.5
    prune: Any = None
    merge: Any = None
    prop_attn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read_counts("prune", "prune is tokens dropped per layer.")
        self._read_counts("merge", "merge is tokens merged per layer.")
        if not 0 <= self.prune_share <= 1:
            rule, hint = "between 0 and 1", "it is the part of the tokens that leave which is dropped."
            raise BadParameter(where=self.name, name="prune_share", rule=rule, got=self.prune_share, hint=hint)
        if self.counts_itself and self.prune_share != type(self).prune_share:
            rule, hint = "left out beside prune and merge", "these say how many are dropped and how many merge."
            raise BadParameter(where=self.name, name="prune_share", rule=rule, got=self.prune_share, hint=hint)

    @property
    def counts_itself(self) -> bool:
        """`prune` and `merge` say it."""
        return self.prune is not None or self.merge is not None

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The amounts that were given."""
        return (*super().schedules, *(one for one in (self.prune, self.merge) if one is not None))

    @property
    def tracks_sizes(self) -> bool:
        """Log-size bias as `prop_attn` says."""
        return self.prop_attn

    def asked(self, layer: int, layers: int) -> int | None:
        """Tokens dropped and merged together."""
        if not self.counts_itself:
            return super().asked(layer, layers)
        given = [int(self.at(one, layer, layers, 0)) for one in (self.prune, self.merge) if one is not None]
        return sum(given)

    def rule(self, layer: int, layers: int, prefix: int) -> CountRule:
        """What is pruned and what is merged leaves."""
        asked = self.asked(layer, layers)
        return super().rule(layer, layers, prefix) if asked is None else CountRule(prefix, (at_most(asked), self.limit))

    def pruned(self, layer: int, layers: int, prefix: int) -> CountRule:
        """How many of those that leave at a selected layer are dropped."""
        rule, share = self.rule(layer, layers, prefix), exact(self.prune_share)
        if self.counts_itself:
            term = at_most(0 if self.prune is None else int(self.at(self.prune, layer, layers, 0)))
        elif self.r is not None:
            term = at_most(int(self.amount(layer, layers) * share))
        else:
            removed = (1 - exact(self.amount(layer, layers))) * share
            term = (removed.numerator, 0, removed.denominator)
        return CountRule(prefix, (term, *rule.terms))

    def plan(self, tokens: Tokens) -> Plan:
        """Scores are the class token's row of this layer's attention, [B, N] float32."""
        scores = tokens.attention.cls_row().mean(1)
        kept = keep_plan(tokens, scores, order="score")
        place, rule = places(tokens, scores), self.pruned(tokens.layer, tokens.layers, tokens.prefix)
        count = real_count(tokens)
        offers = (kept.slot < 0) & (place >= 0) & (place < count - rule.removed(count))
        takes = (kept.leader >= 0).cumsum(1) > tokens.prefix
        takes = takes if kept.valid is None else takes & kept.valid
        slot, cosine, moved = torch.ops.tamis.join_nearest(tokens.hidden, kept.slot, kept.leader, offers, takes)
        return Plan(
            slot,
            kept.leader,
            tokens.out,
            moved,
            weight=torch.ones_like(cosine),
            valid=kept.valid,
            sizes=_sizes(tokens, kept.valid, cosine, slot, kept.leader, moved),
            drops=not rule.is_identity,
        )


def _sizes(tokens: Tokens, valid: Tensor | None, cosine: Tensor, slot: Tensor, leader: Tensor, moved: Tensor) -> Tensor:
    """[B, N'] float32: the sum over each slot of size times similarity."""
    sizes = torch.ones_like(cosine) if tokens.sizes is None else tokens.sizes
    counted = (sizes * cosine.clamp(min=0)).unsqueeze(2)
    total = torch.ops.tamis.reduce_tokens(counted, slot, leader, moved, None, False).squeeze(2)
    return total if valid is None else torch.where(valid, total, 0.0)
