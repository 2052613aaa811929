"""Ops that read single tokens or ranges of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from ..token_axes import NeedsFullLength
from .call import Answer, Call, aten, rule


class ReadsPosition(Exception):
    """A token outside the prefix is read by its position, which a reduction has made meaningless."""

    def __init__(self, position: Any) -> None:
        super().__init__(position)
        self.position = position


@rule(aten.select.int)
def select(call: Call) -> Answer:
    """Prefix tokens stay in place and may be read; others have moved."""
    dim, index = call.args[1] % call.args[0].dim(), call.args[2]
    axes = call.only
    if dim not in axes.dims:
        return call.run(), axes.without(dim)
    if not (isinstance(index, int) and 0 <= index < call.prefix - axes.start):
        raise ReadsPosition(index if not isinstance(index, int) or index < 0 else index + axes.start)
    rest = tuple(d - (d > dim) for d in axes.dims if d != dim)
    return call.run(), replace(axes.without(dim), dims=rest) if rest else None


@rule(aten.slice.Tensor)
def slice_(call: Call) -> Answer:
    """Cutting off prefix tokens, or keeping only them, is known; other ranges need the full length."""
    rank, axes = call.args[0].dim(), call.only
    dim = call.arg(1, "dim", 0) % rank
    start, end = call.arg(2, "start") or 0, call.arg(3, "end")
    if dim not in axes.dims:
        return call.run(), axes
    left = call.prefix - axes.start  # prefix tokens still in front
    plain = isinstance(start, int) and call.arg(4, "step", 1) == 1 and len(axes.dims) == 1
    if plain and (end is None or (isinstance(end, int) and end >= sys.maxsize)) and 0 <= start <= left:
        return call.run(), replace(axes, start=axes.start + start)
    if plain and isinstance(end, int) and 0 <= start <= end <= left:
        return call.run(), None
    raise NeedsFullLength("it cuts a range out of the token axis")


@rule(aten.sym_size.int)
def sym_size(call: Call) -> Answer:
    """Sizes speak of the original sequence: whatever is built from them is in original positions."""
    axes, dim = call.only, call.args[1]
    if dim % call.args[0].dim() in axes.dims:
        return call.state.counts[0] - axes.start, None
    return call.run(), None
