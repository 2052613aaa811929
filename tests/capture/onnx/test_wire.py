"""Large tensors inside a file are left there until they are wanted."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tamis.capture.onnx.reader import read_onnx
from tamis.capture.onnx.wire import LARGE, fields, header, skeleton
from tamis.errors import CorruptModel
from tamis.onnx_errors import MalformedGraph

ROWS = np.random.default_rng(0).standard_normal((5, LARGE // 4 + 1)).astype(np.float32)


def model(*tensors):
    """Adds the tensors up; a first one of 0 to 3 bytes moves the others through all alignments."""
    nodes = [helper.make_node("Sum", [one.name for one in tensors], ["y"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", [], outputs, list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def five():
    return [numpy_helper.from_array(row, "w" + "x" * i) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("name", ["m.onnx", "a:b.onnx", "\udcff.onnx", "line\nbreak.onnx"])
def test_values_are_those_of_the_plain_parser(tmp_path, name):
    small = numpy_helper.from_array(np.arange(3, dtype=np.float32), "small")
    onnx.save(model(*five(), small), tmp_path / "plain.onnx")
    (tmp_path / "plain.onnx").rename(tmp_path / name)
    weights = {value.name: weight for value, weight in read_onnx(tmp_path / name).weights.items()}
    assert list(weights) == ["w", "wx", "wxx", "wxxx", "wxxxx", "small"]
    for row, weight in zip(ROWS, weights.values(), strict=False):
        assert torch.equal(weight, torch.from_numpy(row))


def test_a_file_behind_a_link_is_read(tmp_path):
    onnx.save(model(*five()), tmp_path / "blob")
    (tmp_path / "m.onnx").symlink_to("blob")
    weights = list(read_onnx(tmp_path / "m.onnx").weights.values())
    assert all(torch.equal(weight, torch.from_numpy(row)) for row, weight in zip(ROWS, weights, strict=True))


def test_only_large_bytes_are_left_out(tmp_path):
    whole = model(*five(), numpy_helper.from_array(np.zeros(LARGE // 5, np.float32), "small"))
    onnx.save(whole, tmp_path / "m.onnx")
    left = skeleton(tmp_path / "m.onnx")
    assert LARGE // 5 * 4 < len(left) < LARGE
    read = onnx.ModelProto.FromString(left)
    assert [one.data_location for one in read.graph.initializer] == [TensorProto.EXTERNAL] * 5 + [0]
    onnx.load_external_data_for_model(read, str(tmp_path))
    for one in read.graph.initializer:
        one.ClearField("data_location")
    assert read == whole


def test_writing_to_a_weight_leaves_the_file_alone(tmp_path):
    onnx.save(model(*five()), tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()
    for weight in read_onnx(tmp_path / "m.onnx").weights.values():
        weight.zero_()
    assert (tmp_path / "m.onnx").read_bytes() == before


def test_bytes_that_do_not_fill_the_sizes_are_refused(tmp_path):
    tensor = numpy_helper.from_array(ROWS, "w")
    tensor.dims[0] = 6
    onnx.save(model(tensor), tmp_path / "m.onnx")
    with pytest.raises(MalformedGraph, match=f"'w' has {ROWS.nbytes} bytes where"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("cut", [1, 1000, LARGE, 4 * LARGE])
def test_a_file_cut_inside_a_large_tensor_is_refused(tmp_path, cut):
    onnx.save(model(*five()), tmp_path / "m.onnx")
    with (tmp_path / "m.onnx").open("rb+") as stream:
        stream.truncate(os.path.getsize(tmp_path / "m.onnx") - cut)
    with pytest.raises(CorruptModel, match="end too early"):
        read_onnx(tmp_path / "m.onnx")


def test_a_tensor_that_lies_elsewhere_keeps_its_place(tmp_path):
    """Bytes that stand in the file as well do not count then, as protobuf reads them."""
    (tmp_path / "w.bin").write_bytes(ROWS[1].tobytes())
    tensor = numpy_helper.from_array(ROWS[0], "w")
    onnx.external_data_helper.set_external_data(tensor, "w.bin")
    (tmp_path / "m.onnx").write_bytes(model(tensor).SerializeToString())
    (weight,) = read_onnx(tmp_path / "m.onnx").weights.values()
    assert torch.equal(weight, torch.from_numpy(ROWS[1]))


@pytest.mark.parametrize("length", [0, 1, 127, 128, 300, 2**14])
def test_headers_are_read_as_they_are_written(length):
    written = header(9, length) + bytes(length)
    assert written == TensorProto(raw_data=bytes(length)).SerializeToString()
    assert list(fields(written, 0, len(written))) == [(9, 2, 0, len(written) - length, len(written))]


@pytest.mark.parametrize("content", [b"\xff" * 11, b"\x0b\x0c", b"\x4a", b"\x4d\x00"])
def test_no_row_of_fields(content):
    with pytest.raises(ValueError, match=r"kind|number|ends behind"):
        list(fields(content, 0, len(content)))
