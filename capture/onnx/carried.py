"""Nodes that the table has no function for, carried through the graph as they are and evaluated by ONNX Runtime."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from ...kernels.onnx_node import why
from ...opaque import Opaque
from ..nodes import expression
from .known import NUMPY, Known
from .nodes import domain_of, op_of, told
from .runs import runner
from .table import Unsupported, Value, tensor
from .tensors import DTYPES, as_torch, from_numpy
from .trials import Given, Run, results_of, steady

IR_VERSION = 10
ELEMENTS = {dtype: number for number, dtype in DTYPES.items()}


def why_not(node: ir.Node, version: int) -> str:
    """Why a node cannot be carried through; "" if it can, as far as can be told before it is run."""
    if any(one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for one in node.attributes.values()):
        return "it holds a graph"
    try:
        kernels = _kernels()
    except ImportError:
        return "ONNX Runtime is not installed: pip install tamis[cpu]"
    domain = domain_of(node)
    if kernels is None or any(low <= version <= high for low, high in kernels.get((domain, node.op_type), ())):
        return ""
    if not domain and onnx.defs.has(node.op_type, version):
        schema = onnx.defs.get_schema(node.op_type, version)
        if any(getattr(schema, how) for how in ("has_function", "has_context_dependent_function")):
            return ""
    return "no kernel"


@functools.cache
def _kernels() -> dict[tuple[str, str], list[tuple[int, int]]] | None:
    """Versions that ONNX Runtime has on the CPU, by domain and operator; None where it does not say."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if not hasattr(state, "get_all_opkernel_def"):
        return None
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for one in state.get_all_opkernel_def():
        if one.provider == "CPUExecutionProvider":
            found.setdefault((one.domain, one.op_name), []).append(one.version_range)
    return found


class Carried:
    """A node in the place of an entry of the table."""

    def __init__(self, node: ir.Node, opsets: dict[str, int], folder: Path) -> None:
        """Prepare.

        Args:
            node: of the file; functions of the file's own are no such nodes.
            opsets: versions of the node's domain and of the standard one.
            folder: where the file lies.
        """
        self.node, self.opsets, self.folder = node, opsets, folder
        self.known: dict[Any, str] = {}

    def by_tensor(self, place: int) -> bool:
        """Whether a small constant is to be a tensor of the graph: it goes with the node."""
        return False

    def call(self, inputs: list[Value], attributes: dict[str, Any], outputs: int) -> tuple[Value, ...]:
        """What the node answers: computed, or an operation of the graph that is being traced.

        Raises:
            Unsupported: it takes or gives something else than tensors of torch's types, ONNX Runtime refuses it, or it
                draws random numbers.
        """
        named = {str(value.name): one for value, one in zip(self.node.inputs, inputs, strict=True) if value is not None}
        constants = {name: one for name, one in named.items() if isinstance(one, Known) and not one.is_symbolic}
        given = {name: one for name, one in named.items() if name not in constants}
        tensors = [_readable(tensor(one)) for one in given.values()]
        model = self._model(dict(zip(given, tensors, strict=True)), constants)
        results = self._answered(model, list(given.values()), tensors)
        places = iter(results)
        return tuple(next(places) if value.name else None for value in self.node.outputs)

    def _answered(self, model: bytes, given: list[Value], tensors: list[Tensor]) -> list[Tensor]:
        run = functools.partial(runner(), model)
        if torch.compiler.is_compiling() and tensors:
            return self._traced(model, run, given, tensors)
        try:
            return [from_numpy(one) for one in steady(run, [one.detach().cpu().numpy() for one in tensors])]
        except RuntimeError as error:
            raise Unsupported(f"ONNX Runtime says: {why(error)}") from error

    def _traced(self, model: bytes, run: Run, given: list[Value], tensors: list[Tensor]) -> list[Tensor]:
        seen = [_seen(*pair) for pair in zip(given, tensors, strict=True)]
        key = (model, *((str(one.dtype), str(one.shape), str(one.numbers)) for one in seen))
        if key not in self.known:
            self.known[key] = Opaque(op_of(self.node), told(self.node), model, results_of(run, seen)).text
        return torch.ops.tamis.onnx_node(tensors, self.known[key])

    def _model(self, tensors: dict[str, Tensor], constants: dict[str, Known]) -> bytes:
        """The node alone, serialised."""
        node = ir.serde.serialize_node(self.node)
        for attribute in node.attribute:
            if attribute.t.data_location == onnx.TensorProto.EXTERNAL:
                value = as_torch(self.node.attributes[attribute.name].as_tensor(), self.folder)
                attribute.t.CopyFrom(numpy_helper.from_array(value.numpy(), attribute.t.name))
        graph = helper.make_graph(
            [node],
            "node",
            [helper.make_tensor_value_info(n, ELEMENTS[x.dtype], [None] * x.dim()) for n, x in tensors.items()],
            [onnx.ValueInfoProto(name=name) for name in node.output if name],
            [numpy_helper.from_array(one.data, name) for name, one in constants.items()],
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in sorted(self.opsets.items())]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        return model.SerializeToString(deterministic=True)


def _readable(value: Tensor) -> Tensor:
    if value.dtype not in NUMPY or value.dtype == torch.bfloat16:
        raise Unsupported(f"ONNX Runtime takes no {str(value.dtype).removeprefix('torch.')} from Python")
    return value


def _seen(given: Value, value: Tensor) -> Given:
    """A tensor as trials see it."""
    numbers = tuple(expression(one) for one in given.numbers()) if isinstance(given, Known) else None
    hints = tuple(one.node.hint if isinstance(one, torch.SymInt) else one for one in value.shape)
    return Given(NUMPY[value.dtype], tuple(map(expression, value.shape)), numbers, hints)
