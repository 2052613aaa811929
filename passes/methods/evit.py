"""EViT: keep the tokens the class token attends to, fuse the rest into one.

Source: Liang et al., "Not All Patches Are What You Need", ICLR 2022, arXiv 2202.07800, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...counts import CountRule
from ...errors import BadParameter
from ...registry import register
from ...tokens import Plan, Tokens
from ..plans import keep_plan
from ..properties import ORDER_FREE, PRUNING
from ..reduction import TokenReduction, quarter_layers

LEAST = 1e-20  # attention that underflows still weighs, so that a mean of such tokens is a number


@register("evit")
@dataclass(frozen=True)
class EViT(TokenReduction):
    """Keep ceil(keep_ratio * T) tokens by attention from the class token (mean over heads), after attention.

    With `fuse` the others become one token, their sum weighted by that attention (not normalised, as published); it is
    an ordinary token from then on.  Without, they are dropped: plain top-k.  Order: prefix, kept by falling attention,
    fused token.  The published accuracies are all of models trained with the method; here it runs without training,
    for which `normalize_fuse` and `fused_size` are ours: the published sum is as short as the attention it missed.

    Args:
        r: tokens removed per chosen layer, instead of keep_ratio.
        keep_ratio: fraction of patch tokens kept at each chosen layer (default 0.7).
        layers: by default after a quarter, a half and three quarters of the depth (3, 6, 9 of 12).
        fuse: fuse the removed tokens into one instead of dropping them.
        normalize_fuse: the fused token is the mean weighted by attention instead of the sum.
        fused_size: it has the size of the tokens it was made of, of which later attention gets the log as a bias.
    """

    needs_class_token: ClassVar[bool] = True
    properties: ClassVar[frozenset[str]] = PRUNING | {ORDER_FREE}

    fuse: bool = True
    normalize_fuse: bool = False
    fused_size: bool = False

    def __post_init__(self) -> None:
        if self.r is None and self.keep_ratio is None:
            object.__setattr__(self, "keep_ratio", 0.7)
        super().__post_init__()
        for name in ("normalize_fuse", "fused_size"):
            if getattr(self, name) and not self.fuse:
                hint = "it says how tokens are fused."
                raise BadParameter(where=self.name, name=name, rule="false without fuse", got="true", hint=hint)
        if self.passthrough and self.fuse:
            hint = "what was fused is in one token; write fuse=false,passthrough=true."
            raise BadParameter(where=self.name, name="passthrough", rule="false with fuse", got="true", hint=hint)

    @property
    def tracks_sizes(self) -> bool:
        """Log-size bias as `fused_size` says."""
        return self.fused_size

    def default_layers(self, layers: int) -> Sequence[int]:
        """Blocks 3, 6, 9 of 12, as published."""
        return quarter_layers(layers)

    def rule(self, layer: int, layers: int, prefix: int) -> CountRule:
        """One token is added when any are fused."""
        plain: Any = super().rule(layer, layers, prefix)
        return CountRule(prefix, plain.terms, int(self.fuse))

    def plan(self, tokens: Tokens) -> Plan:
        """Scores are the class token's row of this layer's attention, [B, N] float32."""
        scores = tokens.attention.cls_row().mean(1)
        weight = scores.clamp(min=LEAST) if self.normalize_fuse else scores
        return keep_plan(
            tokens,
            scores,
            order="score",
            fuse_weight=weight if self.fuse else None,
            normalize=self.normalize_fuse,
            counts_sizes=self.fused_size,
        )
