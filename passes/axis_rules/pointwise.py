"""Element-wise ops: token axes stay where broadcasting puts them; side inputs are reduced to match."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..token_axes import Axes, NeedsFullLength
from .call import Answer, Call, Rule, align_epoch, aten, bring_side, rule

# Element-wise in meaning though torch does not tag them so.
ALSO_POINTWISE = {
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.lift_fresh_copy.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.selu.default,
    aten.mish.default,
    aten.softplus.default,
    aten.clamp.default,
    aten.nan_to_num.default,
}


def rule_for(target: Any) -> Rule | None:
    """The element-wise rule for ops that are element-wise, else None."""
    if target in ALSO_POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise
    return None


@rule(aten.type_as.default, aten.to.other)
def as_other(call: Call) -> Answer:
    """The second tensor only says which type."""
    return call.run(), call.axes(0)


@rule(torch.ops.tamis.quantize_linear.default, torch.ops.tamis.dequantize_linear.default)
def rounding(call: Call) -> Answer:
    """Every entry by itself, with a scale that is one number or lies along an axis that holds no tokens."""
    scale, axis = call.args[1], call.args[3] % max(call.args[0].dim(), 1)
    if call.args[4] or any(call.axes(i) is not None for i in (1, 2)):
        raise NeedsFullLength("its scale has a token axis")
    if scale.numel() != 1 and axis in call.only.dims:
        raise NeedsFullLength("its scale is another one for every token")
    return call.run(), call.only


@rule(torch.ops.tamis.dynamic_quantize_linear.default)
def dynamic_rounding(call: Call) -> Answer:
    """The range is that of what is there: of fewer tokens another one."""
    return call.run(), (call.only, None, None)


def pointwise(call: Call) -> Answer:
    """Align all tensors from the right; every token axis of any becomes one of the result."""
    nodes = [
        (i, a) for i, a in enumerate(call.node.args) if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)
    ]
    rank = max(len(a.meta["val"].shape) for _, a in nodes)
    result, args = None, list(call.args)
    for i, node in nodes:
        axes = call.axes_of(node)
        if axes is None:
            continue
        args[i], axes = align_epoch(call, args[i], axes)
        result = _union(result, _aligned(axes, rank - len(node.meta["val"].shape)))
    if result is None:
        raise NeedsFullLength("a token axis comes in where none was expected")
    for i, node in nodes:
        axes = call.axes_of(node)
        if axes is None:
            args[i] = bring_side(call, args[i], rank, result, node.meta["val"].shape)
        elif set(result.dims) != set(_aligned(axes, rank - len(node.meta["val"].shape)).dims):
            args[i] = _bring_rest(call, args[i], node, axes, result, rank)
    return call.run(*args), result


def _aligned(axes: Axes, offset: int) -> Axes:
    batch = None if axes.batch is None else axes.batch + offset
    return Axes(tuple(d + offset for d in axes.dims), batch, axes.epoch, axes.start)


def _union(a: Axes | None, b: Axes) -> Axes:
    if a is None:
        return b
    if a.start != b.start:
        raise NeedsFullLength("tokens meet that start at different positions")
    batch = a.batch if a.batch is not None else b.batch
    return Axes(tuple(sorted({*a.dims, *b.dims})), batch, a.epoch, a.start)


def _bring_rest(call: Call, value: Tensor, node: fx.Node, axes: Axes, result: Axes, rank: int) -> Tensor:
    """A value with one token axis meets one with two: its other axis must broadcast."""
    shape = node.meta["val"].shape
    offset = rank - len(shape)
    for dim in set(result.dims) - set(_aligned(axes, offset).dims):
        if dim >= offset and shape[dim - offset] != 1:
            raise NeedsFullLength("token axes of different tensors do not line up")
    return value
