"""attention: scaled dot-product attention with a bias per key (its log-sum-exp: attention_lse).

    L[b, h, i, j] = cap(scale * q_i . k_j) + key_bias[b, j] + mask[b, h, i, j];   A = softmax_j(L);   out = A v
    cap(x) = softcap * tanh(x / softcap), or x without a soft cap

q         [B, H, N, D]     float
k, v      [B, Hk, M, D]    float    Hk divides H; head h reads key head h // (H / Hk)
key_bias  [B, M]           float32  added to every query's logits: log of token sizes, -inf for padding; None: 0
mask      [., ., N, M]     broadcast to [B, H, N, M]: bool (true: seen) or float (added)
scale     float
causal    bool             query i sees keys j <= i, counted from the first
softcap   float            bound of the logits (Gemma 2), > 0; None: they have none
->        [B, H, N, D] as q

One call of torch's scaled_dot_product_attention (with its precision), which gets the bias as a [B, 1, 1, M] mask, never
N x N unless `mask` or `causal` is; with a soft cap, which that function does not know, the logits are.  A query that
sees no key at all gets finite numbers, otherwise unspecified, and other queries are not touched.  Raises nothing of its
own.
Source: methods 0.7 and 1.4 (i).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..op import OnnxCall, Op, define_op
from .onnx_logits import AddedToLogits, GroupedLogits, GroupedMix
from .opset import STANDARD as op
from .opset import TAMIS
from .precision import compute_dtype

MaybeTensor = Tensor | None


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: MaybeTensor,
    mask: MaybeTensor,
    scale: float,
    causal: bool,
    softcap: float | None = None,
) -> Tensor:
    """See the module."""
    if softcap is not None:
        return _with_cap(q, k, v, added_to_logits(q, k, key_bias, mask, causal), scale, softcap)
    bias = added_to_logits(q, k, key_bias, mask, causal and not (key_bias is None and mask is None))
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias,
        is_causal=causal and bias is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _with_cap(q: Tensor, k: Tensor, v: Tensor, bias: MaybeTensor, scale: float, softcap: float) -> Tensor:
    logits = capped(grouped_logits(q, k, scale), softcap)
    if bias is not None:
        logits = (logits + bias.to(logits.dtype)).clamp(min=torch.finfo(logits.dtype).min)
    return grouped_mix(logits.softmax(-1), v, q)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap); the logits themselves without a soft cap."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def softmax_of_seen(logits: Tensor) -> Tensor:
    """Softmax along the last axis over the logits that are not -inf; a row without any gives 0."""
    weights = logits.clamp(min=torch.finfo(logits.dtype).min).softmax(-1)
    return torch.where(logits > -torch.inf, weights, 0.0)


def grouped_mix(weights: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """Probabilities [B, H, N, M] times v [B, Hk, M, Dv], in `like`'s type; query heads share value heads."""
    batch, heads, rows, keys = weights.shape
    grouped = weights.reshape(batch, v.shape[1], heads // v.shape[1] * rows, keys)
    return (grouped @ v.to(weights.dtype)).reshape(batch, heads, rows, v.shape[3]).to(like.dtype)


def grouped_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q k^T in compute precision: [B, H, N, D], [B, Hk, M, D] -> [B, H, N, M]; query heads share key heads."""
    dtype = compute_dtype(q)
    batch, heads, rows, width = q.shape
    key_heads, keys = k.shape[1:3]
    queries = (q.to(dtype) * scale).reshape(batch, key_heads, heads // key_heads * rows, width)
    return (queries @ k.to(dtype).transpose(2, 3)).reshape(batch, heads, rows, keys)


def added_to_logits(q: Tensor, k: Tensor, key_bias: MaybeTensor, mask: MaybeTensor, causal: bool) -> MaybeTensor:
    """Everything added to the logits as one float mask of q's type that broadcasts, None when nothing is."""
    bias = None if key_bias is None else key_bias.to(q.dtype)[:, None, None, :]
    seen = mask if mask is not None and mask.dtype == torch.bool else None
    if mask is not None and seen is None:
        bias = mask.to(q.dtype) if bias is None else bias + mask.to(q.dtype)
    if causal:
        row, column = (torch.arange(n, device=q.device) for n in (q.shape[2], k.shape[2]))
        earlier = column <= row.unsqueeze(1)
        seen = earlier if seen is None else seen & earlier
    if seen is None:
        return bias
    return torch.where(seen, q.new_zeros(()) if bias is None else bias, -torch.inf)


def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Shape rule."""
    return torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty((*q.shape[:-1], v.shape[-1]))


@script(TAMIS, default_opset=op)
def Attention(q, k, v, key_bias, scale: float):
    keys = op.Transpose(op.Cast(k, to=1), perm=[0, 1, 3, 2])
    logits = op.MatMul(op.Cast(q, to=1) * scale, keys) + op.Unsqueeze(op.Cast(key_bias, to=1), [1, 2])
    return op.CastLike(op.MatMul(op.Softmax(logits, axis=-1), op.Cast(v, to=1)), q)


@script(TAMIS, default_opset=op)
def AttentionGrouped(q, k, v, key_bias, scale: float):
    logits = GroupedLogits(q, k, scale) + op.Unsqueeze(op.Cast(key_bias, to=1), [1, 2])
    return GroupedMix(logits, v, q)


@script(TAMIS, default_opset=op)
def AttentionMasked(q, k, v, key_bias, mask, scale: float, causal: int):
    return GroupedMix(AddedToLogits(GroupedLogits(q, k, scale), key_bias, mask, causal), v, q)


@script(TAMIS, default_opset=op)
def AttentionCapped(q, k, v, key_bias, mask, scale: float, causal: int, softcap: float):
    capped = op.Tanh(GroupedLogits(q, k, scale / softcap)) * softcap
    return GroupedMix(AddedToLogits(capped, key_bias, mask, causal), v, q)


def as_added(mask: MaybeTensor) -> Any:
    """A mask as ONNX functions take it: float, added to the logits; [0] for none."""
    if mask is None:
        return [0]
    return torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask


def onnx(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: MaybeTensor,
    mask: MaybeTensor,
    scale: float,
    causal: bool,
    softcap: float | None = None,
) -> OnnxCall:
    """Calls Attention, or -Grouped where heads share keys, -Masked with a mask or causality, -Capped with a cap."""
    bias = [0] if key_bias is None else key_bias
    if softcap is not None:
        attributes = {"scale": scale, "causal": int(causal), "softcap": softcap}
        return OnnxCall(AttentionCapped, [q, k, v, bias, as_added(mask)], attributes)
    if mask is None and not causal:
        plain = Attention if q.shape[1] == k.shape[1] else AttentionGrouped
        return OnnxCall(plain, [q, k, v, bias], {"scale": scale})
    return OnnxCall(AttentionMasked, [q, k, v, bias, as_added(mask)], {"scale": scale, "causal": int(causal)})


def flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Both products: 2 * B * H * N * M * (D + Dv); causality halves nothing, as in torch's counter."""
    batch, heads, rows, width = q
    return 2 * batch * heads * rows * k[2] * (width + v[3])


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 4, 4, 7, 7, 8), (1, 4, 2, 3, 5, 8), (3, 2, 1, 1, 1, 8), (1, 2, 1, 37, 53, 20), (0, 2, 2, 3, 5, 8)]
    for batch, heads, key_heads, rows, keys, width in sizes:
        q = torch.randn(batch, heads, rows, width, generator=generator)
        v_width = width if width == 8 else 12
        k, v = (torch.randn(batch, key_heads, keys, size, generator=generator) for size in (width, v_width))
        bias = torch.rand(batch, keys, generator=generator).log()
        bias[:, 1:2] = -torch.inf
        seen = torch.rand(batch, 1, rows, keys, generator=generator) > 0.3
        seen[..., 0] = True
        added = torch.randn(heads, rows, keys, generator=generator)
        yield q, k, v, None, None, 8**-0.5, False
        yield q, k, v, bias, None, 0.25, False
        if not batch:
            continue
        yield q, k, v, bias, seen, 0.25, False
        yield q, k, v, bias, added, 0.25, False
        yield q, k, v, None, seen, 0.25, True
        yield q, k, v, None, None, 0.25, True
        yield q, k, v, bias, None, 0.25, True
        yield q.half(), k.half(), v.half(), bias, None, 0.25, False
        yield q, k, v, None, None, 0.25, True, 1.5
        yield q, k, v, bias, seen, 0.25, False, 1.5
        yield q.half(), k.half(), v.half(), bias, added, 0.25, True, 1.5


ATTENTION = define_op(
    Op(
        name="attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? mask, float scale, bool causal, "
        "float? softcap=None) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="attention",
    )
)
