"""Writes in place, made into plain values: analysis and re-execution follow values, not memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram


def without_shared_writes(program: ExportedProgram) -> ExportedProgram:
    """The same computation in which no node writes into memory that another value also shows.

    `mask[..., :3] = 0` and `logits[:] = logits + bias` change values whose nodes came before, so that what a node
    computes is not in its arguments.  Programs without such writes are returned as they are: the change costs about
    two thirds of an export.
    """
    graphs = (m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule))
    if not any(_is_shared(value) for graph in graphs for node in graph.nodes for value in written(node)):
        return program
    return program.run_decompositions({})


def without_own_writes(graph: fx.Graph) -> None:
    """`add_` and its like as `add`, in place, where nobody else sees the memory (see `without_shared_writes`)."""
    for node in graph.nodes:
        values = list(written(node))
        if len(values) == 1 and values[0] is node.args[0] and not _is_shared(values[0]):
            node.target = _returning(node.target) or node.target


def _returning(target: Any) -> Any:
    """The operator that returns what an in-place operator writes; None when there is none."""
    name = target._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name[:-1], None) if target.namespace == "aten" and name.endswith("_") else None
    found = getattr(packet, target._overloadname, None)
    return None if found is None or found._schema.is_mutable else found


def written(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that a node writes into."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return
    for place, argument in enumerate(node.target._schema.arguments):
        value: Any = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            yield value


def _is_shared(value: fx.Node) -> bool:
    """Whether more than the writing node sees a value's memory: other users, or the tensor that it is a view of."""
    schema = getattr(value.target, "_schema", None)
    is_view = schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return len(value.users) > 1 or is_view or value.op == "placeholder"
