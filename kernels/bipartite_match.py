"""bipartite_match: ToMe's plan: every other token offers to merge into its most similar token of the other half.

metric  [B, N, D] float   what similarity is measured on
valid   [B, N]    bool    which tokens are real, padding anywhere in a row; None: all
out     count             N': tokens after; equals CountRule.from_flat(prefix, rule).out(N)
prefix  int               protected leading real tokens P
rule    int[]             CountRule.flat; must contain HALF and add nothing
->      slot   [B, N]      int64: output slot of each token, -1 for padding
        leader [B, N']     int64: the token that stands for each slot, 0 where a row has no such slot
        moved  [B, N - N'] int64: tokens merged into a slot led by another, ascending; spare entries are leader[:, 0]

Per row, over its n real tokens by rank (position among the real ones):
1. u = x / max(||x||, 1e-12);  a = tokens of even rank >= P, b = tokens of odd rank >= P
2. S = a b^T;  mu_i = max_j S_ij,  j*_i = argmax_j S_ij
3. the rule.removed(n) tokens of a with the highest mu merge into b[j*]
4. slots: [the P protected | a that stay, ascending | b, ascending]; without protected tokens (P = 0) those of a
   that stay come by descending mu, as published

Float32 arithmetic (float64 for float64 input).  Ties: lowest index, in argmax and in the order by mu (stable).  A token
whose metric has a zero, infinite or NaN norm counts as the zero vector.  Raises nothing of its own.
Source: methods card 1.2 (Bolya et al. 2023, merge.py:36-68).  Differs: stable order, guarded norm, any number of
protected tokens, always at the front (published: 2 at most, the second interleaved); padding.
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
from .opset import STANDARD as op
from .opset import TAMIS, rule_inputs
from .precision import compute_dtype
from .rows import ascending, first_columns, slot_leaders, take_rows
from .symbols import spare_length


def reference(
    metric: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """See the module."""
    unit = unit_vectors(metric)
    if valid is None:
        return _match_all(unit, out, prefix)
    return _match_real(unit, valid, out, CountRule.from_flat(prefix, rule))


def _match_all(unit: Tensor, out: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every token is real: ranks are positions, and all counts are the same in every row."""
    batch, tokens = unit.shape[:2]
    first_a, first_b = first_ranks(prefix)
    a, b = unit[:, first_a::2], unit[:, first_b::2]
    removed = tokens - out
    similarity = _similarity(a, b, None)
    order = similarity.amax(2).sort(dim=1, descending=True, stable=True).indices
    merging, staying = _merging_first(order, removed, ascending=prefix > 0)
    moved, stay = first_a + 2 * merging, first_a + 2 * staying
    position = torch.arange(tokens, device=unit.device)
    protected, others = position[:prefix].expand(batch, -1), position[first_b::2].expand(batch, -1)
    # `out` long, which symbols do not know yet
    leader = first_columns(torch.cat([protected, stay, others], 1), out)
    # a partner is looked for only where it is needed: argmax costs ten times what amax does
    goal = take_rows(similarity, merging).argmax(2) + (prefix + a.shape[1] - removed)
    slots = torch.cat([position[:out].expand(batch, -1), goal], 1)
    return leader.new_empty((batch, tokens)).scatter(1, torch.cat([leader, moved], 1), slots), leader, moved


def _merging_first(order: Tensor, removed: int, *, ascending: bool) -> tuple[Tensor, Tensor]:
    """order[:, :removed] ascending, and the rest, ascending too if so wanted."""
    if not ascending:
        return order[:, :removed].sort(dim=1).values, order[:, removed:]
    # one sort for both: the rest counts from `shift` on
    shift = (torch.arange(order.shape[1], device=order.device) >= removed) * order.shape[1]
    both = (order + shift).sort(dim=1).values - shift
    return both[:, :removed], both[:, removed:]


