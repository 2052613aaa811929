"""The tensors of trained methods as buffers of the graph that is rewritten."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..capture.program import with_buffers
from ..graph import TokenGraph
from ..op import NAMESPACE
from ..weights import TrainedPass


def with_trained(
    graph: TokenGraph, placed: Iterable[tuple[str, Any]], layers: int
) -> tuple[TokenGraph, dict[int, dict[str, str]]]:
    """The graph with a buffer for every tensor of the placed methods: `tamis.METHOD.NAME`, shared by their layers.

    placed  methods, each with the node name of a value [B, N, C] that it works on
    layers  number of layers that the methods choose from
    -> that graph (the given one when no method is trained), and by the method's id the node of each of its tensors.

    Raises:
        WeightsMismatch: a method's tensors are not those it needs at its layers of this model.
    """
    trained: dict[int, tuple[str, Any]] = {
        id(one): (node, one) for node, one in placed if isinstance(one, TrainedPass) and one.weights
    }
    found: dict[int, dict[str, str]] = {}
    stems: dict[tuple[str, str], tuple[str, dict[str, str]]] = {}  # methods that differ in parameters share tensors
    for method_id, (node, method) in trained.items():
        width, chosen = int(graph.node(node).meta["val"].shape[-1]), method.selected(layers)
        method.weights.check(method.expected(chosen, width), method.name, chosen, width)
        key = (method.name, method.weights.digest)
        if key not in stems:
            stem = _free(graph, method.name)
            named = {f"{stem}.{name}": tensor for name, tensor in method.weights.tensors.items()}
            program, nodes = with_buffers(graph.program, named)
            graph = replace(graph, program=program)
            stems[key] = (stem, nodes)
        stem, nodes = stems[key]
        found[method_id] = {name: nodes[f"{stem}.{name}"] for name in method.weights.tensors}
    return graph, found


def _free(graph: TokenGraph, name: str) -> str:
    """`tamis.dtem`, or `tamis.dtem-2` where tensors of that name are there already."""
    taken = {".".join(key.split(".")[:2]) for key in graph.program.state_dict}
    stem, number = f"{NAMESPACE}.{name}", 2
    while stem in taken:
        stem, number = f"{NAMESPACE}.{name}-{number}", number + 1
    return stem
