"""Nodes carried through from an ONNX file, written back as they were.

The exporter makes of each a placeholder in the domain of tamis, which holds the node; when the model is finished, the
node takes the placeholder's place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import version_converter
from onnx.defs import OpSchema
from onnxscript.values import Op
from torch import fx

from ..errors import ExportFailed
from ..kernels.onnx_node import parsed
from ..kernels.opset import TAMIS
from ..op import NAMESPACE
from ..opaque import OP, Opaque, opaque_of
from .splice import fake_mode_of

STANDARD = ("", "ai.onnx")


def translation() -> dict[Any, Callable[..., Any]]:
    """How the exporter translates nodes carried through."""

    def placeholder(inputs: Sequence[Any], text: str) -> Any:
        made = Op(TAMIS, OP, _schema(len(parsed(text).results)))(*inputs, text=text)
        return made if isinstance(made, Sequence) else (made,)

    return {torch.ops.tamis.onnx_node.default: placeholder}


def _schema(results: int) -> OpSchema:
    """An operator that takes any tensors and has so many results."""
    variadic = OpSchema.FormalParameterOption.Variadic
    types = onnx.defs.get_schema("Identity").type_constraints[0].allowed_type_strs
    return OpSchema(
        OP,
        NAMESPACE,
        1,
        inputs=[OpSchema.FormalParameter("inputs", "T", param_option=variadic, is_homogeneous=False)],
        outputs=[OpSchema.FormalParameter(f"result_{i}", "T") for i in range(results)],
        type_constraints=[("T", types, "")],
        attributes=[OpSchema.Attribute("text", OpSchema.AttrType.STRING, "")],
    )


@contextlib.contextmanager
def symbols_kept(graph: fx.Graph) -> Iterator[None]:
    """While the exporter runs: it makes symbols for sizes that depend on data and binds them to nothing.

    The next trace in the same environment would fail over them.
    """
    environment = getattr(fake_mode_of(graph), "shape_env", None)
    pending = getattr(environment, "pending_fresh_unbacked_symbols", [])
    before = list(pending)
    try:
        yield
    finally:
        pending[:] = before


def version_needed(graph: fx.Graph) -> int:
    """The version of the standard operators that nodes carried through need, 0 where there are none."""
    return max((_since(one) for one in map(opaque_of, graph.nodes) if one is not None), default=0)


def _since(opaque: Opaque) -> int:
    model = onnx.ModelProto.FromString(opaque.model)
    node, version = model.graph.node[0], _standard(model)
    return onnx.defs.get_schema(node.op_type, version).since_version if node.domain in STANDARD else 0


def _standard(model: onnx.ModelProto) -> int:
    return next((one.version for one in model.opset_import if one.domain in STANDARD), 0)


def write_back(model: ir.Model, path: str) -> None:
    """Put the nodes back into a finished model, in place; `path` is what errors call it.

    Domains are imported in the nodes' versions; names of nodes and values are the file's where they are free.

    Raises:
        ExportFailed: a standard operator has changed since the version it is of, and cannot be converted.
    """
    for node in list(model.graph):
        if node.domain == NAMESPACE and node.op_type == OP:
            _put_back(model, node, parsed(node.attributes["text"].as_string()), path)
    domains = {node.domain for node in model.graph} | {function.domain for function in model.functions.values()}
    if NAMESPACE not in domains:
        model.opset_imports.pop(NAMESPACE, None)


def _put_back(model: ir.Model, placeholder: ir.Node, opaque: Opaque, path: str) -> None:
    proto = _at_version(onnx.ModelProto.FromString(opaque.model), model.opset_imports[""], opaque, path)
    inner = ir.from_proto(proto)
    taken = {value.name for value in _values(model.graph)}
    names = {node.name for node in model.graph}
    for value, outer in zip(inner.graph.inputs, placeholder.inputs, strict=True):
        assert outer is not None
        value.replace_all_uses_with(outer)
    for name, value in list(inner.graph.initializers.items()):
        del inner.graph.initializers[name]
        value.name = _free(name, taken)
        model.graph.register_initializer(value)
    results = list(inner.graph.outputs)
    inner.graph.outputs.clear()
    nodes = list(inner.graph)
    inner.graph.remove(nodes)
    for value in (one for node in nodes for one in node.outputs if one.name):
        value.name = _free(str(value.name), taken)
    for node in (one for one in nodes if one.name):
        node.name = _free(str(node.name), names)
    model.graph.insert_before(placeholder, nodes)
    for old, new in zip(placeholder.outputs, results, strict=True):
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(placeholder)
    for domain, version in inner.opset_imports.items():
        if domain not in STANDARD:
            model.opset_imports[domain] = version


def _at_version(proto: onnx.ModelProto, version: int, opaque: Opaque, path: str) -> onnx.ModelProto:
    """The node in the model's version of the standard operators: itself, if it is the same there."""
    node, own = proto.graph.node[0], _standard(proto)
    if node.domain not in STANDARD:
        return proto
    since = {onnx.defs.get_schema(node.op_type, one).since_version for one in (own, version)}
    if len(since) == 1:
        return proto
    try:
        return version_converter.convert_version(proto, version)
    except Exception as error:
        reason = (
            f"node {opaque.node} ({opaque.op}) is of version {own} of the standard operators, and is not in {version}"
        )
        hint = f"convert the file first: onnx.version_converter.convert_version(model, {version})."
        raise ExportFailed(path=path, kind="ONNX", reason=reason, hint=hint) from error


def _free(name: str, taken: set[str | None]) -> str:
    """The name, or one like it that is not taken; it is from now on."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
