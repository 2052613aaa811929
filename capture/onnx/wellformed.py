"""Whether a parsed ONNX file is what it claims to be: names, order, types, sizes.  Nothing in it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from ...onnx_errors import MalformedGraph, OpsetUnknown, TypeUnsupported
from .tensors import HINT, check_tensor, dtype_of

NEWEST = {"": 28, "com.microsoft": 1}  # versions of the operators that the table of operations knows
DEEPEST = 32  # graphs inside graphs; more is a file made to exhaust whoever reads it


def check_model(model: onnx.ModelProto, path: str, folder: Path) -> None:
    """Raise unless the model is well-formed.

    Raises:
        MalformedGraph: empty; a cycle; a value used before it is made or never made; two values of one name; functions
            that call each other in a circle; a tensor that is not what it declares.
        OpsetUnknown: the standard operators are of a version newer than known.
        TypeUnsupported: text, or maps as inputs, tensors of unknown types.
        UnsafeExternalData, ExternalDataMissing: see `tensors.check_tensor`.
    """
    if not model.graph.node and not model.graph.output:
        raise MalformedGraph(path=path, reason="it holds no graph, or one without nodes and outputs")
    _check_versions(model, path)
    check_graph(model.graph, path, folder, frozenset(), 0)
    _check_functions(model, path, folder)


def _check_versions(model: onnx.ModelProto, path: str) -> None:
    versions = {one.domain: one.version for one in model.opset_import}
    versions[""] = versions.pop("ai.onnx", versions.get("", 0))
    used = {node.domain for node in model.graph.node}
    if used & {"", "ai.onnx"} and not versions[""]:
        raise MalformedGraph(path=path, reason="it does not say which version of the standard operators it uses")
    for domain, newest in NEWEST.items():
        if versions.get(domain, 0) > newest:
            name = domain or "ONNX"
            raise OpsetUnknown(path=path, domain=name, got=versions[domain], newest=newest)


def check_graph(graph: GraphProto, path: str, folder: Path, outside: frozenset[str], depth: int) -> None:
    """Check one graph, and those inside its nodes; `outside` are the names of values around it."""
    if depth > DEEPEST:
        raise MalformedGraph(path=path, reason=f"graphs inside graphs, more than {DEEPEST} deep")
    if depth == 0:
        for value in graph.input:
            _check_input(value, path)
    for value in (*graph.output, *graph.value_info):
        _refuse_map(value, path)
    for tensor in graph.initializer:
        check_tensor(tensor, path, folder)
    for sparse in graph.sparse_initializer:
        check_tensor(sparse.values, path, folder)
        check_tensor(sparse.indices, path, folder)
    names = [value.name for value in graph.input]
    initializers = [one.name for one in graph.initializer] + [one.values.name for one in graph.sparse_initializer]
    _require_text(path, *names, *initializers, *(value.name for value in graph.output))
    _refuse_doubled(names, path, "inputs")
    _refuse_doubled(initializers, path, "initializers")
    known = {*outside, *names, *initializers}
    _check_nodes(graph.node, path, folder, known, {*names, *initializers}, depth)
    for value in graph.output:
        if value.name not in known:
            raise MalformedGraph(path=path, reason=f"output {value.name!r} is made by no node")


def _check_input(value: onnx.ValueInfoProto, path: str) -> None:
    what, where = _element(value.type), f"input {value.name!r}"
    kind = what.WhichOneof("value")
    if kind != "tensor_type":
        raise TypeUnsupported(path=path, where=where, got=(kind or "no type").removesuffix("_type"), hint=HINT)
    dtype_of(what.tensor_type.elem_type, path, where)


def _refuse_map(value: onnx.ValueInfoProto, path: str) -> None:
    """Raise TypeUnsupported for a value that is declared a map, or a sequence of them."""
    if _element(value.type).WhichOneof("value") == "map_type":
        raise TypeUnsupported(path=path, where=f"value {value.name!r}", got="map", hint=HINT)


def _element(what: onnx.TypeProto) -> onnx.TypeProto:
    """What a sequence or an optional value is of."""
    while (kind := what.WhichOneof("value")) in ("sequence_type", "optional_type"):
        what = getattr(what, kind).elem_type
    return what


def _check_nodes(nodes: list[NodeProto], path: str, folder: Path, known: set[str], own: set[str], depth: int) -> None:
    """Check nodes in order; names of values made are added to `known`."""
    made = set(own)
    for node in nodes:
        _require_text(path, node.name, node.op_type, node.domain, *node.input, *node.output)
        for name in node.input:
            if name and name not in known:
                raise MalformedGraph(path=path, reason=_why_unknown(name, node, nodes))
        for attribute in node.attribute:
            _check_attribute(attribute, path, folder, frozenset(known), depth)
        for name in filter(None, node.output):
            if name in made:
                raise MalformedGraph(path=path, reason=f"two values are called {name!r}, one made by {told(node)}")
            made.add(name)
            known.add(name)


def _check_attribute(attribute: AttributeProto, path: str, folder: Path, known: frozenset[str], depth: int) -> None:
    _require_text(path, attribute.name)
    if not attribute.ref_attr_name:  # else type and value are those that the function's caller gives
        _check_value(attribute, path)
    tensors: list[TensorProto] = [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]
    for tensor in tensors:
        check_tensor(tensor, path, folder)
    for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
        check_graph(graph, path, folder, known, depth + 1)


def _check_value(attribute: AttributeProto, path: str) -> None:
    """Raise unless an attribute says which type it has, has a value where that is a message, and is not sparse."""
    if attribute.type == AttributeProto.UNDEFINED:
        raise MalformedGraph(path=path, reason=f"attribute {attribute.name!r} has no type")
    if attribute.type in (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS):
        raise TypeUnsupported(path=path, where=f"attribute {attribute.name!r}", got="sparse tensor", hint=HINT)
    field = {AttributeProto.TENSOR: "t", AttributeProto.GRAPH: "g", AttributeProto.TYPE_PROTO: "tp"}.get(attribute.type)
    if field is not None and not attribute.HasField(field):  # type: ignore[arg-type]
        raise MalformedGraph(path=path, reason=f"attribute {attribute.name!r} has no value")


def _check_functions(model: onnx.ModelProto, path: str, folder: Path) -> None:
    calls: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for function in model.functions:
        known = set(function.input)
        where = f"function {function.name!r}"
        _refuse_doubled(list(function.input), path, f"inputs of {where}")
        _check_nodes(function.node, path, folder, known, set(function.input), 0)
        missing = next((name for name in function.output if name not in known), None)
        if missing is not None:
            raise MalformedGraph(path=path, reason=f"output {missing!r} of {where} is made by no node")
        calls[function.domain, function.name] = set(_called(function.node))
    for name in calls:
        if name in _reached(calls, name):
            raise MalformedGraph(path=path, reason=f"function {name[1]!r} calls itself")


def _called(nodes: list[NodeProto]) -> Iterator[tuple[str, str]]:
    for node in nodes:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _called(graph.node)


def _reached(calls: dict[tuple[str, str], set[tuple[str, str]]], start: tuple[str, str]) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    pending = list(calls[start])
    while pending:
        one = pending.pop()
        if one not in found:
            found.add(one)
            pending.extend(calls.get(one, ()))
    return found


def _require_text(path: str, *names: str | bytes) -> None:
    """Names that are not UTF-8 are read as bytes."""
    odd = next((name for name in names if not isinstance(name, str)), None)
    if odd is not None:
        raise MalformedGraph(path=path, reason=f"the name {odd!r} is no text")


def _refuse_doubled(names: list[str], path: str, what: str) -> None:
    doubled = (
        next((name for i, name in enumerate(names) if name in names[:i]), None)
        if len(set(names)) < len(names)
        else None
    )
    if doubled is not None:
        raise MalformedGraph(path=path, reason=f"two {what} are called {doubled!r}")


def _why_unknown(name: str, node: NodeProto, nodes: list[NodeProto]) -> str:
    """Why a node's input has no value yet: never made, made later, or made from the node's own result."""
    makers = {output: one for one in nodes for output in one.output if output}
    if name not in makers:
        return f"{told(node)} uses {name!r}, which is neither an input nor made by a node"
    pending, seen = [name], set()
    while pending:
        one = pending.pop()
        maker = makers.get(one)
        if maker is node:
            return f"{told(node)} is part of a cycle through {name!r}"
        if maker is not None and one not in seen:
            seen.add(one)
            pending.extend(maker.input)
    return f"{told(node)} uses {name!r} before it is made by {told(makers[name])}"


def told(node: NodeProto) -> str:
    """`MatMul 'name'`, or by its first output where it has no name."""
    return f"{node.op_type} {node.name or next(iter(node.output), '')!r}"
