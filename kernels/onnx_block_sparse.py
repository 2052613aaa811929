"""block_sparse_attention and its kin as ONNX functions: the lists become a mask of dense attention, right anywhere.

Source: methods (llm) 6.6, the first rung of the ladder.
"""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..op import OnnxCall
from .onnx_logits import GroupedLogits
from .opset import STANDARD as op
from .opset import TAMIS
from .sparse_pairs import Pairs

LISTS = ("rows", "width")  # numbers of an index, as attributes of a node
NEAR = ("sink", "local", "first", "last")


@script(TAMIS, default_opset=op)
def ListedKeys(tiles, columns, rows, tokens, width):
    """[b, s, R, N] which keys the lists of each row of queries name; rows, tokens, width [1]."""
    one = op.Constant(value_ints=[1])
    count = op.Concat(one, one, (tokens + rows - 1) / rows, one, axis=0)
    starts, alone = op.Expand(tiles, count), op.Expand(columns, count)
    beyond = tokens + width
    some = op.Concat(op.Shape(starts, start=0, end=3), beyond + 1, axis=0)
    none = op.Expand(op.Constant(value_int=0), some)
    mark = op.Expand(op.Constant(value_int=1), op.Shape(starts))
    opened = op.ScatterElements(none, op.Where(starts < 0, beyond, starts), mark, axis=-1)
    closed = op.ScatterElements(none, op.Where(starts < 0, beyond, starts + width), mark, axis=-1)
    covered = op.CumSum(opened - closed, op.Constant(value_int=-1))
    some = op.Concat(op.Shape(alone, start=0, end=3), beyond + 1, axis=0)
    none = op.Expand(op.Constant(value_int=0), some)
    mark = op.Expand(op.Constant(value_int=1), op.Shape(alone))
    single = op.ScatterElements(none, op.Where(alone < 0, beyond, alone), mark, axis=-1)
    listed = op.Slice(covered + single, op.Constant(value_ints=[0]), tokens, op.Constant(value_ints=[-1]))
    return listed > 0


@script(TAMIS, default_opset=op)
def SparseLogits(
    q, k, tiles, columns, positions, lengths, rows, width, sink, local, first, last, scale, causal, softcap, window
):
    """[B, Hk, G, N, N] logits over the places of keys, -inf for pairs that are not read; the numbers are scalars."""
    tokens = op.Shape(q, start=2, end=3)
    place = op.Range(0, op.Squeeze(tokens), 1)
    query = op.Unsqueeze(place, [1])
    given = op.Cast(positions, to=7)
    key = op.Unsqueeze(op.Where(given < 0, place, given), [2, 3])
    ends = op.Reshape(op.Where(lengths < 0, tokens, lengths), [-1, 1, 1, 1, 1])
    near = op.Abs(query - key) < local
    dense = op.Or(query < first, query >= ends - last)
    implicit = op.Or(op.Or(key < sink, near), dense)
    later = op.And(key > query, op.Expand(causal, [1]) > 0)
    within = op.Or(op.Expand(window, [1]) <= 0, op.Abs(query - key) < window)
    real = op.And(op.And(op.And(key < ends, query < ends), op.Not(later)), within)
    line, span = op.Expand(rows, [1]), op.Expand(width, [1])
    listed = ListedKeys(op.Cast(tiles, to=7), op.Cast(columns, to=7), line, tokens, span)
    listed = op.Gather(listed, place / line, axis=2)
    # a list is that of all heads, of a group, or of one head
    heads, key_heads = op.Shape(q, start=1, end=2), op.Shape(k, start=1, end=2)
    sets = op.Shape(listed, start=1, end=2)
    of_groups = op.Min(sets, key_heads)
    apart = op.Concat(op.Shape(listed, start=0, end=1), of_groups, sets / of_groups, tokens, tokens, axis=0)
    seen = op.And(op.Or(op.Reshape(listed, apart, allowzero=1), implicit), real)
    capped = op.Expand(softcap, [1]) > 0
    bound = op.Where(capped, op.Expand(softcap, [1]), op.Constant(value_floats=[1.0]))
    logits = GroupedLogits(q, k, scale)
    logits = op.Where(capped, op.Tanh(logits / bound) * bound, logits)
    grouped = op.Concat(op.Shape(q, start=0, end=1), key_heads, heads / key_heads, tokens, tokens, axis=0)
    return op.Where(seen, op.Reshape(logits, grouped, allowzero=1), op.Constant(value_float=float("-inf")))


