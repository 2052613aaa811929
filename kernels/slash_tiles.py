"""slash_tiles: vertical columns and slanting diagonals as tiles and columns of an index.

distances  [B, S, n]     int64   diagonals i - j = distance, ascending, each once, 0 among them; -1 behind them: unused
columns    [B, S, m]     int64   keys, ascending; -1: unused
tokens     count                 N
block      int                   queries of a row, and keys of a tile
->         tiles [B, S, R, T]    int32: first key of each tile, ascending; -1: unused; R = ceil(N / block),
                                 T = min(n, R + 1)
           single [B, S, R, m]   int32: the columns that stand before the row's last tile and in no tile; -1: unused

A diagonal crosses a row of queries in a parallelogram, whose keys a tile that ends at E - distance holds in part: E is
the end of the row, and no tile ends before `block`.  Ends are walked from left to right: one within the last tile adds
nothing, one at most `block` behind it adds the tile right behind it, one farther off starts a tile of its own.  The
last tile may reach beyond the row, where causality hides its keys.

The walk is the same for all rows but for where it starts, so it is a table of successors over distances, followed by
doubling: no step waits for another.  Raises nothing of its own.
Source: methods (llm) 1.2 e, 9.2 B3, the index of MInference (Jiang et al., NeurIPS 2024, arXiv 2407.02490).
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

DOUBLINGS = 17  # tiles in a row: fewer than 2 ** 17


def reference(distances: Tensor, columns: Tensor, tokens: int, block: int) -> tuple[Tensor, Tensor]:
    """See the module."""
    device, (batch, scope, _) = distances.device, distances.shape
    rows, most = sizes(distances.shape[2], tokens, block)
    end = (torch.arange(rows, device=device) + 1) * block
    follows, below = _successors(distances, tokens, block)
    # states are distances of a tile's end from the row's end, plus `block`, since the last tile may reach beyond it
    first = below.index_select(-1, end.clamp(max=tokens))
    first = torch.where(first < 0, tokens + 1, torch.where(end - first < block, end - block, first)) + block
    path = first.unsqueeze(-1).expand(-1, -1, -1, most).flatten(2)
    step = torch.arange(most, device=device).expand(rows, most).flatten()
    for bit in range(DOUBLINGS):
        path = torch.where((step >> bit) % 2 == 1, follows.gather(2, path), path)
        follows = follows.gather(2, follows)
    path = path.reshape(batch, scope, rows, most) - block
    starts = torch.where(path > tokens, tokens + block, end.unsqueeze(1) - path - block)
    return _unused_apart(starts, tokens), _single(starts, columns, tokens, block)


def sizes(distances: Any, tokens: Any, block: int) -> tuple[Any, Any]:
    """R and T for n distances."""
    rows = (tokens + block - 1) // block
    return rows, torch.sym_min(distances, rows + 1)


def _successors(distances: Tensor, tokens: Any, block: int) -> tuple[Tensor, Tensor]:
    """The state after each state [B, S, N + block + 2], and the largest distance below each of 0 .. N [B, S, N + 1]."""
    place = torch.arange(tokens + 1, device=distances.device)
    listed = torch.where((distances < 0) | (distances >= tokens), tokens, distances)
    marked = (place * 0).expand(*distances.shape[:2], -1).scatter(2, listed, torch.ones_like(listed))
    marked = torch.where(place < tokens, marked, 0)
    upto = torch.where(marked > 0, place, -1).cummax(2).values
    below = torch.cat([torch.full_like(upto[..., :1], -1), upto[..., :-1]], -1)
    follows = torch.where(below < 0, tokens + 1, torch.where(below >= place - block, place - block, below)) + block
    stop = torch.zeros_like(follows[..., :1]) + (tokens + 1 + block)
    return torch.cat([stop.expand(-1, -1, block), follows, stop], -1), below


def _unused_apart(starts: Tensor, tokens: Any) -> Tensor:
    return torch.where(starts < tokens, starts, -1).to(torch.int32)


def _single(starts: Tensor, columns: Tensor, tokens: Any, block: int) -> Tensor:
    """Columns [B, S, m] that no tile of a row [B, S, R, T] holds, before its last tile."""
    wanted = columns.unsqueeze(2).expand(-1, -1, starts.shape[2], -1).contiguous()
    before = torch.searchsorted(starts.contiguous(), wanted, right=True)  # tiles that start at the column or before it
    holder = starts.gather(3, (before - 1).clamp(min=0))
    inside = (before > 0) & (wanted < holder + block)
    last = torch.where(starts < tokens, starts, -1).amax(-1, keepdim=True)
    return torch.where((wanted >= 0) & ~inside & (wanted < last), wanted, -1).to(torch.int32)


def fake(distances: Tensor, columns: Tensor, tokens: int, block: int) -> tuple[Tensor, Tensor]:
    """Shape rule."""
    batch, scope, many = distances.shape
    rows, most = sizes(many, tokens, block)
    tiles = distances.new_empty((batch, scope, rows, most), dtype=torch.int32)
    return tiles, distances.new_empty((batch, scope, rows, columns.shape[2]), dtype=torch.int32)


@script(TAMIS, default_opset=op)
def SlashTiles(distances, columns, tokens, block: int):
    last, one = op.Constant(value_ints=[-1]), op.Constant(value_ints=[1])
    length = op.Reshape(tokens, [1])
    many = op.Shape(distances, start=2, end=3)
    heads = op.Shape(distances, start=0, end=2)
    rows = (length + block - 1) / block
    most = op.Min(many, rows + 1)
    end = (op.Range(0, op.Squeeze(rows), 1) + 1) * block
    place = op.Range(0, op.Squeeze(length) + 1, 1)
    listed = op.Where(op.Or(distances < 0, distances >= length), length, distances)
    none = op.Expand(op.Constant(value_int=0), op.Concat(heads, length + 1, axis=0))
    mark = op.Expand(op.Constant(value_int=1), op.Shape(listed))
    marked = op.ScatterElements(none, listed, mark, axis=-1) * op.Cast(place < length, to=7)
    before = op.CumSum(marked, op.Constant(value_int=-1)) - marked
    found = op.GatherElements(listed, op.Max(before - 1, 0), axis=-1)
    below = op.Where(before > 0, found, op.Constant(value_int=-1))
    near = op.Where(below >= place - block, place - block, below)
    after = op.Where(below < 0, length + 1, near) + block
    stop = op.Expand(length + 1 + block, op.Concat(heads, one, axis=0))
    beyond = op.Expand(length + 1 + block, op.Concat(heads, op.Expand(block, one), axis=0))
    follows = op.Concat(beyond, after, stop, axis=-1)
    start = op.Gather(below, op.Min(end, length), axis=2)
    start = op.Where(start < 0, length + 1, op.Where(end - start < block, end - block, start)) + block
    grid = op.Concat(heads, rows, most, axis=0)
    path = op.Reshape(op.Expand(op.Unsqueeze(start, [-1]), grid), op.Concat(heads, last, axis=0))
    step = op.Expand(op.Range(0, op.Squeeze(most), 1), op.Concat(rows, most, axis=0))
    step = op.Expand(op.Reshape(step, [1, 1, -1]), op.Shape(path))
    for _i in range(17):
        path = op.Where(op.Mod(step, 2) == 1, op.GatherElements(follows, path, axis=-1), path)
        follows = op.GatherElements(follows, follows, axis=-1)
        step = step / 2
    distance = op.Reshape(path, grid) - block
    starts = op.Where(distance > length, length + block, op.Unsqueeze(end, [1]) - distance - block)
    tiles = op.Where(starts < length, starts, op.Constant(value_int=-1))
    wanted = op.Unsqueeze(columns, [2, 3])
    each = op.Unsqueeze(starts, [4])
    inside = op.ReduceMax(op.Cast(op.And(each <= wanted, wanted < each + block), to=7), [3], keepdims=0)
    wanted = op.Unsqueeze(columns, [2])
    single = op.And(op.And(wanted >= 0, inside == 0), wanted < op.ReduceMax(tiles, last))
    alone = op.Where(single, wanted, op.Constant(value_int=-1))
    return op.Cast(tiles, to=6), op.Cast(alone, to=6)


def onnx(distances: Tensor, columns: Tensor, tokens: int, block: int) -> OnnxCall:
    """Calls SlashTiles."""
    return OnnxCall(SlashTiles, [distances, columns, tokens], {"block": block})


def flops(*_: Any, **__: Any) -> int:
    """Comparisons are not counted."""
    return 0


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    yield torch.tensor([[[0, 1, 8, 9]]]), torch.tensor([[[0, 3, 7, 11]]]), 16, 4
    for tokens, many, block in ((23, 6, 4), (9, 5, 2)):
        distances = torch.rand(2, 3, tokens, generator=generator).argsort(-1)[..., :many]
        distances[:, :, 0] = torch.where((distances[:, :, 1:] == 0).any(-1), distances[:, :, 0], 0)
        distances = distances.sort(-1).values
        columns = torch.rand(2, 3, tokens, generator=generator).argsort(-1)[..., :4].sort(-1).values
        yield distances, columns, tokens, block
    yield torch.tensor([[[0, 5, -1]]]), torch.tensor([[[-1, 2]]]), 7, 4


SLASH_TILES = define_op(
    Op(
        name="slash_tiles",
        schema="(Tensor distances, Tensor columns, SymInt tokens, int block) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="slash_tiles",
    )
)
