"""Rows read by a number that counts through two axes, read at a place on each of them.

    %f = reshape(%x, [B * N, C]);  index(%f, [%i * N + %j])    ->    index(%x, [%i, %j])

Exporters that have no operator for reading at several places at once write it so (the TorchScript exporter does).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .nodes import RESHAPES, expression, new_node, op_of

PLACES = {"aten.argmax", "aten.argmin"}  # what is a place on an axis, by its kind
CASTS = {"aten.to", "aten._to_copy", "aten.reshape", "aten.unsqueeze", "aten.squeeze"}


def unflatten_places(graph: fx.Graph) -> None:
    """Read folded rows where they stood before, in place; dead nodes are left.

    The place on the second axis must be known to be one: the place of an extremum along an axis of this length, or one
    of a range up to it.  (A number beyond the end of a row would read the next one.)
    """
    for node in list(graph.nodes):
        places = _places(node)
        if places is not None:
            folded: Any = node.args[0]
            with graph.inserting_before(node):
                read = new_node(node, torch.ops.aten.index.Tensor, (folded.args[0], list(places)))
            node.replace_all_uses_with(read)


def _places(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Where on the first and on the second axis a node reads rows of two axes that were made one."""
    if op_of(node) != "aten.index" or op_of(node.args[0]) not in RESHAPES or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return None
    folded: Any = node.args[0]
    flat: Any = node.args[1][0]  # type: ignore[index]
    before, after = folded.args[0].meta["val"].shape, folded.meta["val"].shape
    if len(before) != len(after) + 1 or list(map(expression, before[2:])) != list(map(expression, after[1:])):
        return None
    if flat.meta["val"].dtype != torch.int64 or op_of(flat) != "aten.add" or len(flat.all_input_nodes) != 2:
        return None
    for product, place in (flat.args, flat.args[::-1]):
        row = _times(product, before[1])
        if row is not None and _is_place(place, before[1]):
            return row, place
    return None


def _times(product: fx.Node, length: Any) -> fx.Node | None:
    """What is multiplied by the length."""
    if op_of(product) != "aten.mul":
        return None
    for row, factor in (product.args, product.args[::-1]):
        size = factor.meta["val"] if isinstance(factor, fx.Node) else factor
        if isinstance(row, fx.Node) and isinstance(size, int | torch.SymInt) and expression(size) == expression(length):
            return row
    return None


def _is_place(node: Any, length: Any) -> bool:
    """Whether all entries of a node are from 0 to below a length."""
    while op_of(node) in CASTS:
        node = node.args[0]
    if op_of(node) in PLACES:
        along = node.args[1] if len(node.args) > 1 else None
        return along is not None and expression(node.args[0].meta["val"].shape[along]) == expression(length)
    if op_of(node) != "aten.arange" or expression(node.meta["val"].shape[0]) != expression(length):
        return False
    return len(node.args) == 1 or (node.args[0] == 0 and node.args[2:] in ((), (1,)))
