"""Reductions and what is normalised by one: softmax and its kin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..table import Ints, from_start, op


def _reduction(name: str, function: Callable[[Tensor, Any, bool], Tensor]) -> None:
    """Enter a reduction; its axes were an attribute before opset 18 (ReduceSum: 13)."""

    @op(name)
    def call(x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        if not axes and noop_with_empty_axes:
            return _of_single_entries(name, x)
        over = [from_start(axis, x.ndim) for axis in axes] if axes else list(range(x.ndim))
        return function(x, over, bool(keepdims)) if x.ndim else _of_single_entries(name, x)


def _of_single_entries(name: str, x: Tensor) -> Tensor:
    """The reduction of every entry by itself."""
    match name:
        case "ReduceL1" | "ReduceL2":
            return x.abs()
        case "ReduceSumSquare":
            return x * x
        case "ReduceLogSum":
            return x.log()
    return x


def _prod(x: Tensor, axes: Any, keepdims: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keepdims, dtype=x.dtype)
    return x


def _extreme(function: Callable[..., Tensor], lowest: bool) -> Callable[[Tensor, Any, bool], Tensor]:
    """`amax` or `amin`; of no entries at all, the value that any entry would replace."""

    def call(x: Tensor, axes: Any, keepdims: bool) -> Tensor:
        if not any(isinstance(x.shape[axis], int) and x.shape[axis] == 0 for axis in axes):
            return function(x, axes, keepdim=keepdims)
        least, most = _limits(x.dtype)
        sizes = [1 if axis in axes else n for axis, n in enumerate(x.shape) if keepdims or axis not in axes]
        return torch.full(sizes, least if lowest else most, dtype=x.dtype)

    return call


def _limits(dtype: torch.dtype) -> tuple[Any, Any]:
    if dtype == torch.bool:
        return False, True
    if dtype.is_floating_point:
        return -math.inf, math.inf
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


_reduction("ReduceSum", lambda x, axes, keep: torch.sum(x, axes, keepdim=keep, dtype=x.dtype))
_reduction(
    "ReduceMean",
    lambda x, axes, keep: torch.mean(x, axes, keepdim=keep) if x.is_floating_point() else _mean(x, axes, keep),
)
_reduction("ReduceMax", _extreme(torch.amax, lowest=True))
_reduction("ReduceMin", _extreme(torch.amin, lowest=False))
_reduction("ReduceProd", _prod)
_reduction("ReduceL1", lambda x, axes, keep: torch.sum(x.abs(), axes, keepdim=keep, dtype=x.dtype))
_reduction("ReduceL2", lambda x, axes, keep: torch.sum(x * x, axes, keepdim=keep).sqrt().to(x.dtype))
_reduction("ReduceSumSquare", lambda x, axes, keep: torch.sum(x * x, axes, keepdim=keep, dtype=x.dtype))
_reduction("ReduceLogSum", lambda x, axes, keep: torch.sum(x, axes, keepdim=keep).log())
_reduction("ReduceLogSumExp", lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep))


def _mean(x: Tensor, axes: Any, keepdims: bool) -> Tensor:
    return torch.mean(x.double(), axes, keepdim=keepdims).to(x.dtype)


@op("Softmax", since=13)
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """exp(x) over its sum along an axis."""
    return torch.softmax(x, axis)


@op("LogSoftmax", since=13)
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """The logarithm of the softmax."""
    return torch.log_softmax(x, axis)


@op("Hardmax", since=13)
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """1 at the first largest entry along an axis, 0 elsewhere."""
    first = torch.argmax(x, axis, keepdim=True)
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return (torch.arange(x.shape[axis]).reshape(shape) == first).to(x.dtype)


def _flattened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Before opset 13 these reduce over all axes from `axis` on."""

    def call(x: Tensor, *, axis: int = 1) -> Tensor:
        axis = from_start(axis, x.ndim)
        if axis == x.ndim - 1:
            return function(x, axis=-1)
        return function(x.flatten(axis), axis=-1).reshape(x.shape)

    call.__annotations__ = {"x": "Tensor", "axis": "int", "return": "Tensor"}
    return call


op("Softmax")(_flattened(softmax))
op("LogSoftmax")(_flattened(log_softmax))
op("Hardmax")(_flattened(hardmax))
