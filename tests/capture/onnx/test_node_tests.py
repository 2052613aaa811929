"""The ONNX project's node tests through capture: a sample always, all of them with --full."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tamis.capture.onnx import backend
from tamis.capture.onnx.conformance import Result, attempt, node_tests

ENOUGH = 0.97
# Operators below that, with the reason; each must still be there.
EXCEPTIONS = {
    "Dropout": "four tests draw random numbers in training mode",
    "Scan": "one test is of version 8, which scans under a batch axis",
}


def failures(results: list[Result]) -> dict[str, list[str]]:
    """Operators whose share of passed tests, of types that torch has, is too small, with what failed."""
    tests: dict[str, list[Result]] = defaultdict(list)
    for one in results:
        for name in one.operations:
            if not one.no_type:
                tests[name].append(one)
    shares = {name: sum(not one.reason for one in found) / len(found) for name, found in tests.items()}
    return {
        name: [f"{one.name}: {one.reason}" for one in tests[name] if one.reason]
        for name, share in shares.items()
        if share < ENOUGH
    }


def test_a_sample_of_node_tests() -> None:
    cases = list(node_tests())
    assert len(cases) > 1000
    results = [attempt(case) for case in cases[::53]]
    assert [f"{one.name}: {one.reason}" for one in results if one.reason and not one.no_type] == []


@pytest.mark.full
def test_all_node_tests() -> None:
    found = failures([attempt(case) for case in node_tests()])
    assert {name: why for name, why in found.items() if name not in EXCEPTIONS} == {}
    assert set(EXCEPTIONS) - set(found) == set(), "these pass now: remove them"


# --- the interface --------------------------------------------------------------------------------------------------


def test_a_node_runs_alone() -> None:
    x = np.array([[1.0, -2.0], [3.0, 4.0]], np.float32)
    (y,) = backend.run_node(helper.make_node("Relu", ["x"], ["y"]), [x])
    assert y.tolist() == [[1.0, 0.0], [3.0, 4.0]]
    assert backend.supports_device("CPU")
    assert not backend.supports_device("CUDA")


def reshaping() -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [6])
    shape = helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [2])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "shape"], ["y"])], "g", [x, shape], [y])
    return helper.make_model(graph)


def test_sizes_given_as_inputs_are_captured_again_when_they_change() -> None:
    prepared: Any = backend.prepare(reshaping())
    x = np.arange(6, dtype=np.float32)
    for shape in ([2, 3], [3, 2], [2, 3]):
        (y,) = prepared.run([x, np.array(shape)])
        assert list(y.shape) == shape
        assert np.array_equal(y.reshape(-1), x)
    (y,) = backend.run_model(reshaping(), {"shape": np.array([6, 1]), "x": x})
    assert y.shape == (6, 1)
