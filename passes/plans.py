"""Plans from decisions: what methods call once they have a metric or a score."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels as kernels  # registers the ops
from ..counts import CountRule, at_most
from ..tokens import Plan, Tokens


def match_plan(tokens: Tokens, metric: Tensor) -> Plan:
    """Merge the most similar pairs of a bipartite split (ToMe card 1.2); metric [B, N, D], cosine similarity."""
    rule = tokens.prefix, tokens.rule.flat()
    return merge_plan(tokens, *torch.ops.tamis.bipartite_match(metric, tokens.valid, tokens.out, *rule))


def merge_plan(tokens: Tokens, slot: Tensor, leader: Tensor, moved: Tensor) -> Plan:
    """Merge by size: what a matching op answered (slot [B, N], leader [B, N'], moved [B, N - N']) as a plan."""
    padded = tokens.valid is not None
    return Plan(slot, leader, tokens.out, moved, weight=tokens.sizes, valid=next_valid(tokens), spare=padded)


def keep_plan(
    tokens: Tokens,
    scores: Tensor,
    *,
    order: str = "original",
    fuse_weight: Tensor | None = None,
    normalize: bool = False,
    counts_sizes: bool = False,
) -> Plan:
    """Keep the tokens of highest score [B, N]; drop the others, or fuse them into one token by `fuse_weight` [B, N].

    order         "original" keeps the tokens' order, "score" sorts them by falling score
    normalize     divide the fused token by the sum of its weights
    counts_sizes  the fused token's size is that of all it was made of, from here on
    """
    fuse = fuse_weight is not None
    slot, leader, moved = torch.ops.tamis.select_tokens(
        scores, tokens.valid, tokens.out, tokens.prefix, tokens.rule.flat(), order, fuse
    )
    if not fuse:
        return Plan(slot, leader, tokens.out, valid=next_valid(tokens), counts_sizes=False, drops=True)
    return Plan(
        slot,
        leader,
        tokens.out,
        moved,
        weight=_kept_weigh_one(tokens, slot, fuse_weight),
        normalize=normalize,
        valid=next_valid(tokens),
        counts_sizes=counts_sizes,
        stands=normalize,
    )


def sample_plan(tokens: Tokens, weights: Tensor, points: int = 0) -> Plan:
    """Keep the tokens that `points` sample points pick from the distribution of weights [B, N]; see `sample_tokens`."""
    slot, leader, valid = torch.ops.tamis.sample_tokens(
        weights, tokens.valid, tokens.out, tokens.prefix, tokens.rule.flat(), points
    )
    return Plan(slot, leader, tokens.out, valid=valid, counts_sizes=False, drops=True, ragged=True)


def places(tokens: Tokens, scores: Tensor) -> Tensor:
    """[B, N] int64: place of each token with the protected ones in front and others by falling score; -1: padding."""
    none = CountRule(tokens.prefix, (at_most(0),)).flat()
    every = tokens.hidden.shape[1]
    return torch.ops.tamis.select_tokens(scores, tokens.valid, every, tokens.prefix, none, "score", False)[0]


def real_count(tokens: Tokens) -> int | Tensor:
    """Real tokens of a row: a number where all have as many, known ones, else [B, 1] or [1, 1] int64."""
    if tokens.valid is not None:
        return tokens.valid.sum(1, keepdim=True)
    count: Any = tokens.hidden.shape[1]
    if isinstance(count, torch.SymInt):  # comparing it would bake the example's answer into the graph
        return torch.full((1, 1), count, dtype=torch.int64, device=tokens.hidden.device)
    return count


def join_plan(tokens: Tokens, kept: Plan, metric: Tensor, takers: Tensor) -> Plan:
    """Merge by size every token that a selection dropped into the most similar of the tokens that it kept.

    metric [B, N, D], cosine similarity; takers [B, N] bool, tokens that others may merge into, where they are kept.
    """
    offers = kept.slot < 0 if tokens.valid is None else tokens.valid & (kept.slot < 0)
    takes = takers.gather(1, kept.leader)
    takes = takes if kept.valid is None else takes & kept.valid
    slot, _, moved = torch.ops.tamis.join_nearest(metric, kept.slot, kept.leader, offers, takes)
    return merge_plan(tokens, slot, kept.leader, moved)


def ranks(tokens: Tokens) -> Tensor:
    """[B, N] int64: place of each real token among those of its row, from 0."""
    if tokens.valid is not None:
        return tokens.valid.cumsum(1) - 1
    batch, count = tokens.hidden.shape[:2]
    return torch.arange(count, device=tokens.hidden.device).expand(batch, count)


def survivors(plan: Plan) -> Plan:
    """The same slots, each with its leader alone: the tokens that would join them are dropped, and sizes stay."""
    position = torch.arange(plan.slot.shape[1], device=plan.slot.device)
    leads = plan.leader.gather(1, plan.slot.clamp(min=0)) == position
    slot = torch.where(leads, plan.slot, -1)
    return Plan(slot, plan.leader, plan.out, valid=plan.valid, counts_sizes=False, drops=True)


def append_plan(tokens: Tokens, values: Tensor) -> Plan:
    """Leave all tokens as they are and let values [B, A, C] in behind them, each of size 1."""
    batch, count, more = tokens.hidden.shape[0], tokens.hidden.shape[1], values.shape[1]
    place = torch.arange(count, device=values.device).unsqueeze(0).expand(batch, count)
    leader = torch.cat([place, place.new_zeros((batch, more))], dim=1)
    valid, sizes = (
        None if one is None else torch.cat([one, one.new_ones((batch, more))], dim=1)
        for one in (tokens.valid, tokens.sizes)
    )
    slot = place if tokens.valid is None else torch.where(tokens.valid, place, -1)
    leader = leader if valid is None else torch.where(valid, leader, 0)
    return Plan(slot, leader, tokens.out, valid=valid, sizes=sizes, counts_sizes=False, appended=values)


def without(plan: Plan, gone: Tensor) -> Plan:
    """The same slots, those of the tokens gone [B, N] bool left empty.  For plans that merge nothing."""
    held = ~gone.gather(1, plan.leader) if plan.valid is None else plan.valid & ~gone.gather(1, plan.leader)
    slot, leader = torch.where(gone, -1, plan.slot), torch.where(held, plan.leader, 0)
    return replace(plan, slot=slot, leader=leader, valid=held, drops=True, ragged=True)


def in_order(plan: Plan) -> Plan:
    """The same groups of tokens in the order of their last tokens, which lead them: what a causal mask asks for."""
    slot, leader, moved = torch.ops.tamis.order_slots(plan.slot, plan.leader, plan.moved)
    sizes = None if plan.sizes is None else plan.sizes.gather(1, plan.slot.gather(1, leader).clamp(min=0))
    return replace(plan, slot=slot, leader=leader, moved=None if plan.moved is None else moved, sizes=sizes)


def next_valid(tokens: Tokens) -> Tensor | None:
    """[B, N'] which slots hold tokens after the reduction; None without padding."""
    if tokens.valid is None:
        return None
    return torch.ops.tamis.valid_slots(tokens.valid, tokens.out, tokens.prefix, tokens.rule.flat())


def weighted_up(tokens: Tokens, plan: Plan) -> Plan:
    """A plan that drops tokens, whose kept ones count for the others: of T unprotected k stay, at T/k times their size.

    Where every token is as likely to stay, sums over tokens are then on average what they were.
    """
    count = real_count(tokens)
    free, kept = count - tokens.prefix, count - tokens.prefix - tokens.rule.removed(count)
    factor = free / max(kept, 1) if isinstance(kept, int) else free / kept.clamp(min=1)
    unit = torch.ones(plan.slot.shape, device=plan.slot.device) if tokens.sizes is None else tokens.sizes
    place = torch.arange(plan.leader.shape[1], device=plan.slot.device)
    sizes = unit.gather(1, plan.leader) * torch.where(place < tokens.prefix, 1.0, factor)
    return replace(plan, sizes=sizes if plan.valid is None else torch.where(plan.valid, sizes, 0.0))


def _kept_weigh_one(tokens: Tokens, slot: Tensor, weight: Tensor | None) -> Tensor:
    """The fused token sums with its weights; a kept token is itself."""
    assert weight is not None
    n = real_count(tokens)
    fused = (slot == tokens.rule.out(n) - 1) & (tokens.rule.removed(n) > 0)
    return torch.where(fused, weight.float(), 1.0)
