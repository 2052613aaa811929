"""PiToMe: merging that spares tokens which stand alone.

Source: Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024, arXiv 2405.16148,
section 3 and algorithm 1; energy and margins as in its code, which differ from the text (methods card 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...counts import HALF, Term
from ...errors import BadParameter
from ...registry import register
from ...tokens import Plan, Tokens
from ..layer_choice import chosen_layers, read_layers
from ..plans import merge_plan
from ..properties import MERGING, ORDER_FREE, SET_FREE
from ..reduction import TokenReduction

ENERGIES = ("code", "paper")


@register("pitome")
@dataclass(frozen=True)
class PiToMe(TokenReduction):
    """Merge r tokens of large, similar groups between attention and MLP, in every layer.

    A token's energy is how many others its head-mean key is close to.  The 2r of highest energy are split in turn; one
    half merges into its most similar of the other, as a size-weighted mean.  Order of the result: prefix, kept by
    falling energy, merged by falling energy.  Tokens may come in any order; ToMe's may not.  Keys are taken before
    rotary position embedding.  All class, distillation and register tokens are protected (published: the class token).

    Args:
        r: tokens merged per layer; at most half of the unprotected tokens can merge at one layer.
        keep_ratio: fraction of unprotected tokens kept per layer, instead of r (published: 0.9 to 0.95).
        layers: layers to merge in; all of them by default.
        margin: cosine above which keys are similar, at the first layer; falls linearly to margin / layers at the last
            (paper and AugReg models 0.9, the code's DeiT and MAE 0.75).
        alpha: weight of dissimilar tokens in the energy.
        energy: "code", continuous at the margin, or "paper", its equation 4.
        bsm: layers that match all tokens as ToMe does, split by rank of energy; none by default.
        prop_attn: proportional attention, log sizes added to the logits of later attention (the paper; its code leaves
            it out).
    """

    limit: ClassVar[Term] = HALF
    properties: ClassVar[frozenset[str]] = MERGING | {ORDER_FREE, SET_FREE}

    margin: float = 0.9
    alpha: float = 1.0
    energy: str = "code"
    bsm: Sequence[int] = ()
    prop_attn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        bsm = None if self.bsm in ((), []) else read_layers(self.bsm, self.name, "bsm")
        object.__setattr__(self, "bsm", bsm or ())
        for name, rule, holds in (
            ("margin", "between -1 and 1", -1 <= self.margin <= 1),
            ("alpha", "0 or more", self.alpha >= 0),
            ("energy", f"one of {', '.join(ENERGIES)}", self.energy in ENERGIES),
        ):
            if not holds:
                got = getattr(self, name)
                raise BadParameter(where=self.name, name=name, rule=rule, got=got, hint="see --list-passes.")

    @property
    def tracks_sizes(self) -> bool:
        """Log-size bias as `prop_attn` says."""
        return self.prop_attn

    def plan(self, tokens: Tokens) -> Plan:
        """Energies and cosines of the head-mean keys [B, N, D], in float32."""
        return merge_plan(
            tokens,
            *torch.ops.tamis.energy_match(
                tokens.keys_before_rope.mean(1, dtype=torch.float32),
                tokens.valid,
                tokens.out,
                tokens.prefix,
                tokens.rule.flat(),
                self.margin - self.margin * tokens.layer / tokens.layers,
                self.alpha,
                self.energy == "paper",
                tokens.layer in chosen_layers(self.bsm, tokens.layers, self.name, "bsm"),
            ),
        )
