"""join_nearest: tokens that a selection leaves out join the most similar of those it keeps.

metric  [B, N, D]  float   what similarity is measured on
slot    [B, N]     int64   slot of each token that stays, -1: of the others (what `select_tokens` answers)
leader  [B, N']    int64   the token that stands for each slot
offers  [B, N]     bool    which of the tokens without a slot join; the rest of them stay without
takes   [B, N']    bool    which slots they may join
->      slot   [B, N]      int64: output slot of each token, -1: none
        cosine [B, N]      float32: of each token that joined and the leader of its slot; 1 for all others
        moved  [B, N - N'] int64: tokens that joined, ascending; spare entries are leader[:, 0]

Per row, for every token i that offers:  slot_i = argmax over slots j that take of cos(metric_i, metric_leader(j)).

Float32 arithmetic (float64 for float64 input).  Ties: lowest slot.  A token whose metric has a zero, infinite or NaN
norm counts as the zero vector.  At most N - N' tokens of a row may offer, and a row in which any does must have a slot
that takes.  Raises nothing of its own.
Source: the assignment step of methods cards 1.10 (ToMe, kth and random) and 10.4 (DiffRate).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from .bipartite_match import unit_vectors
from .opset import STANDARD as op
from .opset import TAMIS
from .rows import ascending, take_rows
from .symbols import spare_length

Joined = tuple[Tensor, Tensor, Tensor]


def reference(metric: Tensor, slot: Tensor, leader: Tensor, offers: Tensor, takes: Tensor) -> Joined:
    """See the module."""
    unit = unit_vectors(metric)
    moved = ascending(offers, slot.shape[1] - leader.shape[1], leader[:, :1])
    similarity = torch.bmm(take_rows(unit, moved), take_rows(unit, leader).transpose(1, 2))
    similarity = similarity.masked_fill(~takes.unsqueeze(1), -torch.inf)
    joins = offers.gather(1, moved)
    # spare entries name a token that stays, which keeps what it has
    goal = torch.where(joins, similarity.argmax(2), slot.gather(1, moved))
    best = torch.where(joins, similarity.amax(2), 1).float()
    cosine = torch.ones_like(slot, dtype=torch.float32).scatter(1, moved, best)
    return slot.scatter(1, moved, goal), cosine, moved


def fake(metric: Tensor, slot: Tensor, leader: Tensor, offers: Tensor, takes: Tensor) -> Joined:
    """Shape rule."""
    spare = slot.new_empty((slot.shape[0], spare_length(slot.shape[1], leader.shape[1])))
    return torch.empty_like(slot), torch.empty_like(slot, dtype=torch.float32), spare


@script(TAMIS, default_opset=op)
def JoinNearest(metric, slot, leader, offers, takes):
    x = op.Cast(metric, to=1)
    scaled = x / op.Max(op.ReduceL2(x, [-1], keepdims=1), 1e-12)
    unit = op.Where(op.IsNaN(scaled), 0.0, scaled)
    rows = op.Shape(slot, start=0, end=1)
    tokens = op.Shape(slot, start=1, end=2)
    length = tokens - op.Shape(leader, start=1, end=2)
    position = op.Expand(op.Range(0, op.Squeeze(tokens), 1), op.Shape(slot))
    # one column more than needed takes what has no place in the list
    spare = op.Expand(op.Slice(leader, [0], [1], [1]), op.Concat(rows, length + 1, axis=0))
    place = op.Where(offers, op.CumSum(op.Cast(offers, to=7), 1) - 1, length)
    moved = op.Slice(op.ScatterElements(spare, place, position, axis=1), [0], length, [1])
    from_tokens = op.GatherND(unit, op.Unsqueeze(moved, [2]), batch_dims=1)
    to_tokens = op.GatherND(unit, op.Unsqueeze(leader, [2]), batch_dims=1)
    product = op.MatMul(from_tokens, op.Transpose(to_tokens, perm=[0, 2, 1]))
    similarity = op.Where(op.Unsqueeze(takes, [1]), product, op.Constant(value_float=float("-inf")))
    joins = op.GatherElements(op.Cast(offers, to=7), moved, axis=1) > 0
    stays = op.GatherElements(slot, moved, axis=1)
    goal = op.Where(joins, op.ArgMax(similarity, axis=2, keepdims=0), stays)
    best = op.Where(joins, op.ReduceMax(similarity, [2], keepdims=0), 1.0)
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(slot))
    cosine = op.ScatterElements(ones, moved, best, axis=1)
    return op.ScatterElements(slot, moved, goal, axis=1), cosine, moved


def onnx(metric: Tensor, slot: Tensor, leader: Tensor, offers: Tensor, takes: Tensor) -> OnnxCall:
    """Calls JoinNearest."""
    return OnnxCall(JoinNearest, [metric, slot, leader, offers, takes], {})


def flops(metric: Any, slot: Any, leader: Any, *_: Any, **__: Any) -> int:
    """The similarity product: 2 * B * (N - N') * N' * D, padding and slots that do not take included."""
    batch, tokens, width = metric
    return 2 * batch * (tokens - leader[1]) * leader[1] * width


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests: all or some offer and take, ties, no direction, nothing leaves."""
    generator = torch.Generator().manual_seed(0)
    lost = torch.randn(2, 19, 5, generator=generator)
    lost[:, 3], lost[:, 8], lost[0, 14, 2], lost[1, 17, 0] = 0.0, torch.inf, torch.nan, -torch.inf
    tied = torch.eye(4)[torch.randint(0, 4, (3, 37), generator=generator)]
    metrics = [torch.randn(size, generator=generator) for size in [(2, 12, 16), (3, 71, 9), (0, 8, 4), (2, 5, 4)]]
    kept = [7, 30, 5, 5, 11, 20, 9, 4]
    for metric, out in zip([*metrics, lost, tied, tied[:, :13].half(), metrics[0][:, :6]], kept, strict=True):
        batch, tokens = metric.shape[:2]
        leader = torch.rand(batch, tokens, generator=generator).argsort(1)[:, :out].sort(1).values
        slot = torch.full((batch, tokens), -1).scatter(1, leader, torch.arange(out).expand(batch, out))
        every = torch.ones(batch, out, dtype=torch.bool)
        yield metric, slot, leader, slot < 0, every
        some = (slot < 0) & (torch.rand(batch, tokens, generator=generator) < 0.7)
        takes = torch.rand(batch, out, generator=generator) < 0.5
        yield metric, slot, leader, some, torch.cat([every[:, :1], takes[:, 1:]], 1)


JOIN_NEAREST = define_op(
    Op(
        name="join_nearest",
        schema="(Tensor metric, Tensor slot, Tensor leader, Tensor offers, Tensor takes)"
        " -> (Tensor slot, Tensor cosine, Tensor moved)",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton=None,
    )
)
