"""Runs one `OnnxCall` in ONNX Runtime: a model of that one node, all dimensions dynamic."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from tamis.op import CONTRIB, NAMESPACE

ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int16: TensorProto.INT16,
    torch.uint16: TensorProto.UINT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


def run_call(call: Any, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of the call on the tensors, counts and lists among its inputs; `like` gives their types and ranks."""
    feeds = {f"in{i}": _tensor(value) for i, value in enumerate(call.inputs) if value is not None}
    model = _model(call, feeds, {f"out{i}": value for i, value in enumerate(like)})
    session = onnxruntime.InferenceSession(model.SerializeToString(), _options(), providers=["CPUExecutionProvider"])
    results = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    return [torch.as_tensor(result) for result in results]


def _model(call: Any, feeds: dict[str, torch.Tensor], results: dict[str, torch.Tensor]) -> onnx.ModelProto:
    functions = [] if isinstance(call.function, str) else _functions(call.function)
    given = ["" if value is None else f"in{i}" for i, value in enumerate(call.inputs)]
    node = helper.make_node(call.name, given, list(results), domain=call.domain, **call.attributes)
    graph = helper.make_graph([node], "call", *([_info(*item) for item in some.items()] for some in (feeds, results)))
    model = helper.make_model(
        graph,
        opset_imports=[
            helper.make_opsetid("", call.since),
            *(helper.make_opsetid(one, 1) for one in (NAMESPACE, CONTRIB)),
        ],
        functions=functions,
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _functions(function: Any) -> list[onnx.FunctionProto]:
    called = function.function_ir.get_called_functions().values()
    return [*(one.to_function_proto() for one in called), function.to_function_proto()]


def _info(name: str, value: torch.Tensor) -> onnx.ValueInfoProto:
    dimensions = [f"{name}_{axis}" for axis in range(value.dim())]
    return helper.make_tensor_value_info(name, ELEMENTS[value.dtype], dimensions)


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.int64)


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options
