"""What a node of a graph depends on, and what depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

SIZE = torch.ops.aten.sym_size.int


def ancestors(node: fx.Node, *, through_sizes: bool = True) -> set[fx.Node]:
    """All nodes that a node depends on; only those whose values it reads, not their sizes, if not `through_sizes`."""
    return _closure(node, lambda one: one.all_input_nodes, through_sizes)


def descendants(node: fx.Node, *, through_sizes: bool = True) -> set[fx.Node]:
    """All nodes that depend on a node; only those that read its value, not its sizes, if not `through_sizes`."""
    return _closure(node, lambda one: one.users, through_sizes)


def _closure(node: fx.Node, beside: Callable[[fx.Node], Iterable[fx.Node]], through_sizes: bool) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(beside(node))
    while pending:
        one = pending.pop()
        if one not in found and (through_sizes or one.target is not SIZE):
            found.add(one)
            pending.extend(beside(one))
    return found
