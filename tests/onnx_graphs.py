"""Small ONNX graphs in the writing, captured and held against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.export import ExportedProgram

from tamis.capture.dims import Axes
from tamis.capture.export import export_module
from tamis.capture.onnx.module import OnnxModule
from tamis.capture.onnx.reader import OnnxFile, from_proto

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Node = onnx.NodeProto


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Node:
    """A node; "_" is an input left out."""
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), **attributes)


def model(
    nodes: Sequence[Node],
    shape: Sequence[int | str] = (2, 3, 4),
    opset: int = 18,
    **constants: Any,
) -> onnx.ModelProto:
    """x of a shape -> y, with int64 or float32 constants."""
    tensors = [
        numpy_helper.from_array(np.array(v, np.int64 if np.array(v).dtype.kind == "i" else np.float32), k)
        for k, v in constants.items()
    ]
    x = helper.make_tensor_value_info("x", FLOAT, shape)
    graph = helper.make_graph(list(nodes), "g", [x], [onnx.ValueInfoProto(name="y")], initializer=tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    inferred = onnx.shape_inference.infer_shapes(made)
    types = {v.name: v for v in inferred.graph.output}
    made.graph.output[0].CopyFrom(types["y"])
    return made


def read(content: onnx.ModelProto) -> OnnxFile:
    copy = onnx.ModelProto()
    copy.CopyFrom(content)
    return from_proto(copy, "m.onnx", Path())


def run_reference(content: onnx.ModelProto, x: torch.Tensor) -> Any:
    session = onnxruntime.InferenceSession(content.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def captured(content: onnx.ModelProto, x: torch.Tensor, dynamic: bool = False) -> ExportedProgram:
    shapes = Axes(({0: "batch", 1: "length"} if dynamic else {},))
    return export_module(OnnxModule(read(content)), (x,), dynamic_shapes=shapes)


def ops(program: ExportedProgram) -> list[str]:
    """Names of the operations in the graph, without those that read sizes or assert types."""
    targets = [getattr(n.target, "__name__", str(n.target)) for n in program.graph.nodes if n.op == "call_function"]
    return [name.split(".")[0] for name in targets if not name.startswith(("sym_size", "_assert"))]


def agree(content: onnx.ModelProto, *xs: torch.Tensor) -> ExportedProgram:
    """The program of a model, captured at the first input, which agrees with ONNX Runtime on all of them."""
    dynamic = len(xs) > 1
    program = captured(content, xs[0], dynamic)
    for x in xs:
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), run_reference(content, x), rtol=1e-5, atol=1e-6)
    return program
