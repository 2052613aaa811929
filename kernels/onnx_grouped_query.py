"""Sparse and causal attention as ONNX Runtime's own GroupQueryAttention: the same numbers, in less time on its CPU.

That operator knows causality, a window, a soft cap, heads that share a key head, and numbers added to the logits.  An
index that is a window alone is written as one; any other becomes what is added, which costs what dense attention costs.

ONNX Runtime's SparseAttention, which takes lists of tiles, is not used: its CPU kernel fails unless past and present
keys lie in one buffer, and only a caller that binds them can give it one; besides, it multiplies all pairs and then
hides those that are not listed.

Source: methods (llm) 6.6, the third rung of the ladder.
"""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..op import CONTRIB, OnnxCall
from .onnx_block_sparse import LISTS, NEAR, ListedKeys, lists_of
from .opset import STANDARD as op
from .opset import TAMIS
from .sparse_pairs import Pairs

contrib = Opset(CONTRIB, 1)
STEP = 8  # the operator takes head sizes that are multiples
DTYPES = (torch.float32, torch.float16)


@script(TAMIS, default_opset=op)
def TokensFirst(x):
    """[B, H, N, D] -> [B, N, H D]."""
    wide = op.Shape(x, start=1, end=2) * op.Shape(x, start=3, end=4)
    shape = op.Concat(op.Shape(x, start=0, end=1), op.Shape(x, start=2, end=3), wide, axis=0)
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), shape, allowzero=1)


@script(TAMIS, default_opset=op)
def HeadsFirst(x, like, reading):
    """[B, N, H D] -> [B, H, N, D] as `like`, 0 for queries that read nothing; reading [b, h, N, 1]."""
    tokens, heads = op.Shape(like, start=2, end=3), op.Shape(like, start=1, end=2)
    shape = op.Concat(op.Shape(like, start=0, end=1), tokens, heads, op.Shape(like, start=3, end=4), axis=0)
    out = op.Transpose(op.Reshape(x, shape, allowzero=1), perm=[0, 2, 1, 3])
    return op.Where(reading, out, op.CastLike(op.Constant(value_float=0.0), out))


@script(TAMIS, default_opset=op)
def OfHeads(x, q):
    """[b, s, R, N] of layer, groups, or heads -> [b, 1, R, N] or [b, H, R, N]: what all heads share is not repeated."""
    batch, sets, rest = op.Shape(x, start=0, end=1), op.Shape(x, start=1, end=2), op.Shape(x, start=2, end=4)
    each = op.Where(sets == 1, sets, op.Shape(q, start=1, end=2) / sets)
    apart = op.Expand(op.Unsqueeze(x, [2]), op.Concat(batch, sets, each, rest, axis=0))
    return op.Reshape(apart, op.Concat(batch, sets * each, rest, axis=0), allowzero=1)


@script(TAMIS, default_opset=op)
def CausalAttention(q, k, v, lengths, heads: int, key_heads: int, window: int, scale: float, softcap: float):
    tokens = op.Shape(q, start=2, end=3)
    total = op.Cast(tokens, to=6)
    # padding comes last, where no real query sees it, so every row may be as long as the longest
    out = contrib.GroupQueryAttention(
        TokensFirst(q),
        TokensFirst(k),
        TokensFirst(v),
        None,
        None,
        op.Expand(total - 1, op.Shape(q, start=0, end=1)),
        total,
        num_heads=heads,
        kv_num_heads=key_heads,
        local_window_size=window,
        scale=scale,
        softcap=softcap,
    )
    real = op.Reshape(op.Where(lengths < 0, tokens, lengths), [-1, 1, 1, 1])
    return HeadsFirst(out, q, op.Unsqueeze(op.Range(0, op.Squeeze(tokens), 1), [1]) < real)


@script(TAMIS, default_opset=op)
def AddedAttention(q, k, v, added, reading, heads: int, key_heads: int, scale: float, causal: int, softcap: float):
    """Attention with numbers added to the logits [b, 1 or H, N, N]; 0 for queries that read nothing."""
    total = op.Cast(op.Shape(q, start=2, end=3), to=6)
    out = contrib.GroupQueryAttention(
        TokensFirst(q),
        TokensFirst(k),
        TokensFirst(v),
        None,
        None,
        op.Expand(total - 1, op.Shape(q, start=0, end=1)),
        total,
        None,
        None,
        None,
        op.CastLike(added, q),
        num_heads=heads,
        kv_num_heads=key_heads,
        causal=causal,
        scale=scale,
        softcap=softcap,
    )
    return HeadsFirst(out, q, reading)


