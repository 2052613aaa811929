"""Attention, rotary embedding, and the fused layers of ONNX Runtime's transformer optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import CONTRIB, Unsupported, op
from ..tensors import DTYPES

NO_BIAS, CAPPED, BIASED, PROBABILITIES = range(4)  # what `qk_matmul_output` holds


@op("Attention", since=23)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: int = 0,
    q_num_heads: int | None = None,
    kv_num_heads: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    qk_matmul_output_mode: int = 0,
    left_window_size: int = -1,
    right_window_size: int = -1,
    outputs: int = 1,
) -> Any:
    """softmax(q k^T scale + mask) v of [B, H, N, D], or of [B, N, H D] with the numbers of heads given.

    Past keys and values come first; `lengths` says how many keys of each row are real.  Causality and windows count
    from the end of the past.  A query that sees no key gets zeros.
    """
    joined = q.ndim == 3
    if joined:
        assert q_num_heads is not None
        assert kv_num_heads is not None
        q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present = k, v
    offset: Any = 0 if past_key is None else past_key.shape[2]
    if lengths is not None:
        offset = (lengths - q.shape[2]).reshape(-1, 1, 1, 1)
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    mask = _padded(mask, k.shape[2])
    plain = past_key is None and lengths is None and left_window_size < 0 and right_window_size < 0
    by_flag = bool(is_causal) and plain and mask is None
    if not by_flag:
        mask = _seen(q, k, mask, offset, lengths, bool(is_causal), left_window_size, right_window_size)
    scale = scale if scale else 1 / math.sqrt(q.shape[-1])
    if outputs < 4 and not softcap:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=by_flag, scale=scale)
        return _results(y, joined, *present, None, outputs)
    if by_flag:
        mask = _seen(q, k, None, 0, None, True, -1, -1)
    precision = None if softmax_precision is None else DTYPES[softmax_precision]
    y, product = _written_out(q, k, v, mask, scale, softcap, precision, qk_matmul_output_mode)
    return _results(y, joined, *present, product, outputs)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] to [B, H, N, D]."""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """[B, G, N, D] to [B, H, N, D]: each key-value head for the query heads of its group."""
    batch, groups, tokens, size = x.shape
    if groups == heads:
        return x
    return x.unsqueeze(2).expand(batch, groups, heads // groups, tokens, size).reshape(batch, heads, tokens, size)


def _padded(mask: Tensor | None, keys: Any) -> Tensor | None:
    """A mask may be shorter than the keys; those it does not speak of are hidden."""
    if mask is None or mask.shape[-1] == keys:
        return mask
    return F.pad(mask, [0, keys - mask.shape[-1]], value=False if mask.dtype == torch.bool else -math.inf)


def _seen(
    q: Tensor, k: Tensor, mask: Tensor | None, offset: Any, lengths: Tensor | None, causal: bool, left: int, right: int
) -> Tensor | None:
    """One mask for all that hides keys: boolean, or additive if the given one is."""
    query = torch.arange(q.shape[2]).unsqueeze(1) + offset
    key = torch.arange(k.shape[2])
    conditions = [key <= query] if causal else []
    conditions += [query - key <= left] if left >= 0 else []
    conditions += [key - query <= right] if right >= 0 else []
    conditions += [key < lengths.reshape(-1, 1, 1, 1)] if lengths is not None else []
    if not conditions:
        return mask
    seen = conditions[0]
    for condition in conditions[1:]:
        seen = seen & condition
    if mask is None:
        return seen
    return seen & mask if mask.dtype == torch.bool else torch.where(seen, mask, -math.inf)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, precision: Any, mode: int
) -> tuple[Tensor, Tensor]:
    """The same step by step, and the step that `mode` asks for."""
    product = torch.matmul(q * math.sqrt(scale), (k * math.sqrt(scale)).transpose(-2, -1))
    steps = {NO_BIAS: product}
    if softcap:
        product = torch.tanh(product / softcap) * softcap
    steps[CAPPED] = product
    if mask is not None:
        bias = torch.where(mask, 0.0, -math.inf).to(q.dtype) if mask.dtype == torch.bool else mask
        product = product + bias
    steps[BIASED] = product
    probabilities = torch.softmax(product, -1, dtype=precision)
    if mask is not None:
        hidden = (
            (~mask).all(-1, keepdim=True) if mask.dtype == torch.bool else (mask == -math.inf).all(-1, keepdim=True)
        )
        probabilities = torch.where(hidden, 0.0, probabilities)
    probabilities = probabilities.to(q.dtype)
    steps[PROBABILITIES] = probabilities
    return torch.matmul(probabilities, v), steps[mode]


def _results(y: Tensor, joined: bool, key: Tensor, value: Tensor, product: Tensor | None, outputs: int) -> Any:
    if joined:
        y = y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)
    return y if outputs == 1 else (y, key, value, product)[:outputs]


@op("RotaryEmbedding", since=23)
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Pairs of features of [B, H, N, D], or of [B, N, H D], turned by angles per position."""
    joined = x.ndim == 3
    if joined:
        batch, tokens, width = x.shape
        x = x.reshape(batch, tokens, num_heads, width // num_heads).transpose(1, 2)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    size = rotary_embedding_dim or x.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned[..., : size // 2], turned[..., size // 2 :]
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    y = turned if size == x.shape[-1] else torch.cat([turned, rest], -1)
    return y.transpose(1, 2).reshape(batch, tokens, width) if joined else y


@op("FastGelu", domain=CONTRIB)
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The tanh approximation of GELU."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@op("BiasGelu", domain=CONTRIB)
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of a sum."""
    return F.gelu(x + bias)


@op("Gelu", domain=CONTRIB)
def gelu(x: Tensor) -> Tensor:
    """GELU."""
    return F.gelu(x)


@op("QuickGelu", domain=CONTRIB)
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """x sigmoid(alpha x)."""
    return x * torch.sigmoid(x * alpha)


@op("FusedMatMul", domain=CONTRIB)
def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """alpha a b, with the last two axes of either exchanged."""
    if transBatchA or transBatchB:
        raise Unsupported("it exchanges batch axes")
    a, b = a.transpose(-2, -1) if transA else a, b.transpose(-2, -1) if transB else b
    product = torch.matmul(a, b)
    return product if alpha == 1.0 else product * alpha
