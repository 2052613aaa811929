"""summary_attention: one softmax over the keys near a query and over summaries of all the others.

    out[b, h, i] = sum_j P[i, j] v_j + sum_m P[i, m] summary_v_m,   P = softmax over both kinds of keys of
    cap(scale * q_i . k_j) and cap(scale * q_i . summary_k_m) + summary_bias_m

Keys lie in spans of `span` tokens.  Query i reads the keys j < lengths[b] of

    max(0, i + 1 - local) rounded down to a whole span .. i               where causal,
    the same .. i + local rounded up to a whole span, that one excluded   otherwise,

which are the `local` nearest and what fills up their spans; and the summaries m, but not while
hidden_from[b, m] <= i < hidden_until[b, m].

q              [B, H, N, D]     float
k, v           [B, Hk, N, D]    float    Hk divides H; head h reads key head h // (H / Hk)
summary_k      [B, H, M, D]     float    anything that stands for keys: pooled spans, keys from far away
summary_v      [B, H, M, Dv]    float
summary_bias   [., ., M]        float32  broadcast to [B, H, M]; -inf hides; None: 0
hidden_from, hidden_until  [., M]  int64  broadcast to [B, M]
lengths        [B]              int64    real tokens, which come first in each row; None: N
span, local    int              1 or more
scale          float
causal         bool
softcap        float            cap(x) = softcap * tanh(x / softcap); None: cap(x) = x
->             [B, H, N, Dv] as q, a view of [B, N, H, Dv]; 0 for padding and for a query with nothing to read

Queries are taken in rows of whole spans, and each row's keys are one stretch of memory, so time and memory go with
N * (M + local + row), never with N * N.  Raises nothing of its own.
Source: the form that Combiner and CCA-Attention share (methods, llm 6.2: dense over [compressed; local]).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor
from torch.nn.functional import pad

from ..op import OnnxCall, Op, define_op
from .attention import capped, softmax_of_seen
from .onnx_logits import GroupedLogits
from .opset import STANDARD as op
from .opset import TAMIS
from .precision import compute_dtype

MaybeTensor = Tensor | None
ROW = 64  # queries that share a stretch of keys, or one span of more


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_k: Tensor,
    summary_v: Tensor,
    summary_bias: MaybeTensor,
    hidden_from: Tensor,
    hidden_until: Tensor,
    lengths: MaybeTensor,
    span: int,
    local: int,
    scale: float,
    causal: bool,
    softcap: float | None = None,
) -> Tensor:
    """See the module."""
    dtype, (batch, heads, tokens) = compute_dtype(q), q.shape[:3]
    rows, before, after = _stretch(span, local, causal, tokens)
    count = (tokens + rows - 1) // rows
    q_rows = pad(q.to(dtype) * scale, (0, 0, 0, count * rows - tokens))
    first = torch.arange(count, device=q.device).unsqueeze(1) * rows
    query = first + torch.arange(rows, device=q.device)  # [R, rows]
    place = first + torch.arange(-before, rows + after, device=q.device)  # [R, W]
    ends = torch.arange(batch, device=q.device) * 0 + tokens if lengths is None else lengths
    near = _near(q_rows, k, place, query, ends, span, local, causal, softcap)
    far = capped(q_rows @ summary_k.to(dtype).transpose(2, 3), softcap)
    if summary_bias is not None:
        far = far + summary_bias.to(dtype).unsqueeze(-2)
    line = query.reshape(-1, 1)
    hidden = (line >= hidden_from.unsqueeze(1)) & (line < hidden_until.unsqueeze(1))  # [., R * rows, M]
    real = (line < ends.reshape(-1, 1, 1)).unsqueeze(1)
    far = torch.where(hidden.unsqueeze(1) | ~real, -torch.inf, far)
    weights = softmax_of_seen(torch.cat([near, far], -1))
    width = rows + before + after
    stacked = weights[..., :width].reshape(batch, k.shape[1], heads // k.shape[1], count, rows, width)
    stacked = stacked.transpose(2, 3).reshape(batch, k.shape[1], count, -1, width)
    out = stacked @ _stretches(v.to(dtype), place)  # [B, Hk, R, G * rows, Dv]
    out = out.reshape(batch, k.shape[1], count, heads // k.shape[1], rows, v.shape[3]).transpose(2, 3)
    out = out.reshape(batch, heads, count * rows, v.shape[3]) + weights[..., width:] @ summary_v.to(dtype)
    return out.transpose(1, 2)[:, :tokens].to(q.dtype).contiguous().transpose(1, 2)


def _stretch(span: int, local: int, causal: bool, tokens: Any) -> tuple[int, Any, Any]:
    """Queries of a row, and how many keys before its first and after its last query they read, of all `tokens`."""
    reach = torch.sym_min(-(-(local - 1) // span) * span, tokens)
    return span * max(1, ROW // span), reach, 0 if causal else reach


def _near(
    q: Tensor,
    k: Tensor,
    place: Tensor,
    query: Tensor,
    ends: Tensor,
    span: int,
    local: int,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    """Logits of rows of queries [B, H, R * rows, D] to the keys of their stretch: [B, H, R * rows, W], -inf: unread."""
    (batch, heads, _, size), (count, rows) = q.shape, query.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], count, rows, size).transpose(2, 3)
    keys = _stretches(k.to(q.dtype), place)
    logits = grouped.reshape(batch, k.shape[1], count, -1, size) @ keys.transpose(3, 4)
    logits = logits.reshape(batch, k.shape[1], count, heads // k.shape[1], rows, place.shape[1]).transpose(2, 3)
    logits = capped(logits.reshape(batch, heads, count * rows, place.shape[1]), softcap)
    key, each = place.unsqueeze(1), query.unsqueeze(2)
    start = (each + 1 - local).clamp(min=0) // span * span
    stop = each + 1 if causal else (each + local + span - 1) // span * span
    seen = ((key >= start) & (key < stop)).reshape(1, count * rows, -1)
    ends = ends.reshape(-1, 1, 1)
    key = key.expand(-1, rows, -1).reshape(1, count * rows, -1)
    seen = seen & (key < ends) & (query.reshape(-1, 1) < ends)
    return torch.where(seen.unsqueeze(1), logits, -torch.inf)


def _stretches(x: Tensor, place: Tensor) -> Tensor:
    """x [B, Hk, N, D] at places [R, W], any number where there is none: [B, Hk, R, W, D]."""
    batch, heads, tokens, size = x.shape
    index = place.clamp(min=0, max=tokens - 1).reshape(-1)
    return x.index_select(2, index).reshape(batch, heads, place.shape[0], place.shape[1], size)


def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Shape rule: in memory the heads of a token lie side by side, as what joins them wants it."""
    batch, heads, tokens = q.shape[:3]
    return q.new_empty((batch, tokens, heads, v.shape[-1])).transpose(1, 2)


