"""Products of matrices, convolutions, pooling and resizing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels.matmul_integer import MATMUL_INTEGER
from ..table import Unsupported, op

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAXIMA: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@op("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices, or stacks of them."""
    return torch.matmul(a, b)


@op("MatMulInteger", since=10)
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """The product of int8 or uint8 matrices less their zero points, in int32; zero points per row of a, column of b."""
    return MATMUL_INTEGER.call(a, b, a_zero, b_zero)


@op("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 1,
) -> Tensor:
    """alpha a b + beta c."""
    a = a.t() if transA else a
    if alpha == 1.0 and beta == 1.0 and (c is None or (c.ndim == 1 and a.is_floating_point())):
        weight = b if transB else b.t()
        if c is None or c.shape[0] == weight.shape[0]:
            return F.linear(a, weight, c)
    product = torch.matmul(a, b.t() if transB else b)
    product = product if alpha == 1.0 else product * alpha
    if c is None:
        return product.to(a.dtype)
    return (product + (c if beta == 1.0 else c * beta)).to(a.dtype)


@op("Einsum", since=12)
def einsum(*xs: Tensor, equation: str) -> Tensor:
    """A sum of products by an equation."""
    return torch.einsum(equation.replace(" ", ""), *xs)


@op("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Convolution over one to three axes."""
    axes = x.ndim - 2
    kernel, strides, dilations = list(weight.shape[2:]), strides or [1] * axes, dilations or [1] * axes
    pads = _pads(auto_pad, pads, list(x.shape[2:]), kernel, strides, dilations)
    x, padding = _padded(x, pads, 0.0)
    return _of_rank(CONVOLUTIONS, axes)(x, weight, bias, strides, padding, dilations, group)


@op("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Transposed convolution over one to three axes; an output shape given decides the padding."""
    axes = x.ndim - 2
    strides, dilations = strides or [1] * axes, dilations or [1] * axes
    extra = output_padding or [0] * axes
    full = [
        (n - 1) * s + e + (k - 1) * d + 1
        for n, s, e, k, d in zip(x.shape[2:], strides, extra, weight.shape[2:], dilations, strict=True)
    ]
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if output_shape is not None:
        total = [max(a - b, 0) for a, b in zip(full, output_shape, strict=True)]
        extra = [e + max(b - a, 0) for e, a, b in zip(extra, full, output_shape, strict=True)]
        first = [t // 2 if auto_pad != "SAME_LOWER" else t - t // 2 for t in total]
        pads = [*first, *(t - f for t, f in zip(total, first, strict=True))]
    pads = pads or [0] * (2 * axes)
    result = _of_rank(TRANSPOSED, axes)(x, weight, bias, strides, 0, 0, group, dilations)
    return F.pad(result, [n for i in reversed(range(axes)) for n in (-pads[i], extra[i] - pads[i + axes])])


def _of_rank(functions: dict[int, Any], axes: int) -> Any:
    if axes not in functions:
        raise Unsupported(f"it has {axes} spatial axes")
    return functions[axes]


def _pads(
    auto_pad: str, pads: list[int] | None, sizes: list[Any], kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    """[before per axis, after per axis]."""
    if auto_pad in ("NOTSET", ""):
        return pads or [0] * (2 * len(sizes))
    if auto_pad == "VALID":
        return [0] * (2 * len(sizes))
    total = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    first = [t // 2 if auto_pad == "SAME_UPPER" else t - t // 2 for t in total]
    return [*first, *(t - f for t, f in zip(total, first, strict=True))]


def _padded(x: Tensor, pads: list[int], value: float) -> tuple[Tensor, list[int]]:
    """The input, and what the operation itself is to pad: the same before and after, or nothing."""
    axes = len(pads) // 2
    before, after = pads[:axes], pads[axes:]
    if before == after:
        return x, before
    return F.pad(x, [n for i in reversed(range(axes)) for n in (before[i], after[i])], value=value), [0] * axes


@op("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    """The mean over all spatial axes."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    """The maximum over all spatial axes."""
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@op("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Means over windows: sums of entries, as a convolution, over how many entries each window has."""
    axes = len(kernel_shape)
    strides, dilations = strides or [1] * axes, dilations or [1] * axes
    pads = _pads(auto_pad, pads, list(x.shape[2:]), kernel_shape, strides, dilations)
    channels = x.shape[1]
    ones = torch.ones(channels, 1, *kernel_shape, dtype=x.dtype)
    counted = torch.ones_like(x)
    flat = [n for i in reversed(range(axes)) for n in (pads[i], pads[i + axes])]
    x, counted = F.pad(x, flat), F.pad(counted, flat, value=float(count_include_pad))
    if ceil_mode and not auto_pad.startswith("SAME"):
        more = _ceil_padding(list(x.shape[2:]), kernel_shape, strides, dilations, pads)
        flat = [n for i in reversed(range(axes)) for n in (0, more[i])]
        x, counted = F.pad(x, flat), F.pad(counted, flat)
    convolve = _of_rank(CONVOLUTIONS, axes)
    total = convolve(x, ones, None, strides, 0, dilations, channels)
    return total / convolve(counted, ones, None, strides, 0, dilations, channels)


def _ceil_padding(
    sizes: list[Any], kernel: list[int], strides: list[int], dilations: list[int], pads: list[int]
) -> list[int]:
    """What is missing behind for a last window that starts inside the input or the padding before it."""
    more = []
    for i, (n, k, s, d) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        span = (k - 1) * d + 1
        windows = -(-(n - span) // s) + 1
        if (windows - 1) * s >= n - pads[i + len(sizes)]:
            windows -= 1
        more.append(max((windows - 1) * s + span - n, 0))
    return more


@op("MaxPool")
def max_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
    outputs: int = 1,
) -> Any:
    """Maxima over windows; their places, counted over the whole tensor, if asked for."""
    axes = len(kernel_shape)
    dtype = x.dtype
    strides, dilations = strides or [1] * axes, dilations or [1] * axes
    pads = _pads(auto_pad, pads, list(x.shape[2:]), kernel_shape, strides, dilations)
    x = x if x.is_floating_point() else x.float()
    flat = [n for i in reversed(range(axes)) for n in (pads[i], pads[i + axes])]
    x = F.pad(x, flat, value=-math.inf)
    if ceil_mode:
        more = _ceil_padding(list(x.shape[2:]), kernel_shape, strides, dilations, pads)
        x = F.pad(x, [n for i in reversed(range(axes)) for n in (0, more[i])], value=-math.inf)
    if outputs == 1:
        return _of_rank(MAXIMA, axes)(x, kernel_shape, strides, 0, dilations).to(dtype)
    y, places = _of_rank(MAXIMA, axes)(x, kernel_shape, strides, 0, dilations, return_indices=True)
    return y.to(dtype), _unpadded(places, x, pads, storage_order)


def _unpadded(places: Tensor, padded: Tensor, pads: list[int], column_major: int) -> Tensor:
    """Places in one padded channel, row by row, as places in the whole tensor before padding."""
    axes = len(pads) // 2
    strides, total = [], 1
    sizes = [n - before - after for n, before, after in zip(padded.shape[2:], pads[:axes], pads[axes:], strict=True)]
    for size in sizes if column_major else reversed(sizes):
        strides.append(total)
        total = total * size
    strides = strides if column_major else strides[::-1]
    images = torch.arange(padded.shape[0] * padded.shape[1]) * total
    result = images.reshape(*padded.shape[:2], *[1] * axes).expand_as(places)
    for axis in reversed(range(axes)):
        size = padded.shape[axis + 2]
        result = result + (places % size - pads[axis]) * strides[axis]
        places = places // size
    return result
