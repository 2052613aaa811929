"""`save_streamed`: a model and its weights as one ONNX file, without a copy of the weights in memory.

The message is made without them, and their bytes are copied to the file where they belong.  Protobuf's own writer takes
three times their size.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from ..capture.onnx.wire import GRAPH, INITIALIZER, LARGE, RAW_DATA, header


def save_streamed(model: ir.Model, file: Path) -> None:
    """Write the model, whose weights take less than 2 GB, into one file.  Raises OSError."""
    large = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > LARGE
    }
    proto = _without(model, large)
    heads = []
    for tensor in proto.graph.initializer:
        if tensor.name in large:
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
        heads.append((tensor.SerializeToString(), large.get(tensor.name)))
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    parts = [part for head, tensor in heads for part in _field(head, tensor)]
    length = len(graph) + sum(_size(part) for part in parts)
    with file.open("wb") as stream:
        for part in (proto.SerializeToString(), header(GRAPH, length), graph, *parts):
            start = stream.tell()
            if isinstance(part, bytes):
                stream.write(part)
            else:
                part.tofile(stream)
            assert stream.tell() - start == _size(part)


def _without(model: ir.Model, large: dict[str, ir.TensorProtocol]) -> onnx.ModelProto:
    """The model with these initializers as external tensors, which carry no bytes."""
    initializers = model.graph.initializers
    for name, tensor in large.items():
        initializers[name].const_value = ir.ExternalTensor(
            "-", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    try:
        return ir.to_proto(model)
    finally:
        for name, tensor in large.items():
            initializers[name].const_value = tensor


def _field(head: bytes, tensor: ir.TensorProtocol | None) -> list[bytes | ir.TensorProtocol]:
    """An initializer of the graph: `head` is its message, without its bytes where `tensor` has them."""
    if tensor is None:
        return [header(INITIALIZER, len(head)), head]
    raw = header(RAW_DATA, tensor.nbytes)
    return [header(INITIALIZER, len(head) + len(raw) + tensor.nbytes), head, raw, tensor]


def _size(part: bytes | ir.TensorProtocol) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes
