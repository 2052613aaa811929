"""Bad ONNX files: one line that says what is wrong, exit code 2; and that what is right is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tamis.capture.onnx.reader import OnnxFile, read_onnx
from tamis.errors import CorruptModel, ModelNotFound, TamisError
from tamis.onnx_errors import (
    ExternalDataMissing,
    MalformedGraph,
    OpsetUnknown,
    TypeUnsupported,
    UnsafeExternalData,
)

FLOAT = TensorProto.FLOAT


def model(*nodes: onnx.NodeProto, tensors: tuple[TensorProto, ...] = (), opset: int = 18) -> onnx.ModelProto:
    """x [2] -> y, by these nodes; x + x by default."""
    nodes = nodes or (helper.make_node("Add", ["x", "x"], ["y"]),)
    x, y = (helper.make_tensor_value_info(name, FLOAT, [2]) for name in "xy")
    graph = helper.make_graph(list(nodes), "g", [x], [y], initializer=list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def weight(dims: list[int], raw: bytes, data_type: int = FLOAT) -> TensorProto:
    return TensorProto(name="w", dims=dims, data_type=data_type, raw_data=raw)


def external(location: str, dims: tuple[int, ...] = (2,), **entries: int) -> TensorProto:
    tensor = TensorProto(name="w", dims=dims, data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


ADD_W = helper.make_node("Add", ["x", "w"], ["y"])


def refused(tmp_path: Path, content: onnx.ModelProto | bytes, error: type[TamisError]) -> str:
    """The message with which a file is refused; two lines, the second a hint."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    with pytest.raises(error) as caught:
        read_onnx(path)
    assert type(caught.value) is error
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert text.count("\n") == 1
    return text.split("\n")[0].removeprefix(f"{path}: ")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        read_onnx(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"just some text, not a model\n", "it is text"),
        (b"", "it is empty"),
        (model(ADD_W, tensors=(weight([2], bytes(8)),)).SerializeToString()[:-20], "end too early"),
        (bytes(range(256)) * 8, "not those of a protobuf message"),
    ],
    ids=["text", "empty", "truncated", "noise"],
)
def test_no_model(tmp_path: Path, content: bytes, reason: str) -> None:
    text = refused(tmp_path, content, CorruptModel)
    assert text.startswith("cannot be read as an ONNX model: ")
    assert reason in text


RELU, NEG = (helper.make_node(name, [a], [b]) for name, a, b in (("Relu", "b", "a"), ("Neg", "a", "b")))
GRAPHS: dict[str, tuple[onnx.ModelProto, str]] = {
    "cycle": (
        model(RELU, NEG, helper.make_node("Add", ["a", "x"], ["y"])),
        "Relu 'a' is part of a cycle through 'b'",
    ),
    "order": (
        model(RELU, helper.make_node("Neg", ["x"], ["b"]), helper.make_node("Add", ["a", "x"], ["y"])),
        "Relu 'a' uses 'b' before it is made by Neg 'b'",
    ),
    "unmade": (model(helper.make_node("Relu", ["q"], ["y"])), "uses 'q', which is neither an input nor made by a node"),
    "doubled": (
        model(helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])),
        "two values are called 'y', one made by Neg 'y'",
    ),
    "output": (model(helper.make_node("Relu", ["x"], ["z"])), "output 'y' is made by no node"),
    "bytes": (
        model(ADD_W, tensors=(weight([2], bytes(7)),)),
        "tensor 'w' has 7 bytes where float32[2] takes 8",
    ),
    "type": (
        model(ADD_W, tensors=(weight([2], bytes(8), TensorProto.DOUBLE),)),
        "tensor 'w' has 8 bytes where float64[2] takes 16",
    ),
    "values": (
        model(ADD_W, tensors=(TensorProto(name="w", dims=[2], data_type=FLOAT, float_data=[1.0]),)),
        "tensor 'w' has 1 values in float_data where float32[2] takes 2",
    ),
    "overflow": (
        model(ADD_W, tensors=(weight([2**40, 2**40], bytes(8)),)),
        "more than can be addressed",
    ),
    "negative": (model(ADD_W, tensors=(weight([-2], bytes(8)),)), "tensor 'w' has a negative size in [-2]"),
    "declared": (
        model(ADD_W, tensors=(weight([3, 2**28], bytes(10)),)),
        "tensor 'w' has 10 bytes where float32[3, 268435456] takes 3221225472",
    ),
    "version": (model(opset=0), "it does not say which version of the standard operators it uses"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_malformed_graphs(tmp_path: Path, name: str) -> None:
    content, reason = GRAPHS[name]
    text = refused(tmp_path, content, MalformedGraph)
    assert text.startswith("not a valid ONNX graph: ")
    assert reason in text


def test_an_empty_graph(tmp_path: Path) -> None:
    graph = helper.make_graph([], "g", [], [])
    text = refused(tmp_path, helper.make_model(graph), MalformedGraph)
    assert "it holds no graph, or one without nodes and outputs" in text


def test_a_function_that_calls_itself(tmp_path: Path) -> None:
    node = helper.make_node("Same", ["x"], ["y"], domain="own")
    content = model(node)
    content.opset_import.append(helper.make_opsetid("own", 1))
    content.functions.append(helper.make_function("own", "Same", ["x"], ["y"], [node], [helper.make_opsetid("own", 1)]))
    assert "function 'Same' calls itself" in refused(tmp_path, content, MalformedGraph)


def test_a_newer_opset(tmp_path: Path) -> None:
    text = refused(tmp_path, model(opset=999), OpsetUnknown)
    assert text == "uses version 999 of the operators of ONNX, and 28 is the newest that tamis knows."


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda m: m.graph.input[0].type.tensor_type.ClearField("elem_type"), "undefined"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.STRING), "string"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 77), "number 77, which is no type"),
        (lambda m: m.graph.input[0].type.map_type.SetInParent(), "map"),
        (lambda m: m.graph.output[0].type.sequence_type.elem_type.map_type.SetInParent(), "map"),
        (lambda m: m.graph.initializer.append(numpy_helper.from_array(np.array(["a"]), "w")), "string"),
    ],
    ids=["none", "text", "unknown", "map", "map out", "text weight"],
)
def test_types_that_are_no_numbers(tmp_path: Path, change: Callable[[onnx.ModelProto], None], got: str) -> None:
    content = model()
    change(content)
    text = refused(tmp_path, content, TypeUnsupported)
    assert f" is of type {got}, which has no place in a graph of tensors" in text


# --- data outside of the file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("../data.bin", "which climbs out of the model's folder"),
        ("a/../../data.bin", "which climbs out of the model's folder"),
        ("..\\data.bin", "which climbs out of the model's folder"),
        ("/etc/passwd", "an absolute path"),
        ("C:\\data.bin", "an absolute path"),
        ("", "which names no file"),
        ("linked.bin", "and 'linked.bin' is a link"),
        ("folder/data.bin", "and 'folder' is a link"),
        ("hard.bin", "which other names are linked to"),
    ],
)
def test_unsafe_locations(tmp_path: Path, location: str, reason: str) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "data.bin").write_bytes(bytes(8))
    (tmp_path / "data.bin").write_bytes(bytes(8))
    (inside / "linked.bin").symlink_to(outside / "data.bin")
    (inside / "folder").symlink_to(outside)
    os.link(outside / "data.bin", inside / "hard.bin")
    text = refused(inside, model(ADD_W, tensors=(external(location),)), UnsafeExternalData)
    assert text == f"tensor 'w' keeps its data at {location!r}, {reason}, so it was not read."


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (external("none.bin"), "which is not there"),
        (external("data.bin", offset=4), "which has 8 bytes, not the 12 up to the end of this tensor"),
        (external("data.bin", (3, 2**28)), "which has 8 bytes, not the 3221225472 up to the end of this tensor"),
    ],
    ids=["missing", "offset", "declared"],
)
def test_data_that_is_not_there(tmp_path: Path, tensor: TensorProto, reason: str) -> None:
    (tmp_path / "data.bin").write_bytes(bytes(8))
    text = refused(tmp_path, model(ADD_W, tensors=(tensor,)), ExternalDataMissing)
    assert text.endswith(f"{reason}.")


