"""select_tokens: keep the tokens with the highest scores; drop the rest, or fuse them into one.

scores  [B, N] float or int64   higher stays
valid   [B, N] bool             which tokens are real, padding anywhere in a row; None: all
out     count                   N': tokens after; equals CountRule.from_flat(prefix, rule).out(N)
prefix  int                     protected leading real tokens P, kept whatever they score
rule    int[]                   CountRule.flat; adds 1 exactly when `fuse`
order   str                     "original": kept tokens stay in order; "score": by descending score
fuse    bool                    dropped tokens share one slot after the kept ones
->      slot   [B, N]       int64: output slot of each token; -1: dropped (without fuse) or padding
        leader [B, N']      int64: the token that stands for each slot, 0 where a row has no such slot
        moved  [B, N - N']  int64, with fuse: dropped tokens but the one that leads, ascending; spare entries are
               [B, 0]       leader[:, 0].  Without fuse nothing moves

Per row with n real tokens: the n - P - rule.removed(n) unprotected tokens with the highest scores are kept.  With fuse,
all dropped go to the slot after the kept; the one with the highest score leads it.  A row that drops none has no such
slot.

Exact: nothing is computed but an order.  Ties: lowest index (stable).  NaN scores count as -inf.  Raises nothing of its
own.  ONNX compares in float64, so int64 scores beyond 2^53 are not told apart there.
Source: methods cards 7.2 (EViT) and 8.2 (random drop).  Differs: stable order; the fused slot is a plan, its weights
are the caller's; any number of protected tokens; padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..counts import ALL, CountRule, at_most, keep_at_least
from ..op import OnnxCall, Op, define_op
from .opset import STANDARD as op
from .opset import TAMIS, rule_inputs
from .rows import ascending, first_columns, slot_leaders
from .symbols import spare_length

Plan = tuple[Tensor, Tensor, Tensor]


def reference(
    scores: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int], order: str, fuse: bool
) -> Plan:
    """See the module."""
    if scores.is_floating_point():
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    count_rule, in_order = CountRule.from_flat(prefix, rule), order == "original"
    if valid is None:
        return _select_all(scores, out, count_rule, in_order, fuse)
    return _select_real(scores, valid, out, count_rule, in_order, fuse)


def _select_all(scores: Tensor, out: int, rule: CountRule, in_order: bool, fuse: bool) -> Plan:
    """Every token is real, so all counts are the same in every row."""
    (batch, tokens), prefix = scores.shape, rule.prefix
    ranked = prefix + scores[:, prefix:].sort(dim=1, descending=True, stable=True).indices
    rest = ranked
    if in_order:
        kept = tokens - prefix - rule.removed(tokens) if fuse else out - prefix
        rest = torch.cat([ranked[:, :kept].sort(dim=1).values, ranked[:, kept:]], 1)
    position = torch.arange(tokens, device=scores.device).expand(batch, -1)
    leader = first_columns(torch.cat([position[:, :prefix], rest], 1), out)
    # what leads no slot is dropped: into the last slot or into none
    slot = torch.full_like(position, -1) if not fuse else (torch.zeros_like(position) + (out - 1))
    slot = slot.scatter(1, leader, torch.arange(out, device=scores.device).expand(batch, out))
    return slot, leader, ranked[:, out - prefix :].sort(dim=1).values if fuse else ranked[:, :0]


def _select_real(scores: Tensor, valid: Tensor, out: int, rule: CountRule, in_order: bool, fuse: bool) -> Plan:
    """Rows of different length: protected tokens first, then the others by score, then padding."""
    count = valid.sum(1, keepdim=True)
    protected = valid & (valid.cumsum(1) <= rule.prefix)
    # equal scores keep the protected tokens in order; the second sort is stable and keeps the order by score
    highest = torch.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).max
    by_score = scores.masked_fill(protected, highest).sort(dim=1, descending=True, stable=True).indices
    group = torch.where(protected, 0, torch.where(valid, 1, 2)).gather(1, by_score)
    ranked = by_score.gather(1, group.sort(dim=1, stable=True).indices)
    position = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    place = torch.zeros_like(ranked).scatter(1, ranked, position)
    kept = count - rule.removed(count)
    keeps = place < kept
    slot = torch.where(keeps, keeps.cumsum(1) - 1 if in_order else place, kept if fuse else -1)
    slot = slot.masked_fill(~valid, -1)
    leads = valid & (place < kept + 1 if fuse else keeps)
    leader = slot_leaders(slot, leads, out)
    if not fuse:
        return slot, leader, ranked[:, :0]
    return slot, leader, ascending(valid & ~leads, scores.shape[1] - out, leader[:, :1])


def fake(scores: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int], order: str, fuse: bool) -> Plan:
    """Shape rule."""
    batch, tokens = scores.shape
    shapes = [(batch, tokens), (batch, out), (batch, spare_length(tokens, out) if fuse else 0)]
    slot, leader, moved = (scores.new_empty(shape, dtype=torch.int64) for shape in shapes)
    return slot, leader, moved


@script(TAMIS, default_opset=op)
def SelectTokens(scores, out, slopes, offsets, divisors, prefix: int, fuse: int, in_order: int):
    exact = op.Cast(scores, to=11)
    clean = op.Where(op.IsNaN(exact), op.Cast(op.Constant(value_float=float("-inf")), to=11), exact)
    tokens = op.Shape(scores, start=1, end=2)
    first = op.Reshape(prefix, [1])
    size = op.Reshape(out, [1])
    _, by_score = op.TopK(op.Slice(clean, first, tokens, [1]), tokens - first, axis=1)
    ranked = by_score + prefix
    # Div truncates where Python floors, but only below zero, which the Max cuts off
    removed = op.Max(op.ReduceMin((slopes * (tokens - prefix) + offsets) / divisors, [0], keepdims=1), 0)
    kept = tokens - first - removed
    best = op.Slice(ranked, [0], kept, [1])
    # ascending; when the order by score is wanted all keys are 0 and it stays
    _, ascending = op.TopK(best * in_order, kept, axis=1, largest=0)
    ordered = op.GatherElements(best, ascending, axis=1)
    position = op.Expand(op.Range(0, op.Squeeze(tokens), 1), op.Shape(scores))
    protected = op.Slice(position, [0], first, [1])
    leader = op.Concat(protected, ordered, op.Slice(ranked, kept, size - first, [1]), axis=1)
    # what leads no slot is dropped: into the last slot or into none
    elsewhere = op.Expand(size * fuse - 1, op.Shape(scores))
    slot = op.ScatterElements(elsewhere, leader, op.Slice(position, [0], size, [1]), axis=1)
    extra = (tokens - size) * fuse
    behind = op.Slice(ranked, size - first, size - first + extra, [1])
    moved, _ = op.TopK(behind, extra, axis=1, largest=0)
    return slot, leader, moved


@script(TAMIS, default_opset=op)
def SelectTokensMasked(scores, valid, out, slopes, offsets, divisors, prefix: int, fuse: int, in_order: int):
    exact = op.Cast(scores, to=11)
    infinite = op.Cast(op.Constant(value_float=float("inf")), to=11)
    real = op.Cast(valid, to=7)
    protected = op.And(valid, op.CumSum(real, 1) <= prefix)
    clean = op.Where(protected, infinite, op.Where(op.IsNaN(exact), op.Neg(infinite), exact))
    tokens = op.Shape(scores, start=1, end=2)
    size = op.Reshape(out, [1])
    _, by_score = op.TopK(clean, tokens, axis=1)
    # protected 2, other real ones 1, padding 0; TopK keeps the order by score among equals
    group = op.GatherElements(real + op.Cast(protected, to=7), by_score, axis=1)
    _, by_group = op.TopK(group, tokens, axis=1)
    ranked = op.GatherElements(by_score, by_group, axis=1)
    position = op.Expand(op.Range(0, op.Squeeze(tokens), 1), op.Shape(scores))
    place = op.ScatterElements(position, ranked, position, axis=1)
    count = op.ReduceSum(real, [1], keepdims=1)
    # Div truncates where Python floors, but only below zero, which the Max cuts off
    removed = op.Max(op.ReduceMin((slopes * (count - prefix) + offsets) / divisors, [1], keepdims=1), 0)
    kept = count - removed
    keeps = place < kept
    ordered = op.CumSum(op.Cast(keeps, to=7), 1) - 1
    slot_kept = ordered * in_order + place * (1 - in_order)
    slot = op.Where(valid, op.Where(keeps, slot_kept, (kept + 1) * fuse - 1), -1)
    leads = op.And(valid, place < kept + fuse)
    rows = op.Shape(scores, start=0, end=1)
    # one column more than needed takes what has no place in the list
    blank = op.Expand(0, op.Concat(rows, size + 1, axis=0))
    leader_table = op.ScatterElements(blank, op.Where(leads, slot, size), position, axis=1)
    leader = op.Slice(leader_table, [0], size, [1])
    extra = (tokens - size) * fuse
    moves = op.And(op.And(valid, op.Not(leads)), op.Expand(fuse, [1]) > 0)
    spare = op.Expand(op.Slice(leader, [0], [1], [1]), op.Concat(rows, extra + 1, axis=0))
    move_place = op.Where(moves, op.CumSum(op.Cast(moves, to=7), 1) - 1, extra)
    moved = op.Slice(op.ScatterElements(spare, move_place, position, axis=1), [0], extra, [1])
    return slot, leader, moved


def onnx(
    scores: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int], order: str, fuse: bool
) -> OnnxCall:
    """Calls SelectTokens or, with padding, SelectTokensMasked."""
    attributes = {"prefix": prefix, "fuse": int(fuse), "in_order": int(order == "original")}
    if valid is None:
        return OnnxCall(SelectTokens, [scores, out, *rule_inputs(rule)], attributes)
    return OnnxCall(SelectTokensMasked, [scores, valid, out, *rule_inputs(rule)], attributes)


def flops(scores: Any, valid: Any, out: int, *_: Any, **__: Any) -> int:
    """It only compares."""
    return 0


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    terms = {"ratio": (keep_at_least(0.5),), "r": (at_most(3),), "one": (at_most(1),), "none": (at_most(0),)}
    for batch, tokens, prefix, term in [
        (2, 11, 1, "ratio"),
        (1, 8, 0, "r"),
        (3, 9, 2, "one"),
        (2, 6, 1, "none"),
        (2, 53, 2, "ratio"),
        (0, 7, 1, "r"),
    ]:
        scores = torch.randint(0, 6, (batch, tokens), generator=generator)
        real = torch.randint(max(prefix, 1), tokens + 1, (batch, 1), generator=generator)
        for fuse in (False, True):
            rule = CountRule(prefix, (*terms[term], ALL), added=int(fuse))
            rest = rule.out(tokens), prefix, rule.flat()
            yield scores.float(), None, *rest, "original", fuse
            yield scores, None, *rest, "score", fuse
            yield scores, torch.arange(tokens) < real, *rest, "original", fuse
            yield scores.float(), torch.arange(tokens) >= tokens - real, *rest, "score", fuse
    for fuse in (False, True):
        rule = CountRule(1, (*terms["ratio"], at_most(13)), added=int(fuse))
        scores = torch.randn(3, 37, generator=generator)
        scores[:, 5], scores[:, 11], scores[:, 17], scores[0, 20:] = torch.nan, torch.inf, -torch.inf, torch.nan
        rest = rule.out(37), 1, rule.flat()
        yield scores, None, *rest, "score", fuse
        yield scores.half(), torch.rand(3, 37, generator=generator) < 0.7, *rest, "original", fuse


SELECT_TOKENS = define_op(
    Op(
        name="select_tokens",
        schema="(Tensor scores, Tensor? valid, SymInt out, int prefix, int[] rule, str order, bool fuse)"
        " -> (Tensor slot, Tensor leader, Tensor moved)",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="select",
    )
)
