"""Plans from their definition, as one-hot matrices, and what every plan promises."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tamis.tokens import Plan, Tokens


def rows_of(index: Tensor, x: Tensor) -> Tensor:
    """The tokens at index [B, S] of x [B, H, N, D]: [B, H, S, D]."""
    return torch.stack([heads[:, row] for heads, row in zip(x, index, strict=True)])


def one_hot(plan: Plan) -> Tensor:
    """[B, N', N] bool: which tokens are in which slot."""
    return plan.slot.unsqueeze(1) == torch.arange(plan.out).reshape(1, -1, 1)


def in_order(plan: Plan) -> Plan:
    """The same groups of tokens, in the order of their last tokens, which lead them."""
    assert plan.sizes is None
    slot, leader = torch.full_like(plan.slot, -1), torch.zeros_like(plan.leader)
    moved = None if plan.moved is None else torch.zeros_like(plan.moved)
    for b, row in enumerate(plan.slot.tolist()):
        groups = sorted(([i for i, j in enumerate(row) if j == k] for k in set(row) - {-1}), key=max)
        for number, group in enumerate(groups):
            slot[b, group] = number
            leader[b, number] = max(group)
        if moved is not None:
            joined = sorted(i for group in groups for i in group[:-1])
            moved[b] = torch.tensor(joined + leader[b, :1].tolist() * (moved.shape[1] - len(joined)), dtype=torch.int64)
    return replace(plan, slot=slot, leader=leader, moved=moved)


def apply_plan(plan: Plan, x: Tensor) -> Tensor:
    """The definition of `Plan`: the weighted sum or mean of each slot's tokens; zeros where a slot has none."""
    wide = x.double()
    matrix = one_hot(plan).double()
    if plan.weight is not None:
        matrix = matrix * plan.weight.double().unsqueeze(1)
    sums = matrix @ torch.where(plan.slot.unsqueeze(-1) >= 0, wide, 0.0)
    if plan.normalize:
        total = matrix.sum(-1, keepdim=True)
        sums = sums / torch.where(total == 0, 1.0, total)
    if plan.max_norm:
        sums = _at_the_largest_norm(sums, plan, wide)
    return sums.to(x.dtype)


def _at_the_largest_norm(means: Tensor, plan: Plan, x: Tensor) -> Tensor:
    """The mean of each group of several tokens, scaled to the largest of their norms; zero stays zero."""
    scaled = means.clone()
    for b, row in enumerate(plan.slot.tolist()):
        for j in set(row) - {-1}:
            group = [i for i, slot in enumerate(row) if slot == j]
            if len(group) > 1 and means[b, j].norm() > 0:
                scaled[b, j] *= max(x[b, i].norm() for i in group) / means[b, j].norm()
    return scaled


def check_plan(plan: Plan, tokens: Tokens) -> None:
    """What every plan promises, whoever made it."""
    batch, n = tokens.hidden.shape[:2]
    valid_in = torch.ones(batch, n, dtype=torch.bool) if tokens.valid is None else tokens.valid
    valid_out = torch.ones(batch, plan.out, dtype=torch.bool) if plan.valid is None else plan.valid
    assert plan.slot.shape == (batch, n)
    assert plan.leader.shape == (batch, plan.out)
    assert -1 <= int(plan.slot.min()) <= int(plan.slot.max()) < plan.out
    assert (plan.slot[~valid_in] == -1).all(), "padding is in no slot"
    if not plan.drops:
        assert (plan.slot[valid_in] >= 0).all(), "a token was dropped though the plan says none is"
    slots = torch.arange(plan.out).expand(batch, -1)
    led = plan.slot.gather(1, plan.leader)
    assert torch.equal(led[valid_out], slots[valid_out]), "a leader is in its own slot"
    assert torch.equal(valid_out, one_hot(plan).any(-1)), "valid slots are those that hold a token"
    expected = [tokens.rule.out(int(count)) for count in valid_in.sum(1)]
    held = valid_out.sum(1).tolist()
    assert all(a <= b if plan.ragged else a == b for a, b in zip(held, expected, strict=True)), "counts by the rule"
    for b in range(batch):
        rank = torch.nonzero(valid_in[b]).flatten()[: tokens.prefix]
        assert plan.slot[b, rank].tolist() == list(range(len(rank))), "prefix tokens stay in front"
        _check_moved(plan, b)


def _check_moved(plan: Plan, b: int) -> None:
    valid = torch.ones(plan.out, dtype=torch.bool) if plan.valid is None else plan.valid[b]
    leaders = set(plan.leader[b][valid].tolist())
    merged = {i for i, slot in enumerate(plan.slot[b].tolist()) if slot >= 0 and i not in leaders}
    moved = [] if plan.moved is None else plan.moved[b].tolist()
    assert merged <= set(moved), "every token that joins another's slot is listed in moved"
    assert [i for i in moved if i in merged] == sorted(merged), "moved is ascending and names each token once"
