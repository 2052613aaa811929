"""Every op with kernels, in Triton's interpreter, on each of its samples, against its reference in float64."""

from __future__ import annotations

import pytest
import torch
from budgets import assert_within_budget, in_float64, results
from twins import every_sample, spread

from tamis.kernels.triton.launch import run


@pytest.fixture(autouse=True)
def poison():
    """Memory that a kernel does not write holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@every_sample
def test_equals_float64(op, twin, args):
    assert_within_budget(run(twin, *args), op.reference(*args), op.reference(*in_float64(args)))


@every_sample
def test_strides_are_honoured(op, twin, args):
    other = [spread(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    for got, expected in zip(results(run(twin, *other)), results(run(twin, *args)), strict=True):
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
