"""Finding the keys before rotary position embedding: what content they hold, wherever their tokens stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from .nodes import MOVES, axis_order, expression, op_of

MULTIPLIES = {"aten.mul", "aten.mul_"}
# What mixes channels or tokens by content; a rotation does neither.
MIXES = {
    "aten.linear",
    "aten.matmul",
    "aten.bmm",
    "aten.addmm",
    "aten.mm",
    "aten.conv1d",
    "aten.conv2d",
    "aten.softmax",
}
KEPT: tuple[int, ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Unrotated:
    """A node that holds the keys before rotation, and its axes of batch, heads, tokens and channels."""

    node: str
    axes: tuple[int, ...] = KEPT


def keys_before_rotation(keys: fx.Node, order: dict[fx.Node, int], stream: set[fx.Node]) -> Unrotated | None:
    """The nearest value that all of `keys` [B, H, N, D] is made from before a table that varies over tokens multiplies.

    order   rank of every node of the graph
    stream  nodes that depend on the token stream: all others are tables

    The walk goes up through nodes that alone carry the keys (every path to the attention leads through them); rotations
    are what it finds on the way, whatever they are spelled with.  None: nothing rotates the keys.
    """
    pending, rotated, axes = {keys}, False, KEPT
    while pending:
        node = max(pending, key=order.__getitem__)
        pending.discard(node)
        alone = not pending
        if rotated and alone and _holds_keys(node, keys, axes):
            return Unrotated(node.name, axes)
        if op_of(node) in MIXES or node not in stream:
            return None
        if op_of(node) in MOVES:
            if not alone:
                return None
            axes = _before_move(node, axes)
        rotated = rotated or _is_rotation(node, stream, axes[2])
        pending |= {a for a in node.all_input_nodes if a in stream}
    return None


def _holds_keys(node: fx.Node, keys: fx.Node, axes: tuple[int, ...]) -> bool:
    value, wanted = node.meta.get("val"), keys.meta["val"].shape
    if not isinstance(value, Tensor) or value.dim() != 4:
        return False
    return all(expression(value.shape[axis]) == expression(size) for axis, size in zip(axes, wanted, strict=True))


def _is_rotation(node: fx.Node, stream: set[fx.Node], tokens: int) -> bool:
    """Whether the node multiplies by a table that has a row for every token (`tokens`: their axis)."""
    if op_of(node) not in MULTIPLIES or not isinstance(node.meta.get("val"), Tensor):
        return False
    tables = [a for a in node.args[:2] if isinstance(a, fx.Node) and a not in stream]
    rank = node.meta["val"].dim()
    if rank <= tokens:  # a number made of the stream, such as the scale of its largest entry
        return False
    return any(_rows(table.meta["val"], tokens - rank) != 1 for table in tables)


def _rows(table: Tensor, axis: int) -> Any:
    return expression(table.shape[axis]) if table.dim() >= -axis else 1


def _before_move(node: fx.Node, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Where batch, heads, tokens and channels are before a transposition, given where they are after it."""
    order = axis_order(node)
    return tuple(order[axis] for axis in axes) if len(order) == len(axes) else axes
