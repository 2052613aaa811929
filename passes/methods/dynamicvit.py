"""DynamicViT: a trained scorer before some layers says which tokens stay.

Source: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021, arXiv
2106.02034, sections 3.2 and 3.3; counts and order as in its code (methods card 10.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from torch import Tensor

from ...counts import CountRule, exact, keep_at_most
from ...registry import register
from ...tokens import Plan, Tokens
from ...weights import Shape, TrainedPass
from ..plans import keep_plan
from ..predictor import predicted, predictor_shapes
from ..properties import ORDER_FREE, PRUNING, SCALE_FREE
from ..reduction import TokenReduction, quarter_layers

PARTS = ("in_conv", "out_conv")  # as in the published checkpoints


@register("dynamicvit")
@dataclass(frozen=True)
class DynamicViT(TrainedPass, TokenReduction):
    """Keep the tokens that a trained scorer votes for, before attention; the others are dropped.

    A scorer per stage maps every patch token to the log-probabilities of staying and leaving, from the token itself and
    from the mean over the patch tokens that are left.  Order: prefix, kept by falling score.  Published for images of
    196 patches; here the counts go by the model's own number T of unprotected tokens, exact in decimals: T = 100 at
    0.7 keeps 49, where the code's floats say 48.  In models of variable length or with padding, the number before the
    first stage is not known at later ones, which keep floor(keep_ratio * T) of the tokens that reach them.

    Args:
        r: tokens removed per stage, instead of keep_ratio.
        keep_ratio: fraction kept at each stage (default 0.7), multiplied up: floor(T * 0.7^i) after stage i.
        layers: layers before which a stage stands, by default a quarter, a half and three quarters (3, 6, 9 of 12).
        weights: the scorers of all stages, `score_predictor.{stage}.` from 0 on, with C channels and names of the
            published checkpoints:
            in_conv.0 (layer norm), in_conv.1 (C -> C), out_conv.0 (C -> C/2), out_conv.2 (C/2 -> C/4), out_conv.4
            (C/4 -> 2: stay, leave), each with weight and bias.
    """

    where: ClassVar[str] = "before_attention"
    properties: ClassVar[frozenset[str]] = PRUNING | {ORDER_FREE, SCALE_FREE}  # keys are not read at all

    def __post_init__(self) -> None:
        if self.r is None and self.keep_ratio is None:
            object.__setattr__(self, "keep_ratio", 0.7)
        super().__post_init__()

    def default_layers(self, layers: int) -> Sequence[int]:
        """Blocks 3, 6, 9 of 12, as published."""
        return quarter_layers(layers)

    def expected(self, layers: Sequence[int], width: int) -> Mapping[str, Shape]:
        """One scorer per layer."""
        one = predictor_shapes(width, 2, PARTS)
        return {f"score_predictor.{stage}.{name}": one[name] for stage in range(len(layers)) for name in one}

    def rule(self, layer: int, layers: int, prefix: int) -> CountRule:
        """Ratios speak of the tokens before the first stage."""
        rule = super().rule(layer, layers, prefix)
        if self.r is not None:
            return rule
        done = [exact(self.amount(one, layers)) for one in self.selected(layers) if one <= layer]
        return replace(rule, terms=(keep_at_most(done[-1]), *rule.terms[1:]), of_first=prod(done[1:], start=done[0]))

    def plan(self, tokens: Tokens) -> Plan:
        """Scores [B, N] float32; see `scores`."""
        stage = f"score_predictor.{self.selected(tokens.layers).index(tokens.layer)}."
        own = {name.removeprefix(stage): value for name, value in tokens.weights.items() if name.startswith(stage)}
        return keep_plan(tokens, scores(tokens.hidden, tokens.patches, own), order="score")


def scores(x: Tensor, patches: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """How much every token should stay: log p(stay) - log p(leave).  -> [B, N] float32.

    That difference orders tokens as the published log p(stay) does, and tells those apart for which it rounds to 0.

    x        [B, N, C] any float;  patches  [B, N] bool: tokens that the mean is taken over
    weights  of one stage, float32, by the names `in_conv.0.weight` and so on
    """
    stay, leave = predicted(x, patches, weights, PARTS).unbind(-1)
    return stay - leave
