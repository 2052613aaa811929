"""Walking the nodes of a file's graph, and what they are called."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir


def op_of(node: ir.Node) -> str:
    """Domain and operator: `com.microsoft.CDist`, `Unique`."""
    return f"{node.domain}.{node.op_type}" if domain_of(node) else node.op_type


def told(node: ir.Node) -> str:
    """A node's name, or that of its first output."""
    return node.name or (node.outputs[0].name if node.outputs else None) or "without a name"


def domain_of(node: ir.Node) -> str:
    """A node's domain, "" for the standard one under both of its names."""
    return "" if node.domain == "ai.onnx" else node.domain


def version_of(node: ir.Node, graph: ir.Graph) -> int:
    """The version of its domain that a node is of."""
    imports, domain = graph.opset_imports, domain_of(node)
    return node.version or imports.get(domain) or (0 if domain else imports.get("ai.onnx")) or 1


def integers(node: ir.Node, name: str) -> list[int] | None:
    """An attribute that is an integer or several; None where there is none of that name and type."""
    attribute = node.attributes.get(name)
    if attribute is None or attribute.type not in (ir.AttributeType.INT, ir.AttributeType.INTS):
        return None
    return [attribute.as_int()] if attribute.type == ir.AttributeType.INT else list(attribute.as_ints())


def needed_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that the outputs depend on, in order."""
    needed: set[ir.Node] = set()
    pending = [value.producer() for value in graph.outputs]
    while pending:
        node = pending.pop()
        if node is None or node in needed:
            continue
        needed.add(node)
        inner = [value for one in all_nodes([node]) for value in one.inputs if value is not None]
        inner += [value for one in inner_graphs(node) for value in one.outputs]
        pending.extend(value.producer() for value in inner)
    return [node for node in graph if node in needed]


def inner_graphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs inside a node, and those inside them."""
    graphs = [one.as_graph() for one in node.attributes.values() if one.type == ir.AttributeType.GRAPH]
    return graphs + [inner for graph in graphs for one in graph for inner in inner_graphs(one)]


def all_nodes(nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """The nodes and those of the graphs inside them."""
    found = []
    for node in nodes:
        found.append(node)
        found.extend(one for graph in inner_graphs(node) for one in graph)
    return found
