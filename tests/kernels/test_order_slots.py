"""order_slots against its definition, one slot at a time."""

from __future__ import annotations

import pytest
import torch

from tamis.kernels.order_slots import reference as order


def defined(slot: list[int], out: int, spare: int) -> tuple[list[int], list[int], list[int]]:
    """slot, leader and moved of one row."""
    groups = [[i for i, j in enumerate(slot) if j == k] for k in range(out)]
    groups = sorted((group for group in groups if group), key=max)
    number = {i: k for k, group in enumerate(groups) for i in group}
    leaders = [max(group) for group in groups]
    moved = sorted(i for group in groups for i in group[:-1])
    padded = leaders + [0] * (out - len(leaders))
    return [number.get(i, -1) for i in range(len(slot))], padded, moved + padded[:1] * (spare - len(moved))


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(1, 12, (1,), generator=generator))
    out = int(torch.randint(1, tokens + 1, (1,), generator=generator))
    slot = torch.randint(-1, out, (4, tokens), generator=generator)
    got = order(slot, torch.zeros(4, out, dtype=torch.int64), torch.zeros(4, tokens, dtype=torch.int64))
    rows = zip(*(defined(row, out, tokens) for row in slot.tolist()), strict=True)
    for mine, expected in zip(got, rows, strict=True):
        assert mine.tolist() == list(expected)


def test_slots_in_order_stay_as_they_are() -> None:
    slot = torch.tensor([[0, 1, 1, 2, -1, 3]])
    got, leader, moved = order(slot, torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    assert got.tolist() == slot.tolist()
    assert leader.tolist() == [[0, 2, 3, 5]]
    assert moved.tolist() == [[1, 0]]
