"""One file, written without a copy of its weights: the same message that protobuf's own writer makes."""

from __future__ import annotations

import resource

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from tamis.capture.onnx.wire import LARGE
from tamis.lowering.onnx_stream import save_streamed


def model_with(tensors):
    values = [ir.Value(name=name, const_value=tensor, shape=tensor.shape) for name, tensor in tensors.items()]
    node = ir.node("Identity", [values[0]])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=10, metadata_props={"key": "value"})


def torch_tensor(tensor, name):
    from torch.onnx._internal.exporter import _core

    return _core.TorchTensor(tensor, name=name)


def tensors():
    """On both sides of the limit, of types that numpy has and has not, contiguous and not, lazy, and empty."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(LARGE // 4 + 3, 2, generator=generator)
    made = {
        "float": wide,
        "transposed": wide.T,
        "bfloat16": wide.bfloat16(),
        "half": wide.half(),
        "bool": wide > 0,
        "small": wide[:7],
        "empty": wide[:0],
        "parameter": torch.nn.Parameter(wide),
    }
    found = {name: torch_tensor(one, name) for name, one in made.items()}
    found["numpy"] = ir.tensor(np.arange(LARGE, dtype=np.int64), name="numpy")
    found["lazy"] = ir.LazyTensor(lambda: found["numpy"], ir.DataType.INT64, shape=ir.Shape([LARGE]), name="lazy")
    return found


def test_the_message_is_that_of_protobuf(tmp_path):
    model = model_with(tensors())
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    save_streamed(model, tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx") == ir.to_proto(model)
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before


def test_bytes_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        save_streamed(model_with(tensors()), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("megabytes", [400])
def test_weights_are_not_copied(tmp_path, megabytes):
    weight = torch.zeros(megabytes * 250_000)
    weight.fill_(1)  # its pages are there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_streamed(model_with({"w": torch_tensor(weight, "w")}), tmp_path / "m.onnx")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1000 / 4