@script(TAMIS, default_opset=op)
def SparseMix(logits, v, like):
    """Means of v [B, Hk, N, Dv] by logits [B, Hk, G, N, N] as [B, H, N, Dv]; 0 where all are -inf."""
    weights = op.Softmax(op.Max(logits, op.Constant(value_float=-3.4028234663852886e38)), axis=-1)
    lowest = op.Constant(value_float=float("-inf"))
    weights = op.Where(logits > lowest, weights, op.Constant(value_float=0.0))
    tokens = op.Shape(like, start=2, end=3)
    stacked = op.Shape(like, start=1, end=2) / op.Shape(v, start=1, end=2) * tokens
    together = op.Concat(op.Shape(v, start=0, end=2), stacked, tokens, axis=0)
    mixed = op.MatMul(op.Reshape(weights, together, allowzero=1), op.Cast(v, to=1))
    shape = op.Concat(op.Shape(like, start=0, end=3), op.Shape(v, start=3, end=4), axis=0)
    return op.CastLike(op.Reshape(mixed, shape, allowzero=1), like)


@script(TAMIS, default_opset=op)
def BlockSparseAttention(
    q,
    k,
    v,
    tiles,
    columns,
    positions,
    lengths,
    rows: int,
    width: int,
    sink: int,
    local: int,
    first: int,
    last: int,
    scale: float,
    causal: int,
    softcap: float,
    window: int,
):
    logits = SparseLogits(
        q, k, tiles, columns, positions, lengths, rows, width, sink, local, first, last, scale, causal, softcap, window
    )
    return SparseMix(logits, v, q)


@script(TAMIS, default_opset=op)
def BlockSparseAttentionWithLse(
    q,
    k,
    v,
    tiles,
    columns,
    positions,
    lengths,
    rows: int,
    width: int,
    sink: int,
    local: int,
    first: int,
    last: int,
    scale: float,
    causal: int,
    softcap: float,
    window: int,
):
    logits = SparseLogits(
        q, k, tiles, columns, positions, lengths, rows, width, sink, local, first, last, scale, causal, softcap, window
    )
    top = op.ReduceMax(op.Max(logits, op.Constant(value_float=-3.4028234663852886e38)), [-1], keepdims=1)
    lowest = op.Constant(value_float=float("-inf"))
    weights = op.Where(logits > lowest, op.Exp(logits - top), op.Constant(value_float=0.0))
    lse = op.Log(op.ReduceSum(weights, [-1], keepdims=1)) + top
    return SparseMix(logits, v, q), op.Reshape(lse, op.Shape(q, start=0, end=3), allowzero=1)


@script(TAMIS, default_opset=op)
def BlockSparseReceived(
    q,
    k,
    lse,
    weight,
    tiles,
    columns,
    positions,
    lengths,
    rows: int,
    width: int,
    sink: int,
    local: int,
    first: int,
    last: int,
    scale: float,
    causal: int,
    softcap: float,
    window: int,
):
    logits = SparseLogits(
        q, k, tiles, columns, positions, lengths, rows, width, sink, local, first, last, scale, causal, softcap, window
    )
    norm = op.Where(lse == op.Constant(value_float=float("-inf")), op.Constant(value_float=float("inf")), lse)
    of_rows = op.Concat(op.Shape(logits, start=0, end=4), op.Constant(value_ints=[1]), axis=0)
    shares = op.Exp(logits - op.Reshape(norm, of_rows, allowzero=1))
    sums = op.ReduceSum(shares * op.Unsqueeze(op.Cast(weight, to=1), [1, 2, 4]), [3], keepdims=0)
    return op.Reshape(sums, op.Shape(q, start=0, end=3), allowzero=1)


def of_index(function: Any, tensors: list[Any], *index: Any) -> OnnxCall:
    """The call of a function of this file: its tensors, then the index as the ops have it, -1 for what is None."""
    pairs, scale, softcap = Pairs.of(*index)
    ends = [-1] if pairs.lengths is None else pairs.lengths
    positions = no_list(tensors[0]).squeeze(0) if pairs.positions is None else pairs.positions
    numbers = {name: getattr(pairs, name) for name in (*LISTS, *NEAR, "window")}
    numbers |= {"scale": scale, "causal": int(pairs.causal), "softcap": softcap or 0.0}
    return OnnxCall(function, [*tensors, *lists_of(tensors[0], pairs), positions, ends], numbers)


def lists_of(q: Tensor, pairs: Pairs) -> list[Tensor]:
    """Tiles and columns, each one unused entry where there are none."""
    return [no_list(q) if x is None else x for x in (pairs.tiles, pairs.columns)]


def no_list(q: Tensor) -> Tensor:
    """One unused entry, [1, 1, 1, 1] int32."""
    return q.new_full((1, 1, 1, 1), -1, dtype=torch.int32)
