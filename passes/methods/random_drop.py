"""Random drop: the control every other pruning method must beat at equal counts.

Source: methods card 8; the draw is an integer hash of (seed, layer, position among real tokens) instead of a generator,
so that torch and ONNX drop the same tokens and a row does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...kernels.hash_scores import hash_scores
from ...registry import register
from ...tokens import Plan, Tokens
from ..plans import keep_plan
from ..properties import EXACT_COUNT, KEEPS_SURVIVORS, SCALE_FREE
from ..reduction import TokenReduction, quarter_layers


@register("random")
@dataclass(frozen=True)
class RandomDrop(TokenReduction):
    """Drop tokens at random after attention; survivors keep their order.  Also the speed ceiling: it costs one gather.

    Args:
        r: tokens dropped per layer (all layers by default).
        keep_ratio: fraction kept at each chosen layer (by default those of EViT), instead of r.
        layers: layers to drop in.
        seed: another draw for each.
    """

    properties: ClassVar[frozenset[str]] = frozenset({EXACT_COUNT, KEEPS_SURVIVORS, SCALE_FREE})

    seed: int = 0

    def default_layers(self, layers: int) -> Sequence[int]:
        """As the methods it controls for: every layer for r, quarters of the depth for ratios."""
        return range(layers) if self.r is not None else quarter_layers(layers)

    def plan(self, tokens: Tokens) -> Plan:
        """Scores are hashes of the original positions, [B, N] int64."""
        return keep_plan(tokens, hash_scores(tokens.positions, self.seed, tokens.layer))
