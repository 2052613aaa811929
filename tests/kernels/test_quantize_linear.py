"""quantize_linear against its definition in Python's integers, at the limits of types that narrow floats have not."""

from __future__ import annotations

import math

import pytest
import torch

from tamis.kernels.quantize_linear import reference

INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def definition(x: torch.Tensor, scale: torch.Tensor, zero: int, dtype: torch.dtype) -> list[int]:
    """The quotient in x's type, all else exact."""
    limits = torch.iinfo(dtype)
    quotients = [min(max(number, -(2.0**70)), 2.0**70) for number in (x / scale).tolist()]
    return [min(max(round(number) + zero, limits.min), limits.max) for number in quotients]


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_what_is_beyond_a_type_becomes_its_limit(dtype, kind):
    x = torch.tensor([60000.0, -60000.0, 40000.0, -33000.0, 100.0, -0.75, 1000.0, math.inf, -math.inf]).to(kind)
    for step in (2.0**-16, 0.5, 1.0):
        scale = torch.tensor(step, dtype=kind)
        for zero in (None, 0, 100):
            point = None if zero is None else torch.tensor(zero, dtype=dtype)
            got = reference(x, scale, point, 0, 0, dtype)
            assert got.dtype == dtype
            assert got.tolist() == definition(x, scale, zero or 0, dtype)


def test_a_zero_point_is_added_exactly():
    """2000 + 49 is no float16."""
    x = torch.tensor([1000.0, 2.0], dtype=torch.float16)
    got = reference(x, torch.tensor(0.5).half(), torch.tensor(49, dtype=torch.int16), 0, 0, torch.int16)
    assert got.tolist() == [2049, 53]
