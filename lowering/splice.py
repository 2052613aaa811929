"""Replace one node of a graph by what a function of its arguments traces to, and leave every other node as it is.

Tracing a few small functions is much cheaper than re-executing the model, and attention, linear, layer-norm and GELU
nodes stay whole because nobody touches them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import fx

from ..errors import BrokenInvariant
from ..op import NAMESPACE, OPS, Op
from .templates import Renaming, Shape, Template

PROVENANCE = ("stack_trace", "nn_module_stack")  # of the replaced node: errors and reports point to the user's line


def op_of(node: fx.Node) -> Op | None:
    """The tamis op that a node calls, or None; a node carried through from an ONNX file calls none."""
    if node.op != "call_function" or getattr(node.target, "namespace", None) != NAMESPACE:
        return None
    return OPS.get(node.target._schema.name.split("::")[1])  # type: ignore[union-attr]


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake mode that the graph's values live in; None when it holds no fake tensor."""
    for node in graph.nodes:
        value = node.meta.get("val")
        for one in value if isinstance(value, list | tuple) else (value,):
            if (mode := getattr(one, "fake_mode", None)) is not None:
                return mode
    return None


class Splicer:
    """Replaces nodes of a graph by what functions of their arguments trace to, in place."""

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self.templates: dict[Any, Template] = {}

    def splice(self, node: fx.Node, function: Callable[..., Any]) -> Any:
        """Replace `node` by the ATen nodes of `function(*node.args, **node.kwargs)`.

        The function sees fake tensors and SymInts where the node has nodes, and answers what the node did: one value or
        several, which replace the node's `getitem`s.  Returns what the node was replaced by, as nodes.

        Raises:
            BrokenInvariant: the function makes a tensor out of Python numbers, which a program has no place for.
        """
        with without_guards(self.mode):
            return self._splice(node, function)

    def _splice(self, node: fx.Node, function: Callable[..., Any]) -> Any:
        template, renaming = self._template(node, function)
        values: dict[fx.Node, fx.Node] = {}
        inputs = iter(node.all_input_nodes)
        provenance = {key: node.meta[key] for key in PROVENANCE if key in node.meta}
        with node.graph.inserting_before(node):
            for inner in template.graph.nodes:
                if inner.op == "placeholder":
                    values[inner] = next(inputs)
                elif inner.op == "call_function":
                    values[inner] = node.graph.node_copy(inner, values.__getitem__)
                    values[inner].meta = {**provenance, "val": renaming(inner.meta["val"])}
                elif inner.op == "get_attr":
                    reason = "it holds a constant; use torch.full or arange"
                    raise BrokenInvariant(where=f"tracing {node.name}", reason=reason)
        result = fx.map_arg(template.graph.output_node().args[0], values.__getitem__)
        _replace(node, result)
        return result

    def _template(self, node: fx.Node, function: Callable[..., Any]) -> tuple[Template, Renaming]:
        shape = Shape(node)
        key = node.target, shape.key
        if key not in self.templates:
            self.templates[key] = Template(node, shape, function, self.mode)
        template = self.templates[key]
        return template, Renaming(self.mode, dict(zip(template.symbols, shape.symbols, strict=True)))


def without_guards(mode: Any) -> AbstractContextManager[None]:
    """Records no guards: two counts that are equal in the example must not become one symbol of the program."""
    environment = getattr(mode, "shape_env", None)
    return nullcontext() if environment is None else environment.suppress_guards()


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
