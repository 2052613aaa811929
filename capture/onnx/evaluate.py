"""Evaluating the nodes of an ONNX graph one after the other in torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from ...errors import TamisError
from ...onnx_errors import NodeFailed, UnknownOps, ValueUnknown
from ...opaque import listed
from . import table
from .arithmetic import FUNCTIONS
from .carried import Carried, why_not
from .known import Known, foldable, known, small
from .nodes import all_nodes, domain_of, inner_graphs, needed_nodes, op_of, told, version_of
from .reader import OnnxFile
from .table import Entry, NotKnown, Unsupported, Value
from .tensors import as_torch

log = logging.getLogger("tamis")
OF_A_NODE = (  # what functions raise where a node is wrong; sizes may ask for more memory than there is
    *(Unsupported, TypeError, ValueError, LookupError, AssertionError, ArithmeticError, AttributeError),
    *(MemoryError, NotImplementedError),
)
Values = dict[ir.Value, Value]
KEPT = {"QuantizeLinear", "DequantizeLinear", "If", "Loop", "Scan"}  # never computed ahead


class Evaluator:
    """Evaluates nodes of one file.

    constants  values known before any input is: numbers and short lists of the file, and what follows from them
    weights    tensors of the file; small ones are constants too, and weights where a node takes them as tensors
    """

    def __init__(self, file: OnnxFile, fixed: Mapping[str, Tensor] | None = None, *, carry: bool = True) -> None:
        """Prepare.

        Args:
            file: what was read.
            fixed: inputs that are constants, by name.
            carry: whether ONNX Runtime may evaluate what the table lacks.

        Raises:
            UnknownOps: lists every operation that the table lacks and that cannot be carried through.
        """
        self.carry = carry
        self.path = file.path
        self.folder = Path(file.path).parent
        self.graph = file.graph
        self.nodes = needed_nodes(file.graph)
        self.entries = self._find(file.graph)
        self.frames = {node: _frame(file.path, node, i) for i, node in enumerate(all_nodes(file.graph), 1)}
        self.numbers = {value for node in self.entries for value in _numbers_of(node, file.graph)}
        self.constants: dict[ir.Value, Value] = {}
        self.weights: dict[ir.Value, Tensor] = {}
        for value, weight in file.weights.items():
            self._enter(value, weight)
        for value in file.graph.inputs:
            if fixed and (name := str(value.name)) in fixed:
                self.constants[value] = known(fixed[name])
        self.tensors: dict[int, Value] = {}  # by identity: attributes have no hash
        for node in all_nodes(self.nodes):
            self._read_tensors(node)
        self._fold()

    def _enter(self, value: ir.Value, weight: Tensor) -> None:
        number = small(weight)
        if number is None and value in self.numbers and foldable(weight):
            number = known(weight)
        if number is not None:
            self.constants[value] = number
        self.weights[value] = weight

    def used_weights(self) -> set[ir.Value]:
        """Weights that nodes take as tensors, or that are results."""
        used = {value for value in self.graph.outputs if value not in self.constants}
        for node in all_nodes(self.nodes):
            if not self._is_known(node):
                used |= {value for i, value in enumerate(node.inputs) if value and self._as_tensor(node, i, value)}
                used |= {value for one in inner_graphs(node) for value in one.outputs if value not in self.constants}
        return used & self.weights.keys()

    def _as_tensor(self, node: ir.Node, place: int, value: ir.Value) -> bool:
        """Whether a node's input is a tensor of the file that stays one."""
        return value in self.weights and (value not in self.constants or self.entries[node].by_tensor(place))

    def _read_tensors(self, node: ir.Node) -> None:
        """Tensors among a node's attributes; those of constants are weights."""
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                weight = as_torch(attribute.as_tensor(), self.folder)
                number = small(weight)
                self.tensors[id(attribute)] = weight if number is None else number
                if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                    self._enter(node.outputs[0], weight)

    def _find(self, graph: ir.Graph) -> dict[ir.Node, Entry | Carried]:
        found: dict[ir.Node, Entry | Carried] = {}
        missing: list[tuple[str, str]] = []
        for node in all_nodes(self.nodes):
            version = version_of(node, graph)
            entry = table.find(node.domain, node.op_type, version) or self._carried(node)
            if isinstance(entry, str):
                said = [f"version {version}", entry] if not domain_of(node) else [entry]
                missing.append((f"{op_of(node)} ({', '.join(said)})", told(node)))
            else:
                found[node] = entry
        if missing:
            raise UnknownOps(path=self.path, count=len({op for op, _ in missing}), ops=listed(missing))
        if carried := [(op_of(node), told(node)) for node, entry in found.items() if isinstance(entry, Carried)]:
            log.warning("%s: left to ONNX Runtime, on the CPU: %s", self.path, listed(carried))
        return found

    def _carried(self, node: ir.Node) -> Carried | str:
        """The node for ONNX Runtime to evaluate, or why it cannot be."""
        version = version_of(node, self.graph)
        if not self.carry:
            return "ONNX Runtime is not asked"
        imports = {"" if domain == "ai.onnx" else domain: one for domain, one in self.graph.opset_imports.items()}
        needed = {domain: one for domain, one in imports.items() if domain in ("", node.domain)}
        return why_not(node, version) or Carried(node, {**needed, domain_of(node): version}, self.folder)

    def _fold(self) -> None:
        """Evaluate what follows from constants alone, as far as the results are small."""
        for node in self.nodes:
            inputs = [value for value in node.inputs if value is not None]
            carried = isinstance(self.entries[node], Carried)
            ready = all(value in self.constants or (carried and value in self.weights) for value in inputs)
            if not ready or node.op_type in KEPT or node.outputs[0] in self.weights:
                continue
            values: Values = {}
            with torch.no_grad():
                self.evaluate(node, values)
            for output, result in values.items():
                if carried and isinstance(result, Tensor):
                    self._enter(output, result)
                elif isinstance(result, Known):
                    self.constants[output] = result
                elif isinstance(result, Tensor) and foldable(result):
                    self.constants[output] = known(result)

    def run(self, nodes: Iterable[ir.Node], values: Values) -> None:
        """Evaluate nodes in order; their results are added to `values`."""
        for node in nodes:
            if not self._is_known(node):
                self.evaluate(node, values)

    def _is_known(self, node: ir.Node) -> bool:
        """Whether all its results were known before any input is."""
        return all(one in self.constants or one in self.weights for one in node.outputs if one.name)

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
            if isinstance(error, OF_A_NODE) or type(error) is RuntimeError:
                raise NodeFailed(path=self.path, node=told(node), op=node.op_type, reason=_reason(error)) from error
            raise  # what export says of sizes and data-dependence is read further up
        values.update(zip(node.outputs, results, strict=False))

    def _results(self, node: ir.Node, inputs: list[Value], attributes: dict[str, Any]) -> tuple[Value, ...]:
        numbers = self._by_arithmetic(node, inputs, attributes)
        if numbers is not None:
            return numbers
        for place, value in enumerate(node.inputs):
            if isinstance(inputs[place], Known) and value is not None and self._as_tensor(node, place, value):
                inputs[place] = self.weight(value)
        try:
            result = self.frames[node](self.entries[node].call, inputs, attributes, len(node.outputs))
        except Unsupported as lacking:
            result = self._instead(node, inputs, lacking)
        return result if isinstance(result, tuple) else (result,)

    def _instead(self, node: ir.Node, inputs: list[Value], lacking: Unsupported) -> Any:
        """What ONNX Runtime makes of a node that asks its function for too much; raises `lacking` if it cannot."""
        carried = self._carried(node)
        if isinstance(self.entries[node], Carried) or isinstance(carried, str):
            raise lacking
        try:
            result = self.frames[node](carried.call, inputs, {}, len(node.outputs))
        except Unsupported:
            raise lacking from None
        log.warning("%s: %s at %s is left to ONNX Runtime: %s", self.path, op_of(node), told(node), lacking)
        return result

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
        """What a value of the graph is now: computed, constant or a weight.

        Raises:
            NodeFailed: its node has more outputs than its function makes.
        """
        if value in values:
            return values[value]
        if value in self.constants:
            return self.constants[value]
        if value not in self.weights:
            node = value.producer()
            assert node is not None  # `check_graph` saw to it that every value is made
            reason = f"its output {value.name!r} is one that {op_of(node)} does not make"
            raise NodeFailed(path=self.path, node=told(node), op=node.op_type, reason=reason)
        return self.weight(value)

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
    pending = [value for node in all_nodes(needed_nodes(file.graph)) for value in _numbers_of(node, file.graph)]
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
            pending.extend(one for node in all_nodes([maker]) for one in node.inputs if one is not None)
    return found


def _numbers_of(node: ir.Node, graph: ir.Graph) -> list[ir.Value]:
    entry = table.find(node.domain, node.op_type, version_of(node, graph))
    places = [] if entry is None else [i for i in range(len(node.inputs)) if entry.by_value(i)]
    return [value for i in places if (value := node.inputs[i]) is not None]


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


def _reason(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (text or type(error).__name__).rstrip(".")
