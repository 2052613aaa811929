"""Shapes: reshaping, joining, cutting, padding, and tensors made from sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..known import Known
from ..table import Ints, Number, Unsupported, Value, from_start, op
from ..tensors import DTYPES


@op("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Known:
    """The sizes, or some of them."""
    sizes = list(x.shape)[start:end]
    return Known.of(np.array([*sizes, None], dtype=object)[:-1], torch.int64)


@op("Size")
def size(x: Tensor) -> Known:
    """The number of entries."""
    return Known.of(np.array(math.prod(x.shape), dtype=object), torch.int64)


@op("Reshape")
def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    """Another shape; 0 keeps a size (unless allowzero), -1 is what is left.  An attribute before opset 5."""
    sizes = [x.shape[i] if isinstance(s, int) and s == 0 and not allowzero else s for i, s in enumerate(shape)]
    return x.reshape(sizes)


@op("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """[sizes before the axis multiplied, sizes from it on multiplied]."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("Transpose")
def transpose(x: Tensor, *, perm: list[int] | None = None) -> Tensor:
    """Axes in another order; reversed by default."""
    return x.permute(perm if perm is not None else list(range(x.ndim))[::-1])


@op("Squeeze")
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Without axes of size 1.  Axes were an attribute before opset 13."""
    if axes is None:
        axes = [axis for axis, n in enumerate(x.shape) if isinstance(n, int) and n == 1]
    return x.squeeze(tuple(axes)) if len(axes) != 1 else x.squeeze(axes[0])


@op("Unsqueeze")
def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    """With axes of size 1 at these places of the result.  Axes were an attribute before opset 13."""
    rank = x.ndim + len(axes)
    for axis in sorted(from_start(axis, rank) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("Expand", since=8)
def expand(x: Tensor, shape: Ints) -> Tensor:
    """Broadcast to a shape, of which sizes of 1 keep the input's."""
    rank = max(x.ndim, len(shape))
    own = [1] * (rank - x.ndim) + list(x.shape)
    asked = [1] * (rank - len(shape)) + list(shape)
    return (
        x.expand([-1 if isinstance(a, int) and a == 1 and i >= rank - x.ndim else a for i, a in enumerate(asked)])
        if own
        else x
    )


@op("Tile", since=6)
def tile(x: Tensor, repeats: Ints) -> Tensor:
    """Repeat along every axis."""
    return x.repeat(repeats)


@op("Concat")
def concat(*xs: Tensor, axis: int = 1) -> Tensor:
    """Join along an axis."""
    return torch.cat(xs, axis) if len(xs) > 1 else xs[0]


@op("Split")
def split(
    x: Tensor, split: Ints | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int = 1
) -> Any:
    """Cut along an axis into pieces of given or equal sizes (the last one may be smaller)."""
    if split is None:
        total = x.shape[axis]
        each = -(-total // outputs)
        split = [each] * (outputs - 1) + [total - each * (outputs - 1)]
    return tuple(torch.split(x, split, axis))


@op("Slice", since=10)
def slice_(x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Tensor:
    """A range along each of some axes, clamped to what is there; steps may be negative."""
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _sliced(x, start, end, from_start(axis, x.ndim), step)
    return x


@op("Slice", since=1)
def slice_by_attributes(x: Tensor, *, starts: list[int], ends: list[int], axes: list[int] | None = None) -> Tensor:
    """As from opset 10 on, with attributes."""
    return slice_(x, starts, ends, axes)


def _sliced(x: Tensor, start: Any, end: Any, axis: int, step: int) -> Tensor:
    if step > 0:
        return x[(slice(None),) * axis + (slice(start, end, step),)]
    places = torch.arange(*_backwards(x.shape[axis], start, end), step)
    return x.index_select(axis, places)


def _backwards(size: Any, start: Any, end: Any) -> tuple[Any, Any]:
    """First place and the place before the last of a range with a negative step, clamped as ONNX says."""
    if not isinstance(size, int):
        raise Unsupported("it runs backwards over an axis whose size is not fixed")
    start = start + size if start < 0 else start
    end = end + size if end < 0 else end
    return min(max(start, -1), size - 1), min(max(end, -1), size)


@op("Pad", since=11)
def pad(
    x: Tensor, pads: Ints, constant_value: Number | None = None, axes: Ints | None = None, *, mode: str = "constant"
) -> Tensor:
    """Entries before and after along each of some axes; negative numbers take away."""
    rank = x.ndim
    axes = list(range(rank)) if axes is None else [from_start(axis, rank) for axis in axes]
    before, after = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    if mode != "constant":
        return _padded_by_index(x, before, after, mode)
    flat = [n for axis in reversed(range(rank)) for n in (before[axis], after[axis])]
    while len(flat) > 2 and isinstance(flat[-1], int) and isinstance(flat[-2], int) and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x, flat, value=constant_value or 0)


@op("Pad", since=1)
def pad_by_attributes(x: Tensor, *, pads: list[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """As from opset 11 on, with attributes."""
    return pad(x, pads, value, mode=mode)


def _padded_by_index(x: Tensor, before: Ints, after: Ints, mode: str) -> Tensor:
    """Padding with entries of the tensor's own: at its edge, mirrored, or from the other end."""
    for axis, (first, last) in enumerate(zip(before, after, strict=True)):
        if not (first or last):
            continue
        size = x.shape[axis]
        places = torch.arange(-first, size + last)
        if mode == "edge":
            places = places.clamp(0, size - 1)
        elif mode == "wrap":
            places = places % size
        elif mode == "reflect":
            period = max(2 * (size - 1), 1)
            places = places % period
            places = torch.where(places < size, places, period - places)
        else:
            raise Unsupported(f"its mode {mode!r} is not known")
        x = x.index_select(axis, places)
    return x


@op("ConstantOfShape", since=9)
def constant_of_shape(shape: Ints, *, value: Value = None) -> Tensor:
    """A tensor of one value, 0.0 by default."""
    if value is None:
        return torch.full(shape, 0.0)
    assert isinstance(value, Known)
    return torch.full(shape, value.number(), dtype=value.dtype)


@op("Range", since=11)
def range_(start: Known, limit: Known, delta: Known) -> Tensor:
    """Numbers from start up to the limit, which is left out."""
    return torch.arange(start.number(), limit.number(), delta.number(), dtype=start.dtype)


@op("EyeLike", since=9)
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on the k-th diagonal of a matrix of zeros."""
    wanted = x.dtype if dtype is None else DTYPES[dtype]
    rows, columns = torch.arange(x.shape[0]).unsqueeze(1), torch.arange(x.shape[1])
    return (columns - rows == k).to(wanted)


@op("Trilu", since=14)
def trilu(x: Tensor, k: Number = 0, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of matrices, zero elsewhere."""
    return torch.triu(x, k) if upper else torch.tril(x, k)


@op("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """[B, C, H, W] to [B, C / b^2, H b, W b]."""
    batch, channels, height, width = x.shape
    b = blocksize
    if mode == "DCR":
        x = x.reshape(batch, b, b, channels // (b * b), height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(batch, channels // (b * b), b, b, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels // (b * b), height * b, width * b)


@op("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """[B, C, H, W] to [B, C b^2, H / b, W / b]."""
    batch, channels, height, width = x.shape
    b = blocksize
    x = x.reshape(batch, channels, height // b, b, width // b, b)
    x = x.permute(0, 3, 5, 1, 2, 4) if mode == "DCR" else x.permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels * b * b, height // b, width // b)
