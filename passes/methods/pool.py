"""Window pooling: the mean of every p x p window of patch tokens.

Source: Cai et al., "Matryoshka Multimodal Models" (M3), ICLR 2025, arXiv 2405.17430, and its code (methods card 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

from ...counts import CountRule
from ...errors import BadParameter
from ...graph import TokenGraph
from ...registry import register
from ...tokens import Plan, Tokens
from ..properties import CONSERVES_MASS, EXACT_COUNT, KEEPS_SURVIVORS, SCALE_FREE
from ..reduction import TokenReduction
from ..windows import window_plan


@register("pool")
@dataclass(frozen=True)
class Pool(TokenReduction):
    """One token for every window x window patches, their mean, in raster order; the prefix stays in front.

    Patches must fill a grid that the window divides: the published code rounds what was asked for and leaves out rows
    and columns, here that is an error.  Rows and columns may differ in number.  What comes after sees the smaller grid,
    so that pools compose; after any other reduction there is no grid left to pool over.  Means are weighted by sizes,
    which are all alike unless prefix tokens differ.  Published behind the encoder and its projector, which are trained
    for it; before a linear projector it is the same.

    Args:
        window: side of a window, in tokens; of T patches T / window^2 are left.  It replaces `r` and `keep_ratio`.
        layers: the last layer by default (published), where it shortens what a language model reads (restore=false).
        prop_attn: proportional attention, log sizes added to the logits of later attention (published: no).
    """

    where: ClassVar[str] = "after_block"
    own_count: ClassVar[bool] = True
    properties: ClassVar[frozenset[str]] = frozenset({EXACT_COUNT, KEEPS_SURVIVORS, CONSERVES_MASS, SCALE_FREE})

    window: int = 2
    prop_attn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            hint = "1 leaves the tokens as they are."
            raise BadParameter(where=self.name, name="window", rule="1 or more", got=self.window, hint=hint)

    @property
    def tracks_sizes(self) -> bool:
        """Log-size bias as `prop_attn` says."""
        return self.prop_attn

    def default_layers(self, layers: int) -> Sequence[int]:
        """Behind the encoder, as published."""
        return [layers - 1]

    def rule(self, layer: int, layers: int, prefix: int) -> CountRule:
        """T - T / window^2 leave."""
        area = self.window**2
        return CountRule(prefix, ((area - 1, 0, area),))

    def why_not(self, graph: TokenGraph) -> str:
        """It needs the patches' grid."""
        none = "it pools over the grid of patch tokens, and the model has none that is known"
        return super().why_not(graph) or ("" if graph.grid else none)

    def why_not_at(self, tokens: Tokens) -> str:
        """The grid must still be whole and without padding; raises BadParameter where the window does not divide it."""
        if tokens.grid is None:
            return "it pools over the grid of patch tokens, and a pass before it left none; put the pool first"
        if tokens.valid is not None:
            return "some of its tokens may be padding, which a window would mix into the others"
        side = gcd(*tokens.grid)
        if side % self.window:
            rows, columns = tokens.grid
            fitting = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
            raise BadParameter(
                where=f"{self.name} at layer {tokens.layer}",
                name="window",
                rule=f"a number that divides the grid of {rows} x {columns} tokens, one of {fitting}",
                got=self.window,
                hint="no row or column is left out in silence.",
            )
        return ""

    def plan(self, tokens: Tokens) -> Plan:
        """Slots by place alone; the first token of a window leads it."""
        return window_plan(tokens, self.window)
