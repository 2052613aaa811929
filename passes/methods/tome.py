"""ToMe: token merging by bipartite soft matching of keys.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, section 3 and appendix D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...counts import HALF, Term
from ...registry import register
from ...tokens import Plan, Tokens
from ..plans import match_plan
from ..properties import MERGING
from ..reduction import TokenReduction


@register("tome")
@dataclass(frozen=True)
class ToMe(TokenReduction):
    """Merge the r most similar pairs of tokens between attention and MLP, in every layer.

    Tokens are split by parity of position; each even one is compared (cosine of the head-mean key) with all odd ones,
    and the r best edges merge as a size-weighted mean.  Keys are taken before rotary position embedding (the paper's
    models have none), so that content decides, not distance.  Protected: class and distillation tokens as published,
    register tokens as our extension.  Order of the result, part of the method: prefix, unmerged even tokens, odd
    tokens.

    Args:
        r: tokens merged per layer; at most half of the unprotected tokens can merge at one layer.
        keep_ratio: fraction of unprotected tokens kept per layer, instead of r (ours; r = floor(T - T*keep_ratio)).
        layers: layers to merge in; all of them by default.
        prop_attn: proportional attention, log sizes added to the logits of later attention (off for MAE off the shelf).
    """

    limit: ClassVar[Term] = HALF
    properties: ClassVar[frozenset[str]] = MERGING

    prop_attn: bool = True

    @property
    def tracks_sizes(self) -> bool:
        """Log-size bias as `prop_attn` says."""
        return self.prop_attn

    def plan(self, tokens: Tokens) -> Plan:
        """Match on the head-mean keys [B, N, D], in float32: half types cannot tell close cosines apart."""
        return match_plan(tokens, tokens.keys_before_rope.mean(1, dtype=torch.float32))
