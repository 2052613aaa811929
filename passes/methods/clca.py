"""CLCA's cache: means of the tokens of every block come back as tokens after the layers that lose some.

Source: Rios et al., "Cross-Layer Cache Aggregation for Token Reduction in Ultra-Fine-Grained Image Recognition", ICASSP
2025, arXiv 2501.00243; its parameter-free part, in the order of its code (methods card 10.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...counts import CountRule, at_most
from ...graph import TokenGraph
from ...registry import register
from ...tokens import Plan, Tokens
from ..plans import append_plan
from ..reduction import TokenReduction, quarter_layers


@register("clca")
@dataclass(frozen=True)
class CLCA(TokenReduction):
    """Keep the mean over the patch tokens of every block, and append those kept so far after some layers.

    It lets no token leave: put it behind a pass that does, `"evit:keep_ratio=0.7 + clca"`.  After block i the means of
    the blocks since the last recovery, without i's own, come in at the end of the sequence, oldest first; from then on
    they are ordinary tokens, which may leave, merge, and count in later means.  They have no place in the image: where
    a model asks for a position, they have the first token's, and they belong to no original token.

    Published together with learned carrier tokens and a head over all layers' class tokens, fine-tuned on the task;
    those are not here.  Without training the means are strangers to the later layers.

    Args:
        layers: layers after which tokens come back: by default a quarter, a half and three quarters of the depth, where
            EViT reduces, and the last but one.
    """

    where: ClassVar[str] = "after_block"
    always: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    own_count: ClassVar[bool] = True

    def default_layers(self, layers: int) -> Sequence[int]:
        """Layers 3, 6, 9 and 10 of 12, as published."""
        return [*quarter_layers(layers), max(layers - 2, 0)]

    def recoveries(self, layers: int) -> list[int]:
        """Layers after which tokens come back."""
        return super().selected(layers)

    def selected(self, layers: int) -> list[int]:
        """All layers up to the last recovery: their means are kept."""
        return list(range(self.recoveries(layers)[-1] + 1))

    def rule(self, layer: int, layers: int, prefix: int) -> CountRule:
        """As many come in as there were blocks since the last recovery."""
        known = self.recoveries(layers)
        last = max([0, *(one for one in known if one < layer)])
        return CountRule(prefix, (at_most(0),), appended=layer - last if layer in known else 0)

    def why_not(self, graph: TokenGraph) -> str:
        """Tokens that come in last must be seen by all."""
        if graph.hides_later:
            return "attention is causal, and no token would see those that come in at the end"
        if any(graph.sites[layer.site].mask.kind == "window" for layer in graph.layers):
            return "attention is windowed, and tokens that come in have no place in it"
        return super().why_not(graph)

    def note(self, layer: int, layers: int) -> str:
        """What happens at layers without recovery."""
        return "" if self.rule(layer, layers, 0).appended else "the mean of its tokens is kept for a later layer"

    def plan(self, tokens: Tokens) -> Plan | None:
        """The cache is [B, A, C] in the stream's dtype; means are summed in float32."""
        cache = tokens.memory.pop("cache", None)
        x, counted = tokens.hidden.float(), tokens.patches.unsqueeze(-1).float()
        plan = None
        if tokens.rule.appended:
            assert cache is not None
            plan = append_plan(tokens, cache)
            x = torch.cat([x, cache.float()], dim=1)
            counted = torch.cat([counted, torch.ones_like(cache[..., :1], dtype=torch.float32)], dim=1)
            cache = None
        mean = (x * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
        mean = mean.to(tokens.hidden.dtype)
        tokens.memory["cache"] = mean if cache is None else torch.cat([cache, mean], dim=1)
        return plan
