"""Models of one ONNX node, captured and held against ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.export import ExportedProgram

from tamis.capture.dims import Axes
from tamis.capture.export import export_module
from tamis.capture.onnx.module import OnnxModule
from tamis.capture.onnx.reader import from_proto

MS = "com.microsoft"
ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


@dataclass(frozen=True)
class Case:
    """One node.

    inputs     tensors in order; None where one is left out
    outputs    which results are asked for, by place
    constants  places of the inputs that are initializers
    floats     whether the results are declared to be floats, where ONNX Runtime cannot infer it
    """

    op: str
    inputs: Sequence[Tensor | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: Sequence[int] = (0,)
    constants: Collection[int] = ()
    floats: bool = False
    domain: str = MS

    def model(self) -> onnx.ModelProto:
        """The model of the node."""
        given = [(f"x{i}", x, i in self.constants) for i, x in enumerate(self.inputs) if x is not None]
        inputs = [helper.make_tensor_value_info(n, ELEMENTS[x.dtype], x.shape) for n, x, fixed in given if not fixed]
        weights = [numpy_helper.from_array(x.numpy(), n) for n, x, fixed in given if fixed]
        results = [f"y{i}" if i in self.outputs else "" for i in range(max(self.outputs) + 1)]
        names = ["" if x is None else f"x{i}" for i, x in enumerate(self.inputs)]
        node = helper.make_node(self.op, names, results, name="the_node", domain=self.domain, **self.attributes)
        outputs = [onnx.ValueInfoProto(name=name) for name in results if name]
        if self.floats:
            outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results if name]
        graph = helper.make_graph([node], "g", inputs, outputs, initializer=weights)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MS, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)

    def args(self) -> tuple[Tensor, ...]:
        """The inputs that are no constants."""
        return tuple(x for i, x in enumerate(self.inputs) if x is not None and i not in self.constants)

    def feeds(self) -> dict[str, np.ndarray[Any, Any]]:
        """The same by name for ONNX Runtime."""
        given = enumerate(self.inputs)
        return {f"x{i}": x.numpy() for i, x in given if x is not None and i not in self.constants}


def want(case: Case) -> list[np.ndarray[Any, Any]]:
    """What ONNX Runtime answers."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    content = case.model().SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, case.feeds())


def program_of(case: Case) -> ExportedProgram:
    """The captured node, which ONNX Runtime does not evaluate."""
    module = OnnxModule(from_proto(case.model(), "m.onnx", Path()))
    program = export_module(module, case.args(), dynamic_shapes=Axes(tuple({} for _ in case.args())))
    assert not any("onnx_node" in str(node.target) for node in program.graph.nodes)
    return program


def got(case: Case) -> list[np.ndarray[Any, Any]]:
    """What the captured node answers."""
    with torch.no_grad():
        result = program_of(case).module()(*case.args())
    return [one.numpy() for one in (result.values() if isinstance(result, dict) else [result])]
