"""block_sparse_attention_with_lse: attention over an index, and the log-sum-exp of the logits that it reads.

    out = block_sparse_attention(q, k, v, ...)
    lse[b, h, i] = log sum_{j in S(b, h, i)} exp(cap(scale * q_i . k_j))

Arguments as there.
->       [B, H, N, D] as q, a view of [B, N, H, D];  [B, H, N] float32 (float64 for float64 input)

A query that reads nothing has output 0 and log-sum-exp -inf, so that two attentions over disjoint sets of keys make one
(`merged`), and the attention each key gets is known (block_sparse_received).  Raises nothing of its own.
Source: methods (llm) 6.3 (`want_lse`); 0.2, rule 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from . import block_sparse_attention
from .block_sparse_attention import INDEX_SCHEMA
from .block_sparse_rows import attend_rows
from .check_index import asked_for, check_index
from .gathered_attention import attended, with_dense
from .onnx_block_sparse import BlockSparseAttentionWithLse, of_index
from .precision import compute_dtype
from .sparse_pairs import Pairs


def reference(q: Tensor, k: Tensor, v: Tensor, *index: Any) -> tuple[Tensor, Tensor]:
    """See the module."""
    out, lse = attended(q, k, v, *Pairs.of(*index), lse=True)
    assert lse is not None
    return out, lse


def on_cpu(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The same where a program on a CPU calls the op."""
    index, scale, softcap = Pairs.of(*rest)
    if asked_for():
        check_index(index, q.shape[2], q.shape[1], k.shape[1], part=True)
    out, sums = attend_rows(q, k, v, index, scale, softcap, lse=True)
    out, lse = with_dense(out, sums, q, k, v, index, scale, softcap)
    assert lse is not None
    return out, lse


def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Shape rule."""
    return block_sparse_attention.fake(q, k, v), q.new_empty(q.shape[:3], dtype=compute_dtype(q))


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two disjoint sets of keys as one: outputs [B, H, N, D] with log-sum-exps [B, H, N] of each set.

    The result of one set is returned as it is where the other is empty (-inf).  Arithmetic in the type of the
    log-sum-exps, output as `out`.  Source: methods (llm) part 5, the merge identity.
    """
    top = torch.maximum(lse, other_lse)
    top = torch.where(top == -torch.inf, 0.0, top)
    one, two = ((x - top).exp() for x in (lse, other_lse))
    total = one + two
    share = (two / torch.where(total == 0, 1.0, total)).unsqueeze(-1)
    return torch.lerp(out.to(lse.dtype), other.to(lse.dtype), share).to(out.dtype), top + total.log()


def onnx(q: Tensor, k: Tensor, v: Tensor, *index: Any) -> OnnxCall:
    """Calls BlockSparseAttentionWithLse, whose body masks dense attention."""
    return of_index(BlockSparseAttentionWithLse, [q, k, v], *index)


def samples() -> Iterator[tuple[Any, ...]]:
    """Every other one of block_sparse_attention's."""
    yield from islice(block_sparse_attention.samples(), 0, None, 2)


BLOCK_SPARSE_ATTENTION_WITH_LSE = define_op(
    Op(
        name="block_sparse_attention_with_lse",
        schema=f"(Tensor q, Tensor k, Tensor v, {INDEX_SCHEMA}) -> (Tensor, Tensor)",
        reference=reference,
        on_cpu=on_cpu,
        fake=fake,
        onnx=onnx,
        flops=block_sparse_attention.flops,
        samples=samples,
        triton="block_sparse_attention_with_lse",
    )
)
