"""Weights of a few bits, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_node import Case, got, program_of, want
from torch import Tensor

from tamis.capture.onnx.module import OnnxModule
from tamis.capture.onnx.reader import from_proto
from tamis.onnx_errors import NodeFailed

GENERATOR = torch.Generator().manual_seed(1)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def packed(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=GENERATOR).to(torch.uint8)


def product(
    bits: int = 4,
    rows: int = 6,
    columns: int = 64,
    block: int = 32,
    zeros: str = "",
    groups: bool = False,
    bias: bool = False,
    constants: range = range(1, 6),
    **kw: Any,
) -> Case:
    blocks = -(-columns // block)
    inputs = [
        floats(2, 3, columns),
        packed(rows, blocks, block * bits // 8),
        floats(rows, blocks).abs() * 0.1,
        {"": None, "packed": packed(rows, -(-blocks * bits // 8)), "floats": floats(rows, blocks).abs() * 8}[zeros],
        (torch.arange(columns) % blocks).to(torch.int32) if groups else None,
        floats(rows) if bias else None,
    ]
    attributes = {"K": columns, "N": rows, "block_size": block, "bits": bits, **kw}
    return Case("MatMulNBits", inputs, attributes, constants=constants)


CASES = {
    "4 bits": product(),
    "4 bits, zero points": product(zeros="packed"),
    "4 bits, an odd number of blocks": product(columns=96, zeros="packed"),
    "4 bits, zero points that are floats": product(zeros="floats"),
    "4 bits, a last block that is cut off": product(columns=80),
    "4 bits, blocks of 16, bias": product(block=16, zeros="packed", bias=True),
    "4 bits, columns out of order": product(groups=True),
    "4 bits, columns out of order, zero points": product(groups=True, zeros="floats"),
    "8 bits": product(8),
    "8 bits, zero points": product(8, zeros="packed", bias=True),
    "2 bits": product(2, zeros="packed"),
    "a weight that is given": product(zeros="packed", constants=range(0)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_product_with_a_packed_weight(name: str) -> None:
    (result,), (expected,) = got(CASES[name]), want(CASES[name])
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_packed_zero_points_of_columns_out_of_order() -> None:
    """ONNX Runtime 1.31 leaves them out there, without a word; as floats it takes the same ones."""
    case = product(groups=True, zeros="packed")
    zeros = case.inputs[3]
    assert zeros is not None
    apart = torch.cat([zeros & 15, zeros >> 4], 1).float()
    as_floats = Case(case.op, [*case.inputs[:3], apart, case.inputs[4]], case.attributes, constants=range(1, 5))
    np.testing.assert_allclose(got(case)[0], want(as_floats)[0], rtol=1e-5, atol=1e-4)


def test_the_weight_is_unpacked_once_when_the_file_is_read() -> None:
    case = CASES["4 bits, zero points"]
    module = OnnxModule(from_proto(case.model(), "m.onnx", Path()))
    assert [(tuple(one.shape), one.dtype) for one in module.state_dict().values()] == [((6, 64), torch.float32)]
    called = [node.target for node in program_of(case).graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.linear.default]


@pytest.mark.parametrize(
    "wrong", [{"N": 7}, {"K": 100}, {"K": -1}, {"N": 0, "K": 2**40}, {"block_size": 0}, {"bits": 3}]
)
def test_a_weight_of_other_sizes_is_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(NodeFailed, match=r"the_node \(MatMulNBits\)"):
        got(product(zeros="packed", **wrong))


def test_the_sizes_are_told() -> None:
    with pytest.raises(NodeFailed, match=r"sizes \[6, 2, 16\], which are not those of \[7, 64\]"):
        got(product(zeros="packed", N=7))
