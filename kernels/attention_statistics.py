"""attention_rows: the attention probabilities of a few queries, without the N x N matrix.

    P[b, h, r, :] = softmax_j(scale * queries[b, h, r] . k[b, h, j] + key_bias[b, j] + mask[b, h, r, j])

queries   [B, H, R, D]     float    any query rows, as attention used them
k         [B, Hk, M, D]    float    Hk divides H; head h reads key head h // (H / Hk)
key_bias  [B, M]           float32  added to every row's logits: log of token sizes, -inf for padding; None: 0
mask      [., ., R, M]     broadcast to [B, H, R, M]: bool (true: seen) or float (added), such as those queries' rows of
                           a relative position bias; None: 0
scale     float
->        [B, H, R, M]     float32 (float64 for float64 input)

Float32 arithmetic.  A row all of whose keys are at -inf is NaN.  Raises nothing of its own.
Source: methods 0.7 (the class-token row costs H * N * D multiply-adds).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from .attention import MaybeTensor, as_added, grouped_logits
from .onnx_logits import GroupedLogits
from .opset import STANDARD as op
from .opset import TAMIS
from .precision import compute_dtype


def reference(queries: Tensor, k: Tensor, key_bias: MaybeTensor, mask: MaybeTensor, scale: float) -> Tensor:
    """See the module."""
    logits = grouped_logits(queries, k, scale)
    if key_bias is not None:
        logits = logits + key_bias.to(logits.dtype)[:, None, None, :]
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
    return logits.softmax(dim=-1)


def fake(queries: Tensor, k: Tensor, key_bias: MaybeTensor, mask: MaybeTensor, scale: float) -> Tensor:
    """Shape rule."""
    return queries.new_empty((*queries.shape[:3], k.shape[2]), dtype=compute_dtype(queries))


@script(TAMIS, default_opset=op)
def AttentionRows(queries, k, key_bias, mask, scale: float):
    bias = op.Unsqueeze(op.Cast(key_bias, to=1), [1, 2]) + op.Cast(mask, to=1)
    return op.Softmax(GroupedLogits(queries, k, scale) + bias, axis=-1)


def onnx(queries: Tensor, k: Tensor, key_bias: MaybeTensor, mask: MaybeTensor, scale: float) -> OnnxCall:
    """Calls AttentionRows."""
    bias = [0] if key_bias is None else key_bias
    return OnnxCall(AttentionRows, [queries, k, bias, as_added(mask)], {"scale": scale})


def flops(queries: Any, k: Any, *_: Any, **__: Any) -> int:
    """The product of queries and keys: 2 * B * H * R * M * D."""
    batch, heads, rows, width = queries
    return 2 * batch * heads * rows * k[2] * width


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    for batch, heads, key_heads, rows, keys in [(2, 4, 4, 1, 7), (1, 4, 2, 3, 5), (3, 2, 1, 2, 1), (0, 2, 2, 1, 5)]:
        q = torch.randn(batch, heads, rows, 8, generator=generator)
        k = torch.randn(batch, key_heads, keys, 8, generator=generator)
        bias = torch.rand(batch, keys, generator=generator).log()
        bias[:, 1:2] = -torch.inf
        added = torch.randn(1, heads, rows, keys, generator=generator)
        seen = torch.rand(batch, 1, rows, keys, generator=generator) > 0.3
        seen[..., 0] = True
        yield q, k, None, None, 8**-0.5
        yield q, k, bias, None, 0.25
        yield q, k, bias, added, 0.25
        yield q, k, None, seen, 0.25
        yield q.half(), k.half(), bias, None, 0.25


ATTENTION_ROWS = define_op(
    Op(
        name="attention_rows",
        schema="(Tensor queries, Tensor k, Tensor? key_bias, Tensor? mask, float scale) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="attention_rows",
    )
)
