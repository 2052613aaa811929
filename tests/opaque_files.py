"""ONNX files with operators that tamis has no function for and onnx no shape inference, spliced in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MS = "com.microsoft"


def unknown(op: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> onnx.NodeProto:
    """A node of ONNX Runtime's own domain."""
    return helper.make_node(op, inputs, outputs, name=name, domain=MS, **attributes)


def behind(model: onnx.ModelProto, value: str, make: Callable[[str, str], onnx.NodeProto]) -> None:
    """Put the node `make(input, output)` behind a value, whose readers read its output from then on."""
    after = f"{value}_after"
    for node in model.graph.node:
        node.input[:] = [after if one == value else one for one in node.input]
    places = [i for i, node in enumerate(model.graph.node) if value in node.output]
    model.graph.node.insert(places[0] + 1 if places else 0, make(value, after))


def output_of(model: onnx.ModelProto, node: onnx.NodeProto, rank: int, element: int = TensorProto.FLOAT) -> None:
    """Add a node at the end whose first result is an output."""
    model.graph.node.append(node)
    shape = [f"{node.output[0]}_{axis}" for axis in range(rank)]
    model.graph.output.append(helper.make_tensor_value_info(node.output[0], element, shape))


def weight(model: onnx.ModelProto, name: str, value: np.ndarray[Any, Any]) -> None:
    """Add an initializer."""
    model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))


def saved(model: onnx.ModelProto, path: Path) -> Path:
    """Write the model, which imports ONNX Runtime's domain."""
    if MS not in {one.domain for one in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(MS, 1))
    onnx.save(model, path)
    return path
