"""DTEM: token merging by a learned metric.

Source: Lee and Hong, "Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers", NeurIPS
2024, arXiv 2412.10569, section 3; at inference as in its code (methods card 10.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional

from ...capture.projections import projected
from ...counts import HALF, Term
from ...graph import TokenGraph
from ...registry import register
from ...tokens import Plan, Tokens
from ...weights import Shape, TrainedPass
from ..plans import match_plan
from ..properties import MERGING
from ..reduction import TokenReduction


@register("dtem")
@dataclass(frozen=True)
class DTEM(TrainedPass, TokenReduction):
    """Merge the r most similar pairs of tokens as ToMe does, by a metric that was learned for it.

    A linear layer of its own maps the normed hidden state, which the attention's projections read, to a few channels;
    their cosine decides.  All else is ToMe's: parity of position, size-weighted mean, order, size bias.  All class,
    distillation and register tokens are protected (published: the class token).

    Args:
        r: tokens merged per layer; at most half of the unprotected tokens can merge at one layer.
        keep_ratio: fraction of unprotected tokens kept per layer, instead of r (ours; r = floor(T - T*keep_ratio)).
        layers: layers to merge in; all of them by default.
        prop_attn: proportional attention, log sizes added to the logits of later attention.
        weights: for every chosen layer `blocks.{layer}.metric.weight` [M, C] and `.bias` [M]; M is 64, or 128 from 1024
            channels on, as published, or any other.  Published checkpoints hold them as the last M rows of the weight
            and the bias of `blocks.{layer}.attn.qkv`.
    """

    limit: ClassVar[Term] = HALF
    properties: ClassVar[frozenset[str]] = MERGING

    prop_attn: bool = True

    @property
    def tracks_sizes(self) -> bool:
        """Log-size bias as `prop_attn` says."""
        return self.prop_attn

    def expected(self, layers: Sequence[int], width: int) -> Mapping[str, Shape]:
        """One linear layer per chosen layer."""
        shapes: dict[str, Shape] = {"weight": (None, width), "bias": (None,)}
        return {f"blocks.{layer}.metric.{name}": shapes[name] for layer in layers for name in shapes}

    def why_not(self, graph: TokenGraph) -> str:
        """The hidden state that projections read must be there."""
        if reason := super().why_not(graph):
            return reason
        chosen = [graph.layers[layer] for layer in self.selected(len(graph.layers))]
        odd = [one for one in chosen if projected(graph.node(graph.sites[one.site].k)) is None]
        return f"keys of layer {odd[0].index} are not made by one linear layer of the hidden state" if odd else ""

    def plan(self, tokens: Tokens) -> Plan:
        """Match on the learned metric [B, N, M], in float32."""
        stem = f"blocks.{tokens.layer}.metric"
        weight, bias = tokens.weights[f"{stem}.weight"], tokens.weights[f"{stem}.bias"]
        return match_plan(tokens, functional.linear(tokens.normed.float(), weight, bias))
