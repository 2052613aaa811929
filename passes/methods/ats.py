"""ATS: sample tokens by the class token's attention and the size of their values; how many depends on the image.

Source: Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022, arXiv 2111.15667,
section 3; scores and sample points as in its code, which differ from the text (methods card 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import BadParameter
from ...registry import register
from ...tokens import Plan, Tokens
from ..plans import sample_plan
from ..properties import EXACT_COUNT, ORDER_FREE, PRUNING
from ..reduction import TokenReduction


@register("ats")
@dataclass(frozen=True)
class ATS(TokenReduction):
    """Keep the tokens that evenly spaced sample points pick from the distribution of significance.

    Significance of a token: the class token's attention to it, summed over heads, times the norm of its values.  Points
    that fall on the same token pick it once, so a row ends with at most as many tokens as there are points, and with
    fewer where few tokens matter.  The shapes are those of the most; slots without a token are hidden from all later
    attention, pooling and counting.  Order: prefix, picked by rising significance.  All class, distillation and
    register tokens are protected (published: the class token).  Where a token is hidden it is hidden wholly; the code
    leaks 1e-6 of attention to it.  The code drops query rows inside the attention, which is the same.

    Args:
        r: tokens fewer than before that a row can hold, per layer.
        keep_ratio: fraction of unprotected tokens that a row can hold after each layer, instead of r.
        layers: by default all from a quarter of the depth on (3 to 11 of 12, as published).
        points: sample points; 0: as many as a row can hold.  The published 196 at every layer is r=1,points=196: the
            least significant token is never picked, so that r=1 costs nothing, and saves nothing but by the mask.
        per_head: the paper's score, attention of each head times the norm of its own values, instead of the code's.
    """

    needs_class_token: ClassVar[bool] = True
    properties: ClassVar[frozenset[str]] = PRUNING - {EXACT_COUNT} | {ORDER_FREE}

    points: int = 0
    per_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points < 0:
            rule, hint = "0 or more", "0 takes as many as a row can hold."
            raise BadParameter(where=self.name, name="points", rule=rule, got=self.points, hint=hint)

    def default_layers(self, layers: int) -> Sequence[int]:
        """Blocks 3 to 11 of 12, as published."""
        return range(layers // 4, layers)

    def plan(self, tokens: Tokens) -> Plan:
        """Significance [B, N] float32, from the class token's row and the values of this layer's attention."""
        return sample_plan(tokens, self._significance(tokens), self.points)

    def _significance(self, tokens: Tokens) -> Tensor:
        attention, values = tokens.attention.cls_row(), tokens.values.float()
        if not self.per_head:
            return attention.sum(1) * torch.linalg.vector_norm(values, dim=(1, 3))
        norms = torch.linalg.vector_norm(values, dim=3)  # fewer heads where several queries share one
        return (attention * norms.repeat_interleave(attention.shape[1] // norms.shape[1], 1)).sum(1)