@script(TAMIS, default_opset=op)
def MaskedAttention(q, k, v, mask, heads: int, key_heads: int, scale: float, softcap: float, hidden: float):
    added = op.Where(mask, op.Constant(value_float=0.0), op.Expand(hidden, [1]))
    reading = op.ReduceMax(added, op.Constant(value_ints=[-1])) >= 0.0
    return AddedAttention(
        q, k, v, added, reading, heads=heads, key_heads=key_heads, scale=scale, causal=0, softcap=softcap
    )


@script(TAMIS, default_opset=op)
def ListsAdded(tiles, columns, ends, q, rows, width, hidden):
    """What lists add to the logits of each row of queries, [b, 1 or H, R, N]: 0 for a key they name, else `hidden`."""
    tokens = op.Shape(q, start=2, end=3)
    line, span = op.Expand(rows, [1]), op.Expand(width, [1])
    listed = ListedKeys(op.Cast(tiles, to=7), op.Cast(columns, to=7), line, tokens, span)
    listed = op.And(listed, op.Range(0, op.Squeeze(tokens), 1) < ends)
    return OfHeads(op.Where(listed, op.Constant(value_float=0.0), hidden), q)


@script(TAMIS, default_opset=op)
def ReadByLists(added, ends, rows, causal):
    """[b, h, N, 1] whether a query reads any key that lists name: their first one, if it may see that."""
    tokens = op.Shape(added, start=3, end=4)
    place = op.Range(0, op.Squeeze(tokens), 1)
    earliest = op.ReduceMin(op.Where(added < 0.0, tokens, place), op.Constant(value_ints=[-1]))
    query = op.Unsqueeze(place, [1])
    last = op.Where(op.Expand(causal, [1]) > 0, query, tokens - 1)
    return op.And(op.Gather(earliest, place / rows, axis=2) <= last, query < ends)


@script(TAMIS, default_opset=op)
def ListedAttention(
    q,
    k,
    v,
    tiles,
    columns,
    lengths,
    rows: int,
    width: int,
    heads: int,
    key_heads: int,
    scale: float,
    causal: int,
    softcap: float,
    hidden: float,
):
    tokens = op.Shape(q, start=2, end=3)
    ends = op.Reshape(op.Where(lengths < 0, tokens, lengths), [-1, 1, 1, 1])
    of_rows = ListsAdded(tiles, columns, ends, q, rows, width, hidden)
    added = op.Gather(of_rows, op.Range(0, op.Squeeze(tokens), 1) / op.Expand(rows, [1]), axis=2)
    reading = ReadByLists(of_rows, ends, op.Expand(rows, [1]), causal)
    return AddedAttention(
        q, k, v, added, reading, heads=heads, key_heads=key_heads, scale=scale, causal=causal, softcap=softcap
    )


@script(TAMIS, default_opset=op)
def ListedAndNearAttention(
    q,
    k,
    v,
    tiles,
    columns,
    lengths,
    rows: int,
    width: int,
    sink: int,
    local: int,
    first: int,
    last: int,
    heads: int,
    key_heads: int,
    scale: float,
    causal: int,
    softcap: float,
    hidden: float,
):
    tokens = op.Shape(q, start=2, end=3)
    place = op.Range(0, op.Squeeze(tokens), 1)
    query = op.Unsqueeze(place, [1])
    ends = op.Reshape(op.Where(lengths < 0, tokens, lengths), [-1, 1, 1, 1])
    of_rows = ListsAdded(tiles, columns, ends, q, rows, width, hidden)
    dense = op.Or(query < first, query >= ends - last)
    near = op.Or(op.Or(place < sink, op.Abs(query - place) < local), dense)
    near = op.Where(op.And(near, place < ends), op.Constant(value_float=0.0), op.Expand(hidden, [1]))
    added = op.Max(op.Gather(of_rows, place / op.Expand(rows, [1]), axis=2), near)
    listed = ReadByLists(of_rows, ends, op.Expand(rows, [1]), causal)
    # every real query reads the first key as a sink, or itself
    reading = op.Or(listed, op.And(op.Or(dense, op.Max(sink, local) > 0), query < ends))
    return AddedAttention(
        q, k, v, added, reading, heads=heads, key_heads=key_heads, scale=scale, causal=causal, softcap=softcap
    )


