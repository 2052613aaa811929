"""probe_chunks: how much the queries of a row like each chunk of keys, found by halving the chunk.

    while a chunk has more than one key: of the middle keys of its two halves, go on with the half of the one whose best
    product with a query asked is larger; score = the largest product met

q        [B, H, N, D]        float
k        [B, Hk, N, D]       float    Hk divides H; head h multiplies with key head h // (H / Hk)
starts   [B', S', R', M]     int64    first key of each chunk of each row; B', S', R' may be 1.  Below 0, or not
                                      before the row's end: there is no chunk
lengths  [B]                 int64    real tokens, which come first in each row; None: N
chunk    int                          keys of a chunk; one that reaches beyond the row's end is shorter
stride   int                          of the `block` queries of a row, every so many is asked
local    int                          a row's end: that of its real queries, less `local`
share    str                          whose queries count: "query" one head's, "kv" those of a key head, "layer" all
window   int                          keys so many tokens before a query, and more, are hidden from it; 0: none are
->       [B, S, R, M]        float32 (float64 for float64 input)  S = H, Hk or 1, R = ceil(N / block); the lowest number
                                      of float32 where all met are hidden, or there is no chunk

A query multiplies with keys up to itself that no window hides.  Ties: the left half.  Takes memory for two keys of each
chunk; its kernel takes none.  Raises nothing of its own.
Source: methods (llm) 1.9 b (Lee et al., "InfiniteHiP", arXiv 2502.08910); 0.2, rules 4, 5 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor
from torch.nn.functional import pad

from ..attention_index import SHARES
from ..op import OnnxCall, Op, define_op
from .opset import STANDARD as op
from .opset import TAMIS
from .precision import compute_dtype
from .rows import take_rows

LOWEST = torch.finfo(torch.float32).min


def row_ends(tokens: Any, lengths: Tensor | None, block: int, local: int, like: Tensor) -> Tensor:
    """[B or 1, 1, R, 1] where the keys of each row of queries end; 0 and less for rows of padding."""
    first = torch.arange((tokens + block - 1) // block, device=like.device)[None, None, :, None] * block
    real = first * 0 + tokens if lengths is None else lengths.reshape(-1, 1, 1, 1)
    return torch.where(first < real, torch.minimum(first + block, real) - local, 0)


def reference(
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    lengths: Tensor | None,
    chunk: int,
    stride: int,
    block: int,
    local: int,
    share: str,
    window: int = 0,
) -> Tensor:
    """See the module."""
    (batch, heads, tokens, size), sets = q.shape, q.shape[1] if share == "query" else k.shape[1]
    rows = (tokens + block - 1) // block
    asked = pad(q.to(compute_dtype(q)), (0, 0, 0, rows * block - tokens)).reshape(batch, heads, rows, block, size)
    asked = asked[:, :, :, ::stride].reshape(batch, sets, heads // sets, rows, -1, size).transpose(2, 3)
    asked = asked.reshape(batch, sets, rows, -1, size)
    keys = k.to(compute_dtype(k)).repeat_interleave(sets // k.shape[1], 1).reshape(batch * sets, tokens, size)
    place = torch.arange(rows, device=q.device).unsqueeze(1) * block
    place = place + torch.arange(0, block, stride, device=q.device).repeat(heads // sets)  # [R, asked]
    there = place < (tokens if lengths is None else lengths.reshape(-1, 1, 1, 1))

    def best(probes: Tensor) -> Tensor:
        """The largest product of the keys at probes [B, S or 1, R, M]."""
        apart = probes.expand(batch, sets, rows, -1)
        flat = apart.clamp(max=tokens - 1).reshape(batch * sets, -1)
        found = take_rows(keys, flat).reshape(batch, sets, rows, -1, size)
        products = asked @ found.transpose(3, 4)
        seen = there.unsqueeze(-1) & (probes.unsqueeze(3) <= place.unsqueeze(-1))
        if window:
            seen = seen & (place.unsqueeze(-1) - probes.unsqueeze(3) < window)
        score = torch.where(seen, products, LOWEST).amax(3)
        return score.amax(1, keepdim=True) if share == "layer" else score

    ends = row_ends(tokens, lengths, block, local, starts)
    starts = _of_rows(starts, rows)
    left, right = starts.clamp(min=0), torch.minimum(starts + chunk, ends).clamp(min=0)
    score: Tensor | None = None
    for _ in range(halvings(chunk)):
        middle = (left + right) // 2
        a, b = (best((end + middle) // 2) for end in (left, right))
        met = torch.maximum(a, b)
        score = met if score is None else torch.maximum(score, met)
        left, right = torch.where(a >= b, left, middle), torch.where(a >= b, middle, right)
    assert score is not None
    return torch.where((starts >= 0) & (starts < ends), score, LOWEST)


def _of_rows(starts: Tensor, rows: Any) -> Tensor:
    """The same; only the number of its rows may be another symbol in a trace."""
    if isinstance(starts.shape[2], int) and starts.shape[2] == 1:
        return starts
    return starts.index_select(2, torch.arange(rows, device=starts.device))


def halvings(chunk: int) -> int:
    """Steps until one key is left; one for a chunk of one key, which is then multiplied."""
    return max(1, (chunk - 1).bit_length())


def fake(q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor | None, *rest: Any) -> Tensor:
    """Shape rule."""
    block, share = rest[2], rest[4]
    scope = {"layer": 1, "kv": k.shape[1], "query": q.shape[1]}[share]
    rows = (q.shape[2] + block - 1) // block
    return q.new_empty((q.shape[0], scope, rows, starts.shape[3]), dtype=compute_dtype(q))


@script(TAMIS, default_opset=op)
def ProbeChunks(
    q, k, starts, lengths, chunk: int, stride: int, block: int, local: int, share: int, window: int, halvings: int
):
    one, last, none = op.Constant(value_ints=[1]), op.Constant(value_ints=[-1]), op.Constant(value_ints=[0])
    batch, heads = op.Shape(q, start=0, end=1), op.Shape(q, start=1, end=2)
    tokens, size = op.Shape(q, start=2, end=3), op.Shape(q, start=3, end=4)
    key_heads, line = op.Shape(k, start=1, end=2), op.Expand(block, one)
    sets = op.Where(op.Expand(share, one) == 2, heads, key_heads)
    rows = (tokens + line - 1) / line
    rest = op.Concat(batch, heads, rows * line - tokens, size, axis=0)
    filled = op.Concat(op.Cast(q, to=1), op.Expand(op.Constant(value_float=0.0), rest), axis=2)
    asked = op.Reshape(filled, op.Concat(batch, heads, rows, line, size, axis=0), allowzero=1)
    asked = op.Slice(asked, none, line, [3], op.Expand(stride, one))
    many = op.Shape(asked, start=3, end=4)
    asked = op.Reshape(asked, op.Concat(batch, sets, heads / sets, rows, many, size, axis=0), allowzero=1)
    asked = op.Transpose(asked, perm=[0, 1, 3, 2, 4, 5])
    asked = op.Reshape(asked, op.Concat(batch, sets, rows, heads / sets * many, size, axis=0), allowzero=1)
    each = op.Concat(batch, key_heads, sets / key_heads, tokens, size, axis=0)
    keys = op.Expand(op.Unsqueeze(op.Cast(k, to=1), [2]), each)
    keys = op.Reshape(keys, op.Concat(batch * sets, tokens, size, axis=0), allowzero=1)
    first = op.Range(0, op.Squeeze(rows), 1) * block
    steps = op.Range(0, op.Squeeze(many), 1) * stride
    together = op.Reshape(op.Expand(steps, op.Concat(heads / sets, many, axis=0)), last)
    place = op.Unsqueeze(first, [1]) + together
    real = op.Reshape(op.Where(lengths < 0, tokens, lengths), [-1, 1, 1, 1])
    there = op.And(place < real, op.Expand(op.Constant(value_int=1), op.Concat(batch, one, one, one, axis=0)) > 0)
    begin = op.Reshape(first, [1, 1, -1, 1])
    ends = op.Where(begin < real, op.Min(begin + block, real) - local, op.Constant(value_int=0))
    scope = op.Where(op.Expand(share, one) == 0, one, sets)
    many = op.Shape(starts, start=3, end=4)
    grid = op.Concat(batch, scope, rows, many, axis=0)
    there_is = op.And(starts >= 0, starts < ends)
    left = op.Expand(op.Max(starts, 0), grid)
    right = op.Max(op.Min(starts + chunk, ends), op.Expand(op.Constant(value_int=0), grid))
    lowest = op.Constant(value_float=-3.4028234663852886e38)
    score = op.Expand(lowest, grid)
    base = op.Unsqueeze(op.Range(0, op.Squeeze(batch * sets), 1), [1]) * tokens
    reach = op.Where(op.Expand(window, one) > 0, op.Expand(window, one), tokens)
    keys = op.Reshape(keys, op.Concat(last, size, axis=0))
    spread = op.Concat(batch, sets, rows, many + many, axis=0)
    sharing = op.Concat(batch, scope, sets / scope, rows, many + many, axis=0)
    for _i in range(halvings):
        middle = (left + right) / 2
        probes = op.Concat((left + middle) / 2, (middle + right) / 2, axis=3)
        flat = op.Reshape(op.Expand(op.Min(probes, tokens - 1), spread), op.Concat(batch * sets, last, axis=0))
        found = op.Reshape(op.Gather(keys, flat + base, axis=0), op.Concat(spread, size, axis=0))
        products = op.MatMul(asked, op.Transpose(found, perm=[0, 1, 2, 4, 3]))
        apart = op.Unsqueeze(place, [-1]) - op.Unsqueeze(probes, [3])
        seen = op.And(op.Unsqueeze(there, [-1]), op.And(apart >= 0, apart < reach))
        of_each = op.ReduceMax(op.Where(seen, products, lowest), [3], keepdims=0)
        best = op.ReduceMax(op.Reshape(of_each, sharing, allowzero=1), [2], keepdims=0)
        a = op.Slice(best, none, many, [3])
        b = op.Slice(best, many, many + many, [3])
        score = op.Max(score, op.Max(a, b))
        nearer = a >= b
        left = op.Where(nearer, left, middle)
        right = op.Where(nearer, middle, right)
    return op.Where(there_is, score, lowest)


def onnx(
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    lengths: Tensor | None,
    chunk: int,
    stride: int,
    block: int,
    local: int,
    share: str,
    window: int = 0,
) -> OnnxCall:
    """Calls ProbeChunks."""
    attributes = {"chunk": chunk, "stride": stride, "block": block, "local": local, "window": window}
    attributes |= {"share": SHARES.index(share), "halvings": halvings(chunk)}
    return OnnxCall(ProbeChunks, [q, k, starts, [-1] if lengths is None else lengths], attributes)


def flops(q: Any, k: Any, starts: Any, lengths: Any, chunk: int, stride: int, block: int, *_: Any, **__: Any) -> int:
    """Two products for each halving, chunk, query asked and head."""
    batch, heads, tokens, size = q
    asked = -(-tokens // block) * -(-block // stride)
    return 2 * 2 * halvings(chunk) * batch * heads * asked * starts[3] * size


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 21, 8, generator=generator)
    k = torch.randn(2, 2, 21, 8, generator=generator)
    lengths = torch.tensor([21, 11])
    rows, grid = torch.arange(6).reshape(1, 1, 6, 1), torch.arange(5) * 3
    starts = (grid + 0 * rows).expand(2, -1, -1, -1).contiguous()
    yield q, k, starts, None, 3, 1, 4, 2, "query"
    yield q, k, starts[:, :, :1], lengths, 3, 2, 4, 1, "kv"
    yield q, k, starts, lengths, 8, 3, 4, 3, "layer"
    yield q.half(), k.half(), starts - 3, None, 1, 1, 4, 2, "kv"
    yield q, k, starts, lengths, 8, 2, 4, 3, "query", 6


PROBE_CHUNKS = define_op(
    Op(
        name="probe_chunks",
        schema="(Tensor q, Tensor k, Tensor starts, Tensor? lengths, int chunk, int stride, int block, int local, "
        "str share, int window=0) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="probe_chunks",
    )
)
