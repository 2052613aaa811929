"""rescale_tokens: the mean of each slot at the largest norm of its tokens, by which a mean falls short (MLERP).

    z[b, j] = y[b, j] * max ||x[b, i]|| / ||y[b, j]||   over tokens i of slot j

y       [B, N', C]  float   what the tokens of each slot were reduced to
x       [B, N, C]   float   the tokens
slot    [B, N]      int64   slot of each token, -1: none
leader  [B, N']     int64   the token that stands for each slot
moved   [B, E]      int64   tokens in slots led by another, ascending; an entry that leads its own slot is unused
->      [B, N', C] as y

Float32 arithmetic (float64 for float64 input), rounded once to y's type; a maximum is the same in any order.  A slot of
one token, and one whose mean is zero and so has no direction, is a bitwise copy of y.  NaN and inf stay within their
slot.  Raises nothing of its own.
Source: methods card 4.2 (Kim et al. 2024, arXiv 2312.01026).  Differs: what a mean of zero gives, which it leaves open.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from .merge_tokens import drawn_plan, merged_tokens, sample_plan, uses
from .opset import STANDARD as op
from .opset import TAMIS
from .precision import compute_dtype


def reference(y: Tensor, x: Tensor, slot: Tensor, leader: Tensor, moved: Tensor) -> Tensor:
    """See the module."""
    used, goal = uses(slot, leader, moved), slot.gather(1, moved).clamp(min=0)
    mean, norms = y.to(compute_dtype(y)), torch.linalg.vector_norm(x.to(compute_dtype(y)), dim=-1)
    led, joined = norms.gather(1, leader), norms.gather(1, moved)
    largest = led.scatter_reduce(1, goal, joined.masked_fill(~used, 0), "amax")
    shared = torch.zeros_like(led).scatter_reduce(1, goal, used.to(led.dtype), "amax")
    length = torch.linalg.vector_norm(mean, dim=-1)
    rescaled = mean * (largest / length).unsqueeze(2)
    return torch.where(((shared > 0) & (length != 0)).unsqueeze(2), rescaled, mean).to(y.dtype)


def fake(y: Tensor, x: Tensor, slot: Tensor, leader: Tensor, moved: Tensor) -> Tensor:
    """Shape rule."""
    return torch.empty_like(y)


@script(TAMIS, default_opset=op)
def RescaleTokens(y, x, slot, leader, moved):
    goal = op.Max(op.GatherElements(slot, moved, axis=1), 0)
    used = op.Not(op.Equal(op.GatherElements(leader, goal, axis=1), moved))
    # axis 2, not -1, over which ONNX Runtime reduces a batch of 0 rows to its own shape
    norms = op.ReduceL2(op.Cast(x, to=1), [2], keepdims=0)
    led = op.GatherElements(norms, leader, axis=1)
    joined = op.Where(used, op.GatherElements(norms, moved, axis=1), 0.0)
    largest = op.ScatterElements(led, goal, joined, axis=1, reduction="max")
    alone = op.Expand(op.Constant(value_int=0), op.Shape(leader))
    shared = op.ScatterElements(alone, goal, op.Cast(used, to=7), axis=1, reduction="max")
    mean = op.Cast(y, to=1)
    length = op.ReduceL2(mean, [2], keepdims=0)
    rescaled = mean * op.Unsqueeze(largest / length, [2])
    chosen = op.And(shared > 0, op.Not(op.Equal(length, 0.0)))
    return op.CastLike(op.Where(op.Unsqueeze(chosen, [2]), rescaled, mean), y)


def onnx(y: Tensor, x: Tensor, slot: Tensor, leader: Tensor, moved: Tensor) -> OnnxCall:
    """Calls RescaleTokens."""
    return OnnxCall(RescaleTokens, [y, x, slot, leader, moved], {})


def flops(y: Any, x: Any, *_: Any, **__: Any) -> int:
    """The norms of tokens and means, a multiply and an add per element, and the scaling."""
    return 2 * x[0] * x[1] * x[2] + 3 * y[0] * y[1] * y[2]


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests: several, one and no source per slot, spare entries, a mean of zero."""
    x, slot, leader, moved, weight = drawn_plan(2, 67, 31, 13)
    yield merged_tokens(x, slot, leader, moved, weight, None)[0], x, slot, leader, moved
    x, slot, leader, moved, weight = sample_plan()
    opposite = x.clone()
    opposite[0, 3], opposite[0, 4], opposite[1, 3], opposite[1, 4] = -x[0, 1], 0, 2.5, -2.5
    for tokens in (x, x.half(), opposite):
        used = uses(slot, leader, moved)
        yield merged_tokens(tokens, slot, leader, moved, None, used)[0], tokens, slot, leader, moved
    yield x[:1, :4], x[:1], slot[:1], leader[:1], moved[:1, :0]
    yield x[:0, :4], x[:0], slot[:0], leader[:0], moved[:0]


RESCALE_TOKENS = define_op(
    Op(
        name="rescale_tokens",
        schema="(Tensor y, Tensor x, Tensor slot, Tensor leader, Tensor moved) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton=None,
    )
)
