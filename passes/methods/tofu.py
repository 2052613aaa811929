"""ToFu: token fusion, which prunes in early layers and merges in later ones.

Source: Kim et al., "Token Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV 2024, arXiv
2312.01026; no code was published, so the switch is from its ports (methods card 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...counts import HALF, Term
from ...errors import BadParameter
from ...registry import register
from ...tokens import Plan, Tokens
from ..plans import match_plan, survivors
from ..properties import CONSERVES_MASS, MERGING
from ..reduction import TokenReduction


@register("tofu")
@dataclass(frozen=True)
class ToFu(TokenReduction):
    """Match tokens as ToMe does; drop the r that would merge in early layers, merge them by MLERP in later ones.

    Early layers are far from linear, where a mean of tokens is not what the layer makes of the mean; there the tokens
    merged into stay as they are.  In later layers the mean of a group, weighted by size, is scaled to the largest norm
    of its tokens, since means are shorter than what they are of.  A mean of zero stays zero (the paper leaves it open).
    Sizes count the merges of later layers alone.  Protected and order: as ToMe.

    Args:
        r: tokens removed per layer; at most half of the unprotected tokens can leave at one layer.
        keep_ratio: fraction of unprotected tokens kept per layer, instead of r.
        layers: layers to remove in; all of them by default.
        switch: index of the first layer of the model that merges; by default half of the depth.  0 merges in all.
        prop_attn: proportional attention, log sizes added to the logits of later attention.
    """

    limit: ClassVar[Term] = HALF
    properties: ClassVar[frozenset[str]] = MERGING - {CONSERVES_MASS}

    switch: int | None = None
    prop_attn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.switch is not None and self.switch < 0:
            hint = "switch is the index of the first layer that merges."
            raise BadParameter(where=self.name, name="switch", rule="a whole number >= 0", got=self.switch, hint=hint)

    @property
    def tracks_sizes(self) -> bool:
        """Log-size bias as `prop_attn` says."""
        return self.prop_attn

    def plan(self, tokens: Tokens) -> Plan:
        """Match on the head-mean keys [B, N, D], in float32."""
        merged = match_plan(tokens, tokens.keys_before_rope.mean(1, dtype=torch.float32))
        first = tokens.layers // 2 if self.switch is None else self.switch
        return survivors(merged) if tokens.layer < first else replace(merged, max_norm=True)
