"""The worked examples of the method cards, to the digit."""

from __future__ import annotations

import pytest
import torch

from tamis.counts import ALL, HALF, CountRule, at_most, keep_at_least
from tamis.kernels.bipartite_match import reference as match
from tamis.kernels.energy_match import _energy
from tamis.kernels.energy_match import reference as energy_match
from tamis.kernels.reduce_tokens import reference as reduce
from tamis.kernels.sample_tokens import reference as sample
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


PITOME_ANGLES = torch.deg2rad(torch.tensor([0.0, 0, 8, 16, 100, 104, 220]))  # the first is the class token's
PITOME_KEYS = torch.stack([PITOME_ANGLES.cos(), PITOME_ANGLES.sin()], 1).unsqueeze(0)
PITOME_X = torch.tensor([[[9.0, 9], [1, 0], [2, 0], [3, 0], [0, 1], [0, 3], [-4, -4]]])
PITOME = [  # keep_ratio, tokens after, sizes after
    (0.67, [(9, 9), (1, 0), (0, 1), (0, 3), (-4, -4), (2.5, 0)], [1, 1, 1, 1, 1, 2]),
    (0.66, [(9, 9), (0, 3), (-4, -4), (2, 0), (0, 1)], [1, 1, 1, 3, 1]),
]


@pytest.mark.parametrize(("keep_ratio", "tokens", "sizes"), PITOME)
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_pitome(keep_ratio, tokens, sizes, paper, padded):
    rule = CountRule(1, (keep_at_least(keep_ratio), HALF))
    valid = torch.ones(1, 7, dtype=torch.bool) if padded else None
    plan = energy_match(PITOME_KEYS, valid, rule.out(7), 1, rule.flat(), 0.75, 1.0, paper, False)
    out = reduce(PITOME_X, *plan, None, True)
    torch.testing.assert_close(out, torch.tensor([tokens], dtype=torch.float32), rtol=1e-6, atol=1e-7)
    assert reduce(torch.ones(1, 7, 1), *plan, None, False).flatten().tolist() == sizes


def test_pitome_energies():
    keys, free = PITOME_KEYS.double(), torch.tensor([[False] + [True] * 6])
    similarity = keys @ keys.transpose(1, 2)
    for paper, expected in [
        (False, [-0.218493, -0.197587, -0.182574, -0.306380, -0.318705, -0.591240]),
        (True, [0.156507, 0.177413, 0.192426, -0.05638, -0.068705, -0.46624]),
    ]:
        got = _energy(similarity, free, 0.75, 1.0, paper)[0, 1:]
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e5])
def test_ats(padded, scale):
    weights = torch.tensor([[7.0, 0.05, 0.30, 0.10, 0.25, 0.02, 0.28]]) * scale
    rule = CountRule(1, (at_most(0),))
    valid = torch.ones(1, 7, dtype=torch.bool) if padded else None
    for points in (0, 6):
        slot, leader, held = sample(weights, valid, 7, 1, rule.flat(), points)
        assert leader[held].tolist() == [0, 1, 3, 4, 6, 2]
        assert slot.tolist() == [[0, 1, 5, 2, 3, -1, 4]]
    assert sample(weights, valid, 4, 1, CountRule(1, (at_most(3),)).flat(), 0)[1].tolist() == [[0, 1, 4, 2]]
