"""Grouped-query attention with rotation and a cache in one node, as ONNX Runtime's model builders write decoders."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import CONTRIB, Number, Unsupported, op
from .attention import Hiding, attend, padded, rotary_embedding, with_heads, without_heads
from .normalisation import rms_normalization

STEPS = {0: None, 1: "biased", 2: "probabilities"}  # by `qk_output`


@op("GroupQueryAttention", domain=CONTRIB)
def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    seqlens_k: Tensor,
    total_sequence_length: Number,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_bias: Tensor | None = None,
    head_sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float | None = None,
    causal: int = 1,
    local_window_size: int = -1,
    softcap: float = 0.0,
    smooth_softmax: int = -1,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    qk_output: int = 0,
    qk_norm_epsilon: float = 1e-6,
    sliding_window_cache: int = 0,
    k_quant_type: str = "NONE",
    v_quant_type: str = "NONE",
    outputs: int = 1,
) -> Any:
    """Causal attention of queries [B, N, H D] to keys and values [B, N, G D], or of all three side by side.

    past_key, past_value  [B, G, P, D], P being the tokens before or more
    seqlens_k  index of each row's last real key once the new ones stand behind the past, [B]
    total_sequence_length  how many keys the longest row then has
    position_ids  [B, N], rows of the caches [positions, D / 2]; of a prompt ONNX Runtime reads the first and counts on
    local_window_size  how many keys a query sees, its own among them; -1: all
    head_sink  see `attend`; `smooth_softmax` is a sink of zeros;  qk_output  1: logits, 2: probabilities
    """
    if sliding_window_cache or k_scale is not None or v_scale is not None or {k_quant_type, v_quant_type} != {"NONE"}:
        raise Unsupported("its cache is quantised, or holds a window only")
    q, k, v = _grouped(query, key, value, num_heads, kv_num_heads)
    q, k = _normed(q, q_norm_weight, qk_norm_epsilon), _normed(k, k_norm_weight, qk_norm_epsilon)
    lengths = seqlens_k.reshape(-1) + 1
    before = None if past_key is None else torch.clamp(lengths - q.shape[2], min=0).to(torch.int64)
    if do_rotary:
        where = _positions(q.shape[2], before) if position_ids is None else position_ids
        q, k = (_rotated(one, where, cos_cache, sin_cache, rotary_interleaved) for one in (q, k))
    if past_key is not None and past_value is not None and before is not None:
        k, v = (_behind(past, new, before, total_sequence_length) for past, new in ((past_key, k), (past_value, v)))
    offset: Any = 0 if before is None else before.reshape(-1, 1, 1, 1)
    hiding = Hiding(padded(attention_bias, k.shape[2]), bool(causal), offset, lengths, max(local_window_size - 1, -1))
    sink = torch.zeros(num_heads, dtype=q.dtype) if head_sink is None and smooth_softmax > 0 else head_sink
    y, product = attend(q, k, v, hiding, scale=scale, softcap=softcap, sink=sink, wanted=STEPS[qk_output])
    product = None if product is None else product.masked_fill(product == -math.inf, 0)  # as ONNX Runtime has it
    return (without_heads(y), k, v, product)[:outputs]


def _grouped(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    if key is not None and value is not None:
        return with_heads(query, heads), with_heads(key, groups), with_heads(value, groups)
    size = query.shape[-1] // (heads + 2 * groups)
    q, k, v = query.split([heads * size, groups * size, groups * size], -1)
    return with_heads(q, heads), with_heads(k, groups), with_heads(v, groups)


def _positions(tokens: Any, before: Tensor | None) -> Tensor:
    """[B or 1, N]."""
    places = torch.arange(tokens).unsqueeze(0)
    return places if before is None else places + before.unsqueeze(1)


def _normed(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    return x if weight is None else rms_normalization(x, weight, epsilon=epsilon)


def _rotated(x: Tensor, positions: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: int) -> Tensor:
    if cos is None or sin is None:
        raise Unsupported("it rotates, and has no cosines and sines")
    return rotary_embedding(x, cos, sin, positions, interleaved=interleaved, rotary_embedding_dim=2 * cos.shape[-1])


def _behind(past: Tensor, new: Tensor, before: Tensor, total: Any) -> Tensor:
    """The new entries [B, G, N, D] at each row's own place in the past, with room for `total` in all."""
    room = torch.sym_max(past.shape[2], total)
    place = before.reshape(-1, 1, 1, 1) + torch.arange(new.shape[2]).reshape(1, 1, -1, 1)
    return F.pad(past, [0, 0, 0, room - past.shape[2]]).scatter(2, place.expand_as(new), new)
