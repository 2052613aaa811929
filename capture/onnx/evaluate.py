"""Evaluating the nodes of an ONNX graph one after the other in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from ...errors import TamisError
from ...onnx_errors import NodeFailed, UnknownOps, ValueUnknown
from . import table
from .arithmetic import FUNCTIONS
from .known import Known, foldable, known, small
from .reader import OnnxFile
from .table import Entry, NotKnown, Unsupported, Value
from .tensors import as_torch

Values = dict[ir.Value, Value]
KEPT = {"QuantizeLinear", "DequantizeLinear", "If", "Loop", "Scan"}  # never computed ahead


class Evaluator:
    """Evaluates nodes of one file.

    constants  values known before any input is: numbers and short lists of the file, and what follows from them
    """

    def __init__(self, file: OnnxFile, fixed: Mapping[str, Tensor] | None = None) -> None:
        """Prepare.

        Args:
            file: what was read.
            fixed: inputs that are constants, by name.

        Raises:
            UnknownOps: lists every operation that the table lacks.
        """
        self.path = file.path
        self.folder = Path(file.path).parent
        self.graph = file.graph
        self.nodes = _needed(file.graph)
        self.entries = self._find(file.graph)
        self.frames = {node: _frame(file.path, node, i) for i, node in enumerate(_all_nodes(file.graph), 1)}
        self.constants: dict[ir.Value, Value] = {}
        self.weights: dict[ir.Value, Tensor] = {}
        for value, weight in file.weights.items():
            self._enter(value, weight)
        for value in file.graph.inputs:
            if fixed and (name := str(value.name)) in fixed:
                self.constants[value] = known(fixed[name])
        self.numbers = {value for node in self.entries for value in _numbers_of(node, file.graph)}
        self.tensors: dict[int, Value] = {}  # by identity: attributes have no hash
        for node in _all_nodes(self.nodes):
            self._read_tensors(node)
        self._fold()

    def _enter(self, value: ir.Value, weight: Tensor) -> None:
        number = small(weight)
        if number is not None:
            self.constants[value] = number
        else:
            self.weights[value] = weight

    def _read_tensors(self, node: ir.Node) -> None:
        """Tensors among a node's attributes; those of constants are weights."""
        if number is None and value in self.numbers and foldable(weight):
            number = known(weight)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                weight = as_torch(attribute.as_tensor(), self.folder)
                number = small(weight)
                self.tensors[id(attribute)] = weight if number is None else number
                if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                    self._enter(node.outputs[0], weight)

    def _find(self, graph: ir.Graph) -> dict[ir.Node, Entry]:
        found: dict[ir.Node, Entry] = {}
        missing: dict[str, list[str]] = {}
        for node in _all_nodes(self.nodes):
            version = _version(node, graph)
            entry = table.find(node.domain, node.op_type, version)
            if entry is None:
                name = f"{node.domain}.{node.op_type}" if node.domain else f"{node.op_type} (version {version})"
                missing.setdefault(name, []).append(told(node))
            else:
                found[node] = entry
        if missing:
            ops = "; ".join(f"{name} at {_some(nodes)}" for name, nodes in sorted(missing.items()))
            raise UnknownOps(path=self.path, count=len(missing), ops=ops)
        return found

    def _fold(self) -> None:
        """Evaluate what follows from constants alone, as far as the results are small."""
        for node in self.nodes:
            inputs = [value for value in node.inputs if value is not None]
            ready = all(value in self.constants for value in inputs)
            if not ready or node.op_type in KEPT or node.outputs[0] in self.weights:
                continue
            values: Values = {}
            with torch.no_grad():
                self.evaluate(node, values)
            for output, result in values.items():
                if isinstance(result, Known):
                    self.constants[output] = result
                elif isinstance(result, Tensor) and foldable(result):
                    self.constants[output] = known(result)

    def run(self, nodes: Iterable[ir.Node], values: Values) -> None:
        """Evaluate nodes in order; their results are added to `values`."""
        for node in nodes:
            if not all(output in self.constants or output in self.weights for output in node.outputs):
                self.evaluate(node, values)

    def evaluate(self, node: ir.Node, values: Values) -> None:
        """Evaluate one node.

        Raises:
            ValueUnknown: it needs a number that depends on data.
            NodeFailed: it fails, or asks for what its function does not do.
        """
        inputs = [None if value is None else self.value(value, values) for value in node.inputs]
        attributes = {name: self._attribute(one, values) for name, one in node.attributes.items()}
        try:
            results = self._results(node, inputs, attributes)
        except TamisError:
            raise
        except NotKnown as error:
            raise ValueUnknown(path=self.path, node=told(node), op=node.op_type, what=error) from error
        except Exception as error:
            if isinstance(error, Unsupported | TypeError | ValueError | IndexError | KeyError | AssertionError) or (
                type(error) is RuntimeError
            ):
                raise NodeFailed(path=self.path, node=told(node), op=node.op_type, reason=_reason(error)) from error
            raise  # what export says of sizes and data-dependence is read further up
        values.update(zip(node.outputs, results, strict=False))

    def _results(self, node: ir.Node, inputs: list[Value], attributes: dict[str, Any]) -> tuple[Value, ...]:
        numbers = self._by_arithmetic(node, inputs, attributes)
        if numbers is not None:
            return numbers
        result = self.frames[node](self.entries[node].call, inputs, attributes, len(node.outputs))
        return result if isinstance(result, tuple) else (result,)

    def _by_arithmetic(
        self, node: ir.Node, inputs: list[Value], attributes: dict[str, Any]
    ) -> tuple[Value, ...] | None:
        """The results as known values, where all inputs are known."""
        function = FUNCTIONS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if function is None or not inputs or not all(one is None or isinstance(one, Known) for one in inputs):
            return None
        extra = {"outputs": len(node.outputs)} if node.op_type == "Split" else {}
        result = function(*(one if one is None else one.data for one in inputs), **attributes, **extra)
        if result is None:
            return None
        like = inputs[-1] if node.op_type == "Where" else inputs[0]  # whose type the result has
        several = result if isinstance(result, tuple) else (result,)
        return tuple(one if isinstance(one, Known) else Known.of(one, like.dtype) for one in several)

    def value(self, value: ir.Value, values: Values) -> Value:
        """What a value of the graph is now: computed, constant or a weight."""
        if value in values:
            return values[value]
        return self.constants[value] if value in self.constants else self.weight(value)

    def weight(self, value: ir.Value) -> Tensor:
        """A tensor of the file."""
        return self.weights[value]

    def _attribute(self, attribute: ir.Attr, values: Values) -> Any:
        match attribute.type:
            case ir.AttributeType.TENSOR:
                return self.tensors[id(attribute)]
            case ir.AttributeType.GRAPH:
                return self._body(attribute.as_graph(), values)
            case ir.AttributeType.INTS | ir.AttributeType.FLOATS | ir.AttributeType.STRINGS:
                return list(attribute.value)
        return attribute.value

    def _body(self, graph: ir.Graph, values: Values) -> Callable[..., list[Value]]:
        def call(*inputs: Value) -> list[Value]:
            values.update(zip(graph.inputs, inputs, strict=True))
            self.run(graph, values)
            return [self.value(output, values) for output in graph.outputs]

        return call


