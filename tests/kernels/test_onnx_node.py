"""A node of an ONNX file as an op: what it computes, its shapes in a trace, and what it refuses."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.library import opcheck

import tamis.kernels  # noqa: F401
from tamis.onnx_errors import OpaqueFailed
from tamis.opaque import Opaque, Result, Size, listed

STEP = Size(0, 1, 2, times=1, plus=-1, over=2)  # windows of 3 that start at every second place


def model(node: onnx.NodeProto, ranks: dict[str, int], **constants: Any) -> bytes:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in ranks.items()]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "node", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def windows(sizes: tuple[Any, ...] = (Size(0, 0, 1), STEP, 4, 3)) -> Opaque:
    node = helper.make_node("UnfoldTensor", ["x"], ["y"], domain="com.microsoft", dim=1, size=3, step=2)
    return Opaque("com.microsoft.UnfoldTensor", "windows", model(node, {"x": 3}), (Result("float32", sizes),))


def unique() -> Opaque:
    node = helper.make_node("Unique", ["x"], ["values", "", "", "counts"])
    made = helper.make_node("Unique", ["x"], ["values", "counts"])
    results = (Result("float32", ("u0",)), Result("int64", ("u0",)))
    content = onnx.ModelProto.FromString(model(made, {"x": 2}))
    content.graph.node[0].CopyFrom(node)
    return Opaque("Unique", "different", content.SerializeToString(), results)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_it_computes_what_the_node_says() -> None:
    for batch, length in ((1, 3), (2, 7), (3, 8)):
        x = draw(batch, length, 4)
        (y,) = torch.ops.tamis.onnx_node([x], windows().text)
        assert torch.equal(y, x.unfold(1, 3, 2))


def test_the_op_is_a_good_citizen() -> None:
    opcheck(torch.ops.tamis.onnx_node.default, ([draw(2, 7, 4)], windows().text))


def test_sizes_are_symbols_in_a_trace() -> None:
    class Windows(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.tamis.onnx_node([x], windows().text)[0]

    shapes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("n", min=5)},)
    program = torch.export.export(Windows(), (draw(2, 7, 4),), dynamic_shapes=shapes)
    node = next(n for n in program.graph.nodes if "onnx_node" in str(n.target))
    batch, steps, *rest = node.meta["val"][0].shape
    assert [type(one) for one in (batch, steps, *rest)] == [torch.SymInt, torch.SymInt, int, int]
    x = draw(3, 10, 4)
    assert torch.equal(program.module()(x), x.unfold(1, 3, 2))


def test_a_size_that_depends_on_data_is_a_new_symbol() -> None:
    class Different(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values, counts = torch.ops.tamis.onnx_node([x], unique().text)
            return values * counts

    program = torch.export.export(Different(), (draw(2, 3),))
    x = torch.tensor([[1.0, 2.0, 1.0], [3.0, 3.0, 3.0]])
    values, counts = torch.unique(x, return_counts=True)
    assert torch.equal(program.module()(x), values * counts)


def test_other_sizes_than_the_graph_was_made_for_are_an_error() -> None:
    odd = windows((Size(0, 0, 1), Size(0, 1, 2), 4, 3))
    with pytest.raises(OpaqueFailed) as caught:
        torch.ops.tamis.onnx_node([draw(2, 7, 4)], odd.text)
    assert str(caught.value).startswith(
        "node windows (com.microsoft.UnfoldTensor) of an ONNX file, which ONNX Runtime evaluates, failed: its output 0 "
        "is float32[2, 3, 4, 3] where float32[2, 7, 4, 3] follows from its inputs [[2, 7, 4]].\n  hint: "
    )


def test_what_onnx_runtime_refuses_is_an_error_of_ours() -> None:
    with pytest.raises(OpaqueFailed, match=r"node windows .* failed: .*rank"):
        torch.ops.tamis.onnx_node([draw(2, 7)], windows().text)


def test_no_file_is_read() -> None:
    content = onnx.ModelProto.FromString(windows().model)
    tensor = content.graph.initializer.add(name="t", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    odd = Opaque("Odd", "odd", content.SerializeToString(), windows().results)
    with pytest.raises(OpaqueFailed, match="its data lie in a file of their own"):
        torch.ops.tamis.onnx_node([draw(2, 7, 4)], odd.text)


@pytest.mark.parametrize("opaque", [windows(), unique()], ids=["windows", "unique"])
def test_its_text_holds_everything(opaque: Opaque) -> None:
    assert Opaque.from_text(opaque.text) == opaque


def test_nodes_are_listed_by_operator() -> None:
    nodes = [("Unique", "u"), ("own.Odd", "a"), *(("Unique", f"u{i}") for i in range(6))]
    assert listed(nodes) == "Unique at u, u0, u1, u2, u3 and 2 more; own.Odd at a"
