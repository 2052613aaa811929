"""reduce_tokens and restore_tokens: arithmetic given a plan."""

from __future__ import annotations

import pytest
import torch

from tamis.counts import HALF, CountRule, at_most
from tamis.kernels.bipartite_match import reference as match
from tamis.kernels.reduce_tokens import reference as reduce
from tamis.kernels.restore_tokens import reference as restore

RULE = CountRule(1, (at_most(6), HALF))


def plan(tokens: int = 31, batch: int = 3):
    generator = torch.Generator().manual_seed(tokens)
    metric = torch.randn(batch, tokens, 8, generator=generator)
    valid = torch.arange(tokens) < torch.tensor([[tokens], [tokens // 2], [3]])[:batch]
    x = torch.randn(batch, tokens, 5, generator=generator)
    weight = torch.randint(1, 9, (batch, tokens), generator=generator).float()
    return x, weight, match(metric, valid, RULE.out(tokens), 1, RULE.flat()), valid


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_a_sum_over_slots(weighted, normalize):
    x, weight, (slot, leader, moved), _ = plan()
    w = weight if weighted else torch.ones_like(weight)
    got = reduce(x, slot, leader, moved, weight if weighted else None, normalize)
    member = (slot.unsqueeze(1) == torch.arange(leader.shape[1]).reshape(1, -1, 1)).double() * w.double().unsqueeze(1)
    expected = member @ x.double()
    used = member.sum(2) > 0
    if normalize:
        expected = expected / member.sum(2, keepdim=True)
    torch.testing.assert_close(got[used].double(), expected[used], rtol=1e-6, atol=1e-6)


def test_mass_is_conserved():
    x, weight, (slot, leader, moved), valid = plan()
    x, weight = x.double(), torch.where(valid, weight, 0.0).double()
    sizes = reduce(weight.unsqueeze(2), slot, leader, moved, None, False)
    slots = torch.arange(leader.shape[1]) < slot.amax(1, keepdim=True) + 1
    sizes = sizes * slots.unsqueeze(2)
    merged = reduce(x, slot, leader, moved, weight, True) * slots.unsqueeze(2)
    torch.testing.assert_close(sizes.sum(1).squeeze(1), weight.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close((sizes * merged).sum(1), (x * weight.unsqueeze(2)).sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_slot_of_one_token_is_a_copy(dtype):
    x, weight, (slot, leader, moved), _ = plan()
    x = x.to(dtype)
    goals = torch.zeros_like(leader, dtype=torch.bool).scatter(1, slot.gather(1, moved).clamp(min=0), True)
    copies = x.gather(1, leader.unsqueeze(2).expand(-1, -1, 5))
    for got in (reduce(x, slot, leader, moved, weight, True), reduce(x, slot, leader, moved, None, False)):
        assert torch.equal(got[~goals], copies[~goals])
        assert not torch.equal(got[goals], copies[goals])
    assert torch.equal(reduce(x, slot, leader, None, weight, True), copies)


def test_equal_tokens_merge_to_themselves_exactly():
    _, weight, (slot, leader, moved), _ = plan()
    x = torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(0)).expand(3, 31, 5)
    assert torch.equal(reduce(x, slot, leader, moved, weight, True), x[:, : leader.shape[1]])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("normalize", [False, True])
def test_poison_stays_in_its_slot(poison, normalize):
    x, weight, (slot, leader, moved), _ = plan()
    clean = reduce(x, slot, leader, moved, weight, normalize)
    for token in range(31):
        bad = x.clone()
        bad[0, token] = poison
        got = reduce(bad, slot, leader, moved, weight, normalize)
        touched = torch.zeros(clean.shape[:2], dtype=torch.bool)
        touched[0, slot[0, token]] = True
        assert torch.equal(got[~touched], clean[~touched])
        assert not got[touched].isfinite().any()


def test_spare_entries_weigh_nothing_even_next_to_poison():
    x, weight, (slot, leader, moved), _ = plan()
    assert (moved[2] == leader[2, 0]).sum() >= 5
    x[2, 0] = torch.nan
    got = reduce(x, slot, leader, moved, weight, True)
    assert got[2, 0].isnan().all()
    assert got[2, 1].isfinite().all()


def test_half_types_are_summed_in_float32():
    """8 tokens of 40000 overflow float16 as a sum, not as a mean."""
    x = torch.full((1, 8, 2), 40000.0, dtype=torch.float16)
    slot, leader, moved = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), torch.arange(1, 8)
    assert torch.equal(reduce(x, slot, leader, moved.unsqueeze(0), None, True), x[:, :1])


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64, torch.bfloat16])
def test_restore(trailing, dtype):
    y = torch.randn(2, 4, *trailing, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    source = torch.tensor([[0, 3, -1, 3, 1], [2, -1, -1, 0, 0]])
    got = restore(y, source)
    assert got.dtype == dtype
    for b in range(2):
        for i, place in enumerate(source[b].tolist()):
            assert torch.equal(got[b, i], torch.zeros_like(y[b, 0]) if place < 0 else y[b, place])


def test_restore_undoes_a_merge_of_equal_tokens():
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)
    slot, leader, moved = match(x, None, 4, 0, CountRule(0, (HALF,)).flat())
    assert torch.equal(restore(reduce(x, slot, leader, moved, None, True), slot), x)
