"""A reduction that removes nothing: it puts the tokens in another order, which no model may notice.

After it every token stands in another place, so whatever reads places, side inputs or tokens in bulk must follow the
plan or see the original order.  An attention model does not know the order of its tokens otherwise, so its outputs are
those of the dense model, to rounding: an oracle for any model, without a forward written by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tamis.kernels.hash_scores import hash_scores
from tamis.passes.plans import next_valid
from tamis.passes.reduction import TokenReduction
from tamis.tokens import Plan, Tokens


@dataclass(frozen=True)
class Shuffle(TokenReduction):
    """Draw another order of the unprotected tokens in every layer.

    drops  say that tokens were dropped, so that putting the order back is forbidden
    sizes  say that sizes are tracked; all are 1
    """

    added: ClassVar[int] = 1  # one token leaves and one is added: the count stays
    name: ClassVar[str] = "shuffle"

    drops: bool = False
    sizes: bool = False

    @property
    def tracks_sizes(self) -> bool:
        """As the parameter says."""
        return self.sizes

    def plan(self, tokens: Tokens) -> Plan:
        """Real tokens after the prefix by a hash of their original positions; padding goes to the end."""
        scores = hash_scores(tokens.positions, 5, tokens.layer).long()
        valid, after = tokens.valid, next_valid(tokens)
        rank = torch.arange(scores.shape[1]) if valid is None else valid.long().cumsum(1) - 1
        key = torch.where(rank < tokens.prefix, rank - 2**40, scores)
        key = key if valid is None else torch.where(valid, key, 2**40)
        leader = key.argsort(dim=1, stable=True)
        slot = leader.argsort(dim=1)
        if valid is not None and after is not None:
            slot, leader = torch.where(valid, slot, -1), torch.where(after, leader, 0)
        ones = torch.ones(slot.shape) if after is None else after.float()
        return Plan(
            slot,
            leader,
            tokens.out,
            sizes=ones if self.sizes else None,
            valid=after,
            counts_sizes=False,
            drops=self.drops,
        )
