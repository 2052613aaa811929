"""`torch.compile(model, backend="tamis", options={"passes": "tome:r=13"})`.

Dynamo hands over a graph of torch functions whose weights are inputs, and whose dynamic sizes are too.  Both become
what they were: weights are held by the module again, sizes are read off the tensors they belong to.  What is left has
the user's inputs alone, and goes the way of every other model: capture, passes, lowering.
"""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from ..errors import BadParameter, InputMismatch
from ..report import Report
from .api import compile
from .compiled import CompiledModel

OPTIONS = ("passes", "recipe", "mode", "allow_noop", "verify", "never_slower")
FUNCTIONS = vars(torch.nn.functional)
TRAINED = {value for name, value in FUNCTIONS.items() if name[0] != "_" and ("dropout" in name or "_norm" in name)}
REPORTS: deque[Report] = deque(maxlen=64)  # of what was made in this process, the latest last


def backend(graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """The backend `tamis` of `torch.compile`.

    Options: `passes` (text or pass objects) or `recipe`, as in `tamis.compile`; `mode` ("default" compiles the result
    by Inductor; None, which is the default, runs it eagerly); `allow_noop`; `never_slower`; `verify` (false by default:
    Dynamo compiles while the user waits).  `tamis.runtime.dynamo.REPORTS[-1]` is the report.

    Raises:
        BadParameter: an option that is not one of these, or no passes.
        InputMismatch: the model is in training mode.
        TamisError: what `tamis.compile` raises; Dynamo wraps it in BackendCompilerFailed.
    """
    options = {"verify": False, **_checked(kwargs.get("options") or {})}
    _refuse_training(graph)
    made = [_Made.of(graph, inputs, options)]

    def call(*given: Any) -> Any:
        # Dynamo holds weights to their shapes only: another model, or another tensor in a model's place, comes here too
        found = next((one for one in made if one.has(given)), None)
        if found is None:
            found = _Made.of(graph, given, options)
            made.append(found)
        return found.compiled(*(given[place] for place in found.kept))

    return call


@dataclass(frozen=True)
class _Made:
    """What was compiled for one set of weights: the tensors by their place among a call's inputs."""

    compiled: CompiledModel
    kept: list[int]
    weights: dict[int, Tensor]

    @staticmethod
    def of(graph: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> _Made:
        module, kept = as_module(graph, inputs)
        # export marks the tensors it is given, and Dynamo has guards on the marks of the user's
        example = tuple(inputs[place].detach() for place in kept)
        shapes = tuple(_dynamic_axes(node) for node in module.graph.nodes if node.op == "placeholder")
        with torch._guards.tracing(None):  # or export would trace with Dynamo's symbols, and add guards to its frame
            compiled = compile(module, example, dynamic_shapes=shapes, **options)
        REPORTS.append(compiled.report)
        others = (place for place in range(len(inputs)) if place not in kept)
        return _Made(compiled, kept, {place: inputs[place] for place in others if isinstance(inputs[place], Tensor)})

    def has(self, given: Sequence[Any]) -> bool:
        return all(given[place] is weight for place, weight in self.weights.items())


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
        if node.op == "call_function" and _trains(node):
            raise InputMismatch(
                where="torch.compile",
                rule="the model must be in eval mode",
                got=f"{node.name}, which drops at random or measures its batch",
                hint="call model.eval() first.",
            )


def _trains(node: fx.Node) -> bool:
    if node.target is torch.nn.functional.scaled_dot_product_attention:
        return bool(node.kwargs.get("dropout_p") or (len(node.args) > 4 and node.args[4]))
    if node.target not in TRAINED:
        return False
    parameters = inspect.signature(node.target).parameters
    if "training" not in parameters:
        return False
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bool(bound.arguments["training"]) and bound.arguments.get("p", 1) != 0