@script(TAMIS, default_opset=op)
def SummaryAttention(
    q,
    k,
    v,
    summary_k,
    summary_v,
    summary_bias,
    hidden_from,
    hidden_until,
    lengths,
    span: int,
    local: int,
    scale: float,
    causal: int,
    softcap: float,
):
    tokens = op.Shape(q, start=2, end=3)
    place = op.Range(0, op.Squeeze(tokens), 1)
    query = op.Unsqueeze(place, [1])
    ends = op.Reshape(op.Where(lengths < 0, tokens, lengths), [-1, 1, 1])
    start = op.Max(query + 1 - local, op.Constant(value_int=0)) / span * span
    stop = op.Where(op.Expand(causal, [1]) > 0, query + 1, (query + local + span - 1) / span * span)
    real = query < ends
    near = op.And(op.And(place >= start, place < stop), op.And(place < ends, real))
    apart = op.And(query >= op.Unsqueeze(hidden_from, [1]), query < op.Unsqueeze(hidden_until, [1]))
    far = op.And(op.Not(apart), real)
    both = op.Concat(GroupedLogits(q, k, scale), GroupedLogits(q, summary_k, scale), axis=-1)
    capped = op.Expand(softcap, [1]) > 0
    bound = op.Where(capped, op.Expand(softcap, [1]), op.Constant(value_floats=[1.0]))
    both = op.Where(capped, op.Tanh(both / bound) * bound, both)
    none = op.Constant(value_float=float("-inf"))
    shape = op.Concat(op.Shape(q, start=0, end=3), tokens, axis=0)
    local_logits = op.Where(op.Unsqueeze(near, [1]), op.Slice(both, [0], tokens, [-1]), none)
    rest = op.Slice(both, tokens, op.Shape(both, start=3, end=4), [-1]) + op.Unsqueeze(op.Cast(summary_bias, to=1), [2])
    logits = op.Concat(op.Expand(local_logits, shape), op.Where(op.Unsqueeze(far, [1]), rest, none), axis=-1)
    finite = op.Constant(value_float=-3.4028234663852886e38)
    weights = op.Softmax(op.Max(logits, finite), axis=-1)
    weights = op.Where(logits > none, weights, op.Constant(value_float=0.0))
    key_heads = op.Shape(v, start=1, end=2)
    heads = op.Shape(q, start=1, end=2)
    together = op.Concat(op.Shape(q, start=0, end=1), key_heads, heads / key_heads * tokens, tokens, axis=0)
    mixed = op.MatMul(op.Reshape(op.Slice(weights, [0], tokens, [-1]), together, allowzero=1), op.Cast(v, to=1))
    shape = op.Concat(op.Shape(q, start=0, end=3), op.Shape(v, start=3, end=4), axis=0)
    beyond = op.Slice(weights, tokens, op.Shape(both, start=3, end=4), [-1])
    return op.CastLike(op.Reshape(mixed, shape, allowzero=1) + op.MatMul(beyond, op.Cast(summary_v, to=1)), q)


