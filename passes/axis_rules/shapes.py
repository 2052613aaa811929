"""Ops that move, add, remove or reshape axes."""

from __future__ import annotations

import operator
from dataclasses import replace

from ..reshapes import reshape_with_tokens
from ..token_axes import Axes, NeedsFullLength
from .call import Answer, Call, align_epoch, aten, bring_side, rule


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def reshape(call: Call) -> Answer:
    """Sizes re-derived from the match of old input and output dimensions."""
    before, after = call.original_shape(), call.node.meta["val"].shape
    sizes, axes = reshape_with_tokens(before, after, call.only, call.args[0].shape, list(call.args[1]))
    return call.run(call.args[0], sizes), axes


@rule(aten.flatten.using_ints, aten.unflatten.int)
def flatten(call: Call) -> Answer:
    """As a reshape of the same shapes: axes outside are untouched."""
    before, after = call.original_shape(), call.node.meta["val"].shape
    _, axes = reshape_with_tokens(before, after, call.only, call.args[0].shape, list(after))
    return call.run(), axes


@rule(aten.transpose.int, aten.swapaxes.default, aten.t.default, aten.permute.default, aten.movedim.int)
def permute(call: Call) -> Answer:
    """Token axes move with their axis."""
    value, rank = call.run(), call.args[0].dim()
    target = call.node.target
    order = list(range(rank))
    if target is aten.permute.default:
        order = [d % rank for d in call.args[1]]
    elif target is aten.movedim.int:
        source, destination = call.args[1] % rank, call.args[2] % rank
        order.remove(source)
        order.insert(destination, source)
    elif rank > 1:
        a, b = (0, 1) if target is aten.t.default else (call.args[1] % rank, call.args[2] % rank)
        order[a], order[b] = b, a
    return value, call.only.moved(order)


@rule(aten.unsqueeze.default)
def unsqueeze(call: Call) -> Answer:
    """Axes behind the new one shift."""
    return call.run(), call.only.with_new(call.args[1] % (call.args[0].dim() + 1))


@rule(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(call: Call) -> Answer:
    """Axes behind the removed ones shift; a token axis is never squeezed."""
    shape, axes = call.original_shape(), call.only
    dims = call.args[1] if isinstance(call.args[1], (list, tuple)) else [call.args[1]]
    gone = sorted((d % len(shape) for d in dims if shape[d % len(shape)] == 1), reverse=True)
    if set(gone) & set(axes.dims):
        raise NeedsFullLength("it squeezes the token axis")
    for dim in gone:
        axes = axes.without(dim)
    return call.run(), axes


@rule(aten.expand.default)
def expand(call: Call) -> Answer:
    """Token axes keep their live size; axes added in front shift the others."""
    axes, sizes = call.only, list(call.args[1])
    offset = len(sizes) - call.args[0].dim()
    dims = tuple(d + offset for d in axes.dims)
    for dim in dims:
        sizes[dim] = -1
    batch = None if axes.batch is None else axes.batch + offset
    return call.run(call.args[0], sizes), replace(axes, dims=dims, batch=batch)


@rule(aten.unbind.int)
def unbind(call: Call) -> Answer:
    """The unbound axis disappears from every piece."""
    dim = (call.arg(1, "dim", 0)) % call.args[0].dim()
    _not_token(call.only, dim)
    return call.run(), call.only.without(dim)


@rule(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)
def split(call: Call) -> Answer:
    """Cutting another axis leaves the token axes."""
    _not_token(call.only, call.arg(2, "dim", 0) % call.args[0].dim())
    return call.run(), call.only


@rule(operator.getitem)
def getitem(call: Call) -> Answer:
    """A piece of a list has the axes its op gave to every piece."""
    return call.run(), call.only


@rule(aten.cat.default)
def cat(call: Call) -> Answer:
    """Joining along another axis: all pieces are brought to the same tokens."""
    nodes, values = call.node.args[0], list(call.args[0])
    rank = values[0].dim()
    dim = call.arg(1, "dim", 0) % rank
    found = None
    for i, node in enumerate(nodes):  # type: ignore[arg-type]
        axes = call.axes_of(node)
        if axes is not None:
            _not_token(axes, dim)
            values[i], found = align_epoch(call, values[i], axes)
    if found is None:
        raise NeedsFullLength("a token axis comes in where none was expected")
    for i, node in enumerate(nodes):  # type: ignore[arg-type]
        if call.axes_of(node) is None:
            values[i] = bring_side(call, values[i], rank, found, node.meta["val"].shape)
    return call.run(values, dim), found


def _not_token(axes: Axes, dim: int) -> None:
    if dim in axes.dims:
        raise NeedsFullLength("it cuts or joins along the token axis")
