"""block_sparse_received: how much attention every key gets under an index, from the queries' log-sum-exps.

    r[b, h, j] = sum over i that read j of weight[b, i] * exp(cap(scale * q_i . k_j) - lse[b, h, i])

q, k, and the index as in block_sparse_attention; lse as block_sparse_attention_with_lse gives it for the same index.
lse       [B, H, N]   float    a query that reads nothing (-inf) gives nothing
weight    [B, N]      bool or float    of each query; None: 1
->        [B, H, N]   float32 (float64 for float64 input), by the keys' places in memory

Sums, not means: over all keys they add up to the sum of the weights of the queries that read anything.  Float32
arithmetic, a fixed order of the sums.  Raises nothing of its own.
Source: methods (llm) 9.3, the second pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from . import block_sparse_attention
from .block_sparse_attention import INDEX_SCHEMA, pairs_held
from .block_sparse_received_rows import received_rows
from .gathered_attention import attended, received, received_by
from .onnx_block_sparse import BlockSparseReceived, of_index
from .precision import compute_dtype
from .sparse_pairs import MaybeTensor, Pairs


def reference(q: Tensor, k: Tensor, lse: Tensor, weight: MaybeTensor, *index: Any) -> Tensor:
    """See the module."""
    return received(q, k, lse, weight, *Pairs.of(*index))


def on_cpu(q: Tensor, k: Tensor, lse: Tensor, weight: MaybeTensor, *index: Any) -> Tensor:
    """The same where a program on a CPU calls the op."""
    return received_by(received_rows, q, k, lse, weight, *Pairs.of(*index))


def fake(q: Tensor, *_: Any) -> Tensor:
    """Shape rule."""
    return q.new_empty(q.shape[:3], dtype=compute_dtype(q))


def onnx(q: Tensor, k: Tensor, lse: Tensor, weight: MaybeTensor, *index: Any) -> OnnxCall:
    """Calls BlockSparseReceived, whose body computes all logits."""
    return of_index(BlockSparseReceived, [q, k, lse, q.new_ones((1, 1)) if weight is None else weight], *index)


def flops(q: Any, k: Any, lse: Any, weight: Any, *index: Any, **_: Any) -> int:
    """The product of queries and keys over what the lists can hold, and the sums."""
    return 2 * q[0] * q[1] * pairs_held(q, *index) * (q[3] + 1)


def samples() -> Iterator[tuple[Any, ...]]:
    """Every other one of block_sparse_attention's, a third with weights and a third with some queries left out."""
    generator = torch.Generator().manual_seed(0)
    for number, (q, k, v, *index) in enumerate(islice(block_sparse_attention.samples(), 1, None, 2)):
        _, lse = attended(q, k, v, *Pairs.of(*index), lse=True)
        weight = torch.rand(q.shape[0], q.shape[2], generator=generator)
        yield q, k, lse, [None, weight, weight > 0.4][number % 3], *index


BLOCK_SPARSE_RECEIVED = define_op(
    Op(
        name="block_sparse_received",
        schema=f"(Tensor q, Tensor k, Tensor lse, Tensor? weight, {INDEX_SCHEMA}) -> Tensor",
        reference=reference,
        on_cpu=on_cpu,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="block_sparse_received",
    )
)
