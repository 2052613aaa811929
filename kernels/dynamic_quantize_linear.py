"""dynamic_quantize_linear: numbers as uint8, by the range that they have.

    low = min(0, min x);  high = max(0, max x);  scale = (high - low) / 255;  zero = clamp(round(-low / scale), 0, 255)
    out = clamp(round(x / scale) + zero, 0, 255)

x   [...]  float32    what is rounded goes to the even one of two that are equally near; all zeros have scale 0
->  [...] uint8, [] float32, [] uint8    out, scale, zero

The range is that of all tokens of all rows that are there.  After a reduction it is that of the tokens left.
Raises nothing.  Source: the ONNX operator of that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import OnnxCall, Op, define_op


def reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See the module."""
    low, high = torch.clamp(x.amin(), max=0), torch.clamp(x.amax(), min=0)
    scale = (high - low) / 255
    step = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.clamp(torch.round(-low / step), 0, 255)
    return torch.clamp(torch.round(x / step) + zero, 0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


def fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape rule."""
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(()), x.new_empty((), dtype=torch.uint8)


def onnx(x: Tensor) -> OnnxCall:
    """The standard operator."""
    return OnnxCall("DynamicQuantizeLinear", [x], {})


def flops(*_: Any, **__: Any) -> int:
    """Element-wise work is not counted."""
    return 0


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    yield (torch.randn(1, 5, 6, generator=generator) * 3,)
    yield (torch.rand(1, 7, generator=generator) + 1,)
    yield (-torch.rand(1, 7, generator=generator) - 1,)


DYNAMIC_QUANTIZE = define_op(
    Op(
        name="dynamic_quantize_linear",
        schema="(Tensor x) -> (Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        captured=True,
    )
)
