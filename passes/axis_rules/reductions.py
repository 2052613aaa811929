"""Sums, means and extrema: over other axes as they are, over tokens weighted by the tokens each slot stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..token_axes import Axes, NeedsFullLength
from .call import Answer, Call, aten, require_batch, rule


@rule(aten.mean.dim, aten.sum.dim_IntList)
def mean_or_sum(call: Call) -> Answer:
    """Over tokens: sum of size * x (/ sum of sizes for a mean), which equals pooling the restored sequence.

    Source: methods card 1.4 (ii).  A mean over survivors of pruning is unweighted; a sum has no meaning then.  Slots
    without a token count nothing.
    """
    axes, dims = call.only, _dims(call)
    keep = bool(call.arg(2, "keepdim", False))
    if not set(dims) & set(axes.dims):
        return call.run(), _after(axes, dims, keep)
    if len(axes.dims) > 1 or len(dims) > 1:
        raise NeedsFullLength("it pools over tokens and another axis together")
    is_mean = call.node.target is aten.mean.dim
    if call.state.padded and is_mean:
        raise NeedsFullLength("it takes a mean over padding")
    if call.state.dropped_by(axes.epoch) and not is_mean:
        raise NeedsFullLength("it sums over tokens of which some are gone")
    if call.state.sizes_at(axes.epoch) is None and call.state.valid_at(axes.epoch) is None:
        return call.run(), None
    return _weighted(call, axes, dims[0], keep, is_mean), None


@rule(aten.amax.default, aten.amin.default)
def extremum(call: Call) -> Answer:
    """Over tokens: the extremum of the restored sequence is that of its slots, as long as all slots hold tokens."""
    axes, dims = call.only, _dims(call)
    keep = bool(call.arg(2, "keepdim", False))
    if not set(dims) & set(axes.dims):
        return call.run(), _after(axes, dims, keep)
    if call.state.valid is not None or call.state.dropped_by(axes.epoch) or len(axes.dims) > 1:
        raise NeedsFullLength("it takes an extremum over tokens of which some are gone")
    return call.run(), None


@rule(
    aten.var.correction,
    aten.std.correction,
    aten.var_mean.correction,
    aten.argmax.default,
    aten.argmin.default,
)
def other_axes_only(call: Call) -> Answer:
    """Known only over axes that are no token axes."""
    if call.node.target not in (aten.var.correction, aten.std.correction):
        raise NeedsFullLength("its result depends on every token")
    dims = _dims(call)
    if set(dims) & set(call.only.dims):
        raise NeedsFullLength("it takes a variance over tokens")
    return call.run(), _after(call.only, dims, bool(call.kwargs.get("keepdim", False)))


@rule(aten.linalg_vector_norm.default)
def vector_norm(call: Call) -> Answer:
    """A norm over other axes."""
    dims = call.arg(2, "dim")
    if dims is None:
        raise NeedsFullLength("it takes a norm over everything")
    over = [d % call.args[0].dim() for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    if set(over) & set(call.only.dims):
        raise NeedsFullLength("it takes a norm over tokens")
    return call.run(), _after(call.only, over, bool(call.arg(3, "keepdim", False)))


def _weighted(call: Call, axes: Axes, dim: int, keep: bool, is_mean: bool) -> Tensor:
    x = call.args[0]
    weights = call.state.current_sizes(axes.epoch)[:, axes.start :]
    shape: list[Any] = [1] * x.dim()
    shape[require_batch(axes)], shape[dim] = weights.shape
    spread = weights.reshape(shape) if require_batch(axes) < dim else weights.t().reshape(shape)
    total = (x.float() * spread).sum(dim, keepdim=keep) if x.dtype.itemsize < 8 else (x * spread).sum(dim, keepdim=keep)
    if is_mean:
        total = total / spread.sum(dim, keepdim=keep)
    return total.to(call.kwargs.get("dtype") or x.dtype)


def _dims(call: Call) -> list[int]:
    dims = call.arg(1, "dim")
    if dims is None:
        raise NeedsFullLength("it reduces over everything")
    return [d % call.args[0].dim() for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _after(axes: Axes, dims: list[int], keep: bool) -> Axes:
    if not keep:
        for dim in sorted(dims, reverse=True):
            axes = axes.without(dim)
    elif axes.batch in dims:
        axes = replace(axes, batch=None)
    return axes
