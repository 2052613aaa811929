"""Every op with kernels, in Triton's interpreter, on each of its samples, against its reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budgets import assert_within_budget, in_float64, results

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.kernels.triton import twin_of
from tamis.kernels.triton.launch import run
from tamis.op import OPS

CASES = [
    pytest.param(op, twin, args, id=f"{name}-{i}")
    for name, op in OPS.items()
    if (twin := twin_of(op))
    for i, args in enumerate(op.samples())
    if not twin.why_not(*args)
]
every_sample = pytest.mark.parametrize(("op", "twin", "args"), CASES)


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
    spread = [_spread(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    for got, expected in zip(results(run(twin, *spread)), results(run(twin, *args)), strict=True):
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


def _spread(x: torch.Tensor) -> torch.Tensor:
    """Equal to x, with gaps between the elements and the axes stored in reverse order."""
    storage = x.new_zeros([2 * size for size in reversed(x.shape)])
    view: Any = storage.permute(*reversed(range(x.dim())))[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)
