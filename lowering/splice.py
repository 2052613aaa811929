"""Replace one node of a graph by what a function of its arguments traces to, and leave every other node as it is.

Tracing a few small functions is much cheaper than re-executing the model, and attention, linear, layer-norm and GELU
nodes stay whole because nobody touches them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import BrokenInvariant
from ..op import NAMESPACE, OPS, Op

PROVENANCE = ("stack_trace", "nn_module_stack")  # of the replaced node: errors and reports point to the user's line


def op_of(node: fx.Node) -> Op | None:
    """The tamis op that a node calls, or None."""
    if node.op != "call_function" or getattr(node.target, "namespace", None) != NAMESPACE:
        return None
    return OPS[node.target._schema.name.split("::")[1]]  # type: ignore[union-attr]


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake mode that the graph's values live in; None when it holds no fake tensor."""
    for node in graph.nodes:
        value = node.meta.get("val")
        for one in value if isinstance(value, list | tuple) else (value,):
            if (mode := getattr(one, "fake_mode", None)) is not None:
                return mode
    return None


def splice(node: fx.Node, function: Callable[..., Any], mode: Any) -> Any:
    """Replace `node` by the ATen nodes of `function(*node.args, **node.kwargs)`, in place.

    The function sees fake tensors and SymInts where the node has nodes, and answers what the node did: one value or
    several, which replace the node's `getitem`s.  Returns what the node was replaced by, as nodes.

    Raises:
        BrokenInvariant: the function makes a tensor out of Python numbers, which a program has no place for.
    """
    traced = _trace(node, function, mode)
    values: dict[fx.Node, fx.Node] = {}
    inputs = iter(node.all_input_nodes)
    provenance = {key: node.meta[key] for key in PROVENANCE if key in node.meta}
    with node.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                values[inner] = next(inputs)
            elif inner.op == "call_function":
                values[inner] = node.graph.node_copy(inner, values.__getitem__)
                values[inner].meta = {**inner.meta, **provenance}
            elif inner.op == "get_attr":
                raise BrokenInvariant(where=f"tracing {node.name}", reason="it holds a constant; use torch.full or arange")
    result = fx.map_arg(traced.graph.output_node().args[0], values.__getitem__)
    _replace(node, result)
    return result


def _trace(node: fx.Node, function: Callable[..., Any], mode: Any) -> fx.GraphModule:
    inputs = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return function(*args, **kwargs)

    tracer = make_fx(call, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        traced = tracer(*(one.meta["val"] for one in inputs))
    traced.graph.eliminate_dead_code()
    return traced


def _replace(node: fx.Node, result: Any) -> None:
    if isinstance(result, list | tuple):
        for user in list(node.users):
            assert user.target is operator.getitem
            _replace(user, result[user.args[1]])  # type: ignore[index]
    elif isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:  # a count that turned out to be a plain number
        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: result if n is node else n)
    node.graph.erase_node(node)
