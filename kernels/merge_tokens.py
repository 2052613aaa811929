"""merge_tokens: the mean of the tokens of each slot by weight, and what they weigh together, which is their new weight.

    mass[b, j] = sum of w[b, i],   y[b, j] = sum of w[b, i] x[b, i] / mass[b, j]   over tokens i of slot j

x       [B, N, C]  float    token features
slot    [B, N]     int64    slot of each token, -1: none
leader  [B, N']    int64    the token that stands for each slot
moved   [B, E]     int64    tokens in slots led by another, ascending
weight  [B, N]     float32  w; None: 1
spare   bool                whether `moved` may have unused entries: those that lead their own slot
->      [B, N', C] as x;  [B, N'] float32

Float32 arithmetic (float64 for float64 input), rounded once to x's type; the moved tokens of a slot are added to its
leader in ascending order (in a reference inlined on CUDA, in any).  The mean is leader + sum w_i (x_i - leader) /
mass, so a slot of one token, or of equal ones, is a bitwise copy.  NaN and inf stay within their slot.  Where the
weights of a slot add up to 0 its mean is NaN.  Raises nothing of its own.
Source: the apply step of methods card 1.2 and rule 0.4.6.  Differs: only moved tokens are added, never all; the mass
comes with the mean, which needs it anyway.
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
from .precision import compute_dtype
from .rows import add_rows, take_rows


def reference(
    x: Tensor, slot: Tensor, leader: Tensor, moved: Tensor, weight: Tensor | None, spare: bool
) -> tuple[Tensor, Tensor]:
    """See the module."""
    return merged_tokens(x, slot, leader, moved, weight, uses(slot, leader, moved) if spare else None)


def uses(slot: Tensor, leader: Tensor, moved: Tensor) -> Tensor:
    """[B, E] bool: which entries of `moved` do not lead their own slot."""
    return leader.gather(1, slot.gather(1, moved).clamp(min=0)) != moved


def merged_tokens(
    x: Tensor, slot: Tensor, leader: Tensor, moved: Tensor, weight: Tensor | None, used: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and mass; `used` as `uses` says, None: every entry of `moved` is."""
    goal, dtype = slot.gather(1, moved), compute_dtype(x)
    led, part = take_rows(x, leader).to(dtype), take_rows(x, moved).to(dtype)
    if weight is None:
        mass, part_mass = torch.ones_like(leader, dtype=dtype), torch.ones_like(moved, dtype=dtype)
    else:
        mass, part_mass = (weight.to(dtype).gather(1, index) for index in (leader, moved))
    if used is not None:
        goal, part_mass = goal.clamp(min=0), part_mass.masked_fill(~used, 0)
    mass = mass.scatter_add(1, goal, part_mass)
    part = (part - take_rows(led, goal)) * (part_mass / mass.gather(1, goal)).unsqueeze(2)
    if used is not None:
        part = part.masked_fill(~used.unsqueeze(2), 0)
    return add_rows(led, goal, part).to(x.dtype), mass.float()


def fake(
    x: Tensor, slot: Tensor, leader: Tensor, moved: Tensor, weight: Tensor | None, spare: bool
) -> tuple[Tensor, Tensor]:
    """Shape rule."""
    batch, out = x.shape[0], leader.shape[1]
    return x.new_empty((batch, out, x.shape[2])), x.new_empty((batch, out), dtype=torch.float32)


# ScatterND with reduction="add" would take whole rows and be twice as fast, but ONNX Runtime's CPU kernel adds to one
# row from several threads at once and loses updates (seen in 2 of 300 runs); ScatterElements adds in order.
@script(TAMIS, default_opset=op)
def MergeTokens(x, slot, leader, moved, weight):
    goal = op.GatherElements(slot, moved, axis=1)
    goals = op.Unsqueeze(goal, [2])
    led = op.Cast(op.GatherND(x, op.Unsqueeze(leader, [2]), batch_dims=1), to=1)
    part = op.Cast(op.GatherND(x, op.Unsqueeze(moved, [2]), batch_dims=1), to=1)
    led_weight = op.GatherElements(op.Cast(weight, to=1), leader, axis=1)
    part_weight = op.GatherElements(op.Cast(weight, to=1), moved, axis=1)
    mass = op.ScatterElements(led_weight, goal, part_weight, axis=1, reduction="add")
    share = part_weight / op.GatherElements(mass, goal, axis=1)
    added = (part - op.GatherND(led, goals, batch_dims=1)) * op.Unsqueeze(share, [2])
    total = op.ScatterElements(led, op.Expand(goals, op.Shape(part)), added, axis=1, reduction="add")
    return op.CastLike(total, x), mass


