"""Modules made of ONNX files: names, outputs, and what they say of nodes they cannot evaluate."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from onnx import helper
from onnx_graphs import FLOAT, Node, captured, model, node, numbers, read

from tamis.capture.dims import Axes
from tamis.capture.export import export_module
from tamis.capture.onnx.module import OnnxModule
from tamis.errors import TamisError
from tamis.onnx_errors import NodeFailed, UnknownOps


def test_names_that_python_does_not_have() -> None:
    content = model(
        [node("Add", "x a.b/c:0", "m"), node("Mul", "m training", "y")], **{"a.b/c:0": [1.0] * 4, "training": [2.0] * 4}
    )
    content.graph.input[0].name = "input.1"
    for one in content.graph.node:
        one.input[:] = ["input.1" if name == "x" else name for name in one.input]
    module = OnnxModule(read(content))
    assert module.input_names == ["input_1"]
    assert sorted(module.state_dict()) == ["a.b/c:0", "training_.weight"]
    x = numbers(2, 3, 4)
    program = export_module(module, (x,), dynamic_shapes=Axes(({},)))
    assert torch.equal(program.module()(x), (x + 1) * 2)


def test_several_outputs_come_by_name() -> None:
    content = model([node("Neg", "x", "y"), node("Abs", "x", "z")])
    content.graph.output.append(helper.make_tensor_value_info("z", FLOAT, [2, 3, 4]))
    x = numbers(2, 3, 4)
    result = OnnxModule(read(content))(x)
    assert list(result) == ["y", "z"]
    assert torch.equal(result["z"], x.abs())


def test_what_no_output_needs_is_not_looked_at() -> None:
    content = model([node("Strange", "x", "s"), node("Neg", "x", "y")])
    assert torch.equal(OnnxModule(read(content))(numbers(2, 3, 4)), -numbers(2, 3, 4))


def refused(nodes: list[Node], error: type[TamisError], **constants: Any) -> str:
    content = onnx.ModelProto()
    content.CopyFrom(model([node("Neg", "x", "y")], **constants))
    del content.graph.node[:]
    content.graph.node.extend(nodes)
    with pytest.raises(error) as caught:
        captured(content, numbers(2, 3, 4))
    assert type(caught.value) is error
    return str(caught.value).split("\n")[0]


def test_unknown_operations_are_all_listed() -> None:
    nodes = [
        helper.make_node("Strange", ["x"], ["a"], name="first", domain="own"),
        helper.make_node("Strange", ["a"], ["b"], domain="own"),
        node("Queer", "b", "c"),
        helper.make_node("RotaryEmbedding", ["c", "c", "c"], ["y"]),
    ]
    text = refused(nodes, UnknownOps)
    assert text == (
        "m.onnx: 3 operator(s) are not known to tamis, and ONNX Runtime cannot evaluate them: "
        "Queer (version 18, no kernel) at c; RotaryEmbedding (version 18, no kernel) at y; "
        "own.Strange (no kernel) at first, b."
    )


def test_what_a_function_does_not_do_is_said() -> None:
    text = refused([node("Neg", "x", "y", odd=1)], NodeFailed)
    assert text == "m.onnx: node y (Neg) cannot be evaluated: it has an attribute 'odd', which is not known."


def test_what_fails_names_the_node() -> None:
    text = refused([node("MatMul", "x x", "y")], NodeFailed)
    assert text.startswith("m.onnx: node y (MatMul) cannot be evaluated: ")
