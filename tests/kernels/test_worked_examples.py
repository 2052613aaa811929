"""The worked examples of the method cards, to the digit."""

from __future__ import annotations

import pytest
import torch

from tamis.counts import ALL, HALF, CountRule, at_most, keep_at_least
from tamis.kernels.bipartite_match import reference as match
from tamis.kernels.reduce_tokens import reference as reduce
from tamis.kernels.select_tokens import reference as select

ANGLES = torch.deg2rad(torch.tensor([0.0, 10, 90, 95, 180, 200]))
KEYS = torch.stack([ANGLES.cos(), ANGLES.sin()], 1).unsqueeze(0)
X = torch.tensor([[[1.0, 0], [3, 0], [0, 2], [0, 4], [-1, 0], [-5, 2]]])
SIZES = torch.tensor([[1.0, 2, 1, 1, 3, 1]])

TOME = [  # r, protected, tokens after, sizes after
    (1, 0, [(1, 0), (-1, 0), (3, 0), (0, 3), (-5, 2)], [1, 3, 2, 2, 1]),
    (2, 0, [(-1, 0), (7 / 3, 0), (0, 3), (-5, 2)], [3, 3, 2, 1]),
    (2, 1, [(1, 0), (3, 0), (0, 3), (-2, 0.5)], [1, 2, 2, 4]),
]


@pytest.mark.parametrize(("r", "prefix", "tokens", "sizes"), TOME)
@pytest.mark.parametrize("padded", [False, True])
def test_tome(r, prefix, tokens, sizes, padded):
    rule = CountRule(prefix, (at_most(r), HALF))
    valid = torch.ones(1, 6, dtype=torch.bool) if padded else None
    slot, leader, moved = match(KEYS, valid, rule.out(6), prefix, rule.flat())
    out = reduce(X, slot, leader, moved, SIZES, True)
    torch.testing.assert_close(out, torch.tensor([tokens], dtype=torch.float32), rtol=1e-6, atol=1e-7)
    after = reduce(SIZES.unsqueeze(2), slot, leader, moved, None, False).squeeze(2)
    assert after.tolist() == [sizes]
    assert (out * after.unsqueeze(2)).sum(1).tolist() == [[-1.0, 8.0]]


EVIT_SCORES = torch.tensor([[0.0, 0.05, 0.30, 0.10, 0.25, 0.02]])
EVIT_X = torch.tensor([[[9.0, 9], [1, 0], [0, 1], [2, 2], [3, -1], [10, 10]]])


@pytest.mark.parametrize(("normalize", "fused"), [(False, (0.25, 0.2)), (True, (3.5714, 2.8571))])
@pytest.mark.parametrize("padded", [False, True])
def test_evit(normalize, fused, padded):
    rule = CountRule(1, (keep_at_least(0.5), ALL), added=1)
    valid = torch.ones(1, 6, dtype=torch.bool) if padded else None
    slot, leader, moved = select(EVIT_SCORES, valid, rule.out(6), 1, rule.flat(), "score", True)
    weight = torch.where(slot == rule.out(6) - 1, EVIT_SCORES, 1.0)
    out = reduce(EVIT_X, slot, leader, moved, weight, normalize)
    assert out[0, :4].tolist() == [[9, 9], [0, 1], [3, -1], [2, 2]]
    torch.testing.assert_close(out[0, 4], torch.tensor(fused), rtol=0, atol=5e-5)


def test_evit_counts():
    for ratio, counts in [(0.9, [179, 163, 148]), (0.7, [140, 100, 72]), (0.5, [100, 52, 28])]:
        tokens, got = 197, []
        for _ in range(3):
            tokens = CountRule(1, (keep_at_least(ratio), ALL), added=1).out(tokens)
            got.append(tokens)
        assert got == counts