@script(TAMIS, default_opset=op)
def MergeTokensSpare(x, slot, leader, moved, weight):
    goal = op.Max(op.GatherElements(slot, moved, axis=1), 0)
    used = op.Not(op.Equal(op.GatherElements(leader, goal, axis=1), moved))
    led = op.Cast(op.GatherND(x, op.Unsqueeze(leader, [2]), batch_dims=1), to=1)
    part = op.Cast(op.GatherND(x, op.Unsqueeze(moved, [2]), batch_dims=1), to=1)
    every_weight = op.Expand(op.Cast(weight, to=1), op.Shape(slot))
    led_weight = op.GatherElements(every_weight, leader, axis=1)
    part_weight = op.Where(used, op.GatherElements(every_weight, moved, axis=1), 0.0)
    mass = op.ScatterElements(led_weight, goal, part_weight, axis=1, reduction="add")
    share = part_weight / op.GatherElements(mass, goal, axis=1)
    difference = part - op.GatherND(led, op.Unsqueeze(goal, [2]), batch_dims=1)
    added = op.Where(op.Unsqueeze(used, [2]), difference * op.Unsqueeze(share, [2]), 0.0)
    index = op.Expand(op.Unsqueeze(goal, [2]), op.Shape(part))
    return op.CastLike(op.ScatterElements(led, index, added, axis=1, reduction="add"), x), mass


def onnx(x: Tensor, slot: Tensor, leader: Tensor, moved: Tensor, weight: Tensor | None, spare: bool) -> OnnxCall:
    """Calls MergeTokens or, with spare entries, MergeTokensSpare."""
    if spare:
        return OnnxCall(MergeTokensSpare, [x, slot, leader, moved, [1] if weight is None else weight], {})
    weight = torch.ones(slot.shape, device=x.device) if weight is None else weight
    return OnnxCall(MergeTokens, [x, slot, leader, moved, weight], {})


def flops(x: Any, slot: Any, leader: Any, moved: Any, *_: Any, **__: Any) -> int:
    """A multiply and an add per element that moves."""
    return 2 * moved[0] * moved[1] * x[2]


def sample_plan() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, slot, leader, moved and weight of two rows: several, one and no source per slot, and a spare entry."""
    generator = torch.Generator().manual_seed(0)
    slot = torch.tensor([[0, 1, 2, 1, 1, 3, -1], [0, 1, 2, 3, 3, -1, -1]])
    leader = torch.tensor([[0, 1, 2, 5], [0, 1, 2, 3]])
    moved = torch.tensor([[3, 4], [4, 0]])
    x = torch.randn(2, 7, 5, generator=generator)
    weight = torch.rand(2, 7, generator=generator) + 0.5
    return x, slot, leader, moved, weight


def drawn_plan(batch: int, tokens: int, slots: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, slot, leader, moved and weight: slots led in any order, the other tokens anywhere, no spare entry."""
    generator = torch.Generator().manual_seed(tokens)
    order = torch.rand(batch, tokens, generator=generator).argsort(1)
    leader, moved = order[:, :slots].contiguous(), order[:, slots:].sort(1).values
    goal = torch.randint(0, slots, moved.shape, generator=generator)
    own = torch.arange(slots).expand(batch, slots)
    slot = torch.zeros(batch, tokens, dtype=torch.int64).scatter(1, leader, own).scatter(1, moved, goal)
    x = torch.randn(batch, tokens, width, generator=generator)
    return x, slot, leader, moved, torch.rand(batch, tokens, generator=generator) + 0.5


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests: several, one and no source per slot, with spare entries and without."""
    for sizes in [(2, 101, 53, 7), (1, 1, 1, 1), (1, 3, 2, 8209)]:
        *plan, weight = drawn_plan(*sizes)
        yield *plan, weight, False
    x, slot, leader, moved, weight = sample_plan()
    for w in (None, weight):
        for dtype in (torch.float32, torch.float16):
            yield x.to(dtype), slot, leader, moved, w, True
        first = None if w is None else w[:1]
        yield x[:1], slot[:1], leader[:1], moved[:1], first, False
        yield x[:1], slot[:1], leader[:1], moved[:1, :0], first, False
        yield x[:0], slot[:0], leader[:0], moved[:0], None if w is None else w[:0], True


MERGE_TOKENS = define_op(
    Op(
        name="merge_tokens",
        schema="(Tensor x, Tensor slot, Tensor leader, Tensor moved, Tensor? weight, bool spare)"
        " -> (Tensor y, Tensor mass)",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="merge",
    )
)
