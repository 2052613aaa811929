"""Reading and writing entries by index, and places of largest entries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..known import Known
from ..table import Ints, Number, Value, from_start, op, tensor


def wrapped(index: Tensor, size: Any) -> Tensor:
    """Negative indices count from the end."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


@op("Gather")
def gather(x: Tensor, index: Value, *, axis: int = 0) -> Tensor:
    """Slices along an axis; the index's shape takes the axis's place.

    Rows of a weight are looked up as an embedding, which refuses negative indices: they are ids of tokens or positions.
    """
    axis = from_start(axis, x.ndim)
    if isinstance(index, Known) and index.data.ndim == 0:
        return x.select(axis, index.number())
    places = tensor(index)
    places = places if places.dtype == torch.int64 else places.to(torch.int64)
    if axis == 0 and x.ndim == 2 and isinstance(x, nn.Parameter):
        return F.embedding(places, x)
    before: list[Any] = [slice(None)] * axis
    return x[(*before, places)]  # torch counts negative indices from the end too


@op("GatherElements", since=11)
def gather_elements(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    """One entry along an axis for every entry of the index."""
    return x.gather(axis, wrapped(index, x.shape[axis]))


@op("GatherND", since=11)
def gather_nd(x: Tensor, index: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices at the tuples in the index's last axis; the first axes are common to both."""
    depth = index.shape[-1]
    places = [wrapped(index[..., i], x.shape[batch_dims + i]) for i in range(depth)]
    common = []
    for axis in range(batch_dims):
        shape = [1] * places[0].ndim
        shape[axis] = x.shape[axis]
        common.append(torch.arange(x.shape[axis]).reshape(shape))
    return x[(*common, *places)]


REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@op("ScatterElements", "Scatter")
def scatter_elements(x: Tensor, index: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """A copy with one entry along an axis written, or combined, for every entry of the index."""
    places = wrapped(index, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, REDUCTIONS[reduction], include_self=True)


@op("ScatterND", since=11)
def scatter_nd(x: Tensor, index: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """A copy with slices written, or combined, at the tuples in the index's last axis."""
    depth = index.shape[-1]
    places = tuple(wrapped(index[..., i], x.shape[i]) for i in range(depth))
    if reduction in ("none", "add"):
        return torch.index_put(x, places, updates, accumulate=reduction == "add")
    flat = torch.zeros_like(places[0])
    for i, place in enumerate(places):
        flat = flat * x.shape[i] + place
    rows = x.reshape(-1, *x.shape[depth:])
    spread = flat.reshape(-1, *[1] * (rows.ndim - 1)).expand(-1, *rows.shape[1:])
    given = updates.reshape(-1, *x.shape[depth:])
    return rows.scatter_reduce(0, spread, given, REDUCTIONS[reduction], include_self=True).reshape(x.shape)


@op("OneHot", since=9)
def one_hot(index: Tensor, depth: Number, values: Tensor, *, axis: int = -1) -> Tensor:
    """[off value, on value] by index along a new axis; indices out of range are off everywhere."""
    size = int(depth)
    places = wrapped(index, size).unsqueeze(axis)
    shape = [1] * places.ndim
    shape[axis] = size
    return torch.where(places == torch.arange(size).reshape(shape), values[1], values[0])


@op("ArgMax")
def argmax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Place of the largest entry, the first or the last of equal ones."""
    return _place(x, axis, bool(keepdims), bool(select_last_index), torch.amax)


@op("ArgMin")
def argmin(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Place of the smallest entry, the first or the last of equal ones."""
    return _place(x, axis, bool(keepdims), bool(select_last_index), torch.amin)


def _place(x: Tensor, axis: int, keepdims: bool, last: bool, best: Any) -> Tensor:
    if best is torch.amax and not last:
        return torch.argmax(x, axis, keepdim=keepdims)  # ONNX and torch both take the first
    is_best = (x == best(x, axis, keepdim=True)).to(torch.uint8)
    if not last:
        return torch.argmax(is_best, axis, keepdim=keepdims)
    return x.shape[axis] - 1 - torch.argmax(is_best.flip(axis), axis, keepdim=keepdims)


@op("TopK")
def top_k(x: Tensor, k: Ints, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """The k largest or smallest entries and their places; of equal entries the one at the lower place first."""
    order = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return order.values.narrow(axis, 0, k[0]), order.indices.narrow(axis, 0, k[0])


@op("CumSum", since=11)
def cumsum(x: Tensor, axis: Number, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running sums along an axis, without the entry itself (exclusive), from the end (reverse)."""
    axis = int(axis)
    x = x.flip(axis) if reverse else x
    sums = torch.cumsum(x, axis, dtype=x.dtype)
    sums = sums - x if exclusive else sums
    return sums.flip(axis) if reverse else sums


@op("NonZero", since=9)
def nonzero(x: Known) -> Known:
    """Places of entries that are not zero, [axes, count]; how many there are must be known."""
    return Known.of(np.stack(np.nonzero(x.data)).astype(np.int64))
