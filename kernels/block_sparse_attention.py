"""block_sparse_attention: attention of every query to the few keys that an index names.

    out[b, h, i] = sum_j P[i, j] v_j,   P = softmax over j in S(b, h, i) of cap(scale * q_i . k_j)

Queries come in rows of `rows` neighbours that share a list.  S(b, h, i) is what query i may see (j < lengths[b]; j <= i
where causal) of the union of

    the first `sink` keys,
    the `local` nearest keys: |i - j| < local,
    its row's tiles: keys tiles[b, s, i // rows, t] + 0 .. width - 1,
    its row's columns: single keys columns[b, s, i // rows, c],
    all keys, for the first `first` and the last `last` tokens of each batch row.

q        [B, H, N, D]     float
k, v     [B, Hk, N, D]    float    Hk divides H; head h reads key head h // (H / Hk)
tiles    [B, S, R, T]     int32    R = ceil(N / rows); tiles of a row do not overlap and may start anywhere; -1: unused
columns  [B, S, R, C]     int32    outside the row's tiles, each once; -1: unused
lengths  [B]              int64    real tokens, which come first in each row; None: N
share    str              who shares a list: "layer" (S = 1), "kv" (S = Hk), "query" (S = H)
rows, width, sink, local, first, last     int; None for tiles or columns: there are none
scale    float
causal   bool
softcap  float            cap(x) = softcap * tanh(x / softcap); None: cap(x) = x
->       [B, H, N, D] as q, a view of [B, N, H, D]; 0 for a query with nothing to read, such as padding

A key that several parts name is read once.  Keys are gathered row by row, so memory and time go with R * (sink + local
+ rows + T * width + C), never with N * N; unused entries cost as much as used ones.  Raises nothing of its own.
Source: methods (llm) 6.3, the prefill index; 0.2, rules 1 to 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..op import OnnxCall, Op, define_op
from .attention import grouped_logits, grouped_mix
from .block_sparse_rows import Reach, attend_rows
from .onnx_block_sparse import BlockSparseAttention
from .rows import take_rows

MaybeTensor = Tensor | None


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: MaybeTensor,
    columns: MaybeTensor,
    lengths: MaybeTensor,
    share: str,
    rows: int,
    width: int,
    sink: int,
    local: int,
    first: int,
    last: int,
    scale: float,
    causal: bool,
    softcap: float | None = None,
) -> Tensor:
    """See the module."""
    scope = {"layer": 1, "kv": k.shape[1], "query": q.shape[1]}[share]
    keys, seen = _gathered(q.shape[2], q.device, scope, tiles, columns, lengths, rows, width, sink, local, causal)
    out = _over_rows(q, k, v, keys, seen, share, rows, scale, softcap)
    if first or last:
        out = _with_dense(out, q, k, v, lengths, first, last, scale, causal, softcap)
    return out


def _gathered(
    tokens: Any,
    device: torch.device,
    scope: int,
    tiles: MaybeTensor,
    columns: MaybeTensor,
    lengths: MaybeTensor,
    rows: int,
    width: int,
    sink: int,
    local: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Keys that each row of queries gathers [b, s, R, K], 0 for what is none, and who sees them [b, s, R, rows, K].

    Axes b and s are 1 where nothing differs along them.
    """
    count = (tokens + rows - 1) // rows
    first = torch.arange(count, device=device).unsqueeze(1) * rows
    queries = (first + torch.arange(rows, device=device)).unsqueeze(-1)  # [R, rows, 1]
    parts: list[tuple[Tensor, Tensor]] = []
    if sink:
        key = torch.arange(sink, device=device).expand(1, 1, count, sink)
        parts.append((key, key.unsqueeze(-2) >= 0))
    if local:
        key = (first + torch.arange(1 - local, rows if causal else rows + local - 1, device=device))[None, None]
        parts.append((key, _is_local(queries, key, local) & (key >= sink).unsqueeze(-2)))
    if tiles is not None:
        key = _lists(tiles, scope, count).unsqueeze(-1)
        key = torch.where(key < 0, -1, key + torch.arange(width, device=device)).flatten(-2)
        parts.append((key, _is_listed(queries, key, sink, local)))
    if columns is not None:
        key = _lists(columns, scope, count)
        parts.append((key, _is_listed(queries, key, sink, local)))
    batch = max_of([part[0].shape[0] for part in parts])
    keys = torch.cat([key.expand(batch, scope, -1, -1) for key, _ in parts], -1)
    seen = torch.cat([mask.expand(batch, scope, count, rows, -1) for _, mask in parts], -1)
    end = tokens if lengths is None else lengths.reshape(-1, 1, 1, 1)
    place = keys.unsqueeze(-2)
    seen = seen & ((keys >= 0) & (keys < end)).unsqueeze(-2)
    if causal:
        seen = seen & (place <= queries)
    if lengths is not None:
        seen = seen & (queries < end.unsqueeze(-1))
    return torch.where(keys < end, keys, 0).clamp(min=0), seen


