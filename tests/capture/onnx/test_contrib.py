"""The operations that ONNX Runtime's transformer optimizer writes, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from tamis.capture.dims import Axes
from tamis.capture.export import export_module
from tamis.capture.onnx.module import OnnxModule
from tamis.capture.onnx.reader import from_proto

MS = "com.microsoft"
X, SQUARE, ROW = (2, 3, 4), (2, 4, 4), (4,)
CASES: dict[str, tuple[str, str, list[tuple[int, ...]], int, dict[str, Any]]] = {
    "FastGelu": (MS, "FastGelu", [X], 1, {}),
    "FastGelu with bias": (MS, "FastGelu", [X, ROW], 1, {}),
    "BiasGelu": (MS, "BiasGelu", [X, ROW], 1, {}),
    "Gelu": (MS, "Gelu", [X], 1, {}),
    "QuickGelu": (MS, "QuickGelu", [X], 1, {"alpha": 1.5}),
    "FusedMatMul": (MS, "FusedMatMul", [X, SQUARE], 1, {"alpha": 0.5, "transB": 1}),
    "FusedMatMul turned": (MS, "FusedMatMul", [SQUARE, SQUARE], 1, {"transA": 1}),
    "SkipLayerNormalization": (MS, "SkipLayerNormalization", [X, X, ROW, ROW, ROW], 4, {"epsilon": 1e-3}),
    "SkipLayerNormalization alone": (MS, "SkipLayerNormalization", [X, X, ROW], 1, {}),
    "SkipSimplifiedLayerNormalization": (MS, "SkipSimplifiedLayerNormalization", [X, X, ROW, ROW], 4, {}),
    "SimplifiedLayerNormalization": ("", "SimplifiedLayerNormalization", [X, ROW], 1, {"axis": -1, "epsilon": 1e-3}),
}


def model(
    domain: str, name: str, shapes: list[tuple[int, ...]], results: int, attributes: dict[str, Any]
) -> onnx.ModelProto:
    """One node; of four results, the first and the last are outputs."""
    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(shapes)]
    names = ["y", "", "", "total"][:results]
    node = helper.make_node(name, [one.name for one in inputs], names, domain=domain, **attributes)
    outputs = [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in names if one]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    return helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("case", CASES)
def test_an_operation_of_onnx_runtime(case: str) -> None:
    made = model(*CASES[case])
    generator = torch.Generator().manual_seed(1)
    xs = tuple(torch.randn(shape, generator=generator) for shape in CASES[case][2])
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, {f"x{i}": x.numpy() for i, x in enumerate(xs)})
    module = OnnxModule(from_proto(made, "m.onnx", Path()))
    program = export_module(module, xs, dynamic_shapes=Axes(tuple({} for _ in xs)))
    result = program.module()(*xs)
    got = list(result.values()) if isinstance(result, dict) else [result]
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-4, atol=1e-5)
