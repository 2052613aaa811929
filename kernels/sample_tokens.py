"""sample_tokens: keep the tokens that evenly spaced points pick from the distribution of their weights.

weights [B, N] float    how much each token matters; NaN, infinite and negative ones count as 0
valid   [B, N] bool     which tokens are real, padding anywhere in a row; None: all
out     count           N': slots after; equals CountRule.from_flat(prefix, rule).out(N)
prefix  int             protected leading real tokens P, kept whatever they weigh
rule    int[]           CountRule.flat; adds nothing
points  int             sample points K; 0: as many as the rule leaves room for, T - rule.removed(n)
->      slot   [B, N]   int64: output slot of each token; -1: not picked, or padding
        leader [B, N']  int64: the token of each slot, 0 where a row has no such slot
        valid  [B, N']  bool: slots that hold a token.  How many depends on the weights

Per row, over its T unprotected real tokens (n - P):
1. order them by rising weight;  C = running sum in that order;  F_j = (C_j - C_0) / (C_last - C_0), from 0 to 1
2. points y_k = y_0 + (1 - y_0) k / (K - 1), k = 0 .. K - 1, y_0 the least F above 0; a single point is at 1
3. each point picks the token whose F is nearest; a token is picked once, however many points are there
4. slots: [the P protected | the picked by rising weight]; where there is no room for all, the heaviest stay

A row all of whose weights are 0 counts them as equal; a token alone is picked.  So the heaviest is always picked, and
the lightest of two or more never is.  Float64 arithmetic.  Ties: equal weights by rising index, a point halfway between
two tokens picks the lighter.  Points are not compared with tokens one by one: the token of F_j is picked when a whole
number k lies between the places of its two halfway marks, (F_j-1 + F_j) / 2 and (F_j + F_j+1) / 2, on the scale of k.
Raises nothing of its own.  ONNX: the same steps.
Source: methods card 6.2 as released (Fayyaz et al. 2022, ats_block.py:54-196), whose K is the number of patches of the
image.  Differs: K may be smaller (theirs then crashes); any number of protected tokens; padding; no [B, K, N] table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..counts import CountRule, at_most, keep_at_least
from ..op import OnnxCall, Op, define_op
from .opset import STANDARD as op
from .opset import TAMIS, rule_inputs
from .rows import slot_leaders

Sample = tuple[Tensor, Tensor, Tensor]


def reference(weights: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int], points: int) -> Sample:
    """See the module."""
    real = torch.ones_like(weights, dtype=torch.bool) if valid is None else valid
    rank, count = real.cumsum(1) - 1, real.sum(1, keepdim=True)
    free, protected = real & (rank >= prefix), count.clamp(max=prefix)
    room = count - protected - CountRule.from_flat(prefix, rule).removed(count)
    known = torch.where(free & (weights > 0) & (weights < torch.inf), weights, 0).double()
    known = torch.where(free & (known.sum(1, keepdim=True) == 0), 1.0, known)
    order = known.masked_fill(~free, torch.inf).sort(dim=1, stable=True).indices
    picked = _picked(known.gather(1, order), count - protected, room if points == 0 else points)
    place = picked.cumsum(1) - 1 - (picked.sum(1, keepdim=True) - room).clamp(min=0)
    kept = picked & (place >= 0)
    chosen = torch.where(kept, protected + place, -1)
    slot = torch.where(free, torch.zeros_like(order).scatter(1, order, chosen), torch.where(real, rank, -1))
    held = torch.arange(out, device=weights.device) < protected + kept.sum(1, keepdim=True)
    return slot, slot_leaders(slot, slot >= 0, out), held


def _picked(weights: Tensor, count: Tensor, points: Any) -> Tensor:
    """[B, N] bool: which of the first `count` [B, 1] tokens points pick; weights [B, N] float64 rise, 0 behind them."""
    position = torch.arange(weights.shape[1], device=weights.device).expand(weights.shape)
    share = weights.cumsum(1) - weights[:, :1]  # F times the whole
    whole = share.amax(1, keepdim=True)
    first = torch.where(share > 0, share, torch.inf).amin(1, keepdim=True)
    behind = (position + 1).clamp(max=weights.shape[1] - 1)
    mark = (share + share.gather(1, behind)) / 2
    gaps = points - 1
    # points at or below each mark; the last of the points is above all marks but the last token's
    below = ((mark - first) * gaps / torch.where(whole > first, whole - first, 1)).floor() + 1
    below = torch.where(mark >= first, below, 0).clamp(min=0)
    below = torch.minimum(below, torch.zeros_like(below) + gaps)
    below = torch.where(position >= count - 1, points, below)
    before = torch.where(position > 0, below.gather(1, (position - 1).clamp(min=0)), 0)
    return (below > before) & (position < count)


def fake(weights: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int], points: int) -> Sample:
    """Shape rule."""
    batch, tokens = weights.shape
    slot, leader = (weights.new_empty((batch, size), dtype=torch.int64) for size in (tokens, out))
    return slot, leader, weights.new_empty((batch, out), dtype=torch.bool)


@script(TAMIS, default_opset=op)
def PickedTokens(weights, count, points):
    tokens = op.Shape(weights, start=1, end=2)
    position = op.Expand(op.Range(0, op.Squeeze(tokens), 1), op.Shape(weights))
    zero = op.CastLike(0, weights)
    share = op.CumSum(weights, 1) - op.Slice(weights, [0], [1], [1])
    whole = op.ReduceMax(share, [1], keepdims=1)
    infinite = op.CastLike(op.Constant(value_float=float("inf")), weights)
    first = op.ReduceMin(op.Where(share > zero, share, infinite), [1], keepdims=1)
    behind = op.Min(position + 1, tokens - 1)
    mark = (share + op.GatherElements(share, behind, axis=1)) / op.CastLike(2, weights)
    gaps = op.CastLike(points - 1, weights)
    span = op.Where(whole > first, whole - first, op.CastLike(1, weights))
    counted = op.Floor((mark - first) * gaps / span) + op.CastLike(1, weights)
    below_some = op.Min(op.Max(op.Where(mark >= first, counted, zero), zero), gaps)
    below = op.Where(position >= count - 1, op.CastLike(points, weights), below_some)
    left = op.GatherElements(below, op.Max(position - 1, 0), axis=1)
    before = op.Where(position > 0, left, zero)
    return op.And(below > before, position < count)


@script(TAMIS, default_opset=op)
def SampleTokens(weights, valid, out, slopes, offsets, divisors, prefix: int, points: int):
    exact = op.Cast(weights, to=11)
    zero = op.CastLike(0, exact)
    infinite = op.CastLike(op.Constant(value_float=float("inf")), exact)
    present = op.Expand(valid, op.Shape(weights))
    real = op.Cast(present, to=7)
    rank = op.CumSum(real, 1) - 1
    count = op.ReduceSum(real, [1], keepdims=1)
    free = op.And(present, rank >= prefix)
    protected = op.Min(count, prefix)
    # Div truncates where Python floors, but only below zero, which the Max cuts off
    removed = op.Max(op.ReduceMin((slopes * (count - prefix) + offsets) / divisors, [1], keepdims=1), 0)
    room = count - protected - removed
    usable = op.And(free, op.And(exact > zero, exact < infinite))
    clean = op.Where(usable, exact, zero)
    nothing = op.Equal(op.ReduceSum(clean, [1], keepdims=1), zero)
    known = op.Where(op.And(free, nothing), op.CastLike(1, exact), clean)
    tokens = op.Shape(weights, start=1, end=2)
    _, order = op.TopK(op.Where(free, known, infinite), tokens, axis=1, largest=0)
    given = op.Expand(points, [1])
    picked = PickedTokens(op.GatherElements(known, order, axis=1), count - protected, op.Where(given > 0, given, room))
    number = op.CumSum(op.Cast(picked, to=7), 1) - 1
    excess = op.Max(op.ReduceSum(op.Cast(picked, to=7), [1], keepdims=1) - room, 0)
    place = number - excess
    kept = op.And(picked, place >= 0)
    chosen = op.Where(kept, protected + place, -1)
    position = op.Expand(op.Range(0, op.Squeeze(tokens), 1), op.Shape(weights))
    spread = op.ScatterElements(position, order, chosen, axis=1)
    slot = op.Where(free, spread, op.Where(present, rank, -1))
    size = op.Reshape(out, [1])
    # one column more than needed takes what has no place in the list
    blank = op.Expand(0, op.Concat(op.Shape(weights, start=0, end=1), size + 1, axis=0))
    led = op.ScatterElements(blank, op.Where(slot >= 0, slot, size), position, axis=1)
    leader = op.Slice(led, [0], size, [1])
    held = op.Range(0, op.Squeeze(size), 1) < protected + op.ReduceSum(op.Cast(kept, to=7), [1], keepdims=1)
    return slot, leader, held


def onnx(weights: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int], points: int) -> OnnxCall:
    """Calls SampleTokens."""
    valid = torch.ones((1, 1), dtype=torch.bool, device=weights.device) if valid is None else valid
    return OnnxCall(SampleTokens, [weights, valid, out, *rule_inputs(rule)], {"prefix": prefix, "points": points})


def flops(*_: Any, **__: Any) -> int:
    """Sorting and element-wise work are not counted."""
    return 0


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    rules = [(at_most(3), (1, -1, 1)), (keep_at_least(0.5), (1, -1, 1)), (at_most(99), (1, -1, 1)), (at_most(0),)]
    for i, (batch, tokens, prefix) in enumerate([(2, 9, 1), (3, 12, 2), (2, 1, 1), (1, 2, 0), (2, 3, 1), (0, 5, 1)]):
        weights = torch.rand(batch, tokens, generator=generator) ** 4
        lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
        padded = torch.arange(tokens) < lengths if i % 2 else torch.arange(tokens) >= tokens - lengths
        for j, valid in enumerate((None, padded)):
            rule = CountRule(prefix, rules[(i + j) % len(rules)])
            yield weights, valid, rule.out(tokens), prefix, rule.flat(), (0, 31)[(i + j) % 2]
    long, rule = torch.rand(2, 197, generator=generator) ** 6, CountRule(1, rules[1])
    yield long, None, rule.out(197), 1, rule.flat(), 0
    yield long, torch.rand(2, 197, generator=generator) < 0.8, rule.out(197), 1, rule.flat(), 196
    odd = torch.tensor(
        [[9.0, torch.nan, 1, torch.inf, -3, 0, 2, 2], [9, 0, 0, 0, 0, 0, 0, 0], [9, 1, 1, 1, 1, 1, 1, 1]]
    )
    for points in (0, 1, 7):
        yield odd, None, 6, 1, CountRule(1, (at_most(2),)).flat(), points
    yield odd.half(), torch.tensor([[False]] * 3).expand(3, 8), 6, 1, CountRule(1, (at_most(2),)).flat(), 0


SAMPLE_TOKENS = define_op(
    Op(
        name="sample_tokens",
        schema="(Tensor weights, Tensor? valid, SymInt out, int prefix, int[] rule, int points)"
        " -> (Tensor slot, Tensor leader, Tensor valid)",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton=None,
    )
)
