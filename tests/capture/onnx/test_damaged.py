"""Damaged bytes: whatever a file has become, the answer is a model or one of our errors."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_graphs import model, node

from tamis.capture.onnx.source import load_onnx
from tamis.errors import TamisError
from tamis.onnx_errors import MalformedGraph, NodeFailed, TypeUnsupported

NODES = (
    node("Shape", "x", "sizes"),
    node("Gather", "sizes zero", "batch"),
    node("Unsqueeze", "batch first", "one"),
    node("Concat", "one rest", "shape", axis=0),
    node("Reshape", "x shape", "rows"),
    node("MatMul", "rows table", "product"),
    node("Softmax", "product", "y", axis=-1),
)
WHOLE = model(NODES, ["b", "n", 4], zero=0, first=[0], rest=[-1, 4], table=[[1.0, 2.0]] * 4).SerializeToString()


def mutated(generator: random.Random) -> bytes:
    """The file with a few bytes changed, taken out or put in."""
    content = bytearray(WHOLE)
    for _ in range(generator.choice([1, 1, 2, 4])):
        place = generator.randrange(len(content))
        match generator.randrange(4):
            case 0:
                content[place] = generator.randrange(256)
            case 1:
                content[place] ^= 1 << generator.randrange(8)
            case 2:
                del content[place : place + generator.randrange(1, 9)]
            case _:
                content[place:place] = generator.randbytes(generator.randrange(1, 5))
    return bytes(content)


def test_mutations_end_in_our_errors(tmp_path: Path) -> None:
    generator, path = random.Random(0), tmp_path / "m.onnx"
    answers = {"read": 0, "refused": 0}
    for _ in range(400):
        path.write_bytes(mutated(generator))
        try:
            load_onnx(str(path))
            answers["read"] += 1
        except TamisError:
            answers["refused"] += 1
    assert min(answers.values()) > 20, answers


def refused(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(MalformedGraph) as caught:
        load_onnx(str(path))
    return str(caught.value)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    damaged = WHOLE.replace(b"Softmax", b"\xff" + b"oftmax")
    assert "the name b'\\xffoftmax' is no text" in refused(tmp_path, damaged)


def test_attributes_without_a_value(tmp_path: Path) -> None:
    content = onnx.ModelProto.FromString(WHOLE)
    content.graph.node[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    assert "attribute 'value' has no value" in refused(tmp_path, content.SerializeToString())


def branches(inner: onnx.NodeProto) -> onnx.ModelProto:
    """A branch that holds a node, which uses x."""
    value = helper.make_tensor_value_info("e", TensorProto.FLOAT, None)
    graphs = [helper.make_graph([inner], name, [], [value]) for name in ("then", "else")]
    nodes = [node("If", "yes", "y", then_branch=graphs[0], else_branch=graphs[1])]
    return model(nodes, ["b", "n", 4], yes=True)


def calls(inner: onnx.NodeProto) -> onnx.ModelProto:
    """A function of the file's own that holds a node, which uses x."""
    content = model([node("Neg", "x", "y")], ["b", "n", 4])
    content.graph.node[0].op_type, content.graph.node[0].domain = "Own", "own"
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    content.opset_import.append(opsets[1])
    content.functions.append(helper.make_function("own", "Own", ["x"], ["e"], [inner], opsets))
    return content


def plain(inner: onnx.NodeProto) -> onnx.ModelProto:
    """A node of the graph itself, which uses x."""
    return model([node("Neg", "x", "y"), inner], ["b", "n", 4])


HOLDERS = {"graph": plain, "branch": branches, "function": calls}
UNTYPED = onnx.AttributeProto(name="axis", i=1)
KNOWN, CARRIED, UNKNOWN = "Softmax", "SoftmaxCrossEntropyLoss", "NoOperator"


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("operator", [KNOWN, CARRIED, UNKNOWN])
def test_attributes_without_a_type(tmp_path: Path, holder: str, operator: str) -> None:
    inner = node(operator, "x", "e")
    inner.attribute.append(UNTYPED)
    content = HOLDERS[holder](inner).SerializeToString()
    assert "attribute 'axis' has no type" in refused(tmp_path, content)