def _lists(index: Tensor, scope: int, count: Any) -> Tensor:
    """An index [B, S, R, T] as int64 [B, scope, count, T]: the same, only its sizes may be other symbols in a trace."""
    index = index.index_select(2, torch.arange(count, device=index.device))
    return index.index_select(1, torch.arange(scope, device=index.device)).to(torch.int64)


def max_of(sizes: list[Any]) -> Any:
    """The size that parts with 1 along an axis are expanded to."""
    return next((size for size in sizes if not (isinstance(size, int) and size == 1)), 1)


def _is_local(queries: Tensor, key: Tensor, local: int) -> Tensor:
    return (queries - key.unsqueeze(-2)).abs() < local


def _is_listed(queries: Tensor, key: Tensor, sink: int, local: int) -> Tensor:
    """Keys of a list that are not read as sink or as local ones already."""
    fresh = (key >= sink).unsqueeze(-2)
    return fresh & ~_is_local(queries, key, local) if local else fresh.expand(*key.shape[:-1], queries.shape[1], -1)


def _over_rows(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, seen: Tensor, share: str, rows: int, scale: float, softcap: Any
) -> Tensor:
    """Attention of rows of queries [B, H, R * rows, D] to the keys gathered for each: one small dense call for all."""
    batch, heads, tokens, size = q.shape
    sets = heads if share == "query" else k.shape[1]
    group, count = heads // sets, keys.shape[2]
    q = pad(q, (0, 0, 0, count * rows - tokens)).reshape(batch, sets, group, count, rows, size)
    q = q.transpose(2, 3).reshape(batch * sets * count, group, rows, size)
    listed = keys.expand(batch, sets, -1, -1).reshape(batch * sets, count * keys.shape[3])
    k, v = (_of_each(x, sets, listed, count) for x in (k, v))
    seen = seen.expand(batch, sets, -1, -1, -1).reshape(batch * sets * count, 1, rows, keys.shape[3])
    if softcap is None:
        k, v = (x.expand(-1, group, -1, -1) for x in (k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    else:
        logits = torch.tanh(grouped_logits(q, k, scale) / softcap) * softcap
        logits = torch.where(seen, logits, torch.finfo(logits.dtype).min)
        out = grouped_mix(logits.softmax(-1), v, q)
    out = torch.where(seen.any(-1, keepdim=True), out, 0.0)
    out = out.reshape(batch, heads // group, count, group, rows, v.shape[-1]).permute(0, 2, 4, 1, 3, 5)
    out = out.reshape(batch, count * rows, heads, v.shape[-1])[:, :tokens].contiguous()
    return out.transpose(1, 2)


def _of_each(x: Tensor, sets: int, listed: Tensor, count: Any) -> Tensor:
    """Rows of x [B, Hk, N, D] named by listed [B * sets, R * K] -> [B * sets * R, 1, K, D]."""
    batch, heads, tokens, size = x.shape
    x = x.unsqueeze(2).expand(-1, -1, sets // heads, -1, -1).reshape(batch * sets, tokens, size)
    return take_rows(x, listed).reshape(batch * sets * count, 1, listed.shape[1] // count, size)


def on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: MaybeTensor,
    columns: MaybeTensor,
    lengths: MaybeTensor,
    share: str,
    rows: int,
    width: int,
    sink: int,
    local: int,
    first: int,
    last: int,
    scale: float,
    causal: bool,
    softcap: float | None = None,
) -> Tensor:
    """The same where a program on a CPU calls the op."""
    reach = Reach(rows, width, sink, local, causal)
    out = attend_rows(q, k, v, tiles, columns, lengths, share, reach, scale, softcap)
    return _with_dense(out, q, k, v, lengths, first, last, scale, causal, softcap) if first or last else out


def _with_dense(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: MaybeTensor,
    first: int,
    last: int,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    """The first and last tokens of each batch row read every key; a row that has fewer names one again."""
    tokens = q.shape[2]
    if lengths is None:
        lengths = torch.full((q.shape[0],), tokens, dtype=torch.int64, device=q.device)
    ends = lengths.unsqueeze(1)
    opening = torch.arange(first, device=q.device).expand(q.shape[0], -1)
    place = torch.cat([opening, ends - last + torch.arange(last, device=q.device)], 1)
    place = torch.minimum(place.clamp(min=0), (ends - 1).clamp(min=0))  # [B, first + last]
    index = place[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    key = torch.arange(tokens, device=q.device)
    seen = (key < lengths.reshape(-1, 1, 1, 1)).expand(-1, -1, first + last, -1)
    if causal:
        seen = seen & (key <= place[:, None, :, None])
    logits = grouped_logits(q.gather(2, index), k, scale)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = torch.where(seen, logits, torch.finfo(logits.dtype).min)
    few = grouped_mix(logits.softmax(-1), v, q)
    few = torch.where(seen.any(-1, keepdim=True), few, 0.0)
    few, index = few.transpose(1, 2), place[:, :, None, None]
    return out.transpose(1, 2).scatter(1, index.expand(few.shape), few).transpose(1, 2)


def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Shape rule: in memory the heads of a token lie side by side, as what joins them wants it."""
    batch, heads, tokens = q.shape[:3]
    return q.new_empty((batch, tokens, heads, v.shape[-1])).transpose(1, 2)


SHARES = ("layer", "kv", "query")


def onnx(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: MaybeTensor,
    columns: MaybeTensor,
    lengths: MaybeTensor,
    share: str,
    *numbers: Any,
) -> OnnxCall:
    """Calls BlockSparseAttention, whose body masks dense attention: right everywhere, fast nowhere."""
    names = ("rows", "width", "sink", "local", "first", "last", "scale", "causal", "softcap")
    attributes = dict(zip(names, (*numbers, None), strict=False))
    attributes |= {"causal": int(attributes["causal"]), "softcap": attributes["softcap"] or 0.0}
    none = q.new_full((1, 1, 1, 1), -1, dtype=torch.int32)
    given = [none if x is None else x for x in (tiles, columns)]
    ends = [-1] if lengths is None else lengths
    return OnnxCall(BlockSparseAttention, [q, k, v, *given, ends], {"share": SHARES.index(share), **attributes})


def flops(q: Any, k: Any, v: Any, tiles: Any, columns: Any, lengths: Any, share: str, *numbers: Any, **_: Any) -> int:
    """Both products over what the lists can hold, at most N keys a query; causality halves nothing."""
    (batch, heads, tokens, size), (rows, width, sink, local, first, last) = q, numbers[:6]
    listed = (tiles[3] * width if tiles else 0) + (columns[3] if columns else 0)
    near = (local + rows - 1) if local else 0
    each = min(tokens, listed + sink + near)
    return 2 * batch * heads * (tokens * each + min(first + last, tokens) * tokens) * (size + v[3])


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, key_heads, tokens, size = 2, 4, 2, 13, 8
    q = torch.randn(batch, heads, tokens, size, generator=generator)
    k, v = (torch.randn(batch, key_heads, tokens, size, generator=generator) for _ in range(2))
    lengths = torch.tensor([tokens, 7])
    tiles, columns = {}, {}
    for share, scope in (("layer", 1), ("kv", key_heads), ("query", heads)):
        starts = torch.rand(batch, scope, 4, 5, generator=generator).argsort(-1) * 3
        tiles[share] = torch.where(torch.rand(starts.shape, generator=generator) > 0.5, starts, -1)[..., :4].int()
        columns[share] = torch.randint(0, tokens, (batch, scope, 4, 1), generator=generator).int()
    yield q, k, v, tiles["layer"], None, None, "layer", 4, 3, 0, 0, 0, 0, 0.3, True
    yield q, k, v, tiles["kv"], None, lengths, "kv", 4, 3, 2, 3, 3, 0, 0.3, False
    yield q, k, v, None, columns["kv"], None, "kv", 4, 1, 0, 2, 0, 1, 0.3, True
    yield q, k, v, None, columns["query"], lengths, "query", 4, 1, 1, 2, 0, 0, 0.3, True, 1.5
    yield q.half(), k.half(), v.half(), tiles["query"], None, lengths, "query", 4, 3, 2, 3, 0, 5, 0.3, True
    yield q[:1], k[:1], v[:1], None, None, None, "layer", 64, 1, 2, 40, 0, 0, 0.3, False


BLOCK_SPARSE_ATTENTION = define_op(
    Op(
        name="block_sparse_attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor? tiles, Tensor? columns, Tensor? lengths, str share, int rows, "
        "int width, int sink, int local, int first, int last, float scale, bool causal, float? softcap=None) -> Tensor",
        reference=reference,
        on_cpu=on_cpu,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="block_sparse_attention",
    )
)
