"""dequantize_linear: the numbers that integers with a scale and a zero point stand for.

    out = (x - zero) * scale

x      [...]               int8, uint8, int16, uint16, int32
scale  one number; one per entry of `axis`: [x.shape[axis]]; one per block: x's shape, `axis` divided by block_size
zero   as scale  as x      None: 0
axis   int                 ignored where scale is one number
->     [...]     as scale

ONNX keeps it as its DequantizeLinear, and what it reads as integers: a file's weights stay as small as they were.
Raises nothing.  Source: the ONNX operator of that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from . import quantize_linear
from .quantize_linear import attributes, spread

MaybeTensor = Tensor | None


def reference(x: Tensor, scale: Tensor, zero: MaybeTensor, axis: int, block_size: int) -> Tensor:
    """See the module."""
    wide = x.to(torch.int32)
    if zero is not None:
        wide = wide - spread(zero.to(torch.int32), x, axis, block_size)
    return wide.to(scale.dtype) * spread(scale, x, axis, block_size)


def fake(x: Tensor, scale: Tensor, zero: MaybeTensor, axis: int, block_size: int) -> Tensor:
    """Shape rule."""
    return torch.empty_like(x, dtype=scale.dtype)


def onnx(x: Tensor, scale: Tensor, zero: MaybeTensor, axis: int, block_size: int) -> OnnxCall:
    """The standard operator."""
    inputs = [x, scale] if zero is None else [x, scale, zero]
    return OnnxCall("DequantizeLinear", inputs, *attributes(x, scale, axis, block_size, x.dtype))


def flops(*_: Any, **__: Any) -> int:
    """Element-wise work is not counted."""
    return 0


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    for x, scale, zero, axis, block_size, dtype in quantize_linear.samples():
        if block_size:  # its parts are no sizes of a trace; ONNX's node tests hold it
            continue
        yield quantize_linear.reference(x, scale, zero, axis, block_size, dtype), scale, zero, axis, block_size
    yield torch.arange(-20, 40, dtype=torch.int32).reshape(2, 30), torch.tensor(0.3), None, 1, 0


DEQUANTIZE = define_op(
    Op(
        name="dequantize_linear",
        schema="(Tensor x, Tensor scale, Tensor? zero, int axis, int block_size) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        captured=True,
    )
)