@pytest.mark.parametrize("kind", ["SPARSE_TENSOR", "SPARSE_TENSORS"])
def test_attributes_that_are_sparse(tmp_path: Path, kind: str) -> None:
    content = onnx.ModelProto.FromString(WHOLE)
    content.graph.node[0].attribute.add(name="own", type=onnx.AttributeProto.AttributeType.Value(kind))
    path = tmp_path / "m.onnx"
    path.write_bytes(content.SerializeToString())
    with pytest.raises(TypeUnsupported, match="attribute 'own' is of type sparse tensor"):
        load_onnx(str(path))


def test_more_axes_than_an_array_has(tmp_path: Path) -> None:
    content = onnx.ModelProto.FromString(WHOLE)
    content.graph.initializer.append(TensorProto(name="w", dims=[0] * 65, data_type=TensorProto.FLOAT))
    assert "tensor 'w' has 65 axes" in refused(tmp_path, content.SerializeToString())


def test_a_loop_of_too_many_runs_is_refused(tmp_path: Path) -> None:
    names = {"i": TensorProto.INT64, "t": TensorProto.BOOL, "a": TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in names.items()]
    outputs = [helper.make_tensor_value_info(name, names[name[0]], None) for name in ("t2", "a2")]
    body = helper.make_graph([node("Identity", "t", "t2"), node("Add", "a a", "a2")], "body", inputs, outputs)
    path = tmp_path / "m.onnx"
    onnx.save(model([node("Loop", "trips _ x", "y", body=body)], trips=2**40), path)
    loaded = load_onnx(str(path))
    with pytest.raises(NodeFailed, match="it runs more than 512 times, and every run is written out"):
        loaded.module(*loaded.args)


def fails(tmp_path: Path, content: onnx.ModelProto) -> str:
    """What is said when the model is loaded and run."""
    path = tmp_path / "m.onnx"
    onnx.save(content, path)

    def load_and_run() -> None:
        loaded = load_onnx(str(path))
        loaded.module(*loaded.args)

    with pytest.raises(NodeFailed) as caught:
        load_and_run()
    return str(caught.value)


def test_outputs_that_an_operator_does_not_have(tmp_path: Path) -> None:
    content = model([node("Gather", "x zero", "v"), node("Neg", "v", "y")], zero=0)
    content.graph.node[0].output.append("more")
    content.graph.node[1].input[0] = "more"
    assert "its output 'more' is one that Gather does not make" in fails(tmp_path, content)


CONVOLUTIONS = {
    "scalar": ({}, 1.0),
    "strides": ({"strides": [1, 1]}, [[[1.0, 2.0]]]),
    "negative": ({"strides": [-1]}, [[[1.0, 2.0]]]),
    "text": ({"strides": "text", "group": "text"}, [[[1.0, 2.0]]]),
    "group": ({"group": -1}, [[[1.0, 2.0]]]),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_that_are_none(tmp_path: Path, name: str) -> None:
    """They say nothing of the sizes of an image, and fail as nodes do."""
    attributes, weight = CONVOLUTIONS[name]
    content = model([node("Neg", "x", "y")], ["b", "c", "n"], w=weight)
    content.graph.node[0].CopyFrom(node("Conv", "x w", "y", **attributes))
    assert "(Conv) cannot be evaluated" in fails(tmp_path, content)


@pytest.mark.parametrize("attributes", [{"axis": 5}, {"axis": "text"}, {"axis": -9}])
def test_lookups_that_are_none(tmp_path: Path, attributes: dict[str, object]) -> None:
    content = model([node("Neg", "x", "y")], ["b", "n"], w=[[1.0, 2.0]])
    content.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    content.graph.node[0].CopyFrom(node("Gather", "w x", "y", **attributes))
    assert "(Gather) cannot be evaluated" in fails(tmp_path, content)


def test_a_table_without_rows(tmp_path: Path) -> None:
    content = model([node("Neg", "x", "y")], ["b", "n"], w=np.zeros((0, 2), np.float32))
    content.graph.node[0].CopyFrom(node("Gather", "w x", "y"))
    content.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    assert "(Gather) cannot be evaluated" in fails(tmp_path, content)


def test_inputs_of_more_entries_than_there_is_memory(tmp_path: Path) -> None:
    content = model([node("Neg", "x", "y")], ["b", "c", "n"], w=[[[1.0, 2.0]]])
    content.graph.node[0].CopyFrom(node("Conv", "x w", "y", strides=[2**62]))
    assert "input 'x' would have sizes [2, 1, 18446744073709551616]" in refused(tmp_path, content.SerializeToString())
    content.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**40
    assert "input 'x' would have sizes [2, 1099511627776" in refused(tmp_path, content.SerializeToString())
