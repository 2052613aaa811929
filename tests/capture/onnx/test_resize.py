"""Resize and Upsample with the numbers of a file, against ONNX Runtime; the node tests have them as inputs."""

from __future__ import annotations

from typing import Any

import pytest
from onnx_graphs import agree, model, node, numbers, ops

CASES: dict[str, dict[str, Any]] = {
    "nearest": {"mode": "nearest"},
    "linear": {"mode": "linear"},
    "cubic": {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel"},
    "smooth": {"mode": "linear", "antialias": 1},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scales", [[1.0, 1.0, 0.5, 2.0], [1.0, 1.0, 1.6, 0.7]])
def test_sizes_change_by_scales_of_the_file(name: str, scales: list[float]) -> None:
    shape = (2, 3, 7, 8)
    agree(model([node("Resize", "x _ scales", "y", **CASES[name])], shape, scales=scales), numbers(*shape))


def test_a_batch_that_keeps_its_size_may_be_dynamic() -> None:
    content = model([node("Resize", "x _ scales", "y", mode="linear")], ["b", 2, 4, 4], scales=[1.0, 1.0, 2.0, 2.0])
    agree(content, numbers(2, 2, 4, 4), numbers(5, 2, 4, 4))


def test_sizes_that_are_there_already_leave_no_trace() -> None:
    nodes = [node("Shape", "x", "sizes"), node("Resize", "x _ _ sizes", "y", mode="linear")]
    assert ops(agree(model(nodes, ["b", "n", 4]), numbers(2, 3, 4), numbers(3, 5, 4))) == []


def test_upsample_of_old_versions() -> None:
    nodes = [node("Upsample", "x scales", "y", mode="nearest")]
    agree(model(nodes, (1, 1, 3, 2), opset=9, scales=[1.0, 1.0, 2.0, 3.0]), numbers(1, 1, 3, 2))
