"""Random drop and patterns without content: the controls every other pruning method must beat at equal counts.

Source: methods card 8; the draw is an integer hash of (seed, layer, position among real tokens) instead of a generator,
so that torch and ONNX drop the same tokens and a row does not depend on its batch.  The pattern is that of Haurum et
al., "Which Tokens to Use?", ICCV workshops 2023, arXiv 2308.04657 (its heuristic reductions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import BadParameter
from ...graph import TokenGraph
from ...kernels.hash_scores import PRIME, hash_scores
from ...registry import register
from ...tokens import Plan, Tokens
from ..plans import keep_plan, weighted_up
from ..properties import EXACT_COUNT, KEEPS_SURVIVORS, SCALE_FREE
from ..reduction import TokenReduction, quarter_layers

DRAWS = ("token", "stratified", "radial")


@register("random")
@dataclass(frozen=True)
class RandomDrop(TokenReduction):
    """Drop tokens at random after attention; survivors keep their order.  Also the speed ceiling: it costs one gather.

    Args:
        r: tokens dropped per layer (all layers by default).
        keep_ratio: fraction kept at each chosen layer (by default those of EViT), instead of r.
        layers: layers to drop in.
        seed: another draw for each.
        draw: "token", each token alike; "stratified", from every cell of sy rows and sx columns of the patches' grid
            one is kept before any second one, and so on, cells at the far edges being what is left; or "radial", no
            draw but a pattern: the tokens nearest to the middle of the grid are kept.  The last two need the grid.
        sx: columns of a cell.
        sy: rows of a cell.
        batch_shared: every row of the batch keeps the same places; off, the draw goes by a row's index in the batch
            too, and a row alone is no longer the same as the first of many.
        prop_attn: of T tokens the k kept count T/k each, in the log-size bias of later attention and in mean pooling,
            so that class token and patches get their former parts of attention (ours).
    """

    properties: ClassVar[frozenset[str]] = frozenset({EXACT_COUNT, KEEPS_SURVIVORS, SCALE_FREE})

    seed: int = 0
    draw: str = "token"
    sx: int = 2
    sy: int = 2
    batch_shared: bool = True
    prop_attn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rule, holds in (
            ("draw", f"one of {', '.join(DRAWS)}", self.draw in DRAWS),
            ("sx", "1 or more", self.sx > 0),
            ("sy", "1 or more", self.sy > 0),
        ):
            if not holds:
                got = getattr(self, name)
                raise BadParameter(where=self.name, name=name, rule=rule, got=got, hint="see --list-passes.")

    @property
    def tracks_sizes(self) -> bool:
        """Log-size bias as `prop_attn` says."""
        return self.prop_attn

    def default_layers(self, layers: int) -> Sequence[int]:
        """As the methods it controls for: every layer for r, quarters of the depth for ratios."""
        return range(layers) if self.r is not None else quarter_layers(layers)

    def why_not(self, graph: TokenGraph) -> str:
        """Only a draw of single tokens can do without the patches' grid."""
        if self.draw != "token" and graph.grid is None:
            return f"its {self.draw} draw goes by the grid of patch tokens, and the model has none that is known"
        return super().why_not(graph)

    def plan(self, tokens: Tokens) -> Plan:
        """Scores [B, N] int64: hashes of the original positions, behind the place within a cell, or nearness."""
        if self.draw == "radial":
            plan = keep_plan(tokens, self._nearness(tokens))
        else:
            scores = self._hashes(tokens)
            plan = keep_plan(tokens, scores if self.draw == "token" else scores - PRIME * self._rank(tokens, scores))
        return weighted_up(tokens, plan) if self.prop_attn else plan

    def _hashes(self, tokens: Tokens) -> Tensor:
        row = None
        if not self.batch_shared:
            row = torch.arange(tokens.hidden.shape[0], device=tokens.hidden.device).unsqueeze(1)
        return hash_scores(tokens.positions, self.seed, tokens.layer, row)

    def _rank(self, tokens: Tokens, scores: Tensor) -> Tensor:
        """[B, N] int64: how many tokens of the same cell come before each."""
        y, x = _coordinates(tokens)
        assert tokens.lattice is not None
        cell = y // self.sy * tokens.lattice[1] + x // self.sx
        same = (cell.unsqueeze(2) == cell.unsqueeze(1)) & tokens.patches.unsqueeze(1)
        return (same & (scores.unsqueeze(1) > scores.unsqueeze(2))).sum(2)

    def _nearness(self, tokens: Tokens) -> Tensor:
        """[B, N] int64: minus four times the squared distance from the middle of the grid."""
        y, x = _coordinates(tokens)
        assert tokens.lattice is not None
        rows, columns = tokens.lattice
        return -((2 * y - rows + 1) ** 2 + (2 * x - columns + 1) ** 2)


def _coordinates(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Row and column [B, N] of each patch token in the grid; of protected tokens those of the first."""
    assert tokens.lattice is not None
    place = tokens.places.clamp(min=0)
    return place // tokens.lattice[1], place % tokens.lattice[1]
