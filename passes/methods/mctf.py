"""MCTF: merging by several criteria at once: similarity, how little a token informs others, and its size.

Source: Lee et al., "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers", CVPR
2024, arXiv 2403.10030, section 3; mctf.py of its code (methods card 10.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...counts import HALF, Term
from ...errors import BadParameter
from ...registry import register
from ...tokens import Plan, Tokens
from ..plans import next_valid
from ..properties import EXACT_COUNT, KEEPS_SURVIVORS, MERGES_DUPLICATES
from ..reduction import TokenReduction

LEAST = 1e-12  # attention that underflows still has an inverse


@register("mctf")
@dataclass(frozen=True)
class MCTF(TokenReduction):
    """Merge the r pairs with the largest product of similarity, inverse attention received and inverse size.

    A pair of i and j is worth ((cos + 1) / 2)^(1 / t_sim) * (1 / (a_i a_j))^(1 / t_info) * (1 / (s_i s_j))^(1 / t_size)
    of hidden states, attention received (mean over heads and queries) and sizes; tokens are split by parity as in ToMe.
    Half of r merges from even tokens into odd ones, then the rest from odd ones, with what merged into them, into the
    even ones that are left.  A merged token is the mean by attention received times size.  Order: prefix, even tokens
    that stay, odd ones that stay by falling worth.  Differs: it acts between attention and MLP with the attention just
    passed, where the code computes the next layer's one step ahead, before it; every prefix token is protected.

    Args:
        r: tokens merged per layer; at most half of the unprotected tokens can merge at one layer.
        keep_ratio: fraction of unprotected tokens kept per layer, instead of r.
        layers: layers to merge in; all of them by default (the code: 3, 6, 9 of 12).
        t_sim: temperature of the similarity: the larger, the less it counts; 0 leaves it out.
        t_info: of the attention received.
        t_size: of the size.
        bidirectional: merge in both directions; else all r even tokens merge into odd ones.
        prop_attn: proportional attention, log sizes added to the logits of later attention.
    """

    limit: ClassVar[Term] = HALF
    needs_attention: ClassVar[bool] = True
    properties: ClassVar[frozenset[str]] = frozenset({EXACT_COUNT, KEEPS_SURVIVORS, MERGES_DUPLICATES})

    t_sim: float = 1.0
    t_info: float = 20.0
    t_size: float = 40.0
    bidirectional: bool = True
    prop_attn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("t_sim", "t_info", "t_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                hint = "it is a temperature; 0 leaves the criterion out."
                raise BadParameter(where=self.name, name=name, rule="a number >= 0", got=repr(value), hint=hint)

    @property
    def tracks_sizes(self) -> bool:
        """Log-size bias as `prop_attn` says."""
        return self.prop_attn

    def plan(self, tokens: Tokens) -> Plan:
        """Worth and weights of tokens are [B, N] float32; a factor common to a row changes nothing and is left out."""
        attention = tokens.attention.received().mean(1).clamp(min=LEAST)
        worth, weight = torch.ones_like(attention), attention
        if self.t_info:
            worth = attention ** (-1 / self.t_info)
        if tokens.sizes is not None:
            weight = attention * tokens.sizes
            # padding has size 0
            worth = worth * tokens.sizes.clamp(min=LEAST) ** (-1 / self.t_size) if self.t_size else worth
        slot, leader, moved = torch.ops.tamis.weighted_match(
            tokens.hidden,
            worth,
            tokens.valid,
            tokens.out,
            tokens.prefix,
            tokens.rule.flat(),
            1 / self.t_sim if self.t_sim else 0.0,
            self.bidirectional,
        )
        padded = tokens.valid is not None
        return Plan(slot, leader, tokens.out, moved, weight=weight, valid=next_valid(tokens), spare=padded)
