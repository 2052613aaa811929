"""order_slots: the same plan with its slots in the order of their last tokens, each led by its last token.

    last[b, j] = max of i over tokens i of slot j;   slots are numbered by rising `last`, those without a token after

slot    [B, N]   int64   slot of each token, -1: none
leader  [B, N']  int64   the token that leads each slot: only its length is read
moved   [B, E]   int64   tokens that lead no slot, with spare entries: only its length is read; None: nothing is merged
->      slot   [B, N]    int64: the new numbers
        leader [B, N']   int64: the last token of each slot, rising; 0 where a row has no such slot
        moved  [B, E]    int64: tokens in a slot that another leads, ascending; spare entries are leader[:, 0].
               [B, 0]    without `moved`

Under a causal mask a slot at the place of its last token shows nothing to a query that one of its tokens comes after,
and sees all that any of its tokens saw.  Exact integers, no ties.  Raises nothing of its own.  Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from .opset import STANDARD as op
from .opset import TAMIS
from .rows import ascending, slot_leaders

Plan = tuple[Tensor, Tensor, Tensor]


def reference(slot: Tensor, leader: Tensor, moved: Tensor | None) -> Plan:
    """See the module."""
    out = leader.shape[1]
    position = torch.arange(slot.shape[1], device=slot.device).expand(slot.shape)
    used = slot >= 0
    # column `out` takes tokens without a slot
    last = slot.new_full((slot.shape[0], out + 1), -1)
    last = last.scatter_reduce(1, torch.where(used, slot, out), position, "amax")
    end = last.gather(1, slot.clamp(min=0))
    leads = used & (end == position)
    number = (leads.cumsum(1) - 1).gather(1, end.clamp(min=0))
    ordered = torch.where(used, number, -1)
    leaders = slot_leaders(ordered, leads, out)
    spare = 0 if moved is None else moved.shape[1]
    return ordered, leaders, ascending(used & ~leads, spare, leaders[:, :1])


def fake(slot: Tensor, leader: Tensor, moved: Tensor | None) -> Plan:
    """Shape rule."""
    return (
        torch.empty_like(slot),
        torch.empty_like(leader),
        slot.new_empty((slot.shape[0], 0 if moved is None else moved.shape[1])),
    )


@script(TAMIS, default_opset=op)
def OrderSlots(slot, leader, moved):
    position = op.Expand(op.Range(0, op.Squeeze(op.Shape(slot, start=1, end=2)), 1), op.Shape(slot))
    rows = op.Shape(slot, start=0, end=1)
    out = op.Shape(leader, start=1, end=2)
    spare = op.Shape(moved, start=1, end=2)
    used = slot >= 0
    # column `out` takes tokens without a slot
    empty = op.Expand(op.Constant(value_int=-1), op.Concat(rows, out + 1, axis=0))
    last = op.ScatterElements(empty, op.Where(used, slot, out), position, axis=1, reduction="max")
    end = op.GatherElements(last, op.Max(slot, 0), axis=1)
    leads = op.And(used, op.Equal(end, position))
    number = op.GatherElements(op.CumSum(op.Cast(leads, to=7), 1) - 1, op.Max(end, 0), axis=1)
    ordered = op.Where(used, number, -1)
    # one column more than needed takes what has no place in the list
    blank = op.Expand(op.Constant(value_int=0), op.Concat(rows, out + 1, axis=0))
    table = op.ScatterElements(blank, op.Where(leads, ordered, out), position, axis=1)
    leaders = op.Slice(table, [0], out, [1])
    moves = op.And(used, op.Not(leads))
    first = op.Expand(op.Slice(table, [0], [1], [1]), op.Concat(rows, spare + 1, axis=0))
    place = op.Where(moves, op.CumSum(op.Cast(moves, to=7), 1) - 1, spare)
    return ordered, leaders, op.Slice(op.ScatterElements(first, place, position, axis=1), [0], spare, [1])


def onnx(slot: Tensor, leader: Tensor, moved: Tensor | None) -> OnnxCall:
    """Calls OrderSlots."""
    return OnnxCall(OrderSlots, [slot, leader, leader[:, :0] if moved is None else moved], {})


def flops(*_: Any, **__: Any) -> int:
    """Integers are not counted."""
    return 0


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    for batch, tokens, out in [(2, 9, 5), (3, 7, 7), (1, 6, 1), (2, 41, 17), (1, 1, 1)]:
        led = torch.stack([torch.randperm(tokens, generator=generator)[:out] for _ in range(batch)])
        slot = torch.randint(0, out, (batch, tokens), generator=generator)
        slot = slot.scatter(1, led, torch.arange(out).expand(batch, out))
        yield slot, led, torch.zeros(batch, tokens - out, dtype=torch.int64)
        kept = torch.full_like(slot, -1).scatter(1, led, torch.arange(out).expand(batch, out))
        yield kept, led, None
        padded = slot.masked_fill(torch.arange(tokens) >= tokens - torch.arange(batch).unsqueeze(1), -1)
        yield padded, led, torch.zeros(batch, tokens, dtype=torch.int64)
    nothing = torch.zeros(0, 4, dtype=torch.int64)
    yield nothing, nothing[:, :2], nothing[:, :2]


ORDER_SLOTS = define_op(
    Op(
        name="order_slots",
        schema="(Tensor slot, Tensor leader, Tensor? moved) -> (Tensor slot, Tensor leader, Tensor moved)",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="order",
    )
)
