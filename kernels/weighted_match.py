"""weighted_match: MCTF's plan: pairs of two halves merge by a product of similarity and what each token is worth.

metric  [B, N, D] float   what similarity is measured on
factor  [B, N]    float   f, what a token brings into every pair it is in, 0 or more
valid   [B, N]    bool    which tokens are real, padding anywhere in a row; None: all
out     count             N': tokens after; equals CountRule.from_flat(prefix, rule).out(N)
prefix  int               protected leading real tokens P
rule    int[]             CountRule.flat; must contain HALF and add nothing
power   float             exponent of the similarity, 0 or more
both    bool              merge half of the tokens from a into b and then the rest from b into a; else all from a into b
->      slot, leader, moved  as for bipartite_match

Per row, over its n real tokens by rank (position among the real ones), of which r = rule.removed(n) leave:
1. a = tokens of even rank >= P, b = tokens of odd rank >= P;  W_ij = ((cos(i, j) + 1) / 2)^power * f_i * f_j
2. the r (both: floor(r / 2)) tokens of a with the highest max_j W_ij merge into the b of that maximum
3. both: the rest of b with the highest max over the a that stay merges into it, with all that merged into b before
4. slots: [the P protected | a that stay, ascending | b, ascending, or with `both` those that stay, by falling maximum];
   without protected tokens (P = 0) those of a come by falling maximum too, as in bipartite_match

Float32 arithmetic (float64 for float64 input).  Ties: lowest index, in argmax and in the orders (stable).  A token
whose metric has a zero, infinite or NaN norm counts as the zero vector, a pair whose W is NaN as 0.  Raises nothing of
its own.
Source: methods card 10.4 (Lee et al. 2024, arXiv 2403.10030; mctf.py:47-151).  Differs: stable order, guarded norm, any
number of protected tokens, padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor
from torch.nn.functional import pad

from ..counts import HALF, CountRule, at_most, keep_at_least
from ..op import OnnxCall, Op, define_op
from .bipartite_match import fake as fake_match
from .bipartite_match import first_ranks, unit_vectors
from .bipartite_match import flops as flops_of_match
from .energy_match import SlotLists
from .opset import STANDARD as op
from .opset import TAMIS, rule_inputs
from .rows import ascending, slot_leaders, take_rows

Plan = tuple[Tensor, Tensor, Tensor]


def reference(
    metric: Tensor,
    factor: Tensor,
    valid: Tensor | None,
    out: int,
    prefix: int,
    rule: list[int],
    power: float,
    both: bool,
) -> Plan:
    """See the module."""
    batch, tokens = metric.shape[:2]
    valid = torch.ones((batch, tokens), dtype=torch.bool, device=metric.device) if valid is None else valid
    count, rank_of = valid.sum(1, keepdim=True), (valid.cumsum(1) - 1).clamp(min=0)
    packing = (~valid).sort(dim=1, stable=True).indices
    packed = take_rows(unit_vectors(metric), packing)
    # two ranks more, which no token has: a maximum over no token at all is an error
    packed, worth = pad(packed, (0, 0, 0, 2)), pad(factor.gather(1, packing).to(packed.dtype), (0, 2))
    rank = torch.arange(tokens + 2, device=metric.device).expand(batch, tokens + 2)
    (a, f_a, rank_a), (b, f_b, rank_b) = (
        (packed[:, first::2], worth[:, first::2], rank[:, first::2]) for first in first_ranks(prefix)
    )
    real_a, real_b = rank_a < count, rank_b < count
    alike = ((torch.bmm(a, b.transpose(1, 2)) + 1) / 2).clamp(min=0)
    pairs = (alike**power * f_a.unsqueeze(2) * f_b.unsqueeze(1)).nan_to_num(nan=0.0, posinf=torch.inf)
    pairs = pairs.masked_fill(~(real_a.unsqueeze(2) & real_b.unsqueeze(1)), -torch.inf)
    removed = CountRule.from_flat(prefix, rule).removed(count)
    removed_a = removed // 2 if both else removed
    place_a = _places(pairs.amax(2))
    stays_a, stays_b = real_a & (place_a >= removed_a), real_b
    slot_a = prefix + (stays_a.cumsum(1) - 1 if prefix else place_a - removed_a)
    slot_b = prefix + stays_a.sum(1, keepdim=True)
    if both:
        left = pairs.masked_fill(~stays_a.unsqueeze(2), -torch.inf)
        place_b = _places(left.amax(1)) - (removed - removed_a)
        stays_b = real_b & (place_b >= 0)
        slot_b = torch.where(stays_b, slot_b + place_b, slot_a.gather(1, left.argmax(1)))
    else:
        slot_b = slot_b + real_b.cumsum(1) - 1
    slot_a = torch.where(stays_a, slot_a, slot_b.gather(1, pairs.argmax(2)))
    slot = _by_rank(rank, slot_a, slot_b, prefix).gather(1, rank_of).masked_fill(~valid, -1)
    stays = valid & _by_rank(rank < prefix, stays_a, stays_b, prefix).gather(1, rank_of)
    leader = slot_leaders(slot, stays, out)
    return slot, leader, ascending(valid & ~stays, tokens - out, leader[:, :1])


def _places(best: Tensor) -> Tensor:
    """Place of each entry of its row in the order by falling value; equal ones by index."""
    order = best.sort(dim=1, descending=True, stable=True).indices
    position = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    return torch.zeros_like(order).scatter(1, order, position)


def _by_rank(protected: Tensor, of_a: Tensor, of_b: Tensor, prefix: int) -> Tensor:
    """[B, N + 2]: the values of a and b in their places among those of the protected tokens."""
    for first, values in zip(first_ranks(prefix), (of_a, of_b), strict=True):
        protected = torch.slice_scatter(protected, values, 1, first, protected.shape[1], 2)
    return protected


def fake(metric: Tensor, factor: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int], *_: Any) -> Plan:
    """Shape rule."""
    return fake_match(metric, valid, out, prefix, rule)


@script(TAMIS, default_opset=op)
def PlaceOf(best):
    length = op.Shape(best, start=1, end=2)
    position = op.Expand(op.Range(0, op.Squeeze(length), 1), op.Shape(best))
    _, order = op.TopK(best, length, axis=1)
    return op.ScatterElements(position, order, position, axis=1)


@script(TAMIS, default_opset=op)
def PairsOf(metric, factor, packing, first_a: int, first_b: int, power: float):
    x = op.Cast(metric, to=1)
    scaled = x / op.Max(op.ReduceL2(x, [-1], keepdims=1), 1e-12)
    unit = op.Where(op.IsNaN(scaled), 0.0, scaled)
    packed = op.Pad(op.GatherND(unit, op.Unsqueeze(packing, [2]), batch_dims=1), [0, 0, 0, 0, 2, 0])
    worth = op.Pad(op.GatherElements(op.Cast(factor, to=1), packing, axis=1), [0, 0, 0, 2])
    a = op.Slice(packed, op.Reshape(first_a, [1]), [9223372036854775807], [1], [2])
    b = op.Slice(packed, op.Reshape(first_b, [1]), [9223372036854775807], [1], [2])
    worth_a = op.Slice(worth, op.Reshape(first_a, [1]), [9223372036854775807], [1], [2])
    worth_b = op.Slice(worth, op.Reshape(first_b, [1]), [9223372036854775807], [1], [2])
    alike = op.Max((op.MatMul(a, op.Transpose(b, perm=[0, 2, 1])) + 1.0) / 2.0, 0.0)
    product = op.Pow(alike, power) * op.Unsqueeze(worth_a, [2]) * op.Unsqueeze(worth_b, [1])
    return op.Where(op.IsNaN(product), 0.0, product)


@script(TAMIS, default_opset=op)
def WeightedMatch(
    metric,
    factor,
    valid,
    out,
    slopes,
    offsets,
    divisors,
    prefix: int,
    first_a: int,
    first_b: int,
    power: float,
    both: int,
):
    shape = op.Shape(metric, start=0, end=2)
    tokens = op.Shape(metric, start=1, end=2)
    present = op.Expand(valid, shape)
    real = op.Cast(present, to=7)
    rank_of = op.Max(op.CumSum(real, 1) - 1, 0)
    count = op.ReduceSum(real, [1], keepdims=1)
    _, packing = op.TopK(real, tokens, axis=1)
    # two ranks more, which no token has: a maximum over no token at all is an error
    wide = op.Concat(op.Shape(metric, start=0, end=1), tokens + 2, axis=0)
    rank = op.Expand(op.Range(0, op.Squeeze(tokens + 2), 1), wide)
    rank_a = op.Slice(rank, op.Reshape(first_a, [1]), [9223372036854775807], [1], [2])
    rank_b = op.Slice(rank, op.Reshape(first_b, [1]), [9223372036854775807], [1], [2])
    real_a = rank_a < count
    real_b = rank_b < count
    lowest = op.Constant(value_float=float("-inf"))
    products = PairsOf(metric, factor, packing, first_a, first_b, power)
    pairs = op.Where(op.And(op.Unsqueeze(real_a, [2]), op.Unsqueeze(real_b, [1])), products, lowest)
    # Div truncates where Python floors, but only below zero, which the Max cuts off
    removed = op.Max(op.ReduceMin((slopes * (count - prefix) + offsets) / divisors, [1], keepdims=1), 0)
    two_ways = op.Expand(both, [1]) > 0
    removed_a = op.Where(two_ways, removed / 2, removed)
    place_a = PlaceOf(op.ReduceMax(pairs, [2], keepdims=0))
    stays_a = op.And(real_a, place_a >= removed_a)
    staying_a = op.Cast(stays_a, to=7)
    stay_a = op.Where(op.Expand(prefix, [1]) > 0, op.CumSum(staying_a, 1) - 1, place_a - removed_a) + prefix
    first_slot_b = op.ReduceSum(staying_a, [1], keepdims=1) + prefix
    left = op.Where(op.Unsqueeze(stays_a, [2]), pairs, lowest)
    place_b = PlaceOf(op.ReduceMax(left, [1], keepdims=0)) - (removed - removed_a)
    stays_b = op.And(real_b, op.Or(op.Not(two_ways), place_b >= 0))
    stay_b = op.Where(two_ways, place_b, (rank_b - first_b) / 2) + first_slot_b
    slot_b = op.Where(stays_b, stay_b, op.GatherElements(stay_a, op.ArgMax(left, axis=1, keepdims=0), axis=1))
    slot_a = op.Where(stays_a, stay_a, op.GatherElements(slot_b, op.ArgMax(pairs, axis=2, keepdims=0), axis=1))
    slots = op.ScatterElements(op.ScatterElements(rank, rank_a, slot_a, axis=1), rank_b, slot_b, axis=1)
    protected = op.Cast(rank < prefix, to=7)
    staying = op.ScatterElements(protected, rank_a, staying_a, axis=1)
    staying = op.ScatterElements(staying, rank_b, op.Cast(stays_b, to=7), axis=1)
    slot = op.Where(present, op.GatherElements(slots, rank_of, axis=1), -1)
    stays = op.And(present, op.GatherElements(staying, rank_of, axis=1) > 0)
    leader, moved = SlotLists(slot, stays, op.And(present, op.Not(stays)), out)
    return slot, leader, moved


def onnx(
    metric: Tensor,
    factor: Tensor,
    valid: Tensor | None,
    out: int,
    prefix: int,
    rule: list[int],
    power: float,
    both: bool,
) -> OnnxCall:
    """Calls WeightedMatch."""
    first_a, first_b = first_ranks(prefix)
    numbers = {"prefix": prefix, "first_a": first_a, "first_b": first_b, "both": int(both)}
    valid = torch.ones((1, 1), dtype=torch.bool, device=metric.device) if valid is None else valid
    inputs = [metric, factor, valid, out, *rule_inputs(rule)]
    return OnnxCall(WeightedMatch, inputs, numbers | {"power": float(power)})


def flops(metric: Any, factor: Any, valid: Any, out: int, prefix: int, rule: list[int], *_: Any, **__: Any) -> int:
    """The similarity product, as bipartite_match."""
    return flops_of_match(metric, valid, out, prefix, rule)


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 12, 1, 3), (1, 17, 0, 8), (2, 8, 5, 4), (0, 8, 1, 2), (2, 6, 1, 0), (2, 1, 0, 5), (2, 71, 2, 20)]
    for i, (batch, tokens, prefix, r) in enumerate(sizes):
        metric, rule = torch.randn(batch, tokens, 16, generator=generator), CountRule(prefix, (at_most(r), HALF))
        factor = torch.rand(batch, tokens, generator=generator) + 0.5
        real = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
        for j, valid in enumerate((None, torch.arange(tokens) < real, torch.arange(tokens) >= tokens - real)):
            yield metric, factor, valid, rule.out(tokens), prefix, rule.flat(), (1.0, 0.5)[j % 2], bool((i + j) % 2)
    lost = torch.randn(2, 37, 5, generator=generator)
    lost[:, 3], lost[:, 8], lost[0, 14, 2], lost[1, 21, 0] = 0.0, torch.inf, torch.nan, -torch.inf
    worthless = torch.ones(2, 37)
    worthless[:, 5], worthless[:, 6], worthless[0, 11] = 0.0, torch.nan, torch.inf
    tied = torch.eye(4)[torch.randint(0, 4, (2, 37), generator=generator)]
    for metric, rule in [(lost, CountRule(0, (keep_at_least(0.7), HALF))), (tied, CountRule(1, (at_most(9), HALF)))]:
        for both in (False, True):
            rest = rule.out(37), rule.prefix, rule.flat(), 1.0, both
            yield metric, worthless, None, *rest
        yield metric.half(), torch.ones(2, 37), torch.rand(2, 37, generator=generator) < 0.8, *rest


WEIGHTED_MATCH = define_op(
    Op(
        name="weighted_match",
        schema="(Tensor metric, Tensor factor, Tensor? valid, SymInt out, int prefix, int[] rule, float power,"
        " bool both) -> (Tensor slot, Tensor leader, Tensor moved)",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton=None,
    )
)
