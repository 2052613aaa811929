"""quantize_linear: numbers as integers with a scale and a zero point.

    out = clamp(round(x / scale) + zero, limits of dtype)

x      [...]     float     what is rounded goes to the even one of two that are equally near
scale  one number; one per entry of `axis`: [x.shape[axis]]; one per block: x's shape, `axis` divided by block_size
zero   as scale  dtype     None: 0
axis   int                 ignored where scale is one number
dtype  int8, uint8, int16, uint16, int32
->     [...]     dtype

ONNX keeps it as its QuantizeLinear, which runtimes fuse into integer arithmetic; on other back ends it is arithmetic
that fuses with its neighbours.  The division is in x's type, what follows in one that has all numbers of dtype.

Raises nothing.
Source: the ONNX operator of that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import OnnxCall, Op, define_op

MaybeTensor = Tensor | None
OFTEN = {torch.int8, torch.uint8, torch.int32}  # types that ONNX quantises to in every version


def reference(x: Tensor, scale: Tensor, zero: MaybeTensor, axis: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """See the module."""
    # the limits of a wide integer are no numbers of a narrow float: clamped to their neighbours, they would wrap
    exact = torch.promote_types(x.dtype, torch.float64 if dtype == torch.int32 else torch.float32)
    whole = torch.round(x / spread(scale, x, axis, block_size).to(x.dtype)).to(exact)
    if zero is not None:
        whole = whole + spread(zero.to(torch.int32), x, axis, block_size)
    limits = torch.iinfo(dtype)
    return torch.clamp(whole, limits.min, limits.max).to(dtype)


def spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point so that it broadcasts: one number, one per entry of an axis, or one per block of it."""
    if is_one(parameter) and not block_size:
        return parameter.reshape([])
    axis = axis % x.ndim
    if parameter.ndim == 1 and not block_size:
        shape = [1] * x.ndim
        shape[axis] = -1
        return parameter.reshape(shape)
    return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])


def is_one(parameter: Tensor) -> bool:
    """Whether a scale is one number for all."""
    return parameter.ndim == 0 or (parameter.ndim == 1 and parameter.shape[0] == 1)


def fake(x: Tensor, scale: Tensor, zero: MaybeTensor, axis: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """Shape rule."""
    return torch.empty_like(x, dtype=dtype)


def onnx(x: Tensor, scale: Tensor, zero: MaybeTensor, axis: int, block_size: int, dtype: torch.dtype) -> OnnxCall:
    """The standard operator; the types and blocks of later versions ask for those versions."""
    inputs = [x, scale] if zero is None and dtype == torch.uint8 else [x, scale, zero_of(scale, zero, dtype)]
    return OnnxCall("QuantizeLinear", inputs, *attributes(x, scale, axis, block_size, dtype))


def zero_of(scale: Tensor, zero: MaybeTensor, dtype: torch.dtype) -> Tensor:
    """The zero point, which also says the type."""
    return torch.zeros_like(scale, dtype=dtype) if zero is None else zero


def attributes(x: Tensor, scale: Tensor, axis: int, block_size: int, dtype: torch.dtype) -> tuple[dict[str, Any], int]:
    """Attributes of the standard operators, and the version that they and the types need."""
    found = {} if is_one(scale) and not block_size else {"axis": axis}
    if block_size:
        return {**found, "block_size": block_size}, 21
    if dtype not in OFTEN:
        return found, 21
    return found, 18 if scale.dtype == torch.float32 and x.dtype in (torch.float32, dtype) else 19


def flops(*_: Any, **__: Any) -> int:
    """Element-wise work is not counted."""
    return 0


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 6, generator=generator) * 3
    one, each = torch.tensor(0.02), torch.linspace(0.01, 0.06, 5)
    for dtype, zero in [(torch.int8, 3), (torch.uint8, 128), (torch.int16, -5), (torch.uint16, 700)]:
        yield x, one, torch.tensor(zero, dtype=dtype), 1, 0, dtype
        yield x, each, torch.full((5,), zero, dtype=dtype), -2, 0, dtype
    yield x, one.reshape(1), None, 1, 0, torch.uint8
    yield x, each, None, 1, 0, torch.int8
    yield x, x[:, :, :2].abs() + 0.01, None, -1, 3, torch.int8
    yield torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5, 300.0, -300.0]]), torch.tensor(1.0), None, 1, 0, torch.int8


QUANTIZE = define_op(
    Op(
        name="quantize_linear",
        schema="(Tensor x, Tensor scale, Tensor? zero, int axis, int block_size, ScalarType dtype) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        captured=True,
    )
)
