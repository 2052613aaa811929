"""`values_of`: some values of a program, without running what they do not need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from .closure import ancestors


def values_of(program: ExportedProgram, names: Sequence[str]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """The values of named nodes as a function of the program's flat user inputs; weights are the program's own."""
    module: Any = program.module()
    ends = {node.name: node for node in module.graph.nodes if node.name in names}
    needed = set(ends.values()).union(*map(ancestors, ends.values()))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[ends[name]] for name in names))
    interpreter = fx.Interpreter(fx.GraphModule(module, graph))
    return lambda values: interpreter.run(*values, enable_io_processing=False)
