"""token_count: how many tokens are left, as a number of the graph.

    token_count(like, axis, prefix, rule) = CountRule.from_flat(prefix, rule).out(like.shape[axis])

like    any dtype, at least axis+1 dimensions; only its shape is read
axis    its token axis
prefix  protected leading tokens;  rule  int[], see CountRule.flat (divisors are positive)
->      SymInt: an int at run time, a fresh backed symbol while tracing with a symbolic axis (symbols.py says why)

Exact integers, no ties, raises nothing.  Source: the counts of methods cards 1.5, 7.2, 8.3.
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
from .symbols import fresh_count


def reference(like: Tensor, axis: int, prefix: int, rule: list[int]) -> Any:
    """See the module."""
    return CountRule.from_flat(prefix, rule).out(like.shape[axis])


@script(TAMIS, default_opset=op)
def TokenCount(like, slopes, offsets, divisors, axis: int, prefix: int, added: int):
    before = op.Gather(op.Shape(like), axis, axis=0)
    # Div truncates where Python floors, but only below zero, which the last Max cuts off
    least = op.ReduceMin((slopes * (before - prefix) + offsets) / divisors, keepdims=0)
    removed = op.Max(least, 0)
    return before - removed + added * op.Min(removed, 1)


def onnx(like: Tensor, axis: int, prefix: int, rule: list[int]) -> OnnxCall:
    """Calls TokenCount."""
    return OnnxCall(TokenCount, [like, *rule_inputs(rule)], {"axis": axis, "prefix": prefix, "added": rule[0]})


def flops(like: Any, axis: int, prefix: int, rule: list[int], **_: Any) -> int:
    """Integers are not counted."""
    return 0


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    rules = [
        CountRule(1, (at_most(13), HALF)),
        CountRule(2, (keep_at_least(0.7),), added=1),
        CountRule(0, (at_most(0),)),
        CountRule(1, ((1, -5, 3), HALF), added=1),
    ]
    for tokens in (1, 2, 3, 17, 197):
        for rule in rules:
            yield torch.zeros(2, tokens, 4), 1, rule.prefix, rule.flat()
    yield torch.zeros(0, 3, 9), 2, 1, rules[0].flat()


TOKEN_COUNT = define_op(
    Op(
        name="token_count",
        schema="(Tensor like, int axis, int prefix, int[] rule) -> SymInt",
        reference=reference,
        fake=fresh_count,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton=None,
    )
)
