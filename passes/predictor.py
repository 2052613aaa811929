"""The small network that trained methods score tokens with: each token by itself, and beside the mean of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..weights import Shape


def predictor_shapes(width: int, outputs: int, parts: tuple[str, str]) -> dict[str, Shape]:
    """Its tensors for so many channels, with names in `parts` for what comes before and behind the mean.

    FIRST.0 (layer norm), FIRST.1 (C -> C), SECOND.0 (C -> C/2), SECOND.2 (C/2 -> C/4), SECOND.4 (C/4 -> outputs), each
    with weight and bias.
    """
    first, second = parts
    half, quarter = width // 2, width // 4
    linear = {f"{first}.1": (width, width), f"{second}.0": (half, width), f"{second}.2": (quarter, half)}
    linear[f"{second}.4"] = (outputs, quarter)
    found: dict[str, Shape] = {f"{first}.0.weight": (width,), f"{first}.0.bias": (width,)}
    for name, shape in linear.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def predicted(x: Tensor, among: Tensor, weights: Mapping[str, Tensor], parts: Sequence[str]) -> Tensor:
    """What it says of every token.  -> [B, N, outputs] float32.

    x        [B, N, C] any float;  among  [B, N] bool: tokens that the mean is taken over
    weights  float32, by the names of `predictor_shapes`
    Source: Rao et al. 2021, section 3.2 (methods cards 10.1 and 10.6).
    """
    first, second = parts

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = functional.layer_norm(x.float(), x.shape[-1:], weights[f"{first}.0.weight"], weights[f"{first}.0.bias"])
    x = functional.gelu(linear(x, f"{first}.1"))
    local, each = x.split([x.shape[-1] // 2, x.shape[-1] - x.shape[-1] // 2], dim=-1)
    counted = among.unsqueeze(-1).float()
    mean = (each * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    x = functional.gelu(linear(torch.cat([local, mean.expand_as(each)], dim=-1), f"{second}.0"))
    return linear(functional.gelu(linear(x, f"{second}.2")), f"{second}.4")