def _match_real(unit: Tensor, valid: Tensor, out: int, rule: CountRule) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of different length: pack the real tokens to the front, match by rank, map ranks back to positions."""
    prefix, (first_a, first_b) = rule.prefix, first_ranks(rule.prefix)
    batch, tokens = valid.shape
    rank_of = valid.cumsum(1) - 1
    count = valid.sum(1, keepdim=True)
    rank = torch.arange(tokens, device=unit.device).expand(batch, tokens)
    packed = take_rows(unit, (~valid).sort(dim=1, stable=True).indices)
    a, b, a_real = packed[:, first_a::2], packed[:, first_b::2], rank[:, first_a::2] < count
    hidden = unit.new_zeros(()).masked_fill(rank[:, first_b::2] >= count, -torch.inf)
    similarity = _similarity(a, b, hidden.unsqueeze(1))
    nearest = similarity.argmax(2)
    order = similarity.amax(2).masked_fill(~a_real, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    place = torch.zeros_like(order).scatter(1, order, rank[:, : a.shape[1]])
    removed = rule.removed(count)
    merging = place < removed
    staying = a_real & ~merging
    slot_of_b = prefix + staying.sum(1, keepdim=True)
    stay_slot = prefix + staying.cumsum(1) - 1 if prefix else place - removed
    a_slot = torch.where(merging, slot_of_b + nearest, stay_slot)
    slot = _slots_of_rest(rank, prefix, first_b, slot_of_b)
    slot = torch.slice_scatter(slot, a_slot, 1, first_a, tokens, 2)
    moves = torch.slice_scatter(torch.zeros_like(valid), merging, 1, first_a, tokens, 2)
    rank_of = rank_of.clamp(min=0)
    slot = slot.gather(1, rank_of).masked_fill(~valid, -1)
    moves = moves.gather(1, rank_of) & valid
    leader = slot_leaders(slot, valid & ~moves, out)
    return slot, leader, ascending(moves, tokens - out, leader[:, :1])


def first_ranks(prefix: int) -> tuple[int, int]:
    """Ranks of the first unprotected token of a and of b."""
    return prefix + prefix % 2, prefix + 1 - prefix % 2


def _slots_of_rest(rank: Tensor, prefix: int, first_b: int, slot_of_b: Any) -> Tensor:
    """Slots of the protected tokens and of b, by rank (those of a are filled in afterwards)."""
    slot = (rank - first_b) // 2 + slot_of_b
    return torch.where(rank < prefix, rank, slot) if prefix else slot


def unit_vectors(metric: Tensor) -> Tensor:
    """Rows of length 1 in compute precision; zeros for those whose norm is zero, infinite or NaN."""
    x = metric.to(compute_dtype(metric))
    unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
    return unit.nan_to_num(nan=0.0)


def _similarity(a: Tensor, b: Tensor, hidden: Tensor | None) -> Tensor:
    """S = a b^T.  hidden: added to it, -inf at columns not to be chosen."""
    if not (isinstance(b.shape[1], int) and b.shape[1]):
        # one hidden column more, because a maximum over no column at all (a single token) is an error
        hidden = pad(b.new_zeros(b.shape[1]) if hidden is None else hidden, (0, 1), value=-torch.inf)
        b = pad(b, (0, 0, 0, 1))
    similarity = torch.bmm(a, b.transpose(1, 2))
    return similarity if hidden is None else similarity + hidden


def fake(metric: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Shape rule."""
    batch, tokens = metric.shape[:2]
    shapes = [(batch, tokens), (batch, out), (batch, spare_length(tokens, out))]
    slot, leader, moved = (metric.new_empty(shape, dtype=torch.int64) for shape in shapes)
    return slot, leader, moved


# `tokens` is an input because ONNX Runtime folds what follows from a constant, but not from the shape of a value
@script(TAMIS, default_opset=op)
def BipartiteMatch(metric, tokens, out, prefix: int, first_a: int, first_b: int):
    x = op.Cast(metric, to=1)
    scaled = x / op.Max(op.ReduceL2(x, [-1], keepdims=1), 1e-12)
    unit = op.Where(op.IsNaN(scaled), 0.0, scaled)
    length = op.Reshape(tokens, [1])
    a = op.Slice(unit, op.Reshape(first_a, [1]), [9223372036854775807], [1], [2])
    # a row of a single token has no b; any column will do, as nothing merges
    b = op.Slice(unit, op.Min(op.Reshape(first_b, [1]), length - 1), [9223372036854775807], [1], [2])
    similarity = op.MatMul(a, op.Transpose(b, perm=[0, 2, 1]))
    count_a = op.Max((length - first_a + 1) / 2, 0)
    removed = length - op.Reshape(out, [1])
    _, order = op.TopK(op.ReduceMax(similarity, [2], keepdims=0), count_a, axis=1)
    # those that merge first, ascending; the others ascending too, without protected tokens as they are
    place = op.Range(0, op.Squeeze(count_a), 1)
    merges = place < removed
    by_index = op.Or(merges, op.Expand(prefix, [1]) > 0)
    key = op.Where(by_index, order, place) + op.Where(merges, 0, count_a)
    _, ascending = op.TopK(key, count_a, axis=1, largest=0)
    chosen = op.GatherElements(order, ascending, axis=1)
    position_a = chosen * 2 + first_a
    moved = op.Slice(position_a, [0], removed, [1])
    stay = op.Slice(position_a, removed, count_a, [1])
    merging = op.Unsqueeze(op.Slice(chosen, [0], removed, [1]), [2])
    nearest = op.ArgMax(op.GatherND(similarity, merging, batch_dims=1), axis=2, keepdims=0)
    goal = nearest + (prefix + count_a - removed)
    every = op.Expand(op.Range(0, op.Squeeze(length), 1), op.Concat(op.Shape(x, start=0, end=1), length, axis=0))
    protected = op.Slice(every, [0], op.Reshape(prefix, [1]), [1])
    others = op.Slice(every, op.Reshape(first_b, [1]), [9223372036854775807], [1], [2])
    leader = op.Concat(protected, stay, others, axis=1)
    slots = op.Concat(op.Slice(every, [0], op.Reshape(out, [1]), [1]), goal, axis=1)
    return op.ScatterElements(every, op.Concat(leader, moved, axis=1), slots, axis=1), leader, moved


