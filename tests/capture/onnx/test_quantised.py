"""Files quantised by ONNX Runtime: integers stay integers, numbers stay what they were, and tokens can be reduced."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx_exports import LAYERS, exported, folder, inputs_of
from onnxruntime import quantization

import tamis
from tamis.capture import capture
from tamis.capture.onnx.conformance import operations
from tamis.graph import TokenGraph
from tamis.lowering.onnx import export_onnx
from tamis.lowering.onnx_names import file_names

INTEGERS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"}
STATIC = {
    "vit": ("dynamo", None),
    "bert": ("torchscript", ["MatMul", "Gemm", "Gather", "Softmax", "LayerNormalization"]),
}
full = pytest.mark.full
CASES = [
    ("vit", "static", False),
    ("bert", "dynamic", False),
    pytest.param("vit", "static", True, marks=full),
    pytest.param("bert", "static", True, marks=full),
    pytest.param("bert", "static", False, marks=full),
    pytest.param("vit", "dynamic", False, marks=full),
]
every_case = pytest.mark.parametrize(("name", "how", "per_channel"), CASES)


class Calibration(quantization.CalibrationDataReader):
    """Three batches."""

    def __init__(self, name: str) -> None:
        self.batches = iter([arrays(name, batch) for batch in (2, 3, 4)])

    def get_next(self) -> Any:
        return next(self.batches, None)


def arrays(name: str, batch: int) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in inputs_of(name, batch).items()}


@functools.cache
def quantised(name: str, how: str, per_channel: bool) -> Path:
    """The file, quantised to int8 with one scale a tensor, or to uint8 with a scale for every channel of a weight."""
    path = folder() / f"{name}-{how}-{per_channel}.onnx"
    if how == "dynamic":
        quantization.quantize_dynamic(str(exported(name, "torchscript")), str(path))
        return path
    exporter, operators = STATIC[name]
    quantization.quantize_static(
        str(exported(name, exporter)),
        str(path),
        Calibration(name),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=operators,
        per_channel=per_channel,
        activation_type=quantization.QuantType.QUInt8 if per_channel else quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return path


@functools.cache
def graph_of(path: Path) -> TokenGraph:
    return capture(str(path))


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The file in ONNX Runtime node by node: its fusions compute in integers and round elsewhere."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def difference(got: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected))


def integer_nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node if node.op_type in INTEGERS)


def integer_weights(path: Path) -> dict[str, bytes]:
    """By name; zero points that are the same for all channels may be one tensor for several weights."""
    arrays = {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    return {
        name: one.tobytes()
        for name, one in arrays.items()
        if one.dtype.kind in "iu" and one.dtype.itemsize == 1 and np.ptp(one)
    }


@every_case
def test_captured_numbers_are_the_files(name: str, how: str, per_channel: bool) -> None:
    path = quantised(name, how, per_channel)
    graph = graph_of(path)
    assert [site.role for site in graph.sites] == ["stream"] * LAYERS
    for batch in (1, 3):
        expected = run(path, arrays(name, batch))
        with torch.no_grad():
            got = torch.utils._pytree.tree_leaves(graph.program.module()(*inputs_of(name, batch).values()))
        assert max(map(difference, got, expected)) < 1e-5


@every_case
def test_the_round_trip_keeps_integers(name: str, how: str, per_channel: bool, tmp_path: Path) -> None:
    path, out = quantised(name, how, per_channel), tmp_path / "out.onnx"
    program = graph_of(path).program
    export_onnx(program, out, **file_names(program, graph_of(path).interface))
    feeds = arrays(name, 3)
    assert max(map(difference, run(out, feeds), run(path, feeds))) < 1e-6
    weights = integer_weights(path)
    assert len(weights) >= 8  # four linear layers in each of two
    assert integer_weights(out).items() >= weights.items()
    before, after = integer_nodes(path), integer_nodes(out)
    assert before.total() >= 2 * 8
    # what only shapes are computed from is not there any more
    assert after["MatMulInteger"] == before["MatMulInteger"]
    assert after["DynamicQuantizeLinear"] == before["DynamicQuantizeLinear"]
    assert after.total() >= 0.9 * before.total()
    assert not operations(onnx.load(out)) & {"Round", "Clip"}
    assert out.stat().st_size < path.stat().st_size


@every_case
def test_tokens_are_merged(name: str, how: str, per_channel: bool, tmp_path: Path) -> None:
    path, out = quantised(name, how, per_channel), tmp_path / "out.onnx"
    fast = tamis.compile(str(path), passes="tome:r=2")
    for row in fast.report.layers:
        assert 0 < row.flops_after < row.flops_before
    assert sum(row.flops_before for row in fast.report.layers) <= fast.report.flops_before
    fast.export(str(out))
    matches = [node.op_type for node in onnx.load(out).graph.node if node.op_type.startswith("BipartiteMatch")]
    assert len(matches) == LAYERS
    assert integer_nodes(out) == integer_nodes_of_round_trip(name, how, per_channel, tmp_path)
    for batch in (1, 3):
        expected = torch.utils._pytree.tree_leaves(fast(**inputs_of(name, batch)))
        got = run(out, arrays(name, batch))
        assert max(difference(a, b.numpy()) for a, b in zip(got, expected, strict=True)) < 5e-3


def integer_nodes_of_round_trip(name: str, how: str, per_channel: bool, folder: Path) -> Counter[str]:
    program = graph_of(quantised(name, how, per_channel)).program
    export_onnx(program, folder / "plain.onnx")
    return integer_nodes(folder / "plain.onnx")
