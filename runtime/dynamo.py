"""`torch.compile(model, backend="tamis", options={"passes": "tome:r=13"})`.

Dynamo hands over a graph of torch functions whose weights are inputs, and whose dynamic sizes are too.  Both become
what they were: weights are held by the module again, sizes are read off the tensors they belong to.  What is left has
the user's inputs alone, and goes the way of every other model: capture, passes, lowering.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from ..errors import BadParameter, InputMismatch
from .api import compile
from .compiled import CompiledModel

OPTIONS = ("passes", "recipe", "mode", "allow_noop", "verify", "never_slower")
DROPOUTS = {value for name, value in vars(torch.nn.functional).items() if "dropout" in name and name[0] != "_"}
COMPILED: list[CompiledModel] = []  # what was made in this process, the latest last, for those who want the report


def backend(graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """The backend `tamis` of `torch.compile`.

    Options: `passes` (text or pass objects) or `recipe`, as in `tamis.compile`; `mode` ("default" compiles the result
    by Inductor; None, which is the default, runs it eagerly); `allow_noop`; `never_slower`; `verify` (false by default:
    Dynamo compiles while the user waits).  `tamis.runtime.dynamo.COMPILED[-1].report` is the report.

    Raises:
        BadParameter: an option that is not one of these, or no passes.
        InputMismatch: the model is in training mode.
        TamisError: what `tamis.compile` raises; Dynamo wraps it in BackendCompilerFailed.
    """
    options = _checked(kwargs.get("options") or {})
    _refuse_training(graph)
    module, kept = as_module(graph, inputs)
    # export marks the tensors it is given, and Dynamo has guards on the marks of the user's
    example = tuple(inputs[place].detach() for place in kept)
    shapes = tuple(_dynamic_axes(node) for node in module.graph.nodes if node.op == "placeholder")
    with torch._guards.tracing(None):  # or export would trace with Dynamo's symbols, and add guards to its frame
        compiled = compile(module, example, dynamic_shapes=shapes, **{"verify": False, **options})
    COMPILED.append(compiled)

    def call(*given: Any) -> Any:
        return compiled(*(given[place] for place in kept))

    return call


def as_module(graph: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[int]]:
    """Dynamo's graph as a module that holds its weights and takes the user's tensors only.

    -> the module, and the places of its inputs among those Dynamo gives
    """
    new = fx.Graph()
    held = torch.nn.Module()
    values: dict[fx.Node, fx.Node] = {}
    kept: list[int] = []
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for place, (node, value) in enumerate(zip(places, inputs, strict=True)):
        if isinstance(value, Tensor) and not _is_weight(node, value):
            values[node] = new.placeholder(_name_of(node))
            values[node].meta = dict(node.meta)
            kept.append(place)
    for node, value in zip(places, inputs, strict=True):
        if node in values or not node.users:  # a stride that changes is an input too, which nothing reads
            continue
        values[node] = _held(new, held, node, value) if isinstance(value, Tensor) else _size(new, node, values)
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            values[node] = new.node_copy(node, values.__getitem__)
    for name, child in graph.named_children():
        held.add_module(name, child)
    return fx.GraphModule(held, new).eval(), kept


def _dynamic_axes(node: fx.Node) -> dict[int, Any]:
    """The axes that Dynamo has found to change, for `torch.export`; the others are constants of its graph."""
    shape = node.meta["example_value"].shape
    return {axis: torch.export.Dim.AUTO for axis, size in enumerate(shape) if isinstance(size, SymInt)}


def _held(new: fx.Graph, held: torch.nn.Module, node: fx.Node, value: Tensor) -> fx.Node:
    if isinstance(value, torch.nn.Parameter):
        held.register_parameter(node.name, value)
    else:
        held.register_buffer(node.name, value)
    return new.get_attr(node.name)


def _size(new: fx.Graph, node: fx.Node, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A size that Dynamo passes as an input, read off the tensor it is of."""
    symbol = _expression(node.meta["example_value"])
    for source, value in values.items():
        shape = getattr(source.meta.get("example_value"), "shape", ())
        for axis, size in enumerate(shape):
            if _expression(size) == symbol:
                return new.call_function(torch.ops.aten.sym_size.int, (value, axis))
    raise InputMismatch(
        where="torch.compile",
        rule="every dynamic number must be a size of an input tensor",
        got=f"the number {node.name}",
        hint="pass it as a tensor, or mark it static (torch.compile(..., dynamic=False)).",
    )


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, SymInt) else size


def _is_weight(node: fx.Node, value: Tensor) -> bool:
    return isinstance(value, torch.nn.Parameter) or "_buffers" in _source(node)


def _source(node: fx.Node) -> str:
    """Where Dynamo found the value, such as `L['self']._modules['norm']._buffers['scale']`."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)


def _name_of(node: fx.Node) -> str:
    """The user's name for an input: masks are known by theirs."""
    local = re.fullmatch(r"L\['(\w+)'\]", _source(node))
    return local[1] if local else node.name


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in OPTIONS:
            rule = f"one of {', '.join(OPTIONS)}"
            raise BadParameter(where="torch.compile", name=name, rule=rule, got=name, hint="see tamis.compile.")
    return dict(options)


def _refuse_training(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.target in DROPOUTS and True in (*node.args[2:3], node.kwargs.get("training")):
            raise InputMismatch(
                where="torch.compile",
                rule="the model must be in eval mode",
                got=f"{node.name} drops at random",
                hint="call model.eval() first.",
            )
