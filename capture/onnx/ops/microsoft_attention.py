"""Attention as ONNX Runtime's transformer optimizer and its model builders write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..table import CONTRIB, Unsupported, op
from .attention import Hiding, attend, with_heads, without_heads

FILTER = -1e4  # what is added to the logits of hidden keys, unless a node says otherwise


@op("Attention", domain=CONTRIB)
def attention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask_index: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    *,
    num_heads: int,
    qkv_hidden_sizes: list[int] | None = None,
    scale: float | None = None,
    mask_filter_value: float = FILTER,
    unidirectional: int = 0,
    do_rotary: int = 0,
    rotary_embedding_dim: int = 0,
    past_present_share_buffer: int = 0,
    outputs: int = 1,
) -> Any:
    """Self-attention of x [B, N, C] with the projections of queries, keys and values in one matrix [C, 3 H D].

    mask_index  which keys are real, see `padding`
    past     keys and values of earlier tokens, [2, B, H, P, D]; the second result is these with the new ones
    """
    if do_rotary:
        raise Unsupported("it rotates queries and keys itself (do_rotary)")
    if past_present_share_buffer or past_sequence_length is not None:
        raise Unsupported("past and present share a buffer")
    joined = torch.matmul(x, weights)
    joined = joined if bias is None else joined + bias
    q, k, v, offset = split_projection(joined, num_heads, past, qkv_hidden_sizes)
    mask = summed(padding(mask_index, q, k, mask_filter_value), attention_bias)
    y, _ = attend(q, k, v, Hiding(mask, bool(unidirectional), offset), scale=scale)
    return without_heads(y) if outputs == 1 else (without_heads(y), torch.stack([k, v]))


def split_projection(
    joined: Tensor, heads: int, past: Tensor | None, widths: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Queries, keys and values [B, H, N, D] out of [B, N, 3 H D], behind the past; how many tokens that has."""
    widths = widths or [joined.shape[-1] // 3] * 3
    q, k, v = (with_heads(part, heads) for part in joined.split(widths, -1))
    if past is None:
        return q, k, v, 0
    return q, torch.cat([past[0], k], 2), torch.cat([past[1], v], 2), past.shape[3]


def padding(mask: Tensor | None, q: Tensor, k: Tensor, fill: float) -> Tensor | None:
    """What is added to the logits [B, H, N, M] of `q k^T`: zero, or `fill` where a key is hidden.

    mask  integers; for B rows
          [B]        keys that are real, the first ones of the row
          [2 B]      ends (exclusive) of the real keys, then starts (inclusive)
          [B, M]     1 at real keys
          [B, N, M]  1 at keys that a query sees
          [B, 1, L, L]  1 at keys that a query sees, of which the last N rows before M and the first M columns count
    """
    if mask is None:
        return None
    if mask.ndim == 1:
        seen = _between(mask, q.shape[0], k.shape[2])
    elif mask.ndim == 4:
        seen = mask[:, :, k.shape[2] - q.shape[2] : k.shape[2], : k.shape[2]] > 0
    else:
        seen = (mask > 0).reshape(mask.shape[0], 1, -1, mask.shape[-1])
    return torch.where(seen, 0.0, max(fill, torch.finfo(q.dtype).min)).to(q.dtype)


def _between(ends: Tensor, rows: Any, keys: Any) -> Tensor:
    """[B, 1, 1, M], true from each row's start up to its end."""
    place = torch.arange(keys)
    if ends.shape[0] == rows:
        return place < ends.reshape(-1, 1, 1, 1)
    if ends.shape[0] == 2 * rows:
        end, start = ends[:rows].reshape(-1, 1, 1, 1), ends[rows:].reshape(-1, 1, 1, 1)
        return (place < end) & (place >= start)
    raise Unsupported(f"its mask has {ends.shape[0]} entries, where it is known with one or two per row of the batch")


def summed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    return b if a is None else a if b is None else a + b


@op("MultiHeadAttention", domain=CONTRIB)
def multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    cache_indirection: Tensor | None = None,
    *,
    num_heads: int,
    scale: float | None = None,
    mask_filter_value: float = FILTER,
    unidirectional: int = 0,
    outputs: int = 1,
) -> Any:
    """Attention of queries [B, N, H D] to keys and values [B, M, H D]; present keys and values, and the logits, too.

    Queries may hold all three, [B, N, H, 3, D], and keys both, [B, M, H, 2, D]; keys and values may have their heads
    apart, [B, H, M, D], and then get no bias.
    """
    if past_sequence_length is not None or cache_indirection is not None:
        raise Unsupported("past and present share a buffer")
    q, k, v = _with_bias(_apart(query, key, value, num_heads), key is not None and key.ndim == 4, bias, num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    offset: Any = 0 if past_key is None else past_key.shape[2]
    mask = summed(padding(key_padding_mask, q, k, mask_filter_value), attention_bias)
    wanted = "biased" if outputs == 4 else None
    y, product = attend(q, k, v, Hiding(mask, bool(unidirectional), offset), scale=scale, wanted=wanted)
    return (without_heads(y), k, v, product)[:outputs]


def _apart(query: Tensor, key: Tensor | None, value: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, N, D]."""
    if query.ndim == 5:
        q, k, v = (part.transpose(1, 2) for part in query.unbind(3))
        return q, k, v
    if key is None:
        raise Unsupported(f"its queries, keys and values are in one tensor with {query.ndim} axes, not 5")
    if key.ndim == 5:
        k, v = (part.transpose(1, 2) for part in key.unbind(3))
        return with_heads(query, heads), k, v
    assert value is not None
    k, v = (one if one.ndim == 4 else with_heads(one, heads) for one in (key, value))
    return with_heads(query, heads), k, v


def _with_bias(
    qkv: tuple[Tensor, Tensor, Tensor], queries_only: bool, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    if bias is None:
        return qkv
    q, k, v = qkv
    parts = bias.split([heads * one.shape[-1] for one in qkv])
    a, b, c = (part.reshape(heads, 1, -1) for part in parts)
    return (q + a, k, v) if queries_only else (q + a, k + b, v + c)
