"""Matrix products, linear layers, normalisations and softmax over other axes than tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from ..token_axes import Axes, NeedsFullLength
from .call import Answer, Call, align_epoch, aten, rule


@rule(aten.linear.default)
def linear(call: Call) -> Answer:
    """Contracts the last axis with weights, which have no token axis."""
    axes = call.only
    _untouched(axes, {call.args[0].dim() - 1})
    if any(call.axes(i) is not None for i in (1, 2)):
        raise NeedsFullLength("its weights have a token axis")
    return call.run(), axes


@rule(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(call: Call) -> Answer:
    """Normalises the last axes."""
    rank = call.args[0].dim()
    _untouched(call.only, set(range(rank - len(call.args[1]), rank)))
    return call.run(), call.only


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default)
def over_one_axis(call: Call) -> Answer:
    """Works along one axis; over tokens it would need every token's share."""
    _untouched(call.only, {call.args[1] % call.args[0].dim()})
    return call.run(), call.only


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(call: Call) -> Answer:
    """Row axes of the left and column axes of the right survive; contracting tokens needs all of them."""
    left, right = call.axes(0), call.axes(1)
    a, b = call.args[0], call.args[1]
    rank = max(a.dim(), b.dim())
    if min(a.dim(), b.dim()) < 2:
        raise NeedsFullLength("it multiplies with a vector")
    dims: set[int] = set()
    found: Axes | None = None
    if left is not None:
        a, left = align_epoch(call, a, left)
        _untouched(left, {a.dim() - 1})
        dims |= {d + rank - a.dim() for d in left.dims}
        found = left
    if right is not None:
        b, right = align_epoch(call, b, right)
        _untouched(right, {b.dim() - 2})
        dims |= {d + rank - b.dim() for d in right.dims}
        found = found or right
    if found is None or (any(d < rank - 2 for d in dims) and not (left and right)):
        raise NeedsFullLength("tokens are a batch axis of a product with another tensor")
    batch = None if found.batch is None else found.batch + rank - (a if found is left else b).dim()
    return call.run(a, b), replace(found, dims=tuple(sorted(dims)), batch=batch)


@rule(torch.ops.tamis.matmul_integer.default)
def matmul_integer(call: Call) -> Answer:
    """Tokens among the rows of the left, with one zero point for all of them, and weights on the right."""
    _untouched(call.only, {call.args[0].dim() - 1})
    if any(call.axes(i) is not None for i in range(1, len(call.args))):
        raise NeedsFullLength("its weights have a token axis")
    if len(call.args) > 2 and call.args[2] is not None and call.args[2].numel() != 1:
        raise NeedsFullLength("its zero point is another one for every token")
    return call.run(), call.only


@rule(aten.addmm.default)
def addmm(call: Call) -> Answer:
    """bias + x @ w with tokens among the rows of x."""
    axes = call.axes(1)
    if axes is None or not isinstance(call.node.args[1], fx.Node) or axes.dims != (0,):
        raise NeedsFullLength("its tokens are not rows")
    return call.run(), axes


def _untouched(axes: Axes, dims: set[int]) -> None:
    if dims & set(axes.dims):
        raise NeedsFullLength("it contracts or normalises the token axis")