@pytest.mark.parametrize(
    "entries", [{"length": 4}, {"offset": "x"}, {"offset": -4}], ids=["length", "text", "negative"]
)
def test_external_data_that_contradicts_itself(tmp_path: Path, entries: dict[str, int]) -> None:
    (tmp_path / "data.bin").write_bytes(bytes(8))
    assert "tensor 'w' " in refused(tmp_path, model(ADD_W, tensors=(external("data.bin", **entries),)), MalformedGraph)


# --- what is right --------------------------------------------------------------------------------------------------


def only_weight(file: OnnxFile) -> torch.Tensor:
    (tensor,) = file.weights.values()
    return tensor


def test_external_data_is_read_and_never_written(tmp_path: Path) -> None:
    data = tmp_path / "deep" / "data.bin"
    data.parent.mkdir()
    data.write_bytes(bytes(4) + np.array([1.5, -2.0], np.float32).tobytes())
    path = tmp_path / "model.onnx"
    onnx.save(model(ADD_W, tensors=(external("deep/data.bin", offset=4, length=8),)), path)
    tensor = only_weight(read_onnx(path))
    assert tensor.tolist() == [1.5, -2.0]
    tensor.zero_()
    assert data.read_bytes()[4:] == np.array([1.5, -2.0], np.float32).tobytes()


TYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.bool_]
TYPES += [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "values"])
def test_types_of_weights(tmp_path: Path, dtype: type, raw: bool) -> None:
    array = np.array([[0, 1, 3], [1, 0, 2]]).astype(dtype)
    tensor = numpy_helper.from_array(array, "w")
    if not raw:
        tensor = helper.make_tensor("w", tensor.data_type, array.shape, array.reshape(-1))
    content = model(tensors=(tensor,))
    (tmp_path / "model.onnx").write_bytes(content.SerializeToString())
    got = only_weight(read_onnx(tmp_path / "model.onnx"))
    assert str(got.dtype).removeprefix("torch.") == np.dtype(dtype).name
    assert got.double().tolist() == array.astype(np.float64).tolist()


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "tuples"])
def test_sparse_initializers_become_dense(tmp_path: Path, flat: bool) -> None:
    content = model()
    places = np.array([1, 5]) if flat else np.array([[0, 1], [1, 2]])
    values = numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "w")
    content.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(places, "places"), [2, 3])
    )
    (tmp_path / "model.onnx").write_bytes(content.SerializeToString())
    assert only_weight(read_onnx(tmp_path / "model.onnx")).tolist() == [[0, 2, 0], [0, 0, 3]]


@pytest.mark.parametrize(
    ("dims", "places", "reason"),
    [
        ([2**20, 2**20], [1, 5], "more than 268435456 entries"),
        ([2, -3], [1, 5], "negative"),
        ([2, 3], [1, 6], "index 6 is out of bounds"),
        ([2, 3], [[0, 1, 0], [1, 2, 0]], "too many indices"),
    ],
)
def test_sparse_initializers_that_do_not_fit(tmp_path: Path, dims: list[int], places: list[Any], reason: str) -> None:
    content = model()
    values = numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "w")
    content.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(places), "places"), dims)
    )
    text = refused(tmp_path, content, MalformedGraph)
    assert "sparse tensor 'w'" in text
    assert reason in text


def test_functions_take_the_place_of_their_calls(tmp_path: Path) -> None:
    inner = helper.make_node("LeakyRelu", ["x"], ["y"])
    inner.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    content = model(helper.make_node("Leak", ["x"], ["y"], domain="own", slope=0.5))
    content.opset_import.append(helper.make_opsetid("own", 1))
    opsets = [helper.make_opsetid("", 18)]
    content.functions.append(helper.make_function("own", "Leak", ["x"], ["y"], [inner], opsets, ["slope"]))
    (tmp_path / "model.onnx").write_bytes(content.SerializeToString())
    (node,) = read_onnx(tmp_path / "model.onnx").graph
    assert (node.op_type, node.attributes["alpha"].value) == ("LeakyRelu", 0.5)
