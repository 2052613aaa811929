"""reduce_tokens: apply a plan: the weighted sum, or mean, of the tokens of each slot.

    y[b, j] = sum of w[b, i] x[b, i] over tokens i of slot j   (divided by the sum of their w with `normalize`)

x          [B, N, C]  float     token features
slot       [B, N]     int64     slot of each token, -1: none
leader     [B, N']    int64     the token that stands for each slot
moved      [B, E]     int64     tokens in slots led by another, ascending; an entry that leads its own slot is unused.
                                None: nothing is merged, and the result is the leaders as they are
weight     [B, N]     float32   w; None: 1
normalize  bool                 mean or sum
->         [B, N', C] as x

Float32 arithmetic (float64 for float64 input), rounded once to x's type; the moved tokens of a slot are added to its
leader in ascending order (in a reference inlined on CUDA, in any).  A mean is leader + sum w_i (x_i - leader) /
sum w, so a slot of one token, or of equal ones, is a bitwise copy; so is one of one token in a sum without weight.  NaN
and inf stay within their slot.  Where the weights of a slot add up to 0 its mean is NaN.  Raises nothing of its own.
Source: the apply step of methods card 1.2 and rule 0.4.6.  Differs: only moved tokens are scattered, never all; no
`mean` scatter, which an ONNX exporter translates wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from .merge_tokens import MergeTokensSpare, drawn_plan, merged_tokens, sample_plan, uses
from .opset import STANDARD as op
from .opset import TAMIS
from .precision import compute_dtype
from .rows import add_rows, take_rows


def reference(
    x: Tensor, slot: Tensor, leader: Tensor, moved: Tensor | None, weight: Tensor | None, normalize: bool
) -> Tensor:
    """See the module."""
    if moved is None:
        return take_rows(x, leader)
    used = uses(slot, leader, moved)
    if normalize:
        return merged_tokens(x, slot, leader, moved, weight, used)[0]
    total, part = take_rows(x, leader).to(compute_dtype(x)), take_rows(x, moved).to(compute_dtype(x))
    if weight is not None:
        mass, part_mass = (weight.to(total.dtype).gather(1, index) for index in (leader, moved))
        total, part = total * mass.unsqueeze(2), part * part_mass.unsqueeze(2)
    part = part.masked_fill(~used.unsqueeze(2), 0)
    return add_rows(total, slot.gather(1, moved).clamp(min=0), part).to(x.dtype)


def fake(
    x: Tensor, slot: Tensor, leader: Tensor, moved: Tensor | None, weight: Tensor | None, normalize: bool
) -> Tensor:
    """Shape rule."""
    return x.new_empty((x.shape[0], leader.shape[1], x.shape[2]))


@script(TAMIS, default_opset=op)
def GatherTokens(x, leader):
    return op.GatherND(x, op.Unsqueeze(leader, [2]), batch_dims=1)


@script(TAMIS, default_opset=op)
def MeanTokens(x, slot, leader, moved, weight):
    mean, _ = MergeTokensSpare(x, slot, leader, moved, weight)
    return mean


@script(TAMIS, default_opset=op)
def SumTokens(x, slot, leader, moved, weight):
    goal = op.Max(op.GatherElements(slot, moved, axis=1), 0)
    used = op.Not(op.Equal(op.GatherElements(leader, goal, axis=1), moved))
    led = op.Cast(op.GatherND(x, op.Unsqueeze(leader, [2]), batch_dims=1), to=1)
    part = op.Cast(op.GatherND(x, op.Unsqueeze(moved, [2]), batch_dims=1), to=1)
    every_weight = op.Expand(op.Cast(weight, to=1), op.Shape(slot))
    led_weight = op.GatherElements(every_weight, leader, axis=1)
    part_weight = op.GatherElements(every_weight, moved, axis=1)
    added = op.Where(op.Unsqueeze(used, [2]), part * op.Unsqueeze(part_weight, [2]), 0.0)
    index = op.Expand(op.Unsqueeze(goal, [2]), op.Shape(part))
    total = op.ScatterElements(led * op.Unsqueeze(led_weight, [2]), index, added, axis=1, reduction="add")
    return op.CastLike(total, x)


def onnx(
    x: Tensor, slot: Tensor, leader: Tensor, moved: Tensor | None, weight: Tensor | None, normalize: bool
) -> OnnxCall:
    """Calls GatherTokens when nothing is merged, MeanTokens for means, SumTokens for sums."""
    if moved is None:
        return OnnxCall(GatherTokens, [x, leader], {})
    weights = [1] if weight is None else weight
    return OnnxCall(MeanTokens if normalize else SumTokens, [x, slot, leader, moved, weights], {})


def flops(x: Any, slot: Any, leader: Any, moved: Any, *_: Any, **__: Any) -> int:
    """A multiply and an add per element that moves."""
    return 0 if moved is None else 2 * moved[0] * moved[1] * x[2]


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests: plans with several, one and no source per slot, and spare entries."""
    *plan, weight = drawn_plan(2, 67, 31, 13)
    yield *plan, weight, False
    x, slot, leader, moved, weight = sample_plan()
    for normalize in (True, False):
        for dtype in (torch.float32, torch.float16):
            yield x.to(dtype), slot, leader, None, None, normalize
            yield x.to(dtype), slot, leader, moved, None, normalize
            yield x.to(dtype), slot, leader, moved, weight, normalize
        yield x[:1], slot[:1], leader[:1], moved[:1, :0], weight[:1], normalize
        yield x[:0], slot[:0], leader[:0], moved[:0], weight[:0], normalize


REDUCE_TOKENS = define_op(
    Op(
        name="reduce_tokens",
        schema="(Tensor x, Tensor slot, Tensor leader, Tensor? moved, Tensor? weight, bool normalize) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="reduce",
    )
)
