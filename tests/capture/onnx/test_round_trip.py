"""A file that no pass changes comes back as it was: names, types, dynamic dimensions, metadata, weights, numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_exports import exported, inputs_of

import tamis
from tamis.errors import NoAttention, UnknownAttention

GENERATOR = np.random.default_rng(0)
WEIGHTS = {
    "scope::table": GENERATOR.standard_normal((4, 5)).astype("f"),
    "bias": np.ones(5, "f"),
    "slope": np.array([0.1], "f"),
}


def value(name: str, shape: list[int | str | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def network() -> onnx.ModelProto:
    """No attention, a dimension without a name, one that the output calls something else, a weight of one entry."""
    nodes = [
        helper.make_node("MatMul", ["x", "scope::table"], ["a"]),
        helper.make_node("Add", ["a", "bias"], ["b"]),
        helper.make_node("PRelu", ["b", "slope"], ["out.1"]),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()]
    graph = helper.make_graph(nodes, "g", [value("x", [None, "n", 4])], [value("out.1", [None, "rows", 5])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    helper.set_model_props(model, {"author": "someone"})
    return model


def declared(values: list[onnx.ValueInfoProto]) -> list[tuple[str, int, list[int | str]]]:
    """Name, type and sizes; a size without a number or a name is ""."""
    return [
        (
            one.name,
            one.type.tensor_type.elem_type,
            [d.dim_value or d.dim_param for d in one.type.tensor_type.shape.dim],
        )
        for one in values
    ]


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)


def returned(path: Path, folder: Path) -> Path:
    """The file after a round trip."""
    tamis.compile(str(path), passes=[], allow_noop=True).export(str(folder / "out.onnx"))
    return folder / "out.onnx"


def test_a_network_without_attention(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(network(), path)
    out = returned(path, tmp_path)
    before, after = onnx.load(path).graph, onnx.load(out)
    assert declared(after.graph.input) == declared(before.input)
    assert declared(after.graph.output) == declared(before.output)
    assert {"author": "someone"}.items() <= {one.key: one.value for one in after.metadata_props}.items()
    kept = {one.name: numpy_helper.to_array(one) for one in after.graph.initializer}
    for name, array in WEIGHTS.items():
        assert np.array_equal(kept[name], array)
    x = GENERATOR.standard_normal((3, 7, 4)).astype("f")
    np.testing.assert_allclose(run(out, {"x": x})[0], run(path, {"x": x})[0], rtol=1e-6)


def test_negative_sizes_are_dynamic(tmp_path: Path) -> None:
    """Paddle's exporter writes -1 for a dimension without a size; ONNX Runtime takes any size there."""
    model, path = network(), tmp_path / "in.onnx"
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    onnx.save(model, path)
    out = returned(path, tmp_path)
    assert declared(onnx.load(out).graph.input)[0][2] == ["", "n", 4]
    x = GENERATOR.standard_normal((5, 3, 4)).astype("f")
    np.testing.assert_allclose(run(out, {"x": x})[0], run(path, {"x": x})[0], rtol=1e-6)


def test_a_pass_needs_tokens_still(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(network(), path)
    with pytest.raises(NoAttention):
        tamis.compile(str(path), passes="tome:r=1", allow_noop=True)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_an_encoder(exporter: str, tmp_path: Path) -> None:
    path = exported("bert", exporter)
    out = returned(path, tmp_path)
    before, after = onnx.load(path).graph, onnx.load(out).graph
    assert declared(after.input) == declared(before.input)
    assert [one[0] for one in declared(after.output)] == [one[0] for one in declared(before.output)]
    names = {one.name for one in after.initializer}
    weights = {one.name: numpy_helper.to_array(one) for one in before.initializer if np.prod(one.dims) > 1}
    learned = {name for name, array in weights.items() if array.dtype == np.float32 and array.size > 1}
    assert len(learned) > 30
    assert learned <= names
    assert out.stat().st_size < 1.2 * path.stat().st_size
    feeds = {name: tensor.numpy() for name, tensor in inputs_of("bert", 3, 11).items()}
    for got, expected in zip(run(out, feeds), run(path, feeds), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def attention(scale: str) -> onnx.ModelProto:
    """softmax(q k^T * scale) v, q, k and v being the input."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["k"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["x", "k"], ["product"], name="/layer.0/scores"),
        helper.make_node("Mul", ["product", scale], ["logits"], name="/layer.0/scale"),
        helper.make_node("Softmax", ["logits"], ["p"], name="/layer.0/softmax", axis=-1),
        helper.make_node("MatMul", ["p", "x"], ["y"], name="/layer.0/mix"),
    ]
    weights = [numpy_helper.from_array(np.full((1, 2, 1, 1), 0.5, "f"), "temperature")]
    graph = helper.make_graph(nodes, "g", [value("x", ["b", 2, "n", 4])], [value("y", ["b", 2, "n", 4])], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_a_near_miss_names_the_node_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(attention("temperature"), path)
    with pytest.raises(UnknownAttention) as error:
        tamis.compile(str(path), passes="tome:r=1")
    text = " ".join(str(error.value).split())
    assert f"{path}: /layer.0/softmax:" in text
    assert "the logits are scaled by p_temperature_weight (placeholder), which is not a number" in text
    assert error.value.exit_code == 2
