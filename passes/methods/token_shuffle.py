"""Token-Shuffle: layers run on windows of tokens, joined along channels by trained linear layers, and parted behind.

Source: Ma et al., "Token-Shuffle: Towards High-Resolution Image Generation with Autoregressive Models", 2025, arXiv
2504.17789 (methods card 10.7); no code was published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

from ...counts import CountRule, at_most
from ...errors import BadParameter
from ...registry import register
from ...tokens import Plan, Tokens
from ...weights import Shape, TrainedPass
from ..sub_layers import Place, SubLayerReduction
from ..windows import joined_windows, parted_windows, window_plan


@register("token-shuffle")
@dataclass(frozen=True)
class TokenShuffle(TrainedPass, SubLayerReduction):
    """Join each window x window tokens of the grid into one before the first layer, and part it behind the last.

    In front, a linear layer takes each token from C to C / window^2 channels, those of a window stand side by side in
    one token of C, and residual MLPs follow.  Behind, residual MLPs, the channels are split again, and a linear layer
    takes each part to C.  All layers in between see one token for every window; the length of the stream outside stays.
    A joined token has the place (position, rotation, mask) of the window's first.

    Published for decoders that write images, trained together with them, where a step writes a window; it is not
    training-free.  Here it is for encoders with a known grid: causal attention is refused, because a joined token would
    show its window's later tokens to the earlier ones.  Class and register tokens pass it by.  The paper leaves the
    MLPs open; here they are x + fc2(GELU(fc1(x))) without a norm.

    Args:
        window: side of a window; its square must divide the channels, and it both sides of the grid.
        mlps: residual MLPs in front, and as many behind.
        layers: consecutive layers to run on windows, all by default.
        weights: `shuffle.linear` (C -> C / window^2), `shuffle.mlps.I.fc1` (C -> any), `shuffle.mlps.I.fc2` (back to
            C), `unshuffle.mlps.I.fc1`, `unshuffle.mlps.I.fc2` and `unshuffle.linear` (C / window^2 -> C), each with
            weight and bias, I from 0.
    """

    window: int = 2
    mlps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("window", 1), ("mlps", 0)):
            if getattr(self, name) < least:
                rule, got = f"a whole number >= {least}", getattr(self, name)
                raise BadParameter(where=self.name, name=name, rule=rule, got=got, hint="for example window=2,mlps=2.")

    @property
    def kinds(self) -> frozenset[str]:
        """All layers in a row."""
        return frozenset({"layers"})

    def expected(self, layers: Sequence[int], width: int) -> Mapping[str, Shape]:
        """One shuffle and its inverse; raises BadParameter where the channels cannot be parted."""
        area = self.window**2
        if width % area:
            rule = f"a number whose square divides the {width} channels of the stream"
            hint = "a window's tokens share the channels of one."
            raise BadParameter(where=self.name, name="window", rule=rule, got=self.window, hint=hint)
        linear = {"shuffle.linear": (width // area, width), "unshuffle.linear": (width, width // area)}
        for name in (f"{side}.mlps.{i}" for side in ("shuffle", "unshuffle") for i in range(self.mlps)):
            given = self.weights.tensors.get(f"{name}.fc1.weight")
            inner = 4 * width if given is None or not given.dim() else given.shape[0]
            linear |= {f"{name}.fc1": (inner, width), f"{name}.fc2": (width, inner)}
        shapes: dict[str, Shape] = {f"{name}.weight": shape for name, shape in linear.items()}
        return shapes | {f"{name}.bias": shape[:1] for name, shape in linear.items()}

    def rule(self, place: Place) -> CountRule | str:
        """T - T / window^2 of T tokens leave."""
        if not place.encodes:
            return "it is no layer of the model's deepest stream with the tokens of an image"
        if place.padding != "none":
            return "some tokens may be padding, which a window would mix into the others"
        grid, tokens = self.grid_of(place), place.tokens - place.prefix
        if grid is None or not isinstance(tokens, int):
            return f"its {tokens} tokens lie on no grid that is known"
        if gcd(*grid) % self.window:
            return f"windows of {self.window} x {self.window} do not divide its grid of {grid[0]} x {grid[1]} tokens"
        return CountRule(place.prefix, (at_most(tokens - tokens // self.window**2),))

    def plan(self, tokens: Tokens) -> Plan:
        """A slot for each window."""
        return window_plan(tokens, self.window)

    def shorten(self, x: Tensor, tokens: Tokens) -> Tensor:
        """The windows of [B, N, C], joined."""
        assert tokens.grid is not None
        joined = joined_windows(_linear(x[:, tokens.prefix :], tokens, "shuffle.linear"), tokens.grid, self.window)
        return torch.cat([x[:, : tokens.prefix], self._mixed(joined, tokens, "shuffle")], dim=1)

    def lengthen(self, y: Tensor, tokens: Tokens) -> Tensor:
        """The windows of [B, N', C], parted."""
        assert tokens.grid is not None
        joined = self._mixed(y[:, tokens.prefix :], tokens, "unshuffle")
        parted = _linear(parted_windows(joined, tokens.grid, self.window), tokens, "unshuffle.linear")
        return torch.cat([y[:, : tokens.prefix], parted], dim=1)

    def _mixed(self, x: Tensor, tokens: Tokens, side: str) -> Tensor:
        for i in range(self.mlps):
            inner = functional.gelu(_linear(x, tokens, f"{side}.mlps.{i}.fc1"))
            x = x + _linear(inner, tokens, f"{side}.mlps.{i}.fc2")
        return x


def _linear(x: Tensor, tokens: Tokens, name: str) -> Tensor:
    weight, bias = (tokens.weights[f"{name}.{part}"].to(x.dtype) for part in ("weight", "bias"))
    return functional.linear(x, weight, bias)
