"""bipartite_match and select_tokens against a slow definition, and what must hold at their edges."""

from __future__ import annotations

import pytest
import torch
from selection_oracle import energy_row, match_row, select_row

from tamis.counts import ALL, HALF, CountRule, at_most, keep_at_least
from tamis.kernels.bipartite_match import reference as match
from tamis.kernels.energy_match import reference as energy_match
from tamis.kernels.reduce_tokens import reference as reduce
from tamis.kernels.select_tokens import reference as select

PADDING = ["none", "right", "left", "anywhere"]


def mask(kind: str, batch: int, tokens: int, least: int, generator: torch.Generator) -> torch.Tensor:
    real = torch.randint(least, tokens + 1, (batch, 1), generator=generator)
    place = torch.arange(tokens).expand(batch, tokens)
    if kind == "anywhere":
        place = torch.rand(batch, tokens, generator=generator).argsort(1).argsort(1)
    return place >= tokens - real if kind == "left" else place < real


def coarse_vectors(batch: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Vectors whose unit vectors and products are exact in float32, so that ties are ties in any order of summation."""
    axis = torch.randint(0, 4, (batch, tokens), generator=generator)
    sign = torch.randint(0, 2, (batch, tokens), generator=generator) * 2 - 1
    pair = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [2, 0, 0, 0], [0, 0, 4, 0]])
    return pair[axis] * sign.unsqueeze(2)


def plan_of_rows(rows) -> list[torch.Tensor]:
    return [torch.tensor(part, dtype=torch.int64).reshape(len(part), -1) for part in zip(*rows, strict=True)]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_match_equals_the_definition(padding, kind, prefix):
    generator = torch.Generator().manual_seed(prefix)
    for case in range(25):
        tokens = int(torch.randint(max(prefix, 1), 24, (1,), generator=generator))
        rule = CountRule(prefix, ((at_most(case % 7), keep_at_least(0.7))[case % 2], HALF))
        if kind == "ties":
            metric = coarse_vectors(3, tokens, generator)
        else:
            metric = torch.randn(3, tokens, 8, generator=generator, dtype=torch.float64)
        valid = None if padding == "none" else mask(padding, 3, tokens, 0 if case % 3 else 1, generator)
        unit = metric / metric.norm(dim=-1, keepdim=True)
        similarity = (unit @ unit.transpose(1, 2)).tolist()
        real = torch.ones(3, tokens, dtype=torch.bool) if valid is None else valid
        rows = [match_row(similarity[i], real[i].tolist(), rule.out(tokens), rule) for i in range(3)]
        got = match(metric, valid, rule.out(tokens), prefix, rule.flat())
        for a, b in zip(got, plan_of_rows(rows), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_energy_match_equals_the_definition(padding, kind, halves, prefix):
    generator = torch.Generator().manual_seed(prefix)
    for case in range(20):
        tokens = int(torch.randint(max(prefix, 1), 24, (1,), generator=generator))
        rule = CountRule(prefix, ((at_most(case % 7), keep_at_least(0.7))[case % 2], HALF))
        if kind == "ties":
            metric = coarse_vectors(3, tokens, generator).double()
        else:
            metric = torch.randn(3, tokens, 4, generator=generator, dtype=torch.float64)
        valid = None if padding == "none" else mask(padding, 3, tokens, 0 if case % 3 else 1, generator)
        unit = metric / metric.norm(dim=-1, keepdim=True)
        similarity = (unit @ unit.transpose(1, 2)).tolist()
        real = torch.ones(3, tokens, dtype=torch.bool) if valid is None else valid
        how = 0.25, 1.0, case % 3 == 0, halves
        rows = [energy_row(similarity[i], real[i].tolist(), rule.out(tokens), rule, *how) for i in range(3)]
        got = energy_match(metric, valid, rule.out(tokens), prefix, rule.flat(), *how)
        if kind == "ties":  # sums of the same terms in another order differ in their last bits
            assert [part.shape for part in got] == [part.shape for part in plan_of_rows(rows)]
            continue
        told_apart = real.sum(1) != prefix + 2  # two tokens always have one energy
        for a, b in zip(got, plan_of_rows(rows), strict=True):
            assert torch.equal(a[told_apart], b[told_apart])


def test_energy_match_follows_tokens_wherever_they_stand():
    generator = torch.Generator().manual_seed(0)
    metric, rule = torch.randn(2, 19, 8, generator=generator, dtype=torch.float64), CountRule(1, (at_most(6), HALF))
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(18, generator=generator)])
    for halves in (False, True):
        how = rule.out(19), 1, rule.flat(), 0.3, 1.0, False, halves
        slot, leader, _ = energy_match(metric, None, *how)
        shuffled, shuffled_leader, _ = energy_match(metric[:, order], None, *how)
        assert torch.equal(shuffled, slot[:, order])
        assert torch.equal(order[shuffled_leader], leader)


def test_a_token_that_stands_alone_is_kept_and_the_larger_group_merges_first():
    group, other = torch.tensor([1.0, 0.02, 0]), torch.tensor([0, 1.0, 0.02])
    metric = torch.stack(
        [group, group + 0.01, group - 0.01, group + 0.02, other, other + 0.01, torch.tensor([0, 0, -1.0])]
    )
    rule = CountRule(0, (at_most(2), HALF))
    _, leader, moved = energy_match(metric.unsqueeze(0), None, rule.out(7), 0, rule.flat(), 0.9, 1.0, False, False)
    assert set(moved[0].tolist()) <= {0, 1, 2, 3}
    assert 6 in leader[0].tolist()


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("order", ["original", "score"])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_select_equals_the_definition(padding, order, fuse, prefix):
    generator = torch.Generator().manual_seed(prefix)
    for case in range(20):
        tokens = int(torch.randint(max(prefix, 1), 24, (1,), generator=generator))
        rule = CountRule(prefix, ((at_most(case % 7), keep_at_least(0.7))[case % 2], ALL), added=int(fuse))
        scores = torch.randint(0, (5, 10**9)[case % 3 == 0], (3, tokens), generator=generator)
        if case % 4 == 1:
            scores = torch.where(scores == 0, -torch.inf, torch.where(scores == 4, torch.inf, scores.float()))
        valid = None if padding == "none" else mask(padding, 3, tokens, 0 if case % 3 else 1, generator)
        real = torch.ones(3, tokens, dtype=torch.bool) if valid is None else valid
        out = rule.out(tokens)
        rows = [select_row(scores[i].tolist(), real[i].tolist(), out, rule, order, fuse) for i in range(3)]
        got = select(scores, valid, out, prefix, rule.flat(), order, fuse)
        for a, b in zip(got, plan_of_rows(rows), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_padded_row_is_reduced_as_it_would_be_alone(padding):
    generator = torch.Generator().manual_seed(0)
    rule = CountRule(1, (at_most(4), HALF))
    x, sizes = torch.randn(5, 15, 6, generator=generator), torch.randint(1, 5, (5, 15), generator=generator).float()
    valid = mask(padding, 5, 15, 2, generator)
    slot, leader, moved = match(x, valid, rule.out(15), 1, rule.flat())
    together = reduce(x, slot, leader, moved, sizes, True)
    for i in range(5):
        row, count = x[i : i + 1, valid[i]], int(valid[i].sum())
        plan = match(row, None, rule.out(count), 1, rule.flat())
        assert torch.equal(slot[i : i + 1, valid[i]], plan[0])
        alone = reduce(row, *plan, sizes[i : i + 1, valid[i]], True)
        assert torch.equal(together[i : i + 1, : rule.out(count)], alone)


def test_padding_may_hold_anything():
    generator = torch.Generator().manual_seed(0)
    rule = CountRule(1, (at_most(3), HALF))
    x, valid = torch.randn(2, 11, 4, generator=generator), torch.arange(11) < torch.tensor([[7], [11]])
    clean = match(x, valid, 8, 1, rule.flat())
    for poison in (torch.nan, torch.inf, 0.0):
        poisoned = torch.where(valid.unsqueeze(2), x, poison)
        assert all(torch.equal(a, b) for a, b in zip(match(poisoned, valid, 8, 1, rule.flat()), clean, strict=True))
        kept = reduce(poisoned, *clean, None, True)
        assert torch.equal(kept[0, : rule.out(7)], reduce(x, *clean, None, True)[0, : rule.out(7)])
        scores = torch.where(valid, x[..., 0], poison)
        chosen = select(scores, valid, 8, 1, rule.flat(), "original", False)
        plain = select(x[..., 0], valid, 8, 1, rule.flat(), "original", False)
        assert all(torch.equal(a, b) for a, b in zip(chosen, plain, strict=True))


@pytest.mark.parametrize("tokens", [9, 50, 197])
@pytest.mark.parametrize("width", [3, 64])
def test_equal_tokens_all_choose_the_first_of_b(tokens, width):
    metric = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(1)).expand(2, tokens, width)
    slot, leader, moved = match(metric, None, tokens - 3, 1, CountRule(1, (at_most(3), HALF)).flat())
    first_of_b = slot[:, 1:2]
    assert torch.equal(moved, torch.tensor([[2, 4, 6]] * 2))
    assert torch.equal(slot.gather(1, moved), first_of_b.expand(2, 3))
    assert leader.gather(1, first_of_b).tolist() == [[1], [1]]


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_a_token_without_direction_disturbs_no_other(bad):
    """The published code turns every similarity into NaN."""
    metric = torch.tensor([[[1.0, 0], [0, 1], [1, 0.1], [1, 0.1], [0, 1], [1, 1]]])
    metric[0, 5] = bad
    _, _, moved = match(metric, None, 4, 1, CountRule(1, (at_most(2), HALF)).flat())
    assert moved.tolist() == [[2, 4]]
    slot, _, _ = match(metric, None, 4, 1, CountRule(1, (at_most(2), HALF)).flat())
    assert slot.tolist() == [[0, 1, 2, 2, 1, 3]]


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_the_shortest_rows(prefix, padded):
    """P, P+1, P+2 and P+3 tokens: none, none, one and one can merge."""
    rule = CountRule(prefix, (at_most(9), HALF))
    for extra, removed in enumerate((0, 0, 1, 1)):
        tokens = prefix + extra
        if not tokens:
            continue
        metric = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(extra))
        valid = torch.ones(2, tokens, dtype=torch.bool) if padded else None
        slot, leader, moved = match(metric, valid, tokens - removed, prefix, rule.flat())
        assert (leader.shape[1], moved.shape[1]) == (tokens - removed, removed)
        assert torch.equal(slot[:, :prefix], torch.arange(prefix).expand(2, -1))
        assert torch.equal(slot.gather(1, leader), torch.arange(tokens - removed).expand(2, -1))


def test_nan_scores_are_the_first_to_go():
    scores = torch.tensor([[0.0, torch.nan, 1.0, -5.0]])
    slot, leader, _ = select(scores, None, 3, 0, CountRule(0, (at_most(1), ALL)).flat(), "original", False)
    assert slot.tolist() == [[0, -1, 1, 2]]
    assert leader.tolist() == [[0, 2, 3]]
