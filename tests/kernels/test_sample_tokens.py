"""sample_tokens against its definition in rational numbers, and what must hold at its edges."""

from __future__ import annotations

import pytest
import torch
from selection_oracle import sample_row

from tamis.counts import CountRule, at_most, keep_at_least
from tamis.kernels.sample_tokens import reference as sample

KEEP_ONE = (1, -1, 1)


def drawn(kind: str, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Weights as attention has them (few matter), or few different ones."""
    if kind == "ties":
        return torch.randint(0, 4, (3, tokens), generator=generator).float()
    return torch.rand(3, tokens, generator=generator) ** 8


@pytest.mark.parametrize("padding", ["none", "right", "left", "anywhere"])
@pytest.mark.parametrize("kind", ["attention", "ties"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_sample_equals_the_definition(padding, kind, prefix):
    generator = torch.Generator().manual_seed(prefix)
    for case in range(25):
        tokens = int(torch.randint(max(prefix, 1), 24, (1,), generator=generator))
        rule = CountRule(prefix, ((at_most(case % 7), keep_at_least(0.6))[case % 2], KEEP_ONE))
        weights, points = drawn(kind, tokens, generator), (0, 1, 50)[case % 3]
        valid = torch.arange(tokens) < torch.randint(0, tokens + 1, (3, 1), generator=generator)
        if padding == "anywhere":
            valid = valid[:, torch.randperm(tokens, generator=generator)]
        valid = {"none": torch.ones_like(valid), "left": valid.flip(1)}.get(padding, valid)
        out = rule.out(tokens)
        rows = [sample_row(weights[i].tolist(), valid[i].tolist(), out, rule, points) for i in range(3)]
        got = sample(weights, None if padding == "none" else valid, out, prefix, rule.flat(), points)
        for mine, expected in zip(got, zip(*rows, strict=True), strict=True):
            assert mine.tolist() == list(expected)


@pytest.mark.parametrize("tokens", [2, 3, 8, 197])
def test_of_equal_weights_all_but_the_first_are_kept(tokens):
    slot, leader, valid = sample(torch.full((1, tokens), 0.3), None, tokens, 0, CountRule(0, (at_most(0),)).flat(), 0)
    assert leader[0, : tokens - 1].tolist() == list(range(1, tokens))
    assert valid[0].tolist() == [True] * (tokens - 1) + [False]
    assert slot[0, 0] == -1


def test_the_least_significant_token_is_never_kept():
    rule = CountRule(1, (at_most(0),)).flat()
    weights = torch.rand(2000, 20, generator=torch.Generator().manual_seed(0)) ** 4
    slot, _, valid = sample(weights, None, 20, 1, rule, 300)
    lightest, heaviest = 1 + weights[:, 1:].argmin(1, keepdim=True), 1 + weights[:, 1:].argmax(1, keepdim=True)
    assert (slot.gather(1, lightest) == -1).all()
    assert torch.equal(slot.gather(1, heaviest), valid.sum(1, keepdim=True) - 1)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, -1.0])
def test_a_row_without_weights_counts_them_as_equal(bad):
    rule, weights = CountRule(1, (at_most(3), KEEP_ONE)), torch.full((1, 9), bad)
    expected = sample(torch.ones(1, 9), None, 6, 1, rule.flat(), 0)
    assert all(torch.equal(a, b) for a, b in zip(sample(weights, None, 6, 1, rule.flat(), 0), expected, strict=True))
    weights[0, 4] = 2.0
    assert sample(weights, None, 6, 1, rule.flat(), 0)[1].tolist() == [[0, 4, 0, 0, 0, 0]]


def test_beside_a_token_that_holds_all_the_weight_the_ends_of_the_others_are_kept():
    """The lowest point is at the second lightest; those below one half are nearest to the last of the light ones."""
    weights = torch.tensor([[5.0, *[1e-9] * 20, 1.0, *[1e-9] * 20]])
    _, leader, valid = sample(weights, None, 32, 1, CountRule(1, (at_most(10), KEEP_ONE)).flat(), 0)
    assert leader[valid].tolist() == [0, 2, 41, 21]