@script(TAMIS, default_opset=op)
def BipartiteMatchMasked(metric, valid, out, slopes, offsets, divisors, prefix: int, first_a: int, first_b: int):
    x = op.Cast(metric, to=1)
    scaled = x / op.Max(op.ReduceL2(x, [-1], keepdims=1), 1e-12)
    unit = op.Where(op.IsNaN(scaled), 0.0, scaled)
    tokens = op.Shape(x, start=1, end=2)
    real = op.Cast(valid, to=7)
    rank_of = op.Max(op.CumSum(real, 1) - 1, 0)
    count = op.ReduceSum(real, [1], keepdims=1)
    _, packing = op.TopK(real, tokens, axis=1)
    packed = op.GatherND(unit, op.Unsqueeze(packing, [2]), batch_dims=1)
    position = op.Range(0, op.Squeeze(tokens), 1)
    rank = op.Expand(position, op.Shape(valid))
    # a row of a single token has no b; any column will do, as nothing merges
    start_b = op.Min(op.Reshape(first_b, [1]), tokens - 1)
    a = op.Slice(packed, op.Reshape(first_a, [1]), [9223372036854775807], [1], [2])
    b = op.Slice(packed, start_b, [9223372036854775807], [1], [2])
    rank_a = op.Slice(rank, op.Reshape(first_a, [1]), [9223372036854775807], [1], [2])
    rank_b = op.Slice(rank, start_b, [9223372036854775807], [1], [2])
    lowest = op.Constant(value_float=float("-inf"))
    hidden = op.Unsqueeze(op.Where(rank_b < count, 0.0, lowest), [1])
    similarity = op.MatMul(a, op.Transpose(b, perm=[0, 2, 1])) + hidden
    nearest = op.ArgMax(similarity, axis=2, keepdims=0)
    count_a = op.Shape(a, start=1, end=2)
    best = op.Where(rank_a < count, op.ReduceMax(similarity, [2], keepdims=0), lowest)
    _, order = op.TopK(best, count_a, axis=1)
    index_a = (rank_a - first_a) / 2
    place = op.ScatterElements(index_a, order, index_a, axis=1)
    # Div truncates where Python floors, but only below zero, which the Max cuts off
    removed = op.Max(op.ReduceMin((slopes * (count - prefix) + offsets) / divisors, [1], keepdims=1), 0)
    merging = place < removed
    staying = op.Cast(op.And(rank_a < count, op.Not(merging)), to=7)
    slot_of_b = op.ReduceSum(staying, [1], keepdims=1) + prefix
    stay_slot = op.Where(op.Expand(prefix, [1]) > 0, op.CumSum(staying, 1) + (prefix - 1), place - removed)
    a_slot = op.Where(merging, nearest + slot_of_b, stay_slot)
    rest = op.Where(rank < prefix, rank, (rank - first_b) / 2 + slot_of_b)
    packed_slot = op.ScatterElements(rest, rank_a, a_slot, axis=1)
    packed_moves = op.ScatterElements(rank * 0, rank_a, op.Cast(merging, to=7), axis=1)
    slot = op.Where(valid, op.GatherElements(packed_slot, rank_of, axis=1), -1)
    moves = op.And(valid, op.GatherElements(packed_moves, rank_of, axis=1) > 0)
    size = op.Reshape(out, [1])
    rows = op.Shape(x, start=0, end=1)
    # one column more than needed takes what has no place in the list
    lead_place = op.Where(op.And(valid, op.Not(moves)), slot, size)
    blank = op.Expand(0, op.Concat(rows, size + 1, axis=0))
    leader = op.Slice(op.ScatterElements(blank, lead_place, rank, axis=1), [0], size, [1])
    spare = op.Expand(op.Slice(leader, [0], [1], [1]), op.Concat(rows, tokens - size + 1, axis=0))
    move_place = op.Where(moves, op.CumSum(op.Cast(moves, to=7), 1) - 1, tokens - size)
    moved = op.Slice(op.ScatterElements(spare, move_place, rank, axis=1), [0], tokens - size, [1])
    return slot, leader, moved


