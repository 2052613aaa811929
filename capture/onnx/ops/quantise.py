"""Numbers as integers with a scale and a zero point.

Whole-number types are the ops of ours that ONNX files get back as they were; float8 is arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels.dequantize_linear import DEQUANTIZE
from ....kernels.dynamic_quantize_linear import DYNAMIC_QUANTIZE
from ....kernels.quantize_linear import QUANTIZE, spread
from ..table import CONTRIB, Unsupported, op
from ..tensors import DTYPES
from .pointwise import FLOAT8, cast_to


@op("QuantizeLinear", since=10)
@op("QuantizeLinear", domain=CONTRIB)
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
    if dtype in FLOAT8:
        return cast_to(x / spread(scale, x, axis, block_size).to(x.dtype), dtype, bool(saturate))
    x = x if x.is_floating_point() else x.to(scale.dtype)
    return QUANTIZE.call(x, scale, zero, axis, block_size, dtype)


@op("DequantizeLinear", since=10)
@op("DequantizeLinear", domain=CONTRIB)
def dequantize_linear(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    """(x - zero point) times the scale, in the scale's type."""
    if x.dtype in FLOAT8:
        wide = x.to(scale.dtype)
        if zero is not None:
            wide = wide - spread(zero.to(scale.dtype), x, axis, block_size)
        result = wide * spread(scale, x, axis, block_size)
    else:
        result = DEQUANTIZE.call(x, scale, zero, axis, block_size)
    return result.to(DTYPES[output_dtype]) if output_dtype else result


@op("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as uint8 with the scale and zero point that its own range asks for."""
    return DYNAMIC_QUANTIZE.call(x)
