"""clustered_attention: attention within clusters of queries and keys; a query gets the mean of its clusters.

    out[b, h, i] = mean over the clusters c that list query i and in which it sees a key of
                   sum_j P_c[i, j] v_j,   P_c = softmax over the keys j that c lists (j <= i where causal) of
                   cap(scale * q_i . k_j)

q            [B, H, N, D]     float
k, v         [B, Hk, N, D]    float    Hk divides H; head h reads key head h // (H / Hk)
query_lists  [B, H, c, w]     int64    places of each cluster's queries, none twice in a cluster; -1: unused
key_lists    [B, H, c, u]     int64    places of each cluster's keys, none twice; -1: unused
scale        float
causal       bool
softcap      float            cap(x) = softcap * tanh(x / softcap); None: cap(x) = x
->           [B, H, N, D] as q; 0 for a query that is in no cluster or sees nothing in any

Time and memory go with c * w * u.  On a GPU the sum over three and more clusters has no fixed order.  Raises nothing of
its own.
Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", TACL 2021, arXiv 2003.05997,
section 4.1 (methods, llm 1.11).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from .attention import capped
from .opset import STANDARD as op
from .opset import TAMIS
from .precision import compute_dtype
from .rows import add_rows, take_rows


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lists: Tensor,
    key_lists: Tensor,
    scale: float,
    causal: bool,
    softcap: float | None = None,
) -> Tensor:
    """See the module."""
    dtype, (batch, heads, tokens) = compute_dtype(q), q.shape[:3]
    # the same lists, only that their number of heads may be another symbol in a trace
    query_lists, key_lists = (x.index_select(1, torch.arange(heads, device=q.device)) for x in (query_lists, key_lists))
    queries = _listed(q.to(dtype) * scale, heads, query_lists)
    keys, values = (_listed(x.to(dtype), heads, key_lists) for x in (k, v))
    logits = capped(queries @ keys.transpose(2, 3), softcap)
    query = query_lists.flatten(0, 1).unsqueeze(3)
    key = key_lists.flatten(0, 1).unsqueeze(2)
    seen = (query >= 0) & (key >= 0) & ((key <= query) if causal else (key >= 0))
    weights = torch.where(seen, logits, torch.finfo(dtype).min).softmax(-1)
    mixed = torch.where(seen, weights, 0.0) @ values
    some = seen.any(-1, keepdim=True)
    # one column counts the clusters; what is unused goes to a row behind the last
    parts = torch.cat([mixed, some.to(dtype)], -1).flatten(1, 2)
    place = torch.where(some[..., 0], query[..., 0], tokens).flatten(1)
    sums = add_rows(parts.new_zeros((batch * heads, tokens + 1, parts.shape[2])), place, parts)
    sums = sums[:, :tokens].reshape(batch, heads, tokens, parts.shape[2])
    return (sums[..., :-1] / sums[..., -1:].clamp(min=1)).to(q.dtype)


def _listed(x: Tensor, heads: int, lists: Tensor) -> Tensor:
    """Rows of x [B, Hx, N, D] that lists [B, H, c, w] name: [B * H, c, w, D]; any row where one is unused."""
    batch, own, tokens, size = x.shape
    x = x.unsqueeze(2).expand(-1, -1, heads // own, -1, -1).reshape(batch * heads, tokens, size)
    index = lists.clamp(min=0).reshape(batch * heads, lists.shape[2] * lists.shape[3])
    return take_rows(x, index).reshape(batch * heads, lists.shape[2], lists.shape[3], size)


def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Shape rule."""
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@script(TAMIS, default_opset=op)
def ListedRows(x, heads, lists):
    """x [B, Hx, N, D] at lists [B, H, c, w]: [B, H, c, w, D]; heads: H as [1]."""
    own, size = op.Shape(x, start=1, end=2), op.Shape(x, start=3, end=4)
    one = op.Constant(value_ints=[1])
    batch = op.Shape(x, start=0, end=1)
    apart = op.Expand(op.Unsqueeze(x, [2]), op.Concat(batch, own, heads / own, op.Shape(x, start=2, end=4), axis=0))
    each = op.Reshape(apart, op.Concat(batch, heads, op.Shape(x, start=2, end=4), axis=0), allowzero=1)
    flat = op.Reshape(op.Max(lists, op.Constant(value_int=0)), op.Concat(batch, heads, [-1], one, axis=0))
    rows = op.GatherElements(each, op.Expand(flat, op.Concat(one, one, one, size, axis=0)), axis=2)
    return op.Reshape(rows, op.Concat(op.Shape(lists), size, axis=0), allowzero=1)