def onnx(metric: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int]) -> OnnxCall:
    """Calls BipartiteMatch or, with padding, BipartiteMatchMasked."""
    first_a, first_b = first_ranks(prefix)
    attributes = {"prefix": prefix, "first_a": first_a, "first_b": first_b}
    if valid is None:
        return OnnxCall(BipartiteMatch, [metric, metric.shape[1], out], attributes)
    return OnnxCall(BipartiteMatchMasked, [metric, valid, out, *rule_inputs(rule)], attributes)


def flops(metric: Any, valid: Any, out: int, prefix: int, rule: list[int], **_: Any) -> int:
    """The similarity product: 2 * B * |a| * |b| * D, over unprotected tokens, padding included."""
    batch, tokens, width = metric
    first_a, first_b = first_ranks(prefix)
    count_a, count_b = ((max(tokens - first, 0) + 1) // 2 for first in (first_a, first_b))
    return 2 * batch * count_a * count_b * width


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    for batch, tokens, prefix, r in [
        (2, 12, 1, 3),
        (1, 17, 0, 8),
        (3, 9, 2, 2),
        (2, 7, 5, 4),
        (0, 8, 1, 2),
        (2, 6, 1, 0),
    ]:
        metric = torch.randn(batch, tokens, 16, generator=generator)
        rule = CountRule(prefix, (at_most(r), HALF))
        yield metric, None, rule.out(tokens), prefix, rule.flat()
        real = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
        for valid in (torch.arange(tokens) < real, torch.arange(tokens) >= tokens - real):
            yield metric, valid, rule.out(tokens), prefix, rule.flat()
    yield from _awkward_samples(generator)
    for tokens, prefix in [(1, 0), (1, 1), (2, 0), (2, 1), (3, 1), (3, 2), (4, 2)]:
        metric, rule = torch.randn(2, tokens, 8, generator=generator), CountRule(prefix, (at_most(5), HALF))
        yield metric, None, rule.out(tokens), prefix, rule.flat()
        yield metric, torch.ones(2, tokens, dtype=torch.bool), rule.out(tokens), prefix, rule.flat()


def _awkward_samples(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    """More tokens and features than a tile has, ties (similarities are exact), no direction, half precision."""
    long = torch.randn(2, 71, 17, generator=generator)
    tied = torch.eye(4)[torch.randint(0, 4, (3, 37), generator=generator)]
    lost = torch.randn(2, 37, 5, generator=generator)
    lost[:, 3], lost[:, 8], lost[0, 14, 2], lost[1, 21, 0] = 0.0, torch.inf, torch.nan, -torch.inf
    half = torch.randn(2, 41, 16, generator=generator).half()
    for metric, prefix, terms in [
        (long, 2, (at_most(20), HALF)),
        (tied, 1, (at_most(9), HALF)),
        (tied, 0, (at_most(9), HALF)),
        (lost, 0, (keep_at_least(0.7), HALF)),
        (half, 1, (keep_at_least(0.6), HALF)),
    ]:
        rule, tokens = CountRule(prefix, terms), metric.shape[1]
        yield metric, None, rule.out(tokens), prefix, rule.flat()
        valid = torch.rand(metric.shape[:2], generator=generator) < 0.8
        yield metric, valid, rule.out(tokens), prefix, rule.flat()


BIPARTITE_MATCH = define_op(
    Op(
        name="bipartite_match",
        schema="(Tensor metric, Tensor? valid, SymInt out, int prefix, int[] rule)"
        " -> (Tensor slot, Tensor leader, Tensor moved)",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="match",
    )
)
