"""pick_tiles: which tiles of keys each row of queries reads, by score.

scores   [B, S, R, C]  float   row r of `block` queries, tile c of `block` keys; for `mass`, 0 or more;
                               -inf: not read, unless always read
lengths  [B]           int64   real tokens, which come first; None: all
block    int
causal   bool                  row r may read tiles 0 .. r
sink     bool                  tile 0 is always read
diagonal bool                  tile r is always read
keep     int[3]                a, b, c: of n tiles that it may read, a row reads at most floor((a * n + b) / c), which
                               is 1 or more for every n >= 1
mass     float                 and stops, best first, once they have this part of the row's sum of scores; 1 and more:
                               it does not stop
->       [B, S, R, T]  int32   first key of each tile read, ascending; -1: unused.  T = floor((a * C + b) / c), and one
                               more with both sink and diagonal

Always-read tiles come first and count, but are read even where `keep` is less.  The tile with which the mass is reached
is read too.  Tiles and rows of padding are never read.  Ties: lowest index.  NaN scores count as the lowest.  Scores in
float32.  Raises nothing of its own.
Source: methods (llm) 6.1 (S.topk, S.cover), 9.2 B1 and B2; 0.2, rules 3 to 7.
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

LOWEST = -3.0e38


def capacity(tiles: Any, sink: bool, diagonal: bool, keep: list[int]) -> Any:
    """T for C tiles."""
    slope, offset, divisor = keep
    most = (slope * tiles + offset) // divisor if slope else offset // divisor
    return most + int(sink and diagonal)


def reference(
    scores: Tensor,
    lengths: Tensor | None,
    block: int,
    causal: bool,
    sink: bool,
    diagonal: bool,
    keep: list[int],
    mass: float,
) -> Tensor:
    """See the module."""
    tiles, device = scores.shape[3], scores.device
    column = torch.arange(tiles, device=device)
    row = torch.arange(scores.shape[2], device=device).unsqueeze(1)
    allowed = (column <= row) if causal else (column >= 0).expand(scores.shape[2], -1)
    allowed = allowed[None, None]
    if lengths is not None:
        real = lengths.reshape(-1, 1, 1, 1)
        allowed = allowed & (column * block < real) & (row * block < real)
    forced = allowed & (((column == 0) & sink) | ((column == row) & diagonal))
    count = allowed.sum(-1, keepdim=True)
    allowed = (allowed & (scores != -torch.inf)) | forced
    scores = scores.float().nan_to_num(nan=LOWEST, neginf=LOWEST).clamp(min=LOWEST)
    ranked = torch.where(forced, torch.inf, torch.where(allowed, scores, -torch.inf))
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    slope, offset, divisor = keep
    limit = torch.maximum((slope * count + offset) // divisor, forced.sum(-1, keepdim=True))
    chosen = column < torch.minimum(limit, allowed.sum(-1, keepdim=True))
    if mass < 1:
        weight = torch.where(allowed, scores.clamp(min=0), 0.0).gather(-1, order)
        before = weight.cumsum(-1) - weight
        short = before < mass * weight.sum(-1, keepdim=True)
        chosen = chosen & (short | forced.expand(order.shape).gather(-1, order))
    found = torch.where(chosen, order, tiles).sort(dim=-1).values
    room = torch.arange(capacity(tiles, sink, diagonal, keep), device=device)
    unused = room.expand(*found.shape[:-1], -1) * 0 + tiles
    found = torch.cat([found, unused], -1).index_select(-1, room)
    return torch.where(found < tiles, found * block, -1).to(torch.int32)


def fake(
    scores: Tensor,
    lengths: Tensor | None,
    block: int,
    causal: bool,
    sink: bool,
    diagonal: bool,
    keep: list[int],
    mass: float,
) -> Tensor:
    """Shape rule."""
    room = capacity(scores.shape[3], sink, diagonal, keep)
    return scores.new_empty((*scores.shape[:3], room), dtype=torch.int32)


@script(TAMIS, default_opset=op)
def PickTiles(scores, lengths, keep, block: int, causal: int, sink: int, diagonal: int, mass: float):
    lowest = op.Constant(value_float=-3.0e38)
    one = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[-1])
    tiles = op.Shape(scores, start=3, end=4)
    column = op.Range(0, op.Squeeze(tiles), 1)
    row = op.Unsqueeze(op.Range(0, op.Squeeze(op.Shape(scores, start=2, end=3)), 1), [1])
    real = op.Reshape(op.Where(lengths < 0, tiles * block, lengths), [-1, 1, 1, 1])
    later = op.And(column > row, op.Expand(causal, one) > 0)
    allowed = op.And(op.And(column * block < real, row * block < real), op.Not(later))
    at_sink = op.And(column == 0, op.Expand(sink, one) > 0)
    at_diagonal = op.And(column == row, op.Expand(diagonal, one) > 0)
    forced = op.And(allowed, op.Or(at_sink, at_diagonal))
    count = op.ReduceSum(op.Cast(allowed, to=7), last)
    scores = op.Cast(scores, to=1)
    never = op.IsInf(scores, detect_positive=0)
    allowed = op.Or(op.And(allowed, op.Not(never)), forced)
    scores = op.Max(op.Where(op.IsNaN(scores), lowest, scores), lowest)
    hidden = op.Where(allowed, scores, op.Constant(value_float=float("-inf")))
    ranked = op.Where(forced, op.Constant(value_float=float("inf")), hidden)
    _, order = op.TopK(ranked, tiles, axis=-1)
    most = (op.Slice(keep, [0], [1]) * count + op.Slice(keep, [1], [2])) / op.Slice(keep, [2], [3])
    limit = op.Max(most, op.ReduceSum(op.Cast(forced, to=7), last))
    limit = op.Min(limit, op.ReduceSum(op.Cast(allowed, to=7), last))
    weight = op.GatherElements(op.Where(allowed, op.Max(scores, 0.0), op.Constant(value_float=0.0)), order, axis=-1)
    before = op.CumSum(weight, op.Constant(value_int=-1)) - weight
    always = op.GatherElements(op.Cast(op.Expand(forced, op.Shape(order)), to=7), order, axis=-1) > 0
    endless = op.Expand(mass, one) >= 1.0
    short = op.Or(op.Or(before < op.ReduceSum(weight, last) * mass, always), endless)
    chosen = op.And(column < limit, short)
    placed = op.Where(chosen, order, tiles)
    found, _ = op.TopK(placed, tiles, axis=-1, largest=0)
    extra = op.Cast(op.And(op.Expand(sink, one) > 0, op.Expand(diagonal, one) > 0), to=7)
    room = (op.Slice(keep, [0], [1]) * tiles + op.Slice(keep, [1], [2])) / op.Slice(keep, [2], [3]) + extra
    unused = op.Expand(tiles, op.Concat(op.Shape(found, start=0, end=3), room, axis=0))
    found = op.Slice(op.Concat(found, unused, axis=-1), [0], room, last)
    return op.Cast(op.Where(found < tiles, found * block, op.Constant(value_int=-1)), to=6)


def onnx(
    scores: Tensor,
    lengths: Tensor | None,
    block: int,
    causal: bool,
    sink: bool,
    diagonal: bool,
    keep: list[int],
    mass: float,
) -> OnnxCall:
    """Calls PickTiles."""
    given = [scores, [-1] if lengths is None else lengths, list(keep)]
    numbers = {"block": block, "causal": int(causal), "sink": int(sink), "diagonal": int(diagonal), "mass": mass}
    return OnnxCall(PickTiles, given, numbers)


def flops(*_: Any, **__: Any) -> int:
    """Comparisons are not counted."""
    return 0


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 2, 5, 5, generator=generator)
    lengths = torch.tensor([18, 9])
    yield scores, None, 4, True, True, True, [0, 2, 1], 1.0
    yield scores, lengths, 4, True, True, True, [1, 2, 3], 1.0
    yield scores, lengths, 4, False, False, True, [1, 0, 1], 0.6
    yield scores, None, 4, True, True, False, [1, 0, 1], 0.0
    yield torch.ones(2, 1, 6, 6), None, 4, True, False, False, [0, 9, 1], 1.0
    odd = torch.tensor([torch.nan, 1.0, -torch.inf, torch.inf, 0.0]).expand(1, 1, 5, 5)
    yield odd, None, 4, False, True, False, [0, 3, 1], 1.0


PICK_TILES = define_op(
    Op(
        name="pick_tiles",
        schema="(Tensor scores, Tensor? lengths, int block, bool causal, bool sink, bool diagonal, int[] keep, "
        "float mass) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="pick_tiles",
    )
)