@script(TAMIS, default_opset=op)
def ClusteredAttention(q, k, v, query_lists, key_lists, scale: float, causal: int, softcap: float):
    heads, tokens = op.Shape(q, start=1, end=2), op.Shape(q, start=2, end=3)
    queries = ListedRows(op.Cast(q, to=1) * scale, heads, query_lists)
    keys, values = ListedRows(op.Cast(k, to=1), heads, key_lists), ListedRows(op.Cast(v, to=1), heads, key_lists)
    logits = op.MatMul(queries, op.Transpose(keys, perm=[0, 1, 2, 4, 3]))
    capped = op.Expand(softcap, [1]) > 0
    bound = op.Where(capped, op.Expand(softcap, [1]), op.Constant(value_floats=[1.0]))
    logits = op.Where(capped, op.Tanh(logits / bound) * bound, logits)
    query, key = op.Unsqueeze(query_lists, [4]), op.Unsqueeze(key_lists, [3])
    later = op.And(key > query, op.Expand(causal, [1]) > 0)
    seen = op.And(op.And(query >= 0, key >= 0), op.Not(later))
    zero, one = op.Constant(value_float=0.0), op.Constant(value_ints=[1])
    weights = op.Softmax(op.Where(seen, logits, op.Constant(value_float=-3.4028234663852886e38)), axis=-1)
    mixed = op.MatMul(op.Where(seen, weights, zero), values)
    some = op.ReduceMax(op.Cast(seen, to=1), [4], keepdims=1)
    parts = op.Concat(mixed, some, axis=-1)
    width = op.Shape(parts, start=4, end=5)
    rows = op.Shape(q, start=0, end=2)
    parts = op.Reshape(parts, op.Concat(rows, [-1], width, axis=0))
    place = op.Reshape(op.Where(some > 0, query, tokens), op.Concat(rows, [-1], one, axis=0))
    place = op.Expand(place, op.Concat(one, one, one, width, axis=0))
    none = op.Expand(zero, op.Concat(rows, tokens + 1, width, axis=0))
    sums = op.Slice(op.ScatterElements(none, place, parts, axis=2, reduction="add"), [0], tokens, [2])
    count = op.Max(op.Slice(sums, width - 1, width, [3]), op.Constant(value_float=1.0))
    return op.CastLike(op.Slice(sums, [0], width - 1, [3]) / count, q)


def onnx(q: Tensor, k: Tensor, v: Tensor, query_lists: Tensor, key_lists: Tensor, *numbers: Any) -> OnnxCall:
    """Calls ClusteredAttention."""
    scale, causal, softcap = (*numbers, None)[:3]
    attributes = {"scale": scale, "causal": int(causal), "softcap": softcap or 0.0}
    return OnnxCall(ClusteredAttention, [q, k, v, query_lists, key_lists], attributes)


def flops(q: Any, k: Any, v: Any, query_lists: Any, key_lists: Any, *_: Any, **__: Any) -> int:
    """Both products over what the lists can hold; causality halves nothing."""
    batch, heads, clusters, many = query_lists
    return 2 * batch * heads * clusters * many * key_lists[3] * (q[3] + v[3])


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 11, 8, generator=generator)
    k, v = (torch.randn(2, 2, 11, 8, generator=generator) for _ in range(2))

    def lists(many: int, unused: float) -> Tensor:
        drawn = torch.rand(2, 4, 3, 11, generator=generator).argsort(-1)[..., :many]
        return torch.where(torch.rand(drawn.shape, generator=generator) < unused, -1, drawn)

    yield q, k, v, lists(4, 0.0), lists(4, 0.0), 0.3, True
    yield q, k, v, lists(5, 0.3), lists(7, 0.3), 0.3, True, 1.5
    yield q, k, v, lists(6, 0.9), lists(5, 0.9), 0.3, False
    yield q.half(), k.half(), v.half(), lists(5, 0.2), lists(5, 0.2), 0.3, True


CLUSTERED_ATTENTION = define_op(
    Op(
        name="clustered_attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor query_lists, Tensor key_lists, float scale, bool causal, "
        "float? softcap=None) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
    )
)
