"""Pieces of attention that several ONNX functions share: logits of grouped heads, masks, weighted values.

Query heads that share a key head are stacked, so that no key or value is repeated.
"""

from __future__ import annotations

from onnxscript import script

from .opset import STANDARD as op
from .opset import TAMIS


@script(TAMIS, default_opset=op)
def GroupedLogits(q, k, scale):
    heads = op.Shape(k, start=1, end=2)
    stacked = op.Shape(q, start=1, end=2) * op.Shape(q, start=2, end=3) / heads
    groups = op.Concat(op.Shape(q, start=0, end=1), heads, stacked, op.Shape(q, start=3, end=4), axis=0)
    keys = op.Transpose(op.Cast(k, to=1), perm=[0, 1, 3, 2])
    product = op.MatMul(op.Reshape(op.Cast(q, to=1) * scale, groups, allowzero=1), keys)
    apart = op.Concat(op.Shape(q, start=0, end=3), op.Shape(k, start=2, end=3), axis=0)
    return op.Reshape(product, apart, allowzero=1)


@script(TAMIS, default_opset=op)
def AddedToLogits(logits, key_bias, mask, causal):
    biased = logits + op.Unsqueeze(op.Cast(key_bias, to=1), [1, 2])
    row = op.Unsqueeze(op.Range(0, op.Squeeze(op.Shape(logits, start=2, end=3)), 1), [1])
    column = op.Range(0, op.Squeeze(op.Shape(logits, start=3, end=4)), 1)
    hidden = op.And(column > row, op.Expand(causal, [1]) > 0)
    lowest = op.Constant(value_float=float("-inf"))
    return op.Where(hidden, lowest, biased + op.Cast(mask, to=1))


@script(TAMIS, default_opset=op)
def GroupedMix(logits, v, like):
    # a query that sees no key gets finite numbers: as NaN it would spoil every query of the next layer, weight 0 or not
    finite = op.Constant(value_float=-3.4028234663852886e38)
    weights = op.Softmax(op.Max(logits, finite), axis=-1)
    heads = op.Shape(v, start=1, end=2)
    stacked = op.Shape(logits, start=1, end=2) * op.Shape(logits, start=2, end=3) / heads
    together = op.Concat(op.Shape(logits, start=0, end=1), heads, stacked, op.Shape(v, start=2, end=3), axis=0)
    mixed = op.MatMul(op.Reshape(weights, together, allowzero=1), op.Cast(v, to=1))
    shape = op.Concat(op.Shape(logits, start=0, end=3), op.Shape(v, start=3, end=4), axis=0)
    return op.CastLike(op.Reshape(mixed, shape, allowzero=1), like)
