"""Methods with trained parts, given random ones: enough to run and to time them, never to say what they keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tamis.passes.reduction import TokenReduction
from tamis.weights import TrainedPass

ANY = 64  # for a size that a method leaves open


def untrained(cls: type[TokenReduction], channels: int, depth: int, **parameters: Any) -> TokenReduction:
    """A method with these parameters, and with random tensors where it asks for any.

    channels, depth  those of the model's stream
    """
    if not issubclass(cls, TrainedPass):
        return cls(**parameters)
    empty: Any = cls(weights={}, **parameters)
    return replace(empty, weights=random_tensors(empty, empty.selected(depth), channels))


def random_tensors(method: TrainedPass, layers: list[int], channels: int) -> dict[str, Tensor]:
    """Every tensor that the method asks for at these layers, from a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    expected = method.expected(layers, channels)
    return {
        name: torch.randn([ANY if size is None else size for size in shape], generator=generator)
        for name, shape in expected.items()
    }
