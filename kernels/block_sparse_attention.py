"""block_sparse_attention: attention of every query to the few keys that an index names.

    out[b, h, i] = sum_j P[i, j] v_j,   P = softmax over j in S(b, h, i) of cap(scale * q_i . k_j)

Queries come in rows of `rows` neighbours that share a list.  The key at place j of memory is that of token p(j), which
is j unless `positions` says otherwise.  S(b, h, i) is what query i may see (p(j) < lengths[b]; p(j) <= i where causal;
|i - p(j)| < window where there is one) of the union of

    the sinks: p(j) < sink,
    the nearest keys: |i - p(j)| < local,
    its row's tiles: places j = tiles[b, s, i // rows, t] + 0 .. width - 1,
    its row's columns: single places j = columns[b, s, i // rows, c],
    all keys, for the first `first` and the last `last` tokens of each batch row.

q        [B, H, N, D]     float
k, v     [B, Hk, N, D]    float    Hk divides H; head h reads key head h // (H / Hk); may lie in any order, the same
tiles    [B, S, R, T]     int32    R = ceil(N / rows); tiles of a row do not overlap and may start anywhere; -1: unused
columns  [B, S, R, C]     int32    outside the row's tiles, each once; -1: unused
positions  [B, Hk, N]     int32 or int64   the token whose key and value lie at each place, each of 0 .. N - 1 once;
                          None: in order, p(j) = j
lengths  [B]              int64    real tokens, which come first in each row; None: N
share    str              who shares a list: "layer" (S = 1), "kv" (S = Hk), "query" (S = H)
rows, width, sink, local, first, last     int; None for tiles or columns: there are none
scale    float
causal   bool
softcap  float            cap(x) = softcap * tanh(x / softcap); None: cap(x) = x
window   int              keys farther away are read by nobody, whatever names them; 0: there is no window
aligned  bool             every tile starts at a multiple of `width`, which some CPU kernels need to know beforehand
->       [B, H, N, D] as q, a view of [B, N, H, D]; 0 for a query with nothing to read, such as padding

A key that several parts name is read once.  Keys are gathered row by row, so memory and time go with R * (sink + local
+ rows + T * width + C), never with N * N; unused entries cost as much as used ones, but nothing where a CPU
runs the op row after row (block_sparse_rows).  Raises nothing of its own.
Source: methods (llm) 6.3, the prefill index; 0.2, rules 1 to 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from .block_sparse_flex import compiled_form
from .block_sparse_rows import attend_rows
from .check_index import asked_for, check_index
from .gathered_attention import attended, with_dense
from .onnx_block_sparse import BlockSparseAttention, of_index
from .onnx_grouped_query import grouped_query
from .sparse_pairs import Pairs

INDEX_SCHEMA = (
    "Tensor? tiles, Tensor? columns, Tensor? positions, Tensor? lengths, str share, int rows, int width, int sink, "
    "int local, int first, int last, float scale, bool causal, float? softcap=None, "
    "int window=0, bool aligned=False"
)


def reference(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """See the module."""
    index, scale, softcap = Pairs.of(*rest)
    return attended(q, k, v, index, scale, softcap)[0]


def on_cpu(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """The same where a program on a CPU calls the op."""
    index, scale, softcap = Pairs.of(*rest)
    if asked_for():
        check_index(index, q.shape[2], q.shape[1], k.shape[1])
    out, _ = attend_rows(q, k, v, index, scale, softcap)
    return with_dense(out, None, q, k, v, index, scale, softcap)[0]


def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Shape rule: in memory the heads of a token lie side by side, as what joins them wants it."""
    batch, heads, tokens = q.shape[:3]
    return q.new_empty((batch, tokens, heads, v.shape[-1])).transpose(1, 2)


def onnx(q: Tensor, k: Tensor, v: Tensor, *index: Any) -> OnnxCall:
    """Calls BlockSparseAttention, whose body masks dense attention: right everywhere, fast nowhere."""
    return of_index(BlockSparseAttention, [q, k, v], *index)


def flops(q: Any, k: Any, v: Any, *index: Any, **_: Any) -> int:
    """Both products over what the lists can hold, at most N keys a query; causality halves nothing."""
    return 2 * q[0] * q[1] * pairs_held(q, *index) * (q[3] + v[3])


def pairs_held(q: Any, tiles: Any, columns: Any, positions: Any, lengths: Any, share: str, *numbers: Any) -> int:
    """Pairs of queries and keys that the lists of a head can hold, of the shapes of queries and index."""
    tokens, (rows, width, sink, local, first, last) = q[2], numbers[:6]
    listed = (tiles[3] * width if tiles else 0) + (columns[3] if columns else 0)
    near = (local + rows - 1) if local else 0
    causal, window = numbers[7], (*numbers, None, 0)[9]
    seen = min(tokens, (window if causal else 2 * window - 1) if window else tokens)
    return tokens * min(seen, listed + sink + near) + min(first + last, tokens) * seen


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
    order = torch.rand(batch, key_heads, tokens, generator=generator).argsort(-1)
    order = torch.where(torch.arange(tokens) < lengths.reshape(-1, 1, 1), order, tokens).argsort(-1).int()
    yield q, k, v, tiles["layer"], None, None, None, "layer", 4, 3, 0, 0, 0, 0, 0.3, True
    yield q, k, v, tiles["kv"], None, None, lengths, "kv", 4, 3, 2, 3, 3, 0, 0.3, False
    yield q, k, v, None, columns["kv"], None, None, "kv", 4, 1, 0, 2, 0, 1, 0.3, True
    yield q, k, v, None, columns["query"], None, lengths, "query", 4, 1, 1, 2, 0, 0, 0.3, True, 1.5
    yield q.half(), k.half(), v.half(), tiles["query"], None, None, lengths, "query", 4, 3, 2, 3, 0, 5, 0.3, True
    yield q[:1], k[:1], v[:1], None, None, None, None, "layer", 64, 1, 2, 40, 0, 0, 0.3, False
    yield q, k, v, tiles["kv"], None, order, lengths, "kv", 4, 3, 2, 3, 1, 2, 0.3, True
    yield q, k, v, tiles["layer"], None, order, None, "layer", 4, 3, 1, 0, 0, 0, 0.3, False
    yield q, k, v, None, columns["query"], order, None, "query", 4, 1, 0, 3, 0, 1, 0.3, True, 1.5
    yield q, k, v, tiles["query"], None, None, lengths, "query", 4, 3, 2, 2, 1, 2, 0.3, True, None, 4
    yield q, k, v, tiles["kv"], None, order, lengths, "kv", 4, 3, 1, 0, 0, 1, 0.3, False, 1.5, 3


BLOCK_SPARSE_ATTENTION = define_op(
    Op(
        name="block_sparse_attention",
        schema=f"(Tensor q, Tensor k, Tensor v, {INDEX_SCHEMA}) -> Tensor",
        reference=reference,
        on_cpu=on_cpu,
        compiled_on_cpu=compiled_form,
        fake=fake,
        onnx=onnx,
        contrib=grouped_query,
        flops=flops,
        samples=samples,
        triton="block_sparse_attention",
    )
)
