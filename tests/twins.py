"""Every op that has kernels, with each of its samples that the kernels serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.kernels.triton import twin_of
from tamis.op import OPS

CASES = [
    pytest.param(op, twin, args, id=f"{name}-{i}")
    for name, op in OPS.items()
    if (twin := twin_of(op))
    for i, args in enumerate(op.samples())
    if not twin.why_not(*args)
]
every_sample = pytest.mark.parametrize(("op", "twin", "args"), CASES)
_filled = {  # an example of each op that is not empty
    case.values[0].name: case for case in CASES if all(arg.numel() for arg in case.values[2][:1])
}
one_sample = pytest.mark.parametrize(("op", "twin", "args"), list(_filled.values()))


def spread(x: torch.Tensor) -> torch.Tensor:
    """Equal to x, with gaps between the elements and the axes stored in reverse order."""
    storage = x.new_zeros([2 * size for size in reversed(x.shape)])
    view: Any = storage.permute(*reversed(range(x.dim())))[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)
