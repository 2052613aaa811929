"""Every op with kernels, in Triton's interpreter, on each of its samples, against its reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budgets import assert_within_budget, in_float64, results
from kinds import one_of_each_kind
from twins import CASES, every_sample, spread

from tamis.kernels.triton.launch import run


@pytest.fixture(autouse=True)
def poison():
    """Memory that a kernel does not write holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


_answers: dict[int, Any] = {}


def answer(twin, args):
    """What the kernels make of a sample of CASES, which outlives this: both tests need it, and it is slow."""
    if id(args) not in _answers:
        _answers[id(args)] = run(twin, *args)
    return _answers[id(args)]


@every_sample
def test_equals_float64(op, twin, args):
    assert_within_budget(answer(twin, args), op.reference(*args), op.reference(*in_float64(args)))


@pytest.mark.parametrize(("op", "twin", "args"), one_of_each_kind(CASES))
def test_strides_are_honoured(op, twin, args):
    other = [spread(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    for got, expected in zip(results(run(twin, *other)), results(answer(twin, args)), strict=True):
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
