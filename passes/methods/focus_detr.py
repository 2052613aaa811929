"""Focus-DETR: only the tokens that a trained scorer finds in the foreground are updated by an encoder's layers.

Source: Zheng et al., "Less is More: Focus Attention for Efficient DETR", ICCV 2023, arXiv 2307.12612, sections 3.1 and
3.2 (methods card 10.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...counts import CountRule, exact
from ...errors import BadParameter
from ...registry import register
from ...tokens import Plan, Tokens
from ...weights import Shape, TrainedPass
from ..plans import keep_plan
from ..predictor import predicted, predictor_shapes
from ..sub_layers import Place, SubLayerReduction

PREDICTOR, PARTS = "enc_mask_predictor.", ("layer1", "layer2")


@register("focus-detr")
@dataclass(frozen=True)
class FocusDETR(TrainedPass, SubLayerReduction):
    """Update the tokens with the highest scores in each encoder layer; the others pass it by, and all are keys.

    One score per token, made of what enters the first layer.  Of T tokens floor(keep_ratio * T) + 1 are in the
    foreground, and layer i updates the first `fractions`[i] of them: each layer's tokens are among those of the layer
    before.  Class and other prefix tokens are always updated.  The stream keeps its length.

    Published for deformable encoders of several scales; here it runs on encoders of one scale with plain attention, and
    what belongs to several scales is left out: scores passed on from coarser maps, and the second self-attention among
    the tokens with the highest class scores, which is a layer of its own in the model.

    Args:
        keep_ratio: fraction of tokens in the foreground.
        fractions: of those, the part updated by each layer; the last holds for all further layers.
        layers: layers to do this in, all of the encoder's by default; those of a decoder behind it count on, as in all
            passes around sub-layers.
        weights: the scorer, `enc_mask_predictor.`: layer1.0 (layer norm), layer1.1 (C -> C), layer2.0 (C -> C/2),
            layer2.2 (C/2 -> C/4), layer2.4 (C/4 -> 1), each with weight and bias.
    """

    from_the_first: ClassVar[bool] = True

    keep_ratio: float = 0.5
    fractions: Sequence[float] = (1, 0.8, 0.6, 0.6, 0.4, 0.2)

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.fractions
        object.__setattr__(self, "fractions", tuple(given) if isinstance(given, list) else given)
        many = isinstance(self.fractions, tuple) and self.fractions and all(map(_is_share, self.fractions))
        for name, rule, holds in (
            ("keep_ratio", "in (0, 1]", _is_share(self.keep_ratio)),
            ("fractions", "a list of numbers in (0, 1]", many),
        ):
            if not holds:
                got, hint = repr(getattr(self, name)), "for example keep_ratio=0.5,fractions=[1,0.8,0.6]."
                raise BadParameter(where=self.name, name=name, rule=rule, got=got, hint=hint)

    @property
    def kinds(self) -> frozenset[str]:
        """Whole layers."""
        return frozenset({"block"})

    def expected(self, layers: Sequence[int], width: int) -> Mapping[str, Shape]:
        """One scorer for all layers."""
        return {PREDICTOR + name: shape for name, shape in predictor_shapes(width, 1, PARTS).items()}

    def rule(self, place: Place) -> CountRule | str:
        """floor(fraction * (floor(keep_ratio * T) + 1)) tokens stay, at least one and at most T."""
        if not place.encodes:
            return "it is no layer of the model's deepest stream with the tokens of an image"
        if place.padding == "unknown":
            return "its mask depends on the input, and which tokens are padding is not known"
        tokens = place.tokens - place.prefix
        if not isinstance(tokens, int):
            return "its number of tokens depends on the input"
        part = exact(self.fractions[min(place.index, len(self.fractions) - 1)])
        kept = max(1, min(tokens, int((int(tokens * exact(self.keep_ratio)) + 1) * part)))
        return CountRule(place.prefix, ((1, -kept, 1),))

    def plan(self, tokens: Tokens) -> Plan:
        """Scores [B, N] float32 of the first layer's tokens, which later layers use again."""
        scores = tokens.carried.get("scores")
        if scores is None:
            own = {name.removeprefix(PREDICTOR): value for name, value in tokens.weights.items()}
            scores = predicted(tokens.hidden, tokens.patches, own, PARTS).squeeze(-1)
        plan = keep_plan(tokens, scores)
        plan.carry["scores"] = scores
        return plan


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
