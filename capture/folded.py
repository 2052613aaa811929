"""Heads folded into the batch axis of attention, set apart again.

`nn.MultiheadAttention` and older models compute attention on [batch * heads, tokens, channels].  Unfolded, it looks as
it does everywhere else, and each axis keeps its meaning.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .flat_rows import unflatten_rows
from .nodes import MOVES, RESHAPES, axis_order, expression, new_node, op_of

aten = torch.ops.aten


class NotFolded(Exception):
    """A leading axis is not batch times heads, as far as can be seen; the text says why."""


class Unfolder:
    """Splits axes that are batch * heads into the two, back to where they were folded; makes nodes like `out`."""

    def __init__(self, out: fx.Node, folded: Any) -> None:
        """`folded`: size of the leading axis; raises NotFolded when it is no multiple of a dynamic batch."""
        self.out = out
        source = next((n for n in out.graph.nodes if n.op == "placeholder" and _has_dynamic_batch(n)), None)
        batch: Any = None if source is None else expression(source.meta["val"].shape[0])
        heads: Any = 0 if source is None else expression(folded) / batch
        if source is None or not (getattr(heads, "is_Integer", False) and heads > 0):
            raise NotFolded("its logits have 3 axes, and the first is not the batch times a number of heads")
        self.source, self.batch, self.heads = source, batch, int(heads)

    def check(self, node: fx.Node, axis: int = 0) -> None:
        """Raises NotFolded if `unfold` cannot take the axis apart."""
        while op_of(node) in MOVES:
            node, axis = node.args[0], axis_order(node)[axis]  # type: ignore[assignment]
        by_sizes = op_of(node) in RESHAPES and self._has_batch_outside(node, axis)
        if not by_sizes and not (op_of(node) == "aten.flatten" and self._was_apart(node, axis)):
            raise NotFolded(f"its heads are folded into the batch in a way that is not known (at {node.name})")

    def unfold(self, node: fx.Node, axis: int = 0) -> fx.Node:
        """The value with axes batch, heads in place of `axis`, which was checked."""
        if op_of(node) in MOVES:
            order = axis_order(node)
            inside = self.unfold(node.args[0], order[axis])  # type: ignore[arg-type]
            return new_node(self.out, aten.permute.default, (inside, _with_pair(order, order[axis])))
        before: Any = node.args[0]
        if self._was_apart(node, axis):
            return before
        sizes = list(node.args[1])  # type: ignore[arg-type]
        sizes[axis : axis + 1] = [self._batch_size(), self.heads]
        return new_node(self.out, aten.reshape.default, (before, sizes))

    def unfold_mask(self, node: fx.Node) -> fx.Node:
        """What meets logits [batch * heads, N, M], for [batch, heads, N, M]: it may broadcast."""
        if not _has_rows(node):
            return node if node.meta["val"].dim() < 3 else new_node(self.out, aten.unsqueeze.default, (node, 0))
        return self.unfold(node)

    def check_mask(self, node: fx.Node) -> None:
        """Raises NotFolded if `unfold_mask` cannot take it apart."""
        if _has_rows(node):
            self.check(node)

    def refold(self, old: fx.Node, new: fx.Node, axis: int = 0) -> None:
        """Let users of `old` read `new`, which has two axes in place of `axis`: moves and reshapes as it is."""
        for user in list(old.users):
            with user.graph.inserting_before(user):
                if op_of(user) in MOVES:
                    order = axis_order(user)
                    moved = new_node(user, aten.permute.default, (new, _with_pair(order, axis)))
                    self.refold(user, moved, order.index(axis))
                elif op_of(user) in RESHAPES:
                    user.replace_input_with(old, new)
                else:
                    user.replace_input_with(old, new_node(old, aten.flatten.using_ints, (new, axis, axis + 1)))

    def _batch_size(self) -> fx.Node:
        """A node with the batch size, from the first input that has it."""
        for user in self.source.users:
            if user.target is aten.sym_size.int and user.args[1] == 0 and user < self.out:
                return user
        last = [n for n in self.out.graph.nodes if n.op == "placeholder"][-1]
        with self.out.graph.inserting_after(last):
            return new_node(self.out, aten.sym_size.int, (self.source, 0))

    def _was_apart(self, node: fx.Node, axis: int) -> bool:
        """Whether what a reshape takes has the wanted shape already."""
        before: Any = node.args[0]
        shape = list(map(expression, node.meta["val"].shape))
        shape[axis : axis + 1] = [self.batch, self.heads]
        return list(map(expression, before.meta["val"].shape)) == shape

    def _has_batch_outside(self, node: fx.Node, axis: int) -> bool:
        """Whether what a reshape takes has a batch axis that begins where its own axis `axis` begins."""
        before: Any = node.args[0]
        start, reached = math.prod(map(expression, node.meta["val"].shape[:axis])), 1
        for size in map(expression, before.meta["val"].shape):
            if reached == start and size == self.batch:
                return True
            reached = reached * size
        return False


def set_axes_apart(graph: fx.Graph) -> None:
    """Undo foldings of the batch axis that are undone later anyway, in place; dead nodes are left where they are.

    Heads: a reshape to [batch, heads, ...] that follows one to [batch * heads, ...], with axes moved between them.
    Tokens: see `unflatten_rows`.
    """
    for node in list(graph.nodes):
        if op_of(node) in RESHAPES:
            _unfold_where_split(node)
    unflatten_rows(graph)


def _unfold_where_split(node: fx.Node) -> None:
    """Replace a reshape that splits batch * heads by the value from before they were folded."""
    inside: Any = node.args[0]
    before, after = (list(map(expression, one.meta["val"].shape)) for one in (inside, node))
    axis = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
    if axis is None or len(after) != len(before) + 1 or before[axis + 1 :] != after[axis + 2 :]:
        return
    try:
        unfolder = Unfolder(node, inside.meta["val"].shape[axis])
        unfolder.check(inside, axis)
    except NotFolded:
        return
    if after[axis : axis + 2] == [unfolder.batch, unfolder.heads]:
        with node.graph.inserting_before(node):
            node.replace_all_uses_with(unfolder.unfold(inside, axis))


def _with_pair(order: list[int], axis: int) -> list[int]:
    """An order of axes once axis `axis` of what it orders has become two, which stay together."""
    pairs = [[old, old + 1] if old == axis else [old + (old > axis)] for old in order]
    return [old for pair in pairs for old in pair]


def _has_rows(mask: fx.Node) -> bool:
    shape = mask.meta["val"].shape
    return len(shape) == 3 and expression(shape[0]) != 1


def _has_dynamic_batch(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and isinstance(value.shape[0], torch.SymInt)
