"""A-ViT: tokens add up how much they are done, leave when they are, and the output is what they were on the way.

Source: Yin et al., "A-ViT: Adaptive Tokens for Efficient Vision Transformer", CVPR 2022, arXiv 2112.07658, section 3;
halting as in its code (methods card 10.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...graph import TokenGraph
from ...kernels.precision import compute_dtype
from ...registry import register
from ...tokens import Plan, Tokens
from ...weights import Shape, TrainedPass
from ..plans import keep_plan, without
from ..properties import EXACT_COUNT, KEEPS_SURVIVORS, SCALE_FREE
from ..reduction import TokenReduction

DONE = 1 - 0.01  # a token stops when its halting adds up to more


@register("avit")
@dataclass(frozen=True)
class AViT(TrainedPass, TokenReduction):
    """After every block a gate says how much each token is done; those done for 0.99 leave.

    The head reads the mean of the class token's states after all blocks, weighted by how much it was done there; what
    is missing to 1 falls to the state at which it stopped, at the latest the last.  Tokens leave for good here, where
    the code hides them: shapes are those of the most that can be left, so without `keep_ratio` or `r` nothing but a
    mask is saved.  Where more are running than a row can hold, the most nearly done leave too (ours).  Prefix tokens
    stay, and are seen after they stopped, which the class token's mean does not notice; a model without class token,
    whose head would read tokens that left, is refused.

    The published gate reads channel 0, sigmoid(scale * x_0 - centre), in a model trained to write there:
    `channel_gate` makes its weights.  Here every block may have a gate of its own that reads all channels, so that
    gates can be trained for a model that stays as it is.

    Args:
        r: tokens fewer than before that a row can hold, per layer.
        keep_ratio: fraction of unprotected tokens that a row can hold after each layer; by default 1.
        layers: blocks after which tokens may stop, by default all; after the last all do.
        weights: `gate.weight` [L, C] and `gate.bias` [L], a row for each of these layers but the last of the model.
    """

    where: ClassVar[str] = "after_block"
    always: ClassVar[bool] = True
    # after the last block all stop alike
    properties: ClassVar[frozenset[str]] = frozenset({EXACT_COUNT, KEEPS_SURVIVORS, SCALE_FREE})

    def __post_init__(self) -> None:
        if self.r is None and self.keep_ratio is None:
            object.__setattr__(self, "keep_ratio", 1)
        super().__post_init__()

    def selected(self, layers: int) -> list[int]:
        """As chosen, and the last, at which what was added up becomes the output."""
        return sorted({*super().selected(layers), layers - 1})

    def expected(self, layers: Sequence[int], width: int) -> Mapping[str, Shape]:
        """One gate per layer but the last."""
        return {"gate.weight": (len(layers) - 1, width), "gate.bias": (len(layers) - 1,)}

    def why_not(self, graph: TokenGraph) -> str:
        """The head must read a token that stays."""
        if graph.layers and not graph.class_token:
            return "its output is the class token's mean over depth, and this model has no class token"
        return super().why_not(graph)

    def plan(self, tokens: Tokens) -> Plan:
        """Halting [B, N] float32, added up over the layers so far; the mean [B, N, C] in the stream's precision."""
        x, last = tokens.hidden.to(compute_dtype(tokens.hidden)), tokens.layer == tokens.layers - 1
        nothing = torch.zeros_like(x[..., 0], dtype=torch.float32)
        halting = nothing + 1 if last else self._gate(tokens).sigmoid()
        known = tokens.carried or {"done": nothing, "mean": torch.zeros_like(x)}
        before, done = known["done"], known["done"] + halting
        # what is left to 1 where it stops; nothing where it stopped before
        share = torch.where(before > DONE, 0.0, torch.where(done > DONE, 1 - before, halting))
        mean = known["mean"] + share.unsqueeze(-1) * x
        plan = keep_plan(tokens, -done)
        if last:
            return replace(plan, features=mean.to(tokens.hidden.dtype))
        return replace(without(plan, tokens.patches & (done > DONE)), carry={"done": done, "mean": mean})

    def _gate(self, tokens: Tokens) -> Tensor:
        """[B, N] float32."""
        stage = self.selected(tokens.layers).index(tokens.layer)
        weight, bias = (tokens.weights[name][stage : stage + 1] for name in ("gate.weight", "gate.bias"))
        return linear(tokens.hidden.float(), weight, bias).squeeze(-1)


def channel_gate(layers: int, width: int, scale: float, centre: float) -> dict[str, Tensor]:
    """Weights of the published gate, sigmoid(scale * x_0 - centre) everywhere (A-ViT-T: 10, 30; A-ViT-S: 10, 75)."""
    weight = torch.zeros(layers - 1, width)
    weight[:, 0] = scale
    return {"gate.weight": weight, "gate.bias": torch.full((layers - 1,), -float(centre))}
