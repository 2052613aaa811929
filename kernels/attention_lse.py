"""attention_lse: the log-sum-exp of attention's logits, from which every statistic of the attention follows.

    lse[b, h, i] = log sum_j exp(scale * q_i . k_j + key_bias[b, j] + mask[b, h, i, j])

q         [B, H, N, D]     float
k         [B, Hk, M, D]    float    Hk divides H
key_bias, mask, scale, causal       as in `attention`
->        [B, H, N]        float32 (float64 for float64 input)

An op of its own, so that attention costs nothing more where nobody asks; a kernel that computes both is a fusion.
Raises nothing of its own.  Source: methods 0.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnxscript import script
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from . import attention
from .attention import MaybeTensor, added_to_logits, as_added, grouped_logits
from .onnx_logits import AddedToLogits, GroupedLogits
from .opset import STANDARD as op
from .opset import TAMIS
from .precision import compute_dtype


def reference(q: Tensor, k: Tensor, key_bias: MaybeTensor, mask: MaybeTensor, scale: float, causal: bool) -> Tensor:
    """See the module."""
    logits = grouped_logits(q, k, scale)
    bias = added_to_logits(logits, k, key_bias, mask, causal)
    return (logits if bias is None else logits + bias).logsumexp(dim=-1)


def fake(q: Tensor, k: Tensor, key_bias: MaybeTensor, mask: MaybeTensor, scale: float, causal: bool) -> Tensor:
    """Shape rule."""
    return q.new_empty(q.shape[:-1], dtype=compute_dtype(q))


@script(TAMIS, default_opset=op)
def AttentionLse(q, k, key_bias, mask, scale: float, causal: int):
    logits = AddedToLogits(GroupedLogits(q, k, scale), key_bias, mask, causal)
    return op.ReduceLogSumExp(logits, [-1], keepdims=0)


def onnx(q: Tensor, k: Tensor, key_bias: MaybeTensor, mask: MaybeTensor, scale: float, causal: bool) -> OnnxCall:
    """Calls AttentionLse."""
    bias = [0] if key_bias is None else key_bias
    return OnnxCall(AttentionLse, [q, k, bias, as_added(mask)], {"scale": scale, "causal": int(causal)})


def flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    """One product: 2 * B * H * N * M * D."""
    batch, heads, rows, width = q
    return 2 * batch * heads * rows * k[2] * width


def samples() -> Iterator[tuple[Any, ...]]:
    """Those of attention without a soft cap, without values; no empty batch, of which ONNX Runtime reduces no axis."""
    for q, k, _, key_bias, mask, scale, causal, *softcap in attention.samples():
        if not softcap and q.shape[0]:
            yield q, k, key_bias, mask, scale, causal


ATTENTION_LSE = define_op(
    Op(
        name="attention_lse",
        schema="(Tensor q, Tensor k, Tensor? key_bias, Tensor? mask, float scale, bool causal) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="attention_lse",
    )
)
