"""Finding the keys before rotary position embedding: what content they hold, wherever their tokens stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
MULTIPLIES = {"aten.mul", "aten.mul_"}
MOVES = {"aten.transpose", "aten.permute", "aten.swapaxes"}
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
KEPT = (0, 1, 2, 3)


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
        if _op(node) in MIXES or node not in stream:
            return None
        if _op(node) in MOVES:
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
    return all(_size(value.shape[axis]) == _size(size) for axis, size in zip(axes, wanted, strict=True))


def _is_rotation(node: fx.Node, stream: set[fx.Node], tokens: int) -> bool:
    """Whether the node multiplies by a table that has a row for every token (`tokens`: their axis)."""
    if _op(node) not in MULTIPLIES or not isinstance(node.meta.get("val"), Tensor):
        return False
    tables = [a for a in node.args[:2] if isinstance(a, fx.Node) and a not in stream]
    rank = node.meta["val"].dim()
    return any(_rows(table.meta["val"], tokens - rank) != 1 for table in tables)


def _rows(table: Tensor, axis: int) -> Any:
    return _size(table.shape[axis]) if table.dim() >= -axis else 1


def _before_move(node: fx.Node, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Where batch, heads, tokens and channels are before a transposition, given where they are after it."""
    rank = node.meta["val"].dim()
    old = list(range(rank))
    if _op(node) == "aten.permute":
        old = [axis % rank for axis in node.args[1]]  # type: ignore[union-attr]
    else:
        a, b = (axis % rank for axis in node.args[1:3])  # type: ignore[operator]
        old[a], old[b] = b, a
    return tuple(old[axis] for axis in axes) if rank == len(axes) else axes


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _op(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else ""