def onnx(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_k: Tensor,
    summary_v: Tensor,
    summary_bias: MaybeTensor,
    hidden_from: Tensor,
    hidden_until: Tensor,
    lengths: MaybeTensor,
    *numbers: Any,
) -> OnnxCall:
    """Calls SummaryAttention, whose body masks dense attention: right everywhere, fast nowhere."""
    attributes = dict(zip(("span", "local", "scale", "causal", "softcap"), (*numbers, None), strict=False))
    attributes |= {"causal": int(attributes["causal"]), "softcap": attributes["softcap"] or 0.0}
    bias = q.new_zeros((1, 1, 1), dtype=torch.float32) if summary_bias is None else summary_bias
    ends = [-1] if lengths is None else lengths
    tensors = [q, k, v, summary_k, summary_v, bias, hidden_from, hidden_until, ends]
    return OnnxCall(SummaryAttention, tensors, attributes)


def flops(q: Any, k: Any, v: Any, summary_k: Any, *rest: Any, **_: Any) -> int:
    """Both products over all summaries and a row's stretch, at most N keys a query; causality halves nothing."""
    batch, heads, tokens, size = q
    span, local, _, causal = rest[5:9]
    near = min(tokens, sum(_stretch(span, local, causal, tokens)))
    return 2 * batch * heads * tokens * (near + summary_k[2]) * (size + v[3])


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, key_heads, tokens, size, many = 2, 4, 2, 13, 8, 5
    q = torch.randn(batch, heads, tokens, size, generator=generator)
    k, v = (torch.randn(batch, key_heads, tokens, size, generator=generator) for _ in range(2))
    far = [torch.randn(batch, heads, many, size, generator=generator) for _ in range(2)]
    bias = torch.randn(batch, heads, many, generator=generator)
    bias[:, :, 1] = -torch.inf
    until = torch.tensor([[3, 6, 20, 9, 0]])
    each = torch.stack([until[0], until[0] - 2])
    start, ends = torch.zeros_like(until), torch.tensor([tokens, 7])
    yield q, k, v, *far, None, start, until, None, 3, 1, 0.3, True
    yield q, k, v, *far, bias, start.expand(2, -1).contiguous() + 1, each, ends, 2, 3, 0.3, True
    yield q, k, v, *far, bias[:, :1].contiguous(), start + 2, until, ends, 4, 2, 0.3, False, 1.5
    yield q.half(), k.half(), v.half(), *(x.half() for x in far), None, start, until, ends, 80, 3, 0.3, True
    yield q[:1], k[:1], v[:1], *(x[:1] for x in far), None, start + 1, until, None, 1, 4, 0.3, False


SUMMARY_ATTENTION = define_op(
    Op(
        name="summary_attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor summary_k, Tensor summary_v, Tensor? summary_bias, "
        "Tensor hidden_from, Tensor hidden_until, Tensor? lengths, int span, int local, float scale, bool causal, "
        "float? softcap=None) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
    )
)
