"""valid_slots: which slots of a reduction hold a token, where rows have padding.

    out[b, j] = j < CountRule.from_flat(prefix, rule).out(number of real tokens in row b)

valid   [B, N]    bool   real tokens before the reduction
out     count            N', slots after it
prefix  protected leading tokens;  rule  int[], see CountRule.flat
->      [B, N']   bool   slots are packed to the front, so row b's are its first ones

Exact integers, no ties, raises nothing.  Source: ours; the methods' cards know no padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..counts import HALF, CountRule, at_most, keep_at_least
from ..op import OnnxCall, Op, define_op
from .opset import STANDARD as op
from .opset import TAMIS, rule_inputs


def reference(valid: Tensor, out: int, prefix: int, rule: list[int]) -> Tensor:
    """See the module."""
    real = CountRule.from_flat(prefix, rule).out(valid.sum(1, keepdim=True))
    return torch.arange(out, device=valid.device) < real


def fake(valid: Tensor, out: int, prefix: int, rule: list[int]) -> Tensor:
    """Shape rule."""
    return valid.new_empty((valid.shape[0], out))


@script(TAMIS, default_opset=op)
def ValidSlots(valid, out, slopes, offsets, divisors, prefix: int, added: int):
    count = op.ReduceSum(op.Cast(valid, to=7), [1], keepdims=1)
    # Div truncates where Python floors, but only below zero, which the Max cuts off
    removed = op.Max(op.ReduceMin((slopes * (count - prefix) + offsets) / divisors, [1], keepdims=1), 0)
    return op.Range(0, op.Squeeze(out), 1) < count - removed + added * op.Min(removed, 1)


def onnx(valid: Tensor, out: int, prefix: int, rule: list[int]) -> OnnxCall:
    """Calls ValidSlots."""
    return OnnxCall(ValidSlots, [valid, out, *rule_inputs(rule)], {"prefix": prefix, "added": rule[0]})


def flops(*_: Any, **__: Any) -> int:
    """Integers are not counted."""
    return 0


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    lengths = torch.tensor([[7], [1], [4], [2]])
    rules = [
        CountRule(1, (at_most(2), HALF)),
        CountRule(2, (keep_at_least(0.6),), added=1),
        CountRule(0, (at_most(0),)),
    ]
    for rule in rules:
        yield torch.arange(7) < lengths, rule.out(7), rule.prefix, rule.flat()
        yield (torch.arange(7) < lengths).flip(1), rule.out(7), rule.prefix, rule.flat()
    long = torch.rand(2, 53, generator=torch.Generator().manual_seed(0)) < 0.8
    yield long, rules[1].out(53), 2, rules[1].flat()
    yield torch.ones(0, 5, dtype=torch.bool), 3, 1, rules[0].flat()


VALID_SLOTS = define_op(
    Op(
        name="valid_slots",
        schema="(Tensor valid, SymInt out, int prefix, int[] rule) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="valid",
    )
)
