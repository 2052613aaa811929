"""energy_match: PiToMe's plan: tokens in large groups of similar ones merge, those that stand alone are kept.

metric  [B, N, D] float   what similarity is measured on
valid   [B, N]    bool    which tokens are real, padding anywhere in a row; None: all
out     count             N': tokens after; equals CountRule.from_flat(prefix, rule).out(N)
prefix  int               protected leading real tokens P
rule    int[]             CountRule.flat; must contain HALF and add nothing
margin  float             cosine above which tokens count as similar
alpha   float             how much those below it count against a token
paper   bool              the energy as the paper's equation 4 has it, which jumps at the margin
halves  bool              split all tokens by rank and merge the best pairs (the code's "bsm"), instead of the 2r first
->      slot, leader, moved  as for bipartite_match

Per row, over its T unprotected real tokens, of which r = rule.removed(n) leave:
1. S_ij = cosine of i and j;  f(s) = s - m where s > m, else alpha (exp(s - m) - 1)   (paper: s where s >= m)
2. E_i = 1/T sum_j f(S_ij), i itself included as 1;  order: tokens by falling E
3. of the first 2r in order, every other one, from the first on, merges into the most similar of those between
   halves: of all T, every other one finds the most similar of those between, and the r best pairs merge
4. slots: [the P protected | those that neither merge nor are merged into, by falling E | those between, by falling E]
   halves: [the P protected | those that found one and stay, by falling similarity | those between, by falling E]

Float32 arithmetic (float64 for float64 input).  Ties: lowest index in the order by E; then first in that order.  A
token whose metric has a zero, infinite or NaN norm counts as the zero vector.  Raises nothing of its own.
Source: methods card 3.2 (Tran et al. 2024, merge.py:73-175; arXiv 2405.16148, algorithm 1).  Differs: stable order,
guarded norm, any number of protected tokens, r clamped, padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..counts import HALF, CountRule, at_most
from ..op import OnnxCall, Op, define_op
from .bipartite_match import fake as fake_match
from .bipartite_match import unit_vectors
from .opset import STANDARD as op
from .opset import TAMIS, rule_inputs
from .rows import ascending, slot_leaders

Plan = tuple[Tensor, Tensor, Tensor]


def reference(
    metric: Tensor,
    valid: Tensor | None,
    out: int,
    prefix: int,
    rule: list[int],
    margin: float,
    alpha: float,
    paper: bool,
    halves: bool,
) -> Plan:
    """See the module."""
    unit = unit_vectors(metric)
    batch, tokens = unit.shape[:2]
    valid = torch.ones((batch, tokens), dtype=torch.bool, device=unit.device) if valid is None else valid
    rank, count = valid.cumsum(1) - 1, valid.sum(1, keepdim=True)
    free = valid & (rank >= prefix)
    similarity = torch.bmm(unit, unit.transpose(1, 2))
    order = _energy(similarity, free, margin, alpha, paper).sort(dim=1, descending=True, stable=True).indices
    place = _inverse(order)
    removed = CountRule.from_flat(prefix, rule).removed(count)
    chosen = free if halves else free & (place < 2 * removed)
    offers, takes = chosen & (place % 2 == 0), chosen & (place % 2 == 1)
    # columns in the order by energy, so that the first of equal ones is the first in it
    ordered = similarity.gather(2, order.unsqueeze(1).expand(similarity.shape))
    ordered = ordered.masked_fill(~takes.gather(1, order).unsqueeze(1), -torch.inf)
    partner = ordered.argmax(2)
    if halves:
        merge_rank = _merge_rank(ordered.amax(2), offers, order, place)
        merges = offers & (merge_rank < removed)
        staying, kept = merge_rank - removed, offers.sum(1, keepdim=True) - removed
    else:
        merges, staying, kept = offers, place - 2 * removed, free.sum(1, keepdim=True) - 2 * removed
    first_taken = prefix + kept
    slot = torch.where(takes, first_taken + place // 2, prefix + staying)
    slot = torch.where(merges, first_taken + partner // 2, slot)
    slot = torch.where(free, slot, rank).masked_fill(~valid, -1)
    leader = slot_leaders(slot, valid & ~merges, out)
    return slot, leader, ascending(merges, tokens - out, leader[:, :1])


def _energy(similarity: Tensor, free: Tensor, margin: float, alpha: float, paper: bool) -> Tensor:
    """[B, N], -inf for tokens that take no part."""
    position = torch.arange(similarity.shape[1], device=similarity.device)
    # exactly 1 on the diagonal: rounding there would tell tokens apart that are alike
    similarity = similarity.masked_fill(position == position.unsqueeze(1), 1.0)
    above = similarity - margin
    below = alpha * torch.expm1(above)
    each = torch.where(above >= 0, similarity, below) if paper else torch.where(above > 0, above, below)
    total = each.masked_fill(~free.unsqueeze(1), 0).sum(2) / free.sum(1, keepdim=True)
    return total.masked_fill(~free, -torch.inf)


def _merge_rank(best: Tensor, offers: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """[B, N]: place of each token that offers among those, by falling similarity; equal ones by the order."""
    by_place = best.masked_fill(~offers, -torch.inf).gather(1, order)
    offering = offers.gather(1, order)
    ranked = by_place.sort(dim=1, descending=True, stable=True).indices
    # a token without any partner has -inf like those that do not offer, and comes before them
    behind = (~offering.gather(1, ranked)).sort(dim=1, stable=True).indices
    return _inverse(ranked.gather(1, behind)).gather(1, place)


def _inverse(order: Tensor) -> Tensor:
    position = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    return torch.zeros_like(order).scatter(1, order, position)


def fake(metric: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int], *_: Any) -> Plan:
    """Shape rule."""
    return fake_match(metric, valid, out, prefix, rule)


@script(TAMIS, default_opset=op)
def EnergyOrder(similarity, free, margin: float, alpha: float, paper: int):
    position = op.Range(0, op.Squeeze(op.Shape(similarity, start=1, end=2)), 1)
    itself = op.Equal(op.Unsqueeze(position, [0]), op.Unsqueeze(position, [1]))
    cosine = op.Where(itself, 1.0, similarity)
    above = cosine - margin
    below = (op.Exp(above) - 1.0) * alpha
    code = op.Where(above > 0.0, above, below)
    equation = op.Where(above >= 0.0, cosine, below)
    each = op.Where(op.Expand(paper, [1]) > 0, equation, code)
    seen = op.Unsqueeze(op.Cast(free, to=1), [1])
    total = op.ReduceSum(each * seen, [2], keepdims=0) / op.ReduceSum(op.Cast(free, to=1), [1], keepdims=1)
    lowest = op.Constant(value_float=float("-inf"))
    _, order = op.TopK(op.Where(free, total, lowest), op.Shape(similarity, start=1, end=2), axis=1)
    return order


@script(TAMIS, default_opset=op)
def SlotLists(slot, leads, merges, out):
    rows = op.Shape(slot, start=0, end=1)
    tokens = op.Shape(slot, start=1, end=2)
    size = op.Reshape(out, [1])
    position = op.Expand(op.Range(0, op.Squeeze(tokens), 1), op.Shape(slot))
    # one column more than needed takes what has no place in the list
    blank = op.Expand(0, op.Concat(rows, size + 1, axis=0))
    led = op.ScatterElements(blank, op.Where(leads, slot, size), position, axis=1)
    leader = op.Slice(led, [0], size, [1])
    spare = op.Expand(op.Slice(leader, [0], [1], [1]), op.Concat(rows, tokens - size + 1, axis=0))
    move_place = op.Where(merges, op.CumSum(op.Cast(merges, to=7), 1) - 1, tokens - size)
    moved = op.Slice(op.ScatterElements(spare, move_place, position, axis=1), [0], tokens - size, [1])
    return leader, moved


@script(TAMIS, default_opset=op)
def EnergyMatch(
    metric,
    valid,
    out,
    slopes,
    offsets,
    divisors,
    prefix: int,
    margin: float,
    alpha: float,
    paper: int,
    halves: int,
):
    x = op.Cast(metric, to=1)
    scaled = x / op.Max(op.ReduceL2(x, [-1], keepdims=1), 1e-12)
    unit = op.Where(op.IsNaN(scaled), 0.0, scaled)
    tokens = op.Shape(x, start=1, end=2)
    shape = op.Shape(x, start=0, end=2)
    present = op.Expand(valid, shape)
    real = op.Cast(present, to=7)
    rank = op.CumSum(real, 1) - 1
    count = op.ReduceSum(real, [1], keepdims=1)
    free = op.And(present, rank >= prefix)
    similarity = op.MatMul(unit, op.Transpose(unit, perm=[0, 2, 1]))
    order = EnergyOrder(similarity, free, margin, alpha, paper)
    position = op.Expand(op.Range(0, op.Squeeze(tokens), 1), shape)
    place = op.ScatterElements(position, order, position, axis=1)
    # Div truncates where Python floors, but only below zero, which the Max cuts off
    removed = op.Max(op.ReduceMin((slopes * (count - prefix) + offsets) / divisors, [1], keepdims=1), 0)
    all_ranks = op.Expand(halves, [1]) > 0
    chosen = op.And(free, op.Or(all_ranks, place < removed * 2))
    odd = op.Mod(place, 2) > 0
    offers = op.And(chosen, op.Not(odd))
    takes = op.And(chosen, odd)
    lowest = op.Constant(value_float=float("-inf"))
    columns = op.Expand(op.Unsqueeze(order, [1]), op.Shape(similarity))
    taking = op.Unsqueeze(op.GatherElements(op.Cast(takes, to=7), order, axis=1) > 0, [1])
    ordered = op.Where(taking, op.GatherElements(similarity, columns, axis=2), lowest)
    partner = op.ArgMax(ordered, axis=2, keepdims=0)
    offering = op.GatherElements(op.Cast(offers, to=7), order, axis=1)
    best = op.GatherElements(op.ReduceMax(ordered, [2], keepdims=0), order, axis=1)
    _, ranked = op.TopK(op.Where(offering > 0, best, lowest), tokens, axis=1)
    # a token without any partner has -inf like those that do not offer, and comes before them
    _, behind = op.TopK(op.GatherElements(offering, ranked, axis=1), tokens, axis=1)
    by_rank = op.GatherElements(ranked, behind, axis=1)
    rank_of_place = op.ScatterElements(position, by_rank, position, axis=1)
    merge_rank = op.GatherElements(rank_of_place, place, axis=1)
    merges = op.And(offers, op.Or(op.Not(all_ranks), merge_rank < removed))
    kept_pairs = op.ReduceSum(op.Cast(offers, to=7), [1], keepdims=1) - removed
    kept_rest = op.ReduceSum(op.Cast(free, to=7), [1], keepdims=1) - removed * 2
    first_taken = op.Where(all_ranks, kept_pairs, kept_rest) + prefix
    staying = op.Where(all_ranks, merge_rank - removed, place - removed * 2) + prefix
    of_taken = op.Where(takes, first_taken + place / 2, staying)
    of_free = op.Where(merges, first_taken + partner / 2, of_taken)
    slot = op.Where(present, op.Where(free, of_free, rank), -1)
    leader, moved = SlotLists(slot, op.And(present, op.Not(merges)), merges, out)
    return slot, leader, moved


def onnx(
    metric: Tensor,
    valid: Tensor | None,
    out: int,
    prefix: int,
    rule: list[int],
    margin: float,
    alpha: float,
    paper: bool,
    halves: bool,
) -> OnnxCall:
    """Calls EnergyMatch."""
    switches = {"paper": int(paper), "halves": int(halves)}
    attributes = {"prefix": prefix, "margin": float(margin), "alpha": float(alpha), **switches}
    valid = torch.ones((1, 1), dtype=torch.bool, device=metric.device) if valid is None else valid
    return OnnxCall(EnergyMatch, [metric, valid, out, *rule_inputs(rule)], attributes)


def flops(metric: Any, valid: Any, *_: Any, **__: Any) -> int:
    """The similarity product: 2 * B * N * N * D, padding and protected tokens included."""
    batch, tokens, width = metric
    return 2 * batch * tokens * tokens * width


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    switches = [(paper, halves) for paper in (False, True) for halves in (False, True)]
    sizes = [
        (2, 12, 1, 3),
        (1, 17, 0, 8),
        (3, 9, 2, 2),
        (2, 8, 5, 4),
        (0, 8, 1, 2),
        (2, 6, 1, 0),
        (2, 1, 0, 5),
        (2, 2, 1, 5),
    ]
    for i, (batch, tokens, prefix, r) in enumerate(sizes):
        metric, rule = torch.randn(batch, tokens, 16, generator=generator), CountRule(prefix, (at_most(r), HALF))
        real = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
        rest = rule.out(tokens), prefix, rule.flat(), 0.25, 1.0
        for j, valid in enumerate((None, torch.arange(tokens) < real, torch.arange(tokens) >= tokens - real)):
            yield metric, valid, *rest, *switches[(i + j) % 4]
            yield metric, valid, *rest, *switches[(i + j + 1) % 4]
    tied = torch.eye(4)[torch.randint(0, 4, (3, 21), generator=generator)]
    rule = CountRule(1, (at_most(7), HALF))
    for halves in (False, True):
        yield tied, None, rule.out(21), 1, rule.flat(), 0.5, 1.0, False, halves


ENERGY_MATCH = define_op(
    Op(
        name="energy_match",
        schema="(Tensor metric, Tensor? valid, SymInt out, int prefix, int[] rule, float margin, float alpha,"
        " bool paper, bool halves) -> (Tensor slot, Tensor leader, Tensor moved)",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="energy_match",
    )
)
