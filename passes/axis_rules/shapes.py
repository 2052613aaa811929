"""Ops that move, add, remove or reshape axes."""

from __future__ import annotations

import operator
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

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


@rule(aten.expand_as.default)
def expand_as(call: Call) -> Answer:
    """Both have the same tokens, or the second only says other sizes."""
    (value, like), axes, other = call.args[:2], call.axes(0), call.axes(1)
    if other is not None:
        like, other = align_epoch(call, like, other)
        value = align_epoch(call, value, axes)[0] if axes else bring_side(call, value, like.dim(), other, value.shape)
        return value.expand(like.shape), other
    offset = like.dim() - value.dim()
    dims = tuple(d + offset for d in call.only.dims)
    sizes = [-1 if d in dims else size for d, size in enumerate(like.shape)]
    batch = None if call.only.batch is None else call.only.batch + offset
    return value.expand(sizes), replace(call.only, dims=dims, batch=batch)


@rule(aten.unbind.int)
def unbind(call: Call) -> Answer:
    """The unbound axis disappears from every piece."""
    dim = (call.arg(1, "dim", 0)) % call.args[0].dim()
    _not_token(call.only, dim)
    return call.run(), call.only.without(dim)


@rule(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)
def split(call: Call) -> Answer:
    """Cutting another axis leaves the token axes; prefix tokens may be cut off the token axis, as slices."""
    axes, dim = call.only, call.arg(2, "dim", 0) % call.args[0].dim()
    if dim not in axes.dims:
        return call.run(), axes
    *sizes, _ = (piece.shape[dim] for piece in call.node.meta["val"])
    left = call.prefix - axes.start  # prefix tokens still in front
    if len(axes.dims) > 1 or not all(isinstance(size, int) for size in sizes) or sum(sizes) > left:
        raise NeedsFullLength("it cuts the token axis behind the prefix")
    ends = [0, *accumulate(sizes), None]
    values = [aten.slice.Tensor(call.args[0], dim, start, end) for start, end in pairwise(ends)]
    return values, (*(None for _ in sizes), replace(axes, start=axes.start + sum(sizes)))


@rule(aten.flip.default, aten.roll.default, aten.glu.default)
def along_other_axes(call: Call) -> Answer:
    """Reordering or halving another axis leaves the token axes."""
    position, name = (2, "dims") if call.node.target is aten.roll.default else (1, "dims")
    dims = call.arg(position, name, call.kwargs.get("dim", -1))
    for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
        _not_token(call.only, dim % call.args[0].dim())
    if not dims and dims != 0:
        raise NeedsFullLength("it reorders all axes together")
    return call.run(), call.only


@rule(operator.getitem)
def getitem(call: Call) -> Answer:
    """A piece of a list has the axes its op gave to every piece."""
    return call.run(), call.only


@rule(aten.cat.default)
def cat(call: Call) -> Answer:
    """Joining along another axis: all pieces are brought to the same tokens.  Along tokens: the prefix and the rest."""
    dim = call.arg(1, "dim", 0) % call.args[0][0].dim()
    last = call.axes_of(call.node.args[0][-1])  # type: ignore[index]
    if last is not None and last.dims == (dim,):
        return _with_prefix(call, last, dim)
    values, axes = _same_tokens(call)
    _not_token(axes, dim)
    return call.run(values, dim), axes


@rule(aten.stack.default)
def stack(call: Call) -> Answer:
    """As joining, with a new axis."""
    dim = call.arg(1, "dim", 0) % (call.args[0][0].dim() + 1)
    values, axes = _same_tokens(call)
    return call.run(values, dim), axes.with_new(dim)


def _with_prefix(call: Call, rest: Axes, dim: int) -> Answer:
    """Rows for prefix tokens, whatever they hold, put in front of the tokens that follow them."""
    nodes: Any = call.node.args[0]
    sizes = [node.meta["val"].shape[dim] for node in nodes[:-1]]
    if any(call.axes_of(node) is not None for node in nodes[:-1]) or not all(isinstance(n, int) for n in sizes):
        raise NeedsFullLength("it joins pieces of the token axis")
    if sum(sizes) > rest.start:
        raise NeedsFullLength("it puts new tokens in front of the others")
    last, rest = align_epoch(call, call.args[0][-1], rest)
    return call.run([*call.args[0][:-1], last], dim), replace(rest, start=rest.start - sum(sizes))


def _same_tokens(call: Call) -> tuple[list[Tensor], Axes]:
    """The pieces of a list argument, all brought to the tokens of now; they must have the same token axes."""
    nodes: Any = call.node.args[0]
    values, found = list(call.args[0]), None
    for i, node in enumerate(nodes):
        axes = call.axes_of(node)
        if axes is not None:
            values[i], axes = align_epoch(call, values[i], axes)
            if found is not None and (axes.dims, axes.start) != (found.dims, found.start):
                raise NeedsFullLength("token axes of different tensors do not line up")
            found = axes
    if found is None:
        raise NeedsFullLength("a token axis comes in where none was expected")
    for i, node in enumerate(nodes):
        if call.axes_of(node) is None:
            values[i] = bring_side(call, values[i], values[i].dim(), found, node.meta["val"].shape)
    return values, found


def _not_token(axes: Axes, dim: int) -> None:
    if dim in axes.dims:
        raise NeedsFullLength("it cuts or joins along the token axis")
