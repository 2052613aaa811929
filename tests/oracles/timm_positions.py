"""timm's encoders whose attention knows positions: EVA-02 and DINOv3 (rotation), BEiT (a bias for every pair)."""

from __future__ import annotations

from typing import Any

import torch
from oracle import Stream
from torch import Tensor, nn


def timm_eva(model: Any, family: Any, methods: Any, images: Tensor) -> tuple[list[Tensor], Stream]:
    """Images [B, 3, H, W] -> [head output [B, K]]."""
    stream = Stream(methods, len(model.blocks), family.prefix)
    x, angles = model._pos_embed(model.patch_embed(images))
    x, (sin, cos) = model.norm_pre(x), rotation(angles, family.prefix)
    for layer, block in enumerate(model.blocks):
        attn = block.attn
        x = stream.cut("before_attention", layer, x)
        q, k, v = _projections(attn, block.norm1(x))
        now = [stream.rows(table, x.shape[0])[:, None] for table in (sin, cos)]
        turned = [turn(t, *now, half=attn.rotate_half) for t in (q, k)]
        mixed = attn.norm(stream.attend(*turned, v, attn.scale, raw_keys=k))
        x = stream.cut("after_attention", layer, x + _scaled(attn.proj(mixed), block.gamma_1))
        x = x + _scaled(_mlp(block.mlp, block.norm2(x)), block.gamma_2)
        x = stream.cut("after_block", layer, x)
    return [_head(model, model.norm(x), stream)], stream


def timm_beit(model: Any, family: Any, methods: Any, images: Tensor) -> tuple[list[Tensor], Stream]:
    """Images [B, 3, H, W] -> [head output [B, K]]."""
    stream = Stream(methods, len(model.blocks), family.prefix)
    x = model.patch_embed(images)
    x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], 1)
    for layer, block in enumerate(model.blocks):
        attn = block.attn
        x = stream.cut("before_attention", layer, x)
        q, k, v = _projections(attn, block.norm1(x))
        table = attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)
        mixed = stream.attend(q, k, v, attn.scale, bias=stream.pairs(table, x.shape[0]))
        x = stream.cut("after_attention", layer, x + _scaled(attn.proj(mixed), block.gamma_1))
        x = x + _scaled(_mlp(block.mlp, block.norm2(x)), block.gamma_2)
        x = stream.cut("after_block", layer, x)
    return [_head(model, model.norm(x), stream)], stream


def rotation(angles: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine [N, D] of all tokens, from those of the patches side by side: prefix tokens do not turn."""
    sin, cos = angles.chunk(2, -1)
    still = sin.new_zeros(prefix, sin.shape[1])
    return torch.cat([still, sin]), torch.cat([still + 1, cos])


def turn(x: Tensor, sin: Tensor, cos: Tensor, *, half: bool) -> Tensor:
    """Rotate pairs of channels: (i, i + D/2) with `half`, else (2i, 2i + 1)."""
    a, b = (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]) if half else (x[..., ::2], x[..., 1::2])
    other = torch.empty_like(x)
    if half:
        other[..., : x.shape[-1] // 2], other[..., x.shape[-1] // 2 :] = -b, a
    else:
        other[..., ::2], other[..., 1::2] = -b, a
    return x * cos + other * sin


def _projections(attn: Any, x: Tensor) -> list[Tensor]:
    """Queries, keys and values [B, H, N, D], before any rotation."""
    if attn.qkv is None:
        parts = [attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)]
    else:
        parts = list(nn.functional.linear(x, attn.qkv.weight).chunk(3, -1))
        if attn.q_bias is not None:
            parts = [parts[0] + attn.q_bias, parts[1], parts[2] + attn.v_bias]
    return [t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in parts]


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """A plain MLP, or SwiGLU with one packed projection or two."""
    if hasattr(mlp, "fc1_g"):
        return mlp.fc2(mlp.norm(mlp.act(mlp.fc1_g(x)) * mlp.fc1_x(x)))
    if mlp.fc2.in_features < mlp.fc1.out_features:
        gate, value = mlp.fc1(x).chunk(2, -1)
        return mlp.fc2(mlp.norm(nn.functional.silu(gate) * value))
    return mlp.fc2(mlp.norm(mlp.act(mlp.fc1(x))))


def _scaled(x: Tensor, by: Tensor | None) -> Tensor:
    return x if by is None else x * by


def _head(model: Any, x: Tensor, stream: Stream) -> Tensor:
    pooled = stream.mean(x) if model.global_pool == "avg" else x[:, 0]
    return model.head(model.fc_norm(pooled))
