"""Ops that read tokens at positions computed from the data, as CLIP's text tower reads its end-of-text token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..token_axes import Axes, NeedsFullLength
from .call import Answer, Call, align_epoch, aten, require_batch, rule


@rule(aten.index.Tensor)
def index(call: Call) -> Answer:
    """x[rows, positions]: each position is read in the slot its token went to, which is what restoring would give."""
    indices = list(call.args[1])
    batch, dim = _readable(call, call.node.args[1])
    if any(i >= len(indices) or indices[i] is None for i in (batch, dim)):
        raise NeedsFullLength("it does not say for every row which tokens it reads")
    value, axes = align_epoch(call, call.args[0], call.only)
    rows, positions = torch.broadcast_tensors(indices[batch], indices[dim])
    slots = _slots(call, axes, positions, lambda source, at: source[rows, at])
    indices[dim] = slots.clamp(min=0)
    given = [i for i, one in enumerate(indices) if one is not None]
    picked = call.run(value, indices)
    front = given[0] if given == list(range(given[0], given[-1] + 1)) else 0  # where the axes of the indices stand
    missing = (slots < 0)[(..., *[None] * (picked.dim() - front - slots.dim()))]
    return picked.masked_fill(missing, torch.nan), None


@rule(aten.gather.default)
def gather(call: Call) -> Answer:
    """gather(x, tokens, positions), likewise."""
    batch, dim = _readable(call, call.node.args[2:3])
    positions = call.args[2]
    if call.args[1] % call.args[0].dim() != dim or batch != 0:
        raise NeedsFullLength("it picks along another axis than tokens")
    value, axes = align_epoch(call, call.args[0], call.only)
    slots = _slots(call, axes, positions, lambda source, at: source.gather(1, at.flatten(1)).reshape(at.shape))
    return call.run(value, dim, slots.clamp(min=0)).masked_fill(slots < 0, torch.nan), None


def _readable(call: Call, indices: Any) -> tuple[int, int]:
    """Batch axis and token axis of the value; NeedsFullLength where slots cannot stand for positions."""
    axes = call.only
    if any(isinstance(node, fx.Node) and call.axes_of(node) is not None for node in indices):
        raise NeedsFullLength("the positions it reads were computed from the tokens")
    if len(axes.dims) != 1 or not call.args[0].is_floating_point():
        raise NeedsFullLength("it reads tokens by position along several axes")
    if call.state.drops:
        raise NeedsFullLength("it reads tokens at positions computed from the data, which may be among them")
    return require_batch(axes), axes.dims[0]


def _slots(call: Call, axes: Axes, positions: Tensor, look_up: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The slots of tokens given by their original positions (negative: from the end); -1 where there is none.

    Only padding has no slot.  What is read there becomes NaN: the model's own value would be that of a token that the
    reduction took out, and any other number in its place would go unnoticed.
    """
    whole = torch.where(positions < 0, positions + call.state.counts[0], positions + axes.start)
    found = look_up(call.state.source(), whole)
    return torch.where(found < axes.start, -1, found - axes.start)
