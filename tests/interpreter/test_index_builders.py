"""Builders of attention indices, as kernels, where samples do not reach."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.kernels.triton import twin_of
from tamis.kernels.triton.launch import run
from tamis.op import OPS


def kernel(name: str, *args: Any) -> Any:
    twin = twin_of(OPS[name])
    assert twin is not None
    assert not twin.why_not(*args)
    return run(twin, *args)


def lists(draw: random.Random, count: int, size: int, below: int, always: list[int]) -> torch.Tensor:
    """[1, count, size] ascending, -1 last; `always` among them."""
    found = []
    for _ in range(count):
        some = draw.sample(range(below), draw.randint(0, min(below, size - len(always))))
        one = sorted({*always, *some})
        found.append(one + [-1] * (size - len(one)))
    return torch.tensor(found, dtype=torch.int64).reshape(1, count, size)


@pytest.mark.parametrize("seed", range(10))
def test_slash_tiles_equal_the_reference(seed: int) -> None:
    """Lists with unused entries, and entries beyond the last token."""
    draw = random.Random(seed)
    tokens, block = draw.randint(1, 60), draw.randint(1, 9)
    distances = lists(draw, 3, draw.randint(1, 12), tokens + 3, [0])
    columns = lists(draw, 3, draw.randint(0, 7), tokens + 9, [])
    got = kernel("slash_tiles", distances, columns, tokens, block)
    for have, expected in zip(got, OPS["slash_tiles"].reference(distances, columns, tokens, block), strict=True):
        assert torch.equal(have, expected)
