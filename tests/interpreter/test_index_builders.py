"""Builders of attention indices, as kernels, where samples do not reach."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from budgets import assert_within_budget

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.kernels.probe_chunks import LOWEST
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


def prompt(seed: int, head_size: int) -> tuple[Any, ...]:
    """More queries and more chunks than a program takes at once; starts below 0 and behind the last token."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tokens, chunk, block = draw.randint(30, 40), draw.choice([3, 8]), draw.choice([11, 16])
    q, k = (torch.randn(2, heads, tokens, head_size, generator=generator) for heads in (4, 2))
    starts = torch.randint(-2, tokens + 2, (2, 1, 1, 17), generator=generator)
    lengths = torch.tensor([tokens, 23]) if draw.random() < 0.5 else None
    share = ("query", "kv", "layer")[seed % 3]
    return q, k, starts, lengths, chunk, draw.randint(1, 2), block, draw.randint(1, 6), share, draw.choice([0, 9])


@pytest.mark.parametrize("seed", range(3))
def test_probed_chunks_equal_the_reference_with_its_ties(seed: int) -> None:
    """Products of small whole numbers are exact, so every half gone on with is the reference's, equals too."""
    q, k, *rest = prompt(seed, (8, 24)[seed % 2])
    q, k = q.round(), k.round()
    assert torch.equal(kernel("probe_chunks", q, k, *rest), OPS["probe_chunks"].reference(q, k, *rest))


@pytest.mark.parametrize("seed", [1, 2])
def test_scores_of_chunks_equal_float64(seed: int) -> None:
    q, k, *rest = prompt(seed, 80)
    reference = OPS["probe_chunks"].reference
    got, usual, exact = (
        kernel("probe_chunks", q, k, *rest),
        reference(q, k, *rest),
        reference(q.double(), k.double(), *rest),
    )
    met = exact > LOWEST
    assert torch.equal(met, got > LOWEST)
    assert 0 < met.sum() < met.numel()
    assert_within_budget(got[met], usual[met], exact[met])
