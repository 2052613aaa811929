"""Finding the rotary position embedding of queries and keys: what is rotated, and the tables that say how far."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from ..graph import Rotation
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


def rotation_of(rotated: fx.Node, order: dict[fx.Node, int], stream: set[fx.Node]) -> Rotation | None:
    """How queries or keys [B, H, N, D] are rotated by position.

    order   rank of every node of the graph
    stream  nodes that depend on the token stream: all others are tables

    The walk goes up, through nodes that alone carry the keys (every path to the attention leads through them), to the
    nearest that no table which varies over tokens multiplies any more; rotations are what it finds on the way, whatever
    they are spelled with.  None: nothing rotates them.
    """
    pending, turned, axes = {rotated}, False, KEPT
    tables: dict[tuple[str, int, int], Any] = {}  # with the number of their rows
    movable = True
    while pending:
        node = max(pending, key=order.__getitem__)
        pending.discard(node)
        alone = not pending
        if turned and alone and _holds_all(node, rotated, axes):
            count = expression(rotated.meta["val"].shape[2])
            movable = movable and all(rows == count for rows in tables.values())
            return Rotation(node.name, axes, tuple(tables) if movable else ())
        if op_of(node) in MIXES or node not in stream:
            return None
        if op_of(node) in MOVES:
            if not alone:
                return None
            axes = _before_move(node, axes)
        met = _tables_met(node, stream, axes)
        turned = turned or bool(met and op_of(node) in MULTIPLIES)
        movable = movable and not _writes(node)
        tables |= met
        pending |= {a for a in node.all_input_nodes if a in stream}
    return None


def _writes(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _holds_all(node: fx.Node, rotated: fx.Node, axes: tuple[int, ...]) -> bool:
    value, wanted = node.meta.get("val"), rotated.meta["val"].shape
    if not isinstance(value, Tensor) or value.dim() != 4:
        return False
    return all(expression(value.shape[axis]) == expression(size) for axis, size in zip(axes, wanted, strict=True))


def _tables_met(node: fx.Node, stream: set[fx.Node], axes: tuple[int, ...]) -> dict[tuple[str, int, int], Any]:
    """Arguments of a node that are no stream and vary over tokens: name, batch axis, token axis -> number of rows."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() <= axes[2]:
        return {}  # a number made of the stream, such as the scale of its largest entry
    batch, tokens = (axes[i] - value.dim() for i in (0, 2))
    others = [a for a in node.all_input_nodes if a not in stream and isinstance(a.meta.get("val"), Tensor)]
    rows = {(one.name, batch, tokens): _rows(one.meta["val"], tokens) for one in others}
    return {key: many for key, many in rows.items() if many != 1}


def _rows(table: Tensor, axis: int) -> Any:
    return expression(table.shape[axis]) if table.dim() >= -axis else 1


def _before_move(node: fx.Node, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Where batch, heads, tokens and channels are before a transposition, given where they are after it."""
    order = axis_order(node)
    return tuple(order[axis] for axis in axes) if len(order) == len(axes) else axes
