"""block_sparse_attention as an ONNX function: the lists become a mask of dense attention, right in any runtime.

Source: methods (llm) 6.6, the first rung of the ladder.
"""

from __future__ import annotations

from onnxscript import script

from .onnx_logits import GroupedLogits
from .opset import STANDARD as op
from .opset import TAMIS


@script(TAMIS, default_opset=op)
def ListedKeys(tiles, columns, rows, tokens, width):
    """[b, s, N, N] which keys the lists of each query name; rows, tokens, width [1]."""
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
    return op.Gather(listed > 0, op.Range(0, op.Squeeze(tokens), 1) / rows, axis=2)


@script(TAMIS, default_opset=op)
def BlockSparseAttention(
    q,
    k,
    v,
    tiles,
    columns,
    lengths,
    share: int,
    rows: int,
    width: int,
    sink: int,
    local: int,
    first: int,
    last: int,
    scale: float,
    causal: int,
    softcap: float,
):
    tokens = op.Shape(q, start=2, end=3)
    place = op.Range(0, op.Squeeze(tokens), 1)
    query = op.Unsqueeze(place, [1])
    line, span = op.Expand(rows, [1]), op.Expand(width, [1])
    listed = ListedKeys(op.Cast(tiles, to=7), op.Cast(columns, to=7), line, tokens, span)
    ends = op.Reshape(op.Where(lengths < 0, tokens, lengths), [-1, 1, 1, 1])
    near = op.Abs(query - place) < local
    dense = op.Or(query < first, query >= ends - last)
    implicit = op.Or(op.Or(place < sink, near), dense)
    later = op.And(place > query, op.Expand(causal, [1]) > 0)
    real = op.And(op.And(place < ends, query < ends), op.Not(later))
    seen = op.And(op.Or(listed, implicit), real)
    # a list shared by several heads is repeated for each
    heads = op.Shape(q, start=1, end=2)
    batch = op.Shape(q, start=0, end=1)
    one = op.Constant(value_ints=[1])
    each = op.Where(op.Expand(share, [1]) == 1, op.Shape(k, start=1, end=2), heads)
    sets = op.Where(op.Expand(share, [1]) == 0, one, each)
    apart = op.Expand(op.Unsqueeze(seen, [2]), op.Concat(batch, sets, heads / sets, tokens, tokens, axis=0))
    seen = op.Reshape(apart, op.Concat(batch, heads, tokens, tokens, axis=0), allowzero=1)
    capped = op.Expand(softcap, [1]) > 0
    bound = op.Where(capped, op.Expand(softcap, [1]), op.Constant(value_floats=[1.0]))
    logits = GroupedLogits(q, k, scale)
    logits = op.Where(capped, op.Tanh(logits / bound) * bound, logits)
    weights = op.Softmax(op.Where(seen, logits, op.Constant(value_float=-3.4028234663852886e38)), axis=-1)
    weights = op.Where(seen, weights, op.Constant(value_float=0.0))
    key_heads = op.Shape(v, start=1, end=2)
    together = op.Concat(batch, key_heads, heads / key_heads * tokens, tokens, axis=0)
    mixed = op.MatMul(op.Reshape(weights, together, allowzero=1), op.Cast(v, to=1))
    shape = op.Concat(op.Shape(q, start=0, end=3), op.Shape(v, start=3, end=4), axis=0)
    return op.CastLike(op.Reshape(mixed, shape, allowzero=1), q)
