"""Evaluating ONNX graphs: against ONNX Runtime, without a trace of what is known at capture."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_graphs import FLOAT, INT64, Node, agree, captured, model, node, numbers, ops

from tamis.onnx_errors import ValueUnknown

# --- what is known at capture leaves no trace -----------------------------------------------------------------------

HEADS = (  # [B, N, C] to [B, 2, N, C / 2], as the TorchScript exporter writes it
    node("Shape", "x", "shape"),
    node("Gather", "shape zero", "batch"),
    node("Gather", "shape one", "length"),
    node("Unsqueeze", "batch axis", "batch1"),
    node("Unsqueeze", "length axis", "length1"),
    node("Concat", "batch1 length1 two two", "sizes", axis=0),
    node("Reshape", "x sizes", "split"),
    node("Transpose", "split", "y", perm=[0, 2, 1, 3]),
)


def test_arithmetic_on_sizes_leaves_no_trace() -> None:
    content = model(HEADS, ["b", "n", 4], zero=0, one=1, axis=[0], two=[2])
    program = agree(content, numbers(2, 3, 4), numbers(5, 7, 4))
    assert ops(program) == ["reshape", "permute"]


def test_a_scale_from_the_head_size_is_a_number() -> None:
    scale = (
        node("Shape", "x", "shape"),
        node("Slice", "shape last end", "width"),
        node("Cast", "width", "float", to=FLOAT),
        node("Sqrt", "float", "root"),
        node("Div", "one root", "factor"),
        node("Mul", "x factor", "y"),
    )
    program = agree(model(scale, ["b", "n", 4], last=[-1], end=[2**62], one=[1.0]), numbers(2, 3, 4), numbers(4, 2, 4))
    assert ops(program) == ["mul"]
    assert next(n for n in program.graph.nodes if n.name == "mul").args[1] == 0.5


def test_broadcasting_by_sizes_that_are_compared() -> None:
    """`Where(shape == -1, ones, shape)`, which the TorchScript exporter writes for `expand`."""
    expand = (
        node("Shape", "x", "sizes"),
        node("ConstantOfShape", "three", "ones", value=helper.make_tensor("v", INT64, [1], [1])),
        node("Mul", "ones minus", "unknown"),
        node("Equal", "sizes unknown", "same"),
        node("Where", "same ones sizes", "target"),
        node("Expand", "row target", "spread"),
        node("Add", "x spread", "y"),
    )
    content = model(expand, ["b", "n", 4], three=[3], minus=-1, row=[[[1.0, 2.0, 3.0, 4.0]]])
    program = agree(content, numbers(2, 3, 4), numbers(5, 2, 4))
    assert ops(program) == ["expand", "add"]


def test_a_window_of_positions() -> None:
    """Positions up to the length, cut from a table: a slice with a symbolic end."""
    positions = (
        node("Shape", "x", "sizes"),
        node("Slice", "sizes one two", "length"),
        node("Slice", "table zero length zero", "rows"),
        node("Add", "x rows", "y"),
    )
    table = np.arange(64, dtype=np.float32).reshape(16, 4)
    program = agree(
        model(positions, ["b", "n", 4], one=[1], two=[2], zero=[0], table=table), numbers(2, 3, 4), numbers(3, 9, 4)
    )
    assert ops(program) == ["slice", "add"]
    assert list(program.state_dict) == ["table.weight"]


def test_integers_divide_towards_zero() -> None:
    divide = (node("Div", "a b", "c"), node("Cast", "c", "d", to=FLOAT), node("Add", "x d", "y"))
    agree(model(divide, [4], a=[-7, 7, -8, 5], b=[2, -2, 4, 3]), numbers(4))


# --- opsets ---------------------------------------------------------------------------------------------------------

AXES_INPUT = {"axes": [-1]}
OPSETS: list[tuple[str, int, list[Node], dict[str, Any]]] = [
    ("softmax over the rest", 11, [node("Softmax", "x", "y", axis=1)], {}),
    ("softmax over an axis", 13, [node("Softmax", "x", "y", axis=1)], {}),
    ("softmax by default", 11, [node("Softmax", "x", "y")], {}),
    ("log-softmax over the rest", 11, [node("LogSoftmax", "x", "y", axis=1)], {}),
    ("unsqueeze by attribute", 11, [node("Unsqueeze", "x", "y", axes=[0, 4])], {}),
    ("unsqueeze by input", 13, [node("Unsqueeze", "x places", "y")], {"places": [0, 4]}),
    ("squeeze by attribute", 11, [node("Unsqueeze", "x", "u", axes=[1]), node("Squeeze", "u", "y", axes=[1])], {}),
    ("sum by attribute", 11, [node("ReduceSum", "x", "y", axes=[1], keepdims=0)], {}),
    ("sum by input", 13, [node("ReduceSum", "x axes", "y")], AXES_INPUT),
    ("mean by attribute", 17, [node("ReduceMean", "x", "y", axes=[-1])], {}),
    ("mean by input", 18, [node("ReduceMean", "x axes", "y")], AXES_INPUT),
    ("clip by attributes", 10, [node("Clip", "x", "y", min=-0.5, max=0.25)], {}),
    ("clip by inputs", 13, [node("Clip", "x low", "y")], {"low": -0.5}),
    ("slice by attributes", 9, [node("Slice", "x", "y", starts=[1, -3], ends=[3, 99], axes=[1, 2])], {}),
    (
        "slice by inputs",
        13,
        [node("Slice", "x starts ends axes steps", "y")],
        {"starts": [-1, 3], "ends": [-99, 0], "axes": [1, 2], "steps": [-1, -2]},
    ),
    ("pad by attributes", 10, [node("Pad", "x", "y", pads=[0, 1, 0, 0, 0, 2], value=3.0)], {}),
    ("pad by inputs", 13, [node("Pad", "x pads", "y", mode="reflect")], {"pads": [0, 1, 2, 0, 0, 1]}),
    ("split by attribute", 11, [node("Split", "x", "y z", axis=2, split=[1, 3])], {}),
    ("split by input", 13, [node("Split", "x sizes", "y z", axis=2)], {"sizes": [1, 3]}),
    ("split in a number", 18, [node("Split", "x", "y z", axis=1, num_outputs=2)], {}),
    ("dropout by attribute", 11, [node("Dropout", "x", "y", ratio=0.5)], {}),
    ("dropout by input", 13, [node("Dropout", "x half", "y")], {"half": 0.5}),
]


@pytest.mark.parametrize(
    ("opset", "nodes", "constants"), [case[1:] for case in OPSETS], ids=[case[0] for case in OPSETS]
)
def test_opset_versions(opset: int, nodes: list[Node], constants: dict[str, Any]) -> None:
    agree(model(nodes, opset=opset, **constants), numbers(2, 3, 4))


# --- branches and loops ---------------------------------------------------------------------------------------------


def branch(op: str) -> onnx.GraphProto:
    """A graph that reads x from outside."""
    return helper.make_graph([node(op, "x", "r")], op, [], [helper.make_tensor_value_info("r", FLOAT, None)])


def test_a_branch_on_a_size_is_taken_at_capture() -> None:
    nodes = [
        node("Shape", "x", "sizes"),
        node("Gather", "sizes two", "width"),
        node("Greater", "width three", "wide"),
        node("If", "wide", "y", then_branch=branch("Neg"), else_branch=branch("Abs")),
    ]
    assert ops(agree(model(nodes, two=2, three=3), numbers(2, 3, 4))) == ["neg"]
    assert ops(agree(model(nodes, two=1, three=3), numbers(2, 3, 4))) == ["abs"]


def test_a_branch_on_data_is_refused() -> None:
    nodes = [
        node("ReduceMax", "x", "most", keepdims=0),
        node("Greater", "most zero", "positive"),
        node(
            "If",
            "positive",
            "y",
            then_branch=branch("Neg"),
            else_branch=branch("Abs"),
        ),
    ]
    with pytest.raises(ValueUnknown) as caught:
        captured(model(nodes, zero=0.0), numbers(2, 3, 4))
    assert str(caught.value) == (
        "m.onnx: node y (If) needs the value of its input 'condition' when the model is captured, but it depends on "
        "data.\n  hint: sizes and conditions must follow from shapes and constants; export with them fixed."
    )


def loop_body() -> onnx.GraphProto:
    """carried -> carried + x, and what it was before."""
    value = helper.make_tensor_value_info
    return helper.make_graph(
        [node("Identity", "go", "on"), node("Add", "sum x", "next"), node("Identity", "sum", "seen")],
        "body",
        [value("i", INT64, []), value("go", TensorProto.BOOL, []), value("sum", FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("next", FLOAT, None), value("seen", FLOAT, None)],
    )


def test_a_loop_with_a_known_number_of_runs() -> None:
    nodes = [node("Loop", "trips _ x", "last y", body=loop_body())]
    program = agree(model(nodes, trips=3), numbers(2, 3, 4))
    assert ops(program) == ["add", "add", "add", "stack"]


def test_a_scan_over_rows() -> None:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Add", "sum row", "next"), node("Identity", "next", "seen")],
        "body",
        [value("sum", FLOAT, [4]), value("row", FLOAT, [4])],
        [value("next", FLOAT, [4]), value("seen", FLOAT, [4])],
    )
    nodes = [node("Scan", "start x", "last y", body=body, num_scan_inputs=1, scan_input_directions=[1])]
    agree(model(nodes, [3, 4], start=[0.0, 0.0, 0.0, 0.0]), numbers(3, 4))