def grouped_query(q: Tensor, k: Tensor, v: Tensor, *index: Any) -> OnnxCall | str:
    """Calls one of the functions above, for block_sparse_attention's arguments; why none can be, as text."""
    pairs, scale, softcap = Pairs.of(*index)
    moved = "its keys lie in another order, and causality goes by place"
    reason = why_not(q, v, scale) if pairs.positions is None else moved
    whole = pairs.causal and 0 < pairs.window <= pairs.local  # every key that the window leaves is near
    if pairs.window and not whole:
        reason = reason or "the model has a window of its own besides the index"
    if reason:
        return reason
    sizes = _sizes(q, k, scale, softcap)
    near = {name: getattr(pairs, name) for name in NEAR}
    ends = [-1] if pairs.lengths is None else pairs.lengths
    listed = pairs.tiles is not None or pairs.columns is not None
    alone = pairs.causal and pairs.local and not (listed or pairs.sink or pairs.first or pairs.last)
    if whole or alone:
        return OnnxCall(CausalAttention, [q, k, v, ends], {**sizes, "window": pairs.window or pairs.local})
    sizes |= {name: getattr(pairs, name) for name in LISTS}
    sizes |= {"causal": int(pairs.causal), "hidden": _hidden(q)}
    given = [q, k, v, *lists_of(q, pairs), ends]
    if any(near.values()):
        return OnnxCall(ListedAndNearAttention, given, {**sizes, **near})
    return OnnxCall(ListedAttention, given, sizes)


def dense_grouped_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> OnnxCall | str:
    """The same for torch's scaled_dot_product_attention over tokens that see earlier ones, or a mask of N x N."""
    if q.dim() != 4:
        return "its heads are no axis of their own"
    scale = float(q.shape[3]) ** -0.5 if scale is None else scale
    square = statically_known_true(q.shape[2] == k.shape[2])
    if mask is None and not (causal and square):
        return "it is no causal attention over one sequence"
    if mask is not None and not (square and _is_square(mask, q)):
        return "what it adds to its logits is no mask of tokens by tokens"
    reason = why_not(q, v, scale)
    if reason or dropout:
        return reason or "it drops values at random"
    sizes = _sizes(q, k, scale, None)
    if mask is None:
        return OnnxCall(CausalAttention, [q, k, v, [-1]], {**sizes, "window": -1})
    return OnnxCall(MaskedAttention, [q, k, v, mask], {**sizes, "hidden": _hidden(q)})


def _is_square(mask: Tensor, q: Tensor) -> bool:
    """Whether it says of every query and every key, [1 or B, 1 or H, N, N], whether the one sees the other."""
    sizes = (mask.shape[-2] == q.shape[2], mask.shape[-1] == q.shape[2])
    return mask.dtype == torch.bool and mask.dim() == 4 and all(map(statically_known_true, sizes))


def _sizes(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> dict[str, Any]:
    return {"heads": int(q.shape[1]), "key_heads": int(k.shape[1]), "scale": scale, "softcap": softcap or 0.0}


def _hidden(q: Tensor) -> float:
    """What is added for keys that a query does not read: a logit more stays finite."""
    return torch.finfo(q.dtype).min / 2


def why_not(q: Tensor, v: Tensor, scale: float) -> str:
    """What GroupQueryAttention does not take of queries and values; "" where it takes them."""
    if q.dtype not in DTYPES:
        return f"GroupQueryAttention has no CPU kernel for {str(q.dtype).removeprefix('torch.')}"
    if q.shape[3] % STEP:
        return f"GroupQueryAttention takes head sizes that are multiples of {STEP}, and this is {q.shape[3]}"
    if q.shape[3] != v.shape[3]:
        return f"GroupQueryAttention takes keys and values of one size, and these are {q.shape[3]} and {v.shape[3]}"
    return "" if scale else "GroupQueryAttention reads a scale of 0 as none"
