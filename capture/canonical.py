"""`canonicalise`: the same computation without what says nothing about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from .flat_places import unflatten_places
from .folded import set_axes_apart
from .inline import inline_wrappers
from .mutations import without_own_writes, without_shared_writes, written
from .nodes import op_of, same_shape
from .program import copied, rebuild
from .raise_attention import raise_attention
from .shared_heads import share_heads

aten = torch.ops.aten
END = 2**63 - 1  # how export writes "to the end"

ASSERTS = {
    "aten._assert_async",
    "aten._assert_scalar",
    "aten._assert_tensor_metadata",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}
DROPOUTS = {"aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout"}
CASTS = {"aten.to", "aten.type_as"}  # the same tensor where nothing changes
ALIASES = {"aten.alias", "aten.detach", "aten.lift_fresh"}
COPIES = {"aten.clone", "aten.contiguous", "aten._to_copy", "aten.lift_fresh_copy", "aten.detach_copy"}
NEEDS_STRIDES = {"aten.as_strided", "aten.view_as_complex", "aten.view_as_real"}


def canonicalise(program: ExportedProgram) -> ExportedProgram:
    """A program that computes the same, in canonical form; the given one is not changed and weights are shared.

    Gone are assertions, dropout that does nothing, casts and copies to the same type and device, slices and expands
    that take everything, wrappers that switch gradients (or autocast off), and nodes without use.  `view` becomes
    `reshape`, so that layouts are free.  Attention that was written out is one node (see `raise_attention`), with no
    more key-value heads than were computed (see `share_heads`).  Axes are not folded into the batch only to be set
    apart again (see `set_axes_apart`) or to be read by one number (see `unflatten_places`).  Nothing writes into memory
    that another value shows, and `add_` is `add`.  Kept nodes keep their names and stack traces; an output that was
    removed is now called like the node it was made of.
    """
    program = without_shared_writes(program)
    graph_module = copied(program)
    inline_wrappers(graph_module)
    graph = graph_module.graph
    _drop_asserts(graph)
    without_own_writes(graph)
    _drop_identities(graph)
    graph.eliminate_dead_code()
    _free_layouts(graph)
    raise_attention(graph)
    share_heads(graph)
    set_axes_apart(graph)
    unflatten_places(graph)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return rebuild(program, graph_module)


def _drop_asserts(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if op_of(node) in ASSERTS or node.target is torch._C._set_grad_enabled:
            graph.erase_node(node)


def _drop_identities(graph: fx.Graph) -> None:
    """Replace every node that returns its first argument, or what it overwrites it with, by that."""
    copies_matter = any(any(written(node)) or op_of(node) in NEEDS_STRIDES for node in graph.nodes)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if op_of(node) == "aten.native_dropout":
            _drop_native_dropout(node)
        elif _is_identity(node) or (not copies_matter and _is_idle_copy(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif _overwrites_all(node):
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)


def _overwrites_all(node: fx.Node) -> bool:
    """Whether nothing is left of the first argument, the second having its shape and type."""
    op = op_of(node)
    whole = op == "aten.copy" or (
        op == "aten.slice_scatter" and _takes_all(node, 3) and _argument(node, 5, "step", 1) == 1
    )
    return whole and _same_tensor(node, node.args[1])


def _is_identity(node: fx.Node) -> bool:
    """Whether the node returns its first argument itself, or a view of all of it."""
    op = op_of(node)
    if op in DROPOUTS:
        return not _argument(node, 2, "train", False)
    if op in ALIASES:
        return True
    if op in CASTS:
        return not _copies(node) and _same_tensor(node)
    if op == "aten.expand":
        return _same_tensor(node)
    return op == "aten.slice" and _is_full_slice(node)


def _is_idle_copy(node: fx.Node) -> bool:
    return op_of(node) in COPIES | CASTS and _same_tensor(node)


def _copies(node: fx.Node) -> bool:
    schema = node.target._schema  # type: ignore[union-attr]
    place = next((i for i, a in enumerate(schema.arguments) if a.name == "copy"), None)
    return place is not None and bool(_argument(node, place, "copy", False))


def _same_tensor(node: fx.Node, argument: Any = None) -> bool:
    """Same shape, type and device as an argument, the first unless said otherwise."""
    before, after = (argument or node.args[0]).meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device and same_shape(before.shape, after.shape)


def _is_full_slice(node: fx.Node) -> bool:
    if _argument(node, 4, "step", 1) != 1:
        return False
    return _takes_all(node, 2) or (_argument(node, 2, "start", None) in (0, None) and _same_tensor(node))


def _takes_all(node: fx.Node, place: int) -> bool:
    """Whether the range whose start is argument `place` says "from the first to the end"."""
    end = _argument(node, place + 1, "end", None)
    return _argument(node, place, "start", None) in (0, None) and (end is None or (isinstance(end, int) and end >= END))


def _drop_native_dropout(node: fx.Node) -> None:
    if _argument(node, 2, "train", False):
        return
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(node.args[0])
        if not user.users:
            node.graph.erase_node(user)
    if not node.users:  # dead code elimination keeps random ops
        node.graph.erase_node(node)


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _free_layouts(graph: fx.Graph) -> None:
    """`view` to `reshape`: without the copies that made tensors contiguous, a view may not exist."""
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
