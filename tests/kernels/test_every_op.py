"""What holds for every op on every one of its samples."""

from __future__ import annotations

import pytest
import tamis.kernels  # noqa: F401  (registers the ops)
import torch
from onnx_call import run_call
from tamis.op import OPS
from torch.fx.experimental.proxy_tensor import make_fx

CASES = [pytest.param(op, i, id=f"{name}-{i}") for name, op in OPS.items() for i, _ in enumerate(op.samples())]


def sample(op, index):
    return list(op.samples())[index]


def results(value):
    return [torch.as_tensor(x) for x in (value if isinstance(value, tuple) else (value,))]


@pytest.mark.parametrize(("op", "index"), CASES)
def test_onnx_runtime_equals_the_reference(op, index):
    args = sample(op, index)
    expected = results(op.reference(*args))
    got = run_call(op.onnx(*args), expected)
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.is_floating_point():
            tolerance = 1e-6 if a.dtype == torch.float32 else 1e-3
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(a, b)
