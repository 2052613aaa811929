"""Higher-order ops that only switch a mode around a part of the graph, replaced by that part."""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import fx

_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


def inline_wrappers(graph_module: fx.GraphModule) -> None:
    """Inline, in place, sub-graphs run with gradients switched, or with autocast switched off, nested ones included.

    Programs are run without gradients, so the first kind says nothing.  Autocast that is switched on does: it stays.
    """
    for node in list(graph_module.graph.nodes):
        found = _wrapped(node)
        if found is not None:
            body, args = found
            inner = graph_module.get_submodule(str(body.target))
            assert isinstance(inner, fx.GraphModule)
            inline_wrappers(inner)
            _splice(graph_module, node, inner, args)
            if not body.users:
                graph_module.graph.erase_node(body)


def _wrapped(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """The get_attr node of the sub-graph and its arguments, if the node is a wrapper that can go."""
    if node.op != "call_function":
        return None
    name = getattr(node.target, "__name__", "")
    if name == _GRAD:  # (enabled, body, *args)
        return node.args[1], node.args[2:]  # type: ignore[return-value]
    if name == _AUTOCAST and node.args[2] is False:  # (device, dtype, enabled, cache, body, *args)
        return node.args[4], node.args[5:]  # type: ignore[return-value]
    return None


def _splice(outer: fx.GraphModule, call: fx.Node, inner: fx.GraphModule, args: tuple[Any, ...]) -> None:
    values: dict[fx.Node, Any] = {}
    given = iter(args)
    for node in inner.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "output":
            _replace(call, fx.node.map_arg(node.args[0], values.__getitem__))
        else:
            with outer.graph.inserting_before(call):
                values[node] = outer.graph.node_copy(node, values.__getitem__)
            values[node].meta = copy.copy(node.meta)
            if node.op == "get_attr":
                values[node].target = _adopt(outer, inner, str(node.target))
    outer.graph.erase_node(call)


def _replace(call: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        call.replace_all_uses_with(result)
        return
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(result[user.args[1]])
        user.graph.erase_node(user)


def _adopt(outer: fx.GraphModule, inner: fx.GraphModule, name: str) -> str:
    """Make an attribute of the inner module one of the outer's, under a name that is free."""
    free = name.replace(".", "_")
    while hasattr(outer, free):
        free += "_"
    setattr(outer, free, operator.attrgetter(name)(inner))
    return free
