"""attention_received: how much attention every key receives, from the log-sum-exp of the queries' logits.

    r[b, h, j] = sum_i w[b, i] * A[b, h, i, j] / sum_i w[b, i]
    A[b, h, i, j] = exp(scale * q_i . k_j + key_bias[b, j] + mask[b, h, i, j] - lse[b, h, i])

q, k, key_bias, mask, scale, causal   as in `attention_lse`
lse       [B, H, N]        float32  what `attention_lse` gives of them; a query that sees no key (-inf) attends to none
weight    [B, N]           bool or float    of each query: true or 1 for tokens, false or 0 for padding; None: 1
->        [B, H, M]        float32 (float64 for float64 input): column means of the attention matrix

Float32 arithmetic.  All zeros in a row whose weights add up to 0 (and where N is 0).  Raises nothing of its own.
Source: methods 0.7 and 0.4, rule 6 (a fixed order of the sum).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from . import attention_lse
from .attention import MaybeTensor, added_to_logits, as_added, grouped_logits
from .onnx_logits import AddedToLogits, GroupedLogits
from .opset import STANDARD as op
from .opset import TAMIS
from .precision import compute_dtype


def reference(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    key_bias: MaybeTensor,
    mask: MaybeTensor,
    weight: MaybeTensor,
    scale: float,
    causal: bool,
) -> Tensor:
    """See the module."""
    logits = grouped_logits(q, k, scale)
    bias = added_to_logits(logits, k, key_bias, mask, causal)
    logits = logits if bias is None else logits + bias
    finite = torch.where(lse == -torch.inf, torch.inf, lse).to(logits.dtype)
    shares = (logits - finite.unsqueeze(-1)).exp()
    return torch.einsum("bhnm,bn->bhm", shares, shares_of_queries(weight, q).to(logits.dtype))


def shares_of_queries(weight: MaybeTensor, q: Tensor) -> Tensor:
    """[B, N] weights that add up to 1, or are all 0; in compute precision."""
    dtype = compute_dtype(q)
    if weight is None:
        weight = torch.ones((), dtype=dtype, device=q.device).expand(q.shape[0], q.shape[2])
    total = weight.to(dtype).sum(1, keepdim=True)
    return weight.to(dtype) / torch.where(total == 0, 1.0, total)


def fake(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    """Shape rule."""
    return q.new_empty((*q.shape[:2], k.shape[2]), dtype=compute_dtype(q))


@script(TAMIS, default_opset=op)
def AttentionReceived(q, k, lse, key_bias, mask, weight, scale: float, causal: int):
    logits = AddedToLogits(GroupedLogits(q, k, scale), key_bias, mask, causal)
    lowest = op.Constant(value_float=float("-inf"))
    highest = op.Constant(value_float=float("inf"))
    finite = op.Where(lse == lowest, highest, lse)
    queries = op.Concat(op.Shape(q, start=0, end=1), op.Shape(q, start=2, end=3), axis=0)
    weights = op.Expand(op.Cast(weight, to=1), queries)
    total = op.ReduceSum(weights, [1], keepdims=1)
    shares = op.Unsqueeze(weights / op.Where(total == 0.0, 1.0, total), [1, 2])
    return op.Squeeze(op.MatMul(shares, op.Exp(logits - op.Unsqueeze(finite, [-1]))), [2])


def onnx(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    key_bias: MaybeTensor,
    mask: MaybeTensor,
    weight: MaybeTensor,
    scale: float,
    causal: bool,
) -> OnnxCall:
    """Calls AttentionReceived."""
    given: list[Any] = [q, k, lse, [0] if key_bias is None else key_bias, as_added(mask)]
    return OnnxCall(
        AttentionReceived, [*given, [1] if weight is None else weight], {"scale": scale, "causal": int(causal)}
    )


def flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    """The product of queries and keys, and the sum over queries: 2 * B * H * N * M * (D + 1)."""
    batch, heads, rows, width = q
    return 2 * batch * heads * rows * k[2] * (width + 1)


def samples() -> Iterator[tuple[Any, ...]]:
    """Every other one of attention_lse's, with weights for the queries or without."""
    generator = torch.Generator().manual_seed(0)
    for number, (q, k, key_bias, mask, scale, causal) in enumerate(islice(attention_lse.samples(), 0, None, 2)):
        lse = attention_lse.reference(q, k, key_bias, mask, scale, causal)
        weight = torch.rand(q.shape[0], q.shape[2], generator=generator)
        if number % 3 == 1:
            weight[:1] = 0
        yield q, k, lse, key_bias, mask, [None, weight, weight > 0.4][number % 3], scale, causal


ATTENTION_RECEIVED = define_op(
    Op(
        name="attention_received",
        schema="(Tensor q, Tensor k, Tensor lse, Tensor? key_bias, Tensor? mask, Tensor? weight, float scale, "
        "bool causal) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="attention_received",
    )
)
