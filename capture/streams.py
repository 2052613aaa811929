"""Telling streams apart: which attention layers work on the same tokens in the same places.

A model may hold several streams: two towers (CLIP), an encoder and its decoder (ViTMAE, T5), stages with pooling
between them (PiT).  Two layers share a stream when the tokens of the first reach the second through operations that
leave every token in its place; a gather, a convolution, a pooling, or anything not known here starts another stream.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.dequantize_linear import DEQUANTIZE
from ..kernels.quantize_linear import QUANTIZE
from .sizes import same

aten = torch.ops.aten


@dataclass(frozen=True)
class Places:
    """Where a value holds the tokens: axes that enumerate them together, row by row, and how many were cut off."""

    axes: tuple[int, ...]
    start: int = 0


WHOLE = Places((1,))


def reached_in_place(graph: fx.Graph, start: fx.Node) -> set[fx.Node]:
    """Values [B, N, C] that hold the tokens of `start` [B, N, C], each token in its place; `start` is one of them."""
    known = {start: WHOLE}
    for node in graph.nodes:
        if node not in known and isinstance(node.meta.get("val"), Tensor):
            places = _after(node, known)
            if places is not None:
                known[node] = places
    return {node for node, places in known.items() if places == WHOLE and node.meta["val"].dim() == 3}


def _after(node: fx.Node, known: dict[fx.Node, Places]) -> Places | None:
    rule = RULES.get(node.target) or (_pointwise if torch.Tag.pointwise in getattr(node.target, "tags", ()) else None)
    if rule is None or not any(argument in known for argument in node.all_input_nodes):
        return None
    return rule(node, known)


Rule = Callable[[fx.Node, dict[fx.Node, Places]], Places | None]
RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return add


@_rule(aten.dropout.default, aten.clone.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default)
def _pointwise(node: fx.Node, known: dict[fx.Node, Places]) -> Places | None:
    """Inputs align from the right; those that hold the tokens must hold them in the same axes."""
    rank, found = node.meta["val"].dim(), set()
    for argument in node.all_input_nodes:
        if argument in known:
            offset = rank - argument.meta["val"].dim()
            found.add(Places(tuple(axis + offset for axis in known[argument].axes), known[argument].start))
    return found.pop() if len(found) == 1 else None


@_rule(QUANTIZE.call, DEQUANTIZE.call)
def _rounding(node: fx.Node, known: dict[fx.Node, Places]) -> Places | None:
    """Every entry by itself."""
    return known.get(node.all_input_nodes[0])


@_rule(aten.linear.default, aten.layer_norm.default, aten.rms_norm.default)
def _over_channels(node: fx.Node, known: dict[fx.Node, Places]) -> Places | None:
    """These work along the last axis."""
    places = known.get(node.all_input_nodes[0])
    last = node.meta["val"].dim() - 1
    return None if places is None or last in places.axes else places


@_rule(aten.permute.default, aten.transpose.int)
def _permute(node: fx.Node, known: dict[fx.Node, Places]) -> Places | None:
    source, rank = node.all_input_nodes[0], node.meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.transpose.int:
        a, b = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[call-overload]
        order[a], order[b] = b, a
    else:
        order = [axis % rank for axis in node.args[1]]  # type: ignore[union-attr, misc, operator]
    places = known[source]
    return Places(tuple(order.index(axis) for axis in places.axes), places.start)


@_rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def _reshape(node: fx.Node, known: dict[fx.Node, Places]) -> Places | None:
    """Axes before and after the changed ones stay; the token axis may be split into a grid, or a grid joined."""
    source = node.all_input_nodes[0]
    before, after, places = source.meta["val"].shape, node.meta["val"].shape, known[source]
    head = _equal(before, after)
    tail = min(_equal(before[::-1], after[::-1]), len(before) - head, len(after) - head)
    changed = tuple(range(head, len(before) - tail))
    if len(before) == len(after) == head:
        return places
    if places.axes == changed:
        return Places(tuple(range(head, len(after) - tail)), places.start)
    if set(places.axes) & set(changed):
        return None
    grown = len(after) - len(before)
    return Places(tuple(axis if axis < head else axis + grown for axis in places.axes), places.start)


@_rule(aten.slice.Tensor)
def _slice(node: fx.Node, known: dict[fx.Node, Places]) -> Places | None:
    """Leading tokens may be cut off; the rest keeps its order."""
    source, axis, start, end, step = (*node.args, *(None,) * 5)[:5]
    places = known[source]  # type: ignore[index]
    axis = int(axis or 0) % node.meta["val"].dim()  # type: ignore[call-overload]
    if axis not in places.axes:
        return places
    to_the_end = end is None or (isinstance(end, int) and end >= sys.maxsize)
    if places.axes != (axis,) or not to_the_end or not isinstance(start or 0, int) or (step or 1) != 1:
        return None
    return Places(places.axes, places.start + int(start or 0)) if (start or 0) >= 0 else None  # type: ignore[operator, call-overload]


@_rule(aten.cat.default)
def _cat(node: fx.Node, known: dict[fx.Node, Places]) -> Places | None:
    """Tokens that lost their first ones get as many in front again; pieces joined along another axis leave them."""
    pieces: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    rank = node.meta["val"].dim()
    if any(piece.meta["val"].dim() != rank for piece in pieces):  # empty tensors of one axis may stand among others
        return None
    axis = int(node.args[1] if len(node.args) > 1 else 0) % rank  # type: ignore[call-overload]
    last = known.get(pieces[-1])
    if last is not None and last.axes == (axis,):
        in_front = [piece.meta["val"].shape[axis] for piece in pieces[:-1]]
        whole = all(isinstance(size, int) for size in in_front) and sum(in_front) == last.start > 0
        return Places((axis,)) if whole else None
    held = {known[piece] for piece in pieces if piece in known}
    places = held.pop()
    return places if not held and axis not in places.axes else None


def _equal(before: Iterable[Any], after: Iterable[Any]) -> int:
    """How many leading sizes agree."""
    count = 0
    for a, b in zip(before, after, strict=False):
        if not same(a, b):
            break
        count += 1
    return count