def read_by_value(file: OnnxFile) -> set[str]:
    """Names of inputs whose values, not only their sizes, decide a size or a condition."""
    pending = [value for node in _all_nodes(_needed(file.graph)) for value in _numbers_of(node, file.graph)]
    found, seen = set(), set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_input() and value in file.inputs:
            found.add(str(value.name))
        maker = value.producer()
        if maker is not None and maker.op_type not in ("Shape", "Size", "SequenceLength"):
            pending.extend(one for node in _all_nodes([maker]) for one in node.inputs if one is not None)
    return found


def _numbers_of(node: ir.Node, graph: ir.Graph) -> list[ir.Value]:
    entry = table.find(node.domain, node.op_type, _version(node, graph))
    places = [] if entry is None else [i for i in range(len(node.inputs)) if entry.by_value(i)]
    return [value for i in places if (value := node.inputs[i]) is not None]


def _version(node: ir.Node, graph: ir.Graph) -> int:
    """The version of a node's domain that it is of."""
    imports = graph.opset_imports
    standard = node.domain in ("", "ai.onnx")
    return node.version or (imports.get("") or imports.get("ai.onnx") if standard else imports.get(node.domain)) or 1


def told(node: ir.Node) -> str:
    """A node's name, or that of its first output."""
    return node.name or (node.outputs[0].name if node.outputs else None) or "without a name"


def _frame(path: str, node: ir.Node, number: int) -> Callable[..., Any]:
    """A function that calls another one, and in stack traces is the line `number` of the node.

    Export keeps for every operation the `forward` calls it was made in; what is said of one later names the file, the
    node and its number this way, as it names a line of a Python model.
    """

    def forward(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    name = told(node).replace(",", " ")
    code = forward.__code__.replace(co_filename=f"{path}: {name}", co_firstlineno=number)
    return FunctionType(code, {})


def _some(nodes: list[str]) -> str:
    return ", ".join(nodes[:5]) + (f" and {len(nodes) - 5} more" if len(nodes) > 5 else "")


def _needed(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that the outputs depend on, in order."""
    needed: set[ir.Node] = set()
    pending = [value.producer() for value in graph.outputs]
    while pending:
        node = pending.pop()
        if node is None or node in needed:
            continue
        needed.add(node)
        inner = [value for one in _all_nodes([node]) for value in one.inputs if value is not None]
        inner += [value for one in _inner_graphs(node) for value in one.outputs]
        pending.extend(value.producer() for value in inner)
    return [node for node in graph if node in needed]


def _inner_graphs(node: ir.Node) -> list[ir.Graph]:
    graphs = [one.as_graph() for one in node.attributes.values() if one.type == ir.AttributeType.GRAPH]
    return graphs + [inner for graph in graphs for one in graph for inner in _inner_graphs(one)]


def _all_nodes(nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """The nodes and those of the graphs inside them."""
    found = []
    for node in nodes:
        found.append(node)
        found.extend(one for graph in _inner_graphs(node) for one in graph)
    return found


def _reason(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (text or type(error).__name__).rstrip(".")
