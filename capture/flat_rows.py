"""Work on [batch * tokens, channels] that is set apart to [batch, tokens, channels] afterwards, done there at once.

    %f = reshape(%x, [B * N, C]);  %y = add(%f, linear(relu(linear(%f, ...)), ...));  reshape(%y, [B, N, C])
    ->  add(%x, linear(relu(linear(%x, ...)), ...))

A stream of tokens keeps its token axis this way from end to end (OPT folds it away in every block).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .nodes import RESHAPES, expression, new_node, op_of

FOLDS = {*RESHAPES, "aten.flatten"}
NORMS = {"aten.layer_norm", "aten.rms_norm"}
ROW_BY_ROW = {"aten.linear", "aten.dropout", *NORMS}


def unflatten_rows(graph: fx.Graph) -> None:
    """Move reshapes that set rows apart up to where the rows were made one axis, in place; dead nodes are left.

    What stands between must work on each row by itself, and be used in no other way than to be set apart alike.
    """
    alike: dict[Any, dict[fx.Node, set[fx.Node]]] = {}
    for node in list(graph.nodes):
        lead = _axes_apart(node)
        region = _region(node.args[0]) if lead else None
        if region is not None:
            node = _first_rows(node, lead)
            alike.setdefault(tuple(map(expression, node.meta["val"].shape[:-1])), {})[node] = region
    for regions in alike.values():
        _unflatten(graph, _used_alike(regions))


def _used_alike(regions: dict[fx.Node, set[fx.Node]]) -> dict[fx.Node, set[fx.Node]]:
    """Those reshapes no part of whose regions has a user outside the regions."""
    while True:
        inside = set(regions).union(*regions.values())
        kept = {end: region for end, region in regions.items() if all(set(one.users) <= inside for one in region)}
        if len(kept) == len(regions):
            return kept
        regions = kept


def _unflatten(graph: fx.Graph, regions: dict[fx.Node, set[fx.Node]]) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    apart: dict[fx.Node, fx.Node] = {}
    for end, region in regions.items():
        folds = {row for node in (end, *region) for row in node.all_input_nodes if row not in region and _folds(row)}
        with graph.inserting_before(end):
            for node in sorted((region | folds) - set(apart), key=order.__getitem__):
                apart[node] = _before_fold(node, end) if node in folds else _on_rows(node, apart)
        end.replace_all_uses_with(apart[end.args[0]])  # type: ignore[index]


def _axes_apart(node: fx.Node) -> int:
    """How many axes a reshape of [R, C] makes of the rows, where it does not mix them with channels; else 0."""
    if op_of(node) not in RESHAPES:
        return 0
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    if len(before) != 2 or not isinstance(before[1], int):
        return 0
    lead, channels = len(after), 1
    while lead and channels != before[1] and isinstance(after[lead - 1], int):
        lead, channels = lead - 1, channels * after[lead - 1]
    return lead if lead > 1 and channels == before[1] else 0


def _first_rows(node: fx.Node, lead: int) -> fx.Node:
    """A reshape that sets rows apart only: the one given, or if that splits channels too, one made before it."""
    if len(node.meta["val"].shape) == lead + 1:
        return node
    rows: Any = node.args[0]
    sizes: Any = node.args[1]
    with node.graph.inserting_before(node):
        apart = new_node(node, torch.ops.aten.reshape.default, (rows, [*sizes[:lead], rows.meta["val"].shape[1]]))
    node.replace_input_with(rows, apart)
    return apart


def _region(node: Any) -> set[fx.Node] | None:
    """Nodes between the reshapes that fold rows and `node`; None where something else makes the rows."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        one = pending.pop()
        if one in found:
            continue
        rows = _rows_of(one)
        if rows is None:
            return None
        if not _folds(one):
            found.add(one)
            pending.extend(rows)
    return found


def _folds(node: fx.Node) -> bool:
    """Whether a reshape makes rows of more axes."""
    if op_of(node) not in FOLDS:
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return len(after) == 2 < len(before) and isinstance(after[-1], int)


def _rows_of(node: fx.Node) -> list[fx.Node] | None:
    """The arguments that hold the rows of a node that works on each by itself; None if it is no such node."""
    if _folds(node):
        return []
    if op_of(node) in ROW_BY_ROW:
        if op_of(node) in NORMS and len(node.args[1]) != 1:  # type: ignore[arg-type]
            return None
        return [node.args[0]]  # type: ignore[list-item]
    if op_of(node) == "aten.matmul":
        weight = node.args[1].meta["val"]  # type: ignore[union-attr]
        return [node.args[0]] if weight.dim() == 2 and isinstance(weight.shape[0], int) else None  # type: ignore[list-item]
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return None
    rows, tensors = expression(node.meta["val"].shape[0]), []
    for argument in node.all_input_nodes:
        value = argument.meta["val"]
        if isinstance(value, Tensor) and value.dim() == 2 and expression(value.shape[0]) == rows:
            tensors.append(argument)
        elif isinstance(value, Tensor) and value.dim() > 1:
            return None
    return tensors


def _before_fold(fold: fx.Node, end: fx.Node) -> fx.Node:
    """What was folded, with the leading axes that `end` sets apart."""
    before: Any = fold.args[0]
    sizes: Any = end.args[1]
    wanted = [*end.meta["val"].shape[:-1], fold.meta["val"].shape[-1]]
    if list(map(expression, before.meta["val"].shape)) == list(map(expression, wanted)):
        return before
    return new_node(fold, torch.ops.aten.reshape.default, (before, [*sizes[:-1], wanted[-1]]))


def _on_rows(node: fx.Node, apart: dict[fx.Node, fx.Node]) -> fx.Node:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: apart.get(one, one))
    return new_node(node, node.target, args, kwargs)
