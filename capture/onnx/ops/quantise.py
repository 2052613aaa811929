"""Numbers as integers with a scale and a zero point."""

from __future__ import annotations

import torch
from torch import Tensor

from ..table import Unsupported, op
from ..tensors import DTYPES
from .pointwise import FLOAT8, WIDE, cast_to


def spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point so that it broadcasts: one number, one per entry of an axis, or one per block of it."""
    if parameter.ndim == 0 or (parameter.ndim == 1 and parameter.shape[0] == 1 and not block_size):
        return parameter.reshape([])
    axis = axis % x.ndim
    if parameter.ndim == 1 and not block_size:
        shape = [1] * x.ndim
        shape[axis] = -1
        return parameter.reshape(shape)
    return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])


@op("QuantizeLinear", since=10)
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """x over the scale, rounded to even, plus the zero point, within the type's range."""
    if output_dtype and output_dtype not in DTYPES:
        raise Unsupported(f"type number {output_dtype} has no form in torch")
    dtype = zero.dtype if zero is not None else DTYPES[output_dtype] if output_dtype else torch.uint8
    scaled = x / spread(scale, x, axis, block_size).to(x.dtype)
    if dtype in FLOAT8:
        return cast_to(scaled, dtype, bool(saturate))
    whole = torch.round(scaled)
    if zero is not None:
        whole = whole + spread(zero.to(WIDE.get(dtype, torch.int32)), x, axis, block_size)
    limits = torch.iinfo(dtype)
    return torch.clamp(whole, limits.min, limits.max).to(dtype)


@op("DequantizeLinear", since=10)
def dequantize_linear(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    """(x - zero point) times the scale, in the scale's type."""
    dtype = DTYPES[output_dtype] if output_dtype else scale.dtype
    wide = x.to(scale.dtype) if x.dtype in FLOAT8 else x.to(WIDE.get(x.dtype, torch.int32))
    if zero is not None:
        wide = wide - spread(zero.to(wide.dtype), x, axis, block_size)
    return (wide.to(scale.dtype) * spread(scale, x, axis, block_size)).to(dtype)


@op("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as uint8 with the scale and zero point that its own range asks for."""
    low, high = torch.clamp(x.amin(), max=0), torch.clamp(x.amax(), min=0)
    scale = (high - low) / 255
    zero = torch.clamp(torch.round(-low / scale), 0, 255)
    return torch.clamp(torch.round(x / scale) + zero, 0, 255).to(torch.uint8), scale, zero.to(torch.uint8)
