"""Rotary embedding and relative position biases as ONNX Runtime's optimizers write them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import CONTRIB, Number, Unsupported, op
from .attention import rotary_embedding, with_heads


@op("RotaryEmbedding", domain=CONTRIB)
def rotary_embedding_by_positions(
    x: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    is_packed_batching: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """RotaryEmbedding of [B, N, H D] or [B, H, N, D] at positions [B, N], or from one position, [1], on."""
    if is_packed_batching:
        raise Unsupported("its rows have different lengths and no padding (is_packed_batching)")
    if scale != 1.0:
        raise Unsupported(f"its scale is {scale}")
    size = rotary_embedding_dim or 2 * cos_cache.shape[-1]
    heads = num_heads or (x.shape[-1] // size if x.ndim == 3 else 0)
    tokens = x.shape[1] if x.ndim == 3 else x.shape[2]
    where = position_ids if position_ids.ndim == 2 else position_ids + torch.arange(tokens).unsqueeze(0)
    return rotary_embedding(
        x, cos_cache, sin_cache, where, interleaved=interleaved, num_heads=heads, rotary_embedding_dim=size
    )


@op("RelativePositionBias", domain=CONTRIB)
def relative_position_bias(
    table: Tensor, queries: Number, keys: Number, *, max_distance: int, is_bidirectional: int = 0
) -> Tensor:
    """T5's bias [1, H, N, M] by distance: near ones have buckets of their own, farther ones share wider and wider ones.

    table  declared as [buckets, H], with the numbers of [H, buckets]
    Source: Raffel et al. 2020, arXiv:1910.10683, and the model's code.
    """
    buckets, heads = table.shape
    ahead = torch.arange(keys).unsqueeze(0) - torch.arange(queries).unsqueeze(1)
    side = buckets // 2 if is_bidirectional else buckets
    distance = ahead.abs() if is_bidirectional else torch.clamp(-ahead, min=0)
    exact = side // 2
    growth = torch.log(torch.clamp(distance, min=1).float() / exact) / math.log(max_distance / exact)
    shared = torch.clamp(exact + (growth * (side - exact)).to(torch.int64), max=side - 1)
    bucket = torch.where(distance < exact, distance, shared)
    if is_bidirectional:
        bucket = bucket + side * (ahead > 0)
    return F.embedding(bucket, table.reshape(heads, buckets).t()).permute(2, 0, 1).unsqueeze(0)


@op("GatedRelativePositionBias", domain=CONTRIB)
def gated_relative_position_bias(
    query: Tensor,
    query_bias: Tensor,
    relative: Tensor,
    weight: Tensor,
    bias: Tensor,
    constant: Tensor,
    token_offset: Tensor | None = None,
    *,
    num_heads: int,
) -> Tensor:
    """A bias [1, H, N, N] weighed by gates that follow from each query, [B, H, N, N] (WavLM, arXiv:2110.13900).

    query [B, N, H D];  weight [D, 2 E], bias [2 E]: what the two gates are sums of;  constant [1, H, 1, 1]
    """
    if token_offset is not None:
        raise Unsupported("its rows have different lengths and no padding (token_offset)")
    gates = torch.matmul(with_heads(query + query_bias, num_heads), weight) + bias
    update, reset = torch.sigmoid(gates.unflatten(-1, (2, -1)).sum(-1)).split(1, -1)
    return (update * (reset * constant - 1.0) + 2.0) * relative
