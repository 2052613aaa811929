"""Small ONNX graphs around one node that tamis has no function for, each with inputs for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import helper, numpy_helper
from onnx_graphs import FLOAT, Node, node, numbers
from opaque_files import MS, unknown

X = ["b", "n", 4]
HERE = (numbers(2, 6, 4), numbers(3, 9, 4), numbers(1, 5, 4))


def graph(nodes: list[Node], rank: int, shape: list[Any] | None = None, opset: int = 18, **constants: Any) -> Any:
    """x -> y, with constants; the types of the values between are nowhere said."""
    tensors = [
        numpy_helper.from_array(np.array(v, np.int64 if np.array(v).dtype.kind == "i" else np.float32), k)
        for k, v in constants.items()
    ]
    x = helper.make_tensor_value_info("x", FLOAT, X if shape is None else shape)
    y = helper.make_tensor_value_info("y", FLOAT, [None] * rank)
    made = helper.make_graph(nodes, "g", [x], [y], tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
    return helper.make_model(made, opset_imports=imports, ir_version=8)


WINDOWS = unknown("UnfoldTensor", ["x"], ["y"], "windows", dim=1, size=3, step=2)
RNG = np.random.default_rng(0)
CASES: dict[str, tuple[Any, tuple[torch.Tensor, ...]]] = {
    "windows": (graph([WINDOWS], 4), HERE),
    "with a weight": (
        graph(
            [node("ReduceMean", "x one", "m", keepdims=0), unknown("CDist", ["m", "w"], ["y"], "distances")],
            2,
            w=RNG.standard_normal((5, 4)),
            one=[1],
        ),
        HERE,
    ),
    "with a small constant": (graph([unknown("Trilu", ["x", "k"], ["y"], "upper")], 3, k=1), HERE),
    "flat": (graph([node("Reshape", "x s", "f"), unknown("CDist", ["f", "f"], ["y"], "d")], 2, s=[-1, 4]), HERE),
    "with inputs left out": (
        graph(
            [
                node("Transpose", "x", "t", perm=[1, 0, 2]),
                node("LSTM", "t w r _ _ h", "all y", hidden_size=3),
            ],
            3,
            [2, "n", 4],
            w=RNG.standard_normal((1, 12, 4)),
            r=RNG.standard_normal((1, 12, 3)),
            h=RNG.standard_normal((1, 2, 3)),
        ),
        (numbers(2, 6, 4),),
    ),
    "as many as there are different ones": (
        graph(
            [node("Round", "x", "r"), helper.make_node("Unique", ["r"], ["u", "", "", "c"]), node("Neg", "u", "y")], 1
        ),
        HERE,
    ),
    "to sizes that were computed": (
        graph(
            [
                node("Shape", "x", "sizes", start=1, end=2),
                node("Sub", "sizes one", "fewer"),
                node("CenterCropPad", "x fewer", "y", axes=[1]),
            ],
            3,
            one=[1],
        ),
        HERE,
    ),
}
